"""Rules on every pipeline: the identities between rules and with the pipeline's own guidance, and no trace left behind."""

import copy
import functools

import diffusers
import pytest
import torch
from pipelines import GUIDED, check_close, unrecognised

from diffaccel import APG, CFG, guide
from diffaccel.guidance.rules import COND, Rule

SCALE = 5.0
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": False}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "v-prediction": (diffusers.DDIMScheduler, {"prediction_type": "v_prediction"}),
}
STEEP = APG(SCALE, norm_threshold=0.5, momentum=-0.5)


@functools.cache
def in_double(name: str):
    """The pipeline with all its weights in float64, in which rounding cannot hide a mistake."""
    pipe = copy.deepcopy(GUIDED[name].build())
    for component in vars(pipe).values():
        if isinstance(component, torch.nn.Module):
            component.double()
    return pipe


def guided_call(name: str, pipe, rule, own_scale: float = 2.0, seed=(0, 1), **arguments) -> torch.Tensor:
    case = GUIDED[name]
    with guide(pipe, rule):
        return case.call(pipe, seed=list(seed), **case.guided(own_scale, len(seed)), **arguments)


@pytest.mark.parametrize("name", GUIDED)
def test_cfg_is_the_guidance_of_the_pipeline_whatever_scale_that_runs_at(name):
    case, pipe = GUIDED[name], GUIDED[name].build()
    own = case.call(pipe, seed=[0, 1], **case.guided(SCALE, 2))
    for own_scale in (1.3, 20.0):
        tolerance = 1e-6 if name == "classes" else 0  # that pipeline interpolates by another formula
        check_close(guided_call(name, pipe, CFG(SCALE), own_scale), own, tolerance)
    unguided = case.call(pipe, seed=[0, 1], **case.guided(1.0, 2))
    check_close(guided_call(name, pipe, CFG(1.0)), unguided, 0)
    with pytest.raises(AssertionError):
        check_close(unguided, own, 1e-4)


@pytest.mark.parametrize("name", GUIDED)
def test_apg_without_projection_momentum_and_cap_is_cfg(name):
    # In float32 a scheduler that starts at σ = 700, as SVD's does, magnifies rounding to 3e-6.
    plain = guided_call(name, in_double(name), APG(SCALE, eta=1.0, momentum=0.0))
    check_close(plain, guided_call(name, in_double(name), CFG(SCALE)), 1e-12)


@pytest.mark.parametrize("name", GUIDED)
def test_a_sample_does_not_depend_on_its_batch(name):
    pipe = in_double(name)
    together = guided_call(name, pipe, STEEP)
    alone = [guided_call(name, pipe, STEEP, seed=[seed]) for seed in (0, 1)]
    check_close(together, torch.cat(alone), 1e-12)
    assert not torch.equal(*alone)


@pytest.mark.parametrize("name", GUIDED)
def test_every_call_starts_afresh_and_the_pipeline_is_given_back(name):
    case, pipe = GUIDED[name], GUIDED[name].build()
    call = functools.partial(case.call, pipe, seed=[0, 1], **case.guided(SCALE, 2))
    before, cls, slots = call(), type(pipe), dict(vars(pipe))

    def failing(index, output):
        if index == 2:
            raise ArithmeticError("in the middle")
        return output

    with guide(pipe, STEEP):
        first = call()
        with pytest.raises(ArithmeticError), case.watched(pipe, failing):
            call(steps=6)
        check_close(call(), first, 0)
        assert vars(pipe).keys() == slots.keys()
    assert type(pipe) is cls
    assert all(vars(pipe)[key] is value for key, value in slots.items() if not key.startswith("_"))
    assert not {"step", "__call__", "forward"} & (
        vars(pipe.scheduler).keys() | vars(getattr(pipe, case.network)).keys()
    )
    check_close(call(), before, 0)


@pytest.mark.filterwarnings("ignore:.*__array__:DeprecationWarning")  # numpy 2 on stock schedulers
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_identities_hold_with_every_scheduler(scheduler):
    case, pipe = GUIDED["sd"], copy.copy(in_double("sd"))
    cls, settings = SCHEDULERS[scheduler]
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **settings)
    prompts = {"prompt": ["a cat", "a dog"]}
    own = case.call(pipe, seed=[0, 1], guidance_scale=SCALE, **prompts)
    check_close(guided_call("sd", pipe, CFG(SCALE), **prompts), own, 0)
    check_close(guided_call("sd", pipe, APG(SCALE, eta=1.0, momentum=0.0), **prompts), own, 1e-12)
    check_close(
        guided_call("sd", pipe, CFG(1.0), **prompts), case.call(pipe, seed=[0, 1], guidance_scale=1, **prompts), 0
    )
    together = guided_call("sd", pipe, STEEP, **prompts)
    alone = [guided_call("sd", pipe, STEEP, seed=[k], prompt=prompts["prompt"][k]) for k in (0, 1)]
    check_close(together, torch.cat(alone), 1e-12)


@pytest.mark.parametrize("name", GUIDED)
def test_the_branches_of_an_unknown_pipeline_are_told_apart(name):
    case, pipe = GUIDED[name], GUIDED[name].build()
    with guide(pipe, CFG(SCALE)) as known:
        want = case.call(pipe, seed=[0, 1], **case.guided(2.0, 2))
    with guide(unrecognised(pipe), CFG(SCALE)) as learned:
        assert learned.layout is None
        check_close(case.call(pipe, seed=[0, 1], **case.guided(3.0, 2)), want, 0)
    assert learned.layout == known.layout


def test_a_scale_per_frame():
    case, pipe = GUIDED["svd"], GUIDED["svd"].build()
    own = case.call(pipe, **case.guided(SCALE))
    with guide(pipe, CFG(SCALE)):
        check_close(case.call(pipe, min_guidance_scale=1.0, max_guidance_scale=3.0), own, 0)


def test_two_networks_for_two_ranges_of_noise():
    """Wan 2.2: the second one takes over at the boundary, with a scale of its own."""
    base = GUIDED["wan"].build()
    second = copy.deepcopy(base.transformer)
    with torch.no_grad():
        second.proj_out.weight.mul_(1.5)
    pipe = diffusers.WanPipeline(**{**base.components, "transformer_2": second}, boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    case = GUIDED["wan"]
    own = case.call(pipe, seed=[0, 1], guidance_scale=SCALE, guidance_scale_2=SCALE)
    with guide(pipe, CFG(SCALE)):
        check_close(case.call(pipe, seed=[0, 1], guidance_scale=2.0, guidance_scale_2=1.0), own, 0)
    with pytest.raises(AssertionError):
        check_close(GUIDED["wan"].call(base, seed=[0, 1], guidance_scale=SCALE), own, 1e-4)


class Recorder(Rule):
    """Conditional predictions, kept."""

    def __init__(self):
        self.seen = []

    def __call__(self, predictions, context):
        self.seen.append((predictions, context.x))
        return predictions[COND]


@pytest.mark.parametrize("name", GUIDED)
def test_a_rule_sees_states_and_predictions_of_one_shape_and_at_least_float32(name):
    rule = Recorder()
    guided_call(name, GUIDED[name].build(), rule)
    for predictions, state in rule.seen:
        shapes = {tensor.shape for tensor in (*predictions.values(), state)}
        assert len(predictions) == 2 and len(shapes) == 1 and len(state) == 2
        assert all(tensor.dtype == torch.float32 for tensor in predictions.values())
