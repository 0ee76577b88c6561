import dataclasses

import pytest
import torch

from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import Flow, VPLinear
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.plan import Plan, Row, Run

FIRST = Row(1.0, 0.6, 0.8, "epsilon", (2.0,), (-1.0,))


def test_json_round_trip_is_exact():
    for schedule in (VPLinear(), Flow()):
        plan = deis_plan(make_grid(schedule, 9), 3)
        assert Plan.from_json(plan.to_json()) == plan
    assert plan.nfe == 9 and plan.output_depth == 4


def test_a_run_combines_states_outputs_and_noise_newest_first():
    second = Row(0.5, 0.8, 0.6, "sample", (1.0, 10.0), (100.0, 1000.0), 0.5)
    run = Run(Plan((FIRST, second)))
    x0, x1, m0, m1, z = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(run.advance(x0, m0), 2 * x0 - m0)
    assert run.row is second
    torch.testing.assert_close(run.advance(x1, m1, z), x1 + 10 * x0 + 100 * m1 + 1000 * m0 + 0.5 * z)


def test_a_flow_start_is_remembered_as_state():
    """ε at α = 0 is the initial noise itself, so later rows reach it through the state and not through the output."""
    plan = deis_plan(make_grid(Flow(), 4), 1, "t")
    assert plan.rows[0].quantity == "sample" and plan.rows[1].quantity == "epsilon"
    assert len(plan.rows[1].states) == 2 and len(plan.rows[1].outputs) == 1
    assert [len(row.states) for row in plan.rows[2:]] == [1, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantity": "noise"}, "epsilon"),
        ({"outputs": (float("nan"),)}, "not finite"),
        ({"noise": -1.0}, "negative"),
    ],
)
def test_unusable_rows_are_refused(change, words):
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(FIRST, **change)


def test_unusable_plans_are_refused():
    with pytest.raises(UsageError, match="further"):
        Plan((dataclasses.replace(FIRST, outputs=(1.0, 1.0)),))
    with pytest.raises(UsageError, match="at least one row"):
        Plan(())
    for text in ("{", "[]", '{"rows": [{}]}'):
        with pytest.raises(DataError, match=r"Plan\.to_json"):
            Plan.from_json(text)
