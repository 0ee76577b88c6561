"""The FID network: layout and arithmetic against a second description, weight files, refusals, use in torchmetrics."""

import hashlib
import math
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from diffaccel.core.errors import DataError, MissingWeightsError, UsageError
from diffaccel.evaluate.features import FEATURES, Logits, get_features
from diffaccel.evaluate.features import weights as weight_files
from diffaccel.evaluate.features.inception import InceptionFeatures
from diffaccel.evaluate.features.inception_net import InceptionNet
from diffaccel.evaluate.features.resize import resize

PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"


def _template() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return InceptionNet().state_dict()


def _random_weights() -> dict[str, torch.Tensor]:
    """He-normal convolutions and statistics unlike the identity, so that no activation dies out or explodes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, value in _template().items():
        kind = name.rsplit(".", 1)[1]
        if kind == "num_batches_tracked":
            continue
        if name.endswith(("running_var", "bn.weight")):
            tensors[name] = 0.5 + torch.rand(value.shape, generator=generator)
        else:
            scale = math.sqrt(2 / value[0].numel()) if kind == "weight" else 0.2
            tensors[name] = scale * torch.randn(value.shape, generator=generator)
    return tensors


def _empty_layout() -> dict[str, torch.Tensor]:
    """The layout in a file of some kilobytes: one stored number per tensor, repeated."""
    return {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in _template().items()}


def _images(n, *size, seed=0):
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(_random_weights(), path, _use_new_zipfile_serialization=False)  # as the published file of 2019
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def inception(weights):
    return InceptionFeatures(weights, verify=False)


@pytest.fixture(autouse=True)
def no_weights_elsewhere(monkeypatch, tmp_path):
    monkeypatch.delenv(weight_files.VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))


# Layout


def test_names_shapes_and_counts():
    state = _template()
    parameters = {name: value for name, value in state.items() if not name.endswith(("_mean", "_var", "_tracked"))}
    assert len(state) == 94 * 6 + 2  # 94 convolutions, each with a batch norm, and the classifier
    assert sum(value.numel() for value in parameters.values()) == 23_850_960
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_3.bn.bias": (96,),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7b.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch1x1.conv.weight": (320, 2048, 1, 1),
        "Mixed_7c.branch_pool.bn.num_batches_tracked": (),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    kernels = {
        **{f"Mixed_6{b}.branch7x7_{i}": (1, 7) if i == 2 else (7, 1) for b in "bcde" for i in (2, 3)},
        **{f"Mixed_6{b}.branch7x7dbl_{i}": (7, 1) if i in (2, 4) else (1, 7) for b in "bcde" for i in (2, 3, 4, 5)},
        "Mixed_7a.branch7x7x3_2": (1, 7),
        "Mixed_7a.branch7x7x3_3": (7, 1),
        **{f"Mixed_7{b}.branch3x3_2{i}": (1, 3) if i == "a" else (3, 1) for b in "bc" for i in "ab"},
        **{f"Mixed_7{b}.branch3x3dbl_3{i}": (1, 3) if i == "a" else (3, 1) for b in "bc" for i in "ab"},
    }
    oblong = {name: tuple(value.shape[2:]) for name, value in state.items() if value.ndim == 4}
    oblong = {name.removesuffix(".conv.weight"): size for name, size in oblong.items() if size[0] != size[1]}
    assert oblong == kernels
    # Channels that a block reads, from the widths of the one before it (Szegedy et al. 2016, table 1).
    reads = {"5b": 192, "5c": 256, "5d": 288, "6a": 288, "6b": 768, "6e": 768, "7a": 768, "7b": 1280, "7c": 2048}
    for block, channels in reads.items():
        branch = "branch3x3dbl_1" if block == "6a" else "branch7x7x3_1" if block == "7a" else "branch1x1"
        assert state[f"Mixed_{block}.{branch}.conv.weight"].shape[1] == channels


def test_sizes_on_the_way_and_the_last_mean(inception):
    sizes, outputs = {}, {}

    def note(name):
        def hook(_, __, output):
            sizes[name], outputs[name] = tuple(output.shape[1:3]), output

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in inception.net.named_children()]
    features = inception(_images(1, 40, 60))
    for handle in handles:
        handle.remove()
    assert sizes == {
        "Conv2d_1a_3x3": (32, 149), "Conv2d_2a_3x3": (32, 147), "Conv2d_2b_3x3": (64, 147), "MaxPool_1": (64, 73),
        "Conv2d_3b_1x1": (80, 73), "Conv2d_4a_3x3": (192, 71), "MaxPool_2": (192, 35),
        "Mixed_5b": (256, 35), "Mixed_5c": (288, 35), "Mixed_5d": (288, 35),
        "Mixed_6a": (768, 17), "Mixed_6b": (768, 17), "Mixed_6c": (768, 17), "Mixed_6d": (768, 17),
        "Mixed_6e": (768, 17), "Mixed_7a": (1280, 8), "Mixed_7b": (2048, 8), "Mixed_7c": (2048, 8),
    }  # fmt: skip
    torch.testing.assert_close(features, outputs["Mixed_7c"].mean((2, 3)), rtol=1e-5, atol=1e-5)
    assert features.std() > 0.1  # random weights that carry a signal to the end


# Arithmetic of the blocks, spelled out


class _Spelled:
    """The units of one block, from the state dict alone."""

    def __init__(self, state, block):
        self.state, self.block = state, block

    def __call__(self, name, x, stride=1):
        kernel = self.state[f"{self.block}.{name}.conv.weight"].double()
        padding = (0, 0) if stride > 1 else (kernel.shape[2] // 2, kernel.shape[3] // 2)
        x = F.conv2d(x, kernel, stride=stride, padding=padding)
        mean, variance, weight, bias = (
            self.state[f"{self.block}.{name}.bn.{key}"].double()[:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (variance + 0.001).sqrt() * weight + bias).clamp(min=0)

    def chain(self, prefix, x, count, last_stride=1):
        for i in range(1, count + 1):
            x = self(f"{prefix}_{i}", x, last_stride if i == count else 1)
        return x

    def fork(self, prefix, x):
        return torch.cat([self(f"{prefix}{letter}", x) for letter in "ab"], 1)


def _mean_of_real_neighbours(x):
    """3×3 means in which the border has fewer than nine terms."""
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    total = F.avg_pool2d(x, 3, 1, 1) * 9
    return total / (F.avg_pool2d(ones, 3, 1, 1) * 9)


def _spelled_block(name, unit, x):
    if name.startswith("Mixed_5"):
        pooled = unit("branch_pool", _mean_of_real_neighbours(x))
        branches = [unit("branch1x1", x), unit.chain("branch5x5", x, 2), unit.chain("branch3x3dbl", x, 3), pooled]
    elif name == "Mixed_6a":
        branches = [unit("branch3x3", x, 2), unit.chain("branch3x3dbl", x, 3, 2), F.max_pool2d(x, 3, 2)]
    elif name.startswith("Mixed_6"):
        pooled = unit("branch_pool", _mean_of_real_neighbours(x))
        branches = [unit("branch1x1", x), unit.chain("branch7x7", x, 3), unit.chain("branch7x7dbl", x, 5), pooled]
    elif name == "Mixed_7a":
        branches = [unit.chain("branch3x3", x, 2, 2), unit.chain("branch7x7x3", x, 4, 2), F.max_pool2d(x, 3, 2)]
    else:
        pool = F.max_pool2d(x, 3, 1, 1) if name == "Mixed_7c" else _mean_of_real_neighbours(x)
        branches = [
            unit("branch1x1", x),
            unit.fork("branch3x3_2", unit("branch3x3_1", x)),
            unit.fork("branch3x3dbl_3", unit.chain("branch3x3dbl", x, 2)),
            unit("branch_pool", pool),
        ]
    return torch.cat(branches, 1)


@pytest.mark.parametrize("name", ["Mixed_5b", "Mixed_6a", "Mixed_6b", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"])
def test_blocks_equal_their_description(inception, name):
    block = getattr(inception.net, name)
    channels = next(value.shape[1] for key, value in block.state_dict().items() if key.endswith("_1.conv.weight"))
    x = torch.randn(1, channels, 7, 5, generator=torch.Generator().manual_seed(1))
    want = _spelled_block(name, _Spelled(inception.net.state_dict(), name), x.double())
    torch.testing.assert_close(block(x).double(), want, rtol=1e-4, atol=1e-4)


# The extractor


@pytest.mark.parametrize(("filter", "grey"), [("tf1-bilinear", 128), ("bilinear", 127.5), ("pil-bicubic", 128)])
def test_preprocessing_and_logits(inception, weights, filter, grey):
    extractor = inception if filter == "tf1-bilinear" else InceptionFeatures(weights, filter, verify=False)
    images = _images(1, 24, 33)
    features = extractor(images)
    want = inception.net((resize(images, 299, filter) - grey) / grey)
    torch.testing.assert_close(features, want, rtol=1e-5, atol=1e-5)
    unbiased = features @ inception.net.fc.weight.T
    torch.testing.assert_close(extractor.logits(features), unbiased, rtol=1e-5, atol=1e-5)
    assert filter in extractor.preprocessing and f"(x - {grey}) / {grey}" in extractor.preprocessing
    assert (extractor.identity() == inception.identity()) == (filter == "tf1-bilinear")


def test_big_batches_run_in_slices_and_sizes_may_differ(inception, monkeypatch):
    images = _images(3, 16, 16)
    together = inception(images)
    monkeypatch.setattr("diffaccel.evaluate.features.inception._SLICE", 2)
    seen = []
    handle = inception.net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    sliced = inception([images[0], _images(1, 20, 31)[0], images[2]])
    handle.remove()
    assert seen == [2, 1]
    torch.testing.assert_close(sliced[[0, 2]], together[[0, 2]], rtol=1e-4, atol=1e-4)


def test_record_and_extractor_agree(inception, weights):
    record, built = FEATURES["inception"], get_features("inception", weights=weights, verify=False, resize="bilinear")
    assert (built.name, built.num_features) == (record.name, record.num_features)
    assert (built.num_classes, built.channels, built.resizes, built.input_size) == (1008, 3, True, 299)
    assert not any(module.training for module in built.train().modules())
    assert not any(parameter.requires_grad for parameter in built.parameters())
    assert built.weights_sha256() == inception.weights_sha256()
    with pytest.raises(UsageError, match="Did you mean 'tf1-bilinear'"):
        get_features("inception", weights=weights, resize="tf-bilinear")
    with pytest.raises(UsageError, match="uint8"):
        built(torch.rand(1, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:Metric `:UserWarning")
def test_torchmetrics_accepts_it(inception):
    fake, real = _images(4, 20, 20), _images(4, 20, 20, seed=1) // 2
    known = {id(images): inception(images) for images in (fake, real)}
    fid = FrechetInceptionDistance(feature=inception)  # without compute: 2048² eigenvalues take most of a minute
    fid.update(real, real=True)
    fid.update(fake, real=False)
    torch.testing.assert_close(fid.real_features_sum, known[id(real)].double().sum(0), rtol=1e-4, atol=1e-4)
    assert fid.fake_features_cov_sum.shape == (2048, 2048) and fid.fake_features_num_samples == 4
    # The other two would only run the network on the same images again.
    inception_forward = inception.forward
    inception.forward = lambda images: known[id(images)]
    try:
        kid = KernelInceptionDistance(feature=inception, subsets=2, subset_size=4)
        kid.update(real, real=True)
        kid.update(fake, real=False)
        score = InceptionScore(feature=Logits(inception), splits=2)
        score.update(fake)
    finally:
        inception.forward = inception_forward
    assert kid.compute()[0] > 0 and 1 <= score.compute()[0] <= 2


# Weight files


def test_two_formats_have_one_identity(inception, tmp_path):
    path = tmp_path / "converted.safetensors"
    # Counters of batch norms are in some files and not in others; they are no part of the function.
    save_file(_random_weights() | {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(7)}, path)
    with pytest.raises(DataError, match=r"conversion.*--unverified-weights"):
        InceptionFeatures(path)
    converted = InceptionFeatures(path, verify=False)
    path.unlink()
    assert converted.identity() == inception.identity()
    converted.net.fc.bias[0] += 1
    assert converted.identity() != inception.identity()


def test_only_the_published_hash_is_verified(tmp_path, monkeypatch):
    path = tmp_path / PUBLISHED
    torch.save(_empty_layout(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=rf"{digest[:8]}….*6726825d….*--unverified-weights"):
        InceptionFeatures(path)
    monkeypatch.setattr(weight_files, "SHA256", digest)
    assert InceptionFeatures(path).num_features == 2048


class _Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("container", ["zip", "legacy", "plain pickle", "among tensors"])
@pytest.mark.parametrize("verify", [True, False])
def test_pickled_code_never_runs(tmp_path, monkeypatch, container, verify):
    marker, path = tmp_path / "executed", tmp_path / PUBLISHED
    if container == "plain pickle":
        path.write_bytes(pickle.dumps(_Bomb(marker)))
    else:
        content = _empty_layout() | {"fc.bias": _Bomb(marker)} if container == "among tensors" else _Bomb(marker)
        torch.save(content, path, _use_new_zipfile_serialization=container != "legacy")
    with pytest.raises(DataError):
        InceptionFeatures(path, verify=verify)
    # Not even with the right hash.
    monkeypatch.setattr(weight_files, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(DataError, match="plain file of tensors"):
        InceptionFeatures(path, verify=verify)
    assert not marker.exists()


def _without(*names):
    return {name: value for name, value in _empty_layout().items() if name not in names}


DAMAGE = {
    r"1 missing \(fc\.bias\)": lambda: _without("fc.bias"),
    r"188 missing \(Conv2d_1a_3x3\.bn\.running_mean, .*, …\)": lambda: _without(
        *(name for name in _template() if name.endswith(("running_mean", "running_var")))
    ),
    r"1 unknown \(AuxLogits\.fc\.bias\).*torchvision": lambda: (
        _empty_layout() | {"AuxLogits.fc.bias": torch.zeros(1000)}
    ),
    r"fc\.weight is float32 \(1000, 2048\), expected float32 \(1008, 2048\)": lambda: (
        _empty_layout() | {"fc.weight": torch.zeros(()).expand(1000, 2048)}
    ),
    r"fc\.bias is float16 \(1008,\), expected float32": lambda: _empty_layout() | {"fc.bias": torch.zeros(1008).half()},
    "named tensors only": lambda: {"state_dict": _empty_layout()},
}


@pytest.mark.parametrize("sentence", DAMAGE)
def test_other_layouts_are_explained(tmp_path, sentence):
    torch.save(DAMAGE[sentence](), tmp_path / "w.pth")
    with pytest.raises(DataError, match=sentence):
        InceptionFeatures(tmp_path / "w.pth", verify=False)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"PK\x03\x04 truncated"])
def test_damaged_files_are_explained(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as a plain file of tensors"):
        InceptionFeatures(tmp_path / name, verify=False)


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(MissingWeightsError) as caught:
        InceptionFeatures()
    cache = tmp_path / "torch-home" / "hub" / "checkpoints"
    for part in (*weight_files.URLS, "https://github.com/mseitzer", "6726825d", str(cache), weight_files.VARIABLE):
        assert part in str(caught.value)
    assert caught.value.exit_code == 4
    for given in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(MissingWeightsError, match=re.escape(str(given))):
            InceptionFeatures(given)
    monkeypatch.setenv(weight_files.VARIABLE, str(tmp_path / "elsewhere.pth"))
    with pytest.raises(MissingWeightsError, match=rf"elsewhere\.pth \({weight_files.VARIABLE}\)"):
        InceptionFeatures()


def test_order_of_the_places(tmp_path, monkeypatch):
    cache = tmp_path / "torch-home" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    for name in reversed(weight_files.URLS):
        (cache / name).touch()
        assert weight_files.find_inception_weights() == cache / name
    named, given = tmp_path / "named.pth", tmp_path / "given.pth"
    named.touch()
    given.touch()
    monkeypatch.setenv(weight_files.VARIABLE, str(named))
    assert weight_files.find_inception_weights() == named
    assert weight_files.find_inception_weights(str(given)) == given
    assert weight_files.find_inception_weights(cache).parent == cache
