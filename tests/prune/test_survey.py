"""Parameters and multiply–accumulates against independent counts, and time that is plausible."""

import copy
import time

import pytest
import torch
from branches import inputs_of, own, traces
from networks import tiny_unet
from pipelines import PIPELINES
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffaccel.core.errors import UsageError
from diffaccel.models.networks import network_of
from diffaccel.prune.costs import count_macs, measure_seconds
from diffaccel.prune.surgery import remove
from diffaccel.prune.survey import survey_network


def independent_macs(call) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", PIPELINES)
def test_what_removing_saves(name):
    """Counted by another counter in the network from which one operator was removed."""
    case = PIPELINES[name]
    pipe = own(case)
    network = network_of(pipe)
    args, kwargs = inputs_of(case, pipe)
    before = traces(network)
    survey = survey_network(network, lambda: network(*args, **kwargs), single=True)
    assert traces(network) == before
    assert survey.macs == independent_macs(lambda: network(*args, **kwargs))
    assert survey.parameters == sum(weight.numel() for weight in network.parameters())
    for candidate in survey.candidates[:: 5 if len(survey.candidates) > 20 else 1]:
        smaller = copy.deepcopy(network)
        remove(smaller, [candidate.name])
        assert candidate.macs == survey.macs - independent_macs(lambda smaller=smaller: smaller(*args, **kwargs))
        left = sum(weight.numel() for weight in smaller.parameters())
        assert candidate.parameters == survey.parameters - left
        assert set(candidate.contains) == {one for one in survey.names if one.startswith(candidate.name + ".")}
        assert candidate is survey[candidate.name] and candidate.seconds is None


def test_closed_forms():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
            self.up = nn.ConvTranspose2d(6, 2, 4, stride=2, padding=1)
            self.line = nn.Linear(8, 5)

        def forward(self, x):
            x = self.line(self.up(self.conv(x)))  # (B, 2, 8, 5)
            y = nn.functional.scaled_dot_product_attention(x, x[..., :3, :], x[..., :3, :2])
            return torch.bmm(x[0], x[0].mT) @ y[0]

    network, x = Net(), torch.zeros(1, 4, 8, 8)
    macs = count_macs(network, lambda: network(x))
    assert macs["conv"] == 6 * 16 * 2 * 9
    assert macs["up"] == 6 * 16 * 2 * 16
    assert macs["line"] == 2 * 8 * 8 * 5
    assert macs[""] == macs["conv"] + macs["up"] + macs["line"] + 2 * 8 * 3 * (5 + 2) + 2 * 8 * 8 * 5 + 2 * 8 * 8 * 2
    assert count_macs(network, lambda: [network(x), network(x)])[""] == 2 * macs[""]


def test_seconds():
    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.004)
            return x

    network = nn.Sequential(nn.Linear(1, 1), Slow(), nn.Sequential(Slow(), Slow()))
    found = measure_seconds(network, lambda: network(torch.zeros(1, 1)), ["0", "1", "2", "2.1"], repeats=3)
    assert 0.004 <= found["1"] < 0.02 and 0.008 <= found["2"] < found[""]
    assert found["2.1"] < found["2"] and found["0"] < found["1"]
    survey = survey_network(tiny_unet(), repeats=2)
    outer = [one for one in survey.candidates if "mid_block" in one.name]
    assert all(one.seconds > 0 for one in outer) and sum(one.seconds for one in outer) < survey.seconds


def test_runs_that_do_not_fit():
    network = tiny_unet()
    before = traces(network)
    with pytest.raises(UsageError, match="run must call this UNet2DModel itself"):
        survey_network(network, lambda: None)
    with pytest.raises(UsageError, match="run must call"):
        measure_seconds(network, lambda: None)
    with pytest.raises(UsageError, match="at least one run"):
        measure_seconds(network, lambda: None, repeats=0)
    with pytest.raises(UsageError, match="Pass run="):
        survey_network(PIPELINES["sd"].build().unet)
    with pytest.raises(ZeroDivisionError):
        survey_network(network, lambda: [network(torch.zeros(1, 1, 8, 8), 0, torch.tensor([0])), 1 / 0])
    assert traces(network) == before
    with pytest.raises(UsageError, match=r"Did you mean 'mid_block\.resnets\.0'"):
        survey_network(network)["mid_block.resnet.0"]
