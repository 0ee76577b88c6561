"""A batch in parts: what is parted, that nothing changes, and two processes against one."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipelines import PIPELINES, check_close
from torch import nn

import diffaccel
from diffaccel.core.errors import UsageError
from diffaccel.execution.rows import divide
from diffaccel.models.batches import joined

BATCHED = ("sd", "sdxl", "pixart", "dit", "sd3", "ltx", "cogvideox", "animatediff", "classes")  # guidance as one batch


@pytest.mark.parametrize("family", BATCHED)
def test_guidance_in_turn_agrees_up_to_rounding(family):
    case = PIPELINES[family]
    pipe = copy.copy(case.build())
    network = getattr(pipe, case.network)
    cls, arguments = type(network), case.guided(3.0)
    rows = []
    with case.watched(pipe) as evaluations:
        before = case.call(pipe, 3, **arguments)
    count = len(evaluations)
    hook = network.register_forward_pre_hook(lambda _, args, kwargs: rows.append(_rows(args, kwargs)), with_kwargs=True)
    try:
        with diffaccel.sequential_cfg(pipe) as parted:
            check_close(case.call(pipe, 3, **arguments), before, 2e-5)
        assert (parted.parted, parted.whole) == (count, 0) and rows == [1] * 2 * count
        assert type(network) is cls and torch.equal(case.call(pipe, 3, **arguments), before)
    finally:
        hook.remove()


def _rows(args, kwargs) -> int:
    return len((args or [kwargs.get("sample", kwargs.get("hidden_states"))])[0])


def test_what_cannot_be_parted_runs_as_it_comes():
    """Flux takes guidance as an input, so there is one row."""
    case = PIPELINES["flux"]
    pipe = case.build()
    before = case.call(pipe, 2, **case.guided(3.0))
    with diffaccel.sequential_cfg(pipe) as parted:
        assert torch.equal(case.call(pipe, 2, **case.guided(3.0)), before)
    assert parted.whole >= 2 and parted.parted == 0


def test_parts_of_arguments():
    sample, text, ids = torch.arange(4.0).view(4, 1), torch.arange(8.0).view(4, 2), torch.zeros(7, 3)
    extra = {"added": {"pooled": text, "sizes": [text, None]}, "img_ids": ids, "flag": True, "scale": torch.tensor(2.0)}
    parts = divide((sample, torch.tensor(5)), extra, 2)
    for index, (args, kwargs) in enumerate(parts):
        rows = slice(2 * index, 2 * index + 2)
        assert torch.equal(args[0], sample[rows]) and args[1] == 5
        assert torch.equal(kwargs["added"]["pooled"], text[rows]) and torch.equal(
            kwargs["added"]["sizes"][0], text[rows]
        )
        assert kwargs["added"]["sizes"][1] is None and kwargs["img_ids"] is ids and kwargs["flag"] is True
    assert divide((sample,), {}, 3) is None  # no even parts
    assert divide((sample,), {"frames": torch.zeros(8, 1)}, 2) is None  # not known what belongs to which row
    assert divide((sample,), {"sizes": [1, 2, 3, 4]}, 2) is None
    assert divide((sample,), {"kv_cache": object()}, 2) is None
    assert divide((), {"input_ids": sample}, 2) is None  # not known what the samples are
    assert [len(part) for (part,), _ in divide(([sample[0], sample[1]],), {}, 2)] == [1, 1]  # a tensor a sample
    assert len(divide((sample,), {"shared": torch.zeros(1, 9)}, 2)[1][1]["shared"]) == 1


def test_joined_outputs():
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    whole = torch.randn(4, 3)
    output = joined([UNet2DConditionOutput(sample=part) for part in whole.chunk(2)])
    assert isinstance(output, UNet2DConditionOutput) and torch.equal(output.sample, whole)
    assert torch.equal(joined([(part,) for part in whole.chunk(4)])[0], whole)
    with pytest.raises(ValueError, match="cannot be joined"):
        joined([object(), object()])


def test_gradients_pass_through_parts():
    pipe = copy.deepcopy(PIPELINES["dit"].build())
    call = {"timestep": torch.tensor([3, 3]), "class_labels": torch.tensor([0, 1])}
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    pipe.transformer.eval()
    (before,) = torch.autograd.grad(pipe.transformer(sample, **call).sample.square().sum(), sample)
    with diffaccel.sequential_cfg(pipe.transformer):
        (after,) = torch.autograd.grad(pipe.transformer(sample, **call).sample.square().sum(), sample)
    check_close(after, before)


def test_together_with_reused_text_and_guidance_rules():
    case = PIPELINES["sd"]
    pipe = copy.deepcopy(case.build())
    with diffaccel.guide(pipe, diffaccel.APG(scale=3.0)):
        before = case.call(pipe, 3, **case.guided(3.0))
    with diffaccel.sequential_cfg(pipe) as parted, diffaccel.reuse_text(pipe) as reuse:
        with diffaccel.guide(pipe, diffaccel.APG(scale=3.0)):
            check_close(case.call(pipe, 3, **case.guided(3.0)), before)
        assert parted.parted >= 3 and reuse.misses == 2 * len(reuse.modules) and reuse.hits >= 2 * reuse.misses


def test_saved_models_are_of_the_stock_class(tmp_path):
    pipe = PIPELINES["sd"].build()
    with diffaccel.sequential_cfg(pipe):
        pipe.unet.save_pretrained(tmp_path)
        assert type(copy.deepcopy(pipe.unet)).__name__ == "UNet2DConditionModel"
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: diffaccel.sequential_cfg(pipe, parts=1), "parts is a whole number from 2"),
        (lambda pipe: diffaccel.sequential_cfg("digits"), "Expected a diffusers pipeline"),
        (lambda pipe: diffaccel.parallel_cfg(pipe), "torchrun --nproc_per_node 2"),
    ],
)
def test_bad_input(call, message):
    pipe = PIPELINES["sd"].build()
    with pytest.raises(UsageError, match=message):
        call(pipe)
    assert type(pipe.unet).__call__ is nn.Module.__call__


def test_rows_that_depend_on_each_other_are_not_parted():
    pipe = copy.deepcopy(PIPELINES["sd"].build())
    from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0

    attention = next(module for module in pipe.unet.modules() if hasattr(module, "processor"))
    stock = attention.processor
    with diffaccel.sequential_cfg(pipe) as parted:  # pipelines set such processors in the middle of a call
        attention.processor = PAGCFGIdentitySelfAttnProcessor2_0()
        pipe.unet(torch.zeros(6, 4, 8, 8), 1, encoder_hidden_states=torch.zeros(6, 5, 16))
        attention.processor = stock
    assert (parted.parted, parted.whole) == (0, 1)
    attention.processor = PAGCFGIdentitySelfAttnProcessor2_0()
    with pytest.raises(UsageError, match="depend on each other: PAGCFG"):
        diffaccel.sequential_cfg(pipe)
    pipe = copy.deepcopy(PIPELINES["cogvideox"].build())
    from diffusers import PyramidAttentionBroadcastConfig

    every = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    pipe.transformer.enable_cache(every)
    with pytest.raises(UsageError, match="a cache is enabled"):
        diffaccel.sequential_cfg(pipe)


def test_compiled_networks():
    pipe = copy.copy(PIPELINES["sd"].build())
    pipe.unet = torch.compile(copy.deepcopy(pipe.unet), backend="eager")
    with pytest.raises(UsageError, match=r"network.compile\(\)"):
        diffaccel.sequential_cfg(pipe)


def test_graphs_are_found_again():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    network, graphs = copy.deepcopy(PIPELINES["dit"].build().transformer), CompileCounter()
    call = {"timestep": torch.tensor([3, 3]), "class_labels": torch.tensor([0, 1])}
    network.compile(backend=graphs)
    parted = diffaccel.sequential_cfg(network)
    with torch.no_grad():
        for _ in range(2):
            network(torch.zeros(2, 4, 8, 8), **call)
        seen = graphs.frame_count
        for _ in range(4):
            parted.undo()
            parted.redo()
            network(torch.zeros(2, 4, 8, 8), **call)
    parted.undo()
    assert graphs.frame_count == seen > 0


def test_undone_out_of_order():
    case = PIPELINES["sd"]
    pipe = copy.deepcopy(case.build())
    cls = type(pipe.unet)
    parted = diffaccel.sequential_cfg(pipe)
    ours = type(pipe.unet)
    pipe.unet.__class__ = type(cls.__name__, (ours,), {})  # somebody else's, on top
    parted.undo()
    pipe.unet.__class__ = ours  # who ends, and gives back what there was
    case.call(pipe, 1, **case.guided(3.0))
    assert parted.parted == parted.whole == 0


def test_a_network_is_parted_once():
    pipe = PIPELINES["sd"].build()
    with diffaccel.sequential_cfg(pipe), pytest.raises(UsageError, match="parted already"):
        diffaccel.sequential_cfg(pipe)


@pytest.mark.slow
def test_two_processes_equal_one_in_every_bit(tmp_path):
    program = Path(__file__).parent / "draw_in_parts.py"
    paths = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run([*launcher, program, tmp_path], env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    from draw_in_parts import drawn

    with diffaccel.sequential_cfg(PIPELINES["sd"].build()) as parted:
        alone = drawn()
    assert parted.parted >= 4 and not parted.whole
    for name, images in alone.items():
        assert torch.equal(first[name], images) and torch.equal(second[name], images)
    for rank in range(2):
        for what in ("noise", "text", "size"):
            assert "different arguments" in (tmp_path / f"{rank}-{what}.txt").read_text()
