"""A sweep over guidance rules: identities between rows, the same images as `generate`, and that APG keeps its promise."""

import statistics
from xml.etree import ElementTree

import pytest
import torch
from networks import tiny_unet

from diffaccel.core.errors import UsageError
from diffaccel.core.images import labelled, to_uint8
from diffaccel.core.rng import KeyedRandom
from diffaccel.evaluate.charts import line_chart
from diffaccel.evaluate.guidance_page import header, lines, notes, page, picture
from diffaccel.evaluate.guidance_sweep import MEASURES, SHOWN, Row, named_rule, sweep_guidance
from diffaccel.generation import generate
from diffaccel.guidance.attach import guide
from diffaccel.guidance.rules import APG, CFG, Interval, Rescale
from diffaccel.models.teachers import load_pipeline

STEPS, NUM = 4, 100
OPTIONS = {"apg": {"eta": 1.0, "momentum": 0.0}, "interval": {"fraction_range": [0.25, 0.75]}}


@pytest.fixture(scope="module")
def sweep():
    settings = {"seeds": (3,), "num": NUM, "steps": STEPS, "sampler": "ddim", "options": OPTIONS}
    return sweep_guidance("digits", ("cfg", "apg", "interval:cfg"), (1.0, 6.0), **settings)


@pytest.fixture
def row(sweep):
    """`row("cfg", 6)`: one row of the sweep."""
    return lambda rule, scale: next(r for r in sweep.rows if (r.rule, r.scale) == (rule, scale))


def test_rules_by_name():
    assert named_rule("cfg", 3.0, OPTIONS) == CFG(3.0)
    assert named_rule("apg", 3.0, OPTIONS) == APG(3.0, eta=1.0, momentum=0.0)
    assert named_rule("rescale:cfg", 3.0) == Rescale(CFG(3.0))
    wrapped = Interval(Rescale(APG(3.0, eta=1.0, momentum=0.0)), fraction_range=(0.25, 0.75))
    assert named_rule("interval:rescale:apg", 3.0, OPTIONS) == wrapped


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("apgg", "'apg'"),
        ("apg:cfg", "wrapper"),
        ("rescale", "rescale:cfg"),
        ("interval:cfg", "sigma_range"),
        ("", "cfg"),
    ],
)
def test_bad_names(text, words):
    with pytest.raises(UsageError, match=words):
        named_rule(text, 3.0)


def test_every_rule_meets_every_scale(sweep):
    wanted = [(rule, scale) for rule in ("cfg", "apg", "interval:cfg") for scale in (1.0, 6.0)]
    assert [(r.rule, r.scale) for r in sweep.rows] == [("unguided", 1.0), *wanted]
    assert all(list(r.runs) == [3] for r in sweep.rows)


def test_scale_1_is_the_unguided_model(sweep, row):
    for rule in ("cfg", "apg", "interval:cfg"):
        assert torch.equal(row(rule, 1.0).samples, sweep.rows[0].samples)
        assert {m: row(rule, 1.0).mean(m) for m in MEASURES} == {m: sweep.rows[0].mean(m) for m in MEASURES}


def test_apg_without_its_changes_is_cfg(row):
    """eta 1, no momentum and no cap; the two sum in another order, so the last digit may differ."""
    cfg, apg = row("cfg", 6.0), row("apg", 6.0)
    assert (cfg.samples.int() - apg.samples.int()).abs().max() <= 1
    assert apg.mean("overshoot") == pytest.approx(cfg.mean("overshoot"), rel=1e-4)


def test_evaluations_are_counted(sweep, row):
    assert sweep.rows[0].nfe == STEPS and row("cfg", 1.0).nfe == STEPS
    assert row("cfg", 6.0).nfe == row("apg", 6.0).nfe == 2 * STEPS
    assert row("interval:cfg", 6.0).nfe == STEPS + 2  # guided in two of the four


def test_images_are_those_of_generate(row):
    drawn = generate("digits", NUM, steps=STEPS, sampler="ddim", seed=3, guidance="cfg", guidance_scale=6.0)
    assert torch.equal(row("cfg", 6.0).samples, next(drawn)[0][:SHOWN])


def test_overshoot_is_that_of_the_samples_before_clipping(row):
    """Drawn again with the pipeline itself, whose tensors are not clipped."""
    from diffaccel.samplers.registry import get_sampler

    pipeline = load_pipeline("digits")
    pipeline.scheduler = get_sampler("ddim").build(pipeline.scheduler.config)
    noise = KeyedRandom(3).normal("sample", 0, 0, NUM, pipeline.sample_shape)
    call = {"class_labels": torch.arange(NUM) % 10, "num_inference_steps": STEPS, "noise": noise, "output_type": "pt"}
    with guide(pipeline, CFG(6.0)):
        x = pipeline(**call, guidance_scale=2.0).images
    assert torch.equal(to_uint8(x)[:SHOWN], row("cfg", 6.0).samples)
    beyond = torch.where(x.abs() > 1, x.abs() - 1, 0).double().mean()
    assert row("cfg", 6.0).runs[3]["overshoot"] == pytest.approx(float(beyond), rel=1e-5) and beyond > 0


