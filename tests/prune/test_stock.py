"""Transformers with fewer blocks in diffusers' own classes: the same output, opened without this package's classes."""

import copy

import diffusers
import pytest
import torch
from branches import deep
from pipelines import PIPELINES, check_close

from diffaccel.core.errors import UsageError
from diffaccel.prune.classes import prune
from diffaccel.prune.stock import stock_model

NAMES = {
    "dit": ["transformer_blocks.1", "transformer_blocks.3"],
    "pixart": ["transformer_blocks.0", "transformer_blocks.2"],
    "sd3": ["transformer_blocks.0", "transformer_blocks.2"],
    "flux": ["transformer_blocks.3", "single_transformer_blocks.0"],
    "wan": ["blocks.0", "blocks.1"],
    "ltx": ["transformer_blocks.3"],
    "cogvideox": ["transformer_blocks.1"],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_output(name, tmp_path):
    network, (args, kwargs) = deep(name, **({"dual_attention_layers": (1, 2)} if name == "sd3" else {}))
    base = type(network)
    prune(network, NAMES[name])
    stock = stock_model(network)
    assert type(stock) is base and "pruned_layers" not in stock.config
    assert sum(w.numel() for w in stock.parameters()) == sum(w.numel() for w in network.parameters())
    stock.save_pretrained(tmp_path)
    opened = base.from_pretrained(tmp_path)
    with torch.no_grad():
        check_close(opened(*args, **kwargs)[0], network(*args, **kwargs)[0], 1e-6)


def test_what_has_no_configuration():
    for name, gone, message in (
        ("dit", "transformer_blocks.0", "first block embeds"),
        ("sd3", "transformer_blocks.3", "last block"),
        ("pixart", "transformer_blocks.1.ff", r"no configuration without transformer_blocks\.1\.ff"),
    ):
        with pytest.raises(UsageError, match=message):
            stock_model(prune(deep(name)[0], [gone]))
    unet = copy.deepcopy(PIPELINES["sd"].build().unet)
    for network in (unet, prune(unet, [])):
        with pytest.raises(UsageError, match="are made of CogVideoX"):
            stock_model(network)
    assert isinstance(unet, diffusers.UNet2DConditionModel)
