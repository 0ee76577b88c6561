"""What pruning scores are computed on: runs of the model itself from keyed noise, and the network calls in them."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiTTransformer2DModel

from ..core.errors import UsageError
from ..models.pixel import num_classes
from ..search.subjects import DenoiserSubject, PipelineSubject, Subject, fine_plan

Calls = Sequence[tuple[tuple, Mapping]]  # arguments of network calls


class Calibration:
    """Final states and network calls of a model; everything that is compared starts from the same noise.

    Sample i depends on the seed and on i only, so its size and batches do not change what is drawn.

    Args:
        subject: a pipeline or a denoiser, see `search.subjects`; its network is put into evaluation mode.
        count: samples.
        steps: network calls of a run; a solver of the third order goes through them, so few do.
        seed: of the initial noise.
        calls: positional and named arguments of network calls to use in place of the run's own.

    Raises:
        UsageError: no samples, less than two for a deviation, no steps.
    """

    def __init__(self, subject: Subject, count: int = 16, steps: int = 10, seed: int = 0, calls: Calls | None = None):
        if count < 2 or steps < 2:
            raise UsageError(
                f"Scores need at least 2 samples and 2 steps to calibrate on; got {count} samples and {steps} steps."
            )
        self.subject, self.count, self.steps, self.seed = subject, count, steps, seed
        self.network = subject.network().eval()
        self._given = None if calls is None else [*calls]

    @torch.no_grad()
    def latents(self) -> torch.Tensor:
        """(count, …) float32 on the CPU: where the runs end, with the network as it is now."""
        return self.subject.draw(self.subject.file(fine_plan(self.subject.schedule, self.steps)), self.seed, self.count)

    @functools.cached_property
    def calls(self) -> list[tuple[tuple, Mapping]]:
        """Arguments of the network's calls in the runs of the whole network: (x_t, t, condition), batch by batch."""
        if self._given is not None:
            return self._given
        kept: list = []
        with _recorded(self.network, kept):
            self.latents()
        return kept

    def one_call(self) -> Callable[[], object]:
        """A function that calls the network as a run of one sample does first, a guidance pair as a batch of two."""
        kept: list = []
        with _recorded(self.network, kept):
            self.subject.draw(self.subject.file(fine_plan(self.subject.schedule, 2)), self.seed, 1)
        args, kwargs = kept[0]
        return lambda: self.network(*args, **kwargs)

    @torch.no_grad()
    def outputs(self) -> Iterator[torch.Tensor]:
        """What the network, as it is now, predicts in each of the calls: (B, …) float32."""
        for args, kwargs in self.calls:
            yield self.network(*args, **kwargs)[0].float()

    def settings(self) -> dict:
        """What scores depend on besides the method, as plain JSON."""
        drawn = {"count": self.count, "steps": self.steps, "seed": self.seed, "scheduler": digest(self.subject.config)}
        return {
            "model": self.subject.fingerprint(),
            **drawn,
            "conditions": digest(_conditions(self.subject, self.count)),
            "calls": None if self._given is None else digest(self._given),
        }


def calibrate(
    pipe,
    conditions: Sequence[Mapping] | None = None,
    settings: Mapping | None = None,
    batch_size: int = 16,
    **more,
) -> Calibration:
    """A calibration of any diffusers pipeline, called as its users call it.

    Args:
        pipe: the pipeline.
        conditions: what differs from sample to sample, such as [{"prompt": "a cat"}, …]; None for all classes in turn of a
            pixel model or a DiT, and for nothing in particular.
        settings: arguments that do not differ, such as {"guidance_scale": 5.0}.
        batch_size: samples per call.
        **more: see `Calibration`.

    Raises:
        UsageError: arguments that are not the pipeline's, a pipeline that needs prompts and got none; see `Calibration`.
    """
    if conditions is None:
        dit = getattr(pipe, "transformer", None)
        classes = num_classes(dit) if isinstance(dit, DiTTransformer2DModel) else getattr(pipe, "num_classes", None)
        conditions = [{"class_labels": label} for label in range(classes)] if classes else [{}]
    subject = PipelineSubject(pipe, conditions, settings, batch_size)
    subject.check_conditions()
    return Calibration(subject, **more)


def digest(value) -> str:
    """16 hexadecimal digits that tell nested values apart, tensors by their content."""
    found = hashlib.sha256()

    def add(one) -> None:
        if isinstance(one, torch.Tensor):
            found.update(f"{tuple(one.shape)} {one.dtype}".encode())
            found.update(one.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(one, Mapping):
            for key in sorted(one, key=str):
                found.update(f"{key}:".encode())
                add(one[key])
        elif isinstance(one, (list, tuple)):
            found.update(f"[{len(one)}]".encode())
            for item in one:
                add(item)
        else:
            found.update(f"{type(one).__name__} {one!r};".encode())

    add(value)
    return found.hexdigest()[:16]


def _conditions(subject: Subject, count: int) -> list:
    """What runs depend on besides weights and noise."""
    if isinstance(subject, PipelineSubject):
        return [type(subject.pipe).__name__, subject.conditions, subject.settings]
    if isinstance(subject, DenoiserSubject):
        return [getattr(subject.denoiser, "scale", None), subject.conditions(0, count)]
    return []


@contextmanager
def _recorded(network: torch.nn.Module, kept: list) -> Iterator[None]:
    def keep(_, args, kwargs):
        kept.append((tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}))

    hook = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _copied(value):
    """Tensors as they are now, also those inside tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {name: _copied(one) for name, one in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value
