"""The folder of one run: configuration, metrics, pictures, checkpoints, result."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ..core.config import differences, read_yaml, to_yaml
from ..core.errors import UsageError
from ..core.files import write_atomic
from ..core.versions import library_versions

try:
    import fcntl
except ImportError:  # Windows: runs are not protected from each other there
    fcntl = None


# Settings that may change when a run is resumed: what they affect is equal up to rounding, or not the result at all.
RESUMABLE = {
    f"trainer.{name}"
    for name in (
        "micro_batches",
        "device",
        "threads",
        "gradient_checkpointing",
        "log_every",
        "sample_every",
        "checkpoint_every",
        "keep",
        "tracker",
    )
}


class RunDirectory:
    """Layout: config.yaml, run.json, metrics.jsonl, samples/, checkpoints/step-XXXXXXXX/, final/.

    Args:
        path: the folder.
        config: resolved settings of the run.
        resume: continue a run that is there; otherwise the folder must be empty or new.
        writes: False for processes beside the main one, which only read checkpoints.

    Raises:
        UsageError: the folder is not empty (without resume), holds no run or other settings (with resume), cannot be
            written, or another live process is using it.
    """

    def __init__(self, path: str | Path, config: dict[str, Any], resume: bool = False, writes: bool = True):
        self.path = Path(path)
        self._descriptor: int | None = None
        if not writes:
            return
        check_output(self.path, resume)
        try:
            (self.path / "samples").mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise UsageError(f"Cannot write to {self.path}: {error.strerror}.") from None
        try:
            if resume:
                stored = read_yaml(self.path / "config.yaml")
                # A setting that the stored file lacks is new in this version of the package.
                changed = differences(stored, config, ignore=RESUMABLE, additions=False)
                if changed:
                    raise changed_settings(self.path, changed)
                self._sweep()
            write_atomic(self.path / "config.yaml", to_yaml(config))
            self._record_start()
        except BaseException:
            self._release()
            raise

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def picture(self, step: int) -> Path:
        """Path of the sample grid at a step."""
        return self.path / "samples" / f"step-{step:06d}.png"

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Forget metrics logged after ``step`` completed steps; a resumed run logs them again."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the process died while writing this line
            if record.get("step", 0) <= step and step > 0:
                kept.append(line + "\n")
        write_atomic(file, "".join(kept))

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exception) -> None:
        """Release the folder."""
        self._release()

    def _record_start(self) -> None:
        """Add this start to run.json: a list of the commands and versions that the run went through."""
        file = self.path / "run.json"
        starts = json.loads(file.read_text())["starts"] if file.is_file() else []
        starts.append(
            {"command": sys.argv, "versions": library_versions(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        )
        write_atomic(file, json.dumps({"starts": starts}, indent=2) + "\n")

    def _lock(self) -> None:
        """Lock the folder; the system lets go of the lock however this process ends."""
        lock = self.path / ".lock"
        self._descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            self._descriptor = None  # the lock file is the other process's
            raise UsageError(f"{self.path} is in use by process {lock.read_text()}.") from None
        except OSError:
            pass  # a file system without locks
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, str(os.getpid()).encode())

    def _release(self) -> None:
        if self._descriptor is not None:
            (self.path / ".lock").unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _sweep(self) -> None:
        """Remove what a killed process had under temporary names."""
        for folder in (self.path, self.checkpoints):
            for leftover in folder.glob(".tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self.path.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def changed_settings(path: Path, changed: list[str]) -> UsageError:
    """The error for resuming a run with settings it was not started with."""
    return UsageError(
        f"{path} was started with other settings ({'; '.join(changed)}). "
        "Resume without them, or start a new run in another folder."
    )


def check_output(path: Path, resume: bool) -> None:
    """Refuse an output folder that would be overwritten, or a resume of nothing."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; give a folder.")
    if resume and not (path / "config.yaml").is_file():
        raise UsageError(f"{path} holds no run to resume (no config.yaml).")
    if not resume and path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path} is not empty. Add --resume to continue the run in it, or give another --output.")


def last_validation(path: Path) -> dict[str, float]:
    """The newest validation values in a run's metrics.jsonl, without their prefix; empty if there are none."""
    prefix = "validation/"
    for line in reversed((path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        found = {k.removeprefix(prefix): v for k, v in json.loads(line).items() if k.startswith(prefix)}
        if found:
            return found
    return {}
