"""Tuning of real numbers from scores alone: quasi-Newton descent on finite differences (BFGS; Nocedal & Wright 2006, ch. 6).

Every candidate sees the same noise, so the score is a smooth function of the times and of the other real numbers, and
differences of scores are slopes.
"""

import math

import numpy as np

from .engine import Evaluated, Search

_PROBE = 3e-3  # distance of finite differences, in units in which candidates' numbers are of the order of 1
_STRIDES = ((1.0, 2.0, 0.5, 0.25), (0.1, 0.03, 0.01, 0.003))  # of one descent: tried together, the second if need be
_LONGEST = 0.6
_DONE = 3e-4  # relative gain of a step below which a candidate is left


def polish(search: Search, evaluations: int, first_step: float = 0.1) -> None:
    """Tune the times and the other real numbers of the best candidates, one after the other.

    Each is tuned until no step gains anything; then it is the turn of the best one that has not been tuned and differs
    from those in more than real numbers.

    Args:
        search: holds the candidates; without any, nothing is done.
        evaluations: how many candidates to evaluate.
        first_step: length of the first step of each, in units of `Space.vector`.
    """
    tuned: set[str] = set()
    while evaluations > 0 and search.remaining > 0:
        start = next((one for one in search.best(len(search.archive)) if search.kind(one.candidate) not in tuned), None)
        if start is None or not math.isfinite(start.score):
            return
        tuned.add(search.kind(start.candidate))
        before = len(search.archive)
        _Descent(search, start, min(evaluations, search.remaining)).run(first_step)
        evaluations -= len(search.archive) - before


class _Descent:
    def __init__(self, search: Search, start: Evaluated, evaluations: int):
        self.search, self.start = search, start
        self.end = len(search.archive) + evaluations

    def run(self, first_step: float) -> None:
        x, value = self.search.space.vector(self.start.candidate), _logarithm(self.start.score)
        inverse, step, slope = None, None, np.empty(0)
        while len(x):
            before, slope = slope, self._slope(x, value)
            if slope is None or not slope.any():
                return
            if inverse is None:
                inverse = first_step / np.linalg.norm(slope) * np.eye(len(x))
            else:
                inverse = _updated(inverse, step, slope - before)
            direction = -inverse @ slope
            if direction @ slope >= 0.0:
                inverse, direction = None, -first_step / np.linalg.norm(slope) * slope
                inverse = first_step / np.linalg.norm(slope) * np.eye(len(x))
            direction *= min(1.0, _LONGEST / np.linalg.norm(direction))
            for strides in _STRIDES:
                values, places = self._values([x + stride * direction for stride in strides])
                if min(values) < value:
                    break
            else:
                return
            chosen = int(np.argmin(values))
            step, gain = places[chosen] - x, value - values[chosen]
            x, value = places[chosen], values[chosen]
            if gain < _DONE:
                return

    def _slope(self, x: np.ndarray, value: float) -> np.ndarray | None:
        """Forward differences; backward for numbers that are at their limit. None when the budget is spent."""
        probes = x + _PROBE * np.eye(len(x))
        for index in range(len(x)):
            if abs(self._place(probes[index])[index] - x[index]) < 0.5 * _PROBE:
                probes[index, index] = x[index] - _PROBE
        if self.end - len(self.search.archive) < len(x) + 1:
            self._values(list(probes))  # what is left of the budget
            return None
        values, places = self._values(list(probes))
        moves = np.array([place[index] - x[index] for index, place in enumerate(places)])
        differences = np.array(values) - value
        usable = np.isfinite(differences) & (np.abs(moves) > 0.1 * _PROBE)
        return np.where(usable, differences / np.where(usable, moves, 1.0), 0.0)

    def _place(self, x: np.ndarray) -> np.ndarray:
        space = self.search.space
        return space.vector(space.with_vector(self.start.candidate, x))

    def _values(self, wanted: list[np.ndarray]) -> tuple[list[float], list[np.ndarray]]:
        """Logarithms of scores, and the numbers that were allowed."""
        space = self.search.space
        candidates = [space.with_vector(self.start.candidate, x) for x in wanted]
        scores = self.search.evaluate(candidates[: max(self.end - len(self.search.archive), 0)], "polish")
        scores += [math.inf] * (len(candidates) - len(scores))
        return [_logarithm(score) for score in scores], [space.vector(one) for one in candidates]


def _updated(inverse: np.ndarray, step: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The BFGS update of the inverse Hessian, left out where the curvature along the step is not positive."""
    curvature = float(step @ change)
    if curvature <= 1e-10:
        return inverse
    left = np.eye(len(step)) - np.outer(step, change) / curvature
    return left @ inverse @ left.T + np.outer(step, step) / curvature


def _logarithm(score: float) -> float:
    """Of scores that may be 0 or negative, the score itself."""
    return math.log(score) if score > 0.0 else score
