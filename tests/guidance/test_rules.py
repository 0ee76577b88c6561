"""Guidance rules: against independent implementations, diffusers' guiders, and by the identities between them."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import guiders

from diffaccel import APG, CFG, AutoGuidance, CFGPlusPlus, CFGZeroStar, Interval, PerpNeg, Rescale
from diffaccel.core.errors import GuidanceError, UsageError
from diffaccel.core.prediction import coefficients
from diffaccel.guidance.context import Context, Level, Target

SHAPES = [(2, 4, 8, 8), (2, 4, 3, 6, 6), (2, 32, 16)]  # images, videos, packed tokens
VP, PURE, FLOW = Level(0.6, 0.8, "epsilon"), Level(0.0, 1.0, "v_prediction"), Level(0.3, 0.7, "flow_prediction")
VE = Level(0.6, 0.8, "v_prediction", scale=0.6)
LEVELS = {"vp": VP, "zero-snr": PURE, "flow": FLOW, "ve": VE}


def draw(shape=(2, 4, 8, 8), seed: int = 0) -> dict:
    """Predictions by branch, and the state under "x"."""
    generator = torch.Generator().manual_seed(seed)
    names = ("cond", "uncond", "weak", "negative0", "negative1", "x")
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in names}


def context(level=VP, step=0, steps=10, memory=None, x=None, target=None) -> Context:
    memory = {} if memory is None else memory
    return Context(step, steps, lambda: level, x=x, find_target=lambda: target, memory=memory)


def apply(rule, predictions, level=VP, **options) -> torch.Tensor:
    return rule(predictions, context(level, x=predictions["x"], **options))


def close(left, right, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


# -- adaptive projected guidance


def reference_apg(run, level, scale, eta, cap, momentum):
    """Algorithm 1 of the paper, sample by sample, on denoised predictions; returns raw outputs."""
    p, r = coefficients(level.prediction_type, "sample", level.alpha, level.sigma)
    past, results = {}, []
    for predictions in run:
        rows = []
        for index in range(len(predictions["x"])):
            x = level.scale * predictions["x"][index].flatten()
            denoised, without = (p * x + r * predictions[name][index].flatten() for name in ("cond", "uncond"))
            difference = denoised - without + momentum * past.get(index, 0.0)
            past[index] = difference
            if cap is not None and torch.linalg.vector_norm(difference) > cap:
                difference = difference * cap / torch.linalg.vector_norm(difference)
            unit = denoised / torch.linalg.vector_norm(denoised)
            parallel = torch.dot(difference, unit) * unit
            guided = denoised + (scale - 1.0) * (difference - parallel + eta * parallel)
            rows.append(((guided - p * x) / r).reshape(predictions["x"].shape[1:]))
        results.append(torch.stack(rows))
    return results


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("options", [(7.5, 0.0, 5.0, -0.5), (3.0, 0.4, None, 0.0), (15.0, 1.0, 9.0, -0.75)], ids=str)
def test_apg_is_the_algorithm_of_the_paper(shape, level, options):
    run, memory = [draw(shape, seed) for seed in range(4)], {}
    rule = APG(*options[:3], momentum=options[3])
    expected = reference_apg(run, level, *options)
    for step, (predictions, wanted) in enumerate(zip(run, expected, strict=True)):
        close(apply(rule, predictions, level, step=step, memory=memory), wanted)


@pytest.mark.parametrize("space", ["x0", "raw"])
@pytest.mark.parametrize("anchor", ["cond", "uncond"])
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_apg_contains_cfg(level, anchor, space):
    predictions = draw()
    rule = APG(7.5, eta=1.0, momentum=0.0, space=space, anchor=anchor)
    close(apply(rule, predictions, level), apply(CFG(7.5), predictions, level))


def test_apg_at_scale_1_is_the_conditional_prediction():
    predictions = {"cond": draw()["cond"]}
    rule = APG(1.0, eta=0.2, norm_threshold=1.0)
    assert rule.requires == CFG(1.0).requires == {"cond"}
    for conditional in (rule, CFG(1.0)):
        assert conditional(predictions, context()) is predictions["cond"]


def test_apg_in_two_spaces_differs_but_linear_rules_do_not():
    predictions = draw()
    results = [apply(APG(7.5, momentum=0.0, space=space), predictions) for space in ("x0", "raw")]
    assert (results[0] - results[1]).norm() > 0.01 * results[0].norm()
    for level in LEVELS.values():  # CFG of x0 is x0 of CFG
        of_x, of_output = level.affine("sample")
        x0 = {name: of_x * predictions["x"] + of_output * predictions[name] for name in ("cond", "uncond")}
        close(apply(CFG(5.0), {**x0, "x": 0}), of_x * predictions["x"] + of_output * apply(CFG(5.0), predictions))


def test_momentum_comes_before_the_cap_and_the_cap_before_the_projection():
    rule, first, second, memory = APG(3.0, norm_threshold=1.0, momentum=-0.5), draw(seed=0), draw(seed=1), {}
    apply(rule, first, memory=memory)
    differences = [VP.affine("sample")[1] * (p["cond"] - p["uncond"]) for p in (first, second)]
    apply(rule, second, memory=memory)
    # What is remembered is neither capped nor projected.
    close(memory["difference"], differences[1] - 0.5 * differences[0])


def test_momentum_ends_with_the_run_and_with_another_batch():
    rule, predictions, memory = APG(3.0), draw(), {}
    first = apply(rule, predictions, memory=memory)
    assert not torch.equal(apply(rule, predictions, step=1, memory=memory), first)
    assert torch.equal(apply(rule, predictions, memory={}), first)
    one = {name: value[:1] for name, value in predictions.items()}
    assert torch.equal(apply(rule, one, memory=memory), first[:1])


def test_equal_branches_and_empty_predictions_do_no_harm():
    predictions = draw()
    same = {**predictions, "uncond": predictions["cond"]}
    zero = dict.fromkeys(predictions, torch.zeros(2, 4, 8, 8))
    for rule in (APG(7.5, norm_threshold=2.0), CFGZeroStar(5.0), CFG(5.0)):
        close(apply(rule, same), predictions["cond"])
        assert torch.equal(apply(rule, zero), zero["cond"])


def test_a_level_that_does_not_tell_x0_is_refused():
    with pytest.raises(GuidanceError, match='space="raw"'):
        apply(APG(5.0), draw(), Level(0.0, 1.0, "epsilon"))
    assert apply(APG(5.0, space="raw"), draw(), Level(0.0, 1.0, "epsilon")).isfinite().all()


# -- diffusers' guiders


def theirs(guider, run, steps=10):
    """A guider's results over a run, driven as its modular pipelines do."""
    for step, predictions in enumerate(run):
        guider.set_state(step, steps, torch.tensor(999 - step))
        guider.prepare_inputs({})
        yield guider(predictions["cond"], predictions["uncond"]).pred


