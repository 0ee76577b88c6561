"""Trains the latent U-Net of the text-to-image teacher: its third stage."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError

from ..core.errors import DataError
from ..core.images import to_unit_range
from ..core.rng import KeyedRandom, seeded
from ..core.schedule import from_diffusers
from ..models.emoji import load_emoji
from ..models.emoji_encoder import EmojiEncoder, load_emoji_encoder, save_tokenizer
from ..models.prompts import save_prompts
from ..models.quiet import quiet_transformers
from ..models.shipped import ASSETS, check_shipped
from ..models.unet_condition import UNetConditionDenoiser, encode_prompts
from .checkpoint import load_module
from .checks import check_at_least, check_shares, check_unet
from .method import Draw, Loss, Method, Phase

SHOWN = (
    "red apple", "grinning face", "pizza", "cat face", "rocket", "rose", "thumbs up", "sunflower", "soccer ball", "dog face",
    "banana", "ghost", "automobile", "red heart", "birthday cake", "tiger face", "guitar", "house building", "fire", "crying face",
    "strawberry", "panda face", "sailboat", "blue heart", "hamburger", "fox face", "umbrella", "christmas tree", "key", "angry face",
    "watermelon", "frog face", "airplane", "star", "hot dog", "penguin", "clown face", "mountain", "bell", "thinking face",
)  # fmt: skip


class EmojiTextToImage(Method):
    """Mean squared error of the latent prediction at stratified times; prompts are dropped for guidance.

    Latents and text states are computed once. A picture's caption is drawn among its captions.
    """

    main_role = "model"
    reference = "emoji"

    @dataclass
    class Config:
        """Attributes:
        autoencoder: final/ of the recipe tiny-sd-vae; "" for the one that is shipped.
        text: final/ of the recipe tiny-sd-text; "" for the one that is shipped.
        start: a pipeline of the same shapes whose U-Net training begins with; "" for a fresh one.
        channels: widths of the resolutions 16, 8 and 4; text is read at the last two.
        prediction_type: what the network predicts.
        null_probability: share of samples trained with the empty prompt.
        sampling_steps, guidance_scale: of the pictures.
        archive: the .tgz of the npm package of pictures; "" fetches it.
        """

        autoencoder: str = ""
        text: str = ""
        start: str = ""
        channels: tuple[int, ...] = (48, 96, 192)
        prediction_type: str = "v_prediction"
        null_probability: float = 0.1
        sampling_steps: int = 20
        guidance_scale: float = 3.0
        archive: str = ""

        def __post_init__(self):
            check_unet(self.channels, self.prediction_type)
            check_shares(null_probability=self.null_probability)
            check_at_least(1, sampling_steps=self.sampling_steps, guidance_scale=self.guidance_scale)

    def __init__(self, config: Config, seed: int):
        self.config = config
        self.drawing = {"guidance_scale": config.guidance_scale, "steps": config.sampling_steps}
        self.pictures = load_emoji(Path(config.archive) if config.archive else None)
        self.autoencoder = _autoencoder(config.autoencoder).eval().requires_grad_(False)
        encoder = _encoder(config.text)
        self.tokenizer, self.text_encoder = encoder.tokenizer, copy.deepcopy(encoder.text)  # the shipped one is shared
        self.scheduler = DPMSolverMultistepScheduler(
            prediction_type=config.prediction_type,
            beta_start=1e-4,
            beta_end=0.02,
            timestep_spacing="trailing",
            steps_offset=1,  # has no effect here; StableDiffusionPipeline insists on it
        )
        every = range(len(config.channels))
        with seeded(seed):
            net = UNet2DConditionModel(
                sample_size=self.autoencoder.config.sample_size
                // 2 ** (len(self.autoencoder.config.block_out_channels) - 1),
                in_channels=self.autoencoder.config.latent_channels,
                out_channels=self.autoencoder.config.latent_channels,
                layers_per_block=1,
                block_out_channels=config.channels,
                down_block_types=["CrossAttnDownBlock2D" if level else "DownBlock2D" for level in every],
                up_block_types=["CrossAttnUpBlock2D" if level else "UpBlock2D" for level in reversed(every)],
                cross_attention_dim=self.text_encoder.config.hidden_size,
                attention_head_dim=[max(1, width // 32) for width in config.channels],  # diffusers' name for heads
                norm_num_groups=8,
            )
        if config.start:
            begun = _opened(config.start, lambda path: UNet2DConditionModel.from_pretrained(path, subfolder="unet"))
            load_module(net, begun.state_dict(), config.start)
        null = {"encoder_hidden_states": encode_prompts(self.tokenizer, self.text_encoder, [""])[0]}
        schedule = from_diffusers(self.scheduler)
        self.roles = {"model": UNetConditionDenoiser(net, schedule, config.prediction_type, null)}
        self._encode()

    @torch.no_grad()
    def _encode(self) -> None:
        images = to_unit_range(self.pictures.on_white())
        posteriors = [self.autoencoder.encode(part).latent_dist for part in images.split(256)]
        self.latents = torch.cat([one.mean for one in posteriors]) * self.autoencoder.config.scaling_factor
        self.spread = torch.cat([one.std for one in posteriors]) * self.autoencoder.config.scaling_factor
        texts = list(dict.fromkeys(text for captions in self.pictures.captions for text in captions))
        self.states = encode_prompts(self.tokenizer, self.text_encoder, texts)
        self.place = {text: index for index, text in enumerate(texts)}

    def to(self, device):
        for name in ("latents", "spread", "states", "autoencoder", "text_encoder"):
            setattr(self, name, getattr(self, name).to(device))

    def phases(self, step: int) -> list[Phase]:
        return [Phase("denoise", ("model",))]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        model: UNetConditionDenoiser = self.roles["model"]
        index = self.pictures.draw(draw.uniform("concept"), draw.uniform("variant"))
        own = [self.place[text] for text in self.pictures.captions_of(index, draw.uniform("caption"))]
        dropped = draw.uniform("null") < self.config.null_probability
        states = torch.where(dropped[:, None, None], model.null_encoder_hidden_states, self.states[own])
        index = index.to(self.latents.device)
        x0 = self.latents[index] + self.spread[index] * draw.normal("posterior", model.sample_shape)
        t = model.schedule.time(draw.stratified("time"))
        eps = draw.normal("eps", model.sample_shape)
        return Loss(model.denoising_error(x0, t, eps, {"encoder_hidden_states": states}).mean())

    def samples(self, model: UNetConditionDenoiser, random: KeyedRandom) -> torch.Tensor:
        """One picture of each of forty prompts, drawn as users draw."""
        pipeline = self._pipeline(model)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            list(SHOWN),
            num_inference_steps=self.config.sampling_steps,
            guidance_scale=self.config.guidance_scale,
            latents=random.normal("picture", 0, 0, len(SHOWN), model.sample_shape).to(
                model.null_encoder_hidden_states.device
            ),
            output_type="pt",
        ).images
        return to_unit_range((images * 255.0).round())

    def export(self, model: UNetConditionDenoiser, folder: Path) -> None:
        with quiet_transformers():
            self._pipeline(model).save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder / "tokenizer")
        save_prompts([self.pictures.captions[index][0] for index in self.pictures.reference()], folder)

    def _pipeline(self, model: UNetConditionDenoiser) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=self.autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=model.net,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def _autoencoder(folder: str) -> AutoencoderKL:
    if folder:
        return _opened(folder, AutoencoderKL.from_pretrained)
    check_shipped("tiny-sd", "teacher/vae/")
    return AutoencoderKL.from_pretrained(ASSETS / "tiny-sd" / "teacher" / "vae")


def _encoder(folder: str) -> EmojiEncoder:
    return _opened(folder, EmojiEncoder.load) if folder else load_emoji_encoder()


def _opened(folder: str, load):
    """What an earlier stage left in a folder.

    Raises:
        DataError: it is not there, or damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"There is no folder {folder}; give final/ of a run of the earlier stage, see the recipe.")
    try:
        return load(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"Cannot use {folder}: {reason}") from error
