import pytest
import torch

from diffaccel.core.rng import KeyedRandom


@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 5)])
def test_a_draw_does_not_depend_on_the_batch(shape):
    random = KeyedRandom(7)
    for draw in (random.normal, random.uniform):
        whole = draw("noise", 3, 0, 10, shape)
        assert whole.shape == (10, *shape)
        assert torch.equal(torch.cat([draw("noise", 3, 0, 4, shape), draw("noise", 3, 4, 6, shape)]), whole)


def test_seed_purpose_and_step_name_independent_streams():
    draws = [
        KeyedRandom(seed).normal(purpose, step, 0, 4000)
        for seed, purpose, step in ((1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1))
    ]
    correlation = torch.corrcoef(torch.stack(draws))
    assert float((correlation - torch.eye(4)).abs().max()) < 0.06


def test_moments():
    random = KeyedRandom(0)
    normal = random.normal("x", 0, 0, 40000).double()
    assert abs(float(normal.mean())) < 0.02 and abs(float(normal.var()) - 1) < 0.03
    assert abs(float((normal**4).mean()) - 3) < 0.15
    uniform = random.uniform("x", 0, 0, 40000)
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1 and abs(float(uniform.mean()) - 0.5) < 0.01


def test_integers_and_permutation():
    random = KeyedRandom(3)
    integers = random.integers("class", 0, 0, 5000, 10)
    assert integers.dtype == torch.int64 and set(integers.tolist()) == set(range(10))
    order = random.permutation("order", 0, 100)
    assert sorted(order.tolist()) == list(range(100)) and not torch.equal(order, random.permutation("order", 1, 100))
