"""A predictor of how candidates rank, for budgets that allow tens to hundreds of true scores.

Two models of the sequence of steps, which err differently, are averaged: the recurrent network of OMS-DPM (Liu et al. 2023,
arXiv 2306.08860, the predictor behind the S³ search of arXiv 2312.07243), trained on pairs, and a Gaussian process, which
needs fewer examples (Rasmussen & Williams 2006, ch. 2 and 5). Both see ranks of scores only.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..core.errors import UsageError
from ..core.rng import seeded

_FOLDS = 4
_BATCH, _ROUNDS, _WIDTH = 96, 120, 40  # of the network
_GAP = 0.05  # pairs whose ranks differ by less than this share of all teach noise
_ANCHORS, _TUNING = 120, 40  # examples and rounds that the scales of the process are tuned with


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's rank correlation τ_b of two (n,) sequences; 0 where one of them is constant.

    Infinities of one sign are ties. Memory grows as n².
    """
    a, b = (np.asarray(values, dtype=np.float64)[:, None] for values in (one, other))
    signs = [(values > values.T).astype(np.float64) - (values < values.T) for values in (a, b)]
    pairs = math.sqrt(float((signs[0] ** 2).sum() * (signs[1] ** 2).sum()))
    return float((signs[0] * signs[1]).sum()) / pairs if pairs else 0.0


