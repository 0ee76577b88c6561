"""Methods that go around distribution matching: a class for each that they can wrap."""

import functools
from collections.abc import Mapping
from dataclasses import make_dataclass
from typing import Any, ClassVar

from ...core.errors import unknown
from .dmd import DMD
from .f_distill import FDistill
from .sid import SiD

BASES = {"dmd": DMD, "f-distill": FDistill, "sid": SiD}


class Around:
    """A mixin that changes how a `DMD` trains.

    Around one that is not in `BASES`: ``class Mine(DisBack, MyDMD)``, whose Config is (DisBack.Settings, MyDMD.Config).

    Attributes:
        title: its name in the registry.
        Settings: dataclass of what it adds to the settings of what it wraps, with ``base``, the name of that, among them.
    """

    title: ClassVar[str]
    Settings: ClassVar[type]

    @classmethod
    def variant(cls, settings: Mapping[str, Any]) -> type:
        """The class for a group of settings, by its ``base``; its Config has the settings of both.

        Raises:
            UsageError: a base that cannot be wrapped.
        """
        if issubclass(cls, DMD):  # it goes around something already
            return cls
        base = settings.get("base", cls.Settings.base)
        if base not in BASES:
            raise unknown(f"method.base of {cls.title}", str(base), BASES)
        return _over(cls, base)


@functools.cache
def _over(mixin: type[Around], name: str) -> type:
    base = BASES[name]
    settings = (mixin.Settings, base.Config)
    config = make_dataclass("Config", [("base", str, name)], bases=settings, namespace={"__module__": mixin.__module__})
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"__module__": mixin.__module__, "Config": config})
