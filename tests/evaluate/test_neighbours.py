"""Precision, recall, density and coverage: equal to the definition, and right in direction on planted sets."""

import numpy as np
import pytest
import torch

from diffaccel.core.errors import DataError, NumericalError, UsageError
from diffaccel.evaluate.metrics.frechet import frechet_distance
from diffaccel.evaluate.metrics.kernel import kid
from diffaccel.evaluate.metrics.neighbours import prdc


def _normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _values(fake, real, k=5, **options):
    return {key: estimate.value for key, estimate in prdc(fake, real, k, **options).items()}


def _naive(fake, real, k):
    """The definitions on full distance matrices, as in the package that published density and coverage."""
    fake, real = np.asarray(fake, dtype=np.float64), np.asarray(real, dtype=np.float64)

    def distances(a, b):
        return np.sqrt(((a[:, None] - b) ** 2).sum(-1))

    radius_real = np.sort(distances(real, real), axis=1)[:, k]
    radius_fake = np.sort(distances(fake, fake), axis=1)[:, k]
    cross = distances(real, fake)
    in_real = cross < radius_real[:, None]
    return {
        "precision": in_real.any(0).mean(),
        "recall": (cross < radius_fake).any(1).mean(),
        "density": in_real.sum(0).mean() / k,
        "coverage": (cross.min(1) < radius_real).mean(),
    }


@pytest.mark.parametrize("k", [1, 3, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_the_definition(k, dtype):
    fake, real = (1.3 * _normal(0, 150, 8) + 0.4).to(dtype), (_normal(1, 210, 8) + 100.0).to(dtype) - 100.0
    ours, naive = _values(fake, real, k), _naive(fake, real, k)
    assert list(ours) == list(naive)
    for key in naive:
        assert ours[key] == pytest.approx(naive[key], rel=1e-14), key
        assert 0 < ours[key] < 2


@pytest.mark.parametrize("chunk", [1, 17, 1000])
def test_chunks_do_not_matter(chunk):
    fake, real = _normal(0, 150, 8), _normal(1, 210, 8)
    fake[:40] = real[:40]  # ties: neighbours of real points that are fake points too
    assert prdc(fake, real, chunk=chunk) == prdc(fake, real)


def test_rotation_shift_and_scale_do_not_matter():
    fake, real = 1.2 * _normal(0, 150, 8), _normal(1, 210, 8)
    q = torch.linalg.qr(_normal(2, 8, 8)).Q
    assert prdc(7 * fake @ q + 50, 7 * real @ q + 50) == prdc(fake, real)


def test_swapped_sides_swap_precision_and_recall():
    fake, real = 0.6 * _normal(0, 200, 6), _normal(1, 200, 6)
    forth, back = _values(fake, real), _values(real, fake)
    assert forth["precision"] == back["recall"] and forth["recall"] == back["precision"]
    assert forth["precision"] > 0.9 > 0.6 > forth["recall"]


def _mixture(seed, classes, each=60, noise=1.0):
    """Classes far apart in 6 dimensions."""
    centres = 20.0 * torch.eye(6, dtype=torch.float64)[list(classes)].repeat_interleave(each, 0)
    return centres + noise * _normal(seed, len(centres), 6)


REAL = _mixture(0, range(6))
GOOD = _values(_mixture(1, range(6)), REAL)


def _frechet(fake):
    return frechet_distance(fake.mean(0), torch.cov(fake.T), REAL.mean(0), torch.cov(REAL.T))


def test_a_good_set_scores_high():
    assert GOOD["precision"] > 0.7 and GOOD["recall"] > 0.7 and GOOD["coverage"] > 0.8
    assert GOOD["density"] == pytest.approx(1.0, abs=0.2)


def test_part_of_the_real_set_is_precise_and_incomplete():
    part = _values(REAL[:180], REAL)
    assert part["precision"] == 1.0
    assert 0.5 <= part["recall"] < 0.6 and 0.5 <= part["coverage"] < 0.6
    whole = _values(REAL, REAL)
    assert (whole["precision"], whole["recall"], whole["coverage"]) == (1.0, 1.0, 1.0)


def test_collapse_to_one_mode_is_precise_and_not_varied():
    collapsed = _values(REAL[:1] + 0.01 * _normal(2, 360, 6), REAL)
    assert collapsed["precision"] == 1.0 and collapsed["recall"] < 0.05 and collapsed["coverage"] < 0.05
    repeated = _values(REAL[:1].repeat(360, 1), REAL)
    assert repeated["precision"] == 1.0
    assert repeated["recall"] == pytest.approx(1 / 360)  # only the real image that is repeated
    assert 0 < repeated["coverage"] < 0.05


@pytest.mark.parametrize("missing", [1, 3])
def test_missing_classes_lower_recall_and_coverage_and_raise_distances(missing):
    fake = _mixture(1, range(6 - missing), each=60 * 6 // (6 - missing))
    values = _values(fake, REAL)
    limit = 1 - missing / 6
    assert values["recall"] <= min(limit, GOOD["recall"]) and values["coverage"] <= limit
    assert values["precision"] > 0.7
    full = _mixture(1, range(6))
    assert _frechet(fake) > 10 * _frechet(full)
    assert kid(fake, REAL).ci95[0] > max(kid(full, REAL).ci95[1], 0.0)


def test_noise_lowers_precision_and_density():
    values = [_values(_mixture(1, range(6), noise=noise), REAL) for noise in (1.0, 2.0, 4.0)]
    for key in ("precision", "density"):
        assert values[0][key] > values[1][key] + 0.1 > values[2][key]
    assert _frechet(_mixture(1, range(6), noise=2.0)) > _frechet(_mixture(1, range(6)))


def test_duplicates_are_in_the_balls_of_their_copies():
    """Six equal real images have radius 0 for k = 5; their copies still count, anything else does not."""
    real = torch.cat([REAL[:1].repeat(6, 1), REAL[60:160]]).float()
    copies = torch.cat([REAL[:1].repeat(6, 1), REAL[60:61] + 1e3 + 10 * _normal(3, 20, 6)]).float()
    result = _values(copies, real)
    assert result["precision"] == 6 / 26 and result["coverage"] == 6 / 106
    assert _values(copies + 0.1, real)["precision"] == 0.0
    twice = REAL.repeat(2, 1)
    assert _values(twice, twice) == {"precision": 1.0, "recall": 1.0, "coverage": 1.0, "density": pytest.approx(0.8)}


def test_intervals_contain_their_value_and_say_what_they_mean():
    for key, estimate in prdc(_mixture(1, range(5)), REAL).items():
        low, high = estimate.ci95
        assert low <= estimate.value <= high and high - low < 0.2
        assert estimate.method.startswith("normal" if key == "density" else "Wilson") and "as given" in estimate.method


def test_refusals():
    with pytest.raises(DataError, match="more than 5 images"):
        prdc(REAL[:5], REAL)
    with pytest.raises(DataError, match="more than 5 images"):
        prdc(REAL, REAL[:5])
    assert prdc(REAL[:6], REAL[:6])
    with pytest.raises(DataError, match="at least 2"):
        prdc(REAL[:1], REAL, k=1)
    with pytest.raises(UsageError, match="at least 1"):
        prdc(REAL, REAL, k=0)
    with pytest.raises(DataError, match="length"):
        prdc(REAL[:, :4], REAL)
    with pytest.raises(NumericalError, match="NaN"):
        prdc(REAL * float("nan"), REAL)
