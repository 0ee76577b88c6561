"""A sampler is a table of coefficients: `Plan`, with one `Row` for every network call.

Every solver here, single-step, multistep, Runge–Kutta, predictor–corrector, with momentum or stochastic, maps what is
known to the next network input linearly:

    x_next = Σ_j states[j]·x_j + Σ_j outputs[j]·m_j + noise·z,        newest first, z ~ N(0, I)

with x_j the network inputs so far and m_j the network outputs, each converted to the ``quantity`` of its own row.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..core.errors import DataError, UsageError, unknown
from ..core.prediction import PREDICTION_TYPES


@dataclass(frozen=True)
class Row:
    """One network call and the step after it.

    Attributes:
        t: native time of the network input.
        alpha, sigma: native noise level of the network input.
        quantity: what this output is stored as, one of `core.prediction.PREDICTION_TYPES`.
        states: coefficients of the current and earlier network inputs, newest first.
        outputs: coefficients of this and earlier stored outputs, newest first.
        noise: standard deviation of the fresh noise, 0 for none.
    """

    t: float
    alpha: float
    sigma: float
    quantity: str
    states: tuple[float, ...]
    outputs: tuple[float, ...]
    noise: float = 0.0

    def __post_init__(self):
        if self.quantity not in PREDICTION_TYPES:
            raise unknown("quantity", str(self.quantity), PREDICTION_TYPES)
        numbers = (self.t, self.alpha, self.sigma, *self.states, *self.outputs, self.noise)
        if not all(math.isfinite(number) for number in numbers):
            raise UsageError(f"The row at t = {self.t:g} has a coefficient that is not finite: {numbers}.")
        if self.noise < 0:
            raise UsageError(f"The row at t = {self.t:g} has a negative noise level {self.noise:g}.")


@dataclass(frozen=True)
class Plan:
    """All network calls of one run, in order.

    Attributes:
        rows: at least one row; the result of the last is the sample.
        order: network calls (stages) per step.
        name: what made the plan, for messages and reports.
        initial: standard deviation of the state it starts from, over that of the model's own initial noise; 1 but where
            a first step was taken without calling the network.

    Raises:
        UsageError: no rows, a scale that is not above 0, or a row that reaches further back than the run does.
    """

    rows: tuple[Row, ...]
    order: int = 1
    name: str = ""
    initial: float = 1.0

    def __post_init__(self):
        if not self.rows or self.order < 1:
            raise UsageError("A plan needs at least one row and an order of at least 1.")
        if not 0.0 < self.initial < math.inf:
            raise UsageError(f"The initial scale of a plan must be above 0; got {self.initial!r}.")
        for index, row in enumerate(self.rows):
            if max(len(row.states), len(row.outputs)) > index + 1:
                raise UsageError(f"Row {index} of plan {self.name!r} reaches back further than the {index + 1} calls.")

    @property
    def state_depth(self) -> int:
        """How many network inputs, the current one included, a run must remember."""
        return max(len(row.states) for row in self.rows)

    @property
    def output_depth(self) -> int:
        """How many stored outputs, the current one included, a run must remember."""
        return max(len(row.outputs) for row in self.rows)

    @property
    def nfe(self) -> int:
        """Network calls of one run, without guidance."""
        return len(self.rows)

    def to_json(self) -> str:
        """The plan as JSON text; every float survives exactly."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read `to_json`.

        Raises:
            DataError: text that is not a plan.
        """
        try:
            data = json.loads(text)
            rows = tuple(
                Row(**{**row, "states": tuple(row["states"]), "outputs": tuple(row["outputs"])}) for row in data["rows"]
            )
            return cls(rows, data["order"], data["name"], data.get("initial", 1.0))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"This is not a sampling plan: {error}. Write plans with Plan.to_json().") from error


class Run:
    """The memory of one execution of a plan: as many earlier inputs and outputs as its rows ask for."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.index = 0
        self._states: list = []
        self._outputs: list = []

    @property
    def row(self) -> Row:
        """The row of the next `advance`."""
        return self.plan.rows[self.index]

    def advance(self, x, output, noise=None):
        """Take one row's step and return the next network input (or the sample), same shape as x.

        Args:
            x: the network input.
            output: the network output, already converted to the row's quantity.
            noise: standard normal numbers; needed where the row's ``noise`` is not 0.
        """
        row = self.row
        self.index += 1
        self._states = [x, *self._states][: self.plan.state_depth]
        self._outputs = [output, *self._outputs][: self.plan.output_depth]
        states, outputs = self._states[: len(row.states)], self._outputs[: len(row.outputs)]
        total = _weighted_sum((*row.states, *row.outputs), (*states, *outputs))
        return total if row.noise == 0 else total.add_(noise, alpha=row.noise)


def _weighted_sum(weights: Sequence[float], tensors: Sequence):
    terms = [(weight, tensor) for weight, tensor in zip(weights, tensors, strict=True) if weight != 0.0]
    if not terms:
        return tensors[0] * 0.0
    total = terms[0][1] * terms[0][0]
    for weight, tensor in terms[1:]:
        total.add_(tensor, alpha=weight)
    return total
