"""Plan files and the scheduler that runs them, without pipelines; see test_searched_pipelines.py for those."""

import copy
import json
import math
import random

import diffusers
import numpy as np
import pytest
import torch
from analytic import two_modes

import diffaccel
from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.prediction import convert
from diffaccel.core.schedule import from_diffusers
from diffaccel.samplers.ddim import ddim_plan
from diffaccel.samplers.log_snr import unipc_plan
from diffaccel.samplers.plan import Plan
from diffaccel.samplers.runge_kutta import TABLEAUX, runge_kutta_plan
from diffaccel.samplers.sample import sample
from diffaccel.samplers.searched import PlanFile, SearchedScheduler, model_config
from diffaccel.samplers.usf import Decision, SolverSchedule

pytestmark = pytest.mark.filterwarnings("ignore:.*leaves layers out")  # its plans do, for what is read and written
STEPS = (
    Decision(), Decision(2, "velocity", "angle", corrector="implicit"), Decision(3, "data", corrector="pseudo"),
    Decision(2, start=2, relaxation="bh1"), Decision(2, "noise", "t", carry=0.1),
)  # fmt: skip
STOCK = {
    "vp": diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction"),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    "edm": diffusers.EDMDPMSolverMultistepScheduler(sigma_max=60.0),
}


def decided(config, skip_first=False, end=0.0) -> PlanFile:
    """A plan of 6 calls (5 without the first) that has something of everything."""
    schedule = from_diffusers({"num_train_timesteps": 1000, **config})
    times = tuple(float(schedule.time(share)) for share in (1.0, 0.8, 0.55, 0.3, 0.1))
    decisions = SolverSchedule(times, STEPS, end, skip_first)
    record = {"score": 0.1, "notes": ["schöne Bilder", None], "cost": {"images": 10**6}}
    return PlanFile(decisions.compile(schedule), decisions, model_config(config), record, {"unet": [0, 1]})


def raw(config, plan=None) -> PlanFile:
    """A rule that no solver schedule expresses."""
    grid = make_grid(from_diffusers(config), 5)
    return PlanFile(unipc_plan(grid, 3) if plan is None else plan(grid), None, model_config(config))


FILE = decided(STOCK["vp"].config)


@pytest.mark.parametrize("family", STOCK)
@pytest.mark.parametrize("make", [decided, raw, lambda c: decided(c, end=0.01)], ids=["decided", "raw", "end"])
def test_round_trip(family, make, tmp_path):
    file = make(STOCK[family].config)
    file.save(tmp_path / "plan.json")
    again = PlanFile.load(tmp_path / "plan.json")
    assert again == file and again.to_dict() == file.to_dict()
    assert SearchedScheduler(again.to_dict(), **file.scheduler).file == file
    assert from_diffusers({"num_train_timesteps": 1000, **file.scheduler}).t_max == from_diffusers(STOCK[family]).t_max


@pytest.mark.parametrize("tableau", TABLEAUX)
def test_plans_without_decisions_may_be_of_any_deterministic_rule(tableau):
    file = raw(STOCK["vp"].config, lambda grid: runge_kutta_plan(grid, tableau))
    assert PlanFile.from_dict(file.to_dict()) == file


@pytest.mark.parametrize("family", STOCK)
@pytest.mark.parametrize("make", [decided, raw])
def test_the_scheduler_executes_the_plan(family, make, tmp_path):
    """From the beginning it is `sample`; begun at a later call, it is that of what remains."""
    file, config = make(STOCK[family].config), STOCK[family].config
    file.save(tmp_path / "plan.json")
    scheduler, alone = (SearchedScheduler.from_file(tmp_path / "plan.json", c) for c in (config, None))
    schedule, plan = from_diffusers(config), file.plan
    teacher, start = two_modes(schedule), torch.randn(4, 2, dtype=torch.float64)
    for begin in range(plan.nfe):
        if begin == 0:
            expected = sample(teacher, start, plan)
        elif file.decisions is None:
            times = [row.t for row in plan.rows[begin:]]
            expected = sample(teacher, start, ddim_plan(make_grid(schedule, timesteps=times)))
        else:
            node, _ = file.decisions.node_of_call(begin)
            expected = sample(teacher, start, file.decisions.tail(node).compile(schedule))
        for one in (scheduler, alone):
            assert one.calls(7) == one.steps_for(plan.nfe) == plan.nfe
            one.set_timesteps(plan.nfe)
            one.set_begin_index(begin)
            x = start
            for t, row in zip(one.timesteps[begin:], plan.rows[begin:], strict=True):
                assert one.level_at(t) == (row.alpha, row.sigma)
                x0 = teacher(x, torch.full((4,), row.t, dtype=torch.float64))
                output = convert(x0, x, "sample", one._network_output, row.alpha, row.sigma)
                x = one.step(output, t, x, return_dict=False)[0]
            assert one.step_index == plan.nfe
            torch.testing.assert_close(x, expected, rtol=1e-7, atol=1e-7)


