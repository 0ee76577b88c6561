"""Every method, stopped after some steps and continued by new objects, ends with the bits of a run that nothing stopped."""

import pytest
import torch
from distilling import tiny_task, trained, weights

from diffaccel.distill.registry import get_method

RUNS = {
    "dmd": ("dmd", {}),
    "dmd2": ("dmd", {"gan_weight": 0.01, "critic_steps": 2, "student_steps": 2, "r1_weight": 0.5}),
    "dmd-regression": ("dmd", {"regression_weight": 0.25, "regression_pairs": 6, "regression_steps": 2}),
    "ladd": ("dmd", {"distribution_weight": 0.0, "gan_weight": 1.0, "gan_loss": "hinge"}),
    "f-distill": ("f-distill", {"divergence": "forward-kl", "critic_warmup": 1}),
    "sid": ("sid", {}),
    "disback": ("disback", {"record_steps": 2, "node_interval": 1, "switch_interval": 1}),
    "disback-mismatch": (
        "disback",
        {"base": "f-distill", "record_steps": 2, "node_interval": 1, "switch": "mismatch", "switch_threshold": 10.0},
    ),
    "multi-student": ("multi-student", {"students": 2, "student": 1, "matching_steps": 2, "channels": (4, 8)}),
    "consistency": ("consistency", {"grid_steps": 4, "student_steps": 2}),
    "scott": (
        "consistency",
        {"grid_steps": 3, "student_steps": 2, "substeps": 2, "eta": 0.3, "adversarial_weight": 0.4},
    ),
    "pairs": ("pairs", {"pairs": 6, "pair_steps": 2}),
    "reflow": ("pairs", {"pairs": 6, "pair_steps": 2, "objective": "reflow"}),
}


def built(name: str):
    method, settings = RUNS[name]
    method_class = get_method(method).load(settings)
    return method_class(tiny_task(data=True), method_class.Config(**settings))


@pytest.mark.parametrize("name", RUNS)
def test_a_continued_run_is_the_whole_run(tmp_path, name):
    whole = trained(built(name), tmp_path / "whole", steps=5, batch_size=4)
    trained(built(name), tmp_path / "parts", steps=3, batch_size=4)
    parts = trained(built(name), tmp_path / "parts", steps=5, batch_size=4)
    assert whole.roles.keys() == parts.roles.keys()
    for role, module in whole.roles.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, parts.roles[role].state_dict()[key]), (role, key)
    one, two = whole.extra_state(), parts.extra_state()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert (weights(whole) - weights(built(name))).abs().max() > 1e-4
