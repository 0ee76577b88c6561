"""Exported students open in a fresh process by the code on their card, and draw there what they drew here."""

import copy
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from distilling import tiny_task
from pipelines import PIPELINES, check_close

import diffaccel
from diffaccel.core.errors import DataError
from diffaccel.core.schedule import from_diffusers
from diffaccel.distill.adapters import AdapterConfig, SharedBase
from diffaccel.distill.card import FOLDER, TEACHER, model_card, with_metrics
from diffaccel.distill.export import add_metrics, save_adapter, save_student
from diffaccel.distill.task import Task
from diffaccel.models.conditions import PromptConditions
from diffaccel.models.pipeline import ClassConditionalPipeline
from diffaccel.models.unet_condition import UNetConditionDenoiser
from diffaccel.samplers.few_step import FewStep, FewStepScheduler

PROGRAM = """
import sys, warnings
import diffaccel, diffusers
diffusers.DiffusionPipeline
assert "diffaccel.models.few_step_pipelines" not in sys.modules
assert not any(name.startswith("diffusers.pipelines.stable_diffusion") for name in sys.modules)
import numpy, torch
for target, code in zip(sys.argv[1::2], sys.argv[2::2]):
    scope = {}
    torch.manual_seed(0)
    exec(code, scope)
    numpy.save(target, numpy.asarray(scope["image"]))
"""
FACTS = {"teacher": "/somewhere/teacher", "licence": "CC BY-NC 4.0", "method": "dmd", "summary": "matches"}