def test_a_skipped_first_step_scales_the_noise():
    file = decided(STOCK["vp"].config, skip_first=True)
    scheduler = SearchedScheduler.from_config(STOCK["vp"].config, plan=file.to_dict())
    scheduler.set_timesteps(5)
    assert scheduler.init_noise_sigma == file.plan.initial < 1.0 and len(scheduler.timesteps) == file.plan.nfe == 5
    with pytest.raises(DataError, match="flow cannot be skipped"):
        content = decided(STOCK["flow"].config).to_dict()
        content["decisions"]["skip_first"] = True
        PlanFile.from_dict(content)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_copies(dtype):
    scheduler = SearchedScheduler.from_config(STOCK["flow"].config, plan=decided(STOCK["flow"].config).to_dict())
    scheduler.set_timesteps(6, mu=1.0)
    exact, half = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
    x = torch.randn(2, 4, 8, 8)
    y = x.to(dtype)
    for index, t in enumerate(scheduler.timesteps):
        if index == 3:  # a copy under way goes on by itself
            half, idle = copy.deepcopy(half), half
        x, y = exact.step(x.cos(), t, x)[0], half.step(y.cos(), t, y)[0]
    assert y.dtype == dtype and float((y.float() - x).norm() / x.norm()) < (0.01 if dtype == torch.float16 else 0.05)
    assert scheduler.step_index is None and idle.step_index == 3 and half.step_index == 6


@pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning")  # of stock schedulers on numpy 2
@pytest.mark.parametrize(
    ("family", "back"),
    [
        ("vp", diffusers.DPMSolverMultistepScheduler), ("vp", diffusers.DDIMScheduler),
        ("vp", diffusers.EulerDiscreteScheduler), ("vp", diffaccel.DEISScheduler),
        ("flow", diffusers.FlowMatchEulerDiscreteScheduler), ("flow", diffaccel.FlowAdamsScheduler),
        ("edm", diffusers.EDMEulerScheduler), ("edm", diffaccel.DDIMScheduler),
    ],
)  # fmt: skip
def test_the_configuration_travels_through_other_schedulers(family, back):
    file = decided(STOCK[family].config)
    scheduler = SearchedScheduler.from_config(STOCK[family].config, plan=file.to_dict())
    other = back.from_config(scheduler.config)
    other.set_timesteps(3, **({"mu": 1.0} if family == "flow" else {}))
    again = SearchedScheduler.from_config(other.config)
    again.set_timesteps(6)
    assert again.file == file and model_config(again.config) == model_config(scheduler.config)
    assert SearchedScheduler.from_config(again.config).file == file


@pytest.mark.parametrize(
    "call",
    [
        {"num_inference_steps": 7}, {"num_inference_steps": 6.5}, {"num_inference_steps": "6"}, {"nfe": 5},
        {"num_inference_steps": 6, "nfe": 12}, {"timesteps": [900, 500]}, {"timesteps": [5, 4, 3, 2, 1, 0]},
        {"sigmas": [9.0, 4.0, 3.0, 1.0, 0.5, 0.1]}, {"sigmas": [1.0, 0.5]}, {"sigmas": []}, {"sigmas": "abcdef"},
        {"sigmas": [1, None]}, {"sigmas": np.full(6, np.nan)}, {"num_inference_steps": 6, "sigmas": torch.ones(5)},
    ],
)  # fmt: skip
def test_other_calls_are_refused(call):
    scheduler = SearchedScheduler.from_config(STOCK["vp"].config, plan=FILE.to_dict())
    with pytest.raises(UsageError, match="pass num_inference_steps=6"):
        scheduler.set_timesteps(**call)
    with pytest.raises(UsageError, match="6 network calls"):
        scheduler.steps_for(5)


