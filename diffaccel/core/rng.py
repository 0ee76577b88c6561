"""Random numbers keyed by (seed, purpose, step, sample index).

A draw depends on nothing else: not on the batch size, the number of processes, gradient accumulation or how often a
run was resumed. Philox is counter-based, so sample ``i`` owns a fixed block of counters.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

_WORDS_PER_COUNTER = 4


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block (initial weights of modules) and leave it as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class KeyedRandom:
    """A family of independent streams; ``purpose`` names the stream, ``step`` its position in time."""

    seed: int

    def normal(self, purpose: str, step: int, start: int, count: int, shape: tuple[int, ...] = ()) -> torch.Tensor:
        """Standard normal numbers of samples start … start+count−1: (count, *shape), float32 on the CPU."""
        words = self._words(purpose, step, start, count, shape)
        radius_uniform = ((words >> np.uint64(32)).astype(np.float64) + 1.0) * 2.0**-32  # in (0, 1]
        angle_uniform = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32
        values = np.sqrt(-2.0 * np.log(radius_uniform)) * np.cos(2.0 * math.pi * angle_uniform)  # Box–Muller
        return torch.from_numpy(values.astype(np.float32))

    def uniform(self, purpose: str, step: int, start: int, count: int, shape: tuple[int, ...] = ()) -> torch.Tensor:
        """Uniform numbers in [0, 1): (count, *shape), float64 on the CPU."""
        words = self._words(purpose, step, start, count, shape)
        return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def integers(self, purpose: str, step: int, start: int, count: int, high: int) -> torch.Tensor:
        """Uniform integers in [0, high): (count,), int64 on the CPU."""
        return (self.uniform(purpose, step, start, count) * high).long().clamp_(max=high - 1)

    def permutation(self, purpose: str, step: int, size: int) -> torch.Tensor:
        """A random order of 0 … size−1, int64 on the CPU."""
        return torch.argsort(self.uniform(purpose, step, 0, size), stable=True)

    def _words(self, purpose: str, step: int, start: int, count: int, shape: tuple[int, ...]) -> np.ndarray:
        per_sample = math.prod(shape)
        counters = -(-per_sample // _WORDS_PER_COUNTER)
        digest = hashlib.blake2b(f"{self.seed}/{purpose}/{step}".encode(), digest_size=16).digest()
        bits = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64), counter=start * counters)
        words = bits.random_raw(count * counters * _WORDS_PER_COUNTER)
        return words.reshape(count, counters * _WORDS_PER_COUNTER)[:, :per_sample].reshape(count, *shape)
