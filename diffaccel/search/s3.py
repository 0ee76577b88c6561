"""Predictor-guided multi-stage search, S³ (Liu et al. 2024, arXiv 2312.07243, section 4.3).

True scores cost network calls, predictions cost nothing: every stage learns from all true scores so far, ranks hundreds of
children of the best, and has only the most promising of them scored. One generation a stage: further ones lead to where the
predictor errs.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .engine import Search
from .evolution import offspring
from .predictor import RankingPredictor, kendall_tau

_ALIKE = 4  # parents that differ in real numbers only, as in `evolution`
_TOGETHER = 2  # of a batch that differ in real numbers only


def s3(
    search: Search,
    evaluations: int,
    *,
    batch: int = 12,
    first: int = 24,
    plain: float = 0.25,
    parents: int = 16,
    screened: int = 600,
    taught: int = 200,
    apart: float = 0.05,
) -> None:
    """Search in stages until the evaluations are spent or nothing new is found.

    Reports `facts`: "kendall_tau", of a predictor trained on most of the best and asked about the rest (by turns), and
    "kendall_tau_ahead", of predictions made before their batch was evaluated, the mean of all batches: lower, since
    what a predictor chose is alike to it.

    Args:
        search: may hold candidates already, such as hand-set ones.
        evaluations: how many candidates to evaluate.
        batch: candidates per stage, which are evaluated together.
        first: children of the best and random candidates that are evaluated before the first predictor is trained.
        plain: share of every batch that the predictor has no say in: children of the best true candidates, so that a
            predictor that errs does no harm.
        parents: how many of the best have children.
        screened: children whose scores are predicted in every stage.
        taught: how many of the best the predictor learns from, so that it tells good from better and not good from bad.
        apart: distance in tokens below which two candidates of a batch are near-copies: root mean square, in standard
            deviations of the archive.
    """
    space, random, end = search.space, search.random, len(search.archive) + evaluations
    tokens: list[np.ndarray] = []
    ahead: list[float] = []
    search.evaluate(offspring(search, _wanted(search, end, first), _best(search, parents)), "s3")
    while wanted := _wanted(search, end, batch):
        tokens += [space.tokens(one.candidate) for one in search.archive[len(tokens) :]]
        scores = np.array([one.score for one in search.archive])
        best = np.sort(np.argsort(scores, kind="stable")[:taught])
        predictor = RankingPredictor(int(random.integers(2**31))).fit([tokens[i] for i in best], scores[best])
        pool = _ranked(search, predictor, offspring(search, screened, _best(search, parents)))
        spread = np.concatenate(tokens).std(axis=0)
        radii = apart * np.where(spread > 0.0, spread, 1.0)
        chosen = _different(search, pool, wanted - math.ceil(plain * wanted), radii)
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


def _ranked(search: Search, predictor: RankingPredictor, candidates: list) -> list:
    """The most promising first."""
    predictions = predictor.predict([search.space.tokens(one) for one in candidates])
    return [candidates[index] for index in np.argsort(predictions, kind="stable")]


def _different(search: Search, candidates: Sequence, count: int, radii: np.ndarray) -> list:
    """The first candidates of which none is a near-copy of an earlier one, and few differ in real numbers only.

    Where there are not enough of them, the first of the others that are no near-copies follow.
    """
    chosen, known, kinds = [], [], Counter()
    for together in (_TOGETHER, math.inf):
        for one in candidates:
            if len(chosen) == count:
                return chosen
            tokens, kind = search.space.tokens(one) / radii, search.kind(one)
            near = any(other.shape == tokens.shape and np.square(tokens - other).mean() <= 1.0 for other in known)
            if not near and kinds[kind] < together:
                chosen.append(one)
                known.append(tokens)
                kinds[kind] += 1
    return chosen
