"""Branches that a pipeline does not run by itself, through real pipelines: negatives of their own and a second network.

The referee runs the pipeline unguided, once per condition, and collects what its network predicts; what the rule makes of
that is handed to an unguided run in place of both branches, which then steps with it at any scale.
"""

import copy

import accelerate
import pytest
import torch
from pipelines import IMAGE_TO_IMAGE, INPAINTING, PIPELINES, check_close, rows

from diffaccel import CFG, AutoGuidance, Interval, PerpNeg, guide
from diffaccel.core.errors import GuidanceError, UsageError

TEXTS = {"prompt": "a dog"}, {"prompt": "blurry, a cat"}
EMBEDS = {"prompt_embeds": rows(1, 3, 16).flip(2)}, {"prompt_embeds": rows(1, 3, 16).cos()}
POOLED = tuple(
    {**e, "pooled_prompt_embeds": f(rows(1, 16))} for e, f in zip(EMBEDS, (torch.neg, torch.sin), strict=True)
)
MASKED = tuple(
    {**e, "prompt_attention_mask": torch.tensor([[1.0, 1.0, end]])} for e, end in zip(EMBEDS, (0, 1), strict=True)
)
CLASSES = {"class_labels": 3}, {"class_labels": 0}
FLUX = {"true_cfg_scale": 3.0, "negative_prompt_embeds": -rows(2, 3, 16), "negative_pooled_prompt_embeds": -rows(2, 16)}
NEGATIVES = {
    "sd": TEXTS,
    "sdxl": POOLED,
    "sd3": POOLED,
    "pixart": MASKED,
    "dit": CLASSES,
    "classes": CLASSES,
    "flux": POOLED,
}
SCALE, WEIGHTS = 4.0, (0.7, 1.5)


def options(name: str) -> dict:
    return FLUX if name == "flux" else {}


def stated(condition: dict, count: int) -> dict:
    """A condition as arguments of a call for ``count`` samples."""
    return {
        name: value.expand(count, *value.shape[1:]) if isinstance(value, torch.Tensor) else [value] * count
        for name, value in condition.items()
    }


def predicted(case, pipe, **arguments) -> list[torch.Tensor]:
    """What the network predicts in the one step of an unguided run, by forward call."""
    outputs = []

    def keep(_, output):
        outputs.append(output.clone())
        return output

    with case.watched(pipe, keep):
        case.call(pipe, steps=1, **arguments)
    return outputs


