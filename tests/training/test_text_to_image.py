"""The three stages of the text-to-image teacher on a dozen synthetic pictures."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from emoji import synthetic_pictures

from diffaccel.core.errors import DataError
from diffaccel.core.images import to_unit_range
from diffaccel.core.rng import KeyedRandom
from diffaccel.models.unet_condition import encode_prompts
from diffaccel.training import autoencoding, contrast, text_to_image
from diffaccel.training.config import OptimizerConfig, TrainerConfig
from diffaccel.training.method import Draw, Phase
from diffaccel.training.rundir import RunDirectory
from diffaccel.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(stage, method, steps, lr)`: the final/ folder of a short run."""

    def run(stage: str, method, steps: int, lr: float, batch_size: int = 8):
        path = tmp_path_factory.mktemp(stage) / "run"
        optimizer = {method.main_role: OptimizerConfig(lr=lr)}
        config = TrainerConfig(steps=steps, batch_size=batch_size, ema=0.0, optimizers=optimizer, device="cpu")
        with RunDirectory(path, {}, False, True) as directory:
            Trainer(method, config, directory, progress=False).fit()
        return path / "final"

    return run


@pytest.fixture(scope="module", autouse=True)
def pictures():
    found = synthetic_pictures()
    with pytest.MonkeyPatch.context() as patch:
        for module in (autoencoding, contrast, text_to_image):
            patch.setattr(module, "load_emoji", lambda archive=None: found)
        yield found


@pytest.fixture(scope="module")
def autoencoder(trained):
    config = autoencoding.EmojiAutoencoding.Config(channels=(8, 16), coloured=0.0, largest_shift=0)
    return trained("vae", autoencoding.EmojiAutoencoding(config, 0), steps=30, lr=3e-3)


@pytest.fixture(scope="module")
def text(trained):
    config = contrast.EmojiContrast.Config(vocabulary=600, longest=16, noise=0.1)
    return trained("text", contrast.EmojiContrast(config, 0), steps=60, lr=1e-3, batch_size=16)


@pytest.fixture(scope="module")
def method(autoencoder, text):
    config = text_to_image.EmojiTextToImage.Config(str(autoencoder), str(text), channels=(8, 16), sampling_steps=2)
    return text_to_image.EmojiTextToImage(config, 0)


@pytest.fixture(scope="module")
def pipeline_folder(method, trained):
    return trained("unet", method, steps=3, lr=1e-3)


def test_exported_latents_are_standard_and_pictures_get_closer(autoencoder, pictures):
    model = AutoencoderKL.from_pretrained(autoencoder)
    x = to_unit_range(pictures.on_white())
    with torch.no_grad():
        z = model.encode(x).latent_dist.mode().double()
        decoded = model.decode(z.float()).sample
    weight = pictures.probabilities()
    mean = (weight[:, None] * z.flatten(2).mean(2)).sum(0)
    variance = (weight[:, None, None, None] * (z - mean[None, :, None, None]).square()).sum(0).flatten(1).mean(1)
    assert mean.abs().max() < 1e-3 and (variance - 1.0).abs().max() < 1e-3
    assert model.config.scaling_factor == 1.0
    log = [json.loads(line) for line in (autoencoder.parent / "metrics.jsonl").read_text().splitlines()]
    losses = [row["reconstruct/loss"] for row in log if "reconstruct/loss" in row]
    assert losses[-1] < 0.7 * losses[0] and decoded.shape == x.shape


def test_a_change_of_latent_units_changes_no_reconstruction():
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    x, eps = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 16, 16)

    def through():
        posterior = model.encode(x).latent_dist
        return posterior.mean + posterior.std * eps, model.decode(posterior.mean + posterior.std * eps).sample

    with torch.no_grad():
        before, decoded = through()
        mean, deviation = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([2.0, 0.3, 1.0, 5.0])
        autoencoding.standardise(model, mean, deviation)
        after, again = through()
    expected = (before - mean[:, None, None]) / deviation[:, None, None]
    assert torch.allclose(after, expected, atol=1e-4) and torch.allclose(decoded, again, atol=1e-4)


