"""`diffaccel evaluate` through typer: results on stdout, files, refusals."""

import json

import pytest
from typer.testing import CliRunner

from diffaccel.cli.evaluate import app
from diffaccel.core.errors import DataError
from diffaccel.evaluate.statistics import load_statistics

runner = CliRunner()


def _run(*arguments):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_text_names_the_metric_and_the_interval():
    text = _run("fid", "digits:heldout", "digits")
    assert text.startswith("FD-digits64:") and "95 % interval" in text


def test_json_is_all_of_stdout_and_equals_the_file(tmp_path):
    printed = json.loads(_run("fid", "digits:heldout", "digits", "--json", "-o", tmp_path / "report.json"))
    assert printed == json.loads((tmp_path / "report.json").read_text())
    assert printed["results"][0]["metric"] == "FD-digits64" and printed["schema"] == 2


def test_stats_then_fid(tmp_path):
    assert "64 features" in _run("stats", "digits", "-o", tmp_path / "ref.npz")
    assert load_statistics(tmp_path / "ref.npz").features["name"] == "digits64"
    from_file = json.loads(_run("fid", "digits:heldout", tmp_path / "ref.npz", "--json"))
    assert from_file["results"][0]["n_real"] == load_statistics(tmp_path / "ref.npz").count


def test_errors_keep_their_type_for_the_exit_code():
    with pytest.raises(DataError, match="does not exist"):
        runner.invoke(app, ["fid", "nope/", "digits"], catch_exceptions=False)


def test_help_has_examples():
    for verb in ("fid", "kid", "prdc", "is", "cmmd", "clip", "appearance", "all", "stats", "compare", "verify"):
        assert "diffaccel evaluate" in _run(verb, "--help")
