"""The choice among measurements, and the clock behind them."""

import time

import pytest
import torch

from diffaccel.attention.choose import choose
from diffaccel.attention.measure import Measurement
from diffaccel.attention.timing import alternate, medians

CPU = torch.device("cpu")


def table(**rows):
    return [Measurement(name, None, seconds, size) for name, (seconds, size) in rows.items()]


@pytest.mark.parametrize(
    "rows, cap, chosen",
    [
        ({"default": (1.0, 10), "flash": (0.96, 10)}, None, "default"),
        ({"default": (1.0, 10), "flash": (0.94, 10)}, None, "flash"),
        ({"default": (1.0, 10), "flash": (0.5, 100), "math": (0.8, 10)}, 50, "math"),
        ({"default": (1.0, 100), "flash": (3.0, 10), "math": (2.0, 10)}, 50, "math"),
        ({"default": (1.0, 100), "flash": (3.0, 60)}, 50, "flash"),
        ({"default": (1.0, 100)}, None, "default"),
    ],
)
def test_choice(rows, cap, chosen):
    assert choose(table(**rows), cap)[0] == chosen


def test_the_excluded_are_not_chosen():
    assert choose([*table(default=(1.0, 1)), Measurement("fast", excluded="wrong")])[0] == "default"


def test_contenders_take_turns():
    order = []
    runs = {name: lambda name=name: (order.append(name), time.sleep(6e-3)) for name in "ab"}
    times = medians(alternate(runs, CPU, rounds=4))
    assert set(times) == set("ab") and all(6e-3 <= seconds < 1e-1 for seconds in times.values())
    rounds = ["".join(order[start : start + 2]) for start in range(len(order) - 8, len(order), 2)]
    assert set(rounds) == {"ab", "ba"}  # in every round each of them, and not always in the same order


def test_slow_contenders_are_told_apart_and_the_time_is_limited():
    start = time.perf_counter()
    times = medians(
        alternate({"slow": lambda: time.sleep(4e-3), "fast": lambda: time.sleep(1e-3)}, CPU, 1000, seconds=0.05)
    )
    assert times["slow"] > 2 * times["fast"]
    assert time.perf_counter() - start < 2.0
