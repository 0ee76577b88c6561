"""Measurements kept from one process to the next, per device and library versions."""

import hashlib
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from ..core.errors import DiffaccelError
from ..core.files import write_atomic
from ..core.versions import library_versions
from .collect import Use
from .measure import Measurement

_PACKAGES = ("diffaccel", "torch", "diffusers", "triton", "xformers", "flash-attn", "sageattention")
_SCHEMA = 1
_OUT_OF_MEMORY = torch.OutOfMemoryError.__name__


def environment(device: torch.device) -> dict[str, str]:
    """Everything beside the signature that times depend on."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, capability = torch.cuda.get_device_name(device), f"{major}.{minor}"
    else:
        name = platform.processor() or platform.machine()
        capability = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {"device": name, "capability": capability, "platform": platform.system(), **library_versions(_PACKAGES)}


class Cache:
    """The measurements of one environment in one JSON file under ``$XDG_CACHE_HOME/diffaccel/attention``.

    A file that is damaged or of another environment counts as none, and one that cannot be written is left: a cache is
    allowed to forget.

    Args:
        device: whose measurements.
        folder: where files lie; None for the folder above.
    """

    def __init__(self, device: torch.device, folder: Path | None = None):
        self.environment = environment(device)
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffaccel" / "attention"
        digest = hashlib.sha256(json.dumps(self.environment, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or base) / f"{digest}.json"

    def get(self, use: Use, names: list[str]) -> list[Measurement] | None:
        """What was measured of all these backends in one run, or None."""
        known = self._read().get(_key(use), {})
        try:
            found = [Measurement(name, **known[name]) for name in names]
        except (KeyError, TypeError):
            return None
        return found if all(_sound(one) for one in found) else None

    def put(self, use: Use, measured: list[Measurement]) -> None:
        """Keep measurements, in place of earlier ones of this signature, but none of a moment when memory was short."""
        if any(_OUT_OF_MEMORY in (one.excluded or "") for one in measured):
            return
        entry = {one.backend: {k: v for k, v in asdict(one).items() if k != "backend"} for one in measured}
        record = {
            "schema": _SCHEMA,
            "environment": self.environment,
            "signatures": {**self._read(), _key(use): entry},
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps(record, indent=1) + "\n")
        except (OSError, DiffaccelError):
            pass

    def _read(self) -> dict:
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            sound = record["schema"] == _SCHEMA and record["environment"] == self.environment
            return dict(record["signatures"]) if sound else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def _key(use: Use) -> str:
    return use.signature.text + ("" if use.tokens_first else " heads first")


def _sound(one: Measurement) -> bool:
    if one.excluded is not None:
        return isinstance(one.excluded, str)
    return isinstance(one.seconds, float) and one.seconds > 0 and isinstance(one.bytes, int)
