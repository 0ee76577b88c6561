"""Keys and values of the text: computed once, equal in every bit, and never those of another text."""

import copy

import pytest
import torch
from pipelines import PIPELINES
from planted import built, clocks, planted
from torch import nn

import diffaccel
from diffaccel.core.errors import UsageError

CROSS = ("sd", "sdxl", "pixart", "wan", "animatediff")


@pytest.mark.parametrize("family", CROSS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_pipelines_are_bit_equal(family, scale):
    case = PIPELINES[family]
    pipe = copy.deepcopy(case.build())
    arguments = case.guided(scale)
    before = case.call(pipe, 4, **arguments)
    with diffaccel.reuse_text(pipe) as reuse:
        assert torch.equal(case.call(pipe, 4, **arguments), before)
        assert torch.equal(case.call(pipe, 4, **arguments), before)
        branches = case.forwards if scale > 1 else 1
        assert reuse.misses <= 2 * branches * len(reuse.modules) and reuse.hits >= 2 * reuse.misses
        assert reuse.bytes > 0
    assert reuse.bytes == 0
    assert {type(module) for name, module in getattr(pipe, case.network).named_modules() if name.endswith("to_k")} == {
        nn.Linear
    }
    assert torch.equal(case.call(pipe, 4, **arguments), before)


@pytest.fixture
def network():
    return built("sd")[1]


def evaluate(network, text, seed=0):
    sample = torch.randn(text.shape[0], 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return network(sample, 1, encoder_hidden_states=text).sample


def equal_with_reuse(network, *texts):
    expected = [evaluate(network, text) for text in texts]
    with diffaccel.reuse_text(network) as reuse:
        for _ in range(2):
            for text, result in zip(texts, expected, strict=True):
                assert torch.equal(evaluate(network, text), result)
    return reuse


def test_different_prompts_and_batches(network):
    texts = [torch.randn(rows, 5, 16) for rows in (1, 2, 1, 1)]
    assert equal_with_reuse(network, *texts).hits == 0  # more than are kept
    reuse = equal_with_reuse(network, *texts[:2])
    assert reuse.hits == reuse.misses == 2 * len(reuse.modules)


def test_views_of_one_text_are_told_apart(network):
    text = torch.randn(2, 6, 16)
    equal_with_reuse(network, text[:1], text[1:])
    equal_with_reuse(network, text[:, :3], text[:, 3:])


def test_a_text_changed_in_place_is_computed_afresh(network):
    text = torch.randn(1, 5, 16)
    with diffaccel.reuse_text(network) as reuse:
        evaluate(network, text)
        text.mul_(2.0)
        changed = evaluate(network, text)
        assert reuse.hits == 0
    assert torch.equal(evaluate(network, text), changed)


def test_a_text_that_takes_the_place_of_another(network):
    """Memory of freed tensors is used again: what is kept must hold its text."""
    with diffaccel.reuse_text(network) as reuse:
        for seed in range(6):
            text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(seed))
            evaluate(network, text)
            del text
        assert reuse.hits == 0


def test_changed_weights_are_seen(network):
    text = torch.randn(1, 5, 16)
    with diffaccel.reuse_text(network):
        evaluate(network, text)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.5)
        changed = evaluate(network, text)
        other = copy.deepcopy(network)
    assert torch.equal(evaluate(network, text), changed)
    assert type(other.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")) is nn.Linear


def test_results_written_into_are_not_reused(network):
    text = torch.randn(1, 5, 16)
    with diffaccel.reuse_text(network) as reuse, torch.no_grad():
        layer = network.get_submodule(reuse.modules[0].removeprefix("network."))
        first = layer(text).clone()
        layer(text).zero_()
        assert torch.equal(layer(text), first)


def test_gradients_hooks_inference_mode_and_autocast(network):
    text = torch.randn(1, 5, 16)
    with diffaccel.reuse_text(network) as reuse:
        for _ in range(2):
            network(torch.randn(1, 4, 8, 8), 1, encoder_hidden_states=text).sample.sum().backward()
            with torch.inference_mode():
                evaluate(network, torch.ones(1, 5, 16))
        assert reuse.hits == reuse.misses == 0
        exact = evaluate(network, text)
        with torch.autocast("cpu", torch.bfloat16):
            assert evaluate(network, text).dtype == torch.bfloat16
            assert reuse.hits == 0
        assert torch.equal(evaluate(network, text), exact) and reuse.hits
        layer = network.get_submodule(reuse.modules[0].removeprefix("network."))
        seen = []
        handle = layer.register_forward_hook(lambda *_: seen.append(1))
        evaluate(network, text)
        evaluate(network, text)
        handle.remove()
        assert len(seen) == 2


def test_adapters_compute_afresh():
    class Adapter(nn.Linear):
        factor = 1.0

        def forward(self, text):
            return self.factor * super().forward(text)

    pipe, network, run = built("pixart")
    network.caption_projection.linear_2 = Adapter(16, 16)
    with diffaccel.reuse_text(pipe) as reuse:
        run()
        Adapter.factor = 2.0
        changed = run()
        assert reuse.hits == 0 < reuse.misses
    assert torch.equal(run(), changed)


def test_clear_and_undo(network):
    text = torch.randn(1, 5, 16)
    reuse = diffaccel.reuse_text(network)
    evaluate(network, text)
    assert reuse.bytes
    reuse.clear()
    assert reuse.bytes == 0
    with pytest.raises(UsageError, match="reused already"):
        diffaccel.reuse_text(network)
    reuse.undo()
    reuse.undo()
    diffaccel.reuse_text(network).undo()


def test_with_optimised_attention(monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, _, run = built("pixart")
    report = diffaccel.optimize_attention(pipe, run=run, backends=[planted()], cache=False)
    before = run()
    with diffaccel.reuse_text(pipe) as reuse:
        assert torch.equal(run(), before) and reuse.hits
    report.undo()


@pytest.mark.parametrize("family", ["sd3", "flux", "dit"])
def test_networks_without_text_of_their_own(family):
    with pytest.raises(UsageError, match="no cross-attention whose keys and values depend on the text alone"):
        diffaccel.reuse_text(built(family)[0])


def test_compiled_networks_compute_as_before(network):
    text = torch.randn(1, 5, 16)
    expected = evaluate(network, text)
    torch._dynamo.reset()
    with diffaccel.reuse_text(network) as reuse:
        compiled = torch.compile(network, backend="eager")
        for _ in range(2):
            assert torch.equal(evaluate(compiled, text), expected)
    assert reuse.hits + reuse.misses >= 0
