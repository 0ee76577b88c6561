"""Reference statistics in files that other tools read too; never a pickle.

Keys, in an .npz archive or as tensors of a .safetensors file: ``mu`` (d,), ``sigma`` (d, d) float64, ``n``, and if asked
for the ``vectors`` (n, d) float32 themselves with ``labels`` (n,), which kernel distances and neighbours need. A header,
a JSON string, holds the identity of the feature extractor, the source and the library versions. Other tools write
only ``mu`` and ``sigma`` (lucidrains: ``m2``, ``s2``; guided-diffusion: beside the images ``arr_0``).
"""

import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..core.errors import DataError, UsageError
from ..core.files import write_atomic
from .metrics.frechet import NEGATIVE_TOLERANCE, Gaussian
from .moments import Moments

SUFFIXES = (".npz", ".safetensors")
_SCHEMA = 1
_MAX_BYTES = 2**32  # uncompressed; d = 16384 still fits
_SYMMETRY_TOLERANCE = 1e-8
_KEYS = ("mu", "sigma", "m2", "s2", "n", "vectors", "labels", "header")


@dataclass(frozen=True)
class Statistics:
    """Content of a statistics file; ``count`` and ``features`` are None where the file does not tell.

    Attributes:
        gaussian: mean and covariance.
        count: number of images.
        features: identity of the extractor.
        header: all that the file says about itself.
        vectors: (count, d) float32, the features of the images, where the file keeps them.
        labels: (count,) int64 classes of the vectors, where known.
    """

    gaussian: Gaussian
    count: int | None = None
    features: dict | None = None
    header: dict = field(default_factory=dict)
    vectors: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    @property
    def num_features(self) -> int:
        """Length d of the feature vectors."""
        return self.gaussian.mu.numel()


