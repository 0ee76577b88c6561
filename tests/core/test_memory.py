"""Peak memory, counted against sizes that are known."""

import torch

from diffaccel.core.memory import peak_bytes

CPU = torch.device("cpu")
MIB = 2**20


def _zeros(mib: int) -> torch.Tensor:
    return torch.zeros(mib * MIB // 4)


def test_tensors_alive_at_once():
    def run():
        first = _zeros(1)
        second = first + 1
        del first
        third = second * 2
        del second
        return _zeros(3) if third is None else third.sum()

    assert peak_bytes(run, CPU) == 2 * MIB + 4 or peak_bytes(run, CPU) == 2 * MIB


def test_what_was_there_before_does_not_count():
    kept = _zeros(4)

    def run():
        kept.add_(1)
        view = kept.view(2, -1).t()
        return view[0] + _zeros(1)[:2]

    assert MIB <= peak_bytes(run, CPU) < MIB + 100
    assert peak_bytes(lambda: None, CPU) == 0


def test_results_do_not_change():
    network = torch.nn.Conv2d(2, 3, 3)
    sample = torch.randn(1, 2, 8, 8)
    found = []
    with torch.no_grad():
        peak_bytes(lambda: found.append(network(sample)), CPU)
        assert torch.equal(found[0], network(sample))
