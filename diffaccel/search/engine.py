"""What every search strategy works with: candidates, their scores, and a budget of evaluations."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

Candidate = TypeVar("Candidate")


class Space(Protocol[Candidate]):
    """What can be searched over. All randomness comes from the generator that is passed."""

    def key(self, candidate: Candidate) -> str:
        """The same text for the same candidate, in every process and on every machine."""

    def draw(self, random: np.random.Generator) -> Candidate:
        """A random candidate."""

    def mutate(self, candidate: Candidate, random: np.random.Generator) -> Candidate:
        """A neighbour, different from the candidate."""

    def cross(self, one: Candidate, other: Candidate, random: np.random.Generator) -> Candidate:
        """A candidate that has something of both."""

    def vector(self, candidate: Candidate) -> np.ndarray:
        """(D,) its real numbers, unconstrained and of comparable effect; D may be 0."""

    def with_vector(self, candidate: Candidate, vector: np.ndarray) -> Candidate:
        """The candidate with other real numbers."""

    def tokens(self, candidate: Candidate) -> np.ndarray:
        """(steps, features) float64 description for a sequence predictor; the same number of features for all."""


@dataclass(frozen=True)
class Evaluated(Generic[Candidate]):
    """A candidate with its score, lower is better; infinite where it was not finite. ``origin`` says what proposed it."""

    candidate: Candidate
    score: float
    origin: str


class Search(Generic[Candidate]):
    """The state of one search: everything that was evaluated, and how much more may be.

    Deterministic: the same seed, budget and scores give the same calls of ``score``, so that a search whose scores were
    written down is continued by running it again.

    Args:
        space: of the candidates.
        score: scores of several candidates, the lower the better; NaN counts as infinite.
        budget: how many candidates may be scored; those scored before are free.
        seed: of `random`.
        tell: called with this search whenever scores came in.

    Attributes:
        random: the one source of randomness of strategies.
        archive: in the order of evaluation, each candidate once.
        facts: numbers that strategies report, such as the predictor's rank correlation.
    """

    def __init__(
        self,
        space: Space[Candidate],
        score: Callable[[Sequence[Candidate]], Sequence[float]],
        budget: int,
        seed: int = 0,
        tell: Callable[["Search"], None] = lambda search: None,
    ):
        self.space, self.budget, self.tell = space, budget, tell
        self.random = np.random.default_rng(seed)
        self.archive: list[Evaluated[Candidate]] = []
        self.facts: dict[str, float] = {}
        self._score, self._known, self._kinds = score, {}, {}

    @property
    def remaining(self) -> int:
        """How many candidates may still be scored."""
        return self.budget - len(self.archive)

    def evaluate(self, candidates: Sequence[Candidate], origin: str) -> list[float]:
        """Scores of the candidates in their order; infinite for those that the budget did not reach."""
        keys = [self.space.key(candidate) for candidate in candidates]
        new = {key: one for key, one in zip(keys, candidates, strict=True) if key not in self._known}
        chosen = list(new.items())[: max(self.remaining, 0)]
        if chosen:
            for (key, candidate), score in zip(chosen, self._score([one for _, one in chosen]), strict=True):
                self._known[key] = score if math.isfinite(score) else math.inf
                self.archive.append(Evaluated(candidate, self._known[key], origin))
            self.tell(self)
        return [self._known.get(key, math.inf) for key in keys]

    def knows(self, candidate: Candidate) -> bool:
        """Whether the candidate was scored."""
        return self.space.key(candidate) in self._known

    def best(self, count: int = 1, alike: int | None = None) -> list[Evaluated[Candidate]]:
        """The best so far, best first; of equals the earlier.

        Args:
            count: how many, at most.
            alike: of candidates that differ in real numbers only, at most so many; None for no limit.
        """
        ranked = sorted(self.archive, key=lambda one: one.score)
        if alike is None:
            return ranked[:count]
        found, taken = [], Counter()
        for one in ranked:
            if len(found) == count:
                break
            kind = self.kind(one.candidate)
            taken[kind] += 1
            if taken[kind] <= alike:
                found.append(one)
        return found

    def kind(self, candidate: Candidate) -> str:
        """What candidates that differ in real numbers only have in common."""
        key = self.space.key(candidate)
        if key not in self._kinds:
            ones = np.ones_like(self.space.vector(candidate))
            self._kinds[key] = self.space.key(self.space.with_vector(candidate, ones))
        return self._kinds[key]
