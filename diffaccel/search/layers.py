"""Layers that are left out of a network in some of its calls, and skip features of U-Nets scaled.

Beside the times, AutoDiffusion (Li et al. 2023, arXiv 2309.10438) searches residual bodies that single steps do without;
schedules released with USF (arXiv 2312.07243) scale skip features step by step. Both are plain data, the ``layers`` of a
plan file, with an entry for every network call:

    {"skip": [[], ["down_blocks.0.resnets.1"], …], "scale": [null, 0.98, …]}

While they act, modules concerned belong to a subclass of their class with another call. So hooks on what is left out do not
fire, weights and attributes stay as they are, and copies are of the whole network.
"""

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..core.errors import DataError, UsageError
from ..core.standins import subclass
from ..models.networks import network_of
from ..models.residual import bodies, without_branches, zeros_through
from ..samplers.searched import PlanFile, SearchedScheduler


def skippable(network: nn.Module, run: Callable[[], object] | None = None) -> dict[str, float]:
    """What bypassing each of `bodies` saves, as a share of the network's cost.

    The cost is the multiply–accumulates of convolutions and matrix products, those of attention included where it is
    PyTorch's own, counted in the calls of the network that ``run`` makes.

    Args:
        network: as it is before `torch.compile`.
        run: calls the network once or more, such as ``lambda: pipe("a cat", num_inference_steps=1)``, since cost depends on
            resolution and length of text; None for a UNet2DModel, which is called with zeros.

    Raises:
        UsageError: no network, one without such bodies, or one that ``run`` does not call.
    """
    if not isinstance(network, nn.Module):
        raise UsageError(f"skippable looks at a network, such as pipe.unet or pipe.transformer; got {network!r:.80}.")
    names = bodies(network)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (run or zeros_through(network))()  # fused kernels are not counted on every device
    counts = Counter({name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()})
    root = type(network).__name__
    if not counts[root]:
        raise UsageError(f"run must call this {root} itself, not a compiled form or a copy; it did not.")
    saved = {name: counts[f"{root}.{name}"] - counts[f"{root}.{name}.conv_shortcut"] for name in names}
    return {name: count / counts[root] for name, count in saved.items()}


def check_layers(layers: Mapping, network: nn.Module, nfe: int) -> None:
    """Refuse layers that make no sense for a network and a number of calls.

    Raises:
        DataError: unknown keys, wrong lengths, names that are no text, factors outside [0, 1].
        UsageError: names that cannot be skipped in this network, factors for a network without skip features.
    """
    for key, entries in layers.items():
        if key not in ("skip", "scale"):
            raise DataError(f"The layers of a plan have the keys 'skip' and 'scale'; got {key!r}.")
        if not isinstance(entries, list) or len(entries) != nfe:
            got = len(entries) if isinstance(entries, list) else repr(entries)
            raise DataError(
                f"The layers' {key!r} must be a list for {nfe} network calls, an entry for each; got {got}."
            )
    skip, scale = layers.get("skip", []), layers.get("scale", [])
    for names in skip:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"What a network call skips is a list of names of modules; got {names!r}.")
    for factor in scale:
        if factor is not None and (type(factor) not in (int, float) or not 0.0 <= factor <= 1.0):
            raise DataError(f"The factor on skip features is null or a number in [0, 1]; got {factor!r}.")
    unknown = {name for names in skip for name in names}.difference(bodies(network) if any(skip) else ())
    if unknown:
        raise UsageError(
            f"{type(network).__name__} has no layer {min(unknown)!r} that can be skipped, as the plan of another network may; "
            "diffaccel.skippable(network) tells which it has."
        )
    if scale.count(None) < len(scale) and not hasattr(network, "up_blocks"):
        raise UsageError(f"{type(network).__name__} has no skip features to scale: only U-Nets with up_blocks have.")


@contextmanager
def bypass(network: nn.Module, layers: Mapping, call: Callable[[], int | None]) -> Iterator[None]:
    """Let layers act on a network inside a ``with`` block, whoever calls it.

    Args:
        network: any dtype. Compiled as a whole it stays right, but may lose the gain, since the compiler sees many forms;
            compile its blocks one by one instead.
        layers: see the head of this module; {} changes nothing.
        call: tells which of the calls is being made; outside the plan, or None, nothing is left out.

    Raises:
        DataError, UsageError: see `check_layers`; layers act on this network already.
    """
    check_layers(layers, network, _calls(layers))
    if any(hasattr(type(module), "_bypassed") for module in network.modules()):
        raise UsageError("Layers of this network are skipped already: end that first, with remove_plan(pipe).")
    modules, skip = dict(network.named_modules()), layers.get("skip", ())
    factors = {index: factor for index, factor in enumerate(layers.get("scale", ())) if factor is not None}
    replaced = {}
    for name in sorted({name for names in skip for name in names}):
        replaced[modules[name]] = _without, {index: None for index, names in enumerate(skip) if name in names}
    if factors:
        replaced |= dict.fromkeys(network.up_blocks, (_scaled, factors))
    with ExitStack() as stack:
        for module, (act, acting) in replaced.items():
            cls = type(module)
            stack.callback(setattr, module, "__class__", cls)
            module.__class__ = subclass(cls, __call__=_calling(cls, act, acting, call), _bypassed=True)
        yield


