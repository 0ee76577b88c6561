"""The ordered map over processes: order, death, failure, and that nobody is left behind."""

import multiprocessing
import os
import signal
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from diffaccel.core.workers import WorkerDiedError, ordered_map


def _square(item):
    return {"item": item, "pid": os.getpid()}, np.full(item * 1000, item % 256, dtype=np.uint8)


@pytest.mark.parametrize("workers", [0, 1, 3, 20])
def test_results_come_in_order_whoever_made_them(workers):
    results = list(ordered_map(_square, range(12), workers))
    assert [result["item"] for result, _ in results] == list(range(12))
    for item, (_, pixels) in enumerate(results):
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, np.full(item * 1000, item))
    assert len({result["pid"] for result, _ in results}) == max(1, min(workers, 12))
    assert list(ordered_map(_square, [], workers)) == []
    assert not multiprocessing.active_children()


def test_results_longer_than_any_pipe():
    (_, pixels), *_ = ordered_map(lambda item: ({}, np.arange(5_000_000).astype(np.uint8)), [0], 1)
    assert np.array_equal(pixels, np.arange(5_000_000).astype(np.uint8))


def _dies(item):
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return _square(item)


def test_death_names_item_and_signal_after_the_results_before_it():
    results = ordered_map(_dies, range(12), 3)
    assert [next(results)[0]["item"] for _ in range(5)] == list(range(5))
    with pytest.raises(WorkerDiedError, match=r"worker process \d+ died \(SIGKILL\)") as error:
        next(results)
    assert error.value.item == 5 and not multiprocessing.active_children()


def test_early_exit_is_death_too():
    with pytest.raises(WorkerDiedError, match="exit code 3"):
        list(ordered_map(lambda item: os._exit(3), range(2), 1))


def test_failure_arrives_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"in _broken(.|\n)*ZeroDivisionError"):
        list(ordered_map(_broken, range(2), 2))


def _broken(item):
    return item / 0


def test_workers_end_with_the_iterator_and_on_interruption():
    for end in (lambda results: results.close(), lambda results: results.throw(KeyboardInterrupt)):
        results = ordered_map(_square, range(100), 2)
        next(results)
        assert len(multiprocessing.active_children()) == 2
        with suppress(KeyboardInterrupt):
            end(results)
        assert not multiprocessing.active_children()


def test_workers_ignore_ctrl_c_and_forget_the_handlers_of_the_program():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        ask = lambda item: ({"kept": signal.getsignal(signal.SIGTERM) != signal.SIG_DFL}, np.empty(0, np.uint8))  # noqa: E731
        results = ordered_map(ask, range(50), 2)
        assert next(results)[0] == {"kept": False}
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
        assert len(list(results)) == 49
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGTERM, before)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _program(target):
    """A program of its own in this test, and the process ids of the workers that it reports."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, from Python 3.12 on
        program = context.Process(target=target, args=(theirs,))
        program.start()
    workers = ours.recv()
    assert len(workers) == 3 and all(map(_alive, workers))
    return program, workers


def _reading(pipe):
    os.setsid()
    results = ordered_map(_square, range(10_000), 3)
    next(results)
    with suppress(KeyboardInterrupt):
        pipe.send([child.pid for child in multiprocessing.active_children()])
        for _ in results:
            time.sleep(1)
    os._exit(130)


def _await_end(workers):
    deadline = time.monotonic() + 10
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(_alive, workers))


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@needs_proc
def test_workers_end_when_the_program_is_killed():
    program, workers = _program(_reading)
    program.kill()
    program.join()
    assert _await_end(workers)


@needs_proc
def test_ctrl_c_leaves_no_orphan_and_no_words(capfd):
    program, workers = _program(_reading)
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to all of them
    program.join(20)
    assert program.exitcode == 130 and _await_end(workers)
    assert capfd.readouterr() == ("", "")


def test_forking_after_torch_has_used_its_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.rand(600, 600) @ torch.rand(600, 600)
        torch.rand(1_000_000).exp()
        assert len(list(ordered_map(_square, range(8), 2))) == 8
    finally:
        torch.set_num_threads(before)
