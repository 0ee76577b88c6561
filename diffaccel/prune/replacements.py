"""Small modules that take the place of what is removed."""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..core.errors import UsageError
from ..models.residual import packed, without_branches

REPLACEMENTS = {
    "identity": "what comes in goes out",
    "shortcut": "the block's own shortcut convolution and resampling",
    "zero": "the branch adds nothing",
    "linear": "a linear map of channels, fitted to the removed module",
}
"""Kinds of replacements in words."""


class Replacement(nn.Module):
    """Base of what is called like the module that it replaces.

    It has one parameter name of that module with a tensor without elements, so that loading its weights into the whole
    network ends in an error instead of a network with random weights.

    Args:
        body: the removed module; not kept.
        kept: names inside it of what stays, under the same names.
    """

    def __init__(self, body: nn.Module, kept: Sequence[str] = ()):
        super().__init__()
        self.kind = type(body).__name__
        parameters = [*inspect.signature(type(body).forward).parameters.values()][1:]
        self._names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
        self._defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
        for name in kept:
            _put(self, name, body.get_submodule(name))
        gone = [name for name, _ in body.named_parameters() if not name.startswith(tuple(f"{one}." for one in kept))]
        if gone:
            path, _, leaf = gone[0].rpartition(".")
            holder = _put(self, path, None) if path else self
            holder.register_buffer(leaf, torch.empty(0))
        self.train(body.training)

    def arguments(self, *args, **kwargs) -> dict:
        """Arguments of the removed module's call by name, the first of its signature first, defaults included."""
        given = dict(zip(self._names, args, strict=False))
        return {self._names[0]: None, **self._defaults, **given, **kwargs}

    def extra_repr(self) -> str:
        return f"in place of {self.kind}"


class Bypass(Replacement):
    """A residual body without its branches: its resampling, shortcut and scale, or the identity."""

    def __init__(self, body: nn.Module, kept: Sequence[str] = ()):
        super().__init__(body, kept)
        for part in ("conv_shortcut", "upsample", "downsample"):  # resampling may be a function
            if not hasattr(self, part):
                setattr(self, part, getattr(body, part, None))
        self.output_scale_factor = getattr(body, "output_scale_factor", 1.0)
        self.rescale_output_factor = getattr(body, "rescale_output_factor", 1.0)

    def forward(self, *args, **kwargs):
        return without_branches(self.kind, self, self.arguments(*args, **kwargs))


class PassThrough(Replacement):
    """The identity in place of a single layer."""

    def forward(self, x):
        return x


class Zero(Replacement):
    """Zeros in place of a branch, in the shape of its input but without its memory."""

    def __init__(self, body: nn.Module, kept: Sequence[str] = ()):
        super().__init__(body, kept)
        self.joint = is_joint(body)

    def forward(self, *args, **kwargs):
        arguments = self.arguments(*args, **kwargs)
        hidden, text = _first(arguments), arguments.get("encoder_hidden_states")
        return (_zeros(hidden), _zeros(text)) if self.joint and text is not None else _zeros(hidden)


class LinearMap(Replacement):
    """y = W·x + b over channels, (B, C, …) or (B, tokens, C), in place of a module with one input and one output.

    Args:
        body: the removed module.
        channels: (inputs, outputs) of the map.

    Raises:
        UsageError: a module that returns several tensors.
    """

    def __init__(self, body: nn.Module, channels: Sequence[int]):
        if is_joint(body):
            raise UsageError(f"A {type(body).__name__} returns image and text; no linear map can take its place.")
        super().__init__(body)
        self.map = nn.Linear(*channels)

    def forward(self, *args, **kwargs):
        arguments = self.arguments(*args, **kwargs)
        x = _first(arguments)
        if x.ndim == 3:
            return packed(self.map(x), arguments)
        return packed(torch.einsum("oi,bi...->bo...", self.map.weight, x) + _column(self.map.bias, x), arguments)


def inputs_of(module: nn.Module, args: Sequence, kwargs: Mapping) -> torch.Tensor:
    """What a module transforms, the first argument of its call."""
    return args[0] if args else kwargs[next(iter(inspect.signature(module.forward).parameters))]


def is_joint(module: nn.Module) -> bool:
    """Whether a module returns image and text tokens, both."""
    joint = ("FluxSingleTransformerBlock", "FluxTransformerBlock", "JointTransformerBlock", "CogVideoXBlock")
    processor = type(getattr(module, "processor", None)).__name__
    takes_text = getattr(module, "added_kv_proj_dim", None) is not None or processor.startswith("CogVideoX")
    return type(module).__name__ in joint or takes_text


def build(body: nn.Module, replacement: str, kept: Sequence[str] = (), channels: Sequence[int] | None = None):
    """The module that takes the place of another; ``channels`` for "linear" only."""
    if replacement == "linear":
        made = LinearMap(body, channels)
    elif replacement == "zero":
        made = Zero(body, kept)
    else:
        made = PassThrough(body, kept) if isinstance(body, nn.Conv2d) else Bypass(body, kept)
    like = next(body.parameters(), None)
    return made if like is None else made.to(device=like.device, dtype=like.dtype)


def _put(root: nn.Module, path: str, module: nn.Module | None) -> nn.Module:
    """Set a module at a dotted path, with empty modules on the way; with None, the empty module at its end."""
    *outer, leaf = path.split(".")
    for name in outer:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    if module is not None or leaf not in root._modules:
        root.add_module(leaf, module or nn.Module())
    return root._modules[leaf]


def _first(arguments: Mapping) -> torch.Tensor:
    return next(iter(arguments.values()))


def _zeros(like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros(()).expand(like.shape)


def _column(bias: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return bias.reshape(-1, *(1,) * (like.ndim - 2))
