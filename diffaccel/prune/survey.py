"""What could be removed from a network, and what each removal would save."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from torch import nn

from ..core.errors import unknown
from ..models.residual import zeros_through
from .costs import count_macs, measure_seconds
from .operators import Operator, operators

COSTS = ("parameters", "macs", "seconds")


@dataclass(frozen=True)
class Candidate:
    """An operator, and what removing it saves; what its replacement keeps is not counted.

    Attributes:
        name, kind, replacement: see `operators.Operator`.
        parameters: numbers.
        macs: multiply–accumulates of the run that was looked at.
        seconds: of that run; None where time was not measured.
        contains: names of candidates inside it, of which none can be removed beside it.
    """

    name: str
    kind: str
    replacement: str
    parameters: int
    macs: int
    seconds: float | None = None
    contains: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """The candidates of a network, outer before inner, and what the whole network costs.

    Attributes:
        network: name of its class.
        candidates: what could be removed.
        parameters, macs, seconds: of the whole network, as for `Candidate`.
    """

    network: str
    candidates: tuple[Candidate, ...]
    parameters: int
    macs: int
    seconds: float | None = None

    def __getitem__(self, name: str) -> Candidate:
        """The candidate of a name.

        Raises:
            UsageError: there is none.
        """
        if name not in self._table:
            raise unknown(f"removable layer of {self.network}", name, self._table)
        return self._table[name]

    @property
    def names(self) -> list[str]:
        """Names of all candidates."""
        return [candidate.name for candidate in self.candidates]

    @functools.cached_property
    def _table(self) -> dict[str, Candidate]:
        return {candidate.name: candidate for candidate in self.candidates}


def survey_network(
    network: nn.Module, run: Callable[[], object] | None = None, single: bool = False, repeats: int = 0
) -> Survey:
    """Find what could be removed from a network, and count what it costs.

    Args:
        network: see `operators`, as it is before `torch.compile`.
        run: calls the network once or more, such as ``lambda: pipe("a cat", num_inference_steps=1)``, since cost depends on
            resolution and length of text; None for a pixel network, which is called with zeros.
        single: single convolutions of residual blocks too.
        repeats: runs that measure time; 0 measures none.

    Raises:
        UsageError: nothing to remove is known, no run for a network that needs one, or one that does not call it.
    """
    table = operators(network, single)
    run = run or zeros_through(network)
    macs = count_macs(network, run)
    still_run = {
        name: [f"{name}.{part}" for part in one.kept] for name, one in table.items() if one.replacement == "shortcut"
    }
    seconds = measure_seconds(network, run, [*table, *chain(*still_run.values())], repeats) if repeats else None

    def saved(counts, name):
        return counts[name] - sum(counts[part] for part in still_run.get(name, ()))

    candidates = tuple(
        Candidate(
            name,
            one.kind,
            one.replacement,
            _parameters(network.get_submodule(name)) - _kept(network, one),
            saved(macs, name),
            max(saved(seconds, name), 0.0) if seconds else None,
            tuple(other for other in table if other.startswith(f"{name}.")),
        )
        for name, one in table.items()
    )
    return Survey(type(network).__name__, candidates, _parameters(network), macs[""], seconds[""] if seconds else None)


def _parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _kept(network: nn.Module, operator: Operator) -> int:
    return sum(_parameters(network.get_submodule(f"{operator.name}.{path}")) for path in operator.kept)
