"""Generated images depend on seed and index only."""

import copy
from dataclasses import dataclass

import diffusers
import pytest
import torch
from networks import tiny_unet

import diffaccel
from diffaccel import APG, CFG, AutoGuidance, CFGPlusPlus, ClassConditionalPipeline, Interval, PerpNeg, Rescale
from diffaccel.core.errors import UsageError
from diffaccel.generation import generate, progress_bar
from diffaccel.guidance.attach import guidance_of
from diffaccel.models.teachers import load_pipeline


def drawn(**settings) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*generate(settings.pop("model", "digits"), settings.pop("num", 7), **settings), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("sampler", ["flow-adams", "deis", "deis-sde"])
def test_batch_size_does_not_change_images(sampler):
    one, labels = drawn(steps=3, sampler=sampler, batch_size=1)
    all_at_once, _ = drawn(steps=3, sampler=sampler, batch_size=7)
    # Convolutions of other batch sizes round differently; a grey level of 255 may flip where it falls on a half.
    assert (one.int() - all_at_once.int()).abs().max() <= 1
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_seeds_classes_and_guidance_matter():
    base, _ = drawn(steps=2)
    assert torch.equal(base, drawn(steps=2)[0])
    assert not torch.equal(base, drawn(steps=2, seed=1)[0])
    assert drawn(steps=2, classes=[8, 3])[1].tolist() == [8, 3, 8, 3, 8, 3, 8]
    assert not torch.equal(base, drawn(steps=2, guidance_scale=3.0)[0])


def test_a_budget_counts_guidance_pairs_twice():
    assert torch.equal(drawn(sampler="deis", nfe=5)[0], drawn(sampler="deis", steps=5)[0])
    guided = {"sampler": "rho-heun", "guidance_scale": 2.0}
    assert torch.equal(drawn(nfe=11, **guided)[0], drawn(steps=3, **guided)[0])  # 2·(2·2 + 1) calls


def test_samplers_take_options_and_are_told_of_guidance():
    options = {"solver_order": 1}
    assert torch.equal(
        drawn(sampler="deis", steps=4, sampler_options=options)[0],
        drawn(sampler="ipndm", steps=4, sampler_options=options)[0],
    )
    guided = {"sampler": "flow-adams", "steps": 4, "guidance_scale": 7.5}
    assert torch.equal(drawn(**guided)[0], drawn(**guided, sampler_options={"guidance_scale": 7.5})[0])
    assert not torch.equal(drawn(**guided)[0], drawn(**guided, sampler_options={"guidance_scale": 1.0})[0])


def test_the_scheduler_of_an_opened_pipeline_is_left_as_it_was():
    pipeline = load_pipeline("digits")
    own = pipeline.scheduler
    drawn(model=pipeline, sampler="ddim", steps=1)
    assert pipeline.scheduler is own


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num": 0}, "num"),
        ({"steps": 0}, "steps"),
        ({"classes": [10]}, "classes"),
        ({"steps": 4, "nfe": 4}, "not both"),
        ({"sampler": "deis", "nfe": 0}, "at least 1"),
        ({"sampler": "deis", "nfe": 1, "guidance_scale": 3.0}, "at least 2"),
        ({"sampler_options": {"eta": 1.0}}, "name one"),
        ({"sampler": "ddim", "sampler_options": {"etta": 1.0}}, "Did you mean 'eta'"),
    ],
)
def test_impossible_requests(settings, word):
    with pytest.raises(UsageError, match=word):
        drawn(**settings)


# Guidance rules.


@pytest.fixture(scope="module")
def digits():
    return load_pipeline("digits")


