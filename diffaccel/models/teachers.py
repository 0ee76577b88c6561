"""Teachers by name: the embedded ones, well-known hub repositories, and local folders."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import DataError, MissingWeightsError, UsageError, unknown
from .layouts import LAYOUTS
from .quiet import quiet_diffusers, quiet_transformers
from .shipped import ASSETS, check_shipped


@dataclass(frozen=True)
class TeacherInfo:
    """Attributes:
    name: as typed on the command line.
    summary: one line.
    repository: hub repository, or "" for a model inside the package.
    size: download size (half precision where the repository has it), "" for a model inside the package.
    licence: of the weights.
    data: name of the real images that belong to it, or "".
    method: recommended distillation method.
    distils: whether this version can distil it.
    """

    name: str
    summary: str
    repository: str
    size: str
    licence: str
    data: str = ""
    method: str = "dmd"
    distils: bool = True


_NOT_DISTILLED = (
    "Note that this version cannot distil it; what it has for this one are samplers, guidance, search and evaluation."
)
TEACHERS = {
    info.name: info
    for info in (
        TeacherInfo("digits", "8×8 digits, ten classes, pixel U-Net of 0.18 M parameters", "", "", "Apache-2.0", "digits"),
        TeacherInfo("digits-flow", "8×8 digits, ten classes, rectified-flow transformer of 1.2 M parameters", "", "", "Apache-2.0", "digits"),
        TeacherInfo("mnist", "28×28 digits, ten classes, pixel U-Net of 0.69 M parameters", "", "", "Apache-2.0", "mnist"),
        TeacherInfo("tiny-sd", "text to 64×64 emoji, latent U-Net of 9.3 M parameters, Stable Diffusion's layout", "", "", "Apache-2.0", "emoji"),
        TeacherInfo("sd15", "Stable Diffusion 1.5, text to 512×512", "stable-diffusion-v1-5/stable-diffusion-v1-5", "2.7 GB", "CreativeML OpenRAIL-M"),
        TeacherInfo("sd21", "Stable Diffusion 2.1, text to 768×768", "stabilityai/stable-diffusion-2-1", "2.6 GB", "CreativeML OpenRAIL++-M"),
        TeacherInfo("sdxl", "Stable Diffusion XL, text to 1024×1024", "stabilityai/stable-diffusion-xl-base-1.0", "6.9 GB", "CreativeML OpenRAIL++-M"),
        TeacherInfo("sd3", "Stable Diffusion 3 medium, flow transformer", "stabilityai/stable-diffusion-3-medium-diffusers", "16 GB", "Stability AI Community (gated)"),
        TeacherInfo("flux", "FLUX.1 dev, flow transformer", "black-forest-labs/FLUX.1-dev", "34 GB", "FLUX.1 dev non-commercial (gated)", distils=False),
        TeacherInfo("pixart", "PixArt-α, text to 1024×1024", "PixArt-alpha/PixArt-XL-2-1024-MS", "22 GB", "CreativeML OpenRAIL++-M"),
        TeacherInfo("dit", "DiT-XL/2, ImageNet classes to 256×256", "facebook/DiT-XL-2-256", "3.0 GB", "CC BY-NC 4.0"),
        TeacherInfo("ddpm-cifar10", "DDPM, unconditional 32×32 pixels", "google/ddpm-cifar10-32", "0.14 GB", "Apache-2.0"),
    )
}  # fmt: skip


def resolve_teacher(name_or_path: str) -> tuple[Path, TeacherInfo | None]:
    """Find the folder of a teacher, without importing diffusers.

    Args:
        name_or_path: a name of `TEACHERS`, or a folder in diffusers layout.

    Returns:
        The folder, and the record if it was a name.

    Raises:
        UsageError: neither a known name nor a folder.
        DataError: a folder without model_index.json, or a damaged embedded file.
        MissingWeightsError: a hub model that is not on this machine.
    """
    info = TEACHERS.get(name_or_path)
    if info is None:
        path = Path(name_or_path)
        if path.is_dir():
            if not (path / "model_index.json").is_file():
                raise DataError(f"{path} is not a diffusers pipeline folder (no model_index.json).")
            return path, None
        if "/" in name_or_path or name_or_path.startswith("."):
            raise DataError(f"There is no model folder {name_or_path!r}.")
        raise unknown("teacher", name_or_path, TEACHERS)
    if not info.repository:
        check_shipped(info.name, "teacher/")
        return ASSETS / info.name / "teacher", info
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(info.repository, "model_index.json")
    if not isinstance(cached, str):
        raise MissingWeightsError(
            f"The weights of {info.name!r} ({info.summary}) are not on this machine and are not downloaded silently. "
            f"They are the hub repository {info.repository}, about {info.size}, licence: {info.licence}. "
            f"Fetch them with `hf download {info.repository}`, or, if you have a copy in diffusers layout, "
            f"type its folder, /path/to/folder, in place of {info.name!r}."
            + ("" if info.distils else f" {_NOT_DISTILLED}")
        )
    return Path(cached).parent, info


def load_pipeline(name_or_path: str):
    """Open a model as a diffusers pipeline.

    Pixel models (UNet2DModel), also those saved as DDPMPipeline and the like, open as ClassConditionalPipeline, so that
    all of them are called the same way.

    Raises:
        UsageError, DataError, MissingWeightsError: as `resolve_teacher`; DataError for damaged weights, and UsageError
            for a class-conditional pixel model of another pipeline, whose last class is not a null class.
    """
    folder, _ = resolve_teacher(str(name_or_path))
    index = read_index(folder)
    import diffusers
    import torch
    from safetensors import SafetensorError

    from .pipeline import ClassConditionalPipeline

    parts = {name: part for name, part in index.items() if isinstance(part, list) and part and part[0] is not None}
    textual = any(part[0] == "transformers" for part in parts.values())
    missing = [name for name in parts if not any((folder / name).glob("*"))]
    if missing:
        raise DataError(f"{folder} is not complete: {missing[0]}/ is missing or empty.")
    try:
        with quiet_diffusers(), quiet_transformers() if textual else nullcontext():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            # transformers opens text encoders in the precision they are stored in, diffusers all else in single precision.
            pipeline = pipeline.to(torch.float32) if textual else pipeline
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, OverflowError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"Cannot open {folder}: {reason}") from error
    if _is_pixel_model(index) and not isinstance(pipeline, ClassConditionalPipeline):
        if pipeline.unet.config.num_class_embeds:
            raise UsageError(
                f"{name_or_path} has classes but no null class. Save it as a diffaccel.ClassConditionalPipeline whose "
                "UNet has one more class embedding, trained with dropped labels."
            )
        pipeline = ClassConditionalPipeline(pipeline.unet, pipeline.scheduler, num_inference_steps=50)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_denoiser(name_or_path: str):
    """Open the network of a model as a `Denoiser`.

    Raises:
        UsageError: a kind of pipeline that has no Denoiser adapter; the supported ones are named.
        DataError, MissingWeightsError: as `load_pipeline`.
    """
    check_adapter(name_or_path)
    return denoiser_of(load_pipeline(name_or_path))


def check_adapter(name_or_path: str) -> None:
    """Refuse models without a Denoiser adapter, before anything large is imported or read.

    Raises:
        UsageError, DataError, MissingWeightsError: as `load_denoiser`.
    """
    index = read_index(resolve_teacher(name_or_path)[0])
    if not _is_pixel_model(index) and index.get("_class_name") not in LAYOUTS:
        raise UsageError(
            f"{name_or_path} is a {index.get('_class_name')}; distillation works with pixel models (UNet2DModel or "
            "DiTTransformer2DModel: digits, digits-flow, mnist, DDPM-type folders) and with folders of "
            f"{', '.join(name for name, layout in LAYOUTS.items() if layout.latent)}."
        )


def denoiser_of(pipeline):
    """The Denoiser of an opened pipeline; it shares the pipeline's network. See `opened.open_teacher` for the rest of it.

    Raises:
        UsageError: as `opened.open_teacher`.
    """
    from .opened import open_teacher

    return open_teacher(pipeline).denoiser


def _is_pixel_model(index: dict) -> bool:
    """Whether a pipeline consists of a network of pixels and a scheduler, and nothing else (a VAE makes it latent)."""
    parts = {name: part[1] for name, part in index.items() if isinstance(part, list) and part[0] is not None}
    network = parts.get("unet", parts.get("transformer"))
    plain = (network or "").removeprefix("Pruned")
    return len(parts) == 2 and "scheduler" in parts and plain in ("UNet2DModel", "DiTTransformer2DModel")


def read_index(folder: Path) -> dict:
    """model_index.json of a folder.

    Raises:
        DataError: not readable as JSON, or not an index of components.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'model_index.json'} is damaged: {error}.") from None
    unet = index.get("unet", [None, None]) if isinstance(index, dict) else None
    if not isinstance(unet, list) or len(unet) != 2:
        raise DataError(f"{folder / 'model_index.json'} is damaged: it does not name the parts of a pipeline.")
    return index
