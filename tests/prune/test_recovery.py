"""Losses of recovery in closed form, states that a model draws, and what training on them does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pipelines import PIPELINES, check_close

from diffaccel.core.errors import UsageError
from diffaccel.core.prediction import convert
from diffaccel.core.rng import KeyedRandom
from diffaccel.models.data import RealImages
from diffaccel.models.denoiser import Guided
from diffaccel.models.networks import network_of
from diffaccel.models.teachers import denoiser_of, load_pipeline
from diffaccel.prune.classes import prune
from diffaccel.prune.operators import operators
from diffaccel.prune.recovery import FEATURES, Recovery, normalized_distance, plain_distance
from diffaccel.prune.states import DrawnStates, piped, recoverable, taken
from diffaccel.samplers.plan import Run
from diffaccel.search.subjects import fine_plan
from diffaccel.training.method import Draw

CPU = torch.device("cpu")


def draw(start=0, count=8, batch_size=8, step=0) -> Draw:
    return Draw(KeyedRandom(0), "recover/0", step, start, count, batch_size, CPU)


def pair(name="digits", layers=slice(1, None, 4), **settings):
    """A recovery of a pruned teacher, with few samples."""
    pipe = load_pipeline(name)
    teacher = piped(pipe, copy.deepcopy(pipe.network))
    prune(pipe, list(operators(pipe.network))[layers])
    student, conditions = recoverable(pipe)
    settings = {"pool": 8, "pool_steps": 2, **settings}
    whole = recoverable(teacher)[0]
    return Recovery(student, whole, conditions, None, Recovery.Config(**settings), 0, lambda net: None, lambda *_: None)


def found(recovery, batch=None):
    return recovery.loss(recovery.phases(0)[0], batch or draw())


def test_distances():
    theirs, ours = torch.randn(2, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    assert normalized_distance(theirs, theirs) == plain_distance(theirs, theirs) == 0.0
    assert normalized_distance(torch.zeros_like(theirs), theirs) == pytest.approx(1.0)
    assert normalized_distance(2.0 * theirs, theirs) == pytest.approx(1.0)
    for factor in (1e-3, 1e3):  # blocks whose features are large count no more than others
        scaled = normalized_distance(factor * ours, factor * theirs)
        assert scaled == pytest.approx(float(normalized_distance(ours, theirs)), rel=1e-5)
        want = factor**2 * float(plain_distance(ours, theirs))
        assert plain_distance(factor * ours, factor * theirs) == pytest.approx(want, rel=1e-5)
    each = [(o - t).square().sum() / t.square().sum() for o, t in zip(ours, theirs, strict=True)]
    assert normalized_distance(ours, theirs) == pytest.approx(float(sum(each) / 3), rel=1e-5)
    assert torch.isfinite(normalized_distance(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", ["digits", "digits-flow"])
def test_the_whole_model_has_nothing_to_learn(features, name):
    recovery = pair(name, slice(0), features=features)
    loss = found(recovery)
    loss.total.backward()
    assert float(loss.total.detach()) == 0.0
    assert all(weight.grad is None or not weight.grad.any() for weight in recovery.roles["student"].parameters())
    assert recovery.validate(recovery.roles["student"]) == {"output": 0.0}


def test_validation_does_not_depend_on_batches():
    recovery = pair()
    want = recovery.validate(recovery.roles["student"])["output"]
    recovery.batch_size = 7
    assert want > 0.0 and recovery.validate(recovery.roles["student"])["output"] == pytest.approx(want, rel=1e-5)


def test_losses_by_definition():
    """Against calls of both models by hand, on the very states."""
    recovery = pair(features="plain", denoising_weight=0.5, output_weight=2.0, feature_weight=0.1, null_probability=0.0)
    student, teacher = recovery.roles["student"], recovery.teacher
    batch = draw()
    x0, condition = recovery.data.batch(batch)
    t, eps = teacher.schedule.time(batch.stratified("time")), batch.normal("eps", teacher.sample_shape)
    x_t = teacher.noised(x0, t, eps)
    with torch.no_grad():
        output = F.mse_loss(student.predict(x_t, t, condition), teacher.predict(x_t, t, condition))
        ours, theirs = (one.forward_with_features(x_t, t, condition)[1] for one in (student, teacher))
        features = sum(F.mse_loss(*both) for both in zip(ours, theirs, strict=True))
        relative = sum(normalized_distance(*both) for both in zip(ours, theirs, strict=True))
        denoising = student.denoising_error(x0, t, eps, condition).mean()
        loss = found(recovery)
        assert loss.metrics["output"] == pytest.approx(float(output), rel=1e-5)
        assert loss.metrics["features"] == pytest.approx(float(features), rel=1e-5)
        assert loss.metrics["denoising"] == pytest.approx(float(denoising), rel=1e-4)
        assert loss.total == pytest.approx(float(2.0 * output + 0.1 * features + 0.5 * denoising), rel=1e-5)
        recovery.config.features = "normalized"
        assert found(recovery).metrics["features"] == pytest.approx(float(relative), rel=1e-5)
        recovery.config.features = "none"
        alone = found(recovery)
    assert "features" not in alone.metrics and float(alone.metrics["output"]) == float(loss.metrics["output"])


def test_parts_of_a_batch_give_its_loss():
    recovery = pair()
    with torch.no_grad():
        whole = found(recovery).total
        parts = [found(recovery, draw(start, 2)).total for start in range(0, 8, 2)]
    assert float(whole) == pytest.approx(float(sum(parts)) / 4, rel=1e-5)


def test_blocks_that_are_gone_are_asked_for_nothing():
    recovery = pair("digits-flow", slice(0, 1))
    blocks = len(recovery.teacher.feature_modules())
    assert next(iter(operators(recovery.teacher.net))) == "transformer_blocks.0"
    assert recovery.blocks == list(range(1, blocks))
    assert pair("digits", slice(0, 1)).blocks == list(range(5))


def test_the_null_condition_is_learnt_too():
    recovery = pair(null_probability=0.5)
    labels = {"class_labels": torch.arange(8)}
    dropped = torch.tensor([True, False] * 4)
    assert recovery._dropped(labels, dropped)["class_labels"].tolist() == [10, 1, 10, 3, 10, 5, 10, 7]
    assert recovery._dropped(None, dropped) is None
    shares = [
        sum(bool((draw(step=step).uniform("null") < 0.5)[i]) for step in range(50)) / 50 for i in range(8)
    ]  # of what `loss` draws
    assert all(0.2 < share < 0.8 for share in shares)


def test_drawn_states_depend_on_seed_and_index_only():
    pipe = load_pipeline("digits")
    teacher, conditions = recoverable(pipe)
    assert conditions["class_labels"].tolist() == list(range(10))

    def drawn(**more) -> DrawnStates:
        return DrawnStates(teacher, conditions, **{"count": 12, "steps": 3, "batch_size": 12, **more})

    whole = drawn().samples
    check_close(drawn(count=7, batch_size=4).samples, whole[:7], 1e-5)
    assert (drawn(seed=1).samples - whole).abs().max() > 0.1
    # By hand: the solver of the third order, class i mod 10, and a guidance pair where that is asked for.
    for scale in (1.0, 2.0):
        run, guided = Run(fine_plan(teacher.schedule, 3)), Guided(teacher, scale)
        x = KeyedRandom(0).normal("search", 0, 0, 12, teacher.sample_shape) * teacher.schedule.initial_scale
        for row in run.plan.rows:
            with torch.no_grad():
                x0 = guided(x, torch.full((12,), row.t), {"class_labels": torch.arange(12) % 10})
            x = run.advance(x, convert(x0, x, "sample", row.quantity, row.alpha, row.sigma))
        check_close(drawn(guidance_scale=scale).samples, x, 1e-4)
    x0, condition = drawn().batch(draw())
    index = draw().integers("states", 12)
    assert torch.equal(x0, whole[index]) and condition["class_labels"].tolist() == (index % 10).tolist()
    assert taken(None, index) is None


def test_real_images_in_place_of_drawn_ones():
    recovery = pair()
    images = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 1, 8, 8) * 80
    recovery.data = RealImages(images, torch.arange(4))
    x0, condition = recovery.data.batch(draw())
    assert x0.shape == (8, 1, 8, 8) and set(condition["class_labels"].tolist()) <= set(range(4))
    assert torch.isfinite(found(recovery).total)


@pytest.mark.parametrize("features", FEATURES)
def test_training_brings_the_predictions_back(features):
    recovery = pair(features=features, layers=slice(5, 7), pool=32)
    student = recovery.roles["student"]
    optimizer = torch.optim.AdamW(student.parameters(), 2e-3)
    before = recovery.validate(student)["output"]
    for step in range(25):
        recovery.loss(recovery.phases(step)[0], draw(count=16, batch_size=16, step=step)).total.backward()
        assert all(weight.grad is None for weight in recovery.teacher.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert recovery.validate(student)["output"] < 0.5 * before


def test_text_models():
    """Stable Diffusion's layout: what the pipeline's own call makes of prompts, and a network in another's place."""
    case = PIPELINES["sd"]
    pipe = copy.deepcopy(case.build())  # a recovery freezes its teacher
    denoiser, conditions = recoverable(pipe, ["a cat", "a dog", "a house"])
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda net, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with handle:
        case.call(pipe, 1, prompt="a dog", **case.guided(3.0))
    null, states = seen[0]["encoder_hidden_states"]
    check_close(conditions["encoder_hidden_states"][1], states, 1e-5)
    check_close(denoiser.null_condition(1)["encoder_hidden_states"][0], null, 1e-5)
    assert denoiser.net is pipe.unet
    other = piped(pipe, copy.deepcopy(pipe.unet))
    assert other.unet is not pipe.unet and other.vae is pipe.vae and network_of(pipe) is denoiser.net
    prune(other, ["mid_block.attentions.0", "mid_block.resnets.0"])
    student, _ = recoverable(other, ["a cat"])
    config = Recovery.Config(pool=3, pool_steps=2, guidance_scale=2.0)
    recovery = Recovery(student, denoiser, conditions, None, config, 0, lambda net: None, lambda *_: None)
    loss = found(recovery, draw(count=2, batch_size=2))
    loss.total.backward()
    assert float(loss.total.detach()) > 0.0 and any(weight.grad is not None for weight in student.parameters())
    assert type(pipe.unet).__name__ == "UNet2DConditionModel", "the whole pipeline is as it was"


def test_what_cannot_be():
    flux = PIPELINES["flux"].build()
    with pytest.raises(UsageError, match=r"Recovery trains pixel models .* got a FluxPipeline"):
        recoverable(flux)
    with pytest.raises(UsageError, match="needs prompts"):
        recoverable(PIPELINES["sd"].build())
    for wrong, words in (
        ({"features": "some"}, "Unknown method.features 'some'"),
        ({"pool": 0}, "method.pool must be at least 1"),
        ({"pool_steps": 1}, "method.pool_steps must be at least 2"),
        ({"output_weight": -1.0}, "method.output_weight must be at least 0"),
        ({"null_probability": 1.0}, "method.null_probability is a share"),
        ({"output_weight": 0.0, "feature_weight": 0.0}, "All weights"),
    ):
        with pytest.raises(UsageError, match=words):
            Recovery.Config(**wrong)
    digits, flow = (denoiser_of(load_pipeline(name)) for name in ("digits", "digits-flow"))
    with pytest.raises(UsageError, match="do not correspond"):
        Recovery(digits, flow, None, None, Recovery.Config(), 0, lambda net: None, lambda *_: None)
