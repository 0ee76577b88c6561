"""Layers as data: what they cost, what makes sense for a network, and what a search may propose."""

import json

import numpy as np
import pytest
import torch
from networks import tiny_unet
from pipelines import PIPELINES

from diffaccel.core.errors import DataError, UsageError
from diffaccel.search.layer_space import LayerSpace
from diffaccel.search.layers import bodies, check_layers, skippable

SHARES = {"a": 0.05, "b": 0.1, "c": 0.1, "d": 0.2, "e": 0.25, "f": 0.6}


def test_shares_are_multiplications():
    """By hand: weights times positions, and for attention its two products."""
    network = tiny_unet()
    positions, products = {}, {}
    for name, module in network.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):

            def keep(layer, args, output, name=name):
                width = layer.weight.shape[0]
                positions[name] = layer.weight.numel() * output.numel() // width

            module.register_forward_hook(keep)
        if type(module).__name__ == "Attention":
            products[name] = 2 * 4**4 * 16  # 4 × 4 places, 16 channels: q·k and weights·v
    shares = skippable(network)
    counts = {**positions, **products}
    total = sum(counts.values())
    for name, share in shares.items():
        saved = sum(count for key, count in counts.items() if (key + ".").startswith(name + ".")) - counts.get(
            f"{name}.conv_shortcut", 0
        )
        assert share == pytest.approx(saved / total, rel=1e-12), name
    assert skippable(network, lambda: network(torch.zeros(3, 1, 8, 8), 1, torch.tensor([0, 1, 2]))) == shares


def test_what_cannot_be_measured_or_skipped_is_said():
    with pytest.raises(UsageError, match=r"has Linear|has Sequential"):
        bodies(torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2))))
    with pytest.raises(UsageError, match="Pass run="):
        skippable(PIPELINES["flux"].build().transformer)
    with pytest.raises(UsageError, match="must call this UNet2DModel itself"):
        skippable(tiny_unet(), lambda: None)


@pytest.mark.parametrize(
    ("layers", "kind", "words"),
    [
        ({"drop": []}, DataError, "'drop'"),
        ({"skip": [[]]}, DataError, "2 network calls, an entry for each; got 1"),
        ({"skip": "all"}, DataError, "'all'"),
        ({"skip": [[], "conv_in"]}, DataError, "list of names"),
        ({"skip": [[], [3]]}, DataError, "list of names"),
        ({"scale": [None, 1.01]}, DataError, r"\[0, 1\]; got 1.01"),
        ({"scale": [float("nan"), None]}, DataError, "got nan"),
        ({"scale": [True, None]}, DataError, "got True"),
        ({"scale": ["1", None]}, DataError, "got '1'"),
        ({"skip": [[], ["conv_in"]]}, UsageError, "no layer 'conv_in'"),
    ],
)
def test_layers_that_make_no_sense(layers, kind, words):
    with pytest.raises(kind, match=words):
        check_layers(layers, tiny_unet(), 2)


def test_layers_that_make_sense():
    network, transformer = tiny_unet(), PIPELINES["flux"].build().transformer
    check_layers({}, torch.nn.Linear(1, 1), 2)
    check_layers({"skip": [bodies(network), []], "scale": [0, 1.0]}, network, 2)
    check_layers({"scale": [None, None]}, transformer, 2)
    with pytest.raises(UsageError, match="no skip features"):
        check_layers({"scale": [None, 1.0]}, transformer, 2)


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("budget", [None, 3.9, 3.0])
def test_what_a_search_proposes_keeps_the_budget(budget, scaling):
    space = LayerSpace(SHARES, calls=4, budget=budget, max_share=0.5, scaling=scaling)
    random, again = np.random.default_rng(0), np.random.default_rng(0)

    def check(layers):
        cost = sum(1 - sum(SHARES[name] for name in names) for names in layers["skip"])
        assert space.cost(layers) == pytest.approx(cost, abs=1e-12)
        assert cost <= (4 if budget is None else budget) + 1e-6
        for names in layers["skip"]:
            assert sum(SHARES[name] for name in names) <= 0.5 + 1e-6 and names == sorted(set(names))
        factors = layers.get("scale", [None] * 4)
        assert len(factors) == len(layers["skip"]) == 4
        assert all(factor is None or (scaling and 0 <= factor < 1) for factor in factors)
        assert json.loads(space.key(layers)) == json.loads(json.dumps(layers)) == layers

    parents = [space.draw(random) for _ in range(50)]
    assert [space.draw(again) for _ in range(50)] == parents
    assert len({space.key(layers) for layers in parents}) > 40
    for one, other in zip(parents, reversed(parents), strict=True):
        child, mutant = space.cross(one, other, random), space.mutate(one, random)
        assert (child, mutant) == (space.cross(one, other, again), space.mutate(one, again))
        assert mutant != one
        for layers in (one, child, mutant, space.fitted({"skip": [[*SHARES]] * 4}, random), space.fitted({}, random)):
            check(layers)
        again.bit_generator.state = random.bit_generator.state


def test_a_child_has_what_its_parents_have():
    space = LayerSpace(SHARES, calls=6, max_share=1.0, scaling=True)
    random = np.random.default_rng(1)
    one, other = space.draw(random), space.draw(random)
    child = space.tokens(space.cross(one, other, random))
    one, other = space.tokens(one), space.tokens(other)
    fitting = (child == one) | (child == other)
    assert fitting.all() and (child != one).any() and (child != other).any()


def test_every_layer_of_every_call_mutates():
    space = LayerSpace(SHARES, calls=3, max_share=1.0)
    random, layers = np.random.default_rng(0), {"skip": [[], [], []]}
    changed = sum(space.tokens(space.mutate(layers, random)) != space.tokens(layers) for _ in range(300))
    assert (changed[:, :-1] > 0).all() and not changed[:, -1].any()


def test_budgets_that_cannot_be_kept():
    with pytest.raises(UsageError, match="at least 3 evaluations"):
        LayerSpace(SHARES, calls=4, budget=2.9, max_share=0.5)
    LayerSpace({"a": 0.3, "b": 0.1}, calls=2, budget=1.2, max_share=0.4)
    with pytest.raises(UsageError, match="needs layers"):
        LayerSpace({}, calls=2)
