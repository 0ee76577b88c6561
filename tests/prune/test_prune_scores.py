"""Scores in closed form on linear networks, the same whatever the batches, and continued where they stopped."""

import json
import math

import pytest
import torch
from networks import tiny_unet
from pipelines import PIPELINES, check_close
from torch import nn

from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.rng import KeyedRandom
from diffaccel.core.schedule import Flow
from diffaccel.models.denoiser import NetworkDenoiser
from diffaccel.models.networks import network_of
from diffaccel.models.teachers import load_pipeline
from diffaccel.prune.additivity import check_additivity, nested, rank_correlation
from diffaccel.prune.calibration import Calibration, calibrate, digest
from diffaccel.prune.criteria import Laptop, LDPruner, Magnitude, Random, latent_distance
from diffaccel.prune.operators import operators
from diffaccel.prune.scores import CRITERIA, get_criterion, score
from diffaccel.prune.selection import SOLVERS
from diffaccel.search.subjects import DenoiserSubject

SHAPE = (3, 2, 2)


class Attention(nn.Module):
    """x + W·x, under the name of a residual body of U-Nets."""

    residual_connection, rescale_output_factor = True, 1.0

    def __init__(self, seed):
        super().__init__()
        weight = 0.3 * torch.randn(12, 12, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight)

    def forward(self, hidden_states):
        return hidden_states + hidden_states.flatten(1).matmul(self.weight.T).reshape(hidden_states.shape)


