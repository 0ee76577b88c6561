"""Pruned models as classes of their own, so that diffusers opens what it saved of them.

`PrunedUNet2DModel` is a UNet2DModel with one more entry in its configuration, ``pruned_layers``: what was removed, as
readable JSON. It is applied at the end of the constructor, so weights are needed for what is left only. Such a class exists for
every model class of diffusers, and is made when it is asked for.
"""

import functools
import inspect
from pathlib import Path

import diffusers
from torch import nn

from ..core.errors import DataError, UsageError
from ..core.files import write_atomic
from ..models.networks import network_of
from .surgery import Layers, Maps, remove

PREFIX = "Pruned"
_README = """# {name}

A {base} from which {count} layers were removed; `pruned_layers` in config.json lists them. It opens with diffusers as any other
model, where the package `diffaccel` is installed:

    import diffaccel
    model = diffaccel.{name}.from_pretrained("this folder")

or as part of its pipeline, with `DiffusionPipeline.from_pretrained`. The class {base} itself cannot open it: it ends in an
error about a tensor of shape [0], which stands for layers that are gone.
"""


def prune(model, layers: Layers, maps: Maps | None = None):
    """Remove operators from a diffusers model, in place, and make it an instance of its pruned class.

    Args:
        model: a pipeline with one network, which takes note of the new class when it is saved, or a network alone, to be put
            into a pipeline later. Pruned ones can be pruned further. With no layers it computes the same, bit by bit.
        layers, maps: see `surgery.remove`.

    Returns:
        The model itself; ``config.pruned_layers`` of its network lists everything that was removed from it.

    Raises:
        UsageError: see `surgery.remove`; no one network, one of a class that is not diffusers' own, or one with adapters.
    """
    network = model if isinstance(model, nn.Module) else network_of(model)
    cls = pruned_class(type(network))
    if getattr(network, "_hf_peft_config_loaded", False):
        raise UsageError(  # its weights have other names then, under which nothing opens
            "This network has adapters: fuse LoRA (pipe.fuse_lora(); pipe.unload_lora_weights()) or unload it, then prune."
        )
    records = remove(network, layers, maps)
    network.__class__ = cls
    before = network.config.get("pruned_layers", ())
    kept = [old for old in before if not any(old["name"].startswith(new["name"] + ".") for new in records)]
    network.register_to_config(pruned_layers=kept + records)
    if model is not network:
        parts = {name: part for name, part in model.components.items() if getattr(part, "_orig_mod", part) is network}
        model.register_modules(**parts)
    return model


@functools.cache
def pruned_class(base: type) -> type:
    """The class of pruned models of a diffusers class, which is itself if it is one.

    Raises:
        UsageError: not a model class that diffusers has under this name.
    """
    if hasattr(base, "_unpruned"):
        return base
    if not issubclass(base, diffusers.ModelMixin) or getattr(diffusers, base.__name__, None) is not base:
        raise UsageError(
            f"Pruned are models of diffusers, such as pipe.unet or pipe.transformer; got a {base.__module__}.{base.__name__}."
        )

    def __init__(self, *args, pruned_layers=(), **kwargs):
        base.__init__(self, *args, **kwargs)
        try:
            records = remove(self, pruned_layers)
        except UsageError as error:
            raise DataError(f"pruned_layers of this {cls.__name__}: {error}") from None
        self.register_to_config(pruned_layers=records)

    @functools.wraps(base.save_pretrained)  # pipelines pass on what its signature names
    def save_pretrained(self, save_directory, *args, **kwargs):
        base.save_pretrained(self, save_directory, *args, **kwargs)
        readme = Path(save_directory) / "README.md"
        if kwargs.get("is_main_process", True) and not readme.exists():
            count = len(self.config.pruned_layers)
            write_atomic(readme, _README.format(name=cls.__name__, base=base.__name__, count=count))

    own = inspect.signature(base.__init__)
    added = inspect.Parameter("pruned_layers", inspect.Parameter.KEYWORD_ONLY, default=())
    __init__.__signature__ = own.replace(parameters=[*own.parameters.values(), added])  # what diffusers reads
    name = PREFIX + base.__name__
    cls = type(
        name,
        (base,),
        {
            "__doc__": f"A {base.__name__} without the layers that ``pruned_layers`` of its configuration lists.",
            "__init__": __init__,
            "__module__": "diffaccel",  # where diffusers looks it up again
            "__qualname__": name,
            "_unpruned": base,
            "save_pretrained": save_pretrained,
        },
    )
    return cls


def __getattr__(name: str) -> type:
    base = getattr(diffusers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not inspect.isclass(base) or not issubclass(base, diffusers.ModelMixin):
        raise AttributeError(f"There is no {name}: pruned models are called Pruned and a model class of diffusers.")
    return pruned_class(base)
