"""What a guidance rule is."""

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..core.errors import UsageError
from .context import Context

COND, UNCOND = "cond", "uncond"
Predictions = Mapping[str, torch.Tensor]  # by branch, each (B, …), raw outputs of one parametrisation, ≥ float32


class Rule(ABC):
    """How predictions become the guided one. A new rule defines `branches` and ``__call__``."""

    @property
    def requires(self) -> frozenset[str]:
        """Branches that some evaluation of a run will need; "uncond" makes a run without that branch an error."""
        return frozenset({COND, UNCOND})

    @property
    def title(self) -> str:
        """The rule's name in messages."""
        return type(self).__name__

    @property
    def corrects(self) -> bool:
        """Whether it changes the state after the scheduler's step."""
        return type(self).correct is not Rule.correct

    def branches(self, context: Context) -> frozenset[str]:
        """Branches that this evaluation needs; the others are not computed."""
        return self.requires

    @abstractmethod
    def __call__(self, predictions: Predictions, context: Context) -> torch.Tensor:
        """The guided prediction, in the parametrisation of the predictions and of their shape (B, …)."""

    def check(self, arguments: Mapping) -> None:
        """Refuse a call of a pipeline, by its arguments, that this rule cannot guide.

        Raises:
            UsageError: the call.
        """

    def correct(self, state: torch.Tensor, context: Context) -> torch.Tensor:
        """Change the state (B, …) after the scheduler's step."""
        return state

    def extra(self, branch: str) -> "Extra":
        """Where a branch besides "cond" and "uncond" comes from."""
        raise KeyError(branch)


@dataclass(frozen=True)
class Extra:
    """A branch that the pipeline does not compute by itself.

    Attributes:
        network: evaluated in place of the pipeline's own; None for that one.
        arguments: arguments of a pipeline call that describe its condition, such as {"prompt": "a dog"}; None for
            the condition of the call itself.
    """

    network: torch.nn.Module | None = None
    arguments: Mapping | None = None


def is_number(value, kind: type = numbers.Real) -> bool:
    """Whether a value is a finite number, of NumPy too, and no bool; with kind ``numbers.Integral`` a whole one."""
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def check_number(
    rule: Rule, name: str, low: float = -math.inf, high: float = math.inf, open_ends: bool = False
) -> None:
    """Refuse a value that is no finite number within the bounds.

    Raises:
        UsageError: the value.
    """
    value = getattr(rule, name)
    if not is_number(value) or not low <= value <= high or (open_ends and value in (low, high)):
        ends = f"{'(' if open_ends else '['}{low:g}, {high:g}{')' if open_ends else ']'}"
        where = (
            "a finite number" if (low, high) == (-math.inf, math.inf) else f"a number in {ends.replace('inf]', 'inf)')}"
        )
        raise UsageError(f"{rule.title} needs {name} to be {where}; got {value!r}.")


class Wrapper(Rule):
    """A rule around another.

    Raises:
        UsageError: something else than a rule inside.
    """

    rule: Rule

    def __post_init__(self):
        if not isinstance(self.rule, Rule):
            raise UsageError(
                f"{type(self).__name__} goes around a rule, such as diffaccel.CFG(7.5); got {self.rule!r}."
            )

    @property
    def title(self):
        return self.rule.title

    @property
    def corrects(self):
        return self.rule.corrects

    @property
    def requires(self):
        return self.rule.requires

    def branches(self, context):
        return self.rule.branches(context)

    def extra(self, branch):
        return self.rule.extra(branch)

    def check(self, arguments):
        self.rule.check(arguments)

    def correct(self, state, context):
        return self.rule.correct(state, context)

    def __call__(self, predictions, context):
        return self.rule(predictions, context)
