"""The plan before training: bytes and operations against what training takes, refusals, and the text."""

import copy
from dataclasses import replace

import diffusers
import pytest
import torch
from distilling import draw, tiny_task, tiny_teacher
from networks import tiny_unet
from torch import nn

from diffaccel.core.errors import UsageError
from diffaccel.core.memory import peak_bytes
from diffaccel.core.rng import KeyedRandom
from diffaccel.core.schedule import VPDiscrete
from diffaccel.distill import machine
from diffaccel.distill import plan as plans
from diffaccel.distill.adapters import AdapterConfig, SharedBase
from diffaccel.distill.discriminator import FeatureDiscriminator
from diffaccel.distill.machine import Speed, free_bytes, measure_speed
from diffaccel.distill.methods.dmd import DMD
from diffaccel.distill.plan import make_plan, size
from diffaccel.distill.registry import get_method
from diffaccel.distill.rehearsal import Rehearsal
from diffaccel.distill.task import Task
from diffaccel.distill.updates import Update
from diffaccel.models.conditions import ClassConditions
from diffaccel.models.denoiser import NetworkDenoiser
from diffaccel.models.pixel import PixelDenoiser
from diffaccel.models.released import released_teacher
from diffaccel.training.config import TrainerConfig
from diffaccel.training.ema import EMA
from diffaccel.training.method import Draw, Phase

VP = VPDiscrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))
CPU, FAST = torch.device("cpu"), Speed(flops=1e12, operator=1e-6)
STUDENT = Update("student", ("student",), {"student": 1}, beside={"teacher": 2, "critic": 1})
CRITIC = Update("critic", ("critic",), {"critic": 1}, before={"student": 1})


def small_teacher() -> PixelDenoiser:
    """Large enough that its activations outweigh a loss."""
    unet = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16,), norm_num_groups=4,
        down_block_types=("AttnDownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=8, num_class_embeds=11,
    )  # fmt: skip
    return PixelDenoiser(unet, VP, "epsilon")


def wide_teacher() -> PixelDenoiser:
    """Of few operators, and more parameters than adapters have."""
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        num_layers=1,
        sample_size=16,
        num_embeds_ada_norm=10,
        out_channels=4,
    )
    return PixelDenoiser(dit, VP, "epsilon")


def roles_of(teacher) -> dict:
    return {"teacher": (teacher, False), "student": (teacher, True), "critic": (teacher, True)}


def plan_of(teacher, trainer=None, **settings):
    settings = {"speed": FAST, "free": 2**40} | settings
    return make_plan(roles_of(teacher), [CRITIC, STUDENT], trainer or TrainerConfig(batch_size=8), **settings)


def measured(method: DMD, phase: Phase, count: int, accumulated: bool) -> int:
    """Bytes of a real micro-batch beyond weights: activations and gradients."""
    trained = [parameter for name in phase.trains for parameter in method.roles[name].parameters()]
    for module in method.roles.values():
        module.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True).grad = torch.zeros_like(parameter) if accumulated else None
    draw = Draw(KeyedRandom(0), phase.name, 0, 0, count, count, CPU)
    peak = peak_bytes(lambda: method.loss(phase, draw).total.backward(), CPU)
    return peak + accumulated * sum(parameter.nbytes for parameter in trained)


@pytest.mark.parametrize("mode", ["full", "checkpointing-accumulated", "lora", "lora-checkpointing"])
def test_the_peak_of_an_update_is_that_of_training(mode):
    teacher = small_teacher()
    adapters = AdapterConfig(rank=4) if "lora" in mode else None
    trainer = TrainerConfig(batch_size=6, gradient_checkpointing="checkpointing" in mode)
    trainer = replace(trainer, batch_size=12, micro_batches=2) if "accumulated" in mode else trainer
    plan = plan_of(teacher, trainer, adapters=adapters)
    shared = SharedBase(teacher, adapters) if adapters else None
    method = DMD(Task(teacher, ClassConditions(10), shared=shared), DMD.Config(guidance_scale=2.0))
    if trainer.gradient_checkpointing:
        method.enable_gradient_checkpointing()
    for phase, (update, cost) in zip(method.phases(0), plan.updates, strict=True):
        assert update.name == phase.name
        real = measured(method, phase, 6, "accumulated" in mode)
        assert 0.9 * real < cost.peak < 1.1 * real