class _Forward:
    """`guider(cond, uncond)`, where theirs takes the blocks that it prepared."""

    def __init__(self, cls, **options):
        self.guider = cls(**options)
        self.guider._prepare_batch = lambda *_: None
        self.set_state, self.prepare_inputs = self.guider.set_state, self.guider.prepare_inputs

    def __call__(self, cond, uncond):
        return self.guider.forward(cond, uncond if self.guider.num_conditions == 2 else None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eta": 0.0, "adaptive_projected_guidance_rescale": 5.0, "adaptive_projected_guidance_momentum": -0.5},
        {"eta": 0.3, "adaptive_projected_guidance_rescale": 0.0, "guidance_rescale": 0.7},
        {
            "eta": 0.0,
            "adaptive_projected_guidance_momentum": -0.75,
            "start": 0.2,
            "stop": 0.55,
            "guidance_rescale": 0.5,
        },
        {"guidance_scale": 0.0},
        {"guidance_scale": 1.0, "eta": 0.0, "guidance_rescale": 0.5},
        {"start": 0.5, "stop": 0.5},
        {"enabled": False},
    ],
    ids=str,
)
def test_apg_of_diffusers(shape, original, options):
    guider = _Forward(guiders.AdaptiveProjectedGuidance, use_original_formulation=original, **options)
    run, memory = [draw(shape, seed) for seed in range(8)], {}
    rule = APG.from_diffusers_guider(guider.guider)
    for step, (predictions, wanted) in enumerate(zip(run, theirs(guider, run), strict=True)):
        given = {name: predictions[name] for name in rule.branches(context(step=step))}
        close(rule(given, context(step=step, memory=memory, x=predictions["x"])), wanted, 1e-6)