def changed(module, seed=1):
    """The module after something that trains it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def text_task(shared=False) -> Task:
    pipe = copy.deepcopy(PIPELINES["sd"].build())
    states = {"encoder_hidden_states": torch.zeros(2, 3, 16)}
    null = {key: value[0] for key, value in states.items()}
    teacher = UNetConditionDenoiser(pipe.unet, from_diffusers(pipe.scheduler), "epsilon", null)
    base = SharedBase(teacher, AdapterConfig(rank=2, alpha=4.0)) if shared else None
    return Task(teacher, PromptConditions(["a", "b"], states), pipeline=pipe, shared=base, facts=FACTS)


def scheduler(task, count=3) -> FewStepScheduler:
    return FewStepScheduler.carrying(FewStep.trailing(task.teacher.schedule, count), task.scheduler_config)


def code(folder: Path, block=0) -> str:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)[block]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict:
    """Folder and pixels of students: of pixels, of text, and of text as an adapter, with the code that draws each."""
    root, students = tmp_path_factory.mktemp("students"), {}
    pixels = tiny_task()
    pixels.pipeline = ClassConditionalPipeline(
        pixels.teacher.net, diffusers.DDIMScheduler(prediction_type="v_prediction")
    )
    for name, task in {"pixels": pixels, "text": text_task(), "adapter": text_task(shared=True)}.items():
        student = changed(task.trainable("student"))
        save_student(task, student, scheduler(task), root / name)
        students[name] = code(root / name).replace(FOLDER, str(root / name))
    PIPELINES["sd"].build().save_pretrained(root / "teacher")
    stock = code(root / "adapter", 1).replace(FOLDER, str(root / "adapter")).replace(TEACHER, str(root / "teacher"))
    return {"root": root, "code": students | {"stock": stock}}


def test_the_code_of_cards_draws_the_same_in_a_fresh_process(exported, python):
    arguments, drawn = [], {}
    for name, text in exported["code"].items():
        torch.manual_seed(0)
        exec(text, scope := {})
        drawn[name] = np.asarray(scope["image"]).astype(int)
        arguments += [exported["root"] / f"{name}.npy", text]
        assert scope["pipe"].scheduler.timesteps.tolist() == [999, 666, 332]
    done = python("-c", PROGRAM, *arguments)
    assert done.code == 0, done.err[-2000:]
    assert "will be ignored" not in done.err, done.err  # no setting of a teacher is a surprise to the student
    for name, pixels in drawn.items():  # files leave weights unaligned, which changes the last bits of a product
        assert pixels.std() > 1 and np.abs(np.load(exported["root"] / f"{name}.npy") - pixels).max() <= 1
    assert np.abs(drawn["stock"] - drawn["adapter"]).max() <= 1
    assert np.abs(drawn["text"] - drawn["adapter"]).max() > 1


def test_all_but_network_and_scheduler_is_the_teachers(exported):
    teacher, student = exported["root"] / "teacher", exported["root"] / "text"
    assert {path.name for path in student.iterdir()} == {path.name for path in teacher.iterdir()} | {"README.md"}
    for path in teacher.rglob("*.*"):
        if path.parent.name in ("vae", "text_encoder", "tokenizer"):
            assert path.read_bytes() == (student / path.relative_to(teacher)).read_bytes()
    pipe = diffusers.DiffusionPipeline.from_pretrained(student)
    assert type(pipe) is diffaccel.FewStepStableDiffusionPipeline is diffusers.FewStepStableDiffusionPipeline
    assert pipe.config.num_inference_steps == 3 and isinstance(pipe, diffusers.StableDiffusionPipeline)


def test_stock_pipelines_load_the_adapter(tmp_path):
    case, task = PIPELINES["sd"], text_task(shared=True)
    adapter, pipe = changed(task.trainable("student")), copy.deepcopy(case.build())
    pipe.scheduler = scheduler(task)
    before = case.call(pipe, 3, guidance_scale=1.0)
    assert save_adapter(pipe, adapter.lora_state(), tmp_path)
    pipe.load_lora_weights(tmp_path)
    after = case.call(pipe, 3, guidance_scale=1.0)
    pipe.unload_lora_weights()
    pipe.unet = adapter.merged()
    check_close(after, case.call(pipe, 3, guidance_scale=1.0), 1e-5)
    assert not torch.allclose(before, after, atol=1e-2)


def test_pipelines_without_adapters_write_none(tmp_path):
    assert not save_adapter(PIPELINES["pixart"].build(), {}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert save_adapter(PIPELINES["sd3"].build(), {"x.lora_A.weight": torch.ones(2)}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_a_card_says_what_the_student_is(exported):
    text = (exported["root"] / "adapter" / "README.md").read_text()
    matter = yaml.safe_load(text.split("---\n")[1])
    assert matter["library_name"] == "diffusers" and matter["license"] == "cc-by-nc-4.0"
    assert (
        matter["pipeline_tag"] == "text-to-image"
        and {"dmd", "lora"} <= set(matter["tags"])
        and "base_model" not in matter
    )
    assert "# teacher in 3 steps" in text and "999, 666, 332, with fresh noise" in text and "2 prompts" in text
    assert "/somewhere" not in text and "dmd: matches" in text
    assert "10 classes" in (exported["root"] / "pixels" / "README.md").read_text()


def test_cards_of_hub_teachers_and_of_unconditional_ones():
    recipe = {"method": {"name": "dmd", "guidance_scale": 1.75}}
    licence, repository = "Stability AI Community (gated)", "owner/name"
    card = model_card(
        teacher="sd3", times=(1000.0,), noise="fresh", call="", licence=licence, repository=repository, recipe=recipe
    )
    matter = yaml.safe_load(card.split("---\n")[1])
    assert (matter["license"], matter["license_name"]) == ("other", "stability-ai-community-gated")
    assert (matter["base_model"], matter["base_model_relation"]) == (repository, "finetune")
    assert "1 network evaluation," in card and "noise in between" not in card and "pipe().images" in card
    assert "scale 1.75 is folded in" in card
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, flags=re.DOTALL)[1]) == recipe


def test_figures_are_added_to_a_card_and_replaced(tmp_path):
    card = model_card(teacher="digits", times=(999.0,), noise="fresh", call="class_labels=[0]")
    (tmp_path / "README.md").write_text(card)
    add_metrics(tmp_path, {"Fréchet distance": 1.23456, "NFE": 1})
    add_metrics(tmp_path, {"Fréchet distance": 2.0})
    text = (tmp_path / "README.md").read_text()
    assert (
        "| Fréchet distance | 2 |" in text
        and "NFE |" not in text
        and text.index("## Measured") < text.index("## Limit")
    )
    assert with_metrics(text, {}) == card
    with pytest.raises(DataError, match=r"has no README\.md"):
        add_metrics(tmp_path / "elsewhere", {})


def test_only_these_pipelines_have_a_few_step_class():
    for package in (diffusers, diffaccel):
        assert not hasattr(package, "FewStepFluxPipeline") and not hasattr(package, "FewStepNothing")
    assert diffaccel.FewStepDiTPipeline is diffusers.FewStepDiTPipeline
