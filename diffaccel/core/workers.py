"""An ordered map over worker processes that fails with a sentence where others hang, and leaves no process behind.

Each worker owns every n-th item and one pipe, so there are no queues and locks that a dying process could break: the
end of its pipe is the news of its death, and the end of the reading side stops it in turn, even if this process was
killed. On Linux workers are forked (milliseconds instead of an import of torch each). They must therefore not call
torch: its thread pool does not survive a fork, and the first parallel operation in a worker could wait for ever.
"""

import gc
import json
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

Result = tuple[dict, np.ndarray]


_OUT_OF_MEMORY = 77  # exit code of a worker


class WorkerDiedError(Exception):
    """A worker process ended early; the text says which and how, ``item`` is what it was working on."""

    def __init__(self, item, text: str):
        super().__init__(text)
        self.item = item


def ordered_map(function: Callable[..., Result], items: Sequence, workers: int) -> Iterator[Result]:
    """Yield ``function(item)`` for all items in their order, computed by ``workers`` processes (0: by this one).

    Each worker is at most one result ahead of what was asked for. Close the iterator to stop the workers.

    Args:
        function: returns a JSON-able dict and a contiguous, flat uint8 array; picklable where workers are not forked.

    Raises:
        WorkerDiedError: a worker was killed or ran out of memory.
        RuntimeError: ``function`` raised; with the traceback of the worker.
    """
    if workers == 0:
        yield from map(function, items)
        return
    workers = min(workers, len(items))
    fork = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if fork else None)
    pipes, processes = [], []
    try:
        for rank in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            pipes.append(ours)
            _widen(theirs)
            # A forked worker inherits the reading ends; it closes them, or a pipe would outlive its reader.
            arguments = (function, items[rank::workers], theirs, list(pipes) if fork else [])
            processes.append(context.Process(target=_work, args=arguments, daemon=True))
            with _quiet_start():
                processes[-1].start()
            theirs.close()
        for number, item in enumerate(items):
            yield _receive(item, pipes[number % workers], processes[number % workers])
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
                process.close()


def _receive(item, pipe, process) -> Result:
    try:
        header = json.loads(pipe.recv_bytes())
        if "error" in header:
            raise RuntimeError(f"A worker process failed:\n{header['error']}")
        pixels = np.empty(header["bytes"], dtype=np.uint8)
        _read_into(pipe, memoryview(pixels))
    except (EOFError, OSError) as error:
        pid = process.pid
        process.join()
        code = process.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        how = "out of memory" if code == _OUT_OF_MEMORY else how
        raise WorkerDiedError(item, f"worker process {pid} died ({how})") from error
    return header["result"], pixels


def _work(function, items, pipe, inherited) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler of the program that was forked
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    gc.disable()  # what was inherited, CUDA tensors among it, is not this process's to free
    for end in inherited:
        end.close()
    try:
        for item in items:
            try:
                result, pixels = function(item)
            except MemoryError:
                os._exit(_OUT_OF_MEMORY)
            except Exception:
                pipe.send_bytes(json.dumps({"error": traceback.format_exc()}).encode())
                return
            pipe.send_bytes(json.dumps({"result": result, "bytes": pixels.size}).encode())
            _write(pipe, memoryview(pixels))
    except BrokenPipeError:  # nobody reads any more
        pass


def _widen(pipe) -> None:
    """A pipe of a megabyte, where the system has it, costs a third of the time of one of 64 kB."""
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)


# Connections collect what they receive in a buffer of their own; where pipes are plain descriptors this saves the copy.
def _read_into(pipe, room: memoryview) -> None:
    if hasattr(os, "readv"):
        while len(room):
            count = os.readv(pipe.fileno(), [room])
            if count == 0:
                raise EOFError
            room = room[count:]
    elif len(room):
        pipe.recv_bytes_into(room)


def _write(pipe, data: memoryview) -> None:
    if hasattr(os, "readv"):
        while len(data):
            data = data[os.write(pipe.fileno(), data) :]
    elif len(data):
        pipe.send_bytes(data)


@contextmanager
def _quiet_start() -> Iterator[None]:
    """No signal may interrupt a new process before it is set up; no warning about threads that it does not use."""
    masked = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM}) if masked else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if masked:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
