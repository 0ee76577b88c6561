"""Features of DINOv2 and CLIP on tiny random models, against forwards of transformers on independent pixels."""

import json
import shutil

import numpy as np
import pytest
import torch
from encoders import END, LIMIT, TOKENS, save_clip, save_dinov2
from PIL import Image
from torch.nn import functional as F
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from diffaccel.core.errors import DataError, MissingWeightsError, UsageError
from diffaccel.evaluate.features import FEATURES, get_features

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NAMES = ["dinov2", "clip"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models as transformers made them, with the folders they were saved to."""
    root = tmp_path_factory.mktemp("models")
    made = {"dinov2": save_dinov2(root / "dinov2"), "clip": save_clip(root / "clip")}
    return {name: (model, root / name) for name, model in made.items()}


@pytest.fixture(scope="module", params=NAMES)
def extractor(request, models):
    return get_features(request.param, weights=models[request.param][1])


@pytest.fixture(scope="module")
def clip(models):
    return get_features("clip", weights=models["clip"][1])


def _images(n, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def _pixels(images, size, constants):
    """Network input by Pillow's float bicubic and NumPy in double precision."""
    planes = images.flatten(0, 1).numpy().astype(np.float32)
    resized = np.stack([Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC) for plane in planes])
    mean, deviation = (np.array(values).reshape(3, 1, 1) for values in constants)
    return ((resized.reshape(-1, 3, size, size).astype(np.float64) / 255 - mean) / deviation).astype(np.float32)


def _bicubic(grid, n, scale):
    """Samples of (G, G, d) at (i + ½)/scale − ½ by Keys' kernel with a = −¾, edges repeated."""

    def weights(length):
        matrix = np.zeros((n, length))
        for i in range(n):
            at = (i + 0.5) / scale - 0.5
            for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
                s, a = abs(at - j), -0.75
                w = (a + 2) * s**3 - (a + 3) * s**2 + 1 if s <= 1 else a * (s**3 - 5 * s**2 + 8 * s - 4)
                matrix[i, min(max(j, 0), length - 1)] += w
        return matrix

    return np.einsum("ia,jb,abd->ijd", weights(grid.shape[0]), weights(grid.shape[1]), grid)


