"""Several students: one is its base, each learns its own conditions only, smaller ones learn to denoise first."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from distilling import draw, tiny_task, trained, weights
from pipelines import PIPELINES
from torch import nn

from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.rng import KeyedRandom
from diffaccel.distill.methods.around import BASES
from diffaccel.distill.methods.multi_student import MultiStudent
from diffaccel.distill.run import build_method, resolve_distillation
from diffaccel.distill.samples import EncodedSamples
from diffaccel.distill.student_runs import (
    assemble,
    assemble_finished,
    student_folder,
    train_students,
    trains_all,
)
from diffaccel.distill.students import narrower
from diffaccel.generation import generate
from diffaccel.models.conditions import PromptConditions
from diffaccel.models.teachers import load_denoiser, load_pipeline
from diffaccel.training.launch import launch
from diffaccel.training.method import Phase

SMALL = {"channels": (8, 8)}
MATCHED = {**SMALL, "matching_steps": 3, "regression_pairs": 40}


def student(base="dmd", task=None, data=None, **settings):
    kind = MultiStudent.variant({"base": base})
    data = base == "f-distill" if data is None else data
    return kind(task or tiny_task(data=data), kind.Config(**{"student": 0, **settings}))


@pytest.mark.parametrize("base", BASES)
def test_one_student_is_its_base(tmp_path, base):
    settings = {"critic_warmup": 1, "regression_weight": 0.2, "regression_pairs": 20, "regression_steps": 2}
    plain = BASES[base](tiny_task(data=base == "f-distill"), BASES[base].Config(**settings))
    one = student(base, students=1, **settings)
    trained(plain, tmp_path / "base", steps=3)
    trained(one, tmp_path / "one", steps=3)
    assert list(plain.roles) == list(one.roles)
    for role in plain.roles:
        assert torch.equal(weights(plain, role), weights(one, role))


@pytest.mark.parametrize("base", BASES)
def test_settings_of_the_base_keep_its_defaults(base):
    wrapped = MultiStudent.variant({"base": base}).Config()
    plain = BASES[base].Config()
    assert {name: getattr(wrapped, name) for name in vars(plain)} == vars(plain)
    assert wrapped.base == base


def test_students_together_learn_every_condition_and_each_its_own():
    owned = []
    for index in range(4):
        method = student(data=True, students=4, student=index)
        own = method.conditions.members.tolist()
        drawn, asked = set(), set()
        method.generate = lambda model, noise, condition, *rest, to=drawn: (
            to.update(condition["class_labels"].tolist()) or noise
        )
        for step in range(20):
            method.student_sample(draw(16, step), grad=False)
            asked.update(method.data.batch(draw(16, step))[1]["class_labels"].tolist())
        assert drawn == asked == set(own)
        assert set(method.picture_index().tolist()) == set(own)
        owned += own
    assert sorted(owned) == list(range(10))


def test_regression_sees_all_conditions(tmp_path):
    method = student(students=4, student=1, regression_weight=0.2, regression_pairs=20, regression_steps=2)
    method.begin(tmp_path)
    shown = method.pairs.batch(draw(200))[2]["class_labels"]
    assert set(shown.tolist()) == set(range(10))
    assert method.conditions.members.tolist() == [3, 4]


def test_real_images_of_other_classes_are_left_out():
    data = tiny_task(data=True).data
    own = data.only([3, 7])
    assert set(own.labels.tolist()) == {3, 7}
    assert len(own) == int(((data.labels == 3) | (data.labels == 7)).sum())
    everything = data.only(range(10))
    assert torch.equal(everything.images, data.images)
    with pytest.raises(DataError, match="no real images"):
        data.only([11])


def test_captioned_images_go_to_the_students_that_own_their_captions():
    captions = PromptConditions(["a", "b", "c"], {"encoder_hidden_states": torch.randn(3, 2, 4)})
    mean, place = torch.arange(5.0).reshape(5, 1, 1, 1), torch.tensor([2, 0, 1, 0, 2])
    own = EncodedSamples(mean, torch.zeros_like(mean), captions, place).only(torch.tensor([0, 2]))
    assert own.mean.flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
    assert torch.equal(own.place, torch.tensor([2, 0, 0, 2]))
    with pytest.raises(DataError, match="No real image"):
        own.only(torch.tensor([1]))


def test_matching_vanishes_if_and_only_if_the_student_denoises_as_the_teacher():
    method = student(data=True, students=2, matching_steps=5)
    phase = method.phases(0)[0]
    assert phase == Phase("matching", ("student",))

    def gradient() -> torch.Tensor:
        loss = method.loss(phase, draw())
        grads = torch.autograd.grad(loss.total, list(method.roles["student"].parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None]).abs().max(), loss.total.detach()

    assert gradient() == (0.0, 0.0)
    with torch.no_grad():
        next(method.roles["student"].parameters()).add_(0.05)
    largest, error = gradient()
    assert largest > 0 and error > 0


def test_matching_is_the_denoising_loss_with_the_teacher_in_place_of_the_truth():
    method = student(data=True, students=2, matching_steps=5, **SMALL)
    sample = draw()
    x0, condition = method.data.batch(sample)
    t, eps = method.schedule.time(sample.stratified("time")), sample.normal("eps", (1, 8, 8))
    x_t = method.teacher.noised(x0, t, eps)
    _, sigma = method.teacher.level(t)
    small = method.roles["student"]
    with torch.no_grad():  # v = (α·x_t − x0)/σ, so λ_t = 1/σ²
        clean = small(x_t, t, condition) - method.teacher(x_t, t, condition)
        expected = (clean / sigma).square().mean()
    assert torch.allclose(method.loss(method.phases(0)[0], sample).total, expected, rtol=1e-4)


@pytest.mark.parametrize("data", [True, False])
def test_matching_lowers_the_error_and_then_the_base_goes_on(tmp_path, data):
    method = student(data=data, students=2, student=1, **{**MATCHED, "matching_steps": 20})
    trained(method, tmp_path, steps=21)
    assert [phase.name for phase in method.phases(20)] == ["critic", "student"]
    small, teacher, sample = method.roles["student"], method.teacher, draw(32)
    fresh = narrower(teacher, (8, 8), 0)
    x_t, t = sample.normal("x", (1, 8, 8)), torch.full((32,), 500.0)
    condition = {"class_labels": torch.tensor([5, 6, 7, 8] * 8)}
    with torch.no_grad():
        errors = [
            (net.predict(x_t, t, condition) - teacher.predict(x_t, t, condition)).square().mean()
            for net in (small, fresh)
        ]
    assert errors[0] < 0.7 * errors[1]
    assert (tmp_path / "drawn").exists() is not data


def test_without_data_a_smaller_student_learns_from_what_the_teacher_draws_of_its_own_conditions(tmp_path):
    method = student(students=4, student=1, **MATCHED)
    method.begin(tmp_path)
    x0, condition = method._drawn.batch(draw(200))
    assert set(condition["class_labels"].tolist()) == {3, 4}
    everything = {tuple(row.flatten().tolist()): index % 10 for index, row in enumerate(method._drawn.pairs.x0)}
    assert [everything[tuple(row.flatten().tolist())] for row in x0] == condition["class_labels"].tolist()
    few = student(students=4, student=3, **{**MATCHED, "regression_pairs": 5})
    with pytest.raises(UsageError, match="teacher:10"):
        few.begin(tmp_path)


@pytest.mark.parametrize("base", ["dmd", "f-distill"])
def test_the_adversary_sets_in_at_its_step(tmp_path, base):
    reverse = {"divergence": "reverse-kl"} if base == "f-distill" else {}
    start = weights(student(base, data=True, students=2, gan_weight=0.5), "discriminator")
    for steps in (1, 2):
        plain = student(base, data=True, students=2, **reverse)
        late = student(base, data=True, students=2, gan_weight=0.5, adversarial_from=1, **reverse)
        for method, name in ((plain, "plain"), (late, "late")):
            trained(method, tmp_path / f"{name}-{steps}", steps=steps)
        assert torch.equal(weights(plain), weights(late)) is (steps == 1)
        assert torch.equal(weights(late, "discriminator"), start) is (steps == 1)


def test_a_base_that_needs_the_discriminator_keeps_it_before_the_adversary_sets_in(tmp_path):
    method = student("f-distill", students=2, divergence="js", gan_weight=0.5, adversarial_from=3)
    start = weights(method, "discriminator").clone()
    trained(method, tmp_path, steps=1)
    assert not torch.equal(weights(method, "discriminator"), start)


def test_an_interrupted_student_goes_on_bit_for_bit(tmp_path):
    settings = {**MATCHED, "students": 2, "gan_weight": 0.1, "adversarial_from": 5}
    whole = trained(student(data=True, **settings), tmp_path / "whole", steps=7)
    for steps in (2, 4, 7):  # in each stage
        parts = trained(student(data=True, **settings), tmp_path / "parts", steps=steps)
    for role in whole.roles:
        assert torch.equal(weights(whole, role), weights(parts, role))


def test_accumulation_changes_nothing_beyond_rounding(tmp_path):
    whole, parts = (
        trained(student(data=True, students=2, **MATCHED), tmp_path / str(micro), steps=1, micro_batches=micro)
        for micro in (1, 4)
    )
    assert (weights(whole) - weights(parts)).abs().mean() < 1e-6


def test_smaller_students_are_made_to_measure():
    teacher = load_denoiser("digits")
    small = narrower(teacher, (12, 24), 0)
    assert tuple(small.net.config.block_out_channels) == (12, 24)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in teacher.parameters())
    assert torch.equal(
        nn.utils.parameters_to_vector(small.parameters()),
        nn.utils.parameters_to_vector(narrower(teacher, (12, 24), 0).parameters()),
    )
    method = student(task=replace(tiny_task(), teacher=load_denoiser("digits-flow")), layers=2)
    assert method.roles["student"].net.config.num_layers == 2
    assert method.roles["student"].net.config.num_layers < method.roles["critic"].net.config.num_layers


def test_a_student_starts_in_what_a_folder_holds(tmp_path):
    folder = tmp_path / "start"
    pipeline = load_pipeline("digits")
    with torch.no_grad():
        next(pipeline.unet.parameters()).add_(0.5)
    pipeline.save_pretrained(folder)
    task = replace(tiny_task(), teacher=load_denoiser("digits"))
    method = student(task=task, start=str(folder))
    expected = nn.utils.parameters_to_vector(pipeline.unet.parameters())
    assert torch.equal(weights(method), expected)
    assert not torch.equal(weights(method, "critic"), expected)
    for other, word in (("mnist", "28"), ("digits-flow", "flow_prediction")):
        with pytest.raises(UsageError, match=word):
            student(task=task, start=other)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"students": 0}, "students"),
        ({"student": 4}, "0 … 3"),
        ({"matching_steps": -1}, "matching_steps"),
        ({"channels": (8, 8), "start": "somewhere"}, "channels and method.start"),
        ({"adversarial_from": 10}, "gan_weight"),
        ({"adversarial_from": 10, "gan_weight": 1.0, "distribution_weight": 0.0}, "nothing trains"),
        ({"channels": (8,)}, "2 widths"),
        ({"channels": (8, 0)}, "2 widths"),
        ({"layers": 2}, "method.channels"),
        ({"students": 11}, "lower method.students"),
        ({"partition": "halves"}, "halves"),
    ],
)
def test_impossible_settings_are_named(settings, word):
    with pytest.raises(UsageError, match=word):
        student(**settings)


def test_another_base_or_no_number_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"consistency.*dmd"):
        MultiStudent.variant({"base": "consistency"})
    with pytest.raises(UsageError, match=r"method\.student"):
        student(student=None).begin(tmp_path)
    student(students=4).partition.save(tmp_path)
    with pytest.raises(UsageError, match="another partition"):
        student(students=2).begin(tmp_path)


# Runs of several students.


def settings(**method):
    assignments = [f"method.{name}={json.dumps(value)}" for name, value in {"students": 3, **method}.items()]
    assignments += ["trainer.steps=2", "trainer.batch_size=4", "trainer.checkpoint_every=1", "trainer.threads=0"]
    return resolve_distillation({"teacher": "digits", "method": {"name": "multi-student"}}, None, assignments)


def train(config, folder, resume):
    """One student of the tiny teacher's pipeline; what the command line does without the seconds of validation."""
    return launch(build_method(config), config, folder, resume, progress=False)


