"""Layers that are left out of a network in some of its calls, and skip features of U-Nets scaled.

Beside the times, AutoDiffusion (Li et al. 2023, arXiv 2309.10438) searches residual bodies that single steps do without;
schedules released with USF (arXiv 2312.07243) scale skip features step by step. Both are plain data, the ``layers`` of a
plan file, with an entry for every network call:

    {"skip": [[], ["down_blocks.0.resnets.1"], …], "scale": [null, 0.98, …]}

While they act, modules concerned belong to a subclass of their class with another call. So hooks on what is left out do not
fire, weights and attributes stay as they are, and copies are of the whole network.
"""

import inspect
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..core.errors import DataError, UsageError
from ..guidance.run import NETWORKS
from ..guidance.standins import subclass
from ..models.unet2d import num_classes, sample_shape
from ..samplers.searched import PlanFile, SearchedScheduler

_JOINT = ("encoder_hidden_states", "hidden_states")
# What transformer blocks return; without their branches these are their arguments of the same names.
_BLOCKS = {
    **dict.fromkeys(("BasicTransformerBlock", "LTXVideoTransformerBlock", "WanTransformerBlock"), "hidden_states"),
    **dict.fromkeys(("FluxSingleTransformerBlock", "FluxTransformerBlock", "JointTransformerBlock"), _JOINT),
    "CogVideoXBlock": _JOINT[::-1],
}
# Transformers inside U-Nets, whose result is added to what they are given: bypassed as a whole where that is one block.
_CONTAINERS = ("AnimateDiffTransformer3D", "Transformer2DModel", "TransformerSpatioTemporalModel")
_RESNETS = ("ResnetBlock2D", "TemporalResnetBlock")
_SPREAD = 0.02  # of the factors on skip features that are tried, as in USF's released search


def bodies(network: nn.Module) -> list[str]:
    """Names of the residual bodies that may be bypassed, as in ``network.named_modules()``; none lies inside another.

    Residual blocks and attention of U-Nets that do not resample, their transformers (block by block where there are
    several), and the blocks of DiT, PixArt, SD3, Flux, CogVideoX, LTX and Wan.

    Raises:
        UsageError: a network without any that is known.
    """
    found: list[str] = []
    for name, module in network.named_modules():
        if name and not any(name.startswith(outer + ".") for outer in found) and _is_body(module):
            found.append(name)
    if not found:
        kinds = sorted({type(module).__name__ for module in network.modules() if list(module.children())})
        raise UsageError(f"No layer known to be skippable in {type(network).__name__}; it has {', '.join(kinds)}.")
    return found


def skippable(network: nn.Module, run: Callable[[], object] | None = None) -> dict[str, float]:
    """What bypassing each of `bodies` saves, as a share of the network's cost.

    The cost is the multiply–accumulates of convolutions and matrix products, those of attention included where it is
    PyTorch's own, counted in the calls of the network that ``run`` makes.

    Args:
        network: as it is before `torch.compile`.
        run: calls the network once or more, such as ``lambda: pipe("a cat", num_inference_steps=1)``, since cost depends on
            resolution and length of text; None for a UNet2DModel, which is called with zeros.

    Raises:
        UsageError: a network without such bodies, or that ``run`` does not call.
    """
    names = bodies(network)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (run or _zeros_through(network))()  # fused kernels are not counted on every device
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


def network_of(pipe) -> nn.Module:
    """The one network of a pipeline that predicts, inside its compiled form if it has one.

    Raises:
        UsageError: no such network, or several.
    """
    found = [module for name in NETWORKS if isinstance(module := getattr(pipe, name, None), nn.Module)]
    if len(found) != 1:
        raise UsageError(f"Layers are skipped in pipelines with one network; {type(pipe).__name__} has {len(found)}.")
    return getattr(found[0], "_orig_mod", found[0])


