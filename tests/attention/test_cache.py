"""Measurements from one process to the next."""

import json
from dataclasses import replace

import pytest
import torch
from planted import built, clocks, collected, planted

import diffaccel
from diffaccel.attention.cache import Cache, environment
from diffaccel.attention.measure import Measurement

CPU = torch.device("cpu")
MEASURED = [Measurement("default", None, 0.5, 100), Measurement("flash", "raises RuntimeError: no")]


@pytest.fixture
def use():
    return next(iter(collected("sd").uses.values()))


def test_what_was_kept_comes_back(use, tmp_path):
    Cache(CPU, tmp_path / "new").put(use, MEASURED)
    store = Cache(CPU, tmp_path / "new")
    assert store.get(use, ["flash", "default"]) == MEASURED[::-1]
    assert store.get(use, ["default", "math"]) is None
    assert store.get(replace(use, tokens_first=False), ["default"]) is None
    assert store.get(replace(use, signature=use.signature._replace(batch=7)), ["default"]) is None


@pytest.mark.parametrize(
    "damage", ["", "[]", "{", '{"schema": 1}', '{"schema": 1, "environment": {}, "signatures": {}}']
)
def test_damaged_files_count_as_none(use, tmp_path, damage):
    store = Cache(CPU, tmp_path)
    store.path.write_text(damage)
    assert store.get(use, ["default"]) is None
    store.put(use, MEASURED)
    assert store.get(use, ["default"]) == MEASURED[:1]


@pytest.mark.parametrize("entry", [{"seconds": "1"}, {"seconds": -1.0, "bytes": 3}, {"excluded": 3}, {"other": 1}, 7])
def test_damaged_entries_count_as_none(use, tmp_path, entry):
    store = Cache(CPU, tmp_path)
    store.put(use, MEASURED)
    record = json.loads(store.path.read_text())
    next(iter(record["signatures"].values()))["default"] = entry
    store.path.write_text(json.dumps(record))
    assert store.get(use, ["default"]) is None


def test_other_versions_are_another_file(monkeypatch, tmp_path):
    here = Cache(CPU, tmp_path).path
    monkeypatch.setattr("diffaccel.attention.cache.library_versions", lambda packages: {"torch": "3.0"})
    assert Cache(CPU, tmp_path).path != here
    assert {"device", "capability", "torch"} <= environment(CPU).keys()


def test_a_folder_that_cannot_be_written_is_no_error(use, tmp_path):
    (tmp_path / "file").write_text("")
    store = Cache(CPU, tmp_path / "file" / "below")
    store.put(use, MEASURED)
    assert store.get(use, ["default"]) is None


def test_the_second_time_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clocks(monkeypatch, flash=0.5, chosen=0.5)
    pipe, _, run = built("sd")
    first = diffaccel.optimize_attention(pipe, run=run, rounds=3)
    first.undo()
    assert len(list((tmp_path / "diffaccel" / "attention").glob("*.json"))) == 1
    monkeypatch.setattr("diffaccel.attention.optimize.measure", None)
    second = diffaccel.optimize_attention(pipe, run=run, rounds=3)
    assert [choice.measured for choice in second.networks[0].choices] == [
        choice.measured for choice in first.networks[0].choices
    ]
    assert all(choice.cached for choice in second.networks[0].choices) and "measured before" in second.explain()
    second.undo()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clocks(monkeypatch, math=0.5, chosen=0.5)
    third = diffaccel.optimize_attention(pipe, run=run, rounds=3, fresh=True)
    third.undo()
    assert {choice.backend for choice in third.networks[0].choices} == {"math"}
    again = diffaccel.optimize_attention(pipe, run=run, rounds=3)
    again.undo()
    assert {(choice.backend, choice.cached) for choice in again.networks[0].choices} == {("math", True)}


def test_moments_of_little_memory_are_not_kept(use, tmp_path):
    store = Cache(CPU, tmp_path)
    store.put(use, [*MEASURED, Measurement("math", excluded="raises OutOfMemoryError: CUDA out of memory")])
    assert store.get(use, ["default"]) is None


def test_backends_that_are_not_registered_are_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clocks(monkeypatch)
    pipe, _, run = built("sd")
    diffaccel.optimize_attention(pipe, run=run, backends=[planted("flash")])
    assert not list(tmp_path.iterdir())
