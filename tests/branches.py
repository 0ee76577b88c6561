"""Networks whose branches can be switched off, for tests of what leaves branches out."""

import copy
import re
from contextlib import contextmanager

import torch
from pipelines import PIPELINES

from diffaccel.search.layers import network_of

# What a residual branch ends in.
OUTPUTS = re.compile(r"(^|\.)(conv2|to_out\.0|to_add_out|proj_out|net\.2)$")


def own(case):
    """The pipeline with weights of its own, none of them zero."""
    pipe = copy.deepcopy(case.build())
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in network_of(pipe).parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return pipe


def inputs_of(case, pipe) -> tuple:
    """Arguments of the network's first call."""
    seen = []
    hook = network_of(pipe).register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
    case.call(pipe, 2)
    hook.remove()
    return seen[0]


def deep(name, **changes):
    """The network of a pipeline in `PIPELINES` with four blocks, and inputs."""
    case = PIPELINES[name]
    pipe = own(case)
    small = network_of(pipe)
    torch.manual_seed(0)
    config = {key: value for key, value in small.config.items() if not key.startswith("_")}
    network = type(small).from_config(config | {"num_layers": 4} | changes).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return network, inputs_of(case, pipe)


@contextmanager
def zeroed(module):
    """The module with branches that end in zero."""
    layers = [layer for name, layer in module.named_modules() if OUTPUTS.search(name)]
    weights = [weight for layer in layers for weight in layer.parameters()]
    before = [weight.detach().clone() for weight in weights]
    assert weights
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
        yield
        for weight, value in zip(weights, before, strict=True):
            weight.copy_(value)


def traces(network) -> tuple:
    """What must be as before, and must not be what skipping brings along."""
    modules = dict(network.named_modules())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules.values())
    kept = {name: (type(module), sorted(vars(module))) for name, module in modules.items()}
    return kept, hooks, list(network.state_dict())
