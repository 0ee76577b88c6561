"""`optimize_attention`: measure, choose, confirm, install."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from ..core.errors import UsageError
from ..models.networks import device_of, eager, networks_of
from .backends import APPROXIMATE, BACKENDS, Backend, candidates
from .cache import Cache
from .choose import choose
from .collect import Collection, Use, capture_calls, collect
from .examples import example_call
from .install import confirm as confirmed
from .install import installation_of
from .measure import measure
from .report import AttentionReport, Choice, NetworkReport


def optimize_attention(
    pipe_or_network,
    *,
    run: Callable[[], object] | None = None,
    memory_cap: int | None = None,
    backends: Sequence[str | Backend] | None = None,
    approximate: bool = False,
    cache: bool = True,
    fresh: bool = False,
    confirm: bool = True,
    rounds: int = 20,
    seconds: float = 2.0,
) -> AttentionReport:
    """Give every attention of a pipeline the backend that is measured to be fastest and correct, until ``undo``.

        report = diffaccel.optimize_attention(pipe)
        print(report.explain())
        report.undo()

    The network is run once to see what attention it has. On each kind of call, the usable backends are compared with double
    precision and timed in turn; PyTorch's choice stays unless another is 5 % faster, and the whole stays only if the network
    is faster. Calls of other sizes than were measured, and calls with gradients, run PyTorch's choice. Nothing outside the
    network changes; copies of it, and what is saved, have stock processors.

    Args:
        pipe_or_network: any diffusers pipeline, or its network, also compiled; its attention must run on its device.
        run: calls the network as it will be called, such as ``lambda: pipe("a cat", num_inference_steps=1)``; None for
            inputs of released pipelines (UNets, DiT, PixArt, SD3, Flux).
        memory_cap: bytes that one attention may allocate; measured on CUDA, estimated elsewhere.
        backends: names in `BACKENDS` or `Backend` records of your own; None for all that are usable.
        approximate: whether backends with reduced precision may be chosen; those named need it too.
        cache: whether measurements are kept under ``$XDG_CACHE_HOME/diffaccel/attention`` and reused.
        fresh: whether to measure again what was measured by an earlier process.
        confirm: whether the network as a whole must be faster.
        rounds: how often each backend is timed, at least 3.
        seconds: after which a signature is timed no more.

    Returns:
        What was done, with ``explain()`` and ``undo()``.

    Raises:
        UsageError: neither pipeline nor network, one optimised already, an unknown or unusable backend, bad numbers, or a
        network that needs ``run``.
    """
    _check(memory_cap, rounds, seconds)
    networks = networks_of(pipe_or_network)
    devices = {name: device_of(network) for name, network in networks.items()}
    offered = {device: candidates(backends, approximate, device) for device in devices.values()}
    reports: list[NetworkReport] = []
    cuda = {device for device in devices.values() if device.type == "cuda"}
    with ExitStack() as on_error, torch.random.fork_rng(sorted(cuda, key=str)):
        on_error.callback(lambda: AttentionReport(tuple(reports), ()).undo())
        if run is None:
            calls = {name: [((), example_call(eager(network)))] for name, network in networks.items()}
        else:
            calls = capture_calls(networks, run)
        for name, network in networks.items():
            if not calls[name]:
                reports.append(NetworkReport(name, (), ((name, "run does not call it"),), None, False))
                continue
            contenders, _ = offered[devices[name]]
            collection = collect(network, calls[name])
            store = Cache(devices[name]) if cache and _registered(contenders) else None
            choices = [
                _choice(use, contenders, store, fresh, memory_cap, rounds, seconds) for use in collection.uses.values()
            ]
            reports.append(_installed(name, collection, choices, contenders, confirm))
        on_error.pop_all()
    not_tried = dict(pair for _, left in offered.values() for pair in left)
    return AttentionReport(tuple(reports), tuple(not_tried.items()))


def _choice(
    use: Use, contenders: list[Backend], store: Cache | None, fresh: bool, cap: int | None, rounds: int, seconds: float
) -> Choice:
    known = store.get(use, [backend.name for backend in contenders]) if store and not fresh else None
    measured = known or measure(use, contenders, rounds, seconds)
    if store and not known:
        store.put(use, measured)
    return Choice(use, *choose(measured, cap), tuple(measured), known is not None)


def _installed(
    name: str, collection: Collection, choices: list[Choice], contenders: list[Backend], confirm: bool
) -> NetworkReport:
    by_name = {backend.name: backend for backend in contenders}
    table = {one.use.signature: by_name[one.backend].kernel for one in choices if one.backend != "default"}
    choices = sorted(choices, key=_cost, reverse=True)
    parts = (name, tuple(choices), tuple(collection.left_alone))
    if not table:
        return NetworkReport(*parts, confirmation=None, installed=False)
    installation = installation_of(collection, table)
    exact = all(by_name[one.backend].kind != APPROXIMATE for one in choices)
    faster = not any(one.for_memory for one in choices)
    outcome = confirmed(collection, installation, exact, faster) if confirm else None
    if outcome is not None and outcome.problem is not None:
        return NetworkReport(*parts, confirmation=outcome, installed=False)
    installation.install()
    return NetworkReport(*parts, confirmation=outcome, installed=True, installation=installation)


def _cost(choice: Choice) -> float:
    default = next(one for one in choice.measured if one.backend == "default")
    return default.seconds * len(choice.use.modules)


def _registered(contenders: list[Backend]) -> bool:
    return all(BACKENDS.get(backend.name) is backend for backend in contenders)


def _check(memory_cap, rounds, seconds) -> None:
    if memory_cap is not None and (not isinstance(memory_cap, int) or memory_cap <= 0):
        raise UsageError(f"memory_cap is a positive number of bytes, or None; got {memory_cap!r}.")
    if not isinstance(rounds, int) or rounds < 3:
        raise UsageError(f"rounds is a whole number from 3; got {rounds!r}.")
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise UsageError(f"seconds is a positive number; got {seconds!r}.")
