"""Extractors of users: any importable class, named "module:pkg.mod:Class"."""

import hashlib
import importlib
import inspect
import os
import re
import sys

import torch
from torch import nn

from ...core.errors import DataError, DiffaccelError, UsageError
from ...core.files import sha256_file
from .base import FeatureExtractor

PREFIX = "module:"
_SPECIFICATION = re.compile(rf"{PREFIX}([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")


def custom_features(name: str, **options) -> FeatureExtractor:
    """Import a class and build it; the current folder can be imported from, as with ``python -m``.

    The class is either a subclass of `FeatureExtractor`, or a torch module that takes uint8 images (N, C, H, W),
    returns float features (N, d) and has the attribute ``num_features`` (d); it may have ``channels`` (C, else 3),
    ``image_size``, ``resizes`` and ``preprocessing``, which mean what they mean there. The identity holds the name,
    the weights and the bytes of the file that defines the class, so edited code counts as other features; code that
    this file imports is not covered.

    Args:
        name: "module:pkg.mod:Class".
        options: keyword arguments for the class, e.g. ``weights``.

    Returns:
        An instance of the class or, for a plain module, of a wrapper. It checks what comes out.

    Raises:
        UsageError: nothing of that name, its code raises, or it is not such a class.
        DataError: later, features of another shape or kind.
        NumericalError: later, features that are not finite.
    """
    cls = _import(name)
    if issubclass(cls, FeatureExtractor):  # stays an instance of the class, with its other methods
        checked = type(cls.__name__, (_Checked, cls), {"__module__": cls.__module__})
        instance = _construct(name, checked, options)
    else:
        instance = _WrappedModule(name, _construct(name, cls, options))
    instance.name, instance._source = name, _source_sha256(cls)
    _check_attributes(name, instance)
    instance.requires_grad_(False)
    return instance.eval()


class _Checked(FeatureExtractor):
    """What every class of a user gets: checks of its features, and an identity that covers its code."""

    _source, _independent = "", False

    def _extract(self, images: torch.Tensor) -> torch.Tensor:
        shape = tuple(images.shape)
        try:
            features = super()._extract(images)
        except (DiffaccelError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UsageError(
                f"{self.name} fails on {images.dtype} images of shape {shape}: {type(error).__name__}: {error}."
            ) from error
        if features.shape != (len(images), self.num_features):
            raise DataError(
                f"{self.name} returns features of shape {tuple(features.shape)} for {len(images)} images; expected "
                f"({len(images)}, {self.num_features}), as its num_features says."
            )
        if len(images) > 1 and not self._independent:
            alone = super()._extract(images[:1])[0]
            if not torch.allclose(alone, features[0], rtol=0.05, atol=0.05 * float(features[0].abs().mean())):
                raise UsageError(
                    f"{self.name} gives an image other features in another batch, so no distance would have a meaning; "
                    "use layers in evaluation mode, such as BatchNorm with running statistics."
                )
            self._independent = True
        return features

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        features = super().extract(images)
        if not isinstance(features, torch.Tensor) or not features.is_floating_point():
            kind = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
            raise DataError(f"{self.name} returns {kind}; expected a floating-point tensor (N, {self.num_features}).")
        return features

    def weights_sha256(self) -> str:
        """SHA-256 over the weights and the file that defines the class."""
        return hashlib.sha256(f"{super().weights_sha256()} {self._source}".encode()).hexdigest()


class _Module(FeatureExtractor):
    """A plain torch module as an extractor."""

    preprocessing = "as in the class"

    def __init__(self, name: str, module: nn.Module):
        super().__init__()
        if not hasattr(module, "num_features"):
            raise UsageError(
                f"{name} is neither a FeatureExtractor nor a torch module with the attribute num_features; derive it "
                "from diffaccel.evaluate.features.FeatureExtractor, or add num_features, the length of its features."
            )
        self.module = module
        self.num_features, self.channels = module.num_features, getattr(module, "channels", 3)
        for attribute in ("image_size", "resizes", "preprocessing"):
            setattr(self, attribute, getattr(module, attribute, getattr(self, attribute)))

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        return self.module(images)


class _WrappedModule(_Checked, _Module):
    pass


def _import(name: str) -> type:
    parts = _SPECIFICATION.fullmatch(name)
    if parts is None:
        raise UsageError(f"{name!r} does not name a class; expected {PREFIX}pkg.mod:Class, as in an import statement.")
    module, attribute = parts.groups()
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise UsageError(
                f"There is no module {error.name}, which {name} names, neither in {os.getcwd()} nor installed."
            ) from None
        raise UsageError(f"Importing {module}, which {name} names, fails: {type(error).__name__}: {error}.") from error
    cls = getattr(found, attribute, None)
    if not isinstance(cls, type):
        what = "has nothing of that name" if cls is None else f"has a {type(cls).__name__} of that name"
        raise UsageError(f"{name} names no class: {module} ({getattr(found, '__file__', 'built in')}) {what}.")
    if not issubclass(cls, nn.Module):
        raise UsageError(f"{name} is not a torch module; derive it from diffaccel.evaluate.features.FeatureExtractor.")
    return cls


def _construct(name: str, cls: type, options: dict) -> nn.Module:
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        given = ", ".join(options) or "no options"
        raise UsageError(f"{name} cannot be built with {given}: {error}.") from None
    try:
        return cls(**options)
    except (DiffaccelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UsageError(f"Building {name} fails: {type(error).__name__}: {error}.") from error


def _check_attributes(name: str, extractor: FeatureExtractor) -> None:
    size = extractor.image_size
    rules = {
        "num_features": ("a positive integer", lambda value: type(value) is int and value > 0),
        "channels": ("1 or 3", lambda value: value in (1, 3)),
        "preprocessing": ("a string", lambda value: isinstance(value, str)),
        "resizes": ("True or False", lambda value: isinstance(value, bool)),
    }
    for attribute, (expected, fits) in rules.items():
        value = getattr(extractor, attribute, None)
        if not fits(value):
            got = "is missing" if value is None else f"is {value!r}"
            raise UsageError(f"The attribute {attribute} of {name} {got}; expected {expected}.")
    if size is not None and not (isinstance(size, tuple) and [type(side) for side in size] == [int, int]):
        raise UsageError(f"The attribute image_size of {name} is {size!r}; expected (height, width) or None.")


def _source_sha256(cls: type) -> str:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return sha256_file(file) if file and os.path.isfile(file) else ""
