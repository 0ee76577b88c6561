"""Resolving, opening and refusing models."""

import copy
import json
import shutil

import diffusers
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    ScoreSdeVeScheduler,
)
from networks import tiny_unet
from pipelines import PIPELINES

from diffaccel.core.errors import DataError, MissingWeightsError, UsageError
from diffaccel.core.schedule import Flow
from diffaccel.models.layouts import LAYOUTS
from diffaccel.models.pipeline import ClassConditionalPipeline
from diffaccel.models.teachers import (
    TEACHERS,
    check_adapter,
    denoiser_of,
    load_denoiser,
    load_pipeline,
    resolve_teacher,
)


def test_a_misspelt_name_gets_the_nearest_one():
    with pytest.raises(UsageError, match="digits"):
        resolve_teacher("digit")


@pytest.mark.parametrize("name", [name for name, info in TEACHERS.items() if info.repository])
def test_missing_weights_say_what_to_do(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeightsError) as error:
        resolve_teacher(name)
    text = str(error.value)
    assert TEACHERS[name].repository in text and TEACHERS[name].size in text and TEACHERS[name].licence in text
    assert f"in place of {name!r}" in text and "hf download" in text
    assert ("cannot distil it" in text) == (name == "flux")


def test_an_unconditional_ddpm_folder_opens_and_generates(tmp_path):
    DDPMPipeline(tiny_unet(None), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    pipeline = load_pipeline(tmp_path / "ddpm")
    assert pipeline.num_classes is None
    images = pipeline(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images
    assert len(images) == 2 and images[0].size == (8, 8)
    denoiser = load_denoiser(str(tmp_path / "ddpm"))
    assert denoiser.prediction_type == "epsilon" and denoiser.sample_shape == (1, 8, 8)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.latent])
def test_folders_are_judged_by_their_index_alone(name, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "vae": ["diffusers", "AutoencoderKL"]}))
    check_adapter(str(tmp_path))
    assert type(getattr(diffusers, name)) is type, "a class of diffusers"


def test_folders_without_an_adapter_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="model_index"):
        resolve_teacher(str(tmp_path))
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"FluxPipeline; .*UNet2DModel .* StableDiffusion3Pipeline"):
        check_adapter(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        check_adapter(str(tmp_path))


def test_a_flow_model_is_read_as_a_flow(tmp_path):
    pipeline = ClassConditionalPipeline(tiny_unet(), FlowMatchEulerDiscreteScheduler())
    denoiser = denoiser_of(pipeline)
    assert isinstance(denoiser.schedule, Flow) and denoiser.prediction_type == "flow_prediction"


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(), ScoreSdeVeScheduler(), IPNDMScheduler()])
def test_other_noise_schedules_are_refused(scheduler):
    with pytest.raises(UsageError):
        denoiser_of(ClassConditionalPipeline(tiny_unet(), scheduler))


def test_latent_models_and_models_without_a_null_class_are_refused(tmp_path):
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    latent = {**index, "_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(latent))
    with pytest.raises(UsageError, match="LDMPipeline"):
        check_adapter(str(tmp_path))
    DDPMPipeline(tiny_unet(10), DDPMScheduler()).save_pretrained(tmp_path / "ten")
    with pytest.raises(UsageError, match="null class"):
        load_pipeline(tmp_path / "ten")


def test_the_pipeline_checks_its_labels_and_noise():
    pipeline = load_pipeline("digits")
    with pytest.raises(UsageError, match=r"0 … 9"):
        pipeline(class_labels=[11])
    with pytest.raises(UsageError, match="noise"):
        pipeline(class_labels=[1, 2], noise=torch.zeros(1, 1, 8, 8))
    images = pipeline(class_labels=3, num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (1, 8, 8, 1) and 0.0 <= images.min() <= images.max() <= 1.0


def test_a_text_model_stored_in_half_precision_computes_in_single_precision(tmp_path):
    pipe = copy.deepcopy(PIPELINES["sd"].build())
    pipe.to(torch.float16).save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert {part.dtype for part in (again.unet, again.vae, again.text_encoder)} == {torch.float32}
    images = again("a", num_inference_steps=1, output_type="np").images
    assert images.shape[-1] == 3
    denoiser = load_denoiser(str(tmp_path))
    assert (
        denoiser.prediction_type == "epsilon"
        and denoiser.null_condition(1)["encoder_hidden_states"].dtype == torch.float32
    )


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "unet", "vae"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_parts_that_are_missing_or_cut_are_named(tmp_path, part, how, capfd):
    PIPELINES["sd"].build().save_pretrained(tmp_path)
    if how == "gone":
        shutil.rmtree(tmp_path / part)
    else:
        file = max((tmp_path / part).iterdir(), key=lambda path: path.stat().st_size)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=part if how == "gone" else "Cannot open"):
        load_pipeline(tmp_path)
    assert "fetch" not in capfd.readouterr().err