@pytest.fixture(scope="module")
def run_of_three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three") / "run"
    said = []
    final = train_students(
        settings(), folder, train, say=said.append, facts={"teacher": "digits", "method": "multi-student"}
    )
    assert final == folder / "final"
    assert said == ["Student 1 of 3", "Student 2 of 3", "Student 3 of 3"]
    return folder


def images(pipe, labels) -> torch.Tensor:
    noise = KeyedRandom(0).normal("z", 0, 0, len(labels), (1, 8, 8))
    return pipe(class_labels=labels, noise=noise, output_type="pt").images


def test_the_assembled_pipeline_draws_as_its_students(run_of_three):
    pipe = load_pipeline(run_of_three / "final")
    labels = [9, 0, 5, 3, 6, 1]
    found = images(pipe, labels)
    for index, own in enumerate(pipe.unet.partition.members):
        alone = images(load_pipeline(run_of_three / f"student-{index}/final"), labels)
        rows = [row for row, label in enumerate(labels) if label in own]
        assert rows and torch.allclose(found[rows], alone[rows], atol=1e-6)
    card = (run_of_three / "final/README.md").read_text()
    assert "by 3 students" in card and "class_labels=[0]" in card
    assert pipe.scheduler.steps == load_pipeline(run_of_three / "student-0/final").scheduler.steps