@contextmanager
def skip_layers(pipe, layers: Mapping) -> Iterator[None]:
    """Let layers act on the network of a pipeline inside a ``with`` block.

        with diffaccel.skip_layers(pipe, {"skip": [[], ["down_blocks.0.resnets.1"]]}):
            images = pipe(num_inference_steps=2).images

    Which call it is, the scheduler tells: the one whose step comes next. Both calls of a guidance pair are that one, a run
    that begins later (image to image) begins at its own entry, and outside of runs nothing is left out.

    Args:
        pipe: any diffusers pipeline with one network, whose scheduler has ``step_index``: all of diffaccel's, most others.
        layers: for as many calls as the scheduler has timesteps.

    Raises:
        DataError, UsageError: see `bypass`; during calls: a scheduler without ``step_index`` or with other timesteps.
    """
    calls = _calls(layers)
    with bypass(network_of(pipe), layers, lambda: _call_of(pipe.scheduler, calls)):
        yield


_APPLIED: MutableMapping = weakref.WeakKeyDictionary()  # of pipelines: (former scheduler, the plan's, how to undo it)


def apply_plan(pipe, plan=None) -> None:
    """Give a pipeline the scheduler of a plan file, and skip the layers that the file says, until `remove_plan`.

        diffaccel.apply_plan(pipe, "plan.json")
        images = pipe(prompt, num_inference_steps=5).images

    A plan that was applied before is replaced. Copies of the pipeline, and what it saves, have the plan's scheduler and the
    whole network: call this for them too. Where another pipeline shares the network, its calls leave nothing out.

    Args:
        pipe: any diffusers pipeline of the model that the plan was made for.
        plan: path of a file, or a `PlanFile`; None for that of the SearchedScheduler which the pipeline has.

    Raises:
        DataError: a file that cannot be read or makes no sense.
        UsageError: a plan for another noise schedule or network; see `bypass`.
    """
    former, applied, _ = _APPLIED.get(pipe, (None, None, None))
    former = former if pipe.scheduler is applied else pipe.scheduler
    plan = getattr(pipe.scheduler, "file", None) if plan is None else plan
    if plan is None:
        raise UsageError("This pipeline has no plan yet: apply_plan(pipe, 'plan.json').")
    file = plan if isinstance(plan, PlanFile) else PlanFile.load(plan)
    scheduler = SearchedScheduler.from_config(former.config, plan=file.to_dict())
    if file.layers:
        check_layers(file.layers, network_of(pipe), file.plan.nfe)
    remove_plan(pipe)
    undo = ExitStack()
    if file.layers:  # by proxy: the table above must not keep the pipeline alive
        undo.enter_context(skip_layers(weakref.proxy(pipe), file.layers))
    pipe.scheduler = scheduler
    _APPLIED[pipe] = former, scheduler, undo


def remove_plan(pipe) -> None:
    """Undo `apply_plan`; without effect where no plan is applied. A scheduler that was set since then stays."""
    if pipe not in _APPLIED:
        return
    former, applied, undo = _APPLIED.pop(pipe)
    undo.close()
    if pipe.scheduler is applied:
        pipe.scheduler = former


def _calls(layers: Mapping) -> int:
    return max((len(entries) for entries in layers.values() if isinstance(entries, list)), default=0)


def _calling(cls: type, act: Callable, acting: Mapping, call: Callable[[], int | None]) -> Callable:
    """The call of a module of a class that does something else in some calls of its network."""
    signature = inspect.signature(cls.forward)

    def __call__(self, *args, **kwargs):
        index = call()
        if index not in acting:
            return cls.__call__(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        return act(cls, self, bound, acting[index])

    return __call__


def _scaled(cls: type, module: nn.Module, bound: inspect.BoundArguments, factor: float):
    """An up block of a U-Net, with the features that come over from the way down multiplied."""
    features = bound.arguments["res_hidden_states_tuple"]
    bound.arguments["res_hidden_states_tuple"] = tuple(factor * feature for feature in features)
    return cls.__call__(*bound.args, **bound.kwargs)


def _without(cls: type, module: nn.Module, bound: inspect.BoundArguments, _):
    return without_branches(cls.__name__, module, bound.arguments)


def _call_of(scheduler, calls: int) -> int | None:
    """Which call of a run comes next; None outside of runs."""
    if not hasattr(scheduler, "step_index"):
        raise UsageError(f"{type(scheduler).__name__} does not count its steps: use a scheduler of diffaccel instead.")
    if getattr(scheduler, "num_inference_steps", None) is None:
        return None
    if len(scheduler.timesteps) != calls:
        raise UsageError(f"These layers are for {calls} network calls; this run has {len(scheduler.timesteps)}.")
    return (scheduler.begin_index or 0) if scheduler.step_index is None else scheduler.step_index
