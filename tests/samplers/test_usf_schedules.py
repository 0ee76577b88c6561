"""Solver schedules: the plans that they become, what of them remains, and what makes no sense."""

import dataclasses
import itertools
import json
import math
import random

import pytest
import torch
from analytic import two_modes

from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.prediction import convert
from diffaccel.core.schedule import EDM, Flow, VPLinear, from_diffusers
from diffaccel.samplers.plan import Run
from diffaccel.samplers.sample import sample
from diffaccel.samplers.usf import CORRECTORS, RELAXATIONS, TAYLOR_VARIABLES, Decision, SolverSchedule

VP, FLOW, TABLE = VPLinear(), Flow(), from_diffusers({})
ZERO_SNR = from_diffusers(
    {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear", "prediction_type": "sample"}
)
START = torch.tensor([[0.5, -0.3], [1.2, 0.4]], dtype=torch.float64)


def drawn(dice, index: int, last: bool) -> Decision:
    """Any decision that a step may take."""
    core, variable = dice.choice(["noise", "data", "velocity"]), dice.choice(TAYLOR_VARIABLES)
    order, start = dice.randint(1, 4), dice.randint(1, index + 1) if dice.random() < 0.3 else 1
    allowed = RELAXATIONS if variable == "log-rho" and core != "velocity" else ("none", "bh2", "scale")
    return Decision(
        order, core, variable, start,
        points=tuple(dice.randint(q, order) for q in range(1, order)) if dice.random() < 0.4 else (),
        relaxation=dice.choice(allowed),
        strength=dice.uniform(-0.5, 1.5),
        carry=dice.choice([0.0, 0.3]) if start == 1 else 0.0,
        corrector="none" if last else dice.choice(CORRECTORS),
    )  # fmt: skip


def any_schedule(dice, schedule) -> SolverSchedule:
    """Any solver schedule on a noise schedule: its noisiest time or another, its cleanest or another."""
    count = dice.randint(1, 7)
    fractions = sorted(dice.sample(range(1, 40), count), reverse=True)
    fractions[0] = 40 if dice.random() < 0.7 else fractions[0]
    times = [float(schedule.time(fraction / 40)) for fraction in fractions]
    if dice.random() < 0.2:
        times[-1] = schedule.t_min
    end = dice.choice([0.0, 0.0, 0.5 * min(float(schedule.rho(times[-1])), 1e3)])
    steps = tuple(drawn(dice, i, i == count - 1) for i in range(count))
    skip = count > 1 and not isinstance(schedule, Flow) and dice.random() < 0.3
    return SolverSchedule(tuple(times), steps, end, skip)


@pytest.mark.parametrize(
    "schedule", [TABLE, ZERO_SNR, FLOW, EDM(0.002, 700.0, 1.0), VP], ids=lambda s: type(s).__name__
)
def test_any_decisions_make_a_plan_that_knows_the_straight_path(schedule):
    """Where the network always says the same x0, the state at every call is α·x0 + σ·ε, whatever the rule."""
    dice = random.Random(0)
    for _ in range(120):
        decisions = any_schedule(dice, schedule)
        plan, grid = decisions.compile(schedule), decisions.grid(schedule)
        assert len(plan.rows) == decisions.nfe
        assert decisions.nfe == len(decisions.times) - decisions.skip_first + sum(
            step.corrector == "implicit" for step in decisions.steps
        )
        x0 = torch.tensor([0.0 if decisions.skip_first else 0.7], dtype=torch.float64)
        epsilon = torch.tensor([-1.1], dtype=torch.float64)
        nodes = [decisions.node_of_call(call)[0] for call in range(plan.nfe)]
        x, run = grid.alpha[nodes[0]] * x0 + grid.sigma[nodes[0]] * epsilon, Run(plan)
        for row, node, following in zip(plan.rows, nodes, [*nodes[1:], grid.steps], strict=True):
            assert (row.t, row.alpha, row.sigma) == (grid.times[node], grid.alpha[node], grid.sigma[node])
            size = 1.0 + sum(map(abs, (*row.states, *row.outputs)))
            x = run.advance(x, convert(x0, x, "sample", row.quantity, row.alpha, row.sigma))
            expected = grid.alpha[following] * x0 + grid.sigma[following] * epsilon
            assert float((x - expected).abs()) < 1e-11 * size
            x = expected
        assert SolverSchedule.from_dict(json.loads(json.dumps(decisions.to_dict()))) == decisions


@pytest.mark.parametrize("schedule", [TABLE, VP, EDM()], ids=lambda s: type(s).__name__)
def test_a_skipped_first_step_is_a_network_that_sees_noise_only(schedule):
    """Its first output is ε = x/σ, x0 = 0; its other outputs are the teacher's."""
    teacher, dice = two_modes(schedule), random.Random(5)

    def answered(x, t, condition=None):
        return torch.zeros_like(x) if float(t[0]) == times[0] else teacher(x, t, condition)

    for _ in range(40):
        decisions = any_schedule(dice, schedule)
        times = decisions.times
        if len(times) == 1:
            continue
        skipped, whole = (dataclasses.replace(decisions, skip_first=skip).compile(schedule) for skip in (True, False))
        assert whole.initial == 1.0 and skipped.nfe == whole.nfe - 1
        expected = sample(answered, START, whole)
        torch.testing.assert_close(
            sample(teacher, START * skipped.initial, skipped),
            expected,
            rtol=1e-9,
            atol=1e-9 * (1.0 + float(expected.abs().max())),
        )


def test_a_run_remembers_only_what_its_rules_look_back():
    """So that what a pipeline puts into the state between two steps, an inpainting mask say, is not lost."""
    times = (900.0, 700.0, 500.0, 300.0, 150.0, 50.0)

    def depths(*steps, skip=False):
        plan = SolverSchedule(times, (*(*steps, *steps[-1:] * 6)[:5], Decision()), skip_first=skip).compile(TABLE)
        return plan.state_depth, plan.output_depth

    assert depths(Decision()) == depths(Decision(), skip=True) == (1, 1)
    assert depths(Decision(3, "data")) == (3, 3)
    assert depths(Decision(2, "noise", carry=0.2))[0] == 2
    assert depths(Decision(2, "data", corrector="pseudo")) == (3, 3)
    assert depths(Decision(1), Decision(2, start=2), Decision(1), Decision(2, start=2), Decision(1)) == (2, 2)


def test_ends_above_zero():
    teacher = two_modes(VP)
    times = (0.9, 0.6, 0.4, 0.2)
    whole = SolverSchedule(times, (Decision(2, "data"),) * 4, float(VP.rho(0.1)))
    longer = SolverSchedule((*times, 0.1), (*whole.steps, Decision()))
    run, x = Run(longer.compile(VP)), START
    for row in run.plan.rows[:4]:
        x0 = teacher(x, torch.full((2,), row.t, dtype=torch.float64))
        x = run.advance(x, convert(x0, x, "sample", row.quantity, row.alpha, row.sigma))
    torch.testing.assert_close(sample(teacher, START, whole.compile(VP)), x, rtol=1e-12, atol=1e-12)
    assert whole.grid(VP).times[-1] == pytest.approx(0.1) and whole.grid(VP).rho[-1] == pytest.approx(whole.end)
    # Below the cleanest time of a table only the level says where the end is.
    low = dataclasses.replace(whole, times=(900.0, 500.0, 100.0, 0.0), end=1e-3)
    assert low.grid(TABLE).times[-1] == TABLE.t_end and low.grid(TABLE).sigma[-1] == pytest.approx(1e-3, rel=1e-5)
    for (
        variable
    ) in TAYLOR_VARIABLES:  # "bh2" is half the step in the variable, whose place at the end is that of the level
        step = Decision(2, "velocity", variable, relaxation="bh2")
        dataclasses.replace(low, steps=(step,) * 4).compile(TABLE)
    with pytest.raises(UsageError, match="decreasing"):
        dataclasses.replace(whole, end=5.0).compile(VP)


def test_half_a_step_in_time_ends_at_the_cleanest_time():
    """The mark that a grid has for the clean image is no time."""
    step = Decision(2, "velocity", "t", relaxation="bh2")
    (newest, before) = SolverSchedule((300.0, 100.0), (step, step)).compile(TABLE).rows[1].outputs
    weight = 0.5 * (0.0 - 100.0) / (300.0 - 100.0)  # of f_0 − f_1
    reach = before / weight  # what the mean slope has as factor in front
    assert newest == pytest.approx(reach * (1.0 - weight))


def test_tails_and_calls():
    steps = (
        Decision(corrector="implicit"), Decision(2, start=2, corrector="pseudo"), Decision(3, corrector="implicit"),
        Decision(2, start=3),
    )  # fmt: skip
    whole = SolverSchedule((900.0, 600.0, 300.0, 100.0), steps, end=0.01)
    calls = [(0, False), (1, False), (1, True), (2, False), (3, False), (3, True)]
    assert [whole.node_of_call(call) for call in range(whole.nfe)] == calls
    skipped = dataclasses.replace(whole, skip_first=True)
    assert [skipped.node_of_call(call) for call in range(skipped.nfe)] == calls[1:]
    for node in range(4):
        tail = skipped.tail(node)
        assert tail.times == whole.times[node:] and tail.end == whole.end and not tail.skip_first
        assert [step.start for step in tail.steps] == [[1, 2, 1, 3], [1, 1, 3], [1, 1], [1]][node]
        assert [dataclasses.replace(step, start=1) for step in tail.steps] == [
            dataclasses.replace(step, start=1) for step in steps[node:]
        ]
    assert whole.tail(0) == whole


def test_starts_without_signal():
    """α = 0 or nearly: the states that come out are those of a network that is certain of a point."""
    for schedule in (ZERO_SNR, FLOW):
        for core, variable, corrector in itertools.product(("noise", "data", "velocity"), TAYLOR_VARIABLES, CORRECTORS):
            middle = Decision(3, core, variable, corrector=corrector)
            times = tuple(schedule.t_max * share for share in (1.0, 0.8, 0.5, 0.2))
            plan = SolverSchedule(times, (middle, middle, middle, Decision(3, core, variable))).compile(schedule)
            certain = sample(lambda x, t, c: torch.full_like(x, 0.3), START, plan)
            torch.testing.assert_close(certain, torch.full_like(START, 0.3), rtol=1e-9, atol=1e-9)
            assert max(abs(number) for row in plan.rows for number in (*row.states, *row.outputs)) < 100.0


BAD_DECISIONS = [
    ({"order": 0}, "1, 2, 3 or 4"), ({"order": 5}, "1, 2, 3 or 4"), ({"order": True}, "1, 2, 3 or 4"),
    ({"order": 2.0}, "1, 2, 3 or 4"), ({"core": "score"}, "data, noise, velocity"),
    ({"variable": "lambda"}, "log-rho"), ({"start": 0}, "newest node"),
    ({"order": 3, "points": (1, 1)}, "at least q"), ({"points": (1,)}, "whole numbers"),
    ({"relaxation": "bh3"}, "bh2"), ({"relaxation": "bh1", "variable": "t"}, "log-rho"),
    ({"carry": 1.0}, r"\[0, 1\)"), ({"relaxation": "linear", "core": "velocity"}, "noise and data"),
    ({"carry": 0.1, "start": 2}, "momentum"), ({"strength": float("nan")}, "finite"),
    ({"strength": 10**400}, "finite"), ({"corrector": "real"}, "implicit"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "words"), BAD_DECISIONS)
def test_bad_decisions(values, words):
    with pytest.raises(UsageError, match=words):
        Decision(**values)


ONE = Decision()
BAD_SCHEDULES = [
    (((), ()), "as many steps"), (((5.0,), (ONE, ONE)), "as many steps"), (((5.0, 5.0), (ONE, ONE)), "decrease"),
    (((1.0, 5.0), (ONE, ONE)), "decrease"), (((float("nan"),), (ONE,)), "finite"),
    (((5.0,), (ONE,), -1.0), "at least 0"), (((5.0,), (ONE,), 0.0, True), "single step"),
    (((5.0,), (ONE,), 0.0, 1), "true or false"), (((5.0,), (Decision(corrector="pseudo"),)), "last step"),
    (((5.0, 1.0), (Decision(start=2), ONE)), "there are 1"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "words"), BAD_SCHEDULES)
def test_bad_schedules(values, words):
    with pytest.raises(UsageError, match=words):
        SolverSchedule(*values)


def test_schedules_that_do_not_fit_the_noise():
    with pytest.raises(UsageError, match="between 0 and 999"):
        SolverSchedule((1200.0, 3.0), (ONE, ONE)).compile(TABLE)
    with pytest.raises(UsageError, match="flow cannot be skipped"):
        SolverSchedule((900.0, 3.0), (ONE, ONE), skip_first=True).compile(FLOW)
    near = math.nextafter(900.0, 1000.0)
    for variable in TAYLOR_VARIABLES:
        close = SolverSchedule((near, 900.0, 500.0), (Decision(3, "data", variable, corrector="pseudo"),) * 2 + (ONE,))
        try:
            close.compile(TABLE)
        except UsageError as error:
            assert "close together" in str(error) or "decreasing" in str(error)
    with pytest.raises(UsageError, match="not finite"):
        SolverSchedule((900.0, 899.0, 3.0), (ONE, Decision(2, relaxation="scale", strength=1e308), ONE)).compile(TABLE)


@pytest.mark.parametrize(
    "content",
    [
        None, [], "x", {}, {"times": [1.0]}, {"times": 1.0, "steps": [{}]}, {"times": [1.0], "steps": {}},
        {"times": [None], "steps": [{}]}, {"times": [10**400], "steps": [{}]}, {"times": [1.0], "steps": [None]},
        {"times": [1.0], "steps": [{"order": "2"}]}, {"times": [1.0], "steps": [{"core": []}]},
        {"times": [1.0], "steps": [{"points": None}]}, {"times": [1.0], "steps": [{"size": 1}]},
        {"times": [1.0], "steps": [{}], "end": "nan"}, {"times": [1.0], "steps": [{}], "more": 1},
        {"times": [1.0], "steps": [{}], "skip_first": 0},
    ],
)  # fmt: skip
def test_bad_content(content):
    with pytest.raises(DataError, match="makes no sense"):
        SolverSchedule.from_dict(content)
