"""How many steps a time allows: arithmetic, and the probe that it starts from."""

import tempfile

import pytest

from diffaccel.core.errors import UsageError
from diffaccel.distill.budget import Pace, measure_pace
from diffaccel.distill.run import check_method, resolve_distillation


def test_steps_at_the_start_may_cost_less():
    pace = Pace(preparation=2.0, rests={"critic_warmup": (10, 0.5), "record_steps": (4, 0.25)}, step=1.0)
    assert pace.steps_within(18.5) == 14 + 10  # 2 + 5 + 1 seconds before, 10.5 left
    assert Pace(0.0, {}, 0.5, students=4).steps_within(20.0) == 10


def test_a_budget_that_ends_before_the_student_learns_says_how_much_it_takes():
    with pytest.raises(UsageError, match=r"at least 9\.0 s .* lower method\.critic_warmup"):
        Pace(3.0, {"critic_warmup": (10, 0.5)}, 1.0).steps_within(8.5)


@pytest.mark.parametrize("method", [{"name": "f-distill"}, {"name": "disback", "record_steps": 40}])
def test_a_probe_times_both_kinds_of_steps_and_leaves_nothing(method, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trainer = {"batch_size": 4, "steps": 400, "device": "cpu"}
    config = resolve_distillation({"teacher": "digits", "method": method, "trainer": trainer})
    check_method(config)
    before = dict(config.method)
    pace = measure_pace(config)
    resting, count = ("critic_warmup", 50) if method["name"] == "f-distill" else ("record_steps", 40)
    assert pace.rests[resting][0] == count
    assert pace.step > max(each for _, each in pace.rests.values()) > 0.0  # a student's update comes on top
    assert pace.preparation > 0.0 and config.method == before and list(tmp_path.glob("diffaccel-*")) == []
