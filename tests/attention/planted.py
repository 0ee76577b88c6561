"""Networks to optimise, backends planted among the candidates, and times that do not depend on the machine."""

import copy
from contextlib import contextmanager

import torch
from pipelines import PIPELINES

from diffaccel.attention import install, measure
from diffaccel.attention.backends import Backend
from diffaccel.attention.collect import capture_calls, collect
from diffaccel.attention.kernels import plain

FAMILIES = ("sd", "sdxl", "sd3", "pixart", "flux")


def built(name: str):
    """A pipeline whose network may be changed, and a function that runs it."""
    case = PIPELINES[name]
    pipe = copy.deepcopy(case.build())
    return pipe, getattr(pipe, case.network), lambda **arguments: case.call(pipe, 2, **arguments)


def collected(name: str, dtype: torch.dtype = torch.float32):
    """What is found in a pipeline's network."""
    _, network, run = built(name)
    calls = capture_calls({"network": network}, run)["network"]
    network.to(dtype)
    return collect(network, _cast(calls, dtype))


def planted(name: str = "planted", kernel=plain, **settings) -> Backend:
    """A backend that is not registered."""
    return Backend(name, "planted", kernel, **settings)


def wrong(query, key, value, mask, causal, scale):
    """Right but for the scale of the logits."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return plain(query, key, value, mask, causal, 1.05 * scale)


def clocks(monkeypatch, **seconds: float) -> None:
    """Let every measurement say these times: 1 second for names that are not given."""

    def told(contenders, device, rounds=0, limit=0.0):
        for run in contenders.values():
            run()
        return {name: [seconds.get(name, 1.0)] * 3 for name in contenders}

    monkeypatch.setattr(measure, "alternate", told)
    monkeypatch.setattr(install, "alternate", told)


@contextmanager
def nothing_global_changes():
    """Fail if diffusers' registry, PyTorch's function, its kernel flags or the random state are others afterwards."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    def state():
        flags = (
            torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled(), torch.is_grad_enabled(),
        )  # fmt: skip
        functions = (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional)
        return registry._active_backend, dict(registry._backends), functions, flags

    before, random = state(), torch.get_rng_state()
    try:
        yield
    finally:
        assert state() == before
        assert torch.equal(torch.get_rng_state(), random)


def _cast(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _cast(item, dtype) for name, item in value.items()}
    return type(value)(_cast(item, dtype) for item in value) if isinstance(value, (list, tuple)) else value