def test_a_run_that_was_killed_goes_on_where_it_was(run_of_three, tmp_path):
    folder = tmp_path / "run"

    class Killed(BaseException):
        pass

    def killed(config, path, resume):
        if config.method["student"] == 1 and not resume:
            (path / "samples").mkdir(parents=True)  # before anything was written
            raise Killed
        return train(config, path, resume)

    with pytest.raises(Killed):
        train_students(settings(), folder, killed)
    assert not (folder / "final").exists()
    began = []

    def watched(config, path, resume):
        began.append((config.method["student"], resume))
        if config.method["student"] == 2 and not resume:
            launch_two_steps = replace(config, trainer=replace(config.trainer, steps=2))
            train(launch_two_steps, path, resume)
            shutil.rmtree(path / "final")  # as if killed in its export
            raise Killed
        return train(config, path, resume)

    with pytest.raises(Killed):
        train_students(settings(), folder, watched, resume=True)
    train_students(settings(), folder, watched, resume=True)
    assert began == [(1, False), (2, False), (2, True)]
    for index in range(3):
        file = f"student-{index}/final/unet/diffusion_pytorch_model.safetensors"
        assert (folder / file).read_bytes() == (run_of_three / file).read_bytes()
    assert train_students(settings(), folder, watched, resume=True) == folder / "final"
    assert len(began) == 3


