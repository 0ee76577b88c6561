import itertools

import diffusers
import pytest
import torch

from diffaccel.core.errors import UsageError
from diffaccel.core.prediction import EDM_TYPES, PREDICTION_TYPES, coefficients, convert
from diffaccel.core.schedule import EDM

ALPHA, SIGMA = 0.8, 0.6
X0, EPS = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
X = ALPHA * X0 + SIGMA * EPS
TRUTH = {"sample": X0, "epsilon": EPS, "v_prediction": ALPHA * EPS - SIGMA * X0, "flow_prediction": EPS - X0}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTION_TYPES, repeat=2)))
def test_every_conversion_is_exact(source, target):
    torch.testing.assert_close(convert(TRUTH[source], X, source, target, ALPHA, SIGMA), TRUTH[target])
    alpha, sigma = (torch.full((4, 1), value, dtype=torch.float64) for value in (ALPHA, SIGMA))
    torch.testing.assert_close(convert(TRUTH[source], X, source, target, alpha, sigma), TRUTH[target])


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize(("kind", "name"), [("edm", "epsilon"), ("edm_v", "v_prediction")])
def test_edm_output_equals_preconditioning(kind, name, sigma_data):
    stock = diffusers.EDMEulerScheduler(prediction_type=name, sigma_data=sigma_data)
    for rho in (0.002, 0.4, 80.0, 700.0):
        alpha, sigma = (float(value) for value in EDM(0.002, 700.0, sigma_data).level_from_rho(rho))
        x0 = stock.precondition_outputs(X0 + rho * EPS, TRUTH["flow_prediction"], rho)  # any network output
        x = stock.precondition_inputs(X0 + rho * EPS, rho)
        ours = convert(TRUTH["flow_prediction"], x, kind, "sample", alpha, sigma)
        torch.testing.assert_close(ours, x0, rtol=1e-8, atol=1e-8)
        eps = convert(TRUTH["flow_prediction"], x, kind, "epsilon", alpha, sigma)
        torch.testing.assert_close(alpha * x0 + sigma * eps, x, rtol=1e-8, atol=1e-8)
        for other in ("sample", "epsilon", "v_prediction", *EDM_TYPES):
            there = convert(TRUTH["flow_prediction"], x, kind, other, alpha, sigma)
            back = convert(there, x, other, kind, alpha, sigma)
            torch.testing.assert_close(back, TRUTH["flow_prediction"], rtol=1e-6, atol=1e-6)


def test_edm_v_is_v_where_the_data_have_unit_variance():
    alpha, sigma = EDM(0.002, 700.0, 1.0).level_from_rho(torch.tensor([0.01, 1.0, 300.0]))
    for ours, v in zip(
        coefficients("edm_v", "sample", alpha, sigma), coefficients("v_prediction", "sample", alpha, sigma), strict=True
    ):
        torch.testing.assert_close(ours, v)


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
