"""`optimize_attention` on pipelines: what is chosen, what is installed, what is left and what comes back."""

import copy
import json
import threading
import time
from dataclasses import replace

import diffusers
import pytest
import torch
from pipelines import PIPELINES, check_close
from planted import FAMILIES, built, clocks, nothing_global_changes, planted, wrong

import diffaccel
from diffaccel.attention.backends import BACKENDS
from diffaccel.attention.collect import capture_calls
from diffaccel.attention.kernels import plain
from diffaccel.attention.route import attention_modules, is_routed
from diffaccel.core.errors import UsageError


def optimise(pipe, run, **settings):
    return diffaccel.optimize_attention(pipe, run=run, cache=False, rounds=3, seconds=0.01, **settings)


def processors(network):
    return [module.processor for module in attention_modules(network).values()]


@pytest.mark.parametrize("family", [*FAMILIES, "dit", "wan", "cogvideox", "animatediff", "svd"])
def test_a_fast_and_right_backend_is_installed_and_undone(family, monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, network, run = built(family)
    before, stock = run(), processors(network)
    calls = []

    def kernel(*args):
        calls.append(args[0].shape)
        return plain(*args)

    with nothing_global_changes():
        report = optimise(pipe, run, backends=[planted(kernel=kernel)])
    assert {choice.backend for choice in report.networks[0].choices} == {"planted"}
    assert not report.networks[0].left_alone and report.networks[0].installed
    calls.clear()
    check_close(run(), before, 1e-4)  # another order of sums, over two steps
    assert calls
    calls.clear()
    report.undo()
    assert all(now is then for now, then in zip(processors(network), stock, strict=True))
    assert torch.equal(run(), before) and not calls
    report.undo()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fast_and_wrong_backend_is_rejected(family, monkeypatch):
    clocks(monkeypatch, planted=0.1, chosen=0.1)
    pipe, network, run = built(family)
    stock = processors(network)
    report = optimise(pipe, run, backends=[planted(kernel=wrong)])
    (part,) = report.networks
    assert {choice.backend for choice in part.choices} == {"default"} and not part.installed
    assert all(any("errs by" in (one.excluded or "") for one in choice.measured) for choice in part.choices)
    assert processors(network) == stock
    assert "out: errs by" in report.explain()


@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize("family", FAMILIES)
def test_real_backends_reproduce_the_pipeline(family, backend, monkeypatch):
    clocks(monkeypatch, **{backend: 0.5}, chosen=0.5)
    pipe, _, run = built(family)
    before = run()
    report = optimise(pipe, run, backends=[backend])
    assert {choice.backend for choice in report.networks[0].choices} == {backend}
    check_close(run(), before, 1e-5)


def test_what_does_not_make_the_network_faster_is_not_installed(monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=1.1)
    pipe, network, run = built("sd")
    stock = processors(network)
    report = optimise(pipe, run, backends=[planted()])
    assert report.networks[0].confirmation.problem == "the network is not faster with them"
    assert processors(network) == stock
    assert "not installed: the network is not faster" in report.explain()
    kept = optimise(pipe, run, backends=[planted()], confirm=False)
    assert kept.networks[0].installed and kept.networks[0].confirmation is None


def test_the_memory_cap_decides(monkeypatch):
    clocks(monkeypatch, greedy=0.1, modest=0.5, chosen=0.5)
    pipe, _, run = built("sd")
    offered = [planted("greedy", scratch=lambda signature: 10**9), planted("modest")]
    choices = optimise(pipe, run, backends=offered, memory_cap=10**8).networks[0].choices
    assert {choice.backend for choice in choices} == {"modest"}


def test_measured_for_real(monkeypatch):
    """Without planted times: the table has the times of all that are usable."""
    pipe, _, run = built("sd")
    report = optimise(pipe, run)
    for choice in report.networks[0].choices:
        timed = {one.backend for one in choice.measured if one.seconds}
        assert timed == {"default", "flash", "math"}
    assert "not tried:" in str(report)


def test_every_shape_that_a_run_has_is_measured(monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, network, run = built("sd")
    stock = processors(network)
    with optimise(pipe, lambda: (run(), run(height=16, width=16)), backends=[planted()]) as report:
        queries = {choice.use.signature.queries for choice in report.networks[0].choices}
        assert queries == {64, 256}
        data = json.loads(json.dumps(report.to_dict()))
    assert processors(network) == stock
    assert len(data["networks"][0]["choices"]) == 4 and data["networks"][0]["confirmation"]["problem"] is None
    assert data["networks"][0]["choices"][0]["measured"][1]["backend"] == "planted"


def test_pipelines_with_two_networks(monkeypatch):
    clocks(monkeypatch, math=0.5, chosen=0.5)
    pipe, network, run = built("wan")
    pipe.transformer_2 = copy.deepcopy(network)
    report = diffaccel.optimize_attention(pipe, run=run, cache=False)
    first, second = report.networks
    assert (first.name, first.installed, second.name, second.installed) == ("transformer", True, "transformer_2", False)
    assert second.left_alone == (("transformer_2", "run does not call it"),)
    assert "transformer_2: nothing to choose" in report.explain() and "run does not call it" in report.explain()
    report.undo()


def test_the_clock_decides(monkeypatch):
    """With real times: a default that is slow is replaced by the faster of two."""

    def slowed(by):
        return lambda *args: (time.sleep(by), plain(*args))[1]

    monkeypatch.setitem(BACKENDS, "default", replace(BACKENDS["default"], kernel=slowed(0.02)))
    pipe, _, run = built("flux")
    offered = [planted("slower", slowed(0.01)), planted("faster")]
    report = optimise(pipe, run, backends=offered, confirm=False)
    assert {choice.backend for choice in report.networks[0].choices} == {"faster"}


def test_guided_pipelines(monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, network, run = built("sd")
    stock = processors(network)
    with diffaccel.guide(pipe, diffaccel.CFG(scale=3.0)):
        before = run(guidance_scale=2.0)
        with optimise(pipe, lambda: run(guidance_scale=2.0), backends=[planted()]) as report:
            assert report.networks[0].installed
            check_close(run(guidance_scale=2.0), before, 1e-4)
        assert torch.equal(run(guidance_scale=2.0), before)
    assert processors(network) == stock


def test_saved_pipelines_are_stock(monkeypatch, tmp_path):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, network, run = built("sd")
    optimise(pipe, run, backends=[planted()])
    network.save_pretrained(tmp_path)
    opened = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert not any(map(is_routed, attention_modules(opened).values()))
    assert opened.state_dict().keys() == network.state_dict().keys()


def test_other_sizes_and_gradients_run_as_before(monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, network, run = built("sd")
    calls = []
    report = optimise(pipe, run, backends=[planted(kernel=lambda *args: (calls.append(1), plain(*args))[1])])
    calls.clear()
    arguments = {"sample": torch.randn(2, 4, 8, 8), "timestep": 1, "encoder_hidden_states": torch.randn(2, 16, 16)}
    network(**arguments).sample.sum().backward()
    assert not calls and network.conv_in.weight.grad is not None
    with torch.no_grad():
        network(**{**arguments, "sample": torch.randn(2, 4, 16, 16)})
        seen = len(calls)
        network(**arguments)
    assert len(calls) > seen
    report.undo()


@pytest.mark.parametrize("where", ["run", "measure", "confirm", "second"])
def test_an_exception_leaves_nothing_behind(where, monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, network, run = built("sd")
    stock = processors(network)
    stop = RuntimeError("stop")

    def fail(*args, **kwargs):
        raise stop

    if where == "run":
        run = fail
    elif where == "second":
        other = torch.nn.Linear(1, 1)
        pipe, draw = type("Two", (), {"unet": network, "transformer": other})(), run
        run = lambda: (draw(), other(torch.zeros(1, 1)))  # noqa: E731
    else:
        monkeypatch.setattr(
            f"diffaccel.attention.{ {'measure': 'measure', 'confirm': 'install'}[where] }.alternate", fail
        )
    with nothing_global_changes(), pytest.raises((RuntimeError, UsageError)):
        optimise(pipe, run, backends=[planted()])
    assert processors(network) == stock
    assert not network._forward_pre_hooks


def test_a_backend_that_fails_while_denoising_changes_nothing_global(monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, network, run = built("flux")
    broken = []

    def kernel(*args):
        if broken:
            raise RuntimeError("device lost")
        return plain(*args)

    report = optimise(pipe, run, backends=[planted(kernel=kernel)])
    broken.append(True)
    with nothing_global_changes(), pytest.raises(RuntimeError, match="device lost"):
        run()
    report.undo()
    assert not any(map(is_routed, attention_modules(network).values()))
    run()


def test_processors_of_others_are_left_alone(monkeypatch):
    from diffusers.models import attention_processor

    class Custom(attention_processor.AttnProcessor2_0):
        pass

    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, network, run = built("sd")
    foreign = {
        "Custom is not a stock processor": Custom(),
        "AttnProcessor computes attention itself": attention_processor.AttnProcessor(),
        "PAGIdentitySelfAttnProcessor2_0 belongs to an adapter": attention_processor.PAGIdentitySelfAttnProcessor2_0(),
    }
    names = list(attention_modules(network))[:3]
    for name, processor in zip(names, foreign.values(), strict=True):
        network.get_submodule(name).set_processor(processor)
    report = optimise(pipe, lambda: run(guidance_scale=3.0), backends=[planted()])
    assert dict(report.networks[0].left_alone) == dict(zip(names, foreign, strict=True))
    assert all(
        network.get_submodule(name).processor is processor
        for name, processor in zip(names, foreign.values(), strict=True)
    )
    assert sum(map(is_routed, attention_modules(network).values())) == len(attention_modules(network)) - 3
    assert "left alone: 1 module, because Custom is not a stock processor" in report.explain()


def test_an_explicit_choice_of_diffusers_is_respected(monkeypatch):
    from diffusers.models.attention_dispatch import attention_backend

    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, network, run = built("flux")
    calls = []
    report = optimise(pipe, run, backends=[planted(kernel=lambda *args: (calls.append(1), plain(*args))[1])])
    calls.clear()
    with attention_backend("_native_math"):
        run()
    assert not calls
    run()
    assert calls
    report.undo()
    first, *_ = attention_modules(network).values()
    first.set_attention_backend("_native_math")
    report = optimise(pipe, run, backends=[planted()])
    assert [reason for _, reason in report.networks[0].left_alone] == [
        "its backend '_native_math' was set by set_attention_backend"
    ]


def test_processors_set_later_stay_and_copies_are_stock(monkeypatch):
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, network, run = built("sd")
    report = optimise(pipe, run, backends=[planted()])
    copied = copy.deepcopy(network)
    assert {type(processor) for processor in processors(copied)} == {AttnProcessor2_0}
    assert not any(map(is_routed, attention_modules(copied).values()))
    assert {processor.__class__ for processor in processors(network)} == {AttnProcessor2_0}
    network.set_default_attn_processor()  # looks at the classes of what is there
    report.undo()
    assert {type(processor) for processor in processors(network)} == {AttnProcessor}


def test_bad_use():
    pipe, network, run = built("sd")
    for settings, text in [
        ({"backends": ["xformers"]}, "cannot be used here"),
        ({"backends": ["fast"]}, "Unknown attention backend 'fast'"),
        ({"memory_cap": 0}, "memory_cap is a positive number of bytes"),
        ({"rounds": 2}, "rounds is a whole number from 3"),
        ({"seconds": 0}, "seconds is a positive number"),
    ]:
        with pytest.raises(UsageError, match=text):
            diffaccel.optimize_attention(pipe, run=run, cache=False, **{"rounds": 3, **settings})
    with pytest.raises(UsageError, match="Expected a diffusers pipeline or its network"):
        diffaccel.optimize_attention("runwayml/stable-diffusion-v1-5")
    with pytest.raises(UsageError, match="has no attention modules"):
        optimise(*_linear())
    with pytest.raises(UsageError, match="run must call this UNet2DConditionModel"):
        optimise(network, lambda: None)
    with pytest.raises(UsageError, match="WanTransformer3DModel is called is not known: pass run="):
        optimise(PIPELINES["wan"].build(), None)


def _linear():
    linear = torch.nn.Linear(2, 2)
    return linear, lambda: linear(torch.zeros(1, 2))


def test_twice_is_refused(monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, _, run = built("sd")
    report = optimise(pipe, run, backends=[planted()])
    with pytest.raises(UsageError, match="optimised already"):
        optimise(pipe, run, backends=[planted()])
    report.undo()
    assert optimise(pipe, run, backends=[planted()]).networks[0].installed


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart", "dit"])
def test_inputs_are_made_up_where_none_are_given(family, monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    _, network, _ = built(family)
    with nothing_global_changes():
        report = optimise(network, None, backends=[planted()])
    assert report.networks[0].name == "network" and report.networks[0].installed
    assert {choice.use.signature.batch for choice in report.networks[0].choices} == {2}


def test_networks_of_pixels_keep_norms_and_residuals(monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        before = network(x, 1).sample
        report = optimise(network, None, backends=[planted()])
        first, *_ = attention_modules(network).values()
        assert report.networks[0].installed and first.group_norm is not None and first.residual_connection
        check_close(network(x, 1).sample, before, 1e-5)


def test_threads_keep_to_their_networks(monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    seen = {"sd": set(), "flux": set()}
    runs = {}
    for family, threads in seen.items():
        pipe, _, runs[family] = built(family)

        def kernel(*args, threads=threads):
            threads.add(threading.get_ident())
            return plain(*args)

        optimise(pipe, runs[family], backends=[planted(kernel=kernel)])
        threads.clear()
    started = [threading.Thread(target=run) for run in runs.values()]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert [*seen.values()] == [{thread.ident} for thread in started]


@pytest.mark.parametrize("family", [pytest.param("sd", marks=pytest.mark.slow), "flux", "sd3"])
def test_compiled_networks_are_one_graph(family, monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, network, run = built(family)
    factor = [1.0]
    report = optimise(pipe, run, backends=[planted(kernel=lambda *args: factor[0] * plain(*args))])
    args, kwargs = capture_calls({"network": network}, run)["network"][0]
    torch._dynamo.reset()
    factor[0] = 0.5  # so that results tell which attention was compiled
    with torch.no_grad():
        expected = network(*args, **kwargs)[0]
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        check_close(compiled(*args, **kwargs)[0], expected, 1e-5)
        report.undo()
        stock = network(*args, **kwargs)[0]
        assert (stock - expected).abs().max() > 1e-4
        check_close(compiled(*args, **kwargs)[0], stock, 1e-5)


def test_pipelines_with_compiled_networks(monkeypatch):
    clocks(monkeypatch, planted=0.5, chosen=0.5)
    pipe, network, run = built("flux")
    torch._dynamo.reset()
    before = run()
    pipe.transformer = torch.compile(network, backend="eager")
    factor = [1.0]
    report = optimise(pipe, run, backends=[planted(kernel=lambda *args: factor[0] * plain(*args))])
    check_close(run(), before, 1e-5)
    factor[0] = 0.5
    assert (run() - before).abs().max() > 1e-4
    report.undo()
    check_close(run(), before, 1e-5)