def test_a_rule_replaces_the_guidance_of_the_pipeline(digits):
    own = drawn(model=digits, steps=3, sampler="deis", guidance_scale=4.0)[0].int()
    for settings in ({"guidance": CFG(4.0)}, {"guidance": "cfg", "guidance_scale": 4.0}):
        assert (own - drawn(model=digits, steps=3, sampler="deis", **settings)[0].int()).abs().max() <= 1
    options = {"apg": {"eta": 1, "momentum": 0}}
    assert torch.equal(
        drawn(model=digits, steps=2, guidance="apg", guidance_scale=3, guidance_options=options)[0],
        drawn(model=digits, steps=2, guidance=APG(3, eta=1, momentum=0))[0],
    )


def test_the_pipeline_is_left_unguided(digits):
    batches = generate(digits, 4, steps=1, batch_size=2, guidance=APG(3))
    next(batches)
    assert guidance_of(digits) is None  # also between batches, where the caller may use it
    batches.close()


@pytest.mark.parametrize(
    "rule",
    [
        APG(12.0),
        Interval(Rescale(CFG(6.0)), sigma_range=(0.3, 5.0)),
        CFGPlusPlus(0.6),
        PerpNeg(4.0, [{"class_labels": 3}, {"class_labels": 5}]),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_neither_batches_nor_shards_change_guided_images(digits, rule):
    settings = {"model": digits, "steps": 4, "sampler": "deis", "guidance": rule}
    whole, labels = drawn(**settings, batch_size=7)
    parts, _ = drawn(**settings, batch_size=3)
    assert (whole.int() - parts.int()).abs().max() <= 1
    shard, shard_labels = drawn(**settings, batch_size=3, shard=(1, 2))  # the second of three batches
    assert torch.equal(shard, parts[3:6]) and torch.equal(shard_labels, labels[3:6])


class Rows:
    """Rows that a network computes, of all its calls."""

    def __init__(self, *networks):
        self.total, self.hooks = 0, [net.register_forward_hook(self.count) for net in networks]

    def count(self, module, args, output):
        self.total += len(args[0])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("sampler", ["deis", "rho-heun"])
@pytest.mark.parametrize(
    ("rule", "each"),
    [
        (CFG(3.0), 2),
        (CFG(1.0), 1),
        (APG(5.0), 2),
        (PerpNeg(4.0, {"class_labels": 3}), 3),
        ("weak", 2),
        (Interval(CFG(3.0), sigma_range=(0.3, 5.0)), None),
        (Interval(PerpNeg(4.0, {"class_labels": 3}), fraction_range=(0.0, 0.5)), None),
    ],
    ids=str,
)
def test_budgets_count_what_a_run_costs(digits, sampler, rule, each):
    weak = copy.deepcopy(digits.unet)
    rule = AutoGuidance(2.0, weak) if rule == "weak" else rule
    settings = {"model": digits, "num": 1, "sampler": sampler, "guidance": rule}

    def cost(**budget) -> int:
        with Rows(digits.unet, weak) as rows:
            drawn(**settings, **budget)
        return rows.total

    calls = [steps if sampler == "deis" else 2 * steps - 1 for steps in range(1, 13)]
    costs = [each * count for count in calls] if each else [cost(steps=steps) for steps in range(1, 13)]
    for nfe in (6, 11):
        steps = max(steps for steps, price in enumerate(costs, start=1) if price <= nfe)
        assert cost(nfe=nfe) == costs[steps - 1] <= nfe


@pytest.mark.parametrize("rule", [None, CFG(3.0), PerpNeg(4.0, 3), Interval(CFG(3.0), (0.3, 5.0)), "weak"], ids=str)
def test_costs_and_the_bar_are_those_of_the_rows_computed(digits, rule, monkeypatch):
    weak, moves = copy.deepcopy(digits.unet), []
    rule = AutoGuidance(2.0, weak) if rule == "weak" else rule
    bar = progress_bar(5, False)
    monkeypatch.setattr(bar, "update", lambda share: moves.append(share) or True)  # tqdm's returns something too
    with Rows(digits.unet, weak) as rows:
        drawing = generate(digits, 5, steps=4, batch_size=3, guidance=rule, progress=bar)
        list(drawing)
    assert rows.total == 5 * drawing.nfe and drawing.steps == 4
    assert sum(moves) == pytest.approx(5) and len(moves) >= 2 * 4  # in every step of both batches
    assert not any(net._forward_hooks for net in (digits.unet, weak))


def test_other_schedulers_know_what_an_interval_costs():
    pipe = ClassConditionalPipeline(tiny_unet(num_class_embeds=11), diffusers.DDIMScheduler(clip_sample=False))
    with Rows(pipe.unet) as rows:
        drawing = generate(pipe, 1, steps=6, guidance=Interval(CFG(3.0), (0.3, 5.0)))
        list(drawing)
    assert 6 < rows.total == drawing.nfe < 12


def test_a_guided_pipeline_is_refused(digits):
    with diffaccel.guide(digits, APG(3.0)), pytest.raises(UsageError, match="pass guidance="):
        generate(digits, 1, steps=1)
    generate(digits, 1, steps=1)


def test_a_weak_model_has_to_fit(digits):
    with pytest.raises(UsageError, match="two models of one kind"):
        generate(digits, 1, steps=1, guidance=AutoGuidance(2.0, tiny_unet(num_class_embeds=4)))


def test_flow_adams_is_told_the_scale_of_the_rule(digits):
    settings = {"model": digits, "sampler": "flow-adams", "steps": 4, "num": 3}
    for rule, scale in ((Interval(APG(7.5), (0.1, 9.0)), 7.5), (CFGPlusPlus(0.6), None)):
        told = drawn(**settings, guidance=rule)[0]
        assert torch.equal(told, drawn(**settings, guidance=rule, sampler_options={"guidance_scale": scale})[0])
        other = {"guidance_scale": 7.5 if scale is None else None}
        assert not torch.equal(told, drawn(**settings, guidance=rule, sampler_options=other)[0])


def test_models_without_classes_take_no_guidance_but_that_of_a_weak_model():
    torch.manual_seed(0)
    pipe = ClassConditionalPipeline(tiny_unet(num_class_embeds=None), diffusers.DDIMScheduler(clip_sample=False))
    with pytest.raises(UsageError, match="no classes"):
        generate(pipe, 2, steps=1, guidance=APG(3.0))
    weak = copy.deepcopy(pipe.unet)
    plain, same = (next(generate(pipe, 2, steps=2, guidance=g))[0] for g in (None, AutoGuidance(2.0, weak)))
    assert torch.equal(plain, same)
    torch.nn.init.normal_(weak.conv_out.weight)
    assert not torch.equal(plain, next(generate(pipe, 2, steps=2, guidance=AutoGuidance(2.0, weak)))[0])


@dataclass(frozen=True)
class Resampling(CFG):
    particles: int = 4


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"guidance": Rescale(Resampling(3.0))}, "depends on seed and index only"),
        ({"guidance": "agp"}, "'apg'"),
        ({"guidance": 7.5}, "or the name of one"),
        ({"guidance": APG(3.0), "guidance_scale": 4.0}, r"APG\(scale=4\)"),
        ({"guidance": APG(3.0), "guidance_options": {"apg": {"eta": 1}}}, "name of a rule"),
        ({"guidance_options": {"apg": {"eta": 1}}}, "name of a rule"),
        ({"guidance": "apg", "guidance_options": [1]}, r"go by rule.*got \[1\]"),
        ({"guidance_options": [1]}, "go by rule"),
        ({"guidance": PerpNeg(3.0, "blurry")}, "0 … 9"),
        ({"guidance": "perp-neg", "guidance_options": {"perp-neg": {"negatives": 10}}}, "0 … 9"),
        ({"guidance": APG(3.0), "sampler": "deis", "nfe": 1}, "at least 2"),
    ],
)
def test_impossible_guidance(digits, settings, word):
    with pytest.raises(UsageError, match=word):
        drawn(model=digits, **settings)