def test_other_guiders_of_diffusers_are_refused():
    with pytest.raises(UsageError, match="AdaptiveProjectedGuidance"):
        APG.from_diffusers_guider(guiders.ClassifierFreeGuidance())
    with pytest.raises(UsageError, match="norm_dim"):
        APG.from_diffusers_guider(guiders.AdaptiveProjectedGuidance(adaptive_projected_guidance_norm_dim=1))


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_cfg_zero_star_of_diffusers(zero):
    guider = _Forward(guiders.ClassifierFreeZeroStarGuidance, guidance_scale=4.0, zero_init_steps=zero)
    run, rule = [draw(seed=seed) for seed in range(5)], CFGZeroStar(4.0, zero_init_steps=zero)
    for step, (predictions, wanted) in enumerate(zip(run, theirs(guider, run), strict=True)):
        close(apply(rule, predictions, FLOW, step=step), wanted, 1e-6)
        assert ("uncond" in rule.branches(context(step=step))) == (step >= zero)


def test_zero_init_is_refused_where_0_is_no_standstill():
    with pytest.raises(GuidanceError, match="predicts epsilon; set it to 0"):
        apply(CFGZeroStar(4.0, zero_init_steps=1), draw(), VP)


def test_rescale_and_cfg_of_diffusers():
    guider = _Forward(guiders.ClassifierFreeGuidance, guidance_scale=6.0, guidance_rescale=0.7)
    predictions = draw()
    close(apply(Rescale(CFG(6.0), 0.7), predictions), next(theirs(guider, [predictions])))
    close(apply(Rescale(CFG(6.0), 0.0), predictions), apply(CFG(6.0), predictions))


# -- the others


def test_perp_neg_takes_its_branches_in_order():
    predictions = draw()
    rule = PerpNeg(5.0, negatives=("a", {"class_labels": 3}), weights=(0.5, 2.0))
    assert rule.requires == {"cond", "uncond", "negative0", "negative1"}
    assert rule.extra("negative0").arguments == {"prompt": "a"}
    assert rule.extra("negative1").arguments == {"class_labels": 3}
    twice = PerpNeg(5.0, negatives=({"class_labels": 3}, "a"), weights=(2.0, 0.5))
    turned = {**predictions, "negative0": predictions["negative1"], "negative1": predictions["negative0"]}
    close(apply(rule, predictions), apply(twice, turned))
    assert PerpNeg(negatives="a").negatives == ("a",) and PerpNeg(negatives=["a", "b"], weights=2).weights == (2, 2)
    alike = {**predictions, "negative0": predictions["cond"], "negative1": predictions["cond"]}
    close(apply(rule, alike), apply(CFG(5.0), predictions))


def test_autoguidance_is_cfg_against_the_weak_network():
    predictions, weak = draw(), torch.nn.Identity()
    rule = AutoGuidance(3.0, model=weak)
    assert rule.requires == {"cond", "weak"} and rule.extra("weak").network is weak
    close(apply(rule, predictions), apply(CFG(3.0), {**predictions, "uncond": predictions["weak"]}))
    close(apply(rule, {**predictions, "weak": predictions["cond"]}), predictions["cond"])


def test_rules_without_further_branches_have_none():
    for rule in (CFG(), APG(), CFGZeroStar(), CFGPlusPlus(), Rescale()):
        with pytest.raises(KeyError):
            rule.extra("weak")


# -- intervals


def acting(rule, level=VP, step=0, steps=10) -> bool:
    now = context(level, step, steps)
    assert rule.branches(now) == ({"cond", "uncond"} if rule.active(now) else {"cond"})
    assert rule.requires == {"cond", "uncond"}
    return rule.active(now)


