"""The files that travel with the package, and their hashes. Importing this needs neither torch nor diffusers."""

import json
from pathlib import Path

from ..core.errors import DataError
from ..core.files import sha256_file

ASSETS = Path(__file__).parent / "assets"
FIGURES, PICTURE = "figures.json", "samples.png"


def shipped_hashes(name: str) -> dict[str, str]:
    """SHA-256 of the files of assets/NAME, by path below it.

    Raises:
        DataError: the list of them is missing or damaged.
    """
    file = ASSETS / name / "SHA256.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        raise DataError(f"{file} is missing or damaged; reinstall diffaccel.") from None


def check_shipped(name: str, below: str = "") -> None:
    """Compare the shipped files of assets/NAME whose path starts with ``below`` with their hashes.

    Raises:
        DataError: a file is missing or damaged.
    """
    wanted = {path: digest for path, digest in shipped_hashes(name).items() if path.startswith(below)}
    if not wanted:
        raise DataError(f"{ASSETS / name / below} is missing; reinstall diffaccel.")
    for path, digest in wanted.items():
        file = ASSETS / name / path
        if not file.is_file() or sha256_file(file) != digest:
            raise DataError(f"{file} is missing or damaged (its SHA-256 does not match); reinstall diffaccel.")


def shipped_size(name: str, below: str = "") -> int:
    """Bytes of the shipped files of assets/NAME whose path starts with ``below``."""
    files = (ASSETS / name / path for path in shipped_hashes(name) if path.startswith(below))
    return sum(file.stat().st_size for file in files if file.is_file())


def shipped_figures(name: str) -> dict:
    """What was measured of the teacher in assets/NAME, by `benchmarks/teachers.py`; empty where that is not readable."""
    try:
        return json.loads((ASSETS / name / FIGURES).read_text())
    except (OSError, ValueError):
        return {}
