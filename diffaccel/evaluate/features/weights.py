"""The weight file of the FID network: where it is looked for, and what is accepted. Nothing is downloaded.

Two projects publish the same 95 628 359 bytes under two names; their SHA-256 is checked before a byte is interpreted.
A conversion to safetensors has other bytes and no published hash, so it needs ``verify=False``; identities of features
are hashes of the tensors, equal for the published file and a faithful conversion of it.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import torch

from ...core.errors import DataError, MissingWeightsError

VARIABLE = "DIFFACCEL_INCEPTION"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URLS = {
    "pt_inception-2015-12-05-6726825d.pth": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
    "weights-inception-2015-12-05-6726825d.pth": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
}
_COUNTER = "num_batches_tracked"  # of batch norms; no part of the function, in some files, not in others


def find_inception_weights(weights=None) -> Path:
    """Find the weight file: the argument, else the variable DIFFACCEL_INCEPTION, else torch's hub cache.

    Args:
        weights: a file, or a folder that holds a published file; None for the places above. The cache is
            ``hub/checkpoints`` below TORCH_HOME, where pytorch-fid and torch-fidelity keep their downloads.

    Raises:
        MissingWeightsError: nothing there; says which file to get and where to put it.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    given = weights or os.environ.get(VARIABLE)
    place = Path(given).expanduser() if given else cache
    for file in [place / name for name in URLS] if place.is_dir() else [place]:
        if file.is_file():
            return file
    said = "" if weights or not given else f" ({VARIABLE})"
    sources = " or ".join(url + name for name, url in URLS.items())
    raise MissingWeightsError(
        f"No Inception weights at {place}{said}; expected {' or '.join(URLS)} (SHA-256 {SHA256[:8]}…, 96 MB). "
        f"Get it from {sources}, then put it into {cache}, or name it with --weights FILE or {VARIABLE}."
    )


def load_inception_weights(
    template: dict[str, torch.Tensor], weights=None, verify: bool = True
) -> dict[str, torch.Tensor]:
    """Find, check and read the weights; no pickled code runs, whatever the file holds.

    Args:
        template: names with tensors of the right shape and type, as of `InceptionNet().state_dict()`.
        weights: as in `find_inception_weights`.
        verify: refuse files other than the published one.

    Returns:
        The tensors under the names of the template, on the CPU; counters of batch norms are zero.

    Raises:
        MissingWeightsError: no weights on this machine.
        DataError: another file, a damaged one, or tensors that are not this network's.
    """
    path = find_inception_weights(weights)
    try:
        with path.open("rb") as file:  # one open file for hash and content: it cannot be exchanged in between
            if verify:
                _check_hash(path, file)
            tensors = _read(path, file)
    except OSError as error:
        raise DataError(f"Cannot read the Inception weights {path}: {error.strerror}.") from error
    return _fit(path, tensors, template)


def _check_hash(path: Path, file: BinaryIO) -> None:
    got = hashlib.file_digest(file, "sha256").hexdigest()
    if got == SHA256:
        return
    if path.suffix == ".safetensors":
        reason = "a conversion cannot be checked against it; use the .pth file, or --unverified-weights (verify=False) if you trust it"
    else:
        reason = f"get {' or '.join(URLS)} again, or allow other weights with --unverified-weights (verify=False)"
    raise DataError(f"{path} has SHA-256 {got[:8]}…, the published Inception weights {SHA256[:8]}…; {reason}.")


def _read(path: Path, file: BinaryIO) -> dict:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle, zip and safetensors raise many kinds, some with advice to load code
        raise DataError(
            f"{path} cannot be read as a plain file of tensors; expected {' or '.join(URLS)}, or a .safetensors file."
        ) from error


def _fit(path: Path, tensors, template: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors in the order of the template, or say what the first differences are."""
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise DataError(f"{path} must hold named tensors only; expected {' or '.join(URLS)}.")
    wanted = {name: value for name, value in template.items() if not name.endswith(_COUNTER)}
    extra = [name for name in tensors if name not in template]
    missing = [name for name in wanted if name not in tensors]
    wrong = [name for name in wanted if name in tensors and _kind(tensors[name]) != _kind(wanted[name])]
    findings = [
        f"{len(names)} {what} ({', '.join(map(str, names[:3]))}{', …' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", extra), ("of another shape or type", wrong))
        if names
    ]
    if wrong:
        got, expected = _kind(tensors[wrong[0]]), _kind(wanted[wrong[0]])
        findings.append(f"{wrong[0]} is {got}, expected {expected}")
    if findings:
        raise DataError(
            f"{path} does not hold the FID Inception network: {'; '.join(findings)}. torchvision's Inception is "
            f"another network; get {' or '.join(URLS)}."
        )
    return {name: tensors[name] if name in wanted else torch.zeros((), dtype=torch.int64) for name in template}


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
