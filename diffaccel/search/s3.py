"""Predictor-guided multi-stage search, S³ (Liu et al. 2024, arXiv 2312.07243, section 4.3).

True scores cost network calls, predictions cost nothing: every stage learns from all true scores so far, lets candidates
evolve under the predictor, and has only the most promising of them scored.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from .engine import Candidate, Search
from .evolution import offspring
from .predictor import RankingPredictor, kendall_tau

_ALIKE = 4  # parents that differ in real numbers only, as in `evolution`


def s3(
    search: Search,
    evaluations: int,
    *,
    batch: int = 12,
    first: int = 24,
    plain: float = 0.25,
    parents: int = 16,
    generations: int = 6,
    children: int = 100,
    apart: float = 0.05,
) -> None:
    """Search in stages until the evaluations are spent or nothing new is found.

    Reports `facts`: "kendall_tau", of a predictor trained on most of the archive and asked about the rest (by turns), and
    "kendall_tau_ahead", of predictions made before their batch was evaluated, the mean of all batches: lower, since
    what a predictor chose is alike to it.

    Args:
        search: may hold candidates already, such as hand-set ones.
        evaluations: how many candidates to evaluate.
        batch: candidates per stage, which are evaluated together.
        first: children of the best and random candidates that are evaluated before the first predictor is trained.
        plain: share of every batch that the predictor has no say in: children of the best true candidates, so that a
            predictor that errs does no harm.
        parents: how many of the best have children, true or predicted.
        generations, children: of the evolution under the predictor, and candidates screened in each.
        apart: distance in tokens below which two candidates of a batch are near-copies: root mean square, in standard
            deviations of the archive.
    """
    space, random, end = search.space, search.random, len(search.archive) + evaluations
    tokens: list[np.ndarray] = []
    ahead: list[float] = []
    search.evaluate(offspring(search, _wanted(search, end, first), _best(search, parents)), "s3")
    while wanted := _wanted(search, end, batch):
        tokens += [space.tokens(one.candidate) for one in search.archive[len(tokens) :]]
        predictor = RankingPredictor(int(random.integers(2**31))).fit(tokens, [one.score for one in search.archive])
        pool = _evolved(search, predictor, parents, generations, children)
        spread = np.concatenate(tokens).std(axis=0)
        chosen = _different(
            space, pool, wanted - math.ceil(plain * wanted), apart * np.where(spread > 0.0, spread, 1.0)
        )
        taken = {space.key(one) for one in chosen}
        mutants = offspring(search, 2 * wanted, _best(search, parents))
        chosen += [one for one in mutants if space.key(one) not in taken][: wanted - len(chosen)]
        if not chosen:
            break
        predicted = predictor.predict([space.tokens(one) for one in chosen])
        ahead.append(kendall_tau(predicted, search.evaluate(chosen, "s3")))
        search.facts |= {"kendall_tau_ahead": float(np.mean(ahead))}
    if ahead:
        search.facts |= {"kendall_tau": predictor.tau}


def _wanted(search: Search, end: int, most: int) -> int:
    return max(0, min(most, end - len(search.archive), search.remaining))


def _best(search: Search, count: int) -> list:
    return [one.candidate for one in search.best(count, _ALIKE)]


def _evolved(search: Search, predictor: RankingPredictor, parents: int, generations: int, children: int) -> list:
    """New candidates, the most promising first, from an evolution that starts at the best true ones."""
    space, best = search.space, _best(search, parents)
    pool: dict[str, tuple[float, Candidate]] = {}
    for generation in range(generations):
        new = offspring(search, children, best, fresh=0.05 if generation == 0 else 0.0)
        new = {space.key(one): one for one in new if space.key(one) not in pool}
        predictions = predictor.predict([space.tokens(one) for one in new.values()])
        pool |= {key: (value, one) for (key, one), value in zip(new.items(), predictions, strict=True)}
        best = [one for _, one in sorted(pool.values(), key=lambda entry: entry[0])[:parents]] or best
    return [one for _, one in sorted(pool.values(), key=lambda entry: entry[0])]


def _different(space, candidates: Iterable, count: int, radii: np.ndarray) -> Sequence:
    """The first candidates, none of which is a near-copy of an earlier one."""
    chosen, known = [], []
    for one in candidates:
        if len(chosen) == count:
            break
        tokens = space.tokens(one) / radii
        if all(other.shape != tokens.shape or np.square(tokens - other).mean() > 1.0 for other in known):
            chosen.append(one)
            known.append(tokens)
    return chosen
