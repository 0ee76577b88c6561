"""Real diffusers pipelines with tiny random weights, shared by tests.

    case = PIPELINES["sd"]
    pipe = case.build("deis")
    with case.watched(pipe) as evaluations:
        latents = case.call(pipe, steps=4)

Builds share their weights; whoever changes weights or attention processors does so on ``copy.deepcopy(case.build())``.
"""

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import diffusers
import torch
import transformers
from networks import tiny_unet

import diffaccel
from diffaccel.core.grids import make_grid
from diffaccel.samplers.registry import SAMPLERS

CHANNELS = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SQUARE = {"height": 8, "width": 8, "output_type": "latent"}
VIDEO = {"height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}


@dataclass(frozen=True)
class PipelineCase:
    """One pipeline.

    Attributes:
        name: its key in the tables below.
        family: "vp", "flow" or "edm".
        make: builds it.
        arguments: what a call for ``count`` samples takes besides steps and generator.
        network: name of the component that predicts.
        forwards: forward calls of the network per evaluation; 2 where guidance is not a batch of two.
        seeded: whether the pipeline hands its generator on to the steps of its scheduler.
        scales: arguments that take its guidance scale; none where it has no guidance.
        negatives: further arguments for ``count`` samples without which it runs no unconditional branch.
    """

    name: str
    family: str
    make: Callable[[], diffusers.DiffusionPipeline]
    arguments: Callable[[int], dict]
    network: str = "unet"
    forwards: int = 1
    seeded: bool = True
    scales: tuple[str, ...] = ("guidance_scale",)
    negatives: Callable[[int], dict] = lambda count: {}

    def guided(self, scale: float, count: int = 1) -> dict:
        """Arguments of a call for ``count`` samples that switch on its own guidance; 1 switches it off."""
        return dict.fromkeys(self.scales, scale) | (self.negatives(count) if scale > 1 else {})

    def build(self, sampler: str | None = None, **overrides) -> diffusers.DiffusionPipeline:
        """The pipeline with a scheduler of its own and weights shared between builds.

        Args:
            sampler: a name in `SAMPLERS`; None keeps the stock scheduler of the released pipeline.
            **overrides: configuration values of the sampler.
        """
        pipe = copy.copy(_made(self.make))
        stock = copy.deepcopy(pipe.scheduler)
        pipe.scheduler = stock if sampler is None else SAMPLERS[sampler].build(stock.config, **overrides)
        return pipe

    def call(self, pipe, steps: int | None = 4, seed: int | list[int] = 0, **arguments) -> torch.Tensor:
        """Run the pipeline.

        Args:
            pipe: from `build`, or loaded from disk.
            steps: ``num_inference_steps``; None lets other arguments decide.
            seed: of the generator; a list makes a batch with a generator each.
            **arguments: override those of the case.

        Returns:
            Latents, or images where the pipeline always decodes.
        """
        seeds = seed if isinstance(seed, list) else [seed]
        generators = [torch.Generator().manual_seed(number) for number in seeds]
        generator = generators if isinstance(seed, list) else generators[0]
        given = {**self.arguments(len(seeds)), **({} if steps is None else {"num_inference_steps": steps}), **arguments}
        dtype = getattr(pipe, self.network).dtype
        given = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in given.items()}
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            torch.manual_seed(seeds[0])  # for the steps of pipelines that keep the generator to themselves
            # Stock schedulers hand tensors to numpy in a way that numpy 2 frowns upon.
            warnings.filterwarnings("ignore", ".*__array.*", DeprecationWarning)
            return torch.as_tensor(pipe(generator=generator, **given)[0])

    @contextmanager
    def watched(self, pipe, change: Callable[[int, torch.Tensor], torch.Tensor] | None = None):
        """Yield a list that grows by one index per evaluation; ``change(index, output)`` may replace outputs."""
        evaluations, forwards = [], []

        def hook(module, args, output):
            index = len(forwards) // self.forwards
            forwards.append(index)
            if index == len(evaluations):
                evaluations.append(index)
            if change is None:
                return output
            if isinstance(output, tuple):
                return (change(index, output[0]), *output[1:])
            output.sample = change(index, output.sample)
            return output

        handle = getattr(pipe, self.network).register_forward_hook(hook)
        try:
            yield evaluations
        finally:
            handle.remove()
        assert len(forwards) == self.forwards * len(evaluations), "an evaluation was left half done"


def one_of_each_class() -> list[str]:
    """The first registered sampler of every scheduler class."""
    return list({sampler.target: name for name, sampler in reversed(SAMPLERS.items())}.values())


@functools.cache
def is_stochastic(sampler: str) -> bool:
    """Whether a registered sampler adds noise on the way."""
    scheduler = SAMPLERS[sampler].build()
    return any(row.noise for row in scheduler.plan(make_grid(scheduler.noise_schedule, 3)).rows)