def test_pictures_find_their_captions(text, pictures):
    from diffaccel.models.emoji_encoder import EmojiEncoder

    encoder = EmojiEncoder.load(text)
    with torch.no_grad():
        similar = (
            encoder.picture(to_unit_range(pictures.on_white()))
            @ encoder.embed_texts([captions[0] for captions in pictures.captions]).T
        )
    assert (similar.argmax(1) == torch.arange(len(pictures))).float().mean() > 0.7
    features = encoder.picture.features(to_unit_range(pictures.on_white())).double()
    weight = pictures.probabilities()[:, None]
    variance = (weight * (features - (weight * features).sum(0)).square()).sum()
    assert abs(float(variance) - 100.0) < 1e-2


def test_equal_pictures_of_a_batch_are_no_negatives_of_each_other(pictures):
    method = contrast.EmojiContrast(contrast.EmojiContrast.Config(vocabulary=600, longest=16, noise=0.0, tint=0.0), 0)
    pictures_of_one = Draw(KeyedRandom(0), "match/0", 0, 0, 4, 4, torch.device("cpu"))
    draws = {
        "draw": lambda self, u, v: torch.zeros(4, dtype=torch.long),
        "captions_of": lambda self, i, u: ["red bar"] * 4,
    }
    method.pictures = type("One", (), draws)()
    method.config.largest_shift = 0
    loss = method.loss(Phase("match", ("encoder",)), pictures_of_one)
    assert (
        abs(float(loss.total.detach()) - torch.log(torch.tensor(4.0)).item()) < 1e-4
    )  # all alike: nothing to tell apart


def test_prompts_are_read_as_the_pipeline_reads_them(pipeline_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    prompts = ["red square", "blue frame, dark skin tone"]
    own = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, prompts)
    theirs = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
    assert torch.allclose(own, theirs, atol=1e-6)


def test_the_stock_pipeline_opens_and_draws_it(pipeline_folder, method):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("red square", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    assert len((pipeline_folder / "prompts.txt").read_text().splitlines()) == 1700
    assert pipeline.vae_scale_factor == 2 and pipeline.unet.config.sample_size == 32


def test_losses_are_the_same_whenever_they_are_taken_and_however_they_are_split(method):
    config = autoencoding.EmojiAutoencoding.Config(channels=(8, 16))
    for each, phase in ((method, "denoise"), (autoencoding.EmojiAutoencoding(config, 0), "reconstruct")):
        parts = [(0, 8), (0, 8), (0, 4), (4, 4)]
        draws = [Draw(KeyedRandom(0), f"{phase}/0", 3, *part, 8, torch.device("cpu")) for part in parts]
        with torch.no_grad():
            whole, again, *halves = (float(each.loss(Phase(phase, (each.main_role,)), draw).total) for draw in draws)
        assert whole == again and abs(whole - sum(halves) / 2) < 1e-4 * whole


def test_the_null_condition_is_the_empty_prompt(method):
    model = method.roles["model"]
    empty = encode_prompts(method.tokenizer, method.text_encoder, [""])
    null = model.null_condition(3)["encoder_hidden_states"]
    assert null.shape == (3, *empty.shape[1:]) and torch.allclose(null[1], empty[0], atol=1e-6)


def test_training_begins_with_another_pipeline_where_told(method, pipeline_folder):
    config = text_to_image.EmojiTextToImage.Config(**{**vars(method.config), "start": str(pipeline_folder)})
    begun = text_to_image.EmojiTextToImage(config, 1)
    stored = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None).unet
    for name, value in begun.roles["model"].net.state_dict().items():
        assert torch.equal(value, stored.state_dict()[name])


@pytest.mark.parametrize("missing", ["autoencoder", "text", "start"])
def test_stages_that_are_missing_are_named(method, missing, tmp_path):
    for folder, words in ((tmp_path / "nothing", "There is no folder"), (tmp_path, "Cannot use")):
        config = text_to_image.EmojiTextToImage.Config(**{**vars(method.config), missing: str(folder)})
        with pytest.raises(DataError, match=words):
            text_to_image.EmojiTextToImage(config, 0)
