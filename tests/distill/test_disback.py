"""DisBack: equal to its base without nodes, taught by what was really recorded, in reverse, however often interrupted."""

import shutil

import pytest
import torch
from distilling import draw, tiny_task, trained, weights
from networks import tiny_unet
from safetensors.torch import load_file
from torch import nn

from diffaccel.core.errors import DataError, UsageError
from diffaccel.distill.adapters import AdapterConfig, SharedBase
from diffaccel.distill.methods.around import BASES
from diffaccel.distill.methods.disback import BacktrackingConfig, DisBack
from diffaccel.distill.methods.sid import SiD
from diffaccel.distill.task import Task


def disback(base="dmd", task=None, record_steps=6, **settings):
    method = DisBack.variant({"base": base})
    config = method.Config(**{"node_interval": 2, "switch_interval": 2, "record_steps": record_steps, **settings})
    return method(task or tiny_task(data=base == "f-distill"), config)


def vector(denoiser) -> torch.Tensor:
    return nn.utils.parameters_to_vector(denoiser.parameters()).detach().clone()


def taught(method) -> list[torch.Tensor]:
    """Fills, while the method trains, with the weights of what teaches the student at each of its updates."""
    found, student_loss = [], method._student_loss

    def watched(draw):
        found.append(vector(method.real.denoiser))
        return student_loss(draw)

    method._student_loss = watched
    return found


@pytest.mark.parametrize("base", BASES)
def test_with_the_teacher_alone_it_is_its_base(tmp_path, base):
    plain = BASES[base](tiny_task(data=base == "f-distill"), BASES[base].Config(critic_warmup=1))
    other = disback(base, record_steps=0, critic_warmup=1)
    trained(plain, tmp_path / "base", steps=4)
    trained(other, tmp_path / "disback", steps=4)
    assert list(plain.roles) == list(other.roles)
    for role in plain.roles:
        assert torch.equal(weights(plain, role), weights(other, role))
    assert not torch.equal(weights(plain), vector(plain.teacher))
    assert not (tmp_path / "disback/nodes").exists()


@pytest.mark.parametrize("base", BASES)
def test_the_student_is_taught_by_every_node_in_reverse_and_then_by_the_teacher(tmp_path, base):
    method = disback(base)
    start, critics, end_step, sequence = vector(method.teacher), {}, method.end_step, taught(method)

    def recording(step):
        critics[step + 1] = vector(method.roles["critic"])
        end_step(step)

    method.end_step = recording
    trained(method, tmp_path / "run", steps=12)
    # Three teachers of two updates each: the critic after 4 steps, after 2, and the teacher.
    expected = [critics[4]] * 2 + [critics[2]] * 2 + [start] * 2
    assert [torch.equal(*pair) for pair in zip(sequence, expected, strict=True)] == [True] * 6
    assert min((critics[4] - critics[2]).abs().max(), (critics[2] - start).abs().max()) > 1e-4
    assert method.real.denoiser is method.teacher and torch.equal(vector(method.teacher), start)
    assert sorted(path.name for path in (tmp_path / "run/nodes").iterdir()) == ["node-0001", "node-0002"]


def test_while_nodes_are_recorded_the_student_rests_and_the_critic_learns(tmp_path):
    method = trained(disback(critic_warmup=1), tmp_path / "run", steps=6)
    assert torch.equal(weights(method), vector(method.teacher))
    assert not torch.equal(weights(method, "critic"), vector(method.teacher))
    names = [[phase.name for phase in method.phases(step)] for step in (0, 5, 6, 7)]
    assert names == [["critic"], ["critic"], ["critic"], ["critic", "student"]]  # recording, then the base's warm-up
    assert [method.node_at(step) for step in (7, 8, 9, 10, 11, 99)] == [2, 2, 1, 1, 0, 0]
    assert method.config.resting_steps() == 7


@pytest.mark.parametrize(("switch", "stops"), [("interval", (3, 7)), ("mismatch", (8, 9))])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, switch, stops):
    settings = {"switch": switch, "switch_threshold": 0.9, "switch_decay": 0.5}
    whole = trained(disback(**settings), tmp_path / "whole", steps=12)
    for steps in (*stops, 12):
        parts = trained(disback(**settings), tmp_path / "parts", steps=steps)
    for role in whole.roles:
        assert torch.equal(weights(whole, role), weights(parts, role))
    assert whole.node_at(12) == parts.node_at(12) == 0
    assert torch.equal(whole._mismatch, parts._mismatch)


def test_a_node_is_left_when_the_critic_has_come_to_it():
    method = disback(switch="mismatch", switch_threshold=0.3, switch_decay=0.5)
    student = method.phases(6)[-1]

    def update(difference: float, parts: int = 1) -> int:
        for _ in range(parts):
            fake = torch.full((4, 1, 8, 8), difference)
            method.watch({}, fake, torch.zeros_like(fake), torch.full((4, 1, 1, 1), 2.0))
        method.end_phase(student, lambda value: value)
        return method.node_at(6)

    assert [update(0.4) for _ in range(3)] == [2, 2, 2]  # the average of 0.2 from 1 on: 0.6, 0.4, 0.3 exactly
    assert [update(0.4, parts=2), float(method._mismatch)] == [1, 1.0]  # 0.25; it starts anew under the next node
    assert [update(4.0), update(4.0)] == [1, 1]
    assert [update(0.0) for _ in range(3)] == [1, 1, 0]
    assert update(0.0) == 0  # nothing follows the teacher
    critic = method.phases(6)[0]
    before = method.extra_state()
    method.end_phase(critic, lambda value: value)
    assert method.extra_state() == before


