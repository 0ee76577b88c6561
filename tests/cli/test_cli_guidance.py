"""Guidance on the command line: `sample --guidance`, `calibrate`, and the lists."""

import json
import shlex

import pytest

from diffaccel.core.imagefiles import read_images

SAMPLE = ("sample", "digits", "--num", 2, "--steps", 2, "--grid", "sheet.png")
APG = (*SAMPLE, "--guidance", "apg")
PERP_NEG = (*SAMPLE, "--guidance", "perp-neg")


@pytest.fixture
def sheet(run, tmp_path):
    """`sheet("--guidance", "apg")`: the pixels of two digits in two steps."""

    def sheet(*arguments):
        path = tmp_path / "sheet.png"
        run(*SAMPLE[:-1], path, *arguments)
        return read_images([path]).tolist()

    return sheet


def test_rules_and_their_settings_change_images(sheet):
    plain = sheet("--guidance-scale", 6)
    assert plain == sheet("--guidance", "cfg", "--guidance-scale", 6)
    projected = sheet("--guidance", "apg", "--guidance-scale", 6)
    assert projected != plain
    assert projected == sheet("--guidance", "apg", "--guidance-scale", 6, "--set", "apg.eta=0", "--set", "apg.space=x0")
    assert projected != sheet("--guidance", "apg", "--guidance-scale", 6, "--set", "apg.norm_threshold=0.1")
    assert projected == sheet("--guidance", "apg", "--guidance-scale", 6, "--set", "interval.sigma_range=[0,1000]")
    without = sheet("--guidance", "apg", "--guidance-scale", 6, "--set", "interval.sigma_range=[999,1000]")
    assert without == sheet()


def test_numbers_may_be_written_as_python_writes_them(sheet):
    for one, other in (("apg.norm_threshold=1e-1", "apg.norm_threshold=0.1"),
                       ("interval.sigma_range=[3e-1,inf]", "interval.sigma_range=[0.3,1e9]")):  # fmt: skip
        assert sheet("--guidance", "apg", "--set", one) == sheet("--guidance", "apg", "--set", other)


def test_settings_of_sampler_and_rule_side_by_side(sheet):
    both = ("--guidance", "apg", "--sampler", "deis", "--set", "apg.eta=0.5", "--set", "solver_order=1")
    assert sheet(*both) != sheet(*both[:-2])


def test_negatives_and_a_weak_model(sheet, tiny_run):
    assert sheet(*PERP_NEG[-2:], "--set", "perp-neg.negatives=3") != sheet(
        *PERP_NEG[-2:], "--set", "perp-neg.negatives=4"
    )
    weak = ("--guidance", "autoguidance", "--set", f"autoguidance.model={tiny_run / 'final'}")
    assert sheet(*weak, "--guidance-scale", 3) != sheet(*weak, "--guidance-scale", 1) == sheet()


def test_an_interval_buys_steps(run, tmp_path):
    budget = ("--sampler", "deis", "--nfe", 10, "--guidance", "cfg", "--guidance-scale", 5)
    path, pixels = tmp_path / "sheet.png", []
    for more in (
        budget,
        (*budget, "--set", "interval.fraction_range=[0,0.5]"),
        (*budget[:2], "--steps", 5, *budget[4:]),
    ):
        run("sample", "digits", "--num", 2, "--grid", path, *more)
        pixels.append(read_images([path]).tolist())
    assert pixels[0] == pixels[2] != pixels[1]