def save_statistics(
    path, moments: Moments, features: dict, source: dict, versions: dict, vectors=None, labels=None
) -> None:
    """Write moments and the identity of what they were computed with (see `FeatureExtractor.identity`), atomically.

    Args:
        path: a file that ends in .npz or .safetensors.
        vectors, labels: features (n, d) and classes (n,) to keep, or None.

    Raises:
        UsageError: another suffix, or a file that cannot be written.
    """
    check_suffix(path)
    header = json.dumps(
        {"schema": _SCHEMA, "features": features, "source": source, "versions": versions}, sort_keys=True
    )
    tensors = {"mu": moments.mean, "sigma": moments.covariance, "n": torch.tensor(moments.count)}
    tensors |= {} if vectors is None else {"vectors": vectors.float()}
    tensors |= {} if labels is None else {"labels": labels.long()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if Path(path).suffix.lower() == ".safetensors":
        from safetensors.torch import save

        return write_atomic(path, save(tensors, metadata={"header": header}))
    buffer = io.BytesIO()
    np.savez(buffer, header=np.array(header), **{name: tensor.numpy() for name, tensor in tensors.items()})
    write_atomic(path, buffer.getvalue())


def check_suffix(path) -> None:
    """Refuse names of statistics files that would not be recognised when read.

    Raises:
        UsageError: the suffix is not one of `SUFFIXES`.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UsageError(f"Statistics go into a file that ends in {' or '.join(SUFFIXES)}, not {path}.")


def load_statistics(path) -> Statistics:
    """Read and check a statistics file.

    Raises:
        DataError: unreadable, a pickle, a sample batch, or numbers that are not a mean and a covariance.
    """
    path = Path(path)
    arrays = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_npz(path)
    mu = arrays.get("mu", arrays.get("m2"))
    sigma = arrays.get("sigma", arrays.get("s2"))
    if mu is None or sigma is None:
        raise DataError(f"{path} has no mu and sigma; it holds {', '.join(sorted(arrays)) or 'nothing that is known'}.")
    header, count = _parse_header(path, arrays.get("header")), _parse_count(path, arrays.get("n"))
    gaussian = _checked(path, mu, sigma, count)
    vectors = _parse_vectors(path, arrays.get("vectors"), count, mu.size)
    labels = arrays.get("labels")
    if labels is not None and (labels.shape != (count,) or labels.dtype.kind not in "iu"):
        raise DataError(f"{path}: labels must be {count} integers, got {labels.dtype} of shape {labels.shape}.")
    labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return Statistics(gaussian, count, header.get("features"), header, vectors, labels)


def load_sample_batch(path) -> torch.Tensor:
    """Images (N, C, H, W) uint8 of a sample batch of guided-diffusion: key ``arr_0``, (N, H, W, 3) uint8.

    Raises:
        DataError: unreadable, a pickle, or no such images.
    """
    path = Path(path)
    images = _read_npz(path, ("arr_0",)).get("arr_0")
    if images is None:
        raise DataError(f"{path} has no arr_0: it is not a batch of sample images.")
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(f"{path}: arr_0 must be uint8 (N, H, W, 3), got {images.dtype} of shape {images.shape}.")
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def check_features(path, statistics: Statistics, identity: dict) -> None:
    """Refuse statistics that were made with another extractor than the one of ``identity``.

    Raises:
        DataError: naming both.
    """
    if statistics.num_features != identity["dim"]:
        got = f"{statistics.num_features}-dimensional features"
        made = f" of {statistics.features.get('name')}" if statistics.features else ""
        raise DataError(f"{path} holds {got}{made}, but {identity['name']} has {identity['dim']}.")
    recorded = statistics.features
    if recorded is None:
        return
    for key in ("name", "sha256", "preprocessing"):
        if recorded.get(key) != identity[key]:
            got = f"{recorded.get('name')} ({key} {recorded.get(key)})"
            how = "; --filter and --preset choose" if key == "preprocessing" and identity["name"] == "inception" else ""
            raise DataError(
                f"{path} was made with {got}, but {identity['name']} ({key} {identity[key]}) was asked for{how}."
            )


def _read_npz(path: Path, wanted: tuple[str, ...] = _KEYS) -> dict[str, np.ndarray]:
    try:
        if not zipfile.is_zipfile(path):
            path.stat()  # a missing file gets its own sentence
            raise DataError(f"{path} is not an .npz archive (pickles and .npy files are not read).")
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        if wanted is _KEYS and sum(sizes.get(name, 0) for name in wanted) > _MAX_BYTES:
            raise DataError(f"{path} unpacks to more than {_MAX_BYTES >> 30} GiB; that is no statistics file.")
        if wanted is _KEYS and "arr_0" in sizes and not sizes.keys() & {"mu", "m2"}:
            raise DataError(
                f"{path} is a batch of sample images (arr_0), not statistics; to use its images write images:{path}."
            )
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in wanted if name in archive.files}
        return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # zipfile, zlib and numpy raise many types on damaged input, ValueError on a pickle
        raise DataError(f"{path} is damaged or contains a pickle, which is never executed: {error}.") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys() if name in _KEYS}  # noqa: SIM118
            header = (file.metadata() or {}).get("header")
    except Exception as error:  # safetensors has its own error type for damage
        raise DataError(f"{path} is not a readable .safetensors file: {error}.") from error
    return arrays if header is None else arrays | {"header": np.array(header)}


def _checked(path: Path, mu: np.ndarray, sigma: np.ndarray, count: int | None) -> Gaussian:
    if mu.ndim != 1 or mu.size == 0 or sigma.shape != (mu.size, mu.size):
        raise DataError(f"{path}: mu must be (d,) and sigma (d, d), got {mu.shape} and {sigma.shape}.")
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise DataError(f"{path}: mu and sigma must be floating point, got {mu.dtype} and {sigma.dtype}.")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError(f"{path} contains NaN or infinite values.")
    asymmetry, largest = np.abs(sigma - sigma.T).max(), np.abs(sigma).max()
    if asymmetry > _SYMMETRY_TOLERANCE * largest:
        raise DataError(f"{path}: sigma is not symmetric (off by {asymmetry:.3g} at scale {largest:.3g}).")
    sigma = (sigma + sigma.T) / 2
    smallest = float(torch.linalg.eigvalsh(torch.from_numpy(sigma))[0])
    if smallest < -NEGATIVE_TOLERANCE * np.trace(sigma):
        raise DataError(f"{path}: sigma is not a covariance, its smallest eigenvalue is {smallest:.3g}.")
    rank = None if count is None else min(count - 1, mu.size)
    return Gaussian(torch.from_numpy(mu), torch.from_numpy(sigma), rank)


def _parse_header(path: Path, header: np.ndarray | None) -> dict:
    if header is None:
        return {}
    try:
        parsed = json.loads(str(header[()]))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the header is not JSON.") from error
    features = parsed.get("features") if isinstance(parsed, dict) else None
    if not isinstance(features, dict) or parsed.get("schema") != _SCHEMA:
        raise DataError(f"{path}: the header is not of schema {_SCHEMA}.")
    if not isinstance(features.get("name"), str) or not isinstance(parsed.get("source"), dict | None):
        raise DataError(f"{path}: the header does not say what the features and the source are.")
    return parsed


def _parse_count(path: Path, count: np.ndarray | None) -> int | None:
    if count is None:
        return None
    if count.shape != () or count.dtype.kind not in "iu" or int(count) < 2:
        raise DataError(f"{path}: n must be an integer of at least 2.")
    return int(count)


def _parse_vectors(path: Path, vectors: np.ndarray | None, count: int | None, dim: int) -> torch.Tensor | None:
    if vectors is None:
        return None
    if vectors.shape != (count, dim) or vectors.dtype.kind != "f":
        raise DataError(f"{path}: vectors must be float ({count}, {dim}), got {vectors.dtype} of {vectors.shape}.")
    if not np.isfinite(vectors).all():
        raise DataError(f"{path} contains NaN or infinite vectors.")
    return torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
