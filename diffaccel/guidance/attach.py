"""`guide`: attaches a rule to a pipeline.

While guidance is on, the class of a classic pipeline is a subclass of its own, whose call puts stand-ins for the networks
and the scheduler into the pipeline, for the time of that call. The objects behind them never change: other pipelines may
share them, and compiled networks, offloading and adapters work as before.
"""

import functools
import inspect

from ..core.errors import GuidanceError, UsageError
from ..core.standins import subclass
from .layouts import KNOWN, LAYOUTS, NAMES
from .rules import Rule
from .run import Run


class Guidance:
    """A rule on a pipeline, as a context manager; made by `guide`.

    Attributes:
        pipe: the pipeline.
        rule: the rule.
        layout: how the pipeline runs its branches, see `layouts.LAYOUTS`; None until a run has told.
        trusted: whether the layout was given by the caller, who then answers for it.
    """

    run = Run  # what surrounds a call

    def __init__(self, pipe, rule: Rule, layout: str | None = None):
        self.pipe, self.rule = pipe, rule
        self.trusted, self.layout = layout is not None, layout or KNOWN.get(type(pipe).__name__)
        self._running = False

    def enable(self) -> "Guidance":
        """Guide every call of the pipeline from now on.

        Raises:
            GuidanceError: it is guided already.
        """
        cls = type(self.pipe)
        if guidance_of(self.pipe) is not None:
            raise GuidanceError("This pipeline is guided already; end that first, with disable_guidance(pipe).")
        signature = inspect.signature(cls.__call__)

        @functools.wraps(cls.__call__)
        def call(pipe, *args, **kwargs):
            if pipe is not self.pipe:  # made by its class from its parts
                return cls.__call__(pipe, *args, **kwargs)
            if self._running:
                raise GuidanceError("A guided pipeline cannot be called inside its own call or by two threads at once.")
            bound = signature.bind(pipe, *args, **kwargs)
            bound.apply_defaults()
            arguments = dict(list(bound.arguments.items())[1:])
            self._running = True
            try:
                with self.run(self, pipe, cls, arguments):
                    return cls.__call__(pipe, *args, **kwargs)
            finally:
                self._running = False

        self.pipe.__class__ = subclass(cls, __call__=call, _guidance=self)
        return self

    def disable(self) -> None:
        """Give the pipeline back as it was; without effect where this guidance is not on."""
        if guidance_of(self.pipe) is self:
            self.pipe.__class__ = type(self.pipe).__base__

    def __enter__(self):
        return self.enable()

    def __exit__(self, *_):
        self.disable()


def guidance_of(pipe) -> Guidance | None:
    """The guidance that is on, or None."""
    guidance = getattr(type(pipe), "_guidance", None)
    return guidance if guidance is not None and guidance.pipe is pipe else None


def guide(pipe, rule: Rule, layout: str | None = None) -> Guidance:
    """Guide a pipeline by a rule inside a ``with`` block.

        with diffaccel.guide(pipe, diffaccel.APG(scale=10)):
            images = pipe("a red apple").images

    The pipeline has to run both its branches, so call it with its guidance on; at which scale above 1 does not matter.
    Copies of a guided pipeline are not guided. Where a pipeline defines guidance as c + s·(c − u), as Z-Image does, the
    rule's scale for its s is s + 1.

    Args:
        pipe: a diffusers pipeline, classic or modular.
        rule: such as `CFG`, `APG` or `Interval`.
        layout: how the pipeline runs its branches, one of `layouts.LAYOUTS`, for pipelines that are not recognised or
            change the guided prediction further; whatever they make of their branches is then replaced.

    Raises:
        UsageError: an object that is no pipeline, no rule, or an unknown layout. During calls of the pipeline:
        GuidanceError: the rule cannot act exactly; the text says why and what to do.
    """
    if not isinstance(rule, Rule):
        raise UsageError(f"guide takes a rule, such as diffaccel.APG(scale=10); got {rule!r}.")
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"layout must be one of {NAMES}; got {layout!r}.")
    known = KNOWN.get(type(pipe).__name__, layout)
    if layout not in (None, known):
        raise GuidanceError(f"{type(pipe).__name__} has the layout {known!r}, not {layout!r}: leave layout= out.")
    if hasattr(pipe, "blocks") and hasattr(pipe, "components"):
        from .modular import ModularGuidance

        return ModularGuidance(pipe, rule, layout)
    if not callable(pipe) or not hasattr(pipe, "scheduler"):
        raise UsageError(f"guide takes a diffusers pipeline with a scheduler; got {type(pipe).__name__}.")
    return Guidance(pipe, rule, layout)


def enable_guidance(pipe, rule: Rule, layout: str | None = None) -> Guidance:
    """Like `guide`, on until `disable_guidance`."""
    return guide(pipe, rule, layout).enable()


def disable_guidance(pipe) -> None:
    """End the guidance of a pipeline, if there is any."""
    guidance = guidance_of(pipe)
    if guidance is not None:
        guidance.disable()
