"""Two processes under torchrun find what one finds."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import functools, json, sys
import torch
from diffaccel.core.schedule import from_diffusers
from diffaccel.search import run, seeds
from diffaccel.search.dynamic import trajectory_times
from diffaccel.solver_search import search_schedule
from diffaccel.testing import spectral_mixture

output, resume, stop = sys.argv[1], sys.argv[2] == "resume", float(sys.argv[3])
seeds.RULES, seeds.GRIDS, seeds._POWERS = seeds.RULES[:5], ("trailing", "fast"), ()
run.trajectory_times = functools.partial(trajectory_times, count=6, nodes=12)
calls = []

def objective(samples):
    calls.append(None)
    if len(calls) > stop:
        raise KeyboardInterrupt
    value = float((samples.square().mean() - 0.3).abs()) + 0.1
    return float("nan") if int(value * 1e6) % 5 == 0 else value  # not all of them can be scored

found = search_schedule(
    spectral_mixture(from_diffusers({}), 6, 3), 3, objective=objective, strategy=sys.argv[4], budget=60, samples=8,
    validation=12, output=output, resume=resume, device="cpu",
)
sys.stdout.write(json.dumps([len(calls), found.history]) + "\\n")  # at once: two processes share the pipe
"""


def _search(processes: int, output: Path, resume: bool = False, stop: float = math.inf, strategy: str = "evolution"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = output.with_suffix(".py")
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command = [sys.executable, *(launcher if processes > 1 else ()), script, output, "resume" if resume else "new"]
    done = subprocess.run(
        [*map(str, command), str(stop), strategy], env=environment, capture_output=True, text=True, timeout=200
    )
    return done, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def _content(path: Path) -> dict:
    content = json.loads(path.read_text())
    content["record"].pop("versions")
    return content


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["evolution", "s3"])
def test_two_processes_share_the_work_and_find_the_same(tmp_path, strategy):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    (done, (alone,)), (both, shared) = _search(1, one, strategy=strategy), _search(2, two, strategy=strategy)
    assert done.returncode == both.returncode == 0, done.stderr + both.stderr
    assert _content(one) == _content(two)
    lines = [path.with_name(path.name + ".log").read_text().splitlines() for path in (one, two)]
    assert sorted(lines[0][1:]) == sorted(lines[1][1:])
    assert len(shared) == 2 and all(history == alone[1] for _, history in shared)  # both return the same
    assert sum(calls for calls, _ in shared) == alone[0]
    assert all(abs(calls - alone[0] / 2) < 0.1 * alone[0] for calls, _ in shared)


@pytest.mark.slow
def test_what_two_processes_began_one_may_finish(tmp_path):
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    done, _ = _search(1, whole)
    stopped, _ = _search(2, part, stop=25)
    assert done.returncode == 0 and stopped.returncode != 0 and not part.exists()
    for processes in (1, 2):  # the second finds everything in the log
        part.unlink(missing_ok=True)
        resumed, _ = _search(processes, part, resume=True)
        assert resumed.returncode == 0, resumed.stderr
        assert _content(part) == _content(whole)
