"""`optimize`: planted accelerations, what is kept, what comes back, and the report."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import PIPELINES

import diffaccel
from diffaccel.attention import timing
from diffaccel.core.errors import UsageError
from diffaccel.execution import accelerations
from diffaccel.execution import optimize as module
from diffaccel.execution.accelerations import BIT_EQUAL, ROUNDING, Acceleration, Switch
from diffaccel.execution.optimize import Comparison, optimize, verdict
from diffaccel.execution.report import Cost
from diffaccel.execution.runs import default_steps, difference_of, images_of, standard_run

QUICK = {"steps": 2, "rounds": 4, "seconds": 60.0}
WAIT = 0.5  # seconds that an evaluation takes by the clock of these tests


@pytest.fixture
def pipe(monkeypatch):
    pipe = diffaccel.load_pipeline("digits")
    pipe.unet.waste, pipe.unet.shift = WAIT, 0.0
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def hook(network, args, output):
        now[0] += network.waste + 1e-4
        output.sample = output.sample + network.shift
        return output

    pipe.unet.register_forward_hook(hook)
    return pipe


def planted(monkeypatch, *changes: tuple[str, dict]):
    """Accelerations that set attributes of the network, in place of the real ones; exact unless they shift."""

    def make(values):
        def build(pipe, options):
            if values is None:
                raise UsageError("There is nothing to gain.")
            before = {name: getattr(pipe.unet, name) for name in values}
            return Switch(lambda: pipe.unet.__dict__.update(values), lambda: pipe.unet.__dict__.update(before))

        return build

    table = {name: Acceleration(name, name, BIT_EQUAL, make(values)) for name, values in changes}
    monkeypatch.setattr(module, "ACCELERATIONS", table)


def test_what_pays_is_kept_and_nothing_else(pipe, monkeypatch):
    changes = (
        ("slow", {"waste": 3 * WAIT}),
        ("none", None),
        ("fast", {"waste": 0.0}),
        ("wrong", {"waste": 0.0, "shift": 0.5}),
    )
    planted(monkeypatch, *changes)
    told = []
    report = optimize(pipe, **QUICK, progress=told.append)
    assert [trial.outcome for trial in report.trials] == ["not kept", "not applicable", "kept", "not kept"]
    assert "not faster" in report.trials[0].reason and report.trials[1].reason == "There is nothing to gain."
    assert "changes the images" in report.trials[3].reason
    assert report.kept == ["fast"] and report.last.seconds < report.first.seconds and report.difference == 0
    assert pipe.unet.waste == 0.0 and pipe.unet.shift == 0.0
    assert told == ["the pipeline as it is", "slow", "none", "fast", "wrong", "all together"]
    report.undo()
    assert pipe.unet.waste == WAIT
    report.undo()
    assert pipe.unet.waste == WAIT


def test_each_is_measured_on_top_of_those_kept(pipe, monkeypatch):
    planted(monkeypatch, ("half", {"waste": WAIT / 2}), ("nothing", {"shift": 0.0}), ("all", {"waste": 0.0}))
    report = optimize(pipe, **QUICK)
    assert report.kept == ["half", "all"]
    half, _, rest = report.trials
    assert rest.without.seconds == pytest.approx(half.used.seconds)
    assert report.first.seconds == pytest.approx(half.without.seconds)
    report.undo()
    assert pipe.unet.waste == WAIT


def test_what_fails_is_listed_and_off(pipe, monkeypatch):
    planted(monkeypatch, ("fast", {"waste": 0.0}))

    def broken(pipe, options):
        def on():
            pipe.unet.shift = 1.0
            raise RuntimeError("out of order")

        return Switch(on, lambda: setattr(pipe.unet, "shift", 0.0))

    module.ACCELERATIONS["broken"] = Acceleration("broken", "", ROUNDING, broken)
    for measure in (True, False):
        report = optimize(pipe, **QUICK, measure=measure)
        assert report.kept == ["fast"] and report.trials[1].outcome == "failed"
        assert report.trials[1].reason == "RuntimeError: out of order"
        assert pipe.unet.waste == 0.0 and pipe.unet.shift == 0.0
        report.undo()
        assert pipe.unet.waste == WAIT


def test_what_has_no_effect_is_not_kept():
    pipe = diffaccel.load_pipeline("digits")  # without guidance, for one image
    (trial,) = optimize(pipe, steps=1, rounds=3, seconds=0.1, only=["sequential-cfg"]).trials
    assert (trial.outcome, trial.reason) == ("not applicable", "The network is called for one row at a time.")


def test_an_interruption_leaves_the_pipeline_as_it_was(pipe, monkeypatch):
    planted(monkeypatch, ("fast", {"waste": 0.0}), ("stop", {"shift": 0.0}))

    def tell(what):
        if what == "stop":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize(pipe, **QUICK, progress=tell)
    assert pipe.unet.waste == WAIT


def test_verdicts():
    slow, fast, lean = Cost(1.0, 1000), Cost(0.9, 1000), Cost(1.5, 600)

    def judged(without, used, difference=0.0, allowed=0.0, cap=None, won=7):
        return verdict(Comparison(without, used, difference, won, 7), allowed, cap)

    assert judged(slow, fast) == (True, "1.11× as fast")
    assert judged(slow, fast, 3.9, 4.0)[0] and not judged(slow, fast, 4.1, 4.0)[0]
    assert not judged(slow, fast, float("nan"), 4.0)[0]
    assert judged(slow, Cost(0.99, 1000)) == (False, "only 1.0% faster")
    assert judged(slow, fast, won=6)[0] and judged(slow, fast, won=5) == (False, "faster in 5 of 7 rounds only")
    assert judged(slow, lean) == (False, "not faster")
    assert judged(slow, lean, cap=800) == (True, "takes 40% less memory")
    assert judged(slow, lean, cap=2000) == (False, "not faster")
    assert judged(lean, fast, cap=800) == (False, "takes more memory than there should be")


@pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning")  # stock schedulers under numpy 2
def test_the_real_ones_apply_and_leave_no_trace(tmp_path):
    pipe = diffaccel.load_pipeline("tiny-sd")
    pipe.set_progress_bar_config(disable=True)
    run = standard_run(pipe, 2)
    before, classes = run(), [type(part) for part in pipe.unet.modules()]
    strides = [weight.stride() for weight in pipe.unet.parameters()]
    report = optimize(pipe, steps=2, skip=["compile"], measure=False)
    assert report.kept == ["sequential-cfg", "text", "channels-last"]
    assert [trial.name for trial in report.trials if trial.outcome == "not applicable"] == ["attention"]
    assert strides != [weight.stride() for weight in pipe.unet.parameters()]
    assert torch.allclose(run(), before, atol=1e-3) and report.first is None
    assert "together" not in report.explain()
    report.save(tmp_path)
    assert not (tmp_path / "waterfall.png").exists()
    report.undo()
    assert [type(part) for part in pipe.unet.modules()] == classes and torch.equal(run(), before)
    assert strides == [weight.stride() for weight in pipe.unet.parameters()]


def test_channels_last_and_text_refuse_where_nothing_is_to_gain():
    pipe = diffaccel.load_pipeline("digits-flow")
    for name, message in (("channels-last", "hardly any convolutions"), ("text", "no cross-attention")):
        with pytest.raises(UsageError, match=message):
            accelerations.ACCELERATIONS[name].make(pipe, {})
    pipe = diffaccel.load_pipeline("digits")
    pipe.unet.to(memory_format=torch.channels_last)
    with pytest.raises(UsageError, match="already"):
        accelerations.ACCELERATIONS["channels-last"].make(pipe, {})


def test_the_report_is_written(pipe, monkeypatch, tmp_path):
    planted(monkeypatch, ("slow", {"waste": 2 * WAIT}), ("none", None), ("fast", {"waste": 0.0}))
    report = optimize(pipe, **QUICK)
    report.save(tmp_path)
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["kept"] == ["fast"] and record["steps"] == 2 and record["trials"][2]["ratio"] > 1
    assert record["first"]["bytes"] > 0 and record["environment"]["device"]
    text = (tmp_path / "report.txt").read_text()
    assert "diffaccel.optimize(pipe, only=['fast'], measure=False)" in text and "images bit-equal" in text
    picture = np.array(Image.open(tmp_path / "waterfall.png"))
    assert picture.shape[2] == 3 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 5


def test_nothing_pays(pipe, monkeypatch, tmp_path):
    planted(monkeypatch, ("slow", {"waste": 2 * WAIT}))
    report = optimize(pipe, **QUICK)
    assert report.kept == [] and report.last is None and "nothing pays here" in report.explain()
    report.save(tmp_path)


def test_runs_must_repeat(pipe):
    with pytest.raises(UsageError, match="the same images at every call"):
        optimize(pipe, run=lambda: torch.rand(1, 3, 8, 8))
    with pytest.raises(UsageError, match="must return images"):
        optimize(pipe, run=lambda: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": ["warp"]}, "Unknown acceleration 'warp'"),
        ({"skip": "text"}, "lists of names"),
        ({"rounds": 2}, "rounds is a whole number from 3"),
        ({"seconds": 0}, "seconds is a positive number"),
        ({"memory_cap": 0}, "memory_cap is a whole number from 1"),
        ({"steps": 0}, "steps is a whole number from 1"),
    ],
)
def test_bad_settings(pipe, settings, message):
    with pytest.raises(UsageError, match=message):
        optimize(pipe, **settings)


def test_pipelines_that_need_more_say_so():
    pipe = PIPELINES["sd"].build()
    pipe.__class__ = type("Needy", (type(pipe),), {"__call__": lambda self, image, num_inference_steps=5: None})
    with pytest.raises(UsageError, match="Needy needs image: in Python, pass run="):
        optimize(pipe)
    with pytest.raises(UsageError, match="whole pipelines"):
        optimize(pipe.unet)


def test_steps_are_the_pipelines_own():
    assert default_steps(PIPELINES["sd"].build()) == 50 and default_steps(PIPELINES["flux"].build()) == 28
    assert default_steps(diffaccel.load_pipeline("digits")) == 20


def test_convolutions_of_video_keep_their_layout():
    pipe = copy.deepcopy(PIPELINES["svd"].build())
    before = [weight.stride() for weight in pipe.unet.parameters()]
    switch = accelerations.ACCELERATIONS["channels-last"].make(pipe, {})
    switch.on()
    assert before != [weight.stride() for weight in pipe.unet.parameters()]
    switch.off()
    assert before == [weight.stride() for weight in pipe.unet.parameters()]


def test_images_of_what_runs_return():
    levels = [np.full((2, 4, 4, 3), value, np.uint8) for value in (7, 8)]
    assert difference_of(*map(images_of, levels)) == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(UsageError, match="as many images"):
        difference_of(images_of(levels[0]), images_of(levels[1][:1]))
    grey = Image.fromarray(np.full((4, 4, 3), 255, np.uint8))
    stack = torch.zeros(2, 3, 4, 4)
    assert len(images_of({"images": [grey, grey]})) == 2 and images_of([grey])[0].max() == 1.0
    assert len(images_of((stack,))) == 2 and len(images_of(np.zeros((3, 4, 4, 3)))) == 3
    assert difference_of(images_of(stack), images_of(stack + 1 / 255)) == pytest.approx(1.0)