def split(case, outputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(c, u) of a run with both branches."""
    first, second = outputs if len(outputs) == 2 else outputs[0].chunk(2)
    return (first, second) if case.name in ("dit", "flux") else (second, first)


def stepped(case, pipe, guided, outputs, **arguments) -> torch.Tensor:
    """The result of one unguided step in which both branches predict ``guided``, of the channels that it has."""
    copies = 1 if len(outputs) == 2 else 2

    def exchange(_, output):
        return torch.cat([torch.cat([guided] * copies), output[:, guided.shape[1] :]], 1)

    with case.watched(pipe, exchange):
        return case.call(pipe, steps=1, **arguments)


def perp_neg(c, u, negatives) -> torch.Tensor:
    """Sample by sample, in float64."""
    results = []
    for index in range(len(c)):
        empty, positive = u[index].double().flatten(), (c[index] - u[index]).double().flatten()
        direction = positive.clone()
        for negative, weight in zip(negatives, WEIGHTS, strict=True):
            other = negative[index].double().flatten() - empty
            direction -= weight * (other - torch.dot(other, positive) / torch.dot(positive, positive) * positive)
        results.append((empty + SCALE * direction).reshape(c[index].shape))
    return torch.stack(results).to(c.dtype)


def channels(case, pipe, prediction) -> torch.Tensor:
    """A prediction without its variance; packed tokens are as they are."""
    count = prediction.shape[1] if prediction.ndim == 3 else min(4, prediction.shape[1])
    return prediction[:, : 3 if case.name == "classes" and prediction.shape[1] == 6 else count]


def check_negatives(case, pipe, conditions, negatives, count: int = 2, images: int = 1, **arguments) -> None:
    given = {**options(case.name), **arguments, "seed": 0, **({"num_images_per_prompt": images} if images > 1 else {})}
    given = {**case.arguments(count), **given}
    outputs = predicted(case, pipe, **given)
    c, u = (channels(case, pipe, value) for value in split(case, outputs))
    others = []
    for condition in conditions:
        changed = {name: value for name, value in given.items() if name != "prompt" or "prompt" in condition}
        others.append(
            channels(case, pipe, split(case, predicted(case, pipe, **{**changed, **stated(condition, count)}))[0])
        )
    wanted = stepped(case, pipe, perp_neg(c, u, others), outputs, **given)
    with guide(pipe, PerpNeg(SCALE, negatives=negatives, weights=WEIGHTS)):
        check_close(case.call(pipe, steps=1, **given), wanted, 2e-5)
    assert (wanted - case.call(pipe, steps=1, **given)).abs().max() > 1e-4


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", NEGATIVES)
def test_negatives_are_those_of_calls_of_their_own(name, count):
    case = PIPELINES[name]
    flux = (
        {key: value[:count] for key, value in FLUX.items() if isinstance(value, torch.Tensor)} if name == "flux" else {}
    )
    check_negatives(case, case.build(), NEGATIVES[name], NEGATIVES[name], count, **flux)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_negatives_of_several_images_per_prompt(name):
    case = PIPELINES[name]
    check_negatives(case, case.build(), NEGATIVES[name], NEGATIVES[name], images=2)


def test_negatives_may_be_strings_for_one_prompt_or_for_many():
    case = PIPELINES["sd"]
    strings = [condition["prompt"] for condition in TEXTS]
    check_negatives(case, case.build(), TEXTS, strings)
    pipe, results = case.build(), []
    for prompt in ("a cat", ["a cat"]):
        with guide(pipe, PerpNeg(SCALE, negatives=strings, weights=WEIGHTS)):
            results.append(case.call(pipe, steps=2, prompt=prompt))
    assert results[0].equal(results[1])
    embedded = pipe.encode_prompt(["a cat", "a cat"], "cpu", 1, True)  # a call by embeddings, negatives by text
    with guide(pipe, PerpNeg(SCALE, negatives=strings, weights=WEIGHTS)):
        by_text = case.call(pipe, steps=2, seed=[0, 1])
        embeds = {"prompt": None, "prompt_embeds": embedded[0], "negative_prompt_embeds": embedded[1]}
        by_embeds = case.call(pipe, steps=2, seed=[0, 1], **embeds)
    check_close(by_embeds, by_text)


def test_negatives_and_second_networks_while_weights_are_elsewhere():
    case = PIPELINES["sd"]
    pipe, results = case.build(), []
    weak = weakened(case, pipe)
    moved, slow = copy.deepcopy(pipe), copy.deepcopy(pipe)
    moved.enable_model_cpu_offload(device="cpu")
    for each in (pipe, moved, slow):
        if each is slow:  # weights arrive with each layer's call
            for network in (slow.unet, weak):
                accelerate.cpu_offload(network, torch.device("cpu"))
        for rule in (PerpNeg(SCALE, negatives=TEXTS, weights=WEIGHTS), AutoGuidance(SCALE, model=weak)):
            with guide(each, rule):
                results.append(case.call(each, steps=2))
    assert next(slow.unet.parameters()).is_meta
    for index in (2, 3, 4, 5):
        check_close(results[index], results[index % 2])


@pytest.mark.parametrize("table", [IMAGE_TO_IMAGE, INPAINTING], ids=["img2img", "inpaint"])
def test_negatives_of_pipelines_that_start_from_a_picture(table):
    case = table["sd"]
    check_negatives(case, case.build(), TEXTS, TEXTS, strength=1.0)


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "sd3", "flux"])
@pytest.mark.parametrize("generator", [True, False])
def test_the_noise_of_a_call_is_that_of_an_unguided_one(name, generator):
    """With nothing to subtract, only other noise could change the result."""
    case, results = PIPELINES[name], []
    for rule in (CFG(SCALE), PerpNeg(SCALE, negatives=NEGATIVES[name], weights=0.0)):
        pipe = case.build("ddpm" if case.family == "vp" else None)
        given = {**case.arguments(2), **options(name), "num_inference_steps": 3}
        torch.manual_seed(7)
        with guide(pipe, rule), torch.random.fork_rng(devices=()):
            results.append(pipe(**given, **({"generator": torch.Generator().manual_seed(1)} if generator else {}))[0])
    check_close(*map(torch.as_tensor, reversed(results)))


def test_capturing_leaves_nothing_behind():
    case = PIPELINES["sd"]
    pipe = case.build()
    before, state = dict(vars(pipe)), torch.get_rng_state()
    rule = PerpNeg(SCALE, negatives="blurry")
    with guide(pipe, rule):
        first, second = (case.call(pipe, steps=2) for _ in range(2))
    assert first.equal(second) and torch.get_rng_state().equal(state)
    assert all(vars(pipe)[name] is value for name, value in before.items() if isinstance(value, torch.nn.Module))
    assert vars(pipe)["_progress_bar_config"] == before["_progress_bar_config"]


def test_an_interval_of_negatives():
    case = PIPELINES["sd"]
    pipe, results = case.build("ddim"), {}
    inner = PerpNeg(SCALE, negatives=TEXTS, weights=WEIGHTS)
    for name, rule in {
        "inner": inner,
        "whole": Interval(inner, fraction_range=(0.0, 1.0)),
        "half": Interval(inner, fraction_range=(0.0, 0.5)),
        "cond": CFG(1.0),
    }.items():
        with guide(pipe, rule), case.watched(pipe) as evaluations:
            results[name] = case.call(pipe, steps=4), len(evaluations)
    assert results["whole"][0].equal(results["inner"][0])
    assert [results[name][1] for name in ("inner", "half", "cond")] == [4 * 3, 2 * 3 + 2, 4]
    assert not results["half"][0].equal(results["inner"][0]) and not results["half"][0].equal(results["cond"][0])


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "classes", "flux"])
def test_a_negative_like_the_prompt_takes_nothing_away(name):
    case = PIPELINES[name]
    own = {key: value for key, value in case.arguments(2).items() if key in NEGATIVES[name][0]}
    pipe, results = case.build(), []
    for rule in (CFG(SCALE), PerpNeg(SCALE, negatives=own)):
        with guide(pipe, rule):
            results.append(case.call(pipe, steps=3, seed=[0, 1], **options(name)))
    check_close(results[1], results[0])


@pytest.mark.parametrize(
    ("call", "negatives", "message"),
    [
        ({"negative_prompt": ["ugly"]}, "blurry", "empty negative_prompt"),
        ({"negative_prompt": "ugly"}, "blurry", "empty negative_prompt"),
        ({}, {"class_labels": 3}, "has no argument 'class_labels'"),
        ({}, {"prompt": ["a", "b", "c"]}, "describes 3 samples where the call makes 1"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(call, negatives, message):
    case = PIPELINES["sd"]
    pipe = case.build()
    with guide(pipe, PerpNeg(SCALE, negatives=negatives)), pytest.raises(UsageError, match=message):
        case.call(pipe, steps=1, **call)


def test_no_unconditional_branch_is_an_error():
    case = PIPELINES["sd"]
    pipe = case.build()
    with guide(pipe, PerpNeg(negatives="blurry")), pytest.raises(GuidanceError, match="guidance_scale above 1"):
        case.call(pipe, steps=1, guidance_scale=1.0)


def weakened(case, pipe):
    """A second network, with a part of the weights of the first."""
    network = copy.deepcopy(getattr(pipe, case.network))
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(0.9)
    return network


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", NEGATIVES)
def test_autoguidance_is_guidance_by_the_second_network(name, count):
    case = PIPELINES[name]
    pipe = case.build()
    weak = case.build()
    setattr(weak, case.network, weakened(case, pipe))
    flux = (
        {key: value[:count] for key, value in FLUX.items() if isinstance(value, torch.Tensor)} if name == "flux" else {}
    )
    given = {**case.arguments(count), **options(name), **flux, "seed": 0}
    outputs, others = predicted(case, pipe, **given), predicted(case, weak, **given)
    c, other = (channels(case, pipe, split(case, values)[0]) for values in (outputs, others))
    wanted = stepped(case, pipe, other + SCALE * (c - other), outputs, **given)
    with guide(pipe, AutoGuidance(SCALE, model=getattr(weak, case.network))):
        check_close(case.call(pipe, steps=1, **given), wanted, 2e-5)


@pytest.mark.parametrize("name", [*NEGATIVES, "animatediff", "cogvideox", "ltx", "wan"])
def test_autoguidance_by_the_same_network_is_none(name):
    case = PIPELINES[name]
    pipe = case.build()
    alone = case.call(pipe, steps=2, seed=[0, 1], guidance_scale=1.0)
    for scale in (1.0, 3.0):  # one branch, and two of which one is left out
        with guide(pipe, AutoGuidance(SCALE, model=getattr(pipe, case.network))):
            check_close(case.call(pipe, steps=2, seed=[0, 1], guidance_scale=scale), alone)
