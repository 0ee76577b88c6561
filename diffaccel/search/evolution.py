"""Evolutionary search: mutants and crossings of the best so far (Liu et al. 2024, arXiv 2312.07243; Li et al. 2023)."""

import numpy as np

from .engine import Search

_MISSES = 100  # children in a row that are known already, after which a space counts as used up
_ALIKE = 4  # parents that differ in real numbers only: more would crowd out all other decisions


def evolution(
    search: Search, evaluations: int, parents: int = 16, batch: int = 16, crossing: float = 0.3, fresh: float = 0.05
) -> None:
    """Evaluate children of the best candidates until the evaluations are spent or nothing new is found.

    Args:
        search: may hold candidates already, such as hand-set ones; parents are the best of all that were ever evaluated.
        evaluations: how many candidates to evaluate.
        parents: how many of the best have children; the better, the more.
        batch: children per generation, which are evaluated together.
        crossing: share of children of two parents.
        fresh: share of random candidates.
    """
    while evaluations > 0 and search.remaining > 0:
        wanted = min(batch, evaluations, search.remaining)
        children = offspring(search, wanted, [one.candidate for one in search.best(parents, _ALIKE)], crossing, fresh)
        if not children:
            return
        search.evaluate(children, "evolution")
        evaluations -= len(children)


def offspring(search: Search, count: int, parents: list, crossing: float = 0.3, fresh: float = 0.05) -> list:
    """As many new candidates, none evaluated before and none twice; fewer where the space is used up."""
    space, random = search.space, search.random
    found, misses = {}, 0
    while len(found) < count and misses < _MISSES:
        misses += 1
        if not parents or random.random() < fresh:
            child = space.draw(random)
        elif len(parents) > 1 and random.random() < crossing:
            child = space.cross(*(parents[_early(len(parents), random)] for _ in range(2)), random)
        else:
            child = space.mutate(parents[_early(len(parents), random)], random)
        if not search.knows(child) and space.key(child) not in found:
            found[space.key(child)], misses = child, 0
    return list(found.values())


def _early(count: int, random: np.random.Generator) -> int:
    """A place among parents sorted by score, the earlier of two (a tournament)."""
    return int(min(random.integers(count, size=2)))
