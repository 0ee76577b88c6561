"""One search from hand-set seeds to a validated plan."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..core.errors import NumericalError, UsageError
from ..core.processes import Processes
from ..core.schedule import Flow
from ..core.versions import library_versions
from ..samplers.searched import PlanFile
from ..samplers.usf import SolverSchedule
from .dynamic import trajectory_times
from .engine import Search
from .evolution import evolution
from .joint import JointSpace
from .journal import Journal
from .layer_space import LayerSpace, calls_within
from .objectives import Objective
from .outcome import Outcome, Progress, Scored
from .polish import polish
from .s3 import s3
from .seeds import PLANNED, hand_set
from .settings import Settings
from .space import SolverSpace
from .subjects import Subject

_SEEDS_KEPT = 24  # hand-set schedules that are evaluated in full and that the search starts from
_FINALISTS, _RIVALS = 6, 4  # candidates and hand-set schedules that are compared on fresh noise
_OVERHEAD = {"evolution": 0.01, "s3": 0.25, "times": 0.01}  # seconds per candidate besides its samples
_HAND_SET = "hand-set"
_SKIPPING = 8  # of the best hand-set schedules, tried without their first call and with one more time
_LATER = (1.0, 1.15)  # of the dynamic programme
_POLISHED = 0.25  # share of the evaluations


class SolverSearch:
    """Searches a solver schedule for one model.

    Args:
        subject: the model.
        objective: what is minimised.
        settings: how.
        journal: where scores are kept; None for memory alone.
        processes: the processes that share the evaluations; None for this one alone.
        tell: told the progress.
    """

    def __init__(
        self,
        subject: Subject,
        objective: Objective,
        settings: Settings,
        journal: Journal | None = None,
        processes: Processes | None = None,
        tell: Callable[[Progress], None] = lambda progress: None,
    ):
        self.subject, self.objective, self.settings = subject, objective, settings
        self.journal = journal or Journal(None, {})
        self.processes = processes or Processes("cpu", together=False)
        self.space = self._space()
        self._tell, self._stage, self._started = tell, "seeds", time.monotonic()
        self._explored_from = self._started
        self._search: Search | None = None
        self.spent = 0  # network calls times samples

    def _space(self) -> SolverSpace | JointSpace:
        settings, schedule = self.settings, self.subject.schedule
        genes = ("times",) if settings.strategy == "times" else settings.genes
        if not settings.skip_layers and not settings.skip_scaling:
            self.solvers = SolverSpace(schedule, settings.nfe, genes)
            return self.solvers
        shares, most = self.subject.shares(), settings.skip_layers
        self.solvers = SolverSpace(schedule, calls_within(shares, settings.nfe, most), genes)
        layers = LayerSpace(shares, self.solvers.nfe, settings.nfe, most, settings.skip_scaling)
        return JointSpace(self.solvers, layers)

    def run(self) -> Outcome:
        """Search, choose on fresh noise, and compare with the best hand-set schedule on noise that is fresh again.

        Raises:
            UsageError: a budget below one evaluation.
            NumericalError: no schedule has a finite score.
        """
        seeds = self._seeds()
        search = self._explored(seeds)
        finalists = self._finalists(search, seeds)
        return self._validated(search, finalists, seeds)

    def _seeds(self) -> list[Scored]:
        """The hand-set schedules, best first: all of them on a quarter of the noise, the best of those on all of it."""
        settings = self.settings
        found = list(hand_set(self.subject, settings.nfe))
        few = max(settings.samples // 4, min(settings.samples, 16))
        first = self._scores([file for _, file in found], settings.seed, few)
        order = sorted(range(len(found)), key=lambda index: first[index])[:_SEEDS_KEPT]
        kept = [found[index] for index in order]
        self._stage = "best seeds"
        scores = self._scores([file for _, file in kept], settings.seed, settings.samples)
        if not any(map(math.isfinite, scores)):
            raise NumericalError(f"No hand-set schedule of {settings.nfe} network calls gives a finite score.")
        self._plan_budget(kept[0][1])
        ranked = sorted(zip(scores, kept, strict=True), key=lambda pair: pair[0])
        return [Scored(label, file, {"search": score}) for score, (label, file) in ranked]

    def _plan_budget(self, file: PlanFile) -> None:
        settings = self.settings
        if settings.evaluations is None:
            began = time.monotonic()
            self._score(file, settings.seed, settings.samples)
            each = (time.monotonic() - began + _OVERHEAD[settings.strategy]) / self.processes.world
            # The first to time an evaluation decides for all: processes, and searches that are continued.
            plans = _FINALISTS + _RIVALS + self.objective.once / settings.nfe
            fresh = 2.0 * settings.fresh / settings.samples * plans * each
            left = settings.seconds - (time.monotonic() - self._started) - fresh
            count = self.processes.gather_json(int(left / max(each, 1e-6)))[0]
            if count < 1 and "evaluations" not in self.journal.facts:
                raise UsageError(
                    f"The budget of {settings.seconds:.0f} s is too small: hand-set schedules and validation alone take "
                    f"{settings.seconds - left:.0f} s, one evaluation {each:.2g} s; allow more time or fewer samples."
                )
            self.evaluations = int(self.journal.settle("evaluations", count))
        else:
            self.evaluations = settings.evaluations

    def _explored(self, seeds: Sequence[Scored]) -> Search:
        settings = self.settings
        self._stage = "dynamic programme"
        hand = self._hand_starts(seeds)
        others = self._planned_starts() if "times" in self.solvers.open else []
        others += [self.solvers.skipping(one, True) for one in [*hand, *others][:_SKIPPING]]
        self._begin_at(next(iter([*hand, *others]), None))
        search = self._search = Search(
            self.space, self._score_candidates, self.evaluations, settings.seed, lambda _: self._report()
        )
        self._stage, self._explored_from = settings.strategy, time.monotonic()
        plain = self.space is self.solvers  # where layers are searched, a hand-set schedule without some is a candidate
        search.evaluate([self._candidate(one, search) for one in hand], _HAND_SET if plain else "start")
        search.evaluate([self._candidate(one, search) for one in others], "start")
        share = int((1.0 - _POLISHED) * search.remaining)
        (s3 if settings.strategy == "s3" else evolution)(search, share)
        self._stage = "polish"
        polish(search, search.remaining)
        return search

    def _begin_at(self, schedule: SolverSchedule | None) -> None:
        """What random candidates are made from where not everything is searched."""
        solvers = replace(self.solvers, like=schedule)
        self.space = solvers if self.space is self.solvers else replace(self.space, solvers=solvers)
        self.solvers = solvers

    def _hand_starts(self, seeds: Sequence[Scored]) -> list[SolverSchedule]:
        """The best hand-set schedules, with as many calls as the space has."""
        labels = [seed.label for seed in seeds]
        files = {seed.label: seed.file for seed in seeds}
        if self.solvers.nfe != self.settings.nfe:
            files = dict(hand_set(self.subject, self.solvers.nfe))
        found = [files[label].decisions for label in labels if label in files]
        return [self.solvers.nearest(one) for one in found if one is not None]

    def _planned_starts(self) -> list[SolverSchedule]:
        """Good rules at the times that dynamic programming finds."""
        found, axis = [], self.solvers.axis
        for later in _LATER:
            key = f"times {later}"
            if key not in self.journal.facts:
                times = trajectory_times(self.subject, self.solvers.nfe, self.settings.seed, later=later)
                self.journal.settle(key, list(times))
            times = axis.times(axis.of(self.journal.facts[key]))
            decided = [rule.decide(times, isinstance(self.subject.schedule, Flow)) for rule in PLANNED]
            found += map(self.solvers.nearest, decided)
        return found

    def _candidate(self, schedule: SolverSchedule, search: Search):
        """The candidate to start from: where layers are searched, with random ones left out."""
        return (schedule, self.space.layers.draw(search.random)) if self.space is not self.solvers else schedule

    def _finalists(self, search: Search, seeds: Sequence[Scored]) -> list[Scored]:
        """The best candidates and the best hand-set schedules, on fresh noise."""
        self._stage = "selection"
        ranked = [one for one in search.best(len(search.archive)) if one.origin != _HAND_SET]
        found = [Scored(one.origin, self._file(one.candidate), {"search": one.score}) for one in ranked[:_FINALISTS]]
        return self._on_fresh_noise([*found, *seeds[:_RIVALS]], "selection", 1)

    def _validated(self, search: Search, finalists: Sequence[Scored], seeds: Sequence[Scored]) -> Outcome:
        """The winner against all hand-set schedules among the finalists, on noise that nothing was chosen by."""
        self._stage = "validation"
        hand = [one for one in finalists if one.label in {seed.label for seed in seeds}]
        hand = [one for one in hand if math.isfinite(one.scores["selection"])] or hand
        winner = min(finalists, key=lambda one: one.scores["selection"])
        contenders = self._on_fresh_noise([*hand, *([] if winner in hand else [winner])], "validation", 2)
        hand = contenders[: len(hand)]
        seed = min(hand, key=lambda one: one.scores["validation"])
        best = min([seed, contenders[-1]], key=lambda one: one.scores["validation"])
        improved = best.label not in {one.label for one in hand}
        if not math.isfinite(best.scores["validation"]):
            raise NumericalError("No schedule has a finite score on fresh noise.")
        file = replace(best.file, record=self._record(search, best, seed, improved))
        shown = {id(one.file): one for one in [*finalists, *contenders]}
        history = [(one.origin, one.score) for one in search.archive]
        return Outcome(
            Scored(best.label, file, best.scores), seed, improved, file, list(shown.values()), history, self.subject
        )

    def _on_fresh_noise(self, entries: Sequence[Scored], stage: str, draw: int) -> list[Scored]:
        settings = self.settings
        scores = self._scores([one.file for one in entries], fresh_seed(settings.seed, draw), settings.fresh)
        return [
            Scored(one.label, one.file, {**one.scores, stage: score})
            for one, score in zip(entries, scores, strict=True)
        ]

    def _record(self, search: Search, best: Scored, seed: Scored, improved: bool) -> dict:
        settings = self.settings
        return {
            "objective": self.objective.name,
            "unit": self.objective.unit,
            "improved": improved,
            "found_by": best.label,
            "scores": _finite(best.scores),
            "seed_schedule": {"label": seed.label, "scores": _finite(seed.scores)},
            "strategy": settings.strategy,
            "genes": list(self.solvers.genes),
            "layers": self._layers_record(best),
            "samples": {"search": settings.samples, "selection": settings.fresh, "validation": settings.fresh},
            "noise_seeds": {
                "search": settings.seed,
                **{stage: fresh_seed(settings.seed, draw) for draw, stage in ((1, "selection"), (2, "validation"))},
            },
            "cost": {"candidates": len(search.archive), "network_calls_times_samples": self.spent},
            "facts": search.facts,
            "evaluations_per_call": self.subject.evaluations,
            "model": self.subject.fingerprint(),
            "versions": library_versions(),
        }

    def _layers_record(self, best: Scored) -> dict | None:
        """What leaving layers out saves; None where nothing is left out."""
        if not best.file.layers:
            return None
        return {"calls": best.file.plan.nfe, "cost_in_whole_calls": self.space.layers.cost(best.file.layers)}

    def _file(self, candidate) -> PlanFile:
        schedule, layers = (candidate, {}) if self.space is self.solvers else candidate
        return self.subject.file(schedule.compile(self.subject.schedule), schedule, layers=layers)

    def _score_candidates(self, candidates: Sequence) -> list[float]:
        return self._scores([self._file(one) for one in candidates], self.settings.seed, self.settings.samples)

    def _scores(self, files: Sequence[PlanFile], seed: int, count: int) -> list[float]:
        """Scores of plans on one noise; known ones from the journal, the others shared among the processes."""
        keys = [f"{seed}/{count}/{_digest(file)}" for file in files]
        missing = [i for i, key in enumerate(keys) if key not in self.journal.scores]
        for start in range(0, len(missing), self.processes.world):
            part = missing[start : start + self.processes.world]
            mine = part[self.processes.rank :: self.processes.world]
            scored = self.processes.agree(lambda mine=mine: [self._score(files[i], seed, count) for i in mine])
            for rank, scores in enumerate(self.processes.gather_json(scored)):
                for i, score in zip(part[rank :: self.processes.world], scores, strict=True):
                    self.journal.add(keys[i], math.inf if score is None else score)
            self._report(start + len(part), len(missing))
        self.spent += count * sum(file.plan.nfe for file in files)
        return [self.journal.scores[key] for key in keys]

    def _score(self, file: PlanFile, seed: int, count: int) -> float | None:
        try:
            score = self.objective.score(self.subject, file, seed, count)
        except NumericalError:
            return None
        return score if math.isfinite(score) else None

    def _report(self, scored: int = 0, wanted: int = 0) -> None:
        """Tell the progress: of the search while it runs, of the plans of a stage before and after."""
        search = self._search
        best = search.best() if search else []
        if self._stage in (self.settings.strategy, "polish"):
            scored, wanted = len(search.archive), self.evaluations
        left = None
        if search and search.archive:
            pace = (time.monotonic() - self._explored_from) / len(search.archive)
            left = pace * max(self.evaluations - len(search.archive), 0)
        score, facts = best[0].score if best else math.inf, dict(search.facts) if search else {}
        self._tell(Progress(self._stage, scored, wanted, score, facts, left))


def _finite(scores: dict[str, float]) -> dict[str, float | None]:
    """Scores as JSON has them."""
    return {stage: score if math.isfinite(score) else None for stage, score in scores.items()}


def fresh_seed(seed: int, draw: int) -> int:
    """The seed of a draw of noise that the search itself did not see."""
    return seed + 1_000_003 * draw


def _digest(file: PlanFile) -> str:
    return hashlib.sha256((file.plan.to_json() + json.dumps(file.layers, sort_keys=True)).encode()).hexdigest()[:24]
