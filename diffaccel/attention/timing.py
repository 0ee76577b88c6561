"""Honest times: all contenders in turn within one run, after warming up, medians of what each took."""

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 3
_FLUSH = 256 * 2**20  # bytes; more than the last cache of any GPU
_LONG = 1.0  # seconds of warming up that are enough
_SHORT = 5e-3  # seconds; shorter calls are timed several at a time on the CPU


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 20,
    seconds: float = 2.0,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contender round by round; they take turns, so what slows the machine down for a while slows all of them.

    On CUDA by events around single calls, with the cache emptied before each; elsewhere by the clock.

    Args:
        contenders: functions by name.
        device: where they run.
        rounds: how often each is timed, at most and at least 3 times.
        seconds: after which no round begins.
        before: what prepares a contender, each time and untimed.
    """
    before = before or {}
    warm = {name: _warmed_up(run, device, before.get(name, _nothing)) for name, run in contenders.items()}
    repeats = max(1, min(50, int(_SHORT / min(warm.values()))))
    clock = _cuda_clock(device) if device.type == "cuda" else _clock(repeats)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    order, names = random.Random(0), list(contenders)
    for index in range(rounds):
        if index >= 3 and time.perf_counter() - start > seconds:
            break
        order.shuffle(names)  # caches and clock rates are what the one before left: nobody follows the same one always
        for name in names:
            before.get(name, _nothing)()
            taken[name].append(clock(contenders[name]))
    return taken


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each contender."""
    return {name: statistics.median(times) for name, times in taken.items()}


def _nothing() -> None:
    """Preparation of contenders that need none."""


def _warmed_up(run: Callable, device: torch.device, prepare: Callable) -> float:
    """Run until caches, allocators and clock rates are settled, long calls less often; seconds of the last run."""
    prepare()
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if now - begin > _LONG:
            break
    return max(now - start, 1e-7)


def _clock(repeats: int) -> Callable[[Callable], float]:
    def seconds(run: Callable) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    return seconds


def _cuda_clock(device: torch.device) -> Callable[[Callable], float]:
    flush = torch.empty(_FLUSH, dtype=torch.int8, device=device)

    def seconds(run: Callable) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # and keeps the device busy while the call is being launched
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1000

    return seconds
