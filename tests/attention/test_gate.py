"""The gate: what is wrong is out, with the reason; what is right is in."""

import re

import pytest
import torch
from planted import collected, planted, wrong

from diffaccel.attention.gate import Gate
from diffaccel.attention.inputs import mask_rows
from diffaccel.attention.kernels import plain


@pytest.fixture(scope="module")
def gates():
    return {name: [Gate(use) for use in collected(name).uses.values()] for name in ("sd", "pixart")}


def _raise(*_):
    raise RuntimeError("no kernel for this\nand a long explanation")


def _not_finite(query, key, value, mask, causal, scale):
    return torch.full_like(plain(query, key, value, mask, causal, scale), torch.nan)


def _one_number(*args):
    out = plain(*args).clone()
    out[-1, -1, -1, -1] += 0.05
    return out


def _overflows(query, key, value, mask, causal, scale):
    scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).exp()  # without subtracting the maximum
    return scores @ value / scores.sum(-1, keepdim=True)


def _no_single_key(query, key, value, mask, causal, scale):
    return plain(query, key, value, mask, causal, scale) * (0 if key.shape[2] == 1 else 1)


WRONG = {
    "wrong scale": (wrong, "errs by"),
    "raises": (_raise, "raises RuntimeError: no kernel for this$"),
    "nan": (_not_finite, "not finite on ordinary inputs"),
    "one number": (_one_number, "errs by"),
    "overflow": (_overflows, "not finite on large logits"),
    "one key": (_no_single_key, "errs by .* on one key"),
    "nothing": (lambda *_: None, "returns NoneType"),
    "shape": (lambda query, *_: query[..., :1], "returns .* expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_backends_are_out(gates, name):
    kernel, reason = WRONG[name]
    verdicts = [gate.verdict(planted(kernel=kernel)) for gate in gates["sd"]]
    assert all(verdicts)
    assert any(re.search(reason, verdict) for verdict in verdicts), verdicts


def test_right_backends_are_in(gates):
    assert [gate.verdict(planted()) for gate in [*gates["sd"], *gates["pixart"]]] == [None] * 4


def test_masks_are_probed(gates):
    def ignores(query, key, value, mask, causal, scale):
        return plain(query, key, value, None, causal, scale)

    masked = [gate for gate in gates["pixart"] if gate.signature.mask is not None]
    assert len(masked) == 1
    assert "errs by" in masked[0].verdict(planted(kernel=ignores))

    def zero_where_nothing_is_seen(query, key, value, mask, causal, scale):
        out = plain(query, key, value, mask, causal, scale)
        return out * (mask.amax(-1, keepdim=True) > -1.0)

    assert "on masked rows" in masked[0].verdict(planted(kernel=zero_where_nothing_is_seen))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masked_rows_are_in_the_first_sample_only(dtype):
    mask = torch.ones(2, 1, 1, 4).to(dtype)
    rows = mask_rows(mask)
    assert (rows[0] <= 0).all() and torch.equal(rows[1], mask[1]) and bool(mask.all())


def test_refusing_a_single_key_is_no_fault(gates):
    def several_keys_only(query, key, *rest):
        if key.shape[2] == 1:
            raise ValueError("needs 16 keys")
        return plain(query, key, *rest)

    assert [gate.verdict(planted(kernel=several_keys_only)) for gate in gates["sd"]] == [None, None]


def test_approximate_backends_are_judged_by_their_direction(gates):
    def coarse(*args):
        out = plain(*args)
        return out + 0.005 * out.std() * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))

    for gate in gates["sd"]:
        assert gate.verdict(planted(kernel=coarse)) is not None
        assert gate.verdict(planted(kernel=coarse, kind="approximate")) is None
        assert "cosine" in gate.verdict(planted(kernel=lambda *args: -plain(*args), kind="approximate"))
