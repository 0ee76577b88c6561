"""Extractors from a user's own code: the contract, the identity, and a sentence for every fault."""

import os
import sys

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from diffaccel.core.errors import DataError, MissingWeightsError, NumericalError, UsageError
from diffaccel.evaluate.features import FeatureExtractor, get_features

CODE = """
import torch
from torch import nn
from diffaccel.core.errors import MissingWeightsError
from diffaccel.evaluate.features import FeatureExtractor

class Good(FeatureExtractor):
    num_features, channels, preprocessing = 2, 3, "mean and deviation of bytes"

    def __init__(self, weights=None):
        super().__init__()
        if weights == "absent":
            raise MissingWeightsError("Put them there.")
        self.net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))
        self.scale = nn.Parameter(torch.tensor(float(weights or 1)))

    def extract(self, images):
        x = self.scale * self.net(images.float())
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], dim=1)

    def more(self):
        return "more"

class Plain(nn.Module):
    num_features, channels, image_size = 3, 1, (8, 8)

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3))

    def forward(self, images):
        return self.layer(images.float())

class Output(FeatureExtractor):
    num_features, channels, preprocessing = 2, 3, ""

class Short(Output):
    def extract(self, images): return torch.zeros(len(images), 3)

class Flat(Output):
    def extract(self, images): return torch.zeros(len(images))

class Whole(Output):
    def extract(self, images): return torch.zeros(len(images), 2, dtype=torch.int64)

class Pair(Output):
    def extract(self, images): return torch.zeros(len(images), 2), None

class Nothing(Output):
    def extract(self, images): pass

class Infinite(Output):
    def extract(self, images): return torch.full((len(images), 2), torch.inf)

class Failing(Output):
    def extract(self, images): return images @ torch.zeros(7)

class NoLength(FeatureExtractor):
    channels, preprocessing = 3, ""

class NoRecipe(FeatureExtractor):
    num_features, channels = 2, 3

class BadLength(Output):
    num_features = 0

class BadSize(Output):
    image_size = 8

class Needy(Output):
    def __init__(self, path): super().__init__()

class Breaking(Output):
    def __init__(self): raise RuntimeError("no such file")

class PlainWithoutLength(nn.Module):
    pass

class Unrelated:
    pass

def function(images):
    return images
"""
BROKEN = {
    "syntax": "def (:",
    "error": "1 / 0",
    "exit": "raise SystemExit(3)",
    "needs": "import a_package_that_is_absent",
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Current folder with modules of a user, which is not on Python's path."""
    folder, before, path = tmp_path_factory.mktemp("user"), os.getcwd(), sys.path[:]
    (folder / "user_package").mkdir()
    (folder / "user_package" / "features.py").write_text(CODE)
    (folder / "user_package" / "__init__.py").write_text("from .features import Good\n")
    for name, code in BROKEN.items():
        (folder / f"user_{name}.py").write_text(code)
    os.chdir(folder)
    sys.path[:] = [entry for entry in path if entry not in ("", before)]
    yield folder
    os.chdir(before)
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("user_")]:
        del sys.modules[name]


def _get(name, **options):
    return get_features(f"module:user_package.features:{name}", **options)