def test_accumulation_changes_no_switch(tmp_path):
    settings = {"switch": "mismatch", "switch_threshold": 0.9, "switch_decay": 0.5}
    whole = trained(disback(**settings), tmp_path / "whole", steps=8)
    parts = trained(disback(**settings), tmp_path / "parts", steps=8, micro_batches=4)
    assert torch.equal(whole._passed, parts._passed) and whole._passed > 0
    assert torch.allclose(whole._mismatch, parts._mismatch, atol=1e-5)


def test_guidance_is_that_of_the_node_and_of_its_degraded_empty_condition(tmp_path):
    method = trained(disback(guidance_scale=2.0), tmp_path / "run", steps=7)
    node = method.real.denoiser
    assert method.real.scale == 2.0 and node is not method.teacher
    x = torch.zeros(2, 1, 8, 8)
    t, empty = torch.full((2,), 500.0), method.teacher.null_condition(2)
    assert not torch.allclose(node(x, t, empty), method.teacher(x, t, empty), atol=1e-4)
    labels = [method.student_sample(draw(400, step, "critic/0"), False)[1]["class_labels"] for step in (0, 6)]
    assert 20 < (labels[0] == 10).sum() < 60 and not (labels[1] == 10).any()
    assert torch.equal(labels[1], method.conditions.draw(draw(400, 6, "critic/0")))


def test_nodes_of_adapters_are_adapters(tmp_path):
    plain = tiny_task()
    shared = SharedBase(plain.teacher, AdapterConfig(rank=2))
    method = disback(task=Task(shared.teacher, plain.conditions, shared=shared))
    found = taught(method)
    trained(method, tmp_path / "run", steps=9)
    node = load_file(tmp_path / "run/nodes/node-0002/critic.safetensors")
    assert set(node) == set(method.roles["critic"].state_dict())
    assert sum(value.numel() for value in node.values()) == len(found[0]) < len(vector(tiny_task().teacher)) / 4
    assert [torch.equal(found[0], other) for other in found] == [True, True, False]


def test_nodes_may_take_half_the_space(tmp_path):
    full = trained(disback(), tmp_path / "full", steps=7)
    half = trained(disback(node_precision="bfloat16"), tmp_path / "half", steps=7)
    sizes = [(tmp_path / name / "nodes/node-0002/critic.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    nodes = [vector(method.real.denoiser) for method in (full, half)]
    assert torch.equal(nodes[0].bfloat16().float(), nodes[1])


@pytest.mark.parametrize("damage", ["gone", "truncated", "later"])
def test_a_node_that_is_not_as_it_was_ends_the_run_before_any_update(tmp_path, damage):
    trained(disback(), tmp_path / "run", steps=7)
    node = tmp_path / "run/nodes" / ("node-0001" if damage == "later" else "node-0002")
    if damage == "truncated":
        file = node / "critic.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
    else:
        shutil.rmtree(node)
    with pytest.raises(DataError, match=f"{node.name} cannot teach.*new run"):
        trained(disback(), tmp_path / "run", steps=8)


def test_a_network_of_another_shape_does_not_take_a_node(tmp_path):
    trained(disback(), tmp_path / "run", steps=6)
    other = disback()
    other.begin(tmp_path / "run")
    other.teacher.net = tiny_unet(5)
    with pytest.raises(DataError, match="does not fit the model"):
        other.loss(other.phases(6)[-1], draw(step=6))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"record_steps": -2}, "record_steps must be a multiple"),
        ({"record_steps": 5}, "record_steps must be a multiple"),
        ({"node_interval": 0}, "node_interval must be at least 1"),
        ({"switch_interval": 0}, "switch_interval must be at least 1"),
        ({"switch": "step"}, "method.switch"),
        ({"node_precision": "float16"}, "method.node_precision"),
        ({"switch_threshold": float("nan")}, "switch_threshold must be positive"),
        ({"switch_decay": 1.0}, "switch_decay must be in"),
        ({"distribution_weight": 0.0, "gan_weight": 1.0}, "disback degrades the critic"),
        ({"critic_steps": 0}, "critic_steps must be at least 1"),
    ],
)
def test_impossible_settings_are_named(change, words):
    with pytest.raises(UsageError, match=words):
        DisBack.variant({}).Config(**{"record_steps": 6, "node_interval": 2, **change})


def test_a_base_that_cannot_be_wrapped_is_named():
    with pytest.raises(UsageError, match=r"Unknown method\.base of disback 'pairs'"):
        DisBack.variant({"base": "pairs"})
    assert issubclass(DisBack.variant({"base": "sid"}).Config, BacktrackingConfig | SiD.Config)
    assert DisBack.variant({}) is DisBack.variant({"base": "dmd"})
    mine = type("Mine", (DisBack, BASES["dmd"]), {})  # around a method from outside the package
    assert mine.variant({"base": "dmd"}) is mine
