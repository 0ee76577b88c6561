"""Guidance as arithmetic: identities, and equality with the same things in diffusers."""

import pytest
import torch
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.guiders.guider_utils import rescale_noise_cfg

from diffaccel.guidance import functional as F

SHAPES = [(3, 4, 8, 8), (3, 4, 2, 6, 6), (3, 32, 16), (3, 5)]  # images, videos, packed tokens, vectors


def pair(shape=(3, 4, 8, 8), count: int = 2, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def close(left, right, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def test_classifier_free_guidance_goes_from_u_through_c():
    c, u = pair()
    assert torch.equal(F.classifier_free(c, u, 0.0), u)
    close(F.classifier_free(c, u, 1.0), c)
    close(F.classifier_free(c, u, 3.0), 3 * c - 2 * u)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_each_sample_alone(shape):
    a, b = pair(shape)
    for index in range(len(a)):
        close(F.inner(a, b)[index].item(), torch.dot(a[index].flatten(), b[index].flatten()).item())
        close(F.norm(a)[index].item(), torch.linalg.vector_norm(a[index]).item())
    assert F.inner(a, b).shape == (3, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projection_leaves_something_perpendicular(shape):
    a, b = pair(shape)
    close(F.inner(a - F.projection(a, b), b), torch.zeros(3, *[1] * (len(shape) - 1), dtype=a.dtype))
    close(F.projection(F.projection(a, b), b), F.projection(a, b))
    close(F.projection(2.5 * b, b), 2.5 * b)
    close(F.projection(a, -3.0 * b), F.projection(a, b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_is_divided_by_zero(dtype):
    a, zero = pair(dtype=dtype)[0], torch.zeros(3, 4, 8, 8, dtype=dtype)
    assert torch.equal(F.projection(a, zero), zero)
    assert torch.equal(F.capped(zero, 2.0), zero)
    assert torch.equal(F.zero_star(a, zero, 3.0), 3.0 * a)
    assert F.projection(a, a).dtype == F.capped(a, 1.0).dtype == dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_cap_acts_on_longer_differences_only(shape):
    a = pair(shape)[0]
    a = a / F.norm(a) * torch.tensor([0.5, 2.0, 8.0]).double().reshape(3, *[1] * (len(shape) - 1))
    capped = F.capped(a, 2.0)
    close(F.norm(capped).flatten(), torch.tensor([0.5, 2.0, 2.0]).double())
    assert torch.equal(capped[0], a[0])
    close(capped[2], a[2] / 4)
    assert F.capped(a, None) is a


def test_eta_scales_the_parallel_part_alone():
    d, onto = pair()
    assert F.projected(d, onto, 1.0) is d
    for eta in (0.0, 0.3, 2.0):
        result = F.projected(d, onto, eta)
        close(F.projection(result, onto), eta * F.projection(d, onto))
        close(F.projected(result, onto, 0.0), F.projected(d, onto, 0.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [0.0, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(shape, factor):
    c, guided = pair(shape)
    close(F.rescaled(3 * guided, c, factor), rescale_noise_cfg(3 * guided, c, factor))
    axes = tuple(range(1, c.ndim))
    if factor == 1.0:
        close(F.rescaled(3 * guided, c, factor).std(axes), c.std(axes))
    close(F.rescaled(c, c, factor), c)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zero_star_takes_the_nearest_multiple_of_u(shape):
    c, u = pair(shape)
    share = cfg_zero_star_scale(c.flatten(1), u.flatten(1)).reshape(3, *[1] * (c.ndim - 1))
    close(F.zero_star(c, u, 4.0), share * u + 4.0 * (c - share * u), 1e-6)
    close(F.zero_star(c, u, 1.0), c)
    close(F.zero_star(2.5 * u, u, 7.0), 2.5 * u)
    close(F.zero_star(c, 9.0 * u, 4.0), F.zero_star(c, u, 4.0))


def test_perpendicular_negatives_spare_the_positive():
    c, u, n, m = pair(count=4)
    cfg = F.classifier_free(c, u, 5.0)
    close(F.perpendicular_negatives(c, u, [], [], 5.0), cfg)
    close(F.perpendicular_negatives(c, u, [c], [1.0], 5.0), cfg)
    close(F.perpendicular_negatives(c, u, [u], [1.0], 5.0), cfg)
    close(F.perpendicular_negatives(c, u, [n], [0.0], 5.0), cfg)
    both = F.perpendicular_negatives(c, u, [n, m], [0.5, 2.0], 5.0)
    close(F.perpendicular_negatives(c, u, [m, n], [2.0, 0.5], 5.0), both)
    close(F.projection(both - u, c - u), 5.0 * (c - u))
    perpendicular = n - F.projection(n, c - u)
    close(F.perpendicular_negatives(c, u, [u + perpendicular], [0.7], 5.0), cfg - 5.0 * 0.7 * perpendicular)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sample_does_not_depend_on_its_batch(shape):
    c, u, n = pair(shape, 3)
    rules = (
        lambda c, u, n: F.projected(F.capped(c - u, 1.0), c, 0.2),
        lambda c, u, n: F.rescaled(u, c, 0.7),
        lambda c, u, n: F.zero_star(c, u, 3.0),
        lambda c, u, n: F.perpendicular_negatives(c, u, [n], [0.5], 3.0),
    )
    for rule in rules:
        together = rule(c, u, n)
        for index in range(3):
            one = slice(index, index + 1)
            close(rule(c[one], u[one], n[one]), together[one])
