"""Linear forms: the algebra in which solvers are written before they become a table.

A solver's intermediate quantities, x0 and ε estimates, slopes, velocities, corrected states, are all linear
combinations of what a run has seen. Written as a `Form` they can be added, scaled and substituted exactly, and what
remains at the end of a step is the `Row` to execute.
"""

from collections.abc import Mapping


class Form:
    """Σ_j states[j]·x_j + Σ_j outputs[j]·m_j, with x_j the network inputs and m_j the stored outputs of a run.

    Args:
        states, outputs: coefficients by call index j.
    """

    __slots__ = ("outputs", "states")

    def __init__(self, states: Mapping[int, float] | None = None, outputs: Mapping[int, float] | None = None):
        self.states, self.outputs = dict(states or {}), dict(outputs or {})

    @classmethod
    def state(cls, index: int) -> "Form":
        """The network input of call ``index``."""
        return cls(states={index: 1.0})

    @classmethod
    def output(cls, index: int) -> "Form":
        """The stored output of call ``index``."""
        return cls(outputs={index: 1.0})

    def __add__(self, other: "Form") -> "Form":
        total = Form(self.states, self.outputs)
        for index, weight in other.states.items():
            total.states[index] = total.states.get(index, 0.0) + weight
        for index, weight in other.outputs.items():
            total.outputs[index] = total.outputs.get(index, 0.0) + weight
        return total

    def __mul__(self, factor: float) -> "Form":
        return Form(
            {index: factor * weight for index, weight in self.states.items()},
            {index: factor * weight for index, weight in self.outputs.items()},
        )

    __rmul__ = __mul__

    def __sub__(self, other: "Form") -> "Form":
        return self + other * -1.0

    def __truediv__(self, divisor: float) -> "Form":
        return self * (1.0 / divisor)

    def coefficients(self, newest: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(states, outputs) of a `Row` of call ``newest``, newest first, without trailing zeros."""
        return _newest_first(self.states, newest), _newest_first(self.outputs, newest)


def weighted(weights, forms) -> Form:
    """Σ weights[j]·forms[j]."""
    total = Form()
    for weight, form in zip(weights, forms, strict=True):
        if weight != 0.0:
            total = total + weight * form
    return total


def _newest_first(weights: Mapping[int, float], newest: int) -> tuple[float, ...]:
    present = [index for index, weight in weights.items() if weight != 0.0]
    oldest = min(present, default=newest)
    return tuple(weights.get(index, 0.0) for index in range(newest, oldest - 1, -1))
