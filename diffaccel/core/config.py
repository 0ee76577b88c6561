"""Configuration as dataclasses: built from YAML and `--set a.b=c`, checked field by field, errors name the path."""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from .errors import UsageError, unknown


def build(cls, data: Mapping[str, Any], path: str = ""):
    """Make an instance of the dataclass ``cls`` from nested mappings.

    Raises:
        UsageError: an unknown key (with the nearest valid one) or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            raise unknown("setting", f"{path}{key}", [f"{path}{name}" for name in names])
    values = {key: _coerce(value, hints[key], f"{path}{key}") for key, value in data.items()}
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"Setting {path}{missing[0]} is missing.")
    return cls(**values)


def _coerce(value, hint, path: str):
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UsageError(f"{path} must be a group of settings, got {value!r}.")
        return build(hint, value, path + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _coerce(value, next(a for a in arguments if a is not type(None)), path)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{path} must be a list, got {value!r}.")
        return tuple(_coerce(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{path} must be a group of settings, got {value!r}.")
        if len(arguments) == 2 and dataclasses.is_dataclass(arguments[1]):
            return {key: _coerce(item, arguments[1], f"{path}.{key}") for key, item in value.items()}
        return dict(value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # quoted, or from elsewhere than YAML
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UsageError(f"{path} must be {hint.__name__}, got {value!r}.")


def to_dict(config) -> dict[str, Any]:
    """The dataclass as plain YAML-able data."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def merge(base: Mapping[str, Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win; nested mappings are merged, everything else is replaced."""
    result = dict(base)
    for layer in layers:
        for key, value in layer.items():
            nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merge(result[key], value) if nested else value
    return result


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """Turn ``["a.b=1", "c=x"]`` into nested data; values are YAML scalars or lists, 1e-3 and inf numbers among them.

    Raises:
        UsageError: an item without "=" or with an empty name.
    """
    import yaml

    result: dict[str, Any] = {}
    for item in assignments:
        key, sign, text = item.partition("=")
        names = key.strip().split(".")
        if not sign or not all(names):
            raise UsageError(f"--set takes NAME=VALUE with dots for groups, such as optimizer.lr=1e-4; got {item!r}.")
        try:
            value = _loader()(text).get_single_data()
        except yaml.YAMLError:
            value = text
        for name in reversed(names):
            value = {name: value}
        result = merge(result, value)
    return result


@functools.cache
def _loader() -> type:
    """YAML's safe loader, with 1e-3 and inf as numbers: YAML 1.1 wants 1.0e-3 and .inf, and takes these for strings."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)[eE][-+]?\d+|inf)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789i"))
    return Loader


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UsageError: no such file, not YAML, or not a mapping.
    """
    import yaml

    path = Path(path)
    try:
        data = _loader()(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"Cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}."
        ) from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UsageError(f"{path} is not valid YAML{line}.") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold a mapping of settings, got a {type(data).__name__}.")
    return data


def to_yaml(data: Mapping[str, Any]) -> str:
    """Settings as YAML text, in their own order."""
    import yaml

    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], path: str = "", *, ignore: Set = frozenset(), additions: bool = True
) -> list[str]:
    """Readable list of settings that differ: "trainer.seed: 0 -> 1".

    Args:
        path: prefix of all names.
        ignore: full names of settings that may differ.
        additions: whether settings that ``old`` lacks count.
    """
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        before, after, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{name}.", ignore=ignore, additions=additions)
        elif before != after and name not in ignore and (additions or key in old):
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines
