"""Intervals: what is not needed is not computed, and leaving it out changes nothing."""

import functools
import math
from contextlib import contextmanager

import diffusers
import pytest
import torch
from networks import tiny_unet
from pipelines import GUIDED, check_close, unrecognised

import diffaccel
from diffaccel import APG, CFG, Interval, guide
from diffaccel.core.errors import GuidanceError

SCALE = 5.0
NEVER = Interval(CFG(SCALE), sigma_range=(1e6, 1e7))
MIDDLE = {"fraction_range": (0.25, 0.75)}  # switches on and off again


class Spendthrift(Interval):
    """Computes what it does not need."""

    def branches(self, context):
        return self.rule.branches(context)


class LevelsSeen(CFG):
    """CFG that keeps the noise-to-signal ratios it is asked for, ahead of the network's call and after it."""

    def __post_init__(self):
        super().__post_init__()
        self.__dict__["pairs"] = []

    def __call__(self, predictions, context):
        self.pairs.append((context.level.rho, context.find_level().rho))
        return super().__call__(predictions, context)


@functools.cache
def levels(name: str) -> list[tuple[float, float]]:
    case, rule = GUIDED[name], LevelsSeen(SCALE)
    counted_call(case, case.build(), Interval(rule, sigma_range=(0.0, math.inf)), steps=8)
    return rule.pairs


@contextmanager
def rows_counted(pipe, network: str):
    """Yield a list that grows by the samples in every call of the network."""
    rows: list[int] = []
    real = getattr(pipe, network)
    handle = real.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    try:
        yield rows
    finally:
        handle.remove()


def counted_call(case, pipe, rule, seed=(0, 1), own_scale: float = 2.0, **arguments):
    with rows_counted(pipe, case.network) as rows, guide(pipe, rule):
        return case.call(pipe, seed=list(seed), **case.guided(own_scale, len(seed)), **arguments), rows


@pytest.mark.parametrize("rule", [CFG(SCALE), APG(SCALE, momentum=-0.5)], ids=["cfg", "apg"])
@pytest.mark.parametrize("kind", ["fraction_range", "sigma_range"])
@pytest.mark.parametrize("name", GUIDED)
def test_sparing_halves_the_rows_and_changes_nothing(name, kind, rule):
    case, pipe = GUIDED[name], GUIDED[name].build()
    ratios = sorted({ratio for ratio, _ in levels(name)})
    settings = MIDDLE if kind == "fraction_range" else {kind: (ratios[0], ratios[-2])}
    want, full = counted_call(case, pipe, Spendthrift(rule, **settings), steps=8)
    got, rows = counted_call(case, pipe, Interval(rule, **settings), steps=8)
    evaluations = sum(full) // 4
    assert sum(full) == 4 * evaluations and sum(rows) % 2 == 0
    active = (sum(rows) - 2 * evaluations) // 2
    if kind == "fraction_range":
        assert active == int(0.75 * evaluations) - int(0.25 * evaluations)
    assert 0 < active < evaluations
    assert rows[0] == rows[-1] == 2
    check_close(got, want, 1e-5 if name == "svd" else 1e-6)  # sums over 2 rows in place of 4 round differently


@pytest.mark.parametrize("name", GUIDED)
def test_the_ends_of_the_range(name):
    case, pipe = GUIDED[name], GUIDED[name].build()
    guided, rows = counted_call(case, pipe, CFG(SCALE))
    for everything in ({"fraction_range": (0, 1)}, {"sigma_range": (0, math.inf)}):
        whole, all_rows = counted_call(case, pipe, Interval(CFG(SCALE), **everything))
        check_close(whole, guided, 0)
        assert all_rows == rows
    never, few_rows = counted_call(case, pipe, NEVER)
    check_close(never, case.call(pipe, seed=[0, 1], **case.guided(1.0, 2)), 0)
    assert sum(few_rows) == sum(rows) // 2


@pytest.mark.parametrize("name", GUIDED)
def test_a_pipeline_that_is_not_known_tries_halves_before_it_relies_on_them(name):
    case = GUIDED[name]
    pipe = case.build()
    want, known = counted_call(case, pipe, NEVER)
    got, rows = counted_call(case, unrecognised(pipe), NEVER)
    check_close(got, want, 1e-6 if name != "svd" else 1e-5)
    apart = case.forwards == 2 or name.split("-")[-1] in ("flux", "dynamic")
    # The first evaluation is whole; where both branches are in one call, the second one is whole and half.
    assert sum(rows) - sum(known) == (2 if apart else 6)


