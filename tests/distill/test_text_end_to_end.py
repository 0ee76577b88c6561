"""A text-to-image teacher in Stable Diffusion's layout, small and random: from prompts to a pipeline that opens and draws."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from pipelines import PIPELINES

import diffaccel
from diffaccel.core.errors import DataError, UsageError

PROMPTS = ["a red apple", "a green pear", "a yellow quince", "a blue plum"]
SMALL = ["trainer.steps=3", "trainer.batch_size=2", "trainer.log_every=1", "trainer.threads=1",
         "trainer.ema=0.0", "trainer.checkpoint_every=0", "trainer.sample_every=0", "trainer.keep=1"]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "random-sd"
    PIPELINES["sd"].build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four images with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for number, prompt in enumerate(PROMPTS):
        Image.new("RGB", (8, 8), (60 * number, 40, 200 - 50 * number)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def draw(pipe, **arguments) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS[:2], generator=torch.Generator().manual_seed(0), output_type="pt", **arguments).images


@pytest.fixture
def any_precision():
    """A process has one precision (accelerate); a test of another one begins and ends without."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def changed(final, teacher) -> bool:
    from safetensors.torch import load_file

    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(teacher / name), load_file(final / name)
    assert before.keys() == after.keys() and all(value.isfinite().all() for value in after.values())
    return any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dmd", ["method.guidance_scale=2.0"]),
        ("dmd", ["method.preset=dmd2", "method.student_steps=2", "method.critic_steps=1"]),
        ("f-distill", ["method.critic_warmup=1"]),
        ("disback", ["method.record_steps=2", "method.node_interval=1", "method.switch_interval=1"]),
        ("consistency", ["method.student_steps=2", "method.guidance_scale=2.0"]),
        ("sid", []),
        ("pairs", ["method.pairs=4", "method.pair_steps=2"]),
    ],
    ids=["dmd", "dmd2", "f-distill", "disback", "consistency", "sid", "pairs"],
)
def test_from_prompts_to_a_pipeline(tmp_path, teacher, prompts, pictures, method, settings):
    needs = method in ("f-distill", "consistency") or "method.preset=dmd2" in settings
    final = diffaccel.distill_model(
        str(teacher),
        tmp_path / "run",
        method=method,
        prompts=str(prompts),
        data=str(pictures) if needs else None,
        settings=[*SMALL, *settings],
        progress=False,
    )
    assert changed(final, teacher)
    pipe = DiffusionPipeline.from_pretrained(final)
    images = draw(pipe)
    assert images.shape == (2, 3, 8, 8) and torch.as_tensor(images).isfinite().all()
    steps = 2 if "method.student_steps=2" in settings else 1
    assert len(pipe.scheduler.timesteps) == steps
    assert f"{steps} network evaluation" in (final / "README.md").read_text()


@pytest.mark.usefixtures("any_precision")
@pytest.mark.parametrize(
    ("method", "settings", "rounding"),
    [
        ("dmd", [], 1e-4),
        ("dmd", ["trainer.precision=bf16"], 2e-2),  # the base is rounded in the merged network, not in the stock one
        ("consistency", ["method.student_steps=2", "method.target_decay=0.0"], 1e-4),
    ],
    ids=["dmd", "bf16", "lcm-lora"],
)
def test_from_prompts_to_an_adapter(tmp_path, teacher, prompts, pictures, method, settings, rounding):
    settings = [*SMALL, *settings, "lora=4", "trainer.optimizers.student.lr=0.01"]
    data = str(pictures) if method == "consistency" else None
    final = diffaccel.distill_model(
        str(teacher),
        tmp_path / "run",
        method=method,
        prompts=str(prompts),
        data=data,
        settings=settings,
        progress=False,
    )
    merged = DiffusionPipeline.from_pretrained(final)
    stock = StableDiffusionPipeline.from_pretrained(teacher)
    plain = draw(stock, num_inference_steps=1, guidance_scale=1.0)
    stock.load_lora_weights(final)
    stock.scheduler = diffaccel.FewStepScheduler.from_pretrained(final, subfolder="scheduler")
    steps = len(merged.scheduler.timesteps)
    adapted = draw(stock, num_inference_steps=steps, guidance_scale=1.0)
    drawn = draw(merged)
    assert torch.allclose(adapted, drawn, atol=rounding)
    assert (drawn - adapted).abs().max() < 0.1 * (adapted - plain).abs().max()


def test_samples_of_the_teacher_stand_for_real_ones(tmp_path, teacher, prompts):
    settings = [*SMALL, "method.student_steps=2", "method.guidance_scale=2.0"]
    final = diffaccel.distill_model(
        str(teacher), tmp_path / "run", method="consistency", prompts=str(prompts), data="teacher:4", settings=settings,
        progress=False,
    )  # fmt: skip
    assert changed(final, teacher)


def test_captions_of_the_data_are_prompts_enough(tmp_path, teacher, pictures):
    final = diffaccel.distill_model(
        str(teacher), tmp_path / "run", method="f-distill", data=str(pictures), settings=SMALL, progress=False
    )
    assert (final / "prompts.txt").read_text().splitlines() == PROMPTS


def test_without_prompts_one_sentence(tmp_path, teacher):
    with pytest.raises(UsageError, match="--prompts"):
        diffaccel.distill_model(str(teacher), tmp_path / "run", settings=SMALL, progress=False)


@pytest.mark.parametrize(("content", "words"), [(b"", "no prompt"), (b"\x00\x01\xff", "not text")])
def test_unusable_prompts_are_one_sentence(tmp_path, teacher, content, words):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        diffaccel.distill_model(str(teacher), tmp_path / "run", prompts=str(file), settings=SMALL, progress=False)


def test_prompts_for_pixels_are_refused(tmp_path, prompts):
    with pytest.raises(UsageError, match="--prompts"):
        diffaccel.distill_model("digits", tmp_path / "run", prompts=str(prompts), settings=SMALL, progress=False)
