"""Layers left out of some calls: the same as layers whose branches are zero, and nothing remains afterwards."""

import copy
import gc
import json
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from branches import inputs_of, own, traces, zeroed
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from networks import tiny_unet
from pipelines import IMAGE_TO_IMAGE, PIPELINES, check_close

import diffaccel
from diffaccel import CFG, guide
from diffaccel.core.errors import UsageError
from diffaccel.core.schedule import from_diffusers
from diffaccel.models.networks import network_of
from diffaccel.samplers.searched import PlanFile, SearchedScheduler, model_config
from diffaccel.samplers.usf import Decision, SolverSchedule
from diffaccel.search.layer_space import LayerSpace
from diffaccel.search.layers import (
    apply_plan,
    bodies,
    bypass,
    remove_plan,
    skip_layers,
    skippable,
)

CALLS = 3


def plan_file(pipe, layers=None, calls=CALLS) -> PlanFile:
    """DDIM from noise on, with layers."""
    schedule = from_diffusers(pipe.scheduler)
    times = torch.linspace(schedule.t_max, schedule.t_min, calls + 1)[:-1].tolist()
    decisions = SolverSchedule(tuple(times), (Decision(),) * calls)
    return PlanFile(decisions.compile(schedule), decisions, model_config(pipe.scheduler.config), layers=layers or {})


def count_runs(network, names) -> dict[str, int]:
    counts = dict.fromkeys(names, 0)
    modules = dict(network.named_modules())
    for name in names:

        def count(*_, name=name):
            counts[name] += 1

        modules[name].register_forward_hook(count)
    return counts


@pytest.mark.parametrize("name", PIPELINES)
def test_a_bypass_is_a_branch_that_ends_in_zero(name):
    case = PIPELINES[name]
    pipe = own(case)
    network = network_of(pipe)
    args, kwargs = inputs_of(case, pipe)
    modules, before = dict(network.named_modules()), traces(network)
    with torch.no_grad():
        whole = network(*args, **kwargs)[0]
        for body in bodies(network):
            with bypass(network, {"skip": [[body]]}, lambda: 0):
                found = network(*args, **kwargs)[0]
            with zeroed(modules[body]):
                check_close(found, network(*args, **kwargs)[0], 1e-6)
            assert (found - whole).abs().max() > 1e-4, body
        with bypass(network, {"skip": [bodies(network), []]}, lambda: 1):
            check_close(network(*args, **kwargs)[0], whole, 0)
    assert traces(network) == before


