"""Statistics files: round trip, readable elsewhere, and every way in which they can be wrong."""

import json
import pickle

import numpy as np
import pytest
import torch

from diffaccel.core.errors import DataError
from diffaccel.evaluate.moments import Moments
from diffaccel.evaluate.statistics import check_features, load_statistics, save_statistics

IDENTITY = {"name": "toy", "dim": 4, "sha256": "00", "preprocessing": "none"}


def _moments(n=50):
    return Moments(4).update(torch.randn(n, 4, generator=torch.Generator().manual_seed(0)))


def _save(path, features=IDENTITY):
    save_statistics(path, _moments(), features, {"kind": "tensor", "digest": "abc"}, {"torch": "x"})
    return path


def test_round_trip_is_exact_and_byte_identical(tmp_path):
    first, second = _save(tmp_path / "a.npz"), _save(tmp_path / "b.npz")
    assert first.read_bytes() == second.read_bytes()
    loaded = load_statistics(first)
    assert torch.equal(loaded.gaussian.mu, _moments().mean)
    assert torch.equal(loaded.gaussian.sigma, (_moments().covariance + _moments().covariance.T) / 2)
    assert loaded.count == 50 and loaded.features == IDENTITY
    check_features(first, loaded, IDENTITY)


def test_keys_are_those_of_pytorch_fid(tmp_path):
    with np.load(_save(tmp_path / "a.npz"), allow_pickle=False) as archive:
        assert archive["mu"].shape == (4,) and archive["sigma"].shape == (4, 4)
        assert archive["mu"].dtype == archive["sigma"].dtype == np.float64
        assert json.loads(str(archive["header"]))["features"]["name"] == "toy"


@pytest.mark.parametrize("keys", [("mu", "sigma"), ("m2", "s2")])
def test_files_of_other_tools_load_without_identity(tmp_path, keys):
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (np.zeros(3), np.eye(3)), strict=True)))
    loaded = load_statistics(tmp_path / "a.npz")
    assert loaded.features is None and loaded.count is None and loaded.num_features == 3


def test_another_extractor_is_refused_by_name(tmp_path):
    loaded = load_statistics(_save(tmp_path / "a.npz"))
    for key, value in (("name", "other"), ("sha256", "11"), ("preprocessing", "resize")):
        with pytest.raises(DataError, match="was made with toy"):
            check_features("a.npz", loaded, IDENTITY | {key: value})
    with pytest.raises(DataError, match="4-dimensional"):
        check_features("a.npz", loaded, IDENTITY | {"dim": 64})


def _asymmetric():
    sigma = np.eye(3)
    sigma[0, 1] = 1e-3
    return sigma


WRONG_NUMBERS = {
    "not symmetric": {"mu": np.zeros(3), "sigma": _asymmetric()},
    "smallest eigenvalue": {"mu": np.zeros(3), "sigma": np.diag([1.0, 1.0, -0.1])},
    "NaN": {"mu": np.array([0.0, np.nan, 0.0]), "sigma": np.eye(3)},
    r"must be \(d,\)": {"mu": np.zeros(4), "sigma": np.eye(3)},
    "floating point": {"mu": np.zeros(3, dtype=int), "sigma": np.eye(3)},
    "no mu and sigma": {"mu": np.zeros(3)},
    "sample images": {"arr_0": np.zeros((2, 8, 8, 3), dtype=np.uint8)},
    "n must be": {"mu": np.zeros(3), "sigma": np.eye(3), "n": np.float64(3.5)},
    "not JSON": {"mu": np.zeros(3), "sigma": np.eye(3), "header": np.array("{")},
    "schema": {"mu": np.zeros(3), "sigma": np.eye(3), "header": np.array("[]")},
}


@pytest.mark.parametrize("sentence", WRONG_NUMBERS)
def test_wrong_numbers_are_explained(tmp_path, sentence):
    np.savez(tmp_path / "a.npz", **WRONG_NUMBERS[sentence])
    with pytest.raises(DataError, match=sentence):
        load_statistics(tmp_path / "a.npz")


class _Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("container", ["plain pickle", "object array", "object array .npy"])
def test_pickles_are_refused_and_never_run(tmp_path, container):
    marker, path = tmp_path / "executed", tmp_path / "a.npz"
    bomb = np.empty(1, dtype=object)
    bomb[0] = _Bomb(marker)
    if container == "plain pickle":
        path.write_bytes(pickle.dumps(_Bomb(marker)))
    elif container == "object array":
        np.savez(path, mu=bomb, sigma=bomb)
    else:
        with path.open("wb") as file:
            np.save(file, bomb)
    with pytest.raises(DataError, match="pickle"):
        load_statistics(path)
    assert not marker.exists()


def test_truncated_flipped_and_missing_files(tmp_path):
    data = _save(tmp_path / "a.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(data[: len(data) // 2])
    flipped = bytearray(data)
    flipped[200] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    for name in ("short.npz", "flipped.npz", "missing.npz"):
        with pytest.raises(DataError, match=name):
            load_statistics(tmp_path / name)


def test_a_huge_claim_is_not_believed(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000000,), }".ljust(117) + b"\n"
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        archive.writestr("mu.npy", member)
        archive.writestr("sigma.npy", member)
    with pytest.raises(DataError, match="damaged"):
        load_statistics(tmp_path / "a.npz")
