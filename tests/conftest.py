"""What tests of several folders share: the command line inside this process, and runs small enough for seconds."""

import io
import os
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before anything imports huggingface_hub: no test reaches the network or finds weights of the person running it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = str(Path(__file__).parent / "no-such-cache")
# A shell that starts a command in the background lets it ignore Ctrl-C, and all that it starts; some tests press that.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of one command."""

    code: int
    out: str
    err: str


def _invoke(*arguments) -> Outcome:
    from diffaccel.cli.app import main

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["diffaccel", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli():
    """`cli("list", "samplers")`: run a command in this process and return its `Outcome`."""
    return _invoke


@pytest.fixture(scope="session")
def run():
    """`run("list", "samplers")`: the same for commands that must succeed."""

    def run(*arguments) -> Outcome:
        outcome = _invoke(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome

    return run


@pytest.fixture(scope="session")
def python():
    """`python("-m", "diffaccel", …)`: a fresh interpreter on one thread; keyword arguments go to subprocess.run."""

    def python(*arguments, **settings) -> Outcome:
        settings.setdefault("env", {**os.environ, "OMP_NUM_THREADS": "1"})
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return python


@pytest.fixture(scope="session")
def tiny():
    """Arguments of a distillation of seconds; the student moves from the first step on."""
    return ("distill", "--teacher", "digits", "--method", "dmd", "--steps", 6, "--batch-size", 8, "--quiet",
            "--set", "trainer.checkpoint_every=2", "--set", "trainer.log_every=1")  # fmt: skip


@pytest.fixture(scope="session")
def tiny_run(run, tiny, tmp_path_factory) -> Path:
    """The folder of one finished tiny distillation; read it, do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    run(*tiny, "-o", folder)
    return folder


@pytest.fixture
def teacher_copy(tmp_path) -> Path:
    """A copy of the embedded teacher's folder, to damage."""
    import shutil

    from diffaccel.models.teachers import resolve_teacher

    return Path(shutil.copytree(resolve_teacher("digits")[0], tmp_path / "teacher"))