def check_close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The largest difference, relative to the largest value where that exceeds 1; 0 for equality in every bit."""
    assert left.shape == right.shape and left.dtype == right.dtype
    error = float((left - right).abs().max() / right.abs().max().clamp(min=1.0))
    assert error <= tolerance, f"{error:.2g} > {tolerance:g}"


def unrecognised(pipe):
    """The pipeline as one of a class that nobody has heard of."""
    pipe.__class__ = type("UnheardOfPipeline", (type(pipe),), {})
    return pipe


@functools.cache
def _made(make: Callable) -> diffusers.DiffusionPipeline:
    torch.manual_seed(0)
    pipe = make()
    for component in vars(pipe).values():
        if isinstance(component, torch.nn.Module):
            component.eval()  # as from_pretrained does; DiT drops class labels in training
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rows(count: int, *shape: int) -> torch.Tensor:
    """The same made-up embedding for each of ``count`` samples."""
    return torch.linspace(-1, 1, math.prod(shape)).reshape(1, *shape).expand(count, *shape).contiguous()


def _embeddings(count: int, pooled: bool = False, mask: bool = False, negative: bool = True) -> dict:
    parts = {"prompt_embeds": rows(count, 3, 16)}
    if pooled:
        parts["pooled_prompt_embeds"] = rows(count, 16)
    if negative:
        parts |= {f"negative_{name}": torch.zeros_like(value) for name, value in parts.items()}
    if mask:
        names = [name for name in ("prompt", "negative_prompt") if f"{name}_embeds" in parts]
        parts |= {f"{name}_attention_mask": torch.ones(count, 3) for name in names}
    return parts


def _picture(count: int) -> torch.Tensor:
    return torch.linspace(0, 1, 192).reshape(1, 3, 8, 8).expand(count, 3, 8, 8)


def _left_half(count: int) -> torch.Tensor:
    return (torch.arange(8) < 4).float().expand(count, 1, 8, 8)


def _tokenizer():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(code) for code in (*printable, *range(256, 324))]  # byte-level BPE: one symbol for every byte
    names = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=16)


def _text_encoder():
    config = transformers.CLIPTextConfig(
        vocab_size=514, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1,
        max_position_embeddings=16, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def _vae(channels: int = 4):
    return diffusers.AutoencoderKL(
        latent_channels=channels, shift_factor=0.0, mid_block_add_attention=False, force_upcast=False, **CHANNELS
    )


def _unet(**arguments):
    return diffusers.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=16, attention_head_dim=4, **CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), **arguments,
    )  # fmt: skip


def _sd():
    scheduler = diffusers.PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False)
    return diffusers.StableDiffusionPipeline(
        _vae(), _text_encoder(), _tokenizer(), _unet(), scheduler, None, None, requires_safety_checker=False
    )


def _sdxl():
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 16}
    unet = _unet(addition_embed_type="text_time", **sizes)
    return diffusers.StableDiffusionXLPipeline(_vae(), None, None, None, None, unet, scheduler, add_watermarker=False)


def _pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, caption_channels=16,
        sample_size=4,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(None, None, None, transformer, diffusers.DPMSolverMultistepScheduler())


def _dit():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, out_channels=8
    )
    return diffusers.DiTPipeline(transformer, _vae(), diffusers.DDIMScheduler(clip_sample=False))


def _ddpm():
    unet = diffusers.UNet2DModel(
        sample_size=8, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False, **CHANNELS
    )
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(clip_sample=True))


def _classes():
    return diffaccel.ClassConditionalPipeline(tiny_unet(), diffusers.DDIMScheduler(clip_sample=False))


def _animatediff():
    unet = diffusers.UNetMotionModel(
        sample_size=4, cross_attention_dim=16, num_attention_heads=2, motion_num_attention_heads=2, **CHANNELS,
        down_block_types=("CrossAttnDownBlockMotion",), up_block_types=("CrossAttnUpBlockMotion",),
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", steps_offset=1, clip_sample=False)
    return diffusers.AnimateDiffPipeline(None, None, None, unet, None, scheduler)


def _cogvideox():
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=16, num_layers=1, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=3,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    return diffusers.CogVideoXPipeline(None, None, None, transformer, scheduler)


def _sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(transformer, stock, _vae(), None, None, None, None, None, None)


def _flux(**shift):
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**shift)
    return diffusers.FluxPipeline(stock, _vae(), None, None, None, None, transformer)


def _wan():
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=16, freq_dim=8,
        ffn_dim=16, num_layers=1, rope_max_seq_len=8,
    )  # fmt: skip
    stock = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.WanPipeline(None, None, None, stock, transformer)


def _ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=16,
    )  # fmt: skip
    stock = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return diffusers.LTXPipeline(stock, None, None, None, transformer)


def _svd():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=16, num_attention_heads=2,
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=12,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",), up_block_types=("CrossAttnUpBlockSpatioTemporal",),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32,), force_upcast=False)
    stock = diffusers.EulerDiscreteScheduler(
        **BETAS, prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0, timestep_type="continuous",
        timestep_spacing="leading", steps_offset=1, use_karras_sigmas=True,
    )  # fmt: skip
    encoder = transformers.CLIPVisionModelWithProjection(vision)
    return diffusers.StableVideoDiffusionPipeline(vae, encoder, unet, stock, transformers.CLIPImageProcessor())


def _sd_arguments(count: int) -> dict:
    return {**SQUARE, "prompt": ["a cat"] * count}


def _sdxl_arguments(count: int) -> dict:
    return {**SQUARE, **_embeddings(count, pooled=True)}


def _pixart_arguments(count: int) -> dict:
    size = {"height": 32, "width": 32, "use_resolution_binning": False, "output_type": "latent"}
    return {**_embeddings(count, mask=True), **size, "negative_prompt": None}


def _dit_arguments(count: int) -> dict:
    return {"class_labels": [1] * count, "output_type": "pt"}


def _flux_arguments(count: int) -> dict:
    return {**SQUARE, **_embeddings(count, pooled=True, negative=False)}


def _ltx_arguments(count: int) -> dict:
    size = {"height": 64, "width": 64, "num_frames": 9, "output_type": "latent"}
    return {**size, **_embeddings(count, mask=True)}


def _svd_arguments(count: int) -> dict:
    return {**SQUARE, "image": _picture(count), "num_frames": 2}


def _edit(base: PipelineCase, pipeline: type, mask: bool = False, **settings) -> PipelineCase:
    """The case of a pipeline that starts from a picture, on the components of another."""
    accepted = inspect.signature(pipeline.__call__).parameters

    def make():
        return pipeline(**_made(base.make).components, **settings)

    def arguments(count: int) -> dict:
        given = {**base.arguments(count), "image": _picture(count), "strength": 0.5}
        given |= {"mask_image": _left_half(count)} if mask else {}
        return {key: value for key, value in given.items() if key in accepted}

    return replace(base, make=make, arguments=arguments)


def _records(*cases: PipelineCase) -> dict[str, PipelineCase]:
    return {case.name: case for case in cases}


def _flux_negatives(count: int) -> dict:
    return {"negative_prompt_embeds": -rows(count, 3, 16), "negative_pooled_prompt_embeds": -rows(count, 16)}


_flux_case = functools.partial(
    PipelineCase, family="flow", arguments=_flux_arguments, network="transformer", seeded=False,
    scales=("true_cfg_scale",), negatives=_flux_negatives,
)  # fmt: skip
_flux_static = functools.partial(_flux, shift=3.0)
_flux_dynamic = functools.partial(_flux, shift=3.0, use_dynamic_shifting=True)

PIPELINES = _records(
    PipelineCase("sd", "vp", _sd, _sd_arguments),
    PipelineCase("sdxl", "vp", _sdxl, _sdxl_arguments),
    PipelineCase("pixart", "vp", _pixart, _pixart_arguments, "transformer"),
    PipelineCase("dit", "vp", _dit, _dit_arguments, "transformer", seeded=False),
    PipelineCase("ddpm", "vp", _ddpm, lambda n: {"batch_size": n, "output_type": "pt"}, scales=()),
    PipelineCase("classes", "vp", _classes, lambda n: {**_dit_arguments(n), "guidance_scale": 2.0}),
    PipelineCase("animatediff", "vp", _animatediff, lambda n: {**VIDEO, **_embeddings(n), "num_frames": 2}),
    PipelineCase("cogvideox", "vp", _cogvideox, lambda n: {**VIDEO, **_embeddings(n)}, "transformer"),
    PipelineCase("sd3", "flow", _sd3, _sdxl_arguments, "transformer", seeded=False),
    _flux_case("flux", make=_flux_static),
    _flux_case("flux-dynamic", make=_flux_dynamic),
    PipelineCase("wan", "flow", _wan, lambda n: {**VIDEO, **_embeddings(n)}, "transformer", 2, seeded=False),
    PipelineCase("ltx", "flow", _ltx, _ltx_arguments, "transformer", seeded=False),
    PipelineCase("svd", "edm", _svd, _svd_arguments, seeded=False, scales=("min_guidance_scale", "max_guidance_scale")),
)
"""Text to image or video, and classes to image."""

IMAGE_TO_IMAGE = _records(
    _edit(PIPELINES["sd"], diffusers.StableDiffusionImg2ImgPipeline, requires_safety_checker=False),
    _edit(PIPELINES["sdxl"], diffusers.StableDiffusionXLImg2ImgPipeline, add_watermarker=False),
    _edit(PIPELINES["sd3"], diffusers.StableDiffusion3Img2ImgPipeline),
    _edit(PIPELINES["flux"], diffusers.FluxImg2ImgPipeline),
    _edit(PIPELINES["flux-dynamic"], diffusers.FluxImg2ImgPipeline),
)
"""Take ``strength``."""

INPAINTING = _records(
    _edit(PIPELINES["sd"], diffusers.StableDiffusionInpaintPipeline, mask=True, requires_safety_checker=False),
    _edit(PIPELINES["sdxl"], diffusers.StableDiffusionXLInpaintPipeline, mask=True, add_watermarker=False),
)
"""Take ``strength``, and repaint the left half of the picture."""

GUIDED = {
    f"{kind}{name}": case
    for kind, table in (("", PIPELINES), ("image-to-image-", IMAGE_TO_IMAGE), ("inpainting-", INPAINTING))
    for name, case in table.items()
    if case.scales
}
"""All of them that have guidance."""