def test_dinov2_is_the_class_token_with_positions_as_the_authors_resample_them(models):
    model, folder = models["dinov2"]
    positions = model.embeddings.position_embeddings
    grid = positions[0, 1:].detach().double().numpy().reshape(4, 4, 16)
    resampled = torch.from_numpy(_bicubic(grid, 16, 16.1 / 4)).float().reshape(1, 256, 16)
    images = _images(3, 70, 50)
    try:
        model.embeddings.position_embeddings = torch.nn.Parameter(torch.cat([positions[:, :1], resampled], 1))
        with torch.no_grad():
            output = model(torch.from_numpy(_pixels(images, 224, IMAGENET)))
    finally:
        model.embeddings.position_embeddings = positions
    features = get_features("dinov2", weights=folder)(images)
    torch.testing.assert_close(features, output.last_hidden_state[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features, output.pooler_output, rtol=1e-5, atol=1e-5)


def test_dinov2_keeps_positions_that_fit(tmp_path):
    model = save_dinov2(tmp_path, 224)
    images = _images(2, 224, 224)
    with torch.no_grad():
        expected = model(torch.from_numpy(_pixels(images, 224, IMAGENET))).pooler_output
    torch.testing.assert_close(get_features("dinov2", weights=tmp_path)(images), expected, rtol=1e-5, atol=1e-5)


def _clip_reference(model, pixels):
    with torch.no_grad():
        output = model.get_image_features(torch.from_numpy(pixels))
    return getattr(output, "pooler_output", output)  # a tensor before transformers 5


def test_clip_is_the_projected_embedding(models, clip):
    model, _ = models["clip"]
    images = _images(3, 28, 28)
    torch.testing.assert_close(clip(images), _clip_reference(model, _pixels(images, 28, OPENAI)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("crop", [True, False])
def test_clip_crops_or_squeezes_and_rounds_to_bytes(models, crop):
    model, folder = models["clip"]
    images = _images(3, 40, 61)
    seen = images[..., 10:50] if crop else images
    planes = (plane.float().numpy() for plane in seen.flatten(0, 1))
    resized = np.stack([Image.fromarray(plane).resize((28, 28), Image.Resampling.BICUBIC) for plane in planes])
    pixels = torch.from_numpy(resized.round().clip(0, 255)).byte().unflatten(0, (3, 3))
    clip = get_features("clip", weights=folder, crop=crop)
    torch.testing.assert_close(clip(images), _clip_reference(model, _pixels(pixels, 28, OPENAI)), rtol=1e-5, atol=1e-5)
    assert ("central square" in clip.preprocessing) == crop


def test_the_processor_of_transformers_sees_the_same_square_images(clip):
    from transformers import CLIPImageProcessorPil

    images = _images(3, 64, 64) // 2 + 64  # overshoot stays within a byte, or Pillow would cut it between its passes
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    theirs = processor(images=list(images), return_tensors="pt")["pixel_values"]
    levels = (clip._input(images) - theirs).abs() * 255 * torch.tensor(OPENAI[1]).view(3, 1, 1)
    assert levels.max() < 1.01  # Pillow also rounds between its passes: ½·1.3 + ½ + ½ < 2, hence at most 1


def test_any_sizes_and_batches_give_the_same_features(extractor):
    images = [_images(1, *size, seed=i)[0] for i, size in enumerate([(8, 8), (40, 60), (300, 20), (40, 60), (1, 1)])]
    features = extractor(images)
    assert features.shape == (5, extractor.num_features) and features.dtype == torch.float32
    assert not features.requires_grad and not any(p.requires_grad for p in extractor.parameters())
    apart = torch.cat([extractor(image[None]) for image in images])
    torch.testing.assert_close(features, apart, rtol=1e-5, atol=1e-5)
    assert extractor(_images(0, 8, 8)).shape == (0, extractor.num_features)


def test_bfloat16_is_close_and_part_of_the_identity(models, extractor):
    rough = get_features(extractor.name, weights=models[extractor.name][1]).prepare(dtype="bfloat16")
    images = _images(4, 32, 32)
    exact = extractor(images)
    assert 0 < (rough(images) - exact).norm() < 0.02 * exact.norm()
    assert rough.identity() == {**extractor.identity(), "dtype": "bfloat16"}


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")  # that it keeps all features
def test_torchmetrics_accepts_them(extractor):
    fid, kid = FrechetInceptionDistance(extractor), KernelInceptionDistance(extractor, subsets=2, subset_size=5)
    for real in (True, False):
        images = _images(20, 30, 30, seed=int(real)) // (1 + real)
        fid.update(images, real=real)
        kid.update(images, real=real)
    assert float(fid.compute()) > 0 and np.isfinite(float(kid.compute()[0]))


def test_nothing_is_printed(models, capfd):
    for name in NAMES:
        get_features(name, weights=models[name][1])(_images(1, 8, 8))
    get_features("clip", weights=models["clip"][1]).embed_texts(["a b " * LIMIT])
    assert capfd.readouterr() == ("", "")


class _Processor:
    """What torchmetrics expects of a processor."""

    def __init__(self, folder):
        from transformers import CLIPImageProcessorPil, CLIPTokenizerFast

        self.images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        self.texts = CLIPTokenizerFast.from_pretrained(folder)

    def __call__(self, text=None, images=None, return_tensors="pt", padding=True):
        if text is not None:
            return self.texts(text, return_tensors=return_tensors, padding=padding)
        return self.images(images=images, return_tensors=return_tensors)


class _Embeddings(torch.nn.Module):
    """CLIPModel with tensors as results, which torchmetrics expects and transformers 5 no longer gives."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *arguments):
        output = self.model.get_image_features(*arguments)
        return getattr(output, "pooler_output", output).detach()

    def get_text_features(self, *arguments):
        output = self.model.get_text_features(*arguments)
        return getattr(output, "pooler_output", output).detach()


def test_clip_score_of_torchmetrics(models, clip):
    model, folder = models["clip"]
    images, texts = _images(4, 28, 28), ["a cat", "dog", "Ten  Dogs", "c"]
    embedded, truncated = clip.embed_texts(texts)
    ours = 100 * F.cosine_similarity(clip(images), embedded).mean().clamp(min=0)
    theirs = clip_score(images, texts, lambda: (_Embeddings(model), _Processor(folder)))
    assert truncated == 0 and float(ours) == pytest.approx(float(theirs), abs=1e-4)


def test_long_captions_keep_their_end_token_and_are_counted(models, clip):
    model, _ = models["clip"]
    fits, longer = "a" * (LIMIT - 2), "a" * (LIMIT + 5)  # a token per letter, and two ends
    features, truncated = clip.embed_texts([fits, longer, "b"])
    assert truncated == 1 and features.shape == (3, 8) and not features.requires_grad
    letters = [TOKENS.index("a")] * (LIMIT - 3)
    for last, row in (("a</w>", features[0]), ("a", features[1])):
        ids = torch.tensor([[END - 1, *letters, TOKENS.index(last), END]])
        with torch.no_grad():
            expected = model.text_projection(model.text_model(ids).pooler_output)[0]
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clip.embed_texts(["b"])[0][0], features[2], rtol=1e-5, atol=1e-5)
    assert clip.embed_texts([])[0].shape == (0, 8)


def test_old_configurations_end_at_the_highest_token(tmp_path, clip):
    save_clip(tmp_path, eos_token_id=2)
    texts = ["a cat", "c", "a long long text"]
    old = get_features("clip", weights=tmp_path)
    torch.testing.assert_close(old.embed_texts(texts), clip.embed_texts(texts), rtol=1e-5, atol=1e-5)


def test_a_tokenizer_must_be_there_intact_and_the_models_own(models, tmp_path):
    folder = shutil.copytree(models["clip"][1], tmp_path / "clip")
    clip = get_features("clip", weights=folder)
    with pytest.raises(UsageError, match="list of texts"):
        clip.embed_texts("a cat")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(reversed(TOKENS))}))
    with pytest.raises(DataError, match="does not belong"):
        clip.embed_texts(["a cat"])
    for damage in (b"{", b"[1]"):
        (folder / "vocab.json").write_bytes(damage)
        with pytest.raises(DataError, match="damaged"):
            get_features("clip", weights=folder).embed_texts(["a cat"])
    (folder / "vocab.json").unlink()
    with pytest.raises(MissingWeightsError, match=r"tokenizer\.json"):
        get_features("clip", weights=folder).embed_texts(["a cat"])


def test_records_and_options():
    for name in NAMES:
        assert FEATURES[name].num_features == {"dinov2": 1024, "clip": 768}[name]
        with pytest.raises(UsageError, match="no option 'resize'"):
            get_features(name, resize="bilinear")
