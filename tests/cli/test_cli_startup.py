"""What every command costs before it does anything, and that nothing but results and errors is printed."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("code", ["import diffaccel", "import sys; sys.argv[1:] = ['--help']; main()"])
def test_start_needs_neither_torch_nor_diffusers(python, code):
    setup = "from diffaccel.cli.app import main\n" if "main" in code else ""
    report = "import sys\nprint(*{'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules), file=sys.stderr)"
    done = python("-c", f"{setup}try:\n    {code}\nexcept SystemExit:\n    pass\n{report}")
    assert done.code == 0 and done.err.strip() == ""


def _cpu_seconds(*arguments) -> float:
    """Least processor time of three starts, children only."""
    times = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        times.append(usage.ru_utime + usage.ru_stime)
    return min(times)


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs wait4")
def test_help_is_quick():
    assert _cpu_seconds("-m", "diffaccel", "--help") - _cpu_seconds("-c", "pass") <= 0.8


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("list", "methods"), ("list", "recipes")])
def test_stderr_stays_empty(python, arguments):
    done = python("-W", "default", "-m", "diffaccel", *arguments)
    assert done.code == 0 and done.out.strip() and done.err == ""


def test_every_verb_has_help_with_an_example(cli):
    for verb in ("demo", "distill", "train", "sample", "evaluate fid", "evaluate stats", "list", "env"):
        done = cli(*verb.split(), "--help")
        assert done.code == 0 and f"diffaccel {verb}" in done.out.replace("`", ""), verb


def test_documented_exit_codes_are_in_the_help(cli):
    text = cli("--help").out
    assert all(f"{code} " in text for code in (0, 1, 2, 3, 4, 5)) and "130/143" in text


def test_a_closed_pipe_is_not_an_error():
    """`diffaccel list methods | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "diffaccel", "list", "methods"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.stderr == "" and done.returncode in (0, 1)
