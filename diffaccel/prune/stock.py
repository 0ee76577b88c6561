"""Pruned transformers that diffusers' own classes can express, since all that went are whole blocks."""

from torch import nn

from ..core.errors import UsageError

# Lists of blocks, and the entries of the configuration that say how many there are.
_LISTS = {
    "CogVideoXTransformer3DModel": {"transformer_blocks": "num_layers"},
    "DiTTransformer2DModel": {"transformer_blocks": "num_layers"},
    "FluxTransformer2DModel": {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
    "LTXVideoTransformer3DModel": {"transformer_blocks": "num_layers"},
    "PixArtTransformer2DModel": {"transformer_blocks": "num_layers"},
    "SD3Transformer2DModel": {"transformer_blocks": "num_layers"},
    "WanTransformer3DModel": {"blocks": "num_layers"},
}


def stock_model(network: nn.Module) -> nn.Module:
    """The same model in diffusers' own class, with fewer blocks, which opens without this package.

    Args:
        network: a pruned transformer; it is not changed, and weights are copied.

    Returns:
        A model of the class that was pruned, on the same device and in the same dtype, with the same output.

    Raises:
        UsageError: something else than whole blocks was removed, DiT's first one (whose embedding its last layer uses) or
            SD3's last (which is made differently), or this is no such transformer; the pruned class can save all of these.
    """
    base = getattr(type(network), "_unpruned", None)
    lists = _LISTS.get(getattr(base, "__name__", ""))
    if lists is None:
        raise UsageError(
            f"Pruned models of diffusers' own classes are made of {', '.join(_LISTS)}; got a {type(network).__name__}."
        )
    gone: dict[str, list[int]] = {name: [] for name in lists}
    for record in network.config.pruned_layers:
        name, _, index = record["name"].rpartition(".")
        if name not in lists or record["replacement"] != "identity":
            raise UsageError(f"{base.__name__} has no configuration without {record['name']}: save the pruned class.")
        gone[name].append(int(index))
    _check_ends(base.__name__, network, gone)
    config = {key: value for key, value in network.config.items() if key != "pruned_layers" and not key.startswith("_")}
    places = {name: _places(len(getattr(network, name)), gone[name]) for name in lists}
    config |= {entry: len(places[name]) for name, entry in lists.items()}
    if config.get("dual_attention_layers"):
        now = places["transformer_blocks"]
        config["dual_attention_layers"] = tuple(now[i] for i in config["dual_attention_layers"] if i in now)
    model = base.from_config(config).to(device=network.device, dtype=network.dtype)
    weights = {_moved(key, places): value for key, value in network.state_dict().items()}
    model.load_state_dict({key: value for key, value in weights.items() if key is not None})
    return model.train(network.training)


def _check_ends(name: str, network: nn.Module, gone: dict[str, list[int]]) -> None:
    blocks = gone.get("transformer_blocks", [])
    if name == "DiTTransformer2DModel" and 0 in blocks:
        raise UsageError("DiT's first block embeds time and class for its last layer: save the pruned class.")
    if name == "SD3Transformer2DModel" and len(network.transformer_blocks) - 1 in blocks:
        raise UsageError(
            "SD3's last block is made without text, and no other can take its place: save the pruned class."
        )


def _places(count: int, gone: list[int]) -> dict[int, int]:
    """New indices of the blocks that stay, by their old ones."""
    return {old: new for new, old in enumerate(index for index in range(count) if index not in gone)}


def _moved(key: str, places: dict[str, dict[int, int]]) -> str | None:
    """The name of a weight where blocks have moved up; None for what stands for a block that is gone."""
    name, _, rest = key.partition(".")
    if name not in places:
        return key
    index, _, inner = rest.partition(".")
    new = places[name].get(int(index))
    return None if new is None else f"{name}.{new}.{inner}"