class RankingPredictor:
    """Learns to order candidates by their score from their tokens.

    The same examples and seed give the same predictor, whatever torch's own random numbers are.

    Args:
        seed: of the network's initial weights and batches.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self._models: list = []

    def fit(self, tokens: Sequence[np.ndarray], scores: Sequence[float]) -> "RankingPredictor":
        """Learn from examples, forgetting earlier ones.

        Args:
            tokens: (steps_i, F) of every candidate, finite; steps may differ.
            scores: (n,), lower is better; infinite or NaN is worst.

        Raises:
            UsageError: no examples, or not as many scores as tokens.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if not len(tokens) or scores.shape != (len(tokens),):
            raise UsageError(
                f"A predictor needs one score for each of one or more candidates; got {len(tokens)} candidates and scores "
                f"of shape {scores.shape}."
            )
        self._tokens, self._scores, self._tau = list(tokens), np.where(np.isnan(scores), np.inf, scores), None
        rows = np.concatenate(self._tokens)
        spread = rows.std(axis=0)
        self._mean, self._scale = rows.mean(axis=0), np.where(spread > 1e-9, spread, 1.0)
        ranks = torch.from_numpy(_ranks(self._scores))
        self._models = []
        if len(np.unique(self._scores)) > 1:
            with torch.inference_mode(False), torch.enable_grad():
                sequences = self._padded(self._tokens)
                self._models = [_Process(sequences, ranks), _Network(sequences, ranks, self.seed)]
        return self

    @torch.no_grad()
    def predict(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """(n,) predictions, lower is better, in no unit; zeros where all examples had one score."""
        if not self._models or not len(tokens):
            return np.zeros(len(tokens))
        sequences = self._padded(tokens)
        return torch.stack([model(sequences) for model in self._models]).mean(dim=0).numpy()

    @property
    def tau(self) -> float:
        """Kendall's τ between the examples' scores and predictions by predictors that had not seen them."""
        if self._tau is None:
            fold = np.arange(len(self._tokens)) % _FOLDS
            taus = []
            for k in range(min(_FOLDS, len(self._tokens) // 2)):
                seen, held = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
                other = RankingPredictor(self.seed).fit([self._tokens[i] for i in seen], self._scores[seen])
                taus.append(kendall_tau(other.predict([self._tokens[i] for i in held]), self._scores[held]))
            self._tau = float(np.mean(taus)) if taus else 0.0
        return self._tau

    def _padded(self, tokens: Sequence[np.ndarray]) -> torch.Tensor:
        """(n, steps, 1 + F) normalised; the first feature is 1 where there is a step, all are 0 where there is none."""
        padded = np.zeros((len(tokens), max(map(len, tokens)), 1 + len(self._mean)))
        for row, one in zip(padded, tokens, strict=True):
            row[: len(one), 0], row[: len(one), 1:] = 1.0, (one - self._mean) / self._scale
        return torch.from_numpy(padded)


class _Process:
    """A Gaussian process over sequences: what every step adds by itself, and what all of them do together.

    The kernel is the mean over places of a Matérn-3/2 kernel of the step there, plus one of the whole sequence; distances
    are weighted by feature and by place with the weights of highest posterior density (log-normal priors).
    """

    def __init__(self, sequences: torch.Tensor, ranks: torch.Tensor):
        count, steps, size = sequences.shape
        self.sequences, targets = sequences, torch.special.ndtri(ranks)
        order = torch.argsort(ranks, stable=True)
        some = order[torch.linspace(0, count - 1, min(count, _ANCHORS)).round().long()]
        typical = math.log(0.7 / math.sqrt(size * steps))
        self.of_feature = torch.full((size,), typical, dtype=torch.float64, requires_grad=True)
        self.of_place = torch.zeros(steps, dtype=torch.float64, requires_grad=True)
        noise = torch.tensor(math.log(0.1), dtype=torch.float64, requires_grad=True)
        parameters = [self.of_feature, self.of_place, noise]
        optimizer = torch.optim.Adam(parameters, lr=0.1)
        for _ in range(_TUNING):
            factor, solved = self._solve(sequences[some], targets[some], noise)
            variance = (targets[some] @ solved) / len(some)
            loss = 0.5 * len(some) * variance.log() + factor.diagonal().log().sum()
            loss = loss + 0.15 * ((self.of_feature - typical).square().sum() + self.of_place.square().sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            self.solved = self._solve(sequences, targets, noise)[1]

    def __call__(self, sequences: torch.Tensor) -> torch.Tensor:
        return self._kernel(sequences, self.sequences) @ self.solved

    def _solve(self, sequences, targets, noise):
        matrix = self._kernel(sequences, sequences) + (noise.exp() + 1e-4) * torch.eye(len(sequences)).double()
        factor = torch.linalg.cholesky(matrix)
        return factor, torch.cholesky_solve(targets[:, None], factor)[:, 0]

    def _kernel(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        steps = max(one.shape[1], other.shape[1])
        # Places that no example had count like the last.
        of_place = functional.pad(self.of_place[None], (0, steps - len(self.of_place)), mode="replicate")[0]
        weights = (self.of_feature + of_place[:, None]).exp()[:, None]
        a, b = (functional.pad(x, (0, 0, 0, steps - x.shape[1])).transpose(0, 1) * weights for x in (one, other))
        squares = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None] - 2.0 * a @ b.mT
        squares = 3.0 * squares.clamp(min=1e-12)
        there = a[..., :1] * b[..., :1].mT > 0.0  # both have a step at this place
        return (_matern(4.0 * squares) * there).sum(0) / len(self.of_place) + _matern(squares.sum(0))


class _Network:
    """The recurrent predictor of OMS-DPM, narrower, with its hinge loss on the differences of pairs."""

    def __init__(self, sequences: torch.Tensor, ranks: torch.Tensor, seed: int):
        with seeded(seed):
            self.net = _Recurrent(sequences.shape[2]).float()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=_ROUNDS)
        self.mean, self.scale = 0.0, 1.0
        for _ in range(_ROUNDS):
            batch = torch.randperm(len(ranks), generator=generator)[:_BATCH]
            predicted, true = self.net(sequences[batch].float()), ranks[batch]
            worse = true[:, None] - true > _GAP
            hinge = (functional.relu(1.0 - (predicted[:, None] - predicted)) * worse).sum() / worse.sum().clamp(min=1)
            optimizer.zero_grad()
            hinge.backward()
            optimizer.step()
            rate.step()
        with torch.no_grad():
            known = self(sequences)
        # In the unit of the process: ranks as normal quantiles.
        self.mean, self.scale = float(known.mean()), max(float(known.std()), 1e-6)

    def __call__(self, sequences: torch.Tensor) -> torch.Tensor:
        return (self.net(sequences.float()).double() - self.mean) / self.scale


class _Recurrent(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(size, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH))
        self.walk = nn.LSTM(_WIDTH, _WIDTH, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 1)
        )

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """(n,) from (n, steps, 1 + F)."""
        there = sequences[..., :1]
        states = functional.normalize(self.walk(self.embed(sequences))[0], dim=-1) * there
        return self.head(functional.normalize(states.sum(1) / there.sum(1), dim=-1))[:, 0]


def _matern(squares: torch.Tensor) -> torch.Tensor:
    distance = squares.sqrt()
    return (1.0 + distance) * (-distance).exp()


def _ranks(scores: np.ndarray) -> np.ndarray:
    """(n,) in (0, 1), equal for equal scores."""
    where, counts = np.unique(scores, return_inverse=True, return_counts=True)[1:]
    return ((np.cumsum(counts) - 0.5 * counts) / len(scores))[where]
