"""Fitted maps: exact where the operator is linear, the least squares solution everywhere else."""

import pytest
import torch
from branches import inputs_of, own, traces
from networks import tiny_unet
from pipelines import PIPELINES, check_close
from torch import nn

import diffaccel
from diffaccel.core.errors import UsageError
from diffaccel.models.networks import network_of
from diffaccel.prune.classes import prune
from diffaccel.prune.costs import count_macs
from diffaccel.prune.fit import fit_maps
from diffaccel.prune.operators import operators
from diffaccel.prune.surgery import removed


def calls(network, count=3):
    x = torch.randn(count, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 4
    return lambda: [network(one, 100 * i, labels).sample for i, one in enumerate(x)]


def test_a_linear_operator_is_replaced_exactly():
    network = tiny_unet()
    block = network.mid_block.resnets[0]
    mixing = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # what is left is x + conv2(…) with a kernel of one pixel
        block.conv1.weight.zero_()
        block.conv1.weight[:, :, 1, 1] = mixing
    block.norm1 = block.norm2 = block.nonlinearity = nn.Identity()
    block.time_emb_proj, block.time_embedding_norm = None, "none"
    with torch.no_grad():
        block.conv2.weight.mul_(torch.zeros(3, 3).index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(1.0)))
    run = calls(network)
    with torch.no_grad():
        want = run()
        maps = fit_maps(network, ["mid_block.resnets.0"], run)
        with removed(network, ["mid_block.resnets.0"], maps) as records:
            for one, other in zip(run(), want, strict=True):
                check_close(one, other, 1e-4)
    assert records == [{"name": "mid_block.resnets.0", "kind": "resnet", "replacement": "linear", "channels": [16, 16]}]


def test_a_map_is_counted():
    network, name = tiny_unet(), "up_blocks.1.resnets.0"
    run = calls(network, 1)
    maps = fit_maps(network, [name], run)
    with removed(network, [name], maps):
        assert count_macs(network, run)[name] == 16 * 8 * 24 * 64  # samples, width after and before, pixels


def test_the_least_squares_solution():
    """Against another solver on the very inputs and outputs, for a block that changes the width."""
    network = tiny_unet()
    name = "up_blocks.1.resnets.0"
    before, seen = traces(network), []
    run = calls(network)
    hook = network.get_submodule(name).register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    weight, bias = fit_maps(network, [name], run)[name]
    hook.remove()
    x, y = (torch.cat([pair[i].movedim(1, -1).flatten(0, -2) for pair in seen]).detach().double() for i in (0, 1))
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    check_close(weight.double(), solution[:-1].T, 1e-4)
    check_close(bias.double(), solution[-1], 1e-4)
    assert weight.shape == (8, 24) and traces(network) == before


@pytest.mark.parametrize("name", ["sd", "classes", "pixart", "wan", "svd"])
def test_maps_are_better_than_nothing(name):
    """The operator's own output is nearer to that of its map than to what it gives without branches."""
    case = PIPELINES[name]
    network = network_of(own(case))
    args, kwargs = inputs_of(case, own(case))

    def run():
        network(*args, **kwargs)

    names = list(operators(network))[::2]
    maps = fit_maps(network, names, run)
    for key in names:
        errors, given = [], []
        module = network.get_submodule(key)
        hook = module.register_forward_hook(
            lambda _, pos, named, out, given=given: given.append((pos, named, out)), with_kwargs=True
        )
        with torch.no_grad():
            run()
        hook.remove()
        for chosen in ({}, maps):
            with removed(network, [key], {one: value for one, value in chosen.items() if one == key}):
                with torch.no_grad():
                    pos, named, out = given[0]
                    found = network.get_submodule(key)(*pos, **named)
                first = [one if isinstance(one, torch.Tensor) else one[0] for one in (found, out)]
                errors.append((first[0] - first[1]).square().mean())
        assert errors[1] <= errors[0] * 1.001, key


def test_maps_are_saved(tmp_path):
    network = tiny_unet()
    names = ["mid_block.attentions.0", "up_blocks.1.resnets.0", "mid_block.resnets.0.conv1"]
    run = calls(network)
    maps = fit_maps(network, names, run)
    prune(network, [*names, "mid_block.resnets.1"], maps)
    with torch.no_grad():
        want = run()
    network.save_pretrained(tmp_path)
    opened = diffaccel.PrunedUNet2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for one, other in zip(calls(opened)(), want, strict=True):
            check_close(one, other, 1e-6)
    kinds = [record["replacement"] for record in opened.config.pruned_layers]
    assert kinds == ["linear", "linear", "linear", "identity"]


def test_what_cannot_be_fitted():
    network = tiny_unet()
    with pytest.raises(UsageError, match=r"Did you mean 'mid_block\.resnets\.0'"):
        fit_maps(network, ["mid_block.resnet.0"], calls(network))
    with pytest.raises(UsageError, match="was not called"):
        fit_maps(network, ["mid_block.resnets.0"], lambda: None)
    with pytest.raises(UsageError, match="returns image and text"):
        fit_maps(PIPELINES["flux"].build().transformer, ["transformer_blocks.0"], lambda: None)
