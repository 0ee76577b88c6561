"""Every backend that is usable here, on the shapes of real networks; what is not usable says why."""

import os
from pathlib import Path

import pytest
import torch
from planted import FAMILIES, collected, planted

import diffaccel
from diffaccel.attention.backends import BACKENDS, candidates
from diffaccel.attention.gate import Gate, reference
from diffaccel.attention.inputs import make_inputs
from diffaccel.attention.kernels import aligned_bias, chunked, cudnn, default, efficient, flash, flex, padded, plain
from diffaccel.core.errors import UsageError

CPU = torch.device("cpu")
USABLE = [name for name, backend in BACKENDS.items() if backend.unusable(CPU) is None and not backend.on_request(CPU)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_usable_backends_are_correct_on_the_shapes_of(family, dtype):
    collection = collected(family, dtype)
    assert collection.uses and not collection.left_alone
    for use in collection.uses.values():
        gate = Gate(use)
        for name in USABLE:
            refusal = BACKENDS[name].refuses(use.signature)
            assert gate.verdict(BACKENDS[name]) == refusal, name
            assert refusal is None or name == "chunked"


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_chunks_agree_with_the_whole(mask, monkeypatch):
    monkeypatch.setattr("diffaccel.attention.kernels.rows_of_chunk", lambda scores: 3)
    query, key = torch.randn(2, 3, 8, 5), torch.randn(2, 3, 6, 5)
    open_ = torch.rand(2, 1, 8, 6) < 0.7
    open_[..., 0] = True
    given = {None: None, "bool": open_, "float": torch.randn(2, 1, 1, 6)}[mask]
    for scale in (None, 0.1):
        whole = default(query, key, key, given, False, scale)
        torch.testing.assert_close(chunked(query, key, key, given, False, scale), whole)


def test_padding_of_heads_changes_nothing():
    query, key, value = torch.randn(1, 2, 4, 5), torch.randn(1, 2, 6, 5), torch.randn(1, 2, 6, 7)
    width, scale, tensors = padded(query, key, value, None)
    assert all(tensor.shape[-1] == 8 for tensor in tensors)
    torch.testing.assert_close(
        plain(*tensors, None, False, scale)[..., :width], plain(query, key, value, None, False, None)
    )


def test_biases_have_aligned_rows():
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    mask = torch.rand(2, 1, 1, 5) < 0.5
    bias = aligned_bias(mask, query, key)
    assert bias.shape == (2, 3, 4, 5) and bias.stride(0) % 16 == 0
    assert torch.equal(bias[:, 0, 0] == 0, mask[:, 0, 0])


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_what_pytorch_computes(causal):
    tensors = [torch.randn(2, 3, 7, 4, dtype=torch.float64) for _ in range(3)]
    rows = torch.tensor([0, 3, 6])
    exact = reference(*tensors, None, causal, None, rows)
    torch.testing.assert_close(exact, default(*tensors, None, causal, None)[:, :, rows])


def test_inputs_have_the_scale_and_layout_of_the_model():
    (use, *_) = collected("sd").uses.values()
    tensors = make_inputs(use)
    for tensor, rms in zip(tensors, use.rms, strict=False):
        assert float(tensor.square().mean().sqrt()) == pytest.approx(rms, rel=0.1)
    assert use.tokens_first and tensors[0].transpose(1, 2).is_contiguous()
    assert torch.equal(tensors[0], make_inputs(use)[0])


def test_what_cannot_run_says_why():
    backends, left = candidates(None, False, CPU)
    assert [backend.name for backend in backends] == USABLE
    assert {name for name, _ in left} | set(USABLE) == set(BACKENDS)
    assert all("CUDA" in reason or "name it" in reason for _, reason in left)


@pytest.mark.parametrize(
    "names, text",
    [
        (["flashh"], "Unknown attention backend 'flashh'. Did you mean 'flash'?"),
        (["xformers"], "'xformers' cannot be used here: It needs a CUDA device; this is cpu."),
        (["cudnn", "flash"], "'cudnn' cannot be used here"),
        ("flash", "backends is a list"),
        ([], "backends is a list"),
        (3, "backends is a list, such as .* got 3"),
        ([["flash"]], "Unknown attention backend"),
        (["flash", planted("flash")], "Two attention backends are called 'flash'"),
        ([planted("default")], "Two attention backends are called 'default'"),
        ([planted(kind="approximate")], "'planted' cannot be used here: It is approximate"),
    ],
)
def test_bad_requests(names, text):
    with pytest.raises(UsageError, match=text):
        candidates(names, False, CPU)


@pytest.mark.parametrize("kernel", [flash, efficient, cudnn])
@pytest.mark.parametrize("width", [16, 40, 5])
def test_kernels_for_cuda_are_called_as_pytorch_declares_them(kernel, width):
    """On tensors without numbers, which take the way of CUDA tensors."""
    query = torch.empty(2, 6, 4, width, device="meta", dtype=torch.bfloat16).transpose(1, 2)
    key = torch.empty(2, 3, 4, width, device="meta", dtype=torch.bfloat16).transpose(1, 2)
    masks = [None, torch.empty(2, 1, 1, 3, device="meta", dtype=torch.bool)]
    for mask in masks[:1] if kernel is flash else masks:
        out = kernel(query, key, key, mask, False, None)
        assert out.shape == (2, 4, 6, width) and out.dtype == torch.bfloat16


XFORMERS = """
import logging
logging.getLogger("xformers").warning("WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions.")
"""


def test_xformers_without_cuda_is_silent(python, tmp_path):
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text(XFORMERS)
    (tmp_path / "xformers" / "ops.py").write_text("")
    (tmp_path / "xformers-0.0.35.dist-info").mkdir()
    (tmp_path / "xformers-0.0.35.dist-info" / "METADATA").write_text("Name: xformers\nVersion: 0.0.35\n")
    root = str(Path(diffaccel.__file__).parents[1])
    path = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    script = "import sys, diffaccel; import diffusers.models.attention_processor; assert 'xformers' in sys.modules"
    done = python("-c", script, env=path)
    assert done.code == 0, done.err
    assert "XFORMERS" not in done.err + done.out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch, about parts of itself
def test_compiled_flex_agrees():
    query, mask = torch.randn(1, 2, 128, 16), torch.randn(1, 1, 1, 128)
    with torch.no_grad():
        for given in (None, mask):
            out = flex(query, query, query, given, False, None)
            torch.testing.assert_close(out, default(query, query, query, given, False, None), atol=1e-5, rtol=1e-4)
