"""Rules on further pipelines, those with a way of their own first."""

import functools
import re

import diffusers
import pytest
import torch
from pipelines import PIPELINES, SQUARE, VIDEO, PipelineCase, check_close, rows, unrecognised

from diffaccel import CFG, Interval, guide
from diffaccel.core.errors import GuidanceError
from diffaccel.guidance.layouts import KNOWN

SCALE = 5.0
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed`:FutureWarning")  # Chroma's
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
TINY = {"num_layers": 1, "num_attention_heads": 2}


def embeddings(count: int, mask: str | None = None, pooled: bool = False) -> dict:
    """Embeddings of 3 tokens, negatives included; ``mask`` names the argument of their mask."""
    given = {"prompt_embeds": rows(count, 3, 16)} | ({"pooled_prompt_embeds": rows(count, 16)} if pooled else {})
    given |= {f"negative_{name}": -value for name, value in given.items()}
    return given | ({name + mask: torch.ones(count, 3) for name in ("prompt_", "negative_prompt_")} if mask else {})


def components(name: str) -> dict:
    return dict(PIPELINES[name].build().components)


def picture(count: int, size: int = 8) -> torch.Tensor:
    return torch.linspace(0, 1, 3 * size * size).reshape(1, 3, size, size).expand(count, 3, size, size)


def controlnet(name: str, count: int = 1):
    parts = components(name)
    nets = [diffusers.ControlNetModel.from_unet(parts["unet"]) for _ in range(count)]
    with torch.no_grad():
        for net in nets:
            for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
                block.weight.normal_(0, 0.2)  # an untrained one adds nothing
    parts["controlnet"] = nets[0] if count == 1 else nets
    if name == "sd":
        return diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    return diffusers.StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)


def pag():
    parts = {**components("sd"), "requires_safety_checker": False}
    return diffusers.StableDiffusionPAGPipeline(**parts, pag_applied_layers="mid")


def pixart_alpha():
    return diffusers.PixArtAlphaPipeline(**components("pixart"))


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=16, sample_size=8, **TINY,
    )  # fmt: skip
    return diffusers.SanaPipeline(None, None, None, transformer, FLOW(shift=3.0))


def auraflow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(None, None, components("sd3")["vae"], transformer, FLOW())


def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_single_layers=1, attention_head_dim=16, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=8, approximator_layers=1, approximator_num_channels=8, **TINY,
    )  # fmt: skip
    return diffusers.ChromaPipeline(FLOW(), components("flux")["vae"], None, None, transformer)


def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, attention_head_dim=16, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
        sample_size=16, **TINY,
    )  # fmt: skip
    return diffusers.CogView4Pipeline(None, None, components("flux")["vae"], transformer, FLOW())


def kontext():
    return diffusers.FluxKontextPipeline(**components("flux"))


def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, attention_head_dim=16, num_single_layers=1, num_refiner_layers=1, patch_size=1,
        text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(4, 6, 6), **TINY,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1
    )
    return diffusers.HunyuanVideoPipeline(None, None, transformer, vae, FLOW(shift=7.0), None, None)


def wan_from_image():
    transformer = diffusers.WanTransformer3DModel(
        attention_head_dim=8, in_channels=12, out_channels=4, text_dim=16, freq_dim=8, ffn_dim=16, rope_max_seq_len=8,
        **TINY,
    )  # fmt: skip
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **statistics,
    )
    parts = {**components("wan"), "vae": vae, "transformer": transformer}
    return diffusers.WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None)


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[64, 16, 16],
    )  # fmt: skip
    return diffusers.ZImagePipeline(FLOW(shift=3.0), components("flux")["vae"], None, None, transformer)


def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, attention_head_dim=16, joint_attention_dim=16, axes_dims_rope=(4, 6, 6), **TINY
    )
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics)
    return diffusers.QwenImagePipeline(FLOW(use_dynamic_shifting=True), vae, None, None, transformer)


def z_arguments(count: int) -> dict:
    prompts = {name: [value[0]] * count for name, value in embeddings(1).items()}
    return {**SQUARE, "height": 32, "width": 32, **prompts}


def small(count: int, side: int = 16, **more) -> dict:
    return {**SQUARE, "height": side, "width": side, **more}


ROOMY = {"use_resolution_binning": False, "negative_prompt": None}
_case = functools.partial(PipelineCase, family="flow", network="transformer", seeded=False)
_sd_case = functools.partial(PipelineCase, family="vp")


def _with_picture(name: str, **more):
    return lambda n: {**PIPELINES[name].arguments(n), "image": picture(n), **more}


MORE = {
    case.name: case
    for case in (
        _sd_case("controlnet", make=functools.partial(controlnet, "sd"), arguments=_with_picture("sd")),
        _sd_case("controlnet-guess", make=functools.partial(controlnet, "sd"), arguments=_with_picture("sd", guess_mode=True)),
        _sd_case(
            "controlnets",
            make=functools.partial(controlnet, "sd", 2),
            arguments=lambda n: {**PIPELINES["sd"].arguments(n), "image": [picture(n)] * 2},
        ),
        _sd_case("controlnet-xl", make=functools.partial(controlnet, "sdxl"), arguments=_with_picture("sdxl")),
        _sd_case("sdxl-base", make=PIPELINES["sdxl"].make, arguments=lambda n: {**PIPELINES["sdxl"].arguments(n), "denoising_end": 0.6}),
        _sd_case("pag-0", make=pag, arguments=lambda n: {**PIPELINES["sd"].arguments(n), "pag_scale": 0.0}),
        _case("pixart-alpha", make=pixart_alpha, arguments=PIPELINES["pixart"].arguments),
        _case("sana", make=sana, arguments=lambda n: small(n, 256, **ROOMY, **embeddings(n, "attention_mask"))),
        _case("auraflow", make=auraflow, arguments=lambda n: small(n, 8, **embeddings(n, "attention_mask"))),
        _case("chroma", make=chroma, arguments=lambda n: small(n, 8, **embeddings(n, "attention_mask"))),
        _case("cogview4", make=cogview4, arguments=lambda n: small(n, **embeddings(n))),
        _case(
            "kontext",
            make=kontext,
            arguments=lambda n: small(n, image=picture(n, 16), _auto_resize=False, max_area=256, **embeddings(n, pooled=True)),
            scales=("true_cfg_scale",),
        ),
        _case(
            "hunyuan-video",
            make=hunyuan_video,
            arguments=lambda n: {**VIDEO, "negative_prompt": "", **embeddings(n, "attention_mask", pooled=True)},
            scales=("true_cfg_scale",),
        ),
        _case("wan-image", make=wan_from_image, arguments=lambda n: {**VIDEO, "image": picture(1, 32), **embeddings(n)}),
    )
}  # fmt: skip


def counted(case, pipe, rule, **arguments):
    seen: list[int] = []
    handle = getattr(pipe, case.network).register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    try:
        with guide(pipe, rule) as guidance:
            return case.call(pipe, seed=[0, 1], **arguments), seen, guidance
    finally:
        handle.remove()


@pytest.mark.parametrize("name", MORE)
def test_identities(name):
    case, pipe = MORE[name], MORE[name].build()
    own, conditional = (case.call(pipe, seed=[0, 1], **case.guided(scale, 2)) for scale in (SCALE, 1.0))
    got, rows, _ = counted(case, pipe, CFG(SCALE), **case.guided(2.0, 2))
    check_close(got, own, 0)
    with pytest.raises(AssertionError):
        check_close(conditional, own, 1e-6)
    never = Interval(CFG(SCALE), sigma_range=(1e6, 1e7))
    got, few, _ = counted(case, pipe, never, **case.guided(2.0, 2))
    check_close(got, conditional, 1e-6)
    cls = type(pipe).__name__
    got, learned_rows, learned = counted(case, unrecognised(pipe), never, **case.guided(2.0, 2))
    check_close(got, conditional, 1e-6)
    assert KNOWN.get(cls, learned.layout) == learned.layout
    assert sum(learned_rows) == sum(rows) // 2 + (2 if ", " in learned.layout else 6)
    assert sum(few) == (sum(rows) // 2 if cls in KNOWN else sum(learned_rows))


def test_a_pipeline_that_adds_the_difference_to_c_and_negates_its_lists():
    """Z-Image's scale of 4 is 5 elsewhere; its network takes and gives lists of samples."""
    case = _case("z-image", make=z_image, arguments=z_arguments)
    pipe = case.build()
    own, conditional = (case.call(pipe, seed=[0, 1], guidance_scale=scale) for scale in (SCALE - 1, 0.0))
    with guide(pipe, CFG(SCALE)) as guidance:
        check_close(case.call(pipe, seed=[0, 1], guidance_scale=2.0), own, 1e-6)
    assert guidance.layout == "cond-uncond"
    got, seen, _ = counted(case, pipe, CFG(1.0), guidance_scale=2.0)
    check_close(got, conditional, 1e-6)
    assert len(seen) == 4  # whole ones: samples of as many channels as there are samples are not understood
    with guide(pipe, CFG(1.0)):
        check_close(case.call(pipe, seed=[0], guidance_scale=2.0), case.call(pipe, seed=[0], guidance_scale=0.0), 1e-6)
    with guide(pipe, CFG(SCALE)), pytest.raises(GuidanceError, match="call it with cfg_normalization=False"):
        case.call(pipe, guidance_scale=2.0, cfg_normalization=True)


def test_a_pipeline_that_norms_tokens():
    masks = {name: torch.ones(2, 3, dtype=torch.long) for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask")}
    case = _case("qwen", make=qwen_image, arguments=lambda n: small(n, 32, **embeddings(n), **masks))
    pipe = case.build()
    with guide(pipe, CFG(SCALE)), pytest.raises(GuidanceError, match=re.escape("a norm per token or another kind")):
        case.call(pipe, seed=[0, 1], true_cfg_scale=SCALE)
    results = []
    for scale in (2.0, 20.0):
        with guide(pipe, CFG(SCALE), layout="cond, uncond"):
            results.append(case.call(pipe, seed=[0, 1], true_cfg_scale=scale))
    check_close(*results, 0)
    with guide(pipe, CFG(1.0), layout="cond, uncond"):
        check_close(
            case.call(pipe, seed=[0, 1], true_cfg_scale=2.0), case.call(pipe, seed=[0, 1], true_cfg_scale=1.0), 0
        )


def test_further_guidance_is_refused():
    for make, name, arguments in (
        (pag, "pag_scale", {"pag_scale": 3.0}),
        (PIPELINES["sd3"].make, "skip_guidance_layers", {"skip_guidance_layers": [0]}),
    ):
        case = _case(name, make=make, arguments=PIPELINES["sd" if make is pag else "sd3"].arguments)
        pipe = case.build()
        with (
            guide(pipe, CFG(SCALE)),
            pytest.raises(GuidanceError, match=f"was called with {name}=.*: call it with {name}="),
        ):
            pipe(**case.arguments(1), guidance_scale=2.0, **arguments)


def test_views_that_are_stepped_in_turn():
    """Each would continue the momentum of another."""
    pipe = diffusers.StableDiffusionPanoramaPipeline(**components("sd"), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae_scale_factor = 8
    call = {"prompt": "a cat", "height": 512, "width": 640, "output_type": "latent", "num_inference_steps": 1}
    with guide(pipe, CFG(SCALE)), pytest.raises(GuidanceError, match="repeatedly at timestep 1, as for views"):
        pipe(**call)
