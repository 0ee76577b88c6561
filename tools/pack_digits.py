"""Write diffaccel/models/assets/digits/data.npz from scikit-learn's copy of the UCI hand-written digits.

Run `python tools/pack_digits.py` with scikit-learn installed. The split is stratified: of every class the first fifth
in a keyed random order is held out, so it can be recomputed anywhere (tests/models/test_data.py does).
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from diffaccel.models.data import stratified_fifth

TARGET = Path(__file__).parents[1] / "diffaccel/models/assets/digits/data.npz"


if __name__ == "__main__":
    digits = load_digits()
    labels = digits.target.astype(np.uint8)
    mask = stratified_fifth(labels, "digits-split")
    np.savez_compressed(TARGET, levels=digits.images.astype(np.uint8), labels=labels, held_out=mask)
    print(f"{TARGET}: {len(labels)} images, {int(mask.sum())} held out, {TARGET.stat().st_size} bytes")