def test_a_network_that_cannot_be_halved_is_called_whole():
    case = GUIDED["sd"]
    pipe = unrecognised(case.build())
    change = lambda index, output: output + output.mean(0, keepdim=True)  # noqa: E731 - samples depend on their batch
    with case.watched(pipe, change) as evaluations:
        got, rows = counted_call(case, pipe, Interval(CFG(SCALE), **MIDDLE))
        assert sum(rows) == 4 * (len(evaluations) - 1) + 2
    with case.watched(pipe, change):
        check_close(got, counted_call(case, pipe, Spendthrift(CFG(SCALE), **MIDDLE))[0], 0)


@pytest.mark.parametrize("seeds", [[0, 1], [0, 0], [0]])
@pytest.mark.parametrize("name", ["dit", "sd", "classes", "pixart"])
def test_without_guidance_no_sample_is_taken_for_a_branch(name, seeds):
    """A batch of two looks like two branches."""
    case, pipe, count = GUIDED[name], GUIDED[name].build(), len(seeds)
    others = {"sd": {"prompt": ["a cat", "a dog"][:count]}, "dit": {"class_labels": [1, 2][:count]}}.get(name, {})
    want = case.call(pipe, seed=seeds, guidance_scale=1.0, **others)
    for candidate in (pipe, unrecognised(case.build())):
        with guide(candidate, CFG(1.0)) as guidance:
            case.call(candidate, seed=seeds, guidance_scale=3.0, **others)  # in which the layout is learned
            check_close(case.call(candidate, seed=seeds, guidance_scale=1.0, **others), want, 0)
        assert guidance.layout is not None
        with guide(candidate, NEVER), pytest.raises(GuidanceError, match="call it with guidance_scale above 1"):
            case.call(candidate, seed=seeds, guidance_scale=1.0, **others)


def test_a_distilled_unet_whose_pipeline_runs_one_branch_whatever_its_scale():
    case = GUIDED["sd"]
    base = case.build()
    unet = diffusers.UNet2DConditionModel.from_config(base.unet.config, time_cond_proj_dim=8).eval()
    pipe = diffusers.StableDiffusionPipeline(**{**base.components, "unet": unet}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    want = case.call(pipe, seed=[0, 1], guidance_scale=8.0, prompt=["a cat", "a dog"])
    with guide(pipe, CFG(1.0)):
        check_close(case.call(pipe, seed=[0, 1], guidance_scale=8.0, prompt=["a cat", "a dog"]), want, 0)
    with guide(pipe, NEVER), pytest.raises(GuidanceError, match="without its unconditional branch"):
        case.call(pipe, seed=[0, 1], guidance_scale=8.0, prompt=["a cat", "a dog"])


def test_a_model_without_classes_whose_pipeline_runs_one_branch_whatever_its_scale():
    pipe = diffaccel.ClassConditionalPipeline(tiny_unet(None), diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "pt", "return_dict": False}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    noise = torch.cat([torch.randn(1, *pipe.sample_shape, generator=generator) for generator in generators])
    (want,) = pipe(noise=noise, **call)
    with guide(pipe, CFG(1.0)):
        check_close(pipe(noise=noise, **call)[0], want, 0)


def test_a_picture_prompt_is_tried_out():
    """Arguments that add some to the network's call are not covered by what is known of a pipeline."""
    case, pipe = GUIDED["sd"], GUIDED["sd"].build()
    want, known = counted_call(case, pipe, NEVER)
    got, rows = counted_call(case, pipe, NEVER, cross_attention_kwargs={})
    check_close(got, want, 1e-6)
    assert sum(rows) - sum(known) == 4  # the first evaluation is whole and half


def test_guidance_that_a_callback_ends_midway_is_not_taken_for_a_branch():
    case, pipe = GUIDED["sd"], GUIDED["sd"].build()

    def end(pipe, step, time, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    arguments = {"prompt": ["a cat", "a dog"], "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with guide(pipe, NEVER), pytest.raises(GuidanceError, match="without its unconditional branch"):
        case.call(pipe, seed=[0, 1], guidance_scale=5.0, callback_on_step_end=end, **arguments)
    want = case.call(pipe, seed=[0, 1], guidance_scale=1.0, **arguments)
    with guide(pipe, CFG(1.0)):
        got = case.call(pipe, seed=[0, 1], guidance_scale=5.0, callback_on_step_end=end, **arguments)
    check_close(got, want, 0)


@pytest.mark.parametrize("name", GUIDED)
def test_the_level_is_the_same_ahead_of_a_step_and_in_it(name):
    """Whether to act is decided before the network is called; schedulers say more only when they step."""
    assert all(ahead == pytest.approx(then, rel=1e-6) for ahead, then in levels(name))
    assert levels(name) == sorted(levels(name), reverse=True)