def test_independent_jobs_are_assembled_when_all_are_finished(run_of_three, tmp_path):
    for index in (2, 0, 1):
        assert assemble_finished(tmp_path) is None
        shutil.copytree(run_of_three / f"student-{index}", student_folder(tmp_path, index))
    assert student_folder(tmp_path / "student-1", 1) == tmp_path / "student-1"
    assert assemble_finished(tmp_path) == tmp_path / "final"
    assert torch.equal(
        images(load_pipeline(tmp_path / "final"), [1, 8]), images(load_pipeline(run_of_three / "final"), [1, 8])
    )
    assert assemble_finished(tmp_path) == tmp_path / "final"


def test_a_resumed_run_keeps_its_settings(run_of_three):
    with pytest.raises(UsageError, match=r"method\.students: 3 -> 4"):
        train_students(settings(students=4), run_of_three, train, resume=True)
    with pytest.raises(UsageError, match="not empty"):
        train_students(settings(), run_of_three, train)
    assert trains_all(settings()) and not trains_all(settings(student=1)) and not trains_all(settings(students=1))


def test_students_that_do_not_belong_together_are_not_assembled(run_of_three, tmp_path):
    other = shutil.copytree(run_of_three, tmp_path / "other")
    folders = [student_folder(other, index) for index in range(3)]
    with pytest.raises(UsageError, match="3 students"):
        assemble(folders[:2], tmp_path / "final")
    text = (folders[1] / "partition.json").read_text()
    (folders[1] / "partition.json").write_text(
        text.replace("[0, 1, 2, 3]", "[0, 1, 2, 6]").replace("[4, 5, 6]", "[4, 5, 3]")
    )
    with pytest.raises(DataError, match="student-1 divides"):
        assemble(folders, tmp_path / "final")
    (folders[1] / "partition.json").write_text(text)
    scheduler = folders[2] / "final/scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("999", "998"))
    with pytest.raises(DataError, match="998"):
        assemble(folders, tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_students_of_prompts_are_assembled_into_one_pipeline(tmp_path):
    prompts = ["a red apple", "a green pear", "a yellow quince", "a blue plum"]
    PIPELINES["sd"].build().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    wanted = {
        "teacher": str(tmp_path / "teacher"),
        "prompts": str(tmp_path / "prompts.txt"),
        "method": {"name": "multi-student"},
    }
    small = [
        "method.students=2",
        "trainer.steps=1",
        "trainer.batch_size=2",
        "method.critic_steps=1",
        "trainer.sample_every=0",
    ]
    final = train_students(resolve_distillation(wanted, None, small), tmp_path / "run", train)
    assert sorted((final / "prompts.txt").read_text().split("\n")[:-1]) == sorted(prompts)
    pipe = load_pipeline(final)
    assert list(pipe.unet.resident) == []
    owners = [(tmp_path / f"run/student-{k}/final/prompts.txt").read_text().split("\n")[:-1] for k in range(2)]
    assert [len(own) for own in owners] == [2, 2]
    latents = KeyedRandom(0).normal("z", 0, 0, 4, (4, 8, 8))
    arguments = {"output_type": "latent"}
    found = pipe(prompts, latents=latents, **arguments).images
    for index, own in enumerate(owners):
        rows = [prompts.index(prompt) for prompt in own]
        alone = load_pipeline(tmp_path / f"run/student-{index}/final")(own, latents=latents[rows], **arguments).images
        assert torch.allclose(found[rows], alone, atol=1e-5)
    drawing = generate(str(final), 3, batch_size=2)
    assert drawing.nfe == 1 and torch.cat([batch for batch, _ in drawing]).shape[0] == 3
