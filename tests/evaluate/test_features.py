"""Feature extractors: identity, refusals, determinism, and the contract with torchmetrics."""

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from diffaccel.core.errors import DataError, UsageError
from diffaccel.evaluate.features import FEATURES, FeatureExtractor, get_features
from diffaccel.evaluate.run import evaluate_fid
from diffaccel.models.data import load_digits


def _images(n, channels, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def _fitting(extractor, n, seed=0):
    """Random images that the extractor reads."""
    return _images(n, extractor.channels, (extractor.image_size or (8, 8))[0], seed)


BUNDLED = sorted(name for name, record in FEATURES.items() if "weights" not in record.options)


@pytest.fixture(params=BUNDLED, scope="module")
def extractor(request):
    return get_features(request.param)


def test_record_and_instance_agree(extractor):
    record = FEATURES[extractor.name]
    features = extractor(_fitting(extractor, 3))
    assert features.shape == (3, record.num_features) and features.dtype == torch.float32
    assert not features.requires_grad
    assert extractor.num_features == record.num_features


def test_identity_is_stable_and_complete(extractor):
    identity = extractor.identity()
    assert identity == get_features(extractor.name).identity()
    assert set(identity) == {"name", "dim", "sha256", "preprocessing", "dtype"} and len(identity["sha256"]) == 64


def test_evaluation_mode_cannot_be_left(extractor):
    assert not any(module.training for module in extractor.train().modules())


def test_images_are_treated_one_by_one(extractor):
    images = _fitting(extractor, 9)
    apart = torch.cat([extractor(part) for part in images.split(2)])
    torch.testing.assert_close(apart, extractor(images), rtol=1e-4, atol=1e-5)
    assert extractor(images[:0]).shape == (0, extractor.num_features)


def test_wrong_images_are_refused(extractor):
    with pytest.raises(UsageError, match="uint8"):
        extractor(torch.rand(2, extractor.channels, 8, 8))
    with pytest.raises(DataError, match="reads"):
        extractor(_images(2, 4, 8))


def test_unknown_name_gets_a_hint():
    with pytest.raises(UsageError, match="digits64"):
        get_features("digit64")


@pytest.mark.parametrize("size", [1, 2, 8, 33, 64])
def test_random_conv_takes_any_size(size):
    features = get_features("random-conv")(_images(2, 3, size))
    assert features.shape == (2, 128) and bool(torch.isfinite(features).all())


def test_random_conv_weights_are_pinned():
    weights = get_features("random-conv").weights_sha256()
    assert weights == "6ebde31f28ecc84b920583a31eeca7bda46f4cb8ba40e9ead332ab70f3baf7e3"


def test_a_batch_norm_extractor_stays_deterministic():
    class Toy(FeatureExtractor):
        name, num_features, channels, preprocessing = "toy", 3, 3, "none"

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))
            self.eval()

        def extract(self, images):
            return self.net(images.float()).mean((2, 3))

    toy = Toy()
    images = _images(4, 3, 8)
    assert torch.equal(toy.train()(images), toy(images))


def test_torchmetrics_gives_the_same_distance(extractor):
    fake, real = _fitting(extractor, 150), _fitting(extractor, 170, seed=1) // 2
    metric = FrechetInceptionDistance(feature=extractor)
    for part in real.split(40):
        metric.update(part, real=True)
    metric.update(fake, real=False)
    ours = evaluate_fid(fake, real, extractor).value
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def _corruptions():
    clean = load_digits("heldout")[0]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    blurred = nn.functional.avg_pool2d(clean.float(), 3, stride=1, padding=1)
    yield "noise", [(clean + 255 * level * noise).clamp(0, 255).byte() for level in (0, 0.2, 0.4, 0.8)]
    yield "blur", [((1 - level) * clean + level * blurred).byte() for level in (0, 0.3, 0.6, 1.0)]
    yield "brightness", [(clean + 255 * level).clamp(0, 255).byte() for level in (0, 0.2, 0.4, 0.8)]


@pytest.mark.parametrize("kind", ["noise", "blur", "brightness"])
@pytest.mark.parametrize("name", ["digits64", "random-conv"])
def test_distance_grows_with_the_strength_of_a_corruption(name, kind):
    values = [evaluate_fid(images, "digits", name).value for images in dict(_corruptions())[kind]]
    assert values == sorted(values) and values[-1] > 5 * values[0]


def test_double_precision_of_torchmetrics_leaves_the_extractor_as_it_is(extractor):
    fake, real = _fitting(extractor, 150), _fitting(extractor, 170, seed=1)
    metric = FrechetInceptionDistance(feature=extractor).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert float(metric.compute()) == pytest.approx(evaluate_fid(fake, real, extractor).value, rel=1e-6)
    assert all(t.dtype == torch.float32 for t in extractor.state_dict().values() if t.is_floating_point())