def test_what_pipelines_pass_by_themselves_is_set_aside():
    scheduler = SearchedScheduler.from_config(STOCK["flow"].config, plan=decided(STOCK["flow"].config).to_dict())
    for call in (
        {},
        {"nfe": 6},
        {"sigmas": np.linspace(1, 1 / 6, 6), "mu": 1.1},
        {"sigmas": torch.linspace(1, 0, 7)[:-1]},
    ):
        scheduler.set_timesteps(**call)
        assert len(scheduler.timesteps) == 6


def test_misuse_of_the_scheduler(tmp_path):
    FILE.save(tmp_path / "plan.json")
    with pytest.raises(UsageError, match="needs a plan"):
        SearchedScheduler.from_config(STOCK["vp"].config)
    with pytest.raises(UsageError, match="plan must be dict"):
        SearchedScheduler(plan=3)
    with pytest.raises(UsageError, match=r"pipe\.scheduler\.config"):
        SearchedScheduler.from_file(tmp_path / "plan.json", STOCK["vp"])
    for other in (
        diffusers.DDIMScheduler(),
        STOCK["flow"],
        STOCK["edm"],
        diffusers.DDIMScheduler(num_train_timesteps=500),
    ):
        with pytest.raises(UsageError, match="searched for another noise schedule"):
            SearchedScheduler.from_file(tmp_path / "plan.json", other.config)
    scheduler = SearchedScheduler.from_file(tmp_path / "plan.json", STOCK["vp"].config)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(6)
    with pytest.raises(UsageError, match="begin at call 6 of 6"):
        scheduler.step(torch.ones(1), 1, torch.ones(1))
    with pytest.raises(UsageError, match="finite numbers"):
        PlanFile(FILE.plan, record={"score": math.inf}).save(tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()


def edited(change, file=FILE) -> dict:
    content = copy.deepcopy(file.to_dict())
    change(content)
    return content


def put(*path, value):
    """Replace, or add, what lies at a path."""

    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def drop(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def nested(depth: int):
    value = []
    for _ in range(depth):
        value = [value]
    return value


DAMAGES = [
    (put("format", value="plan"), "does not say"), (drop("format"), "does not say"),
    (put("version", value=2), "version 2"), (put("version", value="1"), "version '1'"),
    (drop("version"), "version None"), (drop("plan"), "plan is missing"), (drop("nfe"), "None network calls"),
    (put("nfe", value=5), "5 network calls, but its table has 6"), (put("extra", value=1), "Unknown setting 'extra'"),
    (put("layers", value=[]), "layers must be"), (put("record", value=None), "record must be"),
    (put("record", "x", value=math.nan), "finite"), (put("record", "x", value=nested(2000)), "recursion"),
    (put("decisions", value=[]), "group of settings"),
    (put("decisions", "times", 0, value=940.0), "does not|do not follow"),
    (put("decisions", "times", 0, value="x"), "float"),
    (put("decisions", "times", value=[1.0, 2.0, 3.0, 4.0, 5.0]), "must decrease"),
    (put("decisions", "times", 0, value=10**400), "large"),
    (put("decisions", "times", 0, value=5000.0), "between 0 and 999"),
    (put("decisions", "steps", 1, "order", value="2"), "order must be int"),
    (put("decisions", "steps", 1, "order", value=True), "order must be int"),
    (put("decisions", "steps", 1, "order", value=10**9), "1, 2, 3 or 4"),
    (put("decisions", "steps", 1, "order", value=1), "follow"),
    (put("decisions", "steps", 1, "size", value=3), "Unknown setting"),
    (put("decisions", "steps", 1, "core", value="x0"), "Unknown core"),
    (put("decisions", "steps", 1, "core", value=[]), "str"),
    (put("decisions", "steps", 3, "start", value=9), "cannot start 9"),
    (put("decisions", "end", value=-1), "at least 0"), (put("decisions", "end", value=0.5), "decreasing"),
    (put("decisions", "steps", 4, "corrector", value="pseudo"), "last step"),
    (put("scheduler", value={}), "another noise schedule"),
    (put("scheduler", "beta_schedule", value="cubic"), "Unknown beta_schedule"),
    (put("scheduler", "beta_end", value="x"), "float"),
    (put("scheduler", "num_train_timesteps", value=-1), "no noise schedule"),
    (put("scheduler", "beta_start", value=-1.0), "no noise"),
    (put("scheduler", "timestep_spacin", value=1), "Unknown key of its scheduler"),
    (put("scheduler", value=3), "scheduler must be"), (put("plan", "rows", value=[]), "at least one row"),
    (put("plan", "rows", value=None), "must be a list"), (drop("plan", "rows", 2), "reaches back"),
    (drop("plan", "rows", 5), "follow"), (drop("plan", "rows", 2, "alpha"), "alpha is missing"),
    (put("plan", "rows", 2, "beta", value=1.0), "Unknown setting"),
    (put("plan", "rows", 2, "states", 0, value=2.0), "follow"),
    (put("plan", "rows", 2, "outputs", value=[1.0] * 9), "reaches back"),
    (put("plan", "rows", 2, "quantity", value="x"), "quantity"),
    (put("plan", "rows", 2, "quantity", value="epsilon"), "follow"),
    (put("plan", "rows", 2, "noise", value=0.1), "follow"), (put("plan", "rows", 2, "noise", value=-0.1), "negative"),
    (put("plan", "rows", 2, "t", value=0.5), "another noise"),
    (put("plan", "rows", 2, "sigma", value=0.5), "another noise"), (put("plan", "initial", value=0.9), "follow"),
    (put("plan", "initial", value=0.0), "above 0"), (put("plan", "order", value=True), "order must be int"),
    (put("plan", "order", value=0), "order of at least 1"), (put("plan", "name", value=None), "name must be str"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), DAMAGES)
def test_damaged_plans(change, words):
    """One sentence, whether from a file or from a configuration."""
    with pytest.raises(DataError, match=words) as caught:
        PlanFile.from_dict(edited(change))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and caught.value.exit_code == 3


RAW_DAMAGES = [
    (put("plan", "rows", 2, "states", 0, value=2.0), "lead to no noise level"),
    (put("plan", "rows", 2, "outputs", value=[]), "lead to no noise level"),
    (lambda c: c["plan"]["rows"][2].update(states=[], outputs=[]), "keeps nothing"),
    (put("plan", "rows", 2, "noise", value=0.1), "adds noise"),
    (lambda c: c["plan"]["rows"].reverse(), "reaches back|lead to no"),
    (put("plan", "rows", 4, "t", value=-1.0), "must lie between 0 and 999"),
    (put("plan", "rows", 2, "states", 0, value=1e308), "lead to no noise level"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), RAW_DAMAGES)
def test_damaged_plans_without_decisions(change, words):
    with pytest.raises(DataError, match=words):
        PlanFile.from_dict(edited(change, raw(STOCK["vp"].config)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"), ("[" * 100000, "recursion"), ("\x00\xff", "codec|Expecting"), ("{}", "does not say"),
        ("[]", "does not say"), ("3", "does not say"), (json.dumps(FILE.to_dict())[:-500], "Cannot read"),
        (json.dumps(FILE.to_dict()).replace('"score": 0.1', '"score": NaN'), "finite"),
        (json.dumps(FILE.to_dict()).replace('"score": 0.1', '"score": -Infinity'), "finite"),
        (json.dumps(FILE.to_dict()).replace('"score": 0.1', '"score": 1e400'), "finite"),
        (json.dumps(FILE.to_dict()).replace('"score": 0.1', '"score": ' + "9" * 5000), "Cannot read"),
    ],
)  # fmt: skip
def test_damaged_files(text, words, tmp_path):
    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=words) as caught:
        PlanFile.load(tmp_path / "plan.json")
    assert "plan.json" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="directory"):
        PlanFile.load(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        PlanFile.load(tmp_path / "other.json")


@pytest.mark.parametrize("file", [FILE, raw(STOCK["flow"].config)], ids=["decided", "raw"])
def test_any_damage_is_told_or_harmless(file):
    """Any value replaced by any other: refused in one sentence, or a plan of finite numbers remains."""
    text, dice = json.dumps(file.to_dict()), random.Random(0)
    refused = 0
    for _ in range(500):
        whole = json.loads(text)
        put(
            *dice.choice(list(_places(whole))),
            value=dice.choice([None, "x", -1, 0, True, math.nan, [], {}, math.inf, 10**400, 1e300]),
        )(whole)
        try:
            plan = PlanFile.from_dict(whole).plan
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert isinstance(plan, Plan)
            assert all(math.isfinite(n) for row in plan.rows for n in (row.t, *row.states, *row.outputs))
    assert refused > 400


def _places(content, *path):
    """The paths of everything in a JSON value."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, *path, key)


def test_a_scheduler_alone_leaves_no_layers_out_and_says_so(tmp_path):
    FILE.save(tmp_path / "plan.json")
    with pytest.warns(UserWarning, match=r"leaves layers out.*diffaccel.apply_plan"):
        SearchedScheduler.from_file(tmp_path / "plan.json")
