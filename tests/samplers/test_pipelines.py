"""Drop-in use in real pipelines, with tiny random networks and tokenizers built in memory."""

import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
import transformers

import diffaccel

SIZES = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
CHANNELS = {"block_out_channels": (8,), "layers_per_block": 1}


def tokenizer():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(code) for code in (*printable, *range(256, 324))]  # byte-level BPE: one symbol for every byte
    names = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=16)


def vae(channels):
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.0,
        **CHANNELS,
    )


@pytest.fixture(scope="module")
def stable_diffusion():
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=514, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1,
        max_position_embeddings=16, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=16, attention_head_dim=4, **CHANNELS, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae(4), transformers.CLIPTextModel(text), tokenizer(), unet,
        diffusers.PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True),
        None, None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, **arguments):
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=5, generator=generator, output_type="np", **arguments).images


def test_stable_diffusion_with_ddim_equals_stock(stable_diffusion):
    stable_diffusion.scheduler = diffusers.DDIMScheduler.from_config(
        stable_diffusion.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )
    stock = picture(stable_diffusion, height=8, width=8)
    stable_diffusion.scheduler = diffaccel.DDIMScheduler.from_config(stable_diffusion.scheduler.config)
    ours = picture(stable_diffusion, height=8, width=8)
    assert np.abs(ours - stock).max() < 1e-5
    stable_diffusion.scheduler = diffusers.DDIMScheduler.from_config(stable_diffusion.scheduler.config)
    assert np.array_equal(picture(stable_diffusion, height=8, width=8), stock)


@pytest.mark.parametrize("variable", ["t", "rho", "log-rho"])
def test_stable_diffusion_image_to_image(stable_diffusion, variable):
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**stable_diffusion.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffaccel.DEISScheduler.from_config(pipe.scheduler.config, variable=variable, grid="quadratic")
    images = picture(pipe, image=torch.zeros(1, 3, 8, 8), strength=0.6)
    assert images.shape == (1, 8, 8, 3) and np.isfinite(images).all()
    assert pipe.scheduler.begin_index == 2 and pipe.scheduler.step_index == 5
    stable_diffusion.scheduler = pipe.scheduler
    explicit = picture(stable_diffusion, timesteps=[900, 400, 30], height=8, width=8)
    assert np.isfinite(explicit).all()


def test_a_saved_pipeline_loads_in_a_fresh_process(stable_diffusion, tmp_path):
    stable_diffusion.scheduler = diffaccel.DEISScheduler.from_config(
        stable_diffusion.scheduler.config, timestep_spacing="leading"
    )
    stable_diffusion.save_pretrained(tmp_path / "pipe")
    np.save(tmp_path / "expected.npy", picture(stable_diffusion, height=8, width=8))
    program = (
        "import sys, diffaccel, diffusers, numpy, torch\n"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1] + '/pipe')\n"
        "assert type(pipe.scheduler) is diffaccel.DEISScheduler, type(pipe.scheduler)\n"
        "images = pipe('a cat', num_inference_steps=5, generator=torch.Generator().manual_seed(0), height=8, width=8,"
        " output_type='np').images\n"
        "assert abs(images - numpy.load(sys.argv[1] + '/expected.npy')).max() < 1e-6\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unconditional_pipeline():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=8, **SIZES, **CHANNELS)
    pipe = diffusers.DDPMPipeline(unet, diffaccel.DEISScheduler(clip_sample=True))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (1, 8, 8, 3) and np.isfinite(images).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_flux_with_ddim_equals_stock_and_deis_runs(dynamic):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    pipe = diffusers.FluxPipeline(stock, vae(4), None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)

    def latents():
        return pipe(
            prompt_embeds=torch.ones(1, 3, 16), pooled_prompt_embeds=torch.ones(1, 16), height=8, width=8,
            num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip

    expected = latents()
    pipe.scheduler = diffaccel.DDIMScheduler.from_config(stock.config)
    torch.testing.assert_close(latents(), expected, rtol=1e-5, atol=1e-5)
    pipe.scheduler = diffaccel.DEISScheduler.from_config(stock.config)
    result = latents()
    assert bool(torch.isfinite(result).all()) and not torch.allclose(result, expected, atol=1e-5)
    assert float(pipe.scheduler.sigmas[-1]) == 0.0
