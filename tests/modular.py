"""Modular pipelines with tiny random weights, from embeddings to latents, shared by tests.

Each draws one initial noise per seed: a batch of samples is the same as the samples alone.
"""

import copy
import functools
import importlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import diffusers
import torch
from pipelines import PIPELINES, rows


@dataclass(frozen=True)
class ModularCase:
    """One modular pipeline.

    Attributes:
        blocks: "module.Class" in `diffusers.modular_pipelines`.
        components: makes them by name; shared between builds except for the scheduler.
        arguments: of a call for ``count`` samples besides latents and steps.
        shape: of the latents of one sample.
        network: name of the component that predicts.
    """

    blocks: str
    components: Callable[[], dict]
    arguments: Callable[[int], dict]
    shape: tuple[int, ...] = (4, 8, 8)
    network: str = "transformer"

    def build(self, scheduler=None):
        """The pipeline with a scheduler of its own."""
        module, name = self.blocks.rsplit(".", 1)
        blocks = getattr(importlib.import_module(f"diffusers.modular_pipelines.{module}"), name)()
        pipe, made = blocks.init_pipeline(), _made(self.components)
        made = {name: value for name, value in made.items() if name in pipe.component_names}
        pipe.update_components(**{**made, "scheduler": scheduler or copy.deepcopy(made["scheduler"])})
        for block in blocks.sub_blocks.values():
            _silence(block)
        return pipe

    def noise(self, *seeds: int) -> torch.Tensor:
        """(seeds, …) initial latents."""
        return torch.cat([torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def call(self, pipe, seeds=(0, 1), steps: int = 4, **arguments) -> torch.Tensor:
        """Latents (seeds, …)."""
        given = {**self.arguments(len(seeds)), "latents": self.noise(*seeds), "num_inference_steps": steps, **arguments}
        return pipe(**given, output="latents")

    def networks(self, pipe) -> list[str]:
        """Names of the components that predict."""
        return [name for name in (self.network, f"{self.network}_2") if name in pipe.component_names]

    @contextmanager
    def counted(self, pipe):
        """Yield a list that grows by the batch size of every call of a network."""
        sizes = []

        def hook(module, args, kwargs):
            sizes.append(len(args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))))

        networks = [getattr(pipe, name) for name in self.networks(pipe)]
        handles = [network.register_forward_pre_hook(hook, with_kwargs=True) for network in networks]
        try:
            yield sizes
        finally:
            for handle in handles:
                handle.remove()


def _silence(block) -> None:
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for inner in getattr(block, "sub_blocks", {}).values():
        _silence(inner)


@functools.cache
def _made(components: Callable[[], dict]) -> dict:
    torch.manual_seed(0)
    made = components()
    for value in made.values():
        if isinstance(value, torch.nn.Module):
            value.eval()
    return made


def _parts_of(name: str) -> Callable[[], dict]:
    def components():
        return {key: value for key, value in vars(PIPELINES[name].build()).items() if not key.startswith("_")}

    return components


def _inputs_of(name: str, **changes) -> Callable[[int], dict]:
    def arguments(count: int) -> dict:
        return {key: value for key, value in PIPELINES[name].arguments(count).items() if key != "output_type"} | changes

    return arguments


def _wan_experts() -> dict:
    parts = _parts_of("wan")()
    first = parts["transformer"]
    return {**parts, "transformer_2": type(first).from_config(first.config)}


def _qwen() -> dict:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}


def _qwen_arguments(count: int) -> dict:
    return {
        "prompt_embeds": rows(count, 3, 16),
        "prompt_embeds_mask": torch.ones(count, 3, dtype=torch.long),
        "negative_prompt_embeds": torch.zeros(count, 3, 16),
        "negative_prompt_embeds_mask": torch.ones(count, 3, dtype=torch.long),
        "height": 64,
        "width": 64,
    }


def _zimage() -> dict:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 2, 2], axes_lens=[64, 16, 16],
    )  # fmt: skip
    for name, value in transformer.named_parameters():
        if "pad_token" in name:  # made without values
            torch.nn.init.zeros_(value)
    return {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)}


def _zimage_arguments(count: int) -> dict:
    return {
        "prompt_embeds": list(rows(count, 3, 16)),
        "negative_prompt_embeds": list(torch.zeros(count, 3, 16)),
        "height": 64,
        "width": 64,
    }


def _case(family: str, blocks: str, name: str | None = None, **fields) -> ModularCase:
    return ModularCase(f"{family}.modular_blocks_{name or family}.{blocks}", **fields)


MODULAR = {
    "sdxl": _case(
        "stable_diffusion_xl", "StableDiffusionXLCoreDenoiseStep", components=_parts_of("sdxl"),
        arguments=_inputs_of("sdxl"), network="unet",
    ),
    "sd3": _case(
        "stable_diffusion_3", "StableDiffusion3T2ICoreDenoiseStep", components=_parts_of("sd3"),
        arguments=_inputs_of("sd3", height=64, width=64),
    ),
    "wan": _case(
        "wan", "WanCoreDenoiseStep", components=_parts_of("wan"), arguments=_inputs_of("wan"), shape=(4, 2, 4, 4)
    ),
    "wan2.2": _case(
        "wan", "Wan22CoreDenoiseStep", "wan22", components=_wan_experts, arguments=_inputs_of("wan"), shape=(4, 2, 4, 4)
    ),
    "qwen": _case(
        "qwenimage", "QwenImageCoreDenoiseStep", components=_qwen, arguments=_qwen_arguments, shape=(16, 16)
    ),
    "z-image": _case("z_image", "ZImageCoreDenoiseStep", components=_zimage, arguments=_zimage_arguments),
}  # fmt: skip