GAN = {"gan_weight": 0.1}
EVALUATIONS = {
    "dmd": ("dmd", {}, 5),
    "guided": ("dmd", {"guidance_scale": 2.0, "critic_steps": 3}, 10),
    "three steps": ("dmd", {"student_steps": 3}, 7),
    "gan": ("dmd", GAN, 7),
    "guided gan": ("dmd", GAN | {"guidance_scale": 2.0}, 9),
    "r1": ("dmd", GAN | {"r1_weight": 1.0}, 8),
    "ladd": ("dmd", GAN | {"distribution_weight": 0.0}, 5),
    "regression": ("dmd", {"regression_weight": 0.2, "regression_pairs": 8}, 6),
    "f-distill": ("f-distill", {}, 7),
    "guided f-distill": ("f-distill", {"guidance_scale": 2.0}, 9),
    "f-distill gan": ("f-distill", GAN, 7),
    "sid": ("sid", {"guidance_scale": 2.0}, 6),
    "consistency": ("consistency", {}, 3),
    "lcm-lora": ("consistency", {"guidance_scale": 2.0, "target_decay": 0.0}, 4),
    "scott": ("consistency", {"adversarial_weight": 0.4, "substeps": 2, "eta": 0.2}, 8),
    "pairs": ("pairs", {"pairs": 8}, 1),
    "reflow": ("pairs", {"pairs": 8, "objective": "reflow"}, 1),
}


