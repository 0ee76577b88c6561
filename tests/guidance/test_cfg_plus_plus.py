"""CFG++: denoise with guidance, renoise without, as arithmetic and through real pipelines."""

import itertools

import diffusers
import pytest
import torch
from pipelines import PIPELINES

from diffaccel import CFGPlusPlus, guide
from diffaccel.core.prediction import convert
from diffaccel.core.schedule import from_diffusers, network_output
from diffaccel.guidance.context import Context, Level, Target
from diffaccel.samplers.registry import SAMPLERS

LEVELS = [
    *(Level(0.6, 0.8, kind) for kind in ("epsilon", "sample")),
    Level(0.3, 0.7, "flow_prediction"),
    Level(0.6, 0.8, "v_prediction", scale=0.6),
]


def close(left, right, tolerance: float) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfg_plus_plus_renoises_with_u(level, scale):
    """After any step α'·x0 + σ'·ε of the guided prediction: x0 of it, ε of u."""
    generator, target = torch.Generator().manual_seed(0), Target(0.9, 0.4, 0.3)
    x, c, u = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    rule, now = CFGPlusPlus(scale), Context(0, 10, lambda: level, x, lambda: target)
    guided = rule({"cond": c, "uncond": u}, now)
    close(guided, u + scale * (c - u), 1e-10)
    (ax, ac), (ex, ec) = level.affine("sample"), level.affine("epsilon")
    stepped = target.alpha * (ax * x + ac * guided) + target.kept * (ex * x + ec * guided)
    wanted = target.alpha * (ax * x + ac * guided) + target.kept * (ex * x + ec * u)
    close(rule.correct(stepped, now), wanted, 1e-10)
    assert not now.memory


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd", lambda config: diffusers.DDIMScheduler.from_config(config, clip_sample=False)),
        ("sd", lambda config: diffusers.EulerDiscreteScheduler.from_config(config)),
        ("sd", lambda config: SAMPLERS["ddim"].build(config)),
        ("sd3", lambda config: diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)),
        ("sd3", lambda config: SAMPLERS["ddim"].build(config)),
    ],
)
def test_cfg_plus_plus_takes_the_steps_of_the_paper(name, scheduler, scale):
    """In native scale x' = α'·x0(u + λ·(c − u)) + σ'·ε(u), from one network call to the next."""
    case = PIPELINES[name]
    pipe, inputs, outputs = case.build(), [], []
    pipe.scheduler = scheduler(pipe.scheduler.config)

    def keep(module, args, kwargs):
        inputs.append((args[0] if args else kwargs["hidden_states"]).double().chunk(2)[0])

    handle = getattr(pipe, case.network).register_forward_pre_hook(keep, with_kwargs=True)
    with guide(pipe, CFGPlusPlus(scale)), case.watched(pipe, lambda _, output: outputs.append(output) or output):
        case.call(pipe, steps=5)
    handle.remove()
    schedule = from_diffusers(pipe.scheduler)
    levels = [tuple(map(float, schedule.level(t.double()))) for t in pipe.scheduler.timesteps]
    kind = network_output({**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__})
    for index, (now, after) in enumerate(itertools.pairwise(levels)):
        u, c = outputs[index].double().chunk(2)
        x0 = convert(u + scale * (c - u), inputs[index], kind, "sample", *now)
        noise = convert(u, inputs[index], kind, "epsilon", *now)
        close(inputs[index + 1], after[0] * x0 + after[1] * noise, 1e-4)
