"""Pipelines of text and of latent classes as teachers: the Denoiser does what the pipeline's own loop does."""

import copy
import functools

import diffusers
import pytest
import torch
import transformers
from pipelines import BETAS, PIPELINES, check_close

from diffaccel.core.errors import UsageError
from diffaccel.core.images import to_unit_range
from diffaccel.models.denoiser import Guided
from diffaccel.models.opened import open_teacher
from diffaccel.models.teachers import denoiser_of, load_pipeline
from diffaccel.models.unet_condition import encode_prompts

# Stock schedulers hand tensors to numpy in a way that numpy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning")
PROMPTS, SCALE = ["red apple", "cat"], 3.0
NAMES = ["sd", "sdxl", "pixart", "sd3", "dit"]


def _rebuilt(net, **changes):
    return type(net)(**{key: value for key, value in net.config.items() if not key.startswith("_")} | changes)


def _clip(kind, **sizes):
    config = copy.deepcopy(PIPELINES["sd"].build().text_encoder.config)
    config.update({"num_hidden_layers": 2, "hidden_size": 8, **sizes})
    return kind(config)


def _t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=514, **sizes))


def _sdxl(parts, tokenizer):
    """The builders' pipeline with both text encoders, and a VAE with statistics of each channel."""
    projected = _clip(transformers.CLIPTextModelWithProjection, projection_dim=16)
    parts |= {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "text_encoder_2": projected}
    parts["vae"].register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 1.5])
    return parts | {"text_encoder": _clip(transformers.CLIPTextModel)}


