"""Removal is the same as branches that end in zero; parameters and time are gone, nothing else changes."""

import copy
import gc
import weakref

import pytest
import torch
from branches import deep, inputs_of, own, traces, zeroed
from diffusers import UNet2DModel
from pipelines import PIPELINES, check_close

from diffaccel.core.errors import UsageError
from diffaccel.models.networks import network_of
from diffaccel.prune.operators import KINDS, operators
from diffaccel.prune.replacements import REPLACEMENTS, Replacement
from diffaccel.prune.surgery import remove, removed
from diffaccel.prune.survey import survey_network


def case_of(name):
    case = PIPELINES[name]
    pipe = own(case)
    args, kwargs = inputs_of(case, pipe)
    network = network_of(pipe)

    def call(one=network):
        with torch.no_grad():
            return one(*args, **kwargs)[0]

    return network, call


def dirac(convolution):
    """The convolution with a kernel that lets its input pass."""
    with torch.no_grad():
        torch.nn.init.dirac_(convolution.weight)
        convolution.bias.zero_()


@pytest.mark.parametrize("name", PIPELINES)
def test_removing_one_operator_is_zeroing_its_branch(name):
    network, call = case_of(name)
    whole, before = call(), traces(network)
    modules = dict(network.named_modules())
    for operator in operators(network).values():
        assert operator.kind in KINDS and operator.replacement in REPLACEMENTS
        with removed(network, [operator.name]):
            found = call()
        with zeroed(modules[operator.name]):
            check_close(found, call(), 1e-6)
        assert (found - whole).abs().max() > 1e-5 or operator.name.endswith("attn2"), operator.name
    check_close(call(), whole, 0)
    assert traces(network) == before
    assert all(module is modules[key] for key, module in network.named_modules())


@pytest.mark.parametrize("name", ["sd", "classes", "svd"])
def test_a_removed_convolution_lets_its_input_pass(name):
    network, call = case_of(name)
    single = [key for key, one in operators(network, single=True).items() if one.kind == "convolution"]
    assert single and not set(single) & set(operators(network))
    for key in single:
        with removed(network, [key]):
            found = call()
        other = copy.deepcopy(network)
        dirac(other.get_submodule(key))
        check_close(found, call(other), 1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_removing_for_good(name):
    """Nothing is bit-exact; everything that can go goes, with its parameters and without hooks."""
    network, call = case_of(name)
    whole, before = call(), traces(network)
    assert remove(network, []) == [] and traces(network) == before
    check_close(call(), whole, 0)

    outermost = []
    for key in operators(network):
        if not any(key.startswith(f"{outer}.") for outer in outermost):
            outermost.append(key)
    parameters = sum(weight.numel() for weight in network.parameters())
    kept = {
        key: sum(w.numel() for path in one.kept for w in network.get_submodule(f"{key}.{path}").parameters())
        for key, one in operators(network).items()
    }
    gone = sum(sum(w.numel() for w in network.get_submodule(key).parameters()) - kept[key] for key in outermost)
    with removed(network, outermost):
        temporary = call()
    records = remove(network, outermost)
    assert [record["name"] for record in records] == outermost
    assert sum(weight.numel() for weight in network.parameters()) == parameters - gone < parameters
    assert traces(network)[1] == before[1]
    check_close(call(), temporary, 0)
    assert operators(network) == {}
    check_close(call(copy.deepcopy(network)), temporary, 0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("sd3", {"dual_attention_layers": (0, 1)}), ("flux", {"num_layers": 2}), ("dit", {}), ("pixart", {})],
)
def test_blocks_among_others(name, changes):
    """With second attentions, and feed-forwards of text that later blocks read."""
    network, (args, kwargs) = deep(name, **changes)
    names, modules = list(operators(network)), dict(network.named_modules())
    ends = {key.rpartition(".")[2] for key in names}
    assert name in ("dit", "pixart") or ends >= {"0", "attn", "ff", "ff_context"} | (
        {"attn2"} if name == "sd3" else set()
    )
    with torch.no_grad():
        for key in names:
            with removed(network, [key]):
                found = network(*args, **kwargs)[0]
            with zeroed(modules[key]):
                check_close(found, network(*args, **kwargs)[0], 1e-6)


def test_what_is_removed_is_freed():
    network, call = case_of("sd")
    names = ["mid_block.resnets.0", "up_blocks.0.resnets.0", "mid_block.attentions.0.transformer_blocks.0.attn1"]
    gone = [weakref.ref(network.get_submodule(name).get_parameter(leaf)) for name, leaf in zip(
        names, ("conv1.weight", "conv1.weight", "to_q.weight"), strict=True)]  # fmt: skip
    remove(network, names)
    call()
    gc.collect()
    assert [one() for one in gone] == [None] * 3