class Linear(nn.Module):
    """Three of them, one after the other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention(seed) for seed in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return (x,)

    def matrix(self, without=()):
        product = torch.eye(12, dtype=torch.float64)
        for index, layer in enumerate(self.layers):
            if index not in without:
                product = (torch.eye(12, dtype=torch.float64) + layer.weight.detach().double()) @ product
        return product


class LinearDenoiser(NetworkDenoiser):
    sample_shape = SHAPE

    def predict(self, x_t, t, condition):
        return self.net(x_t)[0]

    def feature_modules(self):
        return []


def linear(count=6, steps=2, **more) -> Calibration:
    denoiser = LinearDenoiser(Linear(), Flow(), "sample")  # whose last step ends at what is predicted
    return Calibration(DenoiserSubject(denoiser), count=count, steps=steps, **more)


def test_laptop_in_closed_form():
    calibration = linear()
    network, states = calibration.network, torch.cat([args[0] for args, _ in calibration.calls]).flatten(1).double()
    assert len(states) == 6 * 2
    criterion = Laptop(calibration)
    for gone in ([0], [2], [0, 1], [0, 1, 2]):
        change = states @ (network.matrix(gone) - network.matrix()).T
        found = criterion.loss([f"layers.{index}" for index in gone])
        assert found == pytest.approx(float(change.square().mean()), rel=1e-4)
    assert criterion.loss([]) == 0.0
    given = torch.ones(1, *SHAPE)
    own = Laptop(Calibration(calibration.subject, calls=[((given,), {})]))
    change = given.flatten(1).double() @ (network.matrix([1]) - network.matrix()).T
    assert own.loss(["layers.1"]) == pytest.approx(float(change.square().mean()), rel=1e-4)


def test_ld_pruner_in_closed_form():
    """A model that predicts nothing ends at zero, and without the layer that does so where its noise began."""
    calibration = linear(count=5, steps=4)
    with torch.no_grad():
        for layer, factor in zip(calibration.network.layers, (-1.0, 0.0, 0.0), strict=True):
            layer.weight.copy_(factor * torch.eye(12))
    noise = KeyedRandom(0).normal("search", 0, 0, 5, SHAPE)
    criterion = LDPruner(calibration)
    assert criterion.loss(["layers.0"]) == pytest.approx(float(noise.mean(0).norm() + noise.std(0).norm()), rel=1e-4)
    assert criterion.loss(["layers.1"]) == criterion.loss([]) == 0.0


def test_ld_pruner_against_a_network_without_the_layer():
    calibration = linear(count=5)
    criterion = LDPruner(calibration)
    reference, network = calibration.latents(), calibration.network
    other = Linear()
    other.layers[1] = nn.Identity()
    theirs = Calibration(DenoiserSubject(LinearDenoiser(other, Flow(), "sample")), count=5, steps=2).latents()
    want = (reference.mean(0) - theirs.mean(0)).norm() + (reference.std(0) - theirs.std(0)).norm()
    assert criterion.loss(["layers.1"]) == pytest.approx(float(want), rel=1e-4)
    check_close(calibration.latents(), reference, 0)
    assert [type(layer).__name__ for layer in network.layers] == ["Attention"] * 3


@pytest.mark.parametrize(("reduce", "elements"), [("element", 12), ("channel", 3), ("global", 1)])
def test_distance_of_moments(reduce, elements):
    z = torch.randn(50, *SHAPE)
    assert latent_distance(z, z, reduce) == 0.0
    assert latent_distance(z, z + 0.5, reduce) == pytest.approx(0.5 * math.sqrt(elements), rel=1e-5)
    standard = (z - z.mean(0)) / z.std(0)
    if reduce == "element":
        assert latent_distance(standard, 3 * standard) == pytest.approx(2 * math.sqrt(elements), rel=1e-5)
    assert math.isnan(latent_distance(z, z * math.nan, reduce))


def test_baselines():
    calibration = linear()
    magnitude = Magnitude(calibration)
    weights = [layer.weight.detach() for layer in calibration.network.layers]
    assert magnitude.loss(["layers.1"]) == pytest.approx(float(weights[1].abs().mean()))
    assert magnitude.loss(["layers.0", "layers.1"]) == pytest.approx(sum(float(w.abs().mean()) for w in weights[:2]))
    random = [Random(calibration, seed=seed) for seed in (0, 0, 1)]
    names = [f"layers.{index}" for index in range(3)]
    drawn = [[one.loss([name]) for name in names] for one in random]
    assert drawn[0] == drawn[1] != drawn[2] and len({*drawn[0], *drawn[2]}) == 6
    assert random[0].loss(names) == pytest.approx(sum(drawn[0]))


@pytest.mark.parametrize("method", ["ld-pruner", "laptop"])
def test_batches_do_not_matter(method):
    pipe = load_pipeline("digits")
    names = list(operators(pipe.unet))[::9]
    found = []
    for batch_size in (3, 8):
        calibration = calibrate(pipe, count=8, steps=3, batch_size=batch_size)
        found.append(score(get_criterion(method).load()(calibration), names))
    for name in names:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-3) and found[0][name] > 0


@pytest.mark.parametrize("name", ["sd", "dit", "flux", "wan", "ddpm"])
def test_any_pipeline(name):
    case = PIPELINES[name]
    pipe = case.build()
    settings = {key: value for key, value in case.arguments(1).items() if key not in ("output_type", "batch_size")}
    calibration = calibrate(pipe, [{}], settings, count=2, steps=2, batch_size=1)
    names = list(operators(network_of(pipe)))[:3]
    for method in ("ld-pruner", "laptop"):
        scores = score(get_criterion(method).load()(calibration), names)
        assert all(math.isfinite(value) and value >= 0 for value in scores.values())
    whole = list(calibration.outputs())
    assert len(whole) == len(calibration.calls) == 2 * 2 * case.forwards


def test_scoring_is_continued(tmp_path):
    calibration = linear()
    names = [f"layers.{index}" for index in range(3)]
    path = tmp_path / "scores.jsonl"
    told, scored = [], []

    class Counted(Laptop):
        def loss(self, names):
            scored.extend(names)
            if len(scored) == 2:
                raise KeyboardInterrupt
            return super().loss(names)

    with pytest.raises(KeyboardInterrupt):
        score(Counted(calibration), names, path)
    path.write_bytes(path.read_bytes() + b'{"key": "layers.1", "sc')  # the machine stopped
    found = score(Counted(calibration), names, path, lambda *told_now: told.append(told_now))
    assert scored == ["layers.0", "layers.1", "layers.1", "layers.2"]
    assert found == score(Laptop(calibration), names)
    assert told == [(name, found[name], done, 3) for done, name in enumerate(names, 1)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["settings"]["method"] == "laptop" and [line["key"] for line in lines[1:]] == names

    with torch.no_grad():
        calibration.network.layers[0].weight[0, 0] += 1
    with pytest.raises(UsageError, match="model was"):
        score(Laptop(calibration), names, path)
    with pytest.raises(UsageError, match="method was 'laptop'"):
        score(LDPruner(calibration), names, path)
    path.write_text("nonsense\n")
    with pytest.raises(DataError, match="is not the journal"):
        score(Laptop(calibration), names, path)


def test_scores_of_other_conditions_are_not_taken_for_these(tmp_path):
    case = PIPELINES["sd"]
    pipe, path = case.build(), tmp_path / "scores.jsonl"
    settings = {"height": 8, "width": 8}
    names = ["mid_block.resnets.0"]

    def scored(prompt, **more):
        calibration = calibrate(pipe, [{"prompt": prompt}], settings | more, count=2, steps=2)
        return score(Laptop(calibration), names, path)

    assert scored("a cat") == scored("a cat")
    for wrong in (lambda: scored("a dog"), lambda: scored("a cat", guidance_scale=2.0)):
        with pytest.raises(UsageError, match="belongs to a scoring with other settings: conditions was"):
            wrong()
    calibration = linear()
    ones = [Laptop(Calibration(calibration.subject, calls=[((torch.full((1, *SHAPE), x),), {})])) for x in (1.0, 2.0)]
    assert ones[0].settings()["calls"] != ones[1].settings()["calls"]
    assert digest({"a": (1, 2), "b": [torch.ones(2)]}) == digest({"b": [torch.ones(2)], "a": (1, 2)})
    assert len({digest(one) for one in (1, 1.0, "1", [1], [[1]], {"1": 1}, torch.ones(1), torch.ones(1, 1))}) == 8


def test_what_is_not_finite_stays():
    calibration = linear()
    with torch.no_grad():
        calibration.network.layers[0].weight.mul_(1e-30)
    broken = Calibration(calibration.subject, calls=[((torch.full((1, *SHAPE), math.nan),), {})])
    assert score(Laptop(broken), ["layers.0"]) == {"layers.0": math.inf}


def test_additivity():
    """Orthogonal changes add up exactly; sets have no operator inside another."""
    calibration = linear()
    with torch.no_grad():
        for index, layer in enumerate(calibration.network.layers):
            layer.weight.zero_()
            layer.weight[index, 3 + index] = 1.0 + index  # each adds one input to one output
    criterion = Laptop(calibration)
    scores = score(criterion, [f"layers.{index}" for index in range(3)])
    found = check_additivity(criterion, scores, count=12, largest=3)
    assert found.sums == pytest.approx(found.joints, rel=1e-4) and found.correlation == pytest.approx(1.0)
    assert {len(subset) for subset in found.subsets} == {2, 3}

    network = tiny_unet().eval()
    names = list(operators(network, single=True))

    class Count:
        def loss(self, names):
            return float(len(names))

    found = check_additivity(Count(), dict.fromkeys(names, 1.0), count=30)
    assert all(not nested(one, other) for subset in found.subsets for one in subset for other in subset if one != other)
    assert found.correlation == pytest.approx(1.0)
    with pytest.raises(UsageError, match="2 operators or more"):
        check_additivity(criterion, {"layers.0": 1.0, "layers.1": math.inf})


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


def test_the_registry():
    for name, info in CRITERIA.items():
        assert info.load().name == name == info.name and info.solver in SOLVERS
    with pytest.raises(UsageError, match="Did you mean 'laptop'"):
        get_criterion("lap-top")


def test_calibrations_that_make_no_sense():
    with pytest.raises(UsageError, match="got 1 samples and 2 steps"):
        linear(count=1)
    with pytest.raises(UsageError, match="needs prompts"):
        calibrate(PIPELINES["sd"].build())
    with pytest.raises(UsageError, match="Unknown reduction"):
        LDPruner(linear(), reduce="pixel")
    with pytest.raises(UsageError, match="removable layer of Linear"):
        Laptop(linear()).loss(["layers.7"])