def test_an_interval_of_noise_levels_is_open_below_and_closed_above():
    def at(rho):
        return Level(1.0, rho, "epsilon")

    rule = Interval(CFG(5.0), sigma_range=(0.28, 5.42))
    assert [acting(rule, at(rho)) for rho in (0.28, 0.2801, 1.0, 5.42, 5.43)] == [False, True, True, True, False]
    assert acting(Interval(CFG(5.0), sigma_range=(1.0, math.inf)), PURE)
    assert not acting(Interval(CFG(5.0), sigma_range=(1.0, 9.0)), PURE)
    # The same number means the same noise in every family.
    for level in (Level(0.5, 0.5, "flow_prediction"), Level(0.5**0.5, 0.5**0.5, "epsilon", 0.5)):
        assert acting(Interval(CFG(5.0), sigma_range=(0.99, 1.01)), level)


@pytest.mark.parametrize("span", [(0.0, 1.0), (0.2, 0.5), (0.25, 0.29), (0.9, 1.0)], ids=str)
def test_intervals_of_fractions(span):
    rule = Interval(CFG(5.0), fraction_range=span)
    guider = guiders.AdaptiveProjectedGuidance(5.0, start=span[0], stop=span[1])
    same = APG.from_diffusers_guider(guider)
    start, stop = (Fraction(str(end)) for end in span)
    for steps in (1, 7, 10, 29, 100):
        for step in range(steps):
            assert acting(rule, step=step, steps=steps) == (start <= Fraction(step, steps) < stop)
            guider.set_state(step, steps, torch.tensor(0))
            assert len(same.branches(context(step=step, steps=steps))) == guider.num_conditions


def test_outside_of_an_interval_the_rule_is_not_asked():
    predictions, memory = draw(), {}
    rule = Interval(APG(5.0), fraction_range=(0.0, 0.5), sigma_range=(0.1, 10.0))
    assert not torch.equal(apply(rule, predictions, memory=memory), predictions["cond"])
    remembered = dict(memory)
    assert apply(rule, {"cond": predictions["cond"], "x": 0}, step=5, memory=memory) is predictions["cond"]
    assert apply(rule, predictions, Level(1.0, 0.1, "epsilon"), memory=memory) is predictions["cond"]
    assert memory == remembered
    corrected = Interval(CFGPlusPlus(0.6), fraction_range=(0.5, 1.0))
    state = predictions["x"]
    assert corrected.correct(state, context(step=0, target=Target(1, 1, 1))) is state


def test_a_whole_interval_is_the_rule_itself():
    predictions = draw()
    for rule in (CFG(5.0), APG(5.0), Rescale(CFG(5.0))):
        whole = Interval(rule, fraction_range=(0.0, 1.0))
        assert torch.equal(apply(whole, predictions), apply(rule, predictions))


def test_fractions_need_a_known_number_of_steps():
    with pytest.raises(GuidanceError, match="use sigma_range"):
        apply(Interval(CFG(5.0), fraction_range=(0.0, 0.5)), draw(), steps=None)