@dataclass(frozen=True)
class LayerSpace:
    """The ``layers`` that a search may choose, drawn, mutated and crossed without ever exceeding a budget.

    Args:
        shares: of the network's cost by name, from `skippable`.
        calls: network calls of a run.
        budget: network evaluations that a run may spend, a guidance pair counted once; None for no bound.
        max_share: of the network that a call may leave out, at most.
        scaling: whether the skip features of a U-Net are scaled too.

    Raises:
        UsageError: a budget that skips within ``max_share`` may not reach.
    """

    shares: Mapping[str, float]
    calls: int
    budget: float | None = None
    max_share: float = 0.5
    scaling: bool = False

    def __post_init__(self):
        if not self.shares or self.calls < 1 or not 0.0 <= self.max_share <= 1.0:
            got = f"{len(self.shares)} layers, {self.calls} calls and {self.max_share:g}"
            raise UsageError(f"A search of layers needs layers, calls and a max_share in [0, 1]; got {got}.")
        usable = [share for share in self.shares.values() if share <= self.max_share]
        # Whatever is skipped already, adding what fits goes on until a call leaves out at least this.
        surely = sum(usable) if sum(usable) <= self.max_share else self.max_share - max(usable)
        least = self.calls * (1.0 - surely)
        if self.budget is not None and self.budget < least:
            raise UsageError(
                f"With max_share {self.max_share:g} the budget must be at least {least:.4g} evaluations; got {self.budget:g}."
            )

    def cost(self, layers: Mapping) -> float:
        """Network evaluations that a run spends, a guidance pair counted once."""
        return float((1.0 - self.tokens(layers)[:, :-1] @ self._costs).sum())

    def key(self, layers: Mapping) -> str:
        """The same text for the same layers."""
        return json.dumps(self._layers(self.tokens(layers)))

    def draw(self, random: np.random.Generator) -> dict:
        """Random layers: every call leaves out a share of its own, between none and the most."""
        genes = np.ones((self.calls, len(self.shares) + 1))
        for row in genes:
            order = random.permutation(len(self.shares))
            row[order] = np.cumsum(self._costs[order]) <= random.uniform(0.0, self.max_share)
        genes[:, -1] -= self.scaling * np.abs(random.normal(0.0, _SPREAD, self.calls))
        return self.fitted(self._layers(genes), random)

    def mutate(self, layers: Mapping, random: np.random.Generator) -> dict:
        """A neighbour, in which one layer or a few more change; different unless there is no other."""
        for _ in range(100):
            genes = self.tokens(layers)
            for _ in range(random.geometric(0.5)):
                place = random.integers(self.calls), random.integers(len(self.shares))
                genes[place] = 1.0 - genes[place]
            genes[:, -1] += self.scaling * random.normal(0.0, _SPREAD, self.calls) * (random.random(self.calls) < 0.5)
            child = self.fitted(self._layers(genes), random)
            if self.key(child) != self.key(layers):
                break
        return child

    def cross(self, one: Mapping, other: Mapping, random: np.random.Generator) -> dict:
        """Every layer of every call, and every factor, as in one parent or the other, as AutoDiffusion has it."""
        one, other = self.tokens(one), self.tokens(other)
        return self.fitted(self._layers(np.where(random.random(one.shape) < 0.5, one, other)), random)

    def fitted(self, layers: Mapping, random: np.random.Generator) -> dict:
        """Skip less in calls that leave out too much, then more wherever that fits until the budget holds."""
        genes, costs, most = self.tokens(layers), self._costs, self.max_share + 1e-9
        skips = genes[:, :-1]
        for row in skips:
            while row @ costs > most:
                row[random.choice(np.flatnonzero(row))] = 0.0
        while self.budget is not None and self.calls - (skips @ costs).sum() > self.budget + 1e-9:
            fitting = np.argwhere((skips == 0.0) & ((skips @ costs)[:, None] + costs <= most))
            skips[tuple(random.choice(fitting))] = 1.0
        return self._layers(genes)

    def tokens(self, layers: Mapping) -> np.ndarray:
        """(calls, layers + 1) genes: 1 for what is skipped and 0 for what is not, and the factor on skip features."""
        skips = [[name in names for name in self.shares] for names in layers.get("skip", [()] * self.calls)]
        scales = [1.0 if factor is None else float(factor) for factor in layers.get("scale", [None] * self.calls)]
        return np.column_stack([skips, scales])

    @property
    def _costs(self) -> np.ndarray:
        return np.array([*self.shares.values()])

    def _layers(self, genes: np.ndarray) -> dict:
        layers: dict = {"skip": [[name for name, gene in zip(self.shares, row, strict=False) if gene] for row in genes]}
        factors = np.clip(genes[:, -1], 0.0, 1.0).tolist()
        if min(factors) < 1.0:
            layers["scale"] = [None if factor == 1.0 else factor for factor in factors]
        return layers


def _calls(layers: Mapping) -> int:
    return max((len(entries) for entries in layers.values() if isinstance(entries, list)), default=0)


def _is_body(module: nn.Module) -> bool:
    kind = type(module).__name__
    if kind in _RESNETS:  # only those that keep the resolution
        return not (getattr(module, "up", False) or getattr(module, "down", False))
    if kind == "Attention":
        return module.residual_connection
    return kind in _BLOCKS or (kind in _CONTAINERS and len(module.transformer_blocks) == 1)


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
    """What a residual body returns without its branches."""
    kind, arguments = cls.__name__, bound.arguments
    if kind in _RESNETS:
        shortcut = module.conv_shortcut or nn.Identity()
        return shortcut(arguments["input_tensor"]) / getattr(module, "output_scale_factor", 1.0)
    if kind == "Attention":
        return arguments["hidden_states"] / module.rescale_output_factor
    names = _BLOCKS.get(kind, "hidden_states")
    result = arguments[names] if isinstance(names, str) else tuple(arguments[name] for name in names)
    if "return_dict" not in arguments:
        return result
    return Transformer2DModelOutput(sample=result) if arguments["return_dict"] else (result,)


def _call_of(scheduler, calls: int) -> int | None:
    """Which call of a run comes next; None outside of runs."""
    if not hasattr(scheduler, "step_index"):
        raise UsageError(f"{type(scheduler).__name__} does not count its steps: use a scheduler of diffaccel instead.")
    if getattr(scheduler, "num_inference_steps", None) is None:
        return None
    if len(scheduler.timesteps) != calls:
        raise UsageError(f"These layers are for {calls} network calls; this run has {len(scheduler.timesteps)}.")
    return (scheduler.begin_index or 0) if scheduler.step_index is None else scheduler.step_index


def _zeros_through(network: nn.Module) -> Callable[[], object]:
    if type(network).__name__ != "UNet2DModel":
        raise UsageError(f"Pass run=, which calls this {type(network).__name__} with inputs as it will have them.")
    x = torch.zeros(1, *sample_shape(network)).to(next(network.parameters()))
    labels = {"class_labels": torch.zeros(1, dtype=torch.long, device=x.device)} if num_classes(network) else {}
    return lambda: network(x, 0, **labels)