def _sd3(parts, tokenizer):
    """With three text encoders, two blocks and latents that are shifted."""
    parts["vae"].register_to_config(shift_factor=0.3, scaling_factor=1.5)
    clips = [_clip(transformers.CLIPTextModelWithProjection, projection_dim=8) for _ in range(2)]
    parts |= {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": tokenizer}
    parts |= {"text_encoder": clips[0], "text_encoder_2": clips[1], "text_encoder_3": _t5()}
    return parts | {"transformer": _rebuilt(parts["transformer"], num_layers=2)}


def _pixart(parts, tokenizer):
    """At the size from which on the network is told the size, and with a predicted variance."""
    sizes = {"sample_size": 128, "patch_size": 16, "attention_head_dim": 12, "cross_attention_dim": 24}
    transformer = _rebuilt(parts["transformer"], **sizes)
    vae = copy.deepcopy(PIPELINES["sd"].build().vae)
    return {"tokenizer": tokenizer, "text_encoder": _t5(), "vae": vae, "transformer": transformer}


CHANGES = {
    "sdxl": (diffusers.StableDiffusionXLPipeline, _sdxl, {"add_watermarker": False}),
    "sd3": (diffusers.StableDiffusion3Pipeline, _sd3, {}),
    "pixart": (diffusers.PixArtAlphaPipeline, _pixart, {}),
}


@functools.cache
def made(name: str):
    """A complete pipeline, text encoders and all; those of noise tables draw with a sampler that tells its x0."""
    pipe = copy.deepcopy(PIPELINES[name].build())
    torch.manual_seed(0)
    if name in CHANGES:
        cls, change, settings = CHANGES[name]
        parts = change(dict(pipe.components), PIPELINES["sd"].build().tokenizer)
        pipe = cls(**{"scheduler": pipe.scheduler, **parts}, **settings)
    if name in ("sd", "pixart"):
        pipe.scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def drawn(name: str):
    """A guided run of three steps: calls of the network, x0 at every step, latents at the end, images in [0, 1]."""
    pipe, case = made(name), PIPELINES[name]
    step, network = pipe.scheduler.step, getattr(pipe, case.network)
    calls, clean, latents = [], [], []

    @functools.wraps(step)
    def watched(output, t, sample, **arguments):
        done = step(output, t, sample, **arguments | {"return_dict": True})
        flow = case.family == "flow"
        clean.append(sample - t / 1000 * output if flow else done.pred_original_sample)
        latents[:] = [done.prev_sample]
        return done if arguments.get("return_dict", True) else done.to_tuple()

    given = {"class_labels": [1, 2]} if name == "dit" else {"prompt": PROMPTS}
    given |= {"use_resolution_binning": False} if name == "pixart" else {}
    handle = network.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    pipe.scheduler.step = watched
    with handle:
        generator = torch.Generator().manual_seed(0)
        images = pipe(num_inference_steps=3, guidance_scale=SCALE, generator=generator, output_type="pt", **given)[0]
    del pipe.scheduler.step
    return calls, clean, latents[0], images


def condition_of(name: str, teacher):
    return teacher.encode(PROMPTS) if teacher.textual else {"class_labels": torch.tensor([1, 2])}


def both(name: str, null, condition):
    """What the network is given for both branches, in the pipeline's order."""
    order = (condition, null) if name == "dit" else (null, condition)
    assert null.keys() == condition.keys()
    return {key: torch.cat([part[key] for part in order]) for key in null}


@pytest.mark.parametrize("name", NAMES)
def test_conditions_are_what_the_pipeline_hands_to_its_network(name):
    teacher, (_, given) = open_teacher(made(name)), drawn(name)[0][1]
    given = {key: value for key, value in given.items() if value is not None and key not in ("return_dict", "timestep")}
    given |= given.pop("added_cond_kwargs", {})
    ours = both(name, teacher.denoiser.null_condition(2), condition_of(name, teacher))
    theirs = {key: value for key, value in given.items() if key in ours}
    assert theirs.keys() == ours.keys() and given.keys() - ours.keys() <= {"hidden_states"}
    for key, value in ours.items():
        check_close(value, theirs[key].to(value.dtype), 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_guided_denoiser_takes_the_pipelines_own_step(name):
    teacher, (calls, clean, *_) = open_teacher(made(name)), drawn(name)
    (args, given), want = calls[1], clean[1][:2]
    x = (args[0] if args else given["hidden_states"])[:2]
    t = torch.as_tensor(given["timestep"] if "timestep" in given else args[1]).float().reshape(-1)[:1].expand(2)
    condition = condition_of(name, teacher)
    with torch.no_grad():
        got = Guided(teacher.denoiser, SCALE)(x, t, condition)
        plain = teacher.denoiser(x, t, condition)
    check_close(got, want, 1e-5)
    assert (got - plain).abs().max() > 1e-3, "guidance that does nothing would pass too"
    assert got.shape[1:] == teacher.denoiser.sample_shape


@pytest.mark.parametrize("name", NAMES)
def test_features_are_square_maps_of_every_block(name):
    denoiser = open_teacher(made(name)).denoiser
    condition = denoiser.null_condition(2)
    x, t = torch.randn(2, *denoiser.sample_shape), torch.tensor([300.0, 700.0])
    with torch.no_grad():
        x0, features = denoiser.forward_with_features(x, t, condition)
        assert torch.equal(x0, denoiser(x, t, condition))
    if name in ("sd", "sdxl"):
        assert len(features) == 3
    else:
        config = denoiser.net.config
        edge = config.sample_size // config.patch_size
        width = config.num_attention_heads * config.attention_head_dim
        assert [f.shape for f in features] == [(2, width, edge, edge)] * config.num_layers
    assert all(f.ndim == 4 and len(f) == 2 and f.is_contiguous() and f.shape[2] == f.shape[3] for f in features)
    assert all(f[0].std() > 0 for f in features)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_encoded_and_decoded_as_the_pipeline_does(name):
    teacher, (*_, latents, images) = open_teacher(made(name)), drawn(name)
    decoded = teacher.decode(latents[:2])
    assert decoded.shape == (2, *teacher.image_shape)
    check_close((decoded / 2 + 0.5).clamp(0, 1), images, 1e-5)
    pictures = torch.randint(0, 256, (3, *teacher.image_shape), dtype=torch.uint8)
    mean, std = teacher.encode_images(pictures)
    assert mean.shape == std.shape == (3, *teacher.denoiser.sample_shape) and bool((std > 0).all())
    with torch.no_grad():
        own = teacher.vae.encode(to_unit_range(pictures)).latent_dist
        check_close(teacher.decode(mean), teacher.vae.decode(own.mean).sample, 1e-5)


@pytest.mark.parametrize("name", ["sdxl", "dit"])
def test_a_clone_is_the_same_model_with_its_own_weights(name):
    denoiser = open_teacher(made(name)).denoiser
    clone = denoiser.clone().train()
    x, t, null = torch.randn(1, *denoiser.sample_shape), torch.tensor([500.0]), denoiser.null_condition(1)
    with torch.no_grad():
        check_close(clone(x, t, clone.null_condition(1)), denoiser(x, t, null), 1e-6)
        next(clone.parameters()).add_(1.0)
        assert not torch.equal(clone(x, t, null), denoiser(x, t, null))
    assert not any("null" in key for key in denoiser.state_dict())


def test_prompts_of_the_shipped_text_model():
    pipe = load_pipeline("tiny-sd")
    teacher = open_teacher(pipe)
    read = functools.partial(encode_prompts, pipe.tokenizer, pipe.text_encoder)
    check_close(teacher.encode(["red apple"])["encoder_hidden_states"], read(["red apple"]), 1e-6)
    check_close(teacher.denoiser.null_condition(1)["encoder_hidden_states"], read([""]), 1e-6)
    assert teacher.textual and teacher.image_shape == (3, 64, 64) and teacher.denoiser.sample_shape[1:] == (16, 16)
    many = [f"{number} apples" for number in range(33)]  # more than are encoded at once
    check_close(teacher.encode(many)["encoder_hidden_states"], read(many), 1e-5)


def test_pixel_models_need_no_coding():
    teacher = open_teacher(load_pipeline("digits"))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(teacher.decode(x), x) and teacher.image_shape == (1, 8, 8) and not teacher.textual
    mean, std = teacher.encode_images(torch.full((2, 1, 8, 8), 255, dtype=torch.uint8))
    assert torch.equal(mean, torch.ones(2, 1, 8, 8)) and not std.any()
    with pytest.raises(UsageError, match="reads no text"):
        teacher.encode(["a cat"])


@pytest.mark.parametrize("name", ["flux", "wan", "ltx", "svd"])
def test_other_pipelines_are_refused_by_name(name):
    pipe = PIPELINES[name].build()
    with pytest.raises(UsageError, match=f"A {type(pipe).__name__} cannot be distilled; expected one of ClassCond"):
        denoiser_of(pipe)


@pytest.mark.parametrize(("name", "part"), [("pixart", "VAE"), ("sdxl", "text encoder")])
def test_pipelines_without_a_part_are_refused(name, part):
    with pytest.raises(UsageError, match=f"has no {part}, without which it cannot be distilled"):
        open_teacher(PIPELINES[name].build())


def test_schedules_and_predictions_that_are_not_known_are_refused():
    pipe = PIPELINES["sd"].build()
    pipe.scheduler.register_to_config(prediction_type="v-prediction")
    with pytest.raises(UsageError, match=r"Unknown prediction type 'v-prediction'\. Did you mean 'v_prediction'"):
        open_teacher(pipe)
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(UsageError, match="EDM"):
        open_teacher(pipe)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"time_cond_proj_dim": 8}, "time_cond_proj_dim=8"), ({"in_channels": 9}, "in_channels=9 for out_channels=4")],
)
def test_networks_that_are_told_more_are_refused(change, words):
    """Students that are told the guidance scale, and networks that repaint a picture."""
    pipe = copy.copy(PIPELINES["sd"].build())
    pipe.unet = _rebuilt(pipe.unet, **change)
    with pytest.raises(UsageError, match=words):
        open_teacher(pipe)