def test_means_and_deviations():
    runs = {seed: {"fd": value, "accuracy": None} for seed, value in enumerate((1.0, 2.0, 6.0))}
    several, single = Row("cfg", 2.0, runs=runs), Row("cfg", 2.0, runs={0: runs[0]})
    assert several.mean("fd") == 3.0 and several.deviation("fd") == statistics.stdev([1.0, 2.0, 6.0])
    assert several.mean("accuracy") is None and several.deviation("accuracy") is None
    assert single.mean("fd") == 1.0 and single.deviation("fd") is None


def test_apg_beats_cfg_at_a_high_scale():
    """Better in every respect that strong guidance spoils, at no loss of accuracy; the margins are many deviations wide."""
    settings = {"num": 100, "steps": 20, "sampler": "ddim", "options": {"apg": {"norm_threshold": 0.5}}}
    _, cfg, apg = sweep_guidance("digits", ("cfg", "apg"), (10.0,), seeds=(7,), **settings).rows
    assert apg.mean("fd") < 0.6 * cfg.mean("fd") and apg.mean("overshoot") < 0.4 * cfg.mean("overshoot")
    assert apg.mean("recall") > cfg.mean("recall") and apg.mean("precision") > cfg.mean("precision")
    assert apg.mean("accuracy") >= cfg.mean("accuracy") - 0.01


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (([], [2.0]), {}, "rules"),
        ((["cfg"], []), {}, "scales"),
        ((["cfg"], [2.0]), {"apg": {"eta": 0.0}}, "no effect on cfg: name it among the rules"),
        ((["cfg"], [2.0]), {"rescale": {"factor": 0.5}}, "rescale:cfg"),
        ((["cfg"], [2.0]), {"ap": {"eta": 0.0}}, "'apg'"),
        ((["cfg++"], [2.0]), {}, r"\[0, 1\]"),
    ],
)
def test_refusals(arguments, options, words):
    with pytest.raises(UsageError, match=words):
        sweep_guidance("digits", *arguments, options=options)


def test_models_without_classes_or_data_are_refused(tmp_path):
    import diffusers

    from diffaccel.models.pipeline import ClassConditionalPipeline

    for name, classes, words in (("plain", None, "has no classes"), ("other", 4, "give a reference")):
        pipeline = ClassConditionalPipeline(tiny_unet(classes), diffusers.DDIMScheduler())
        pipeline.save_pretrained(tmp_path / name)
        with pytest.raises(UsageError, match=words):
            sweep_guidance(str(tmp_path / name), ("cfg",), (2.0,))


def test_table_page_and_picture(sweep):
    cells = lines(sweep)
    assert all(len(line) == len(header(sweep)) for line in cells) and len(cells) == len(sweep.rows) + 1
    assert "saturation" not in header(sweep) and "Grey images have no saturation" in " ".join(notes(sweep))
    image = picture(sweep)
    assert image.dtype == torch.uint8 and image.shape[0] == 1
    text = page(sweep, image)
    assert "<script" not in text and "http" not in text and "data:image/png;base64," in text
    assert text.count("<svg") == 4 and "interval:cfg" in text


def test_labelled_images_stand_where_they_belong():
    first, second, third = (torch.full((3, 10, 12), value, dtype=torch.uint8) for value in (10, 20, 30))
    image = labelled([[("", first), ("", second)], [("", third)]])
    columns = [value for value in (10, 20, 30) if bool((image == value).any())]
    places = {value: torch.nonzero(image[0] == value) for value in columns}
    assert {value: len(place) for value, place in places.items()} == {10: 120, 20: 120, 30: 120}
    assert places[10][0, 0] == places[20][0, 0] < places[30][0, 0]
    assert places[10][0, 1] == places[30][0, 1] < places[20][0, 1]


def dots(chart: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(dot.get("cx")), float(dot.get("cy"))) for dot in chart.iter("circle")]


def test_charts_are_true_to_scale():
    points = [(0.0, 1.0, 0.0), (1.0, 2.0, 0.0), (4.0, 3.0, 0.5)]
    chart = ElementTree.fromstring(line_chart("a < b", {"<x&y>": points}, {"level": 2.0}, "scale"))  # well-formed
    (x0, y0), (x1, y1), (x2, y2) = dots(chart)
    assert x2 - x1 == pytest.approx(3 * (x1 - x0), abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y1
    assert {"a < b", "● <x&y>", "level", "scale"} <= set(chart.itertext())


def test_equal_ratios_are_equal_lengths_on_a_logarithmic_axis():
    points = [(0.0, 100.0, 0.0), (1.0, 10.0, 0.0), (2.0, 1.0, 0.0), (3.0, 0.3, 0.0)]
    chart = ElementTree.fromstring(line_chart("t", {"line": points}, logarithmic=True))
    heights = [y for _, y in dots(chart)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert {"0.2", "1", "100"} <= set(chart.itertext()) and "200" not in set(chart.itertext())


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3.0, 1e-6], [1e9, 1e-9]])
def test_charts_of_difficult_numbers_stay_inside(values, zero):
    points = [(float(x), value, 0.0) for x, value in enumerate(values)]
    chart = ElementTree.fromstring(line_chart("", {"a": points}, {"b": values[0]}, zero=zero))
    _, _, width, height = map(float, chart.find("svg").get("viewBox").split())
    assert len(dots(chart)) == len(values) and all(0 < x < width and 0 < y < height for x, y in dots(chart))
