"""h(r) = f''(r)·r², and the theorem that makes it the weight of the score difference."""

import pytest
import torch

from diffaccel.core.errors import UsageError
from diffaccel.distill.divergences import DIVERGENCES, get_divergence

ALL = list(DIVERGENCES.values())


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
def test_the_weight_is_the_second_derivative_times_r_squared(divergence):
    r = torch.logspace(-1, 1, 21, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(divergence.f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    assert torch.allclose(divergence.h(r.detach()), second * r.detach() ** 2, rtol=1e-10)
    step = 1e-4 * r.detach()
    f = divergence.f
    finite = (f(r + step) - 2 * f(r) + f(r - step)).detach() / step**2
    assert torch.allclose(divergence.h(r.detach()), finite * r.detach() ** 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
def test_equal_distributions_are_at_distance_zero(divergence):
    assert abs(float(divergence.f(torch.ones((), dtype=torch.float64)))) < 1e-12


@pytest.mark.parametrize("divergence", [d for d in ALL if d.name not in ("neyman", "pearson")], ids=lambda d: d.name)
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_the_gradient_of_the_divergence_is_the_weighted_score_difference(divergence, noise):
    """One dimension, p a two-mode mixture, q = N(mu, s²), both noised; integrals by quadrature on a fine grid."""
    x = torch.linspace(-14, 14, 40001, dtype=torch.float64)
    dx = x[1] - x[0]

    def normal(mean, std):
        return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * (2 * torch.pi) ** 0.5)

    s_p = (0.7**2 + noise**2) ** 0.5
    p = 0.5 * normal(-1.5, s_p) + 0.5 * normal(1.5, s_p)
    score_p = 0.5 * (normal(-1.5, s_p) * (-(x + 1.5)) + normal(1.5, s_p) * (-(x - 1.5))) / (s_p**2 * p)
    s_q = (1.4**2 + noise**2) ** 0.5

    def distance(mean):
        q = normal(mean, s_q)
        return (q * divergence.f(p / q)).sum() * dx

    mean, step = 0.4, 1e-4
    finite = (distance(mean + step) - distance(mean - step)) / (2 * step)
    q = normal(mean, s_q)
    score_q = -(x - mean) / s_q**2
    weighted = -(q * divergence.h(p / q) * (score_p - score_q)).sum() * dx  # ∂x/∂mean = 1
    assert float(weighted) == pytest.approx(float(finite), rel=1e-6)


def test_an_unknown_divergence_gets_the_nearest_name():
    with pytest.raises(UsageError, match="forward-kl"):
        get_divergence("forward_kl")
