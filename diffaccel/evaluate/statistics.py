"""Reference statistics in .npz files that pytorch-fid, EDM and others read too; never a pickle.

Keys: ``mu`` (d,), ``sigma`` (d, d) float64, ``n`` and ``header``, a JSON string with the identity of the feature
extractor, the source and the library versions. Other tools write only ``mu`` and ``sigma`` (or ``m2``, ``s2``).
"""

import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..core.errors import DataError
from ..core.files import write_atomic
from .metrics.frechet import NEGATIVE_TOLERANCE, Gaussian
from .moments import Moments

_SCHEMA = 1
_MAX_BYTES = 2**32  # uncompressed; d = 16384 still fits
_SYMMETRY_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Statistics:
    """Content of a statistics file; ``count`` and ``features`` are None where the file does not tell."""

    gaussian: Gaussian
    count: int | None = None
    features: dict | None = None
    header: dict = field(default_factory=dict)

    @property
    def num_features(self) -> int:
        """Length d of the feature vectors."""
        return self.gaussian.mu.numel()


def save_statistics(path, moments: Moments, features: dict, source: dict, versions: dict) -> None:
    """Write moments and the identity of what they were computed with (see `FeatureExtractor.identity`), atomically."""
    header = {"schema": _SCHEMA, "features": features, "source": source, "versions": versions}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=moments.mean.numpy(),
        sigma=moments.covariance.numpy(),
        n=np.int64(moments.count),
        header=np.array(json.dumps(header, sort_keys=True)),
    )
    write_atomic(path, buffer.getvalue())


def load_statistics(path) -> Statistics:
    """Read and check a statistics file.

    Raises:
        DataError: unreadable, a pickle, a sample batch, or numbers that are not a mean and a covariance.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    mu = arrays.get("mu", arrays.get("m2"))
    sigma = arrays.get("sigma", arrays.get("s2"))
    if mu is None or sigma is None:
        raise DataError(f"{path} has no mu and sigma; it holds {', '.join(sorted(arrays)) or 'nothing that is known'}.")
    gaussian = _checked(path, mu, sigma)
    header = _parse_header(path, arrays.get("header"))
    return Statistics(gaussian, _parse_count(path, arrays.get("n")), header.get("features"), header)


def check_features(path, statistics: Statistics, identity: dict) -> None:
    """Refuse statistics that were made with another extractor than the one of ``identity``.

    Raises:
        DataError: naming both.
    """
    if statistics.num_features != identity["dim"]:
        got, expected = statistics.num_features, identity["dim"]
        raise DataError(f"{path} holds {got}-dimensional features, but {identity['name']} has {expected}.")
    recorded = statistics.features
    if recorded is None:
        return
    for key in ("name", "sha256", "preprocessing"):
        if recorded.get(key) != identity[key]:
            got = f"{recorded.get('name')} ({key} {recorded.get(key)})"
            raise DataError(
                f"{path} was made with {got}, but {identity['name']} ({key} {identity[key]}) was asked for."
            )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        if not zipfile.is_zipfile(path):
            path.stat()  # a missing file gets its own sentence
            raise DataError(f"{path} is not an .npz archive (pickles and .npy files are not read).")
        with zipfile.ZipFile(path) as archive:
            names = {info.filename.removesuffix(".npy") for info in archive.infolist()}
            if sum(info.file_size for info in archive.infolist()) > _MAX_BYTES:
                raise DataError(f"{path} unpacks to more than {_MAX_BYTES >> 30} GiB; that is no statistics file.")
        if "arr_0" in names and not names & {"mu", "m2"}:
            raise DataError(
                f"{path} is a batch of sample images (arr_0), not statistics; save them as PNG files first."
            )
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("mu", "sigma", "m2", "s2", "n", "header") if name in archive.files}
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # zipfile, zlib and numpy raise many types on damaged input, ValueError on a pickle
        raise DataError(f"{path} is damaged or contains a pickle, which is never executed: {error}.") from error


def _checked(path: Path, mu: np.ndarray, sigma: np.ndarray) -> Gaussian:
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
    return Gaussian(torch.from_numpy(mu), torch.from_numpy(sigma))


def _parse_header(path: Path, header: np.ndarray | None) -> dict:
    if header is None:
        return {}
    try:
        parsed = json.loads(str(header[()]))
    except ValueError as error:
        raise DataError(f"{path}: the header is not JSON.") from error
    features = parsed.get("features") if isinstance(parsed, dict) else None
    if not isinstance(features, dict) or parsed.get("schema") != _SCHEMA:
        raise DataError(f"{path}: the header is not of schema {_SCHEMA}.")
    return parsed


def _parse_count(path: Path, count: np.ndarray | None) -> int | None:
    if count is None:
        return None
    if count.shape != () or count.dtype.kind not in "iu" or int(count) < 2:
        raise DataError(f"{path}: n must be an integer of at least 2.")
    return int(count)
