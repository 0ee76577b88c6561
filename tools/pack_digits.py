"""Write diffaccel/models/assets/digits/data.npz from scikit-learn's copy of the UCI hand-written digits.

Run `python tools/pack_digits.py` with scikit-learn installed. The split is stratified: of every class the first fifth
in a keyed random order is held out, so it can be recomputed anywhere (tests/models/test_data.py does).
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from diffaccel.core.rng import KeyedRandom

TARGET = Path(__file__).parents[1] / "diffaccel/models/assets/digits/data.npz"


def held_out(labels: np.ndarray) -> np.ndarray:
    """Boolean mask (N,) of the held-out fifth of each class."""
    mask = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        order = KeyedRandom(0).permutation("digits-split", digit, len(members)).numpy()
        mask[members[order[: len(members) // 5]]] = True
    return mask


if __name__ == "__main__":
    digits = load_digits()
    labels = digits.target.astype(np.uint8)
    np.savez_compressed(TARGET, levels=digits.images.astype(np.uint8), labels=labels, held_out=held_out(labels))
    print(f"{TARGET}: {len(labels)} images, {int(held_out(labels).sum())} held out, {TARGET.stat().st_size} bytes")
