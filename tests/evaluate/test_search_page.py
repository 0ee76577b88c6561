"""The page and the picture of a search, from results made up around exact teachers."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

import diffaccel
from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import from_diffusers
from diffaccel.evaluate.search_page import header, lines, notes, page, picture, searched, usage, write_search
from diffaccel.evaluate.search_picture import drawing
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.usf import Decision, SolverSchedule
from diffaccel.search.outcome import Outcome, Scored
from diffaccel.search.subjects import DenoiserSubject, PipelineSubject
from diffaccel.testing import spectral_mixture

CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "epsilon"}
STEPS = (
    Decision(),
    Decision(order=2, core="velocity", variable="angle", corrector="pseudo", carry=0.125),
    Decision(order=2, core="data", relaxation="scale", strength=1.25),
)


def made_up(subject, best: float = 0.2, layers=None) -> Outcome:
    """The result of a search that found a schedule with this score on held-out noise; the hand-set one has 0.4."""
    schedule = SolverSchedule((900.0, 500.0, 100.0), STEPS)
    hand = subject.file(deis_plan(make_grid(subject.schedule, 3, "quadratic"), 2))
    file = subject.file(schedule.compile(subject.schedule), schedule, layers=layers or {})
    seed = Scored("deis grid=quadratic", hand, {"search": 0.5, "selection": 0.45, "validation": 0.4})
    found = Scored("polish", file, {"search": 0.1, "selection": 0.15, "validation": best})
    improved = best < 0.4
    told = {
        "unit": "RMSE <of> it",
        "improved": improved,
        "samples": {"search": 8, "selection": 16, "validation": 16},
        "noise_seeds": {"validation": 7},
        "cost": {"candidates": 60, "network_calls_times_samples": 1234567},
    }
    winner = found if improved else seed
    file = replace(winner.file, record=told)
    others = [
        Scored("s3", file, {"search": 0.12, "selection": 0.2}),
        Scored("seeds", hand, {"search": 0.5, "selection": 0.45}),
    ]
    history = [("seeds", 0.5 - 0.01 * i) for i in range(20)] + [("s3", float("inf"))] * 20 + [("polish", 0.1)] * 20
    return Outcome(replace(winner, file=file), seed, improved, file, [found, seed, *others], history, subject)


@pytest.fixture(scope="module")
def subject():
    return PipelineSubject(diffaccel.load_pipeline("digits"), [{"class_labels": label} for label in range(10)])


@pytest.fixture(scope="module")
def outcome(subject):
    return made_up(subject)


def test_the_table_and_what_is_said(outcome, subject):
    assert header(outcome) == ["schedule", "search", "selection", "validation"]
    assert lines(outcome) == [
        ["hand-set: deis grid=quadratic", "0.5", "0.45", "0.4"],
        ["searched: found by polish", "0.1", "0.15", "0.2"],
    ]
    said = " ".join(notes(outcome, "plan.json", 12.3))
    assert "0.2 against 0.4, 0.50×" in said and "1,234,567 network calls" in said and "12 s" in said
    beaten = made_up(subject, 0.6)
    assert "deis grid=quadratic was not beaten" in " ".join(notes(beaten, "plan.json", 1.0))
    assert searched(beaten).label == "polish" and lines(beaten)[1][-1] == "0.6"


def test_hand_set_schedules_among_the_candidates_are_not_called_searched(subject):
    outcome = made_up(subject, 0.6)
    only = replace(outcome, finalists=[one for one in outcome.finalists if one.label not in ("polish", "s3")])
    assert searched(only) is None and len(lines(only)) == 1 and picture(only).shape[0] == 3


def test_how_to_use_it(outcome, subject):
    assert usage(outcome, "plan.json")[0].endswith('SearchedScheduler.from_file("plan.json", pipe.scheduler.config)')
    assert usage(outcome, "plan.json")[1] == "images = pipe(…, num_inference_steps=3).images"
    skipping = made_up(subject, layers={"skip": [["mid_block.resnets.0"], [], []]})
    assert usage(skipping, "plan.json")[0] == 'diffaccel.apply_plan(pipe, "plan.json")'
    assert "layers left out" in page(skipping, picture(skipping), "plan.json", 1.0)


def test_the_page(outcome, tmp_path):
    write_search(outcome, tmp_path / "plan.json", 3.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.html", "plan.png"]
    text = (tmp_path / "plan.html").read_text()
    assert "<script" not in text and not re.search(r"(src|href)='(?!data:)", text)
    body = text[text.index("<body") : text.index("</html>")]
    tree = ElementTree.fromstring(re.sub(r"<(meta|img)([^>]*)>", r"<\1\2/>", body))
    tables = [[[cell.text or "" for cell in row] for row in one] for one in tree.iter("table")]
    steps = tables[1]
    assert [row[0] for row in steps] == ["step", "1", "2", "3"] and "start" not in steps[0]
    cell = {name: [row[index] for row in steps[1:]] for index, name in enumerate(steps[0])}
    assert cell["time"] == ["900", "500", "100"] and cell["order"] == ["1", "2", "2"]
    assert cell["integrates"] == ["", "velocity", "data"] and cell["in"] == ["", "angle", "log-rho"]
    assert (cell["corrector"], cell["momentum"]) == (["", "pseudo", ""], ["", "0.125", ""])
    assert cell["relaxation"] == ["", "", "×1.25"]
    for sigma, alpha, rho in zip(cell["σ"], cell["α"], cell["σ/α"], strict=True):
        assert float(sigma) ** 2 + float(alpha) ** 2 == pytest.approx(1.0, abs=1e-3)
        assert float(rho) == pytest.approx(float(sigma) / float(alpha), rel=1e-2)
    assert [row[0] for row in tables[2][1:]] == ["polish", "deis grid=quadratic", "s3", "seeds"]


def test_the_best_so_far_never_rises(outcome):
    text = page(outcome, torch.zeros(3, 4, 4, dtype=torch.uint8), "plan.json", 1.0)
    heights = [float(y) for y in re.findall(r"<circle cx='[^']*' cy='([^']*)'", text)]  # downwards in SVG
    assert heights == sorted(heights) and len(heights) > 10


def test_the_drawing_has_a_mark_for_every_call(subject, outcome):
    def marks(file):
        blue = torch.tensor([0x1B, 0x78, 0xC8], dtype=torch.uint8)[:, None, None]
        row = (drawing([("it", file)], subject) == blue).all(dim=0).any(dim=0).int()
        return int((row.diff() == 1).sum())

    assert marks(outcome.best.file) == marks(outcome.seed.file) == 3


def test_samples_that_are_no_pictures():
    denoiser = spectral_mixture(from_diffusers(CONFIG))
    outcome = made_up(DenoiserSubject(denoiser, CONFIG))
    assert torch.equal(picture(outcome), drawing([(name, one.file) for name, one in _named(outcome)], outcome.subject))


def _named(outcome):
    calls = "3 network calls"
    return [
        (f"hand-set: deis grid=quadratic, {calls}: 0.4", outcome.seed),
        (f"searched: found by polish, {calls}: 0.2", outcome.best),
    ]
