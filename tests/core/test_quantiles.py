import numpy as np
import pytest
import scipy.stats
import torch

from diffaccel.core.errors import UsageError
from diffaccel.core.quantiles import beta_quantile


@pytest.mark.parametrize("shape", [0.05, 0.3, 0.5, 0.6, 0.9, 1.0])
def test_beta_quantile_equals_scipy(shape):
    p = np.concatenate([np.linspace(0.0, 1.0, 1001), [1e-9, 1 - 1e-9]])
    ours = beta_quantile(torch.tensor(p), shape)
    np.testing.assert_allclose(ours.numpy(), scipy.stats.beta.ppf(p, shape, shape), rtol=0, atol=1e-13)
    assert beta_quantile(0.25, 0.5).item() == pytest.approx(np.sin(np.pi / 8) ** 2)
    assert beta_quantile(torch.zeros(2, 3), shape).shape == (2, 3)


@pytest.mark.parametrize("shape", [0.0, 1.5, -1.0])
def test_other_shapes_are_refused(shape):
    with pytest.raises(UsageError, match=r"\(0, 1\]"):
        beta_quantile([0.5], shape)