@pytest.mark.parametrize(("name", "settings", "evaluations"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluations_are_those_of_training(name, settings, evaluations, tmp_path, monkeypatch):
    cls, steps, seen = get_method(name).load(settings), 40 if "student_steps" in settings else 2, []
    method, predict = cls(tiny_task(data=True), cls.Config(**settings)), PixelDenoiser.predict
    method.begin(tmp_path)
    monkeypatch.setattr(PixelDenoiser, "predict", lambda *args: (seen.append(len(args[1])), predict(*args))[1])
    for step in range(steps):
        for phase in method.phases(steps - 1):
            for repeat in range(phase.repeats):
                method.loss(phase, draw(4, step, f"{phase.name}/{repeat}"))
    updates = method.updates(steps)
    assert sum(update.evaluations for update in updates) == evaluations
    assert sum(seen) / 4 / steps == pytest.approx(evaluations, abs=0.3 if method.config.student_steps == 3 else 0)


def test_an_adversarial_update_looks_through_the_teacher():
    teacher = small_teacher()
    roles = roles_of(teacher) | {"discriminator": (FeatureDiscriminator.of(teacher, ClassConditions(10), 0), True)}
    adversarial = Update("student", ("student",), {"student": 1, "teacher": 1}, {}, {"teacher": 2, "critic": 1})
    rehearsal = Rehearsal(roles)
    assert rehearsal.cost(adversarial, 4).peak > rehearsal.cost(STUDENT, 4).peak * 1.3
    one, several = (replace(STUDENT, beside={"teacher": count}) for count in (6, (2, 2, 2)))
    one, several = rehearsal.cost(one, 4), rehearsal.cost(several, 4)
    assert one.flops == several.flops and one.peak > several.peak  # one after another


@pytest.mark.parametrize(("name", "helper"), [("consistency", "target"), ("disback", "node")])
def test_helpers_that_are_not_trained_are_counted(name, helper):
    """What gives a consistency model its targets, and a node of disback; as adapters where all others are."""
    cls, trainer = get_method(name).load({}), TrainerConfig(batch_size=4)
    adapters = AdapterConfig(rank=1)
    shared = replace(tiny_task(data=True), shared=SharedBase(tiny_teacher(), adapters))
    whole, adapted = (
        cls(task, cls.Config()) for task in (tiny_task(data=True), replace(shared, teacher=shared.shared.teacher))
    )
    for method, later in ((whole, None), (whole, adapters), (adapted, None)):
        roles = {role: (module, role in method.roles) for role, module in (method.frozen() | method.roles).items()}
        plan = make_plan(roles, method.updates(900), trainer, adapters=later, speed=FAST)
        rows = {row.name: row for row in plan.roles}
        assert rows[helper].weights == rows["student"].weights and rows[helper].moments == 0
        assert (rows[helper].parameters == rows["teacher"].parameters) == (method is whole and later is None)


def test_weights_moments_and_average_are_those_of_training():
    teacher = PixelDenoiser(tiny_unet(11), VP, "epsilon")
    teacher_row, student, critic = plan_of(teacher).roles
    module = copy.deepcopy(teacher)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    weights = sum(tensor.nbytes for tensor in module.state_dict().values())
    assert (teacher_row.weights, teacher_row.gradients, teacher_row.moments, teacher_row.average) == (weights, 0, 0, 0)
    average = sum(tensor.nbytes for tensor in EMA(module, 0.9).module.state_dict().values())
    assert (student.weights, student.gradients, student.moments, student.average) == (
        weights,
        weights,
        moments,
        average,
    )
    assert critic.average == 0 and critic.moments == moments
    small = plan_of(teacher, TrainerConfig(batch_size=8, eight_bit=True)).roles[2]
    assert weights / 2 < small.moments < moments  # parameters of less than 4096 numbers keep 32 bits


def test_adapters_are_counted_and_the_base_once():
    teacher = small_teacher()
    adapters = AdapterConfig(rank=4, base_dtype="bfloat16")
    before = plan_of(teacher, adapters=adapters).roles  # nothing is injected into the teacher itself
    assert not any("lora" in name for name, _ in teacher.named_modules())
    shared = SharedBase(teacher, adapters)
    student = shared.adapter("student")
    roles = {"teacher": (teacher, False), "student": (student, True), "critic": (shared.adapter("critic"), True)}
    after = make_plan(roles, [CRITIC, STUDENT], TrainerConfig(batch_size=8), speed=FAST, free=2**40)
    assert list(before) == list(after.roles)
    assert after.roles[1].parameters == sum(p.numel() for p in student.parameters())
    assert after.roles[0].weights == 2 * after.roles[0].parameters
    assert student(torch.zeros(1, 3, 16, 16), torch.ones(1), teacher.null_condition(1)).device == CPU  # left as it was


class Layer(NetworkDenoiser):
    """One matrix, after which nothing is known of time or condition."""

    sample_shape = (8,)

    def __init__(self, decides=False):
        super().__init__(nn.Linear(8, 8, bias=False), VP, "sample")
        self.decides = decides

    def predict(self, x_t, t, condition):
        return self.net(x_t) if not self.decides or x_t.sum() > 0 else x_t

    def feature_modules(self):
        return []


def test_operations_of_a_matrix():
    layer, one = Layer(), 2 * 8 * 8
    rehearsal = Rehearsal({"teacher": (layer, False), "student": (layer, True)})
    forward, backward = 5 * one, 5 * one  # of the weights; the input needs no gradient
    cost = rehearsal.cost(Update("student", ("student",), {"student": 1}, beside={"teacher": 2}), 5)
    assert cost.flops == forward + backward + 2 * 5 * one
    assert cost.gradients == 4 * 64
    through = rehearsal.cost(Update("student", ("student",), {"student": 1, "teacher": 1}), 5)
    assert through.flops == forward + backward + 2 * 5 * one  # of the teacher, the gradient of the input alone
    with pytest.raises(UsageError, match="no gradient checkpointing"):
        rehearsal.cost(STUDENT, 5, checkpointing=True)


def test_time_is_operations_by_speed():
    plan = plan_of(small_teacher(), TrainerConfig(steps=100, batch_size=8, micro_batches=4), speed=Speed(1e9, 1e-5))
    step = sum(cost.flops / 1e9 + cost.operators * 1e-5 for _, cost in plan.updates)
    assert plan.seconds == pytest.approx(100 * 4 * step) and plan.samples == 2
    speed = measure_speed(CPU)
    assert speed.flops > 1e8 and 0 < speed.operator < 1e-2


def test_a_network_that_decides_by_contents_leaves_activations_open():
    plan = plan_of(Layer(decides=True))
    assert plan.seconds is None and [cost for _, cost in plan.updates] == [None, None]
    assert plan.bytes == sum(role.lasting for role in plan.roles) + 4 * 64
    assert any(line.endswith("?") for line in plan.lines())


def test_what_does_not_fit_is_refused_with_what_does():
    teacher, trainer = wide_teacher(), TrainerConfig(batch_size=64)
    whole = plan_of(teacher, trainer)
    whole.require_fit()
    free = int(0.7 * whole.bytes)
    refused = plan_of(teacher, trainer, free=free)
    with pytest.raises(UsageError) as error:
        refused.require_fit()
    text, found = str(error.value), dict(refused.suggestions())
    assert f"needs about {size(whole.bytes)} on cpu, of which {size(free)} are free" in text
    parts, checkpointing, lora = found
    assert parts.startswith("--set trainer.micro_batches=") and lora == "--lora 64"
    assert checkpointing.endswith("--set trainer.gradient_checkpointing=true")
    assert all(f"{setting} ({size(count)})" in text and count <= free for setting, count in found.items())
    fitting = plan_of(teacher, replace(trainer, micro_batches=int(parts.rpartition("=")[2])), free=free)
    fitting.require_fit()
    assert 0.9 * found[parts] < fitting.bytes <= found[parts]
    assert plan_of(teacher, trainer, adapters=AdapterConfig()).bytes == found[lora]


def test_what_cannot_fit_at_all_is_refused_with_the_least():
    refused = plan_of(wide_teacher(), TrainerConfig(batch_size=2), free=2**22)
    with pytest.raises(UsageError, match=r"Even --lora 64 --set trainer.micro_batches=2 needs .* or more"):
        refused.require_fit()
    layer = Layer()
    with pytest.raises(UsageError, match=r"are free\. A smaller teacher"):
        plan_of(layer, TrainerConfig(batch_size=1), free=100).require_fit()


def test_the_text_names_everything():
    facts = {"method": "dmd", "teacher": "small", "data": "none needed"}
    plan = plan_of(small_teacher(), TrainerConfig(steps=2000, batch_size=8, micro_batches=2), facts=facts, free=2**30)
    lines = plan.lines()
    assert [line.split()[0] for line in lines[:7]] == [*facts, "steps", "evaluations", "time", "memory"]
    assert "2,000 of 8 samples in 2 parts" in lines[3] and lines[4].split()[1] == "6" and "roughly" in lines[5]
    assert f"{size(plan.bytes)} of 1.0 GiB free on cpu" in lines[6]
    rows = {line.split("  ")[1]: line for line in lines[8:]}
    assert {"teacher", "student", "critic", "student update, 4 samples"} <= set(rows)
    assert f"{plan.roles[1].parameters:,}" in rows["student"] and "not counted" in lines[-1]


@pytest.mark.parametrize(
    ("name", "millions"), [("sd15", 859.5), ("sdxl", 2567.5), ("sd3", 2028.3), ("dit", 749.8), ("ddpm-cifar10", 35.7)]
)
def test_released_teachers_have_their_number_of_parameters(name, millions):
    assert sum(p.numel() for p in released_teacher(name).parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_released_teacher_is_planned_without_weights():
    plan = make_plan(roles_of(released_teacher("ddpm-cifar10")), [CRITIC], TrainerConfig(batch_size=1), speed=FAST)
    assert plan.roles[0].weights == 4 * 35746307 and plan.updates[0][1].peak > plan.roles[1].gradients


def test_free_memory(tmp_path, monkeypatch):
    assert 0 < free_bytes(CPU) < 2**46
    group = tmp_path / "cgroup"
    group.mkdir()
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUP", group)
    (tmp_path / "meminfo").write_text("MemTotal: 4096 kB\nMemAvailable:    2048 kB\n")
    assert free_bytes(CPU) == 2**21
    for name, text in {
        "memory.max": "1500000",
        "memory.current": "900000",
        "memory.stat": "inactive_file 400000",
    }.items():
        (group / name).write_text(text + "\n")
    assert free_bytes(CPU) == 1_000_000
    (group / "memory.max").write_text("max\n")
    assert free_bytes(CPU) == 2**21


def test_what_networks_hold_already_counts_as_free(monkeypatch):
    monkeypatch.setattr(plans, "free_bytes", lambda device: 1000)
    teacher = small_teacher()
    held = sum(tensor.nbytes for tensor in teacher.state_dict().values())
    assert plan_of(teacher, free=None).free == 1000 + held
    meta = make_plan(roles_of(released_teacher("ddpm-cifar10")), [], TrainerConfig(batch_size=1), speed=FAST)
    assert meta.free == 1000
