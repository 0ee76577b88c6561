"""Settings of a run, the points of its curve, and how they are drawn."""

import json
import math

import pytest
import torch
from networks import tiny_unet

from diffaccel.core.errors import UsageError
from diffaccel.evaluate.prune_picture import costs_lines, distance_lines, scores_picture, tradeoff_picture
from diffaccel.prune.plan import Point, measure_alternately, plan_of, point_of
from diffaccel.prune.selection import SOLVERS, select
from diffaccel.prune.settings import WAYS, PruningConfig, resolve_pruning
from diffaccel.prune.surgery import remove, removed
from diffaccel.prune.survey import survey_network


@pytest.fixture
def surveyed():
    network = tiny_unet()
    survey = survey_network(network)
    return network, survey, {name: float(index) for index, name in enumerate(survey.names)}


def test_points_count_what_is_left(surveyed):
    network, survey, scores = surveyed
    whole = point_of(survey, select(survey, scores, 0.0), 0.0)
    assert (whole.parameters, whole.macs, whole.names) == (survey.parameters, survey.macs, ())
    chosen = select(survey, scores, 0.4)
    point = point_of(survey, chosen, 0.4)
    records = remove(network, chosen.names)
    assert point.parameters == sum(weight.numel() for weight in network.parameters())
    assert point.macs == survey_network(network).macs
    assert point.shares(whole) == {"parameters": point.parameters / whole.parameters, "macs": point.macs / whole.macs}
    plan = plan_of(survey, scores, records, whole, point, chosen.score)
    assert json.loads(json.dumps(plan)) == plan
    assert [one["name"] for one in plan["removed"]] == list(chosen.names)
    assert (
        sum(one["parameters"] for one in plan["removed"]) == plan["before"]["parameters"] - plan["after"]["parameters"]
    )
    other = tiny_unet()
    assert remove(other, plan["removed"]) == records, "a plan can be applied again"
    assert Point(0.4, ("a",), 1, 1, fd=math.inf).to_dict()["fd"] is None


def test_time_in_turns(surveyed):
    network, survey, _ = surveyed
    x, seen, before = torch.zeros(1, 1, 8, 8), [], dict(network.named_modules())

    def run():
        seen.append(sum(weight.numel() for weight in network.parameters()))
        network(x, 0, torch.tensor([0]))

    cases = [(), tuple(survey.names[:1]), ("mid_block.resnets.0", "mid_block.attentions.0")]
    seconds = measure_alternately(network, run, cases, 2)
    assert len(seconds) == 3 and all(value > 0 for value in seconds)
    assert seen[:12] == [seen[0], seen[0], seen[2], seen[2], seen[4], seen[4]] * 2 and len({*seen}) == 3
    assert dict(network.named_modules()) == before
    assert len(seen) > 12, "fast networks are measured for about a second"


def test_pictures(surveyed):
    _, survey, scores = surveyed
    scores[survey.names[0]] = math.inf
    scores[survey.names[1]] = 0.0
    gone = select(survey, scores, 0.3).names
    image = scores_picture(survey, scores, gone, "tiny")
    assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.shape[1] > 17 * len(survey.names)
    colours = {tuple(pixel) for pixel in image.flatten(1).T.tolist()}
    assert (0xD2, 0x66, 0x2C) in colours and (0x1B, 0x78, 0xC8) in colours
    assert not torch.equal(image, scores_picture(survey, scores, (), "tiny"))
    points = [
        Point(0.0, (), 100, 1000, 0.2, 1.0),
        Point(0.3, ("a",), 70, 800, 0.1, 3.0),
        Point(0.5, ("b",), 50, 500, 0.1, math.inf),
    ]
    recovered = Point(0.3, ("a",), 70, 800, 0.1, 1.5)
    assert costs_lines(points)["parameters"] == [(0.0, 100.0), (0.3, 70.0), (0.5, 50.0)]
    assert costs_lines(points)["latency"] == [(0.0, 100.0), (0.3, 50.0), (0.5, 50.0)]
    assert distance_lines(points, recovered) == {"pruned": [(0.0, 1.0), (0.3, 3.0)], "recovered": [(0.3, 1.5)]}
    both = tradeoff_picture(points, recovered, "FD")
    one = tradeoff_picture([Point(0.0, (), 100, 1000)], None, "")
    assert both.shape[2] == 2 * one.shape[2] and both.dtype == torch.uint8


