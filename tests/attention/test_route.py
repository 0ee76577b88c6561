"""Routed processors: which may be, what they are to others, and that they compute what the stock ones do."""

import copy

import pytest
import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxIPAdapterAttnProcessor

from diffaccel.attention.install import attention_by
from diffaccel.attention.kernels import plain
from diffaccel.attention.route import Installation, is_routed, routed, why_left_alone
from diffaccel.attention.signature import Signature, signature_of

ROUTED = [
    stock.AttnProcessor2_0, stock.JointAttnProcessor2_0, stock.FusedAttnProcessor2_0, stock.AttnAddedKVProcessor2_0,
    stock.CogVideoXAttnProcessor2_0, stock.AuraFlowAttnProcessor2_0, stock.HunyuanAttnProcessor2_0, FluxAttnProcessor,
]  # fmt: skip
ADAPTERS = [
    lambda: stock.IPAdapterAttnProcessor2_0(8, 8), lambda: FluxIPAdapterAttnProcessor(8, 8),
    stock.PAGCFGIdentitySelfAttnProcessor2_0, lambda: stock.CustomDiffusionAttnProcessor2_0(hidden_size=8),
    stock.LoRAAttnProcessor2_0,
]  # fmt: skip
OTHERS = [stock.AttnProcessor, stock.SlicedAttnProcessor, stock.XFormersAttnProcessor]


def module_with(processor):
    module = Attention(8, heads=2, dim_head=4)
    module.set_processor(processor)
    return module


@pytest.mark.parametrize("make", ROUTED)
def test_stock_processors_are_routed(make):
    assert why_left_alone(module_with(make())) is None


@pytest.mark.parametrize("make", ADAPTERS)
def test_adapters_are_left_alone(make):
    assert why_left_alone(module_with(make())).endswith("belongs to an adapter")


@pytest.mark.parametrize("make", OTHERS)
def test_what_attends_by_itself_is_left_alone(make):
    arguments = (1,) if make is stock.SlicedAttnProcessor else ()
    assert why_left_alone(module_with(make(*arguments))).endswith("computes attention itself")


def recording(seen):
    def kernel(*args):
        seen.append(args)
        return plain(*args)

    return kernel


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("dim", [3, 4])
def test_norms_masks_residuals_and_rescaling_stay(mask, dim):
    torch.manual_seed(0)
    module = Attention(
        8,
        heads=2,
        dim_head=4,
        norm_num_groups=2,
        residual_connection=True,
        rescale_output_factor=1.5,
        qk_norm="layer_norm",
    ).eval()
    hidden = torch.randn(3, 8, 2, 3) if dim == 4 else torch.randn(3, 6, 8)
    given = None if mask is None else (torch.rand(3, 1, 6) < 0.5).to(mask)
    signature = Signature(3, 2, 6, 6, 4, 4, torch.float32, "cpu", mask, None if mask is None else (3, 2, 1, 6))
    seen = []
    with torch.no_grad():
        before = module(hidden, attention_mask=given)
        with Installation({"a": module}, {"a": attention_by({signature: recording(seen)})}):
            assert is_routed(module)
            torch.testing.assert_close(module(hidden, attention_mask=given), before)
        assert not is_routed(module) and len(seen) == 1
        assert torch.equal(module(hidden, attention_mask=given), before)


def test_masks_of_two_dimensions_reach_the_dispatcher():
    torch.manual_seed(0)
    module = FluxAttention(8, heads=2, dim_head=4, bias=True).eval()
    hidden, mask, seen = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]]).bool(), []

    def attention(query, key, value, attn_mask=None, **rest):
        seen.append(signature_of(query, key, value, attn_mask))
        return plain(query, key, value, attn_mask, False, None)

    with torch.no_grad():
        before = module(hidden, attention_mask=mask)
        module.processor = routed(module.processor, attention)
        torch.testing.assert_close(module(hidden, attention_mask=mask), before)
    assert seen[0].mask_shape == (2, 1, 1, 5)


def test_a_routed_processor_is_stock_to_others():
    processor = FluxAttnProcessor()
    ours = routed(processor, attention_by({}))
    assert ours.__class__ is FluxAttnProcessor and isinstance(ours, FluxAttnProcessor)
    assert type(copy.deepcopy(ours)) is FluxAttnProcessor
    ours._attention_backend = "flash"
    assert processor._attention_backend == "flash"
    assert FluxAttnProcessor._attention_backend is None


def test_dropout_and_grouped_heads_are_left_to_pytorch():
    seen = []
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    attention = attention_by({signature_of(query, query, query): recording(seen)})
    with torch.no_grad():
        attention(query, query, query, dropout_p=0.5)
        attention(query, key, key, enable_gqa=True)
        assert not seen
        attention(query, query, query)
        assert len(seen) == 1


def test_signatures():
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 5, 8)
    signature = signature_of(query, key, key, torch.zeros(1, 1, 1, 5), False, 0.5)
    assert signature.text == "1x4x3x5 d8 float32 cpu mask:float32:1x1x1x5 scale:0.5"
    assert signature.seed == signature._replace().seed != signature._replace(batch=2).seed
    assert signature_of(query[0], key[0], key[0]) is None
    assert signature_of(query, key[:, :1], key) is None
    assert signature_of(query, key, key.half()) is None