def test_wrappers_pass_on_what_the_inner_rule_asks_for():
    inner = PerpNeg(5.0, negatives="a")
    for rule in (
        Rescale(inner),
        Interval(inner, fraction_range=(0, 1)),
        Interval(Rescale(inner), fraction_range=(0, 1)),
    ):
        assert rule.requires == inner.requires and rule.extra("negative0") == inner.extra("negative0")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (lambda cls=cls: cls(scale=math.nan), f"{cls.__name__} needs scale")
            for cls in (CFG, APG, CFGZeroStar, CFGPlusPlus)
        ),
        (lambda: CFG("5"), "needs scale to be a finite number"),
        (lambda: CFG(True), "needs scale to be a finite number"),
        (lambda: CFG(None), "needs scale to be a finite number"),
        (lambda: APG(momentum=-1.0), r"momentum to be a number in \(-1, 1\)"),
        (lambda: APG(momentum=1.0), "momentum"),
        (lambda: APG(norm_threshold=0.0), "norm_threshold"),
        (lambda: APG(norm_threshold=math.inf), "norm_threshold"),
        (lambda: APG(eta=math.inf), "eta"),
        (lambda: APG(space="latent"), "Unknown space 'latent'"),
        (lambda: APG(anchor="uncnd"), "Did you mean 'uncond'"),
        (lambda: CFGZeroStar(zero_init_steps=-1), "whole number"),
        (lambda: CFGZeroStar(zero_init_steps=0.5), "whole number"),
        (lambda: CFGPlusPlus(1.5), r"\[0, 1\]"),
        (lambda: Rescale(factor=2.0), r"factor to be a number in \[0, 1\]"),
        (lambda: AutoGuidance(), "model="),
        (lambda: AutoGuidance(model="unet"), "model="),
        (lambda: PerpNeg(), "needs negatives"),
        (lambda: PerpNeg(negatives=[]), "needs negatives"),
        (lambda: PerpNeg(negatives=3.0), "needs negatives"),
        (lambda: PerpNeg(negatives=True), "needs negatives"),
        (lambda: PerpNeg(negatives={}), "needs negatives"),
        (lambda: PerpNeg(negatives={"negative_prompt": "dog"}), "state a condition"),
        (lambda: PerpNeg(negatives={"height": 16}), "state a condition"),
        (lambda: PerpNeg(negatives=torch.ones(1, 3)), "state a condition"),
        (lambda: CFGZeroStar(zero_init_steps=True), "whole number"),
        (lambda: Interval(10, (0.3, 5.0)), "goes around a rule"),
        (lambda: Rescale(APG), "goes around a rule"),
        (lambda: Rescale(CFGPlusPlus()), "goes on after the step"),
        (lambda: Rescale(Interval(CFGPlusPlus(), (0.0, 1.0))), "goes on after the step"),
        (lambda: Interval(CFG(), sigma_range=(0.0, True)), "low < high"),
        (lambda: PerpNeg(negatives="a", weights=-1.0), "weight"),
        (lambda: PerpNeg(negatives="a", weights=(1.0, 2.0)), "weight"),
        (lambda: PerpNeg(negatives="a", weights="1"), "weight"),
        (lambda: PerpNeg(negatives="a", weights=None), "weight"),
        (lambda: PerpNeg(negatives="a", weights=math.nan), "weight"),
        (lambda: Interval(CFG()), "needs sigma_range"),
        (lambda: Interval(CFG(), sigma_range=(5.0, 1.0)), "low < high"),
        (lambda: Interval(CFG(), sigma_range=(-1.0, 1.0)), "low < high"),
        (lambda: Interval(CFG(), sigma_range=(math.nan, 1.0)), "low < high"),
        (lambda: Interval(CFG(), sigma_range=("a", "b")), "low < high"),
        (lambda: Interval(CFG(), sigma_range=3.0), "low < high"),
        (lambda: Interval(CFG(), fraction_range=(0.0, 1.5)), "low < high ≤ 1"),
        (lambda: Interval(CFG(), fraction_range=(0.5, 0.5)), "low < high"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_numbers_of_numpy_are_numbers():
    assert CFG(np.float32(5)) == CFG(5.0) and APG(np.int64(3)).scale == 3
    assert Interval(CFG(), sigma_range=(np.float32(0.5), math.inf)).sigma_range == (0.5, math.inf)


def test_nothing_to_rescale_and_nothing_to_predict():
    predictions, flow = draw(), Level(0.4, 0.6, "flow_prediction")
    zero = apply(Rescale(CFGZeroStar(5.0, zero_init_steps=1), 0.7), predictions, flow)
    assert torch.equal(zero, torch.zeros_like(zero))
    clean = Level(1.0, 0.0, "flow_prediction")  # the state is x0 there, and no prediction changes it
    assert apply(APG(5.0), predictions, clean) is predictions["cond"]


def test_classes_and_prompts_as_negatives():
    rule = PerpNeg(5.0, negatives=["a dog", 3, {"prompt_embeds": None}])
    assert [rule.extra(f"negative{i}").arguments for i in range(3)] == [
        {"prompt": "a dog"},
        {"class_labels": 3},
        {"prompt_embeds": None},
    ]
    assert PerpNeg(5.0, negatives=3).negatives == (3,)
