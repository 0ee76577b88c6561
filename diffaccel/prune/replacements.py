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

    One parameter name of that module stays in the state dict, with a tensor without elements, so that loading its weights into
    the whole network ends in an error instead of a network with random weights. No module of that name does, which adapters
    (LoRA) would look for.

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
        parts = {name.partition(".")[0] for name in kept}
        gone = [name for name, _ in body.named_parameters() if name.partition(".")[0] not in parts]
        self._gone = gone[0] if gone else ""
        if gone:
            _hide(self, self._gone)
        self.train(body.training)

    def arguments(self, *args, **kwargs) -> dict:
        """Arguments of the removed module's call by name, the first of its signature first, defaults included."""
        given = dict(zip(self._names, args, strict=False))
        return {self._names[0]: None, **self._defaults, **given, **kwargs}

    def extra_repr(self) -> str:
        return f"in place of {self.kind}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._gone:
            destination[prefix + self._gone] = torch.empty(0)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        key = prefix + self._gone
        if not self._gone:
            return
        if key in unexpected:
            unexpected.remove(key)
        if strict and key not in state_dict:
            missing.append(key)
        elif key in state_dict and state_dict[key].numel():
            errors.append(f"{key} has weights, but the {self.kind} they belong to is gone.")


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
        columns = nn.functional.conv1d(x.flatten(2), self.map.weight.unsqueeze(2), self.map.bias)
        return packed(columns.unflatten(2, x.shape[2:]), arguments)


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
    if like is not None and isinstance(made, LinearMap):  # what is kept of others stays as it is
        made.to(device=like.device, dtype=like.dtype)
    return made


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Set a module at a dotted path, with empty modules on the way."""
    *outer, leaf = path.split(".")
    for name in outer:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    root.add_module(leaf, module)


def _hide(root: nn.Module, path: str) -> None:
    """Make a tensor without elements an attribute at a dotted path, where no list of modules or buffers has it.

    Loaders of large models look for what a state dict names by its attributes.
    """
    *outer, leaf = path.split(".")
    for name in outer:
        root.__dict__[name] = nn.Module()
        root = root.__dict__[name]
    root.register_buffer(leaf, torch.empty(0), persistent=False)


def _first(arguments: Mapping) -> torch.Tensor:
    return next(iter(arguments.values()))


def _zeros(like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros(()).expand(like.shape)
