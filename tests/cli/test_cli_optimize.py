"""`diffaccel optimize`, `diffaccel bench attention`, and what lists and `env` say of them."""

import json

import pytest

from diffaccel.cli.pipelines import bytes_of
from diffaccel.core.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning")  # stock schedulers under numpy 2
QUICK = ("--steps", 2, "--rounds", 3, "--seconds", 0.1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_optimize_writes_report_and_picture(run, tmp_path):
    outcome = run("optimize", "--model", "digits", "--skip", "compile", *QUICK, "-o", tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.txt", "waterfall.png"}
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [trial["name"] for trial in record["trials"]] == ["sequential-cfg", "attention", "text", "channels-last"]
    assert record["pipeline"] == "ClassConditionalPipeline" and record["steps"] == 2
    assert "ms per image" in outcome.out and "waterfall.png" in outcome.err
    assert "no cross-attention" in outcome.out  # of text


def test_optimize_as_json(run, tmp_path):
    command = (
        "optimize",
        "-m",
        "digits-flow",
        "--only",
        "text,channels-last",
        *QUICK,
        "--json",
        "-o",
        tmp_path / "report",
    )
    record = json.loads(run(*command).out)
    assert record["kept"] == [] and [trial["outcome"] for trial in record["trials"]] == ["not applicable"] * 2


def test_bench_attention(run, tmp_path):
    command = ("bench", "attention", "--model", "digits", "--backends", "flash,math", "--rounds", 3, "--seconds", 0.05)
    outcome = run(*command, "-o", tmp_path / "report.json")
    assert "unet:" in outcome.out and "math" in outcome.out
    record = json.loads((tmp_path / "report.json").read_text())
    names = {one["backend"] for one in record["networks"][0]["choices"][0]["measured"]}
    assert names == {"default", "flash", "math"}
    assert "measured before" in run(*command).out
    assert "measured before" not in run(*command, "--fresh").out


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (("bench", "attention", "-m", "digits", "--backends", "warp"), 2, "Unknown attention backend 'warp'"),
        (("bench", "attention", "-m", "digits", "--backends", "xformers"), 2, "'xformers' cannot be used here: It needs a CUDA"),
        (("bench", "attention", "-m", "digits", "--memory-cap", "much"), 2, "--memory-cap is a number of bytes"),
        (("bench", "attention", "-m", "digits", "-o", "/no/such/folder/x.json"), 2, "/no/such/folder"),
        (("bench", "attention", "-m", "sd15"), 4, "not on this machine"),
        (("optimize", "-m", "digits", "--only", "warp", "-o", "REPORT"), 2, "Unknown acceleration 'warp'"),
        (("optimize", "-m", "digits", "--dtype", "int4", "-o", "REPORT"), 2, "--dtype is one of"),
        (("optimize", "-m", "digit", "-o", "REPORT"), 2, "Unknown teacher 'digit'"),
        (("optimize", "-m", "digits", "-o", "FULL"), 2, "is not an empty folder"),
        (("sample", "digits", "--parallel-cfg", "--grid", "REPORT.png"), 2, "torchrun --nproc_per_node 2"),
    ],
)  # fmt: skip
def test_bad_input(cli, tmp_path, command, code, message):
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "kept.txt").write_text("mine")
    places = {name: tmp_path / name for name in ("REPORT", "FULL", "REPORT.png")}
    outcome = cli(*(places.get(part, part) for part in command))
    assert outcome.code == code and message in outcome.err
    assert not (tmp_path / "REPORT").exists()


@pytest.mark.parametrize(("text", "size"), [("12GiB", 12 * 2**30), ("500 mb", 500 * 2**20), ("1.5K", 1536), ("77", 77)])
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "1e9", "12 apples", "1I"])
def test_no_sizes(text):
    with pytest.raises(UsageError, match="number of bytes"):
        bytes_of(text)


def test_lists_and_environment(run):
    rows = {row["name"]: row for row in json.loads(run("list", "attention", "--json").out)}
    assert rows["default"]["here"].startswith("usable on") and rows["sage"]["kind"] == "approximate"
    assert "channels-last" in run("list", "accelerations").out
    facts = json.loads(run("env", "--json").out)
    assert "math" in facts["attention"] and "xformers" in facts["attention"] + facts["attention, not here"]
