"""Calibration: the norms that APG meets, on real pipelines."""

import json

import pytest
import torch
from pipelines import PIPELINES, rows

import diffaccel
from diffaccel.core.errors import NumericalError, UsageError
from diffaccel.guidance.calibrate import recording
from diffaccel.guidance.context import Context, Level
from diffaccel.guidance.rules import APG, CFG, Interval


def predictions(*differences):
    """Evaluations of one run: (c, u) of two values, whose differences are given."""
    return [{"cond": torch.tensor(d), "uncond": torch.zeros(len(d), 2)} for d in differences]


def run(rule, *evaluations, rho=1.0):
    memory = {}
    for step, given in enumerate(evaluations):
        level = Level(1.0, rho, "sample")
        rule(given, Context(step, len(evaluations), lambda level=level: level, given["cond"], memory=memory))


def test_norms_and_the_median_by_hand():
    rule, recorder = recording(APG(3.0, momentum=-0.5))
    run(rule, *predictions([[3.0, 4.0], [0.0, 1.0]], [[3.0, 4.0], [0.0, 2.0]]))
    found = recorder.calibration()
    # Second evaluation: d − d/2 has the norms 2.5 and 1.5; of 5, 1, 2.5, 1.5 the median is 2.
    assert found.norm_threshold == 2.0
    first, second = found.norms
    assert first.difference[1] == first.accumulated[1] == 3.0 and first.rho == 1.0
    assert second.difference[1] == 3.5 and second.accumulated[1] == 2.0
    assert first.difference == pytest.approx((1.4, 3.0, 4.6))


def test_batches_of_one_run_add_up():
    whole, whole_kept = recording(APG(3.0))
    parts, parts_kept = recording(APG(3.0))
    run(whole, *predictions([[3.0, 4.0], [0.0, 1.0]], [[1.0, 1.0], [2.0, 0.0]]))
    run(parts, *predictions([[3.0, 4.0]], [[1.0, 1.0]]))
    run(parts, *predictions([[0.0, 1.0]], [[2.0, 0.0]]))
    assert whole_kept.calibration() == parts_kept.calibration()


def test_the_cap_of_the_given_rule_is_left_out_and_the_rest_kept():
    rule, recorder = recording(Interval(APG(3.0, norm_threshold=0.1, space="raw"), sigma_range=(0.5, 2.0)))
    for level in (1.0, 3.0):
        run(rule, *predictions([[3.0, 4.0]]), rho=level)
    found = recorder.calibration()
    assert found.norm_threshold == 5.0 and found.rule == APG(3.0, space="raw")
    assert isinstance(rule, Interval) and rule.sigma_range == (0.5, 2.0)


@pytest.mark.parametrize("name", ["sd", "sd3", "dit", "classes", "wan"])
@pytest.mark.parametrize("space", ["x0", "raw"])
def test_real_pipelines(name, space):
    case = PIPELINES[name]
    pipe, rule = case.build("ddim"), APG(4.0, momentum=0.0, space=space)
    arguments = {**case.arguments(2), "num_inference_steps": 3}
    arguments |= {"class_labels": [1, 2]} if name in ("classes", "dit") else {}
    arguments.pop("guidance_scale", None)
    found = diffaccel.calibrate_guidance(pipe, rule, **arguments)
    assert len(found.norms) == 3 and found.norm_threshold > 0
    assert all(row.difference == row.accumulated and row.difference[0] <= row.difference[2] for row in found.norms)
    levels = [row.rho for row in found.norms]
    assert levels == sorted(levels, reverse=True)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["norm_threshold"] == found.norm_threshold
    assert len(str(found).splitlines()) == 4


@pytest.mark.parametrize("name", ["sd", "classes"])
def test_a_cap_above_all_norms_changes_nothing(name):
    case = PIPELINES[name]
    pipe, rule, seeds = case.build("ddim"), APG(4.0), [0, 1]
    watching, recorder = recording(rule)
    results = []
    for acting in (watching, rule):
        with diffaccel.guide(pipe, acting):
            results.append(case.call(pipe, 3, seeds, guidance_scale=3.0))
    found = recorder.calibration()
    highest = max(float(part.max()) for _, _, after in recorder.kept.values() for part in after)
    for cap in (1.001 * highest, found.norm_threshold):
        with diffaccel.guide(pipe, APG(4.0, norm_threshold=cap)):
            results.append(case.call(pipe, 3, seeds, guidance_scale=3.0))
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    assert not torch.equal(results[1], results[3])


def test_x0_and_raw_norms_differ_by_the_level():
    """Of an ε model d_x0 = −(σ/α)·d_ε, sample by sample, so quantiles scale too; in the first evaluation the states agree."""
    case = PIPELINES["sd"]
    found = {}
    for space in ("x0", "raw"):
        pipe, generator = case.build("ddim"), torch.Generator().manual_seed(0)
        rule = APG(4.0, space=space)
        found[space] = diffaccel.calibrate_guidance(
            pipe, rule, **case.arguments(3), num_inference_steps=2, generator=generator
        )
    x0, raw = (found[space].norms[0] for space in ("x0", "raw"))
    assert x0.difference == pytest.approx([x0.rho * length for length in raw.difference], rel=1e-5)


def test_arguments_by_position_are_those_by_name():
    pipe, kept = PIPELINES["classes"].build("ddim"), []
    for args, named in (
        (([1, 2], 1, 3), {}),
        (([1, 2], 1, 3, 5.0), {}),
        ((), {"class_labels": [1, 2], "num_inference_steps": 3}),
    ):
        generator = torch.Generator().manual_seed(0)
        kept.append(diffaccel.calibrate_guidance(pipe, 4.0, *args, **named, generator=generator))
    assert kept[0] == kept[1] == kept[2]


def test_errors_name_the_rule_that_was_given():
    for rule in (APG(4.0), Interval(APG(4.0), fraction_range=(0.0, 1.0))):
        with pytest.raises(UsageError, match="which APG needs"):
            diffaccel.calibrate_guidance(PIPELINES["classes"].build("ddim"), rule, [1, 2], guidance_scale=1.0)


def test_flux_says_what_it_needs():
    case = PIPELINES["flux"]
    pipe = case.build()
    with pytest.raises(UsageError, match="true_cfg_scale"):
        diffaccel.calibrate_guidance(pipe, 4.0, **case.arguments(1), num_inference_steps=2)
    negative = {"negative_prompt_embeds": -rows(1, 3, 16), "negative_pooled_prompt_embeds": -rows(1, 16)}
    arguments = {**case.arguments(1), **negative, "true_cfg_scale": 2.0, "num_inference_steps": 2}
    assert diffaccel.calibrate_guidance(pipe, 4.0, **arguments).norm_threshold > 0


@pytest.mark.parametrize(
    ("rule", "words"), [(CFG(4.0), "Only APG"), (1.0, "no guidance at scale 1"), ("apg", "Only APG")]
)
def test_rules_without_a_cap(rule, words):
    with pytest.raises(UsageError, match=words):
        recording(rule)


def test_runs_that_tell_nothing():
    with pytest.raises(UsageError, match="never acted"):
        recording(APG(3.0))[1].calibration()
    rule, recorder = recording(APG(3.0))
    run(rule, *predictions([[0.0, 0.0]]))
    with pytest.raises(UsageError, match="agree"):
        recorder.calibration()
    rule, recorder = recording(APG(3.0))
    run(rule, *predictions([[float("inf"), 0.0]]))
    with pytest.raises(NumericalError, match="diverged"):
        recorder.calibration()