def test_settings_of_a_run():
    config, recovery = resolve_pruning({"model": "digits"})
    assert (
        recovery is None and config.select == "knapsack" and PruningConfig("digits", "ld-pruner").select == "ascending"
    )
    assert {*SOLVERS} < {*WAYS}
    more = {"method": {"features": "plain"}, "data": "digits"}
    config, recovery = resolve_pruning({"model": "digits", "seed": 3}, 7, more, ["trainer.batch_size=8"])
    assert (recovery.trainer.steps, recovery.trainer.batch_size, recovery.trainer.seed) == (7, 8, 3)
    assert recovery.method == {"name": "recovery", "features": "plain"} and recovery.data == "digits"
    guided = resolve_pruning({"model": "digits", "guidance_scale": 2.0}, 7)[1]
    assert guided.method["guidance_scale"] == 2.0 and guided.trainer.device == "auto"
    assert resolve_pruning({"model": "digits", "device": "cpu"}, 7)[1].trainer.device == "cpu"
    told = resolve_pruning(
        {"model": "digits", "guidance_scale": 2.0}, 7, None, ["method.guidance_scale=4", "trainer.seed=5"]
    )[1]
    assert told.method["guidance_scale"] == 4 and told.trainer.seed == 5
    general = resolve_pruning({"model": "some/folder"}, 7)[1]
    assert general.trainer.optimizers["student"].lr < recovery.trainer.optimizers["student"].lr
    stored = {
        "pruning": config.stored(),
        "method": {"name": "recovery"},
        "trainer": {"steps": 9, "seed": 3},
        "teacher": "digits",
    }
    again, continued = resolve_pruning({"ratio": 0.5}, stored=stored)
    assert (again.ratio, again.seed, continued.trainer.steps) == (0.5, 3, 9)
    assert "device" not in config.stored() and "batch_size" not in config.stored()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "best"}, "Unknown pruning method 'best'"),
        ({"ratio": 1.0}, "from 0 to below 1"),
        ({"ratio": math.nan}, "from 0 to below 1"),
        ({"curve": [0.2, 1.5]}, r"got 1\.5"),
        ({"cost": "weights"}, "Unknown cost 'weights'"),
        ({"select": "magic"}, "Unknown way to select 'magic'"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"num": 1}, "at least 2 images"),
        ({"cost": "latency", "repeats": 0}, "time must be measured"),
        ({"guidance_scale": math.inf}, "guidance_scale must be finite"),
        ({"layers": 3}, "Unknown setting 'layers'"),
    ],
)
def test_settings_that_cannot_be(given, words):
    with pytest.raises(UsageError, match=words):
        resolve_pruning({"model": "digits", **given})


def test_a_recovery_that_is_none():
    with pytest.raises(UsageError, match="have no effect without one: give --recover"):
        resolve_pruning({"model": "digits"}, None, {"method": {"features": "plain"}})
    with pytest.raises(UsageError, match="have no effect without one"):
        resolve_pruning({"model": "digits"}, 0, None, ["trainer.ema=0.5"])
    with pytest.raises(UsageError, match="takes training steps"):
        resolve_pruning({"model": "digits"}, -1)


def test_removal_for_a_while_measures_the_same(surveyed):
    network, survey, scores = surveyed
    point = point_of(survey, select(survey, scores, 0.3), 0.3)
    with removed(network, point.names):
        assert sum(weight.numel() for weight in network.parameters()) == point.parameters
