import itertools

import pytest
import torch

from diffaccel.core.errors import UsageError
from diffaccel.core.prediction import PREDICTION_TYPES, coefficients, convert

ALPHA, SIGMA = 0.8, 0.6
X0, EPS = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
X = ALPHA * X0 + SIGMA * EPS
TRUTH = {"sample": X0, "epsilon": EPS, "v_prediction": ALPHA * EPS - SIGMA * X0, "flow_prediction": EPS - X0}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTION_TYPES, repeat=2)))
def test_every_conversion_is_exact(source, target):
    torch.testing.assert_close(convert(TRUTH[source], X, source, target, ALPHA, SIGMA), TRUTH[target])
    alpha, sigma = (torch.full((4, 1), value, dtype=torch.float64) for value in (ALPHA, SIGMA))
    torch.testing.assert_close(convert(TRUTH[source], X, source, target, alpha, sigma), TRUTH[target])


def test_flow_start_and_clean_end():
    assert coefficients("flow_prediction", "sample", 0.0, 1.0) == (1.0, -1.0)
    assert coefficients("v_prediction", "sample", 0.0, 1.0) == (0.0, -1.0)
    with pytest.raises(ZeroDivisionError):
        coefficients("epsilon", "sample", 0.0, 1.0)
    with pytest.raises(ZeroDivisionError):
        coefficients("sample", "epsilon", 1.0, 0.0)


def test_unknown_prediction_type_names_the_valid_ones():
    with pytest.raises(UsageError, match="v_prediction"):
        coefficients("v", "sample", ALPHA, SIGMA)
