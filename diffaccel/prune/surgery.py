"""Removal of operators from a network, for good or for the time of a block."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn

from ..core.errors import UsageError
from .operators import Operator, check_names, operators
from .replacements import LinearMap, build

Layers = Iterable[str | Mapping]
Maps = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def remove(network: nn.Module, layers: Layers, maps: Maps | None = None) -> list[dict]:
    """Put something cheap in the place of operators, in the network itself; their parameters are gone afterwards.

    Args:
        network: see `operators`; after this it has no hooks that it had not before.
        layers: names of operators, or records as this returns them.
        maps: weight (outputs, inputs) and bias of linear maps by name, as `fit_maps` returns them, for operators that are not
            to be replaced by nothing; single-tensor operators only.

    Returns:
        For each, {"name", "kind", "replacement"}, and "channels" of a linear map: plain JSON.

    Raises:
        UsageError: names that are no operators of this network, two of which one lies inside the other, a linear map for
            an operator that returns several tensors.
    """
    records, _ = _replace(network, layers, maps or {})
    return records


@contextmanager
def removed(network: nn.Module, layers: Layers, maps: Maps | None = None) -> Iterator[list[dict]]:
    """Like `remove`, inside a ``with`` block; then the very same modules are back.

    Raises:
        UsageError: see `remove`.
    """
    records, former = _replace(network, layers, maps or {})
    try:
        yield records
    finally:
        for name, module in former.items():
            _set(network, name, module)


def check_apart(names: Iterable[str]) -> None:
    """Refuse names of which one lies inside another, or is given twice.

    Raises:
        UsageError: naming both.
    """
    names = sorted(names, key=lambda name: name.split("."))
    for outer, inner in pairwise(names):
        if inner == outer or inner.startswith(outer + "."):
            raise UsageError(f"Both {outer} and {inner} are to be removed, but the first contains the second.")


def _replace(network: nn.Module, layers: Layers, maps: Maps) -> tuple[list[dict], dict[str, nn.Module]]:
    if isinstance(layers, (str, Mapping)):
        raise UsageError(f"Layers to remove are a list of names; got {layers!r:.80}.")
    given = [_record(layer) for layer in layers]
    if not given:
        return [], {}
    table = operators(network, single=True)
    check_names(network, [*(record["name"] for record in given), *maps], table)
    check_apart(record["name"] for record in given)
    records, made = [], {}
    for record in given:
        operator, body = table[record["name"]], network.get_submodule(record["name"])
        records.append(_completed(record, operator, maps))
        made[operator.name] = _built(body, operator, records[-1], maps.get(operator.name))
    former = {name: network.get_submodule(name) for name in made}
    for name, module in made.items():
        _set(network, name, module)
    return records, former


def _record(layer: str | Mapping) -> dict:
    record = {"name": layer} if isinstance(layer, str) else dict(layer) if isinstance(layer, Mapping) else {}
    channels = record.get("channels")
    pair = isinstance(channels, (list, tuple)) and len(channels) == 2
    if not isinstance(record.get("name"), str) or (record.get("replacement") == "linear" and not pair):
        raise UsageError(
            'A layer to remove is a name, or a record such as {"name": "mid_block.resnets.0", "replacement": "identity"}, '
            f"with channels: [inputs, outputs] for a linear map; got {layer!r:.120}."
        )
    return record


def _completed(record: Mapping, operator: Operator, maps: Maps) -> dict:
    wanted = "linear" if operator.name in maps else record.get("replacement", operator.replacement)
    if wanted not in (operator.replacement, "linear"):
        raise UsageError(
            f"{operator.name} is a {operator.kind}, which can be replaced by {operator.replacement} or linear; got {wanted!r}."
        )
    complete = {"name": operator.name, "kind": operator.kind, "replacement": wanted}
    if operator.name in maps:
        outputs, inputs = maps[operator.name][0].shape
        complete["channels"] = [inputs, outputs]
    elif wanted == "linear":
        complete["channels"] = list(record["channels"])
    return complete


def _built(body: nn.Module, operator: Operator, record: Mapping, values) -> nn.Module:
    if record["replacement"] != "linear":
        return build(body, record["replacement"], operator.kept)
    if set(operator.kept) - {"conv_shortcut"} or getattr(body, "up", False) or getattr(body, "down", False):
        raise UsageError(f"{operator.name} resamples or is used elsewhere in parts; no linear map can take its place.")
    made: LinearMap = build(body, "linear", channels=record["channels"])
    if values is not None:
        with torch.no_grad():
            made.map.weight.copy_(values[0])
            made.map.bias.copy_(values[1])
    return made


def _set(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    network.get_submodule(parent)._modules[leaf] = module
