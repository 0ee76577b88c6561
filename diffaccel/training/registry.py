"""Methods that train models from scratch, by the names that recipes use."""

from ..core.errors import unknown
from ..core.lazy import load_object

METHODS = {
    "flow-matching": "diffaccel.training.flow_matching:FlowMatching",
    "denoising": "diffaccel.training.denoising:Denoising",
    "emoji-autoencoding": "diffaccel.training.autoencoding:EmojiAutoencoding",
    "emoji-contrast": "diffaccel.training.contrast:EmojiContrast",
    "emoji-text-to-image": "diffaccel.training.text_to_image:EmojiTextToImage",
    "classifier": "diffaccel.training.classification:DigitsClassification",
}


def load_method(name: str) -> type:
    """Import a method class.

    Raises:
        UsageError: unknown name.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return load_object(METHODS[name])