def _images(n=4, channels=3, size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def test_a_subclass_is_used_as_it_is():
    extractor = _get("Good")
    x = _images().float() / (1 + 1e-5) ** 0.5  # a new batch norm in evaluation mode
    expected = torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], dim=1)
    torch.testing.assert_close(extractor(_images()), expected)
    assert isinstance(extractor, FeatureExtractor) and isinstance(extractor, sys.modules["user_package"].Good)
    assert extractor.more() == "more" and extractor.name == "module:user_package.features:Good"
    assert not any(module.training for module in extractor.train().modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_a_plain_module_is_wrapped():
    extractor = _get("Plain")
    with torch.no_grad():
        expected = extractor.module.layer.eval()(_images(channels=1).float())
    torch.testing.assert_close(extractor(_images(channels=1)), expected)
    assert (extractor.num_features, extractor.channels, extractor.image_size) == (3, 1, (8, 8))
    with pytest.raises(DataError, match=r"module:user_package\.features:Plain reads 1×8×8"):
        extractor(_images())


def test_options_go_to_the_constructor():
    torch.testing.assert_close(_get("Good", weights="3")(_images()), 3 * _get("Good")(_images()))
    with pytest.raises(UsageError, match="Good cannot be built with resize"):
        _get("Good", resize="bilinear")
    with pytest.raises(UsageError, match="Needy cannot be built with no options"):
        _get("Needy")
    with pytest.raises(MissingWeightsError, match="Put them there"):
        _get("Good", weights="absent")


def test_identity_covers_name_weights_and_code(folder):
    identity = _get("Good").identity()
    assert identity == _get("Good").identity()
    assert identity["name"] == "module:user_package.features:Good" and identity["dim"] == 2
    assert identity["sha256"] != _get("Good", weights="2").identity()["sha256"]
    reexported = get_features("module:user_package:Good").identity()
    assert reexported == {**identity, "name": "module:user_package:Good"}
    file = folder / "user_package" / "features.py"
    file.write_text(CODE.replace("x.std", "2 * x.std"))
    try:
        assert identity["sha256"] != _get("Good").identity()["sha256"]
    finally:
        file.write_text(CODE)
    assert _get("Good").identity() == identity


def test_lists_of_images_batches_and_torchmetrics_work():
    extractor = _get("Good")
    torch.testing.assert_close(extractor(list(_images())), extractor(_images()))
    assert extractor(_images(0)).shape == (0, 2)
    fid = FrechetInceptionDistance(extractor)
    fid.update(_images(9), real=True)
    fid.update(_images(9), real=False)
    assert float(fid.compute()) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("Short", DataError, r"features of shape \(4, 3\) for 4 images; expected \(4, 2\)"),
        ("Flat", DataError, r"features of shape \(4,\)"),
        ("Whole", DataError, "returns torch.int64; expected a floating-point tensor"),
        ("Pair", DataError, "returns tuple"),
        ("Nothing", DataError, "returns NoneType"),
        ("Infinite", NumericalError, "NaN or infinite"),
        ("Failing", UsageError, r"fails on torch.uint8 images of shape \(4, 3, 8, 8\): RuntimeError"),
        ("Output", DataError, "returns NoneType"),  # no extract at all
    ],
)
def test_wrong_features_name_the_class(name, error, sentence):
    with pytest.raises(error, match=f"module:user_package.features:{name} .*{sentence}"):
        _get(name)(_images())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("NoLength", "attribute num_features of .*NoLength is missing; expected a positive integer"),
        ("NoRecipe", "attribute preprocessing of .*NoRecipe is missing"),
        ("BadLength", "num_features of .* is 0"),
        ("BadSize", "image_size of .* is 8"),
        ("Breaking", "Building .*Breaking fails: RuntimeError: no such file"),
        ("PlainWithoutLength", "attribute num_features; derive it"),
        ("Unrelated", "is not a torch module; derive it from diffaccel.evaluate.features.FeatureExtractor"),
        ("function", "has a function of that name"),
        ("Absent", "has nothing of that name"),
    ],
)
def test_wrong_classes_are_refused(name, sentence):
    with pytest.raises(UsageError, match=sentence):
        _get(name)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("user_absent", "no module user_absent, .* neither in"),
        ("user_package.absent", r"no module user_package\.absent"),
        ("user_absent.deeper", "no module user_absent"),
        ("user_error", "Importing user_error, .* fails: ZeroDivisionError: division by zero"),
        ("user_syntax", "Importing user_syntax, .* fails: SyntaxError"),
        ("user_exit", "Importing user_exit, .* fails: SystemExit: 3"),
        ("user_needs", "Importing user_needs, .* No module named 'a_package_that_is_absent'"),
    ],
)
def test_modules_that_cannot_be_imported_are_refused(module, sentence):
    with pytest.raises(UsageError, match=sentence):
        get_features(f"module:{module}:Good")


@pytest.mark.parametrize("name", ["module:", "module:a", "module:a:", "module::B", "module:a/b.py:B", "module:.a:B", "module:a:B:C"])  # fmt: skip
def test_other_forms_of_the_name_are_refused(name):
    with pytest.raises(UsageError, match=r"expected module:pkg\.mod:Class"):
        get_features(name)
