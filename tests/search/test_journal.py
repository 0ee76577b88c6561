"""The journal of a search: whatever happens to the file, it is continued or refused, and no complete line is lost."""

import json
import math
import os

import pytest

from diffaccel.core.errors import DataError, UsageError
from diffaccel.search.journal import Journal

SETTINGS = {"nfe": 5, "seed": 0, "genes": ("times", "order"), "model": "α"}


def written(path) -> Journal:
    journal = Journal(path, SETTINGS)
    journal.add("0/32/a", 0.1)
    journal.settle("evaluations", 40)
    journal.add("0/32/b", math.inf)
    journal.add("0/32/c", 1 / 3)
    journal.settle("times 1.0", [999.0, 12.5])
    return journal


def test_what_is_written_is_read_back_exactly(tmp_path):
    before = written(tmp_path / "log")
    after = Journal(tmp_path / "log", SETTINGS, resume=True)
    assert after.scores == before.scores == {"0/32/a": 0.1, "0/32/b": math.inf, "0/32/c": 1 / 3}
    assert after.facts == before.facts == {"evaluations": 40, "times 1.0": [999.0, 12.5]}
    after.add("0/32/d", 4e-324)
    assert Journal(tmp_path / "log", SETTINGS, resume=True).scores["0/32/d"] == 4e-324


def test_every_score_is_on_the_disk_at_once(tmp_path):
    journal = Journal(tmp_path / "log", SETTINGS)
    for index in range(3):
        journal.add(str(index), float(index))
        assert len((tmp_path / "log").read_text().splitlines()) == index + 2


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinite_at_once_and_later(tmp_path, score):
    journal = Journal(tmp_path / "log", SETTINGS)
    journal.add("a", score)
    again = Journal(tmp_path / "log", SETTINGS, resume=True)
    assert journal.scores == again.scores == {"a": math.inf}


def test_facts_are_settled_once(tmp_path):
    journal = written(tmp_path / "log")
    size = (tmp_path / "log").stat().st_size
    assert journal.settle("evaluations", 77) == 40 and (tmp_path / "log").stat().st_size == size
    assert Journal(tmp_path / "log", SETTINGS, resume=True).settle("evaluations", 78) == 40


def test_in_memory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(None, SETTINGS)
    journal.add("a", 1.0)
    assert journal.settle("b", 2) == 2 == journal.settle("b", 3)
    assert journal.scores == {"a": 1.0} and not os.listdir(tmp_path)


def test_cut_off_anywhere(tmp_path):
    """A machine may stop in the middle of any write."""
    written(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    entries = [json.loads(line) for line in data.splitlines()]
    for size in range(len(data) + 1):
        path = tmp_path / f"cut-{size}"
        path.write_bytes(data[:size])
        complete = data[:size].count(b"\n")
        if complete == 0:
            with pytest.raises(DataError, match="not the journal"):
                Journal(path, SETTINGS, resume=True)
            continue
        journal = Journal(path, SETTINGS, resume=True)
        kept = entries[1:complete]
        assert journal.facts == {entry["fact"]: entry["value"] for entry in kept if "fact" in entry}
        assert list(journal.scores) == [entry["key"] for entry in kept if "key" in entry]
        journal.add("new", 2.0)  # on a line of its own
        again = Journal(path, SETTINGS, resume=True)
        assert again.scores == journal.scores and again.facts == journal.facts


def test_other_settings_are_refused_by_name(tmp_path):
    written(tmp_path / "log")
    before = (tmp_path / "log").read_bytes()
    other = {**{key: value for key, value in SETTINGS.items() if key != "seed"}, "nfe": 6, "samples": 9}
    with pytest.raises(UsageError, match="nfe was 5 and is 6, samples was None and is 9, seed was 0 and is None"):
        Journal(tmp_path / "log", other, resume=True)
    assert (tmp_path / "log").read_bytes() == before


def test_nothing_is_overwritten_and_nothing_made_up(tmp_path):
    written(tmp_path / "log")
    with pytest.raises(UsageError, match="continue it with --resume"):
        Journal(tmp_path / "log", SETTINGS)
    with pytest.raises(UsageError, match="no search to resume"):
        Journal(tmp_path / "none", SETTINGS, resume=True)
    with pytest.raises(UsageError, match="no search to resume"):
        Journal(tmp_path, SETTINGS, resume=True)
    with pytest.raises(UsageError, match="Cannot write"):
        Journal(tmp_path / "no-folder" / "log", SETTINGS)


HEAD = json.dumps({"settings": {**SETTINGS, "genes": list(SETTINGS["genes"])}}) + "\n"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        "a plan\n",
        "[]\n",
        "3\n",
        '{"settings": 3}\n',
        '{"settings": [1, 2]}\n',
        '{"settings": null}\n',
        '{"other": {}}\n',
        HEAD + "3\n",
        HEAD + "{}\n",
        HEAD + "null\n",
        HEAD + '["key"]\n',
        HEAD + '{"key": "a"}\n',
        HEAD + '{"key": "a", "score": "low"}\n',
        HEAD + '{"key": "a", "score": [1]}\n',
        HEAD + '{"key": {}, "score": 1}\n',
        HEAD + '{"fact": "a"}\n',
        HEAD + '{"fact": [], "value": 1}\n',
        HEAD + '{"key": "a", "score": 1\n',
        HEAD + "\n",
        HEAD + "[" * 100_000 + "\n",
        b"\xff\xfe\n",
    ],
)
def test_damaged_files_are_no_journals(tmp_path, content):
    path = tmp_path / "log"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match="not the journal"):
        Journal(path, SETTINGS, resume=True)


def test_a_journal_written_by_hand(tmp_path):
    (tmp_path / "log").write_text(HEAD + '{"key": "a", "score": NaN}\n{"key": "b", "score": 1e999}\n')
    assert Journal(tmp_path / "log", SETTINGS, resume=True).scores == {"a": math.inf, "b": math.inf}