@pytest.mark.parametrize(
    ("more", "nfe"),
    [
        ((), 4),
        (("--guidance-scale", 3), 8),
        (("--guidance", "apg", "--guidance-scale", 1), 4),
        (("--guidance", "perp-neg", "--set", "perp-neg.negatives=[3,4]"), 16),
        (("--guidance", "cfg", "--set", "interval.fraction_range=[0,0.5]"), 6),
        (("--guidance", "cfg", "--set", "interval.sigma_range=[999,1000]"), 4),
        (("--guidance-scale", 3, "--sampler", "rho-heun", "--nfe", 15), 14),  # (2·4 − 1) pairs
    ],
)
def test_a_run_says_what_it_cost(run, tmp_path, more, nfe):
    steps = () if "--nfe" in more else ("--steps", 4)
    command = ("sample", "digits", "-n", 3, *steps, "--seed", 5, *more, "-o")
    said = json.loads(run(*command, tmp_path / "a", "--json").out)
    assert (said["steps"], said["nfe"]) == (4, nfe)
    assert f"4 steps, NFE {nfe} with guidance pairs counted as two" in run(*command, tmp_path / "b").out
    written = json.loads((tmp_path / "a/dataset.json").read_text())["settings"]
    assert (written["model"], written["seed"], written["steps"], written["nfe"]) == ("digits", 5, 4, nfe)
    assert written["set"] == [word for word in more if "=" in str(word)] and written["guidance_scale"] > 0


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("'apg'?", (*SAMPLE, "--guidance", "agp")),
        ("set interval.sigma_range", (*SAMPLE, "--guidance", "interval")),
        ("'eta'?", (*APG, "--set", "apg.etaa=1")),
        ("is the guidance scale", (*APG, "--set", "apg.scale=3")),
        ("momentum to be a number in (-1, 1)", (*APG, "--set", "apg.momentum=-1")),
        ("eta to be a finite number", (*APG, "--set", "apg.eta=much")),
        ("sigma_range", (*APG, "--set", "interval.sigma_range=[5,0.3]")),
        ("sigma_range", (*APG, "--set", "interval.sigma_range=[a,b]")),
        ("--guidance apg", (*SAMPLE, "--set", "apg.eta=1")),
        ("diffaccel list guidance", (*SAMPLE, "--set", "interval.sigma_range=[0,1]")),
        ("choose apg", (*SAMPLE, "--guidance", "cfg", "--set", "apg.eta=1")),
        ("such as apg.eta", (*APG, "--set", "eta=1")),
        ("perp-neg.negatives=3", PERP_NEG),
        ("0 … 9", (*PERP_NEG, "--set", "perp-neg.negatives=10")),
        ("0 … 9", (*PERP_NEG, "--set", "perp-neg.negatives=blurry")),
        ("got 1.5", (*PERP_NEG, "--set", "perp-neg.negatives=1.5")),
        ("got True", (*PERP_NEG, "--set", "perp-neg.negatives=true")),
        ("'apg'?", (*SAMPLE, "--guidance", "APG")),
        ("autoguidance.model=FOLDER", (*SAMPLE, "--guidance", "autoguidance")),
        ("[0, 1]", (*SAMPLE, "--guidance", "cfg++", "--guidance-scale", 7)),
        ("at least 2", (*APG[:4], "--grid", "sheet.png", *APG[-2:], "--sampler", "deis", "--nfe", 1)),
        ("scale 1", ("calibrate", "digits", "--guidance-scale", 1)),
        ("choose cfg", ("calibrate", "digits", "--set", "cfg.scale=2")),
        ("--sampler", ("calibrate", "digits", "--set", "solver_order=2")),
        ("'digits'?", ("calibrate", "digit")),
    ],
)
def test_refusals(refuse, words, arguments, tmp_path):
    refuse(2, words, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_weak_model_that_is_not_there_or_does_not_fit(refuse, teacher_copy):
    weak = (*SAMPLE, "--guidance", "autoguidance", "--set")
    refuse(3, "no model folder", *weak, "autoguidance.model=no/where")
    config = teacher_copy / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))
    refuse(2, "two models of one kind", *weak, f"autoguidance.model={teacher_copy}")


def test_calibrate_and_the_line_to_type_next(run, tmp_path):
    arguments = ("digits", "--guidance-scale", 10, "--steps", 3, "--sampler", "deis", "--num", 4)
    done = run("calibrate", *arguments, "--set", "apg.space=raw", "--set", "solver_order=1")
    lines = done.out.splitlines()
    assert len(lines) == 1 + 3 + 1 and lines[-1].startswith("norm_threshold: ") and "raw space" in lines[-1]
    cap = lines[-1].split()[1]
    follow = done.err.strip().removeprefix("Next: ")
    assert f"apg.norm_threshold={cap}" in follow and "apg.space=raw" in follow and "solver_order=1" in follow
    command = [str(tmp_path / word) if word.endswith(".png") else word for word in shlex.split(follow)[1:]]
    run(*command, "--num", 2)
    assert (tmp_path / "guided.png").is_file()

    found = json.loads(run("calibrate", *arguments, "--set", "apg.space=raw", "--set", "solver_order=1", "--json").out)
    assert float(cap) == pytest.approx(found["norm_threshold"], rel=1e-3)
    assert len(found["evaluations"]) == 3 and found["rule"]["scale"] == 10 and found["rule"]["space"] == "raw"


def test_calibration_does_not_depend_on_batches(run):
    arguments = ("calibrate", "digits", "--guidance-scale", 5, "--steps", 2, "--num", 5, "--json")
    whole, parts = (json.loads(run(*arguments, *more).out) for more in ((), ("--batch-size", 2)))
    assert whole["norm_threshold"] == pytest.approx(parts["norm_threshold"], rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("guidance", {"cfg", "apg", "cfg++", "interval"}),
        ("guidance-settings", {"sdxl", "sd21", "dit", "flow", "video"}),
    ],
)
def test_lists(run, kind, some):
    rows = json.loads(run("list", kind, "--json").out)
    assert some <= {row["name"] for row in rows} and all(all(row.values()) for row in rows)
    lines = run("list", kind).out.splitlines()
    assert len(lines) == len(rows) + 2 and lines[0].startswith("name")


def test_settings_from_memory_say_so(run):
    rows = {row["name"]: row for row in json.loads(run("list", "guidance-settings", "--json").out)}
    assert all("unverified" in rows[name]["how sure"] for name in ("sd21", "dit", "edm2-s", "edm2-xxl"))
    assert rows["flow"]["norm_threshold"] == "calibrate"


def test_help_has_examples(cli):
    text = cli("calibrate", "--help").out.replace("`", "")
    assert "diffaccel calibrate digits" in text and "--guidance" in cli("sample", "--help").out
