"""The one interface of every model: ``denoiser(x_t, t, condition) -> x0``."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import nn

from ..core.prediction import coefficients, convert
from ..core.schedule import NoiseSchedule

Condition = Mapping[str, torch.Tensor]  # network keyword arguments, each with the batch as first dimension


class Denoiser(nn.Module, ABC):
    """Estimates E[x0 | x_t, condition], whatever the network behind it predicts.

    Attributes:
        schedule: noise schedule of the states it takes.
        sample_shape: shape of one sample, e.g. (channels, height, width).
    """

    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]

    @abstractmethod
    def forward(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
        """Estimate the clean sample.

        Args:
            x_t: (B, *sample_shape) noisy samples in native scale, float32.
            t: (B,) times of `schedule`, any float dtype.
            condition: keyword arguments of the network, each (B, …); None for unconditional models.

        Returns:
            (B, *sample_shape) float32.
        """

    def null_condition(self, count: int) -> Condition | None:
        """The condition that means "none" for guidance, for ``count`` samples; None if the model has no condition."""
        return None

    def level(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(α, σ) of times (B,), float32 and shaped to broadcast over samples."""
        shape = (-1,) + (1,) * len(self.sample_shape)
        return tuple(value.float().reshape(shape) for value in self.schedule.level(t))

    def noised(self, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Native noisy state α(t)·x0 + σ(t)·eps."""
        alpha, sigma = self.level(t)
        return alpha * x0 + sigma * eps


class NetworkDenoiser(Denoiser):
    """A diffusers network seen as a Denoiser; subclasses say how the network is called and where its features are.

    Args:
        net: the network, any dtype.
        schedule: the schedule it was trained on.
        prediction_type: what it predicts, one of `core.prediction.PREDICTION_TYPES`.
    """

    def __init__(self, net: nn.Module, schedule: NoiseSchedule, prediction_type: str):
        super().__init__()
        self.net, self.schedule, self.prediction_type = net, schedule, prediction_type

    @abstractmethod
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition | None) -> torch.Tensor:
        """Raw network output for x_t."""

    @abstractmethod
    def feature_modules(self) -> list[nn.Module]:
        """Modules whose outputs, (B, C, h, w) or square (B, tokens, C), describe a noisy sample, in network order."""

    def feature_of(self, output) -> torch.Tensor:
        """The map or the tokens in what one of `feature_modules` returns."""
        return output[0] if isinstance(output, tuple) else output

    def forward(self, x_t, t, condition=None):
        return self._clean(self.predict(x_t, t, condition), x_t, t)

    def _clean(self, prediction, x_t, t) -> torch.Tensor:
        return convert(prediction.float(), x_t.float(), self.prediction_type, "sample", *self.level(t))

    def denoising_error(self, x0, t, eps, condition=None) -> torch.Tensor:
        """(B,) mean squared error of the raw prediction at α·x0 + σ·eps: the loss this family was trained with."""
        x_t = self.noised(x0, t, eps)
        p, r = coefficients("sample", self.prediction_type, *self.level(t))
        error = self.predict(x_t, t, condition).float() - (p * x_t + r * x0)
        return error.square().flatten(1).mean(1)

    def forward_with_features(self, x_t, t, condition=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Like a call, and in the same network evaluation the outputs of `feature_modules` as (B, C, h, w) float32."""
        prediction, features = self.predict_with_features(x_t, t, condition)
        return self._clean(prediction, x_t, t), features

    def predict_with_features(self, x_t, t, condition=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Like `predict`, with the features of `forward_with_features`."""
        features: list[torch.Tensor] = []

        def keep(_module, _inputs, output):
            value = self.feature_of(output).float()
            if value.ndim == 3:  # the tokens of a square
                value = value.transpose(1, 2).unflatten(2, (round(value.shape[1] ** 0.5), -1))
            # Contiguous: attention blocks return channels-last strides, on which torch 2.13's CPU group norm crashes in
            # its backward pass.
            features.append(value.contiguous())

        hooks = [module.register_forward_hook(keep) for module in self.feature_modules()]
        try:
            prediction = self.predict(x_t, t, condition)
        finally:
            for hook in hooks:
                hook.remove()
        return prediction, features

    def clone(self) -> "NetworkDenoiser":
        """An independent copy with its own weights."""
        return copy.deepcopy(self)


class Guided(Denoiser):
    """Classifier-free guidance x0 = null + scale·(conditional − null); both branches share one batched call.

    Args:
        denoiser: a conditional model with a null condition.
        scale: 1 is the conditional model itself (then the null branch is not evaluated).
    """

    def __init__(self, denoiser: Denoiser, scale: float):
        super().__init__()
        self.denoiser, self.scale = denoiser, scale
        self.schedule, self.sample_shape = denoiser.schedule, denoiser.sample_shape

    def forward(self, x_t, t, condition=None):
        null = self.denoiser.null_condition(len(x_t))
        if self.scale == 1.0 or condition is None or null is None:
            return self.denoiser(x_t, t, condition)
        both = {key: torch.cat([null[key].to(value.device), value]) for key, value in condition.items()}
        uncond, cond = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return torch.lerp(uncond, cond, self.scale)