@pytest.mark.parametrize("name", PIPELINES)
def test_every_call_leaves_out_its_own(name):
    """Compared with a run before each of whose evaluations weights are set to zero."""
    case = PIPELINES[name]
    pipe = own(case)
    network = network_of(pipe)
    names, scheduler = bodies(network), pipe.scheduler
    modules = dict(network.named_modules())
    skip = [names[::2], [], [names[-1]]]
    apply_plan(pipe, plan_file(pipe))
    calls, stack = [], ExitStack()

    def prepare(*_):
        for body in skip[len(calls) // case.forwards]:
            stack.enter_context(zeroed(modules[body]))
        calls.append(None)

    hooks = [
        network.register_forward_pre_hook(prepare),
        network.register_forward_hook(lambda *_: stack.close()),
    ]
    want = case.call(pipe, CALLS)
    for hook in hooks:
        hook.remove()
    whole, before = case.call(pipe, CALLS), traces(network)

    apply_plan(pipe, plan_file(pipe, {"skip": [[]] * CALLS, "scale": [None] * CALLS}))
    check_close(case.call(pipe, CALLS), whole, 0)
    apply_plan(pipe, plan_file(pipe, {"skip": skip}))
    found = case.call(pipe, CALLS)
    check_close(found, want, 1e-5)
    check_close(case.call(pipe, CALLS), found, 0)  # a second run begins at its first call
    remove_plan(pipe)
    assert pipe.scheduler is scheduler and traces(network) == before


@pytest.mark.parametrize("name", ["classes", "wan", "sd"])
def test_what_is_left_out_does_not_run(name):
    case = PIPELINES[name]
    pipe = own(case)
    names = bodies(network_of(pipe))
    counts = count_runs(network_of(pipe), names)
    skip = [names[:1], [], names]
    apply_plan(pipe, plan_file(pipe, {"skip": skip}))
    case.call(pipe, CALLS)
    assert counts == {name: case.forwards * sum(name not in call for call in skip) for name in names}


@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_image_to_image_begins_at_its_own_entry(name):
    case = IMAGE_TO_IMAGE[name]
    pipe = own(case)
    (first, *_) = bodies(network_of(pipe))
    counts = count_runs(network_of(pipe), [first])
    apply_plan(pipe, plan_file(pipe, {"skip": [[first], [first], [], [first]]}, calls=4))
    case.call(pipe, 4)  # with strength 0.5: the last two
    assert counts == {first: case.forwards}


def test_guidance_in_one_call_or_two():
    """A batch of both branches skips what a call for each skips, with the pipeline's own guidance and with ours."""
    case = PIPELINES["sd"]
    pipe = own(case)
    names = bodies(network_of(pipe))
    file = plan_file(pipe, {"skip": [names[1:3], [], names[-1:]], "scale": [None, 0.5, None]})
    apply_plan(pipe, file)
    want = case.call(pipe, CALLS, guidance_scale=3.0)
    with guide(pipe, CFG(3.0)):
        check_close(case.call(pipe, CALLS, guidance_scale=2.0), want, 1e-6)
    uncond, cond = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("", "a cat"))
    given = {"num_inference_steps": CALLS, "height": 8, "width": 8, "output_type": "latent"}
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = pipe(prompt_embeds=cond, negative_prompt_embeds=uncond, latents=x, guidance_scale=3.0, **given)[0]
    network, scheduler = pipe.unet, pipe.scheduler
    scheduler.set_timesteps(CALLS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            low, high = (network(x, t, encoder_hidden_states=one).sample for one in (uncond, cond))
            x = scheduler.step(low + 3.0 * (high - low), t, x).prev_sample
    check_close(together, x, 1e-5)


@pytest.mark.parametrize("name", ["sd", "ddpm", "classes", "animatediff", "svd"])
def test_scaled_skip_features(name):
    case = PIPELINES[name]
    pipe = own(case)
    network = network_of(pipe)
    args, kwargs = inputs_of(case, pipe)

    def times(factor):
        def hook(block, given, named):
            key = "res_hidden_states_tuple"
            if key in named:
                return given, {**named, key: tuple(value * factor for value in named[key])}
            return (given[0], tuple(value * factor for value in given[1]), *given[2:]), named

        return [block.register_forward_pre_hook(hook, with_kwargs=True) for block in network.up_blocks]

    def scaled(factor):
        with bypass(network, {"scale": [factor]}, lambda: 0):
            return network(*args, **kwargs)[0]

    with torch.no_grad():
        whole = network(*args, **kwargs)[0]
        check_close(scaled(1.0), whole, 0)
        check_close(scaled(None), whole, 0)
        for factor in (0, 0.7):
            hooks = times(factor)
            want = network(*args, **kwargs)[0]
            for hook in hooks:
                hook.remove()
            check_close(scaled(factor), want, 0)
            assert (want - whole).abs().max() > 1e-4


def test_blocks_that_resample_or_divide():
    """Resampling is kept, several transformer blocks are skipped one by one, what is divided stays divided."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    pixels = UNet2DModel(
        **sizes, down_block_types=("AttnDownBlock2D",) * 2, up_block_types=("AttnUpBlock2D",) * 2,
        downsample_type="resnet", upsample_type="resnet", mid_block_scale_factor=2.0,
    )  # fmt: skip
    latents = UNet2DConditionModel(
        **sizes, cross_attention_dim=8, attention_head_dim=4, transformer_layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    assert not [name for name in bodies(pixels) if "sampler" in name]
    assert len([name for name in bodies(latents) if "transformer_blocks" in name]) == 2 * 4
    for network in (pixels, latents):
        x, text = torch.randn(2, network.config.in_channels, 8, 8), torch.randn(2, 3, 8)
        given = {"encoder_hidden_states": text} if network is latents else {}
        modules = dict(network.named_modules())
        for body in bodies(network):
            with torch.no_grad(), bypass(network, {"skip": [[body]]}, lambda: 0):
                found = network(x, 5, **given).sample
            with zeroed(modules[body]):
                check_close(found, network(x, 5, **given).sample, 1e-6)


def test_half_precision_and_compiled_blocks():
    network = tiny_unet().to(torch.bfloat16)
    names = bodies(network)
    x, label = torch.randn(2, 1, 8, 8).bfloat16(), torch.tensor([0, 1])
    with torch.no_grad(), bypass(network, {"skip": [names[::2]], "scale": [0.9]}, lambda: 0):
        want = network(x, 5, label).sample
        for name, module in network.named_modules():
            if name in names:
                module.compile(backend="eager")
        check_close(network(x, 5, label).sample, want, 0)
    assert want.dtype == torch.bfloat16


def test_nothing_remains_after_an_error():
    case = PIPELINES["classes"]
    pipe = own(case)
    names, before, scheduler, config = bodies(pipe.unet), traces(pipe.unet), pipe.scheduler, dict(pipe.config)
    whole = case.call(pipe, CALLS)
    layers = {"skip": [names] * CALLS, "scale": [0.5] * CALLS}

    def stop(index, output):
        raise KeyboardInterrupt

    apply_plan(pipe, plan_file(pipe, layers))
    with pytest.raises(KeyboardInterrupt), case.watched(pipe, stop):
        case.call(pipe, CALLS)
    with pytest.raises(UsageError, match="skipped already"), skip_layers(pipe, layers):
        pass
    remove_plan(pipe)
    remove_plan(pipe)
    assert traces(pipe.unet) == before and pipe.scheduler is scheduler and dict(pipe.config) == config
    check_close(case.call(pipe, CALLS), whole, 0)

    pipe.scheduler = diffaccel.DEISScheduler.from_config(scheduler.config)
    with pytest.raises(KeyboardInterrupt), skip_layers(pipe, layers), case.watched(pipe, stop):
        case.call(pipe, CALLS)
    assert traces(pipe.unet) == before


def test_a_plan_replaces_the_one_before(tmp_path):
    case = PIPELINES["classes"]
    pipe = own(case)
    scheduler, before = pipe.scheduler, traces(pipe.unet)
    (first, *_, last) = bodies(pipe.unet)
    apply_plan(pipe, plan_file(pipe, {"skip": [[first]] * CALLS}))
    plan_file(pipe, {"skip": [[last]] * 2}, calls=2).save(tmp_path / "plan.json")
    apply_plan(pipe, tmp_path / "plan.json")
    twice = case.call(pipe, 2)
    remove_plan(pipe)
    assert pipe.scheduler is scheduler and traces(pipe.unet) == before
    apply_plan(pipe, tmp_path / "plan.json")
    check_close(case.call(pipe, 2), twice, 0)
    with pytest.raises(UsageError, match="another network"):
        apply_plan(pipe, plan_file(pipe, {"skip": [["nothing"]] * CALLS}))
    check_close(case.call(pipe, 2), twice, 0)  # a plan that is refused changes nothing
    pipe.scheduler = other = copy.deepcopy(scheduler)
    remove_plan(pipe)
    assert pipe.scheduler is other and traces(pipe.unet) == before


def test_copies_and_saved_pipelines_are_whole(tmp_path):
    """And skip the same once the plan, which their scheduler carries, is applied to them."""
    case = PIPELINES["classes"]
    pipe = own(case)
    names, before = bodies(pipe.unet), traces(pipe.unet)
    apply_plan(pipe, plan_file(pipe))
    whole = case.call(pipe, CALLS)
    apply_plan(pipe, plan_file(pipe, {"skip": [names[:2], names[2:], []]}))
    want = case.call(pipe, CALLS)
    pipe.save_pretrained(tmp_path)
    loaded = diffaccel.ClassConditionalPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for other in (copy.deepcopy(pipe), loaded):
        assert traces(other.unet)[0].keys() == before[0].keys()
        assert [type(one) for one in other.unet.modules()] == [kind for kind, _ in before[0].values()]
        check_close(case.call(other, CALLS), whole, 0)
        apply_plan(other)
        check_close(case.call(other, CALLS), want, 0)
        remove_plan(other)
        check_close(case.call(other, CALLS), whole, 0)
    check_close(case.call(pipe, CALLS), want, 0)


def test_pipelines_that_share_a_network():
    case = PIPELINES["classes"]
    pipe = own(case)
    other = diffaccel.ClassConditionalPipeline(pipe.unet, copy.deepcopy(pipe.scheduler))
    other.set_progress_bar_config(disable=True)
    whole, before = case.call(other, CALLS), traces(pipe.unet)
    file = plan_file(pipe, {"skip": [bodies(pipe.unet)] * CALLS, "scale": [0.5] * CALLS})
    apply_plan(pipe, file)
    check_close(case.call(other, CALLS), whole, 0)
    skipped = case.call(pipe, CALLS)
    check_close(case.call(other, CALLS), whole, 0)
    with pytest.raises(UsageError, match="remove_plan"):
        apply_plan(other, file)
    del pipe
    gc.collect()
    assert traces(other.unet) == before  # what is gone skips no more
    apply_plan(other, file)
    check_close(case.call(other, CALLS), skipped, 0)


def test_schedulers_that_fit():
    case = PIPELINES["classes"]
    pipe = own(case)
    layers = {"skip": [bodies(pipe.unet)[:1]] * 2}
    pipe.scheduler = diffaccel.DEISScheduler.from_config(pipe.scheduler.config)
    with skip_layers(pipe, layers), pytest.raises(UsageError, match="2 network calls; this run has 3"):
        case.call(pipe, 3)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with skip_layers(pipe, layers), pytest.raises(UsageError, match="does not count its steps"):
        case.call(pipe, 2)
    with pytest.raises(UsageError, match="no plan yet"):
        apply_plan(pipe)
    with pytest.raises(UsageError, match="one network"), skip_layers(object(), layers):
        pass


def test_digits():
    """The shipped model: what a call leaves out is what the plan says, from the file to the image."""
    pipe = diffaccel.load_pipeline("digits")
    pipe.set_progress_bar_config(disable=True)
    shares = skippable(pipe.unet)
    assert 0.7 < sum(shares.values()) < 1.0
    space = LayerSpace(shares, calls=4, budget=3.0)
    layers = space.draw(np.random.default_rng(0))
    file = plan_file(pipe, layers, calls=4)
    apply_plan(pipe, PlanFile.from_dict(json.loads(json.dumps(file.to_dict()))))
    noise = torch.randn(2, *pipe.sample_shape, generator=torch.Generator().manual_seed(0))
    images = pipe([3, 7], noise=noise, num_inference_steps=4, output_type="pt").images
    remove_plan(pipe)
    call = iter(range(4))
    pipe.scheduler = SearchedScheduler.from_config(pipe.scheduler.config, plan=file.to_dict())
    current = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: current.append(next(call)))
    with bypass(pipe.unet, layers, lambda: current[-1]):
        check_close(pipe([3, 7], noise=noise, num_inference_steps=4, output_type="pt").images, images, 0)
    hook.remove()
    whole = pipe([3, 7], noise=noise, num_inference_steps=4, output_type="pt").images
    assert (whole - images).abs().max() > 1e-3


def test_skippable_looks_at_networks():
    with pytest.raises(UsageError, match=r"such as pipe\.unet"):
        skippable(diffaccel.load_pipeline("digits"))