def test_half_precision_training_and_chunks():
    network, call = case_of("sd")
    records = remove(network, ["mid_block.attentions.0.transformer_blocks.0.ff", "up_blocks.0.resnets.0"])
    assert [record["replacement"] for record in records] == ["zero", "shortcut"]
    found = call()
    network.set_attention_slice("auto")
    check_close(call(), found, 1e-6)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)
    network.train()(x, 5, text).sample.square().mean().backward()
    grads = [weight.grad is not None for weight in network.get_submodule("up_blocks.0.resnets.0").parameters()]
    assert grads == [True, True]
    half = network.to(torch.bfloat16)(x.bfloat16(), 5, text.bfloat16()).sample
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_mixed_precision_stays_mixed():
    network, _ = case_of("dit")
    network.to(torch.bfloat16).transformer_blocks[0].norm1.emb.float()
    with removed(network, ["transformer_blocks.0"]):
        assert network.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.dtype == torch.float32
    kept = {weight.dtype for weight in network.transformer_blocks[0].norm1.emb.parameters()}
    assert kept == {torch.float32}


@pytest.mark.parametrize(("up_and_down", "scale"), [("resnet", 2.0), ("conv", 1.0)])
def test_blocks_that_resample_or_divide(up_and_down, scale):
    """Resampling is kept, what is divided stays divided."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("AttnDownBlock2D",) * 2, up_block_types=("AttnUpBlock2D",) * 2,
        downsample_type=up_and_down, upsample_type=up_and_down, mid_block_scale_factor=scale,
    ).eval()  # fmt: skip
    x, modules = torch.randn(2, 3, 8, 8), dict(network.named_modules())
    names = list(operators(network))
    assert sum("sampler" in name for name in names) == (2 if up_and_down == "resnet" else 0)
    survey = survey_network(network, repeats=1)
    with torch.no_grad():
        for name in names:
            with removed(network, [name]):
                found = network(x, 5).sample
                left = sum(weight.numel() for weight in network.parameters())
            assert survey[name].parameters == survey.parameters - left
            with zeroed(modules[name]):
                check_close(found, network(x, 5).sample, 1e-6)


def test_compiled_whole():
    network, _ = case_of("sd")
    remove(
        network,
        ["mid_block.attentions.0", "up_blocks.0.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0.ff"],
    )
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)
    with torch.no_grad():
        want = network(x, 5, text).sample
        found = torch.compile(network, backend="eager", fullgraph=True)(x, 5, text).sample
    check_close(found, want, 1e-6)


def test_in_two_rounds():
    network, call = case_of("classes")
    other = copy.deepcopy(network)
    names = ["mid_block.resnets.0", "up_blocks.0.attentions.0", "down_blocks.1.resnets.0"]
    remove(network, names)
    for name in names:
        remove(other, [name])
    check_close(call(), call(other), 0)
    assert sum(isinstance(module, Replacement) for module in other.modules()) == 3


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["mid_block.resnets.7"], "removable layer of UNet2DModel 'mid_block.resnets.7'"),
        (["conv_in"], "Unknown removable layer"),
        ("mid_block.resnets.0", "are a list of names"),
        ([{"kind": "resnet"}], "is a name, or a record"),
        ([{"name": "mid_block.resnets.0", "replacement": "zero"}], "replaced by identity or linear; got 'zero'"),
        ([{"name": "mid_block.resnets.0", "replacement": "linear"}], "with channels"),
        (["mid_block.resnets.0", "mid_block.resnets.0.conv1"], "the first contains the second"),
        (["mid_block.resnets.0", "mid_block.resnets.0"], "the first contains the second"),
    ],
)
def test_what_cannot_be_removed(layers, message):
    network, call = case_of("classes")
    before, whole = traces(network), call()
    with pytest.raises(UsageError, match=message):
        remove(network, layers)
    assert traces(network) == before
    check_close(call(), whole, 0)


def test_what_no_linear_map_can_replace():
    for name, gone, message in (
        ("dit", "transformer_blocks.0", "used elsewhere"),
        ("flux", "transformer_blocks.0", "returns image and text"),
        ("sd3", "transformer_blocks.0.attn", "returns image and text"),
    ):
        network, call = case_of(name)
        whole = call()
        with pytest.raises(UsageError, match=message):
            remove(network, [{"name": gone, "replacement": "linear", "channels": [16, 16]}])
        check_close(call(), whole, 0)


def test_networks_without_known_layers():
    with pytest.raises(UsageError, match="No layer known to be removable in Sequential; it has Sequential"):
        operators(torch.nn.Sequential(torch.nn.Linear(1, 1)))
