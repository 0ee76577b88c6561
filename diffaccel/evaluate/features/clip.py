"""Features of CLIP: image embeddings for the CMMD, and text embeddings beside them for the CLIP score."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ...core.errors import DataError, MissingWeightsError, UsageError
from ...models.quiet import quiet_transformers
from .base import DTYPES
from .pretrained import Architecture, PretrainedFeatures
from .resize import resize

_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
_OPTION = "--clip-weights FOLDER, or --weights FOLDER beside --features clip"
CLIP = Architecture("CLIPModel", "clip", "openai/clip-vit-large-patch14-336", _OPTION, _TOKENIZER)
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SLICE = 64  # images or texts at once
_LEGACY_END = 2  # in configurations of OpenAI's models: the end token is the one with the highest number


class ClipFeatures(PretrainedFeatures):
    """Projected image embeddings of CLIP, not normalised, 768 numbers for the default ViT-L/14@336 (Radford et al. 2021).

    The central square is resized and rounded to bytes, as the code of CMMD does (Jayasumana et al. 2024). transformers
    resizes before it crops, which is the same for square images.

    Args:
        weights: a folder with config.json and model.safetensors (and, for texts, the tokenizer), or a hub repository;
            None for openai/clip-vit-large-patch14-336.
        download: allow weights that are not on this machine to be fetched from the hub.
        crop: cut the central square out; False squeezes whole images into a square.

    Raises:
        MissingWeightsError: the weights are not on this machine.
        DataError: a damaged folder, pickled weights only, another architecture.
    """

    name = "clip"
    architecture, mean, deviation = CLIP, _MEAN, _DEVIATION

    def __init__(self, weights=None, download: bool = False, crop: bool = True):
        super().__init__()
        self._folder = self._open(weights, download)
        vision = self.model.config.vision_config
        if vision.num_channels != self.channels or not isinstance(vision.image_size, int):
            raise DataError(f"{self._folder} does not read square RGB images; expected a model like {CLIP.default}.")
        self.num_features = self.model.config.projection_dim
        self.input_size, self._crop, self._tokenizer = vision.image_size, crop, None
        self.preprocessing = (
            f"uint8 RGB, {'central square, ' if crop else ''}bicubic-antialias to {self.input_size}×{self.input_size}, "
            "rounded to 0–255, /255, CLIP's mean and deviation"
        )

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        # Not get_image_features: its return type changed between versions of transformers.
        parts = [self.model.vision_model(self._input(part)).pooler_output for part in images.split(_SLICE)]
        return self.model.visual_projection(torch.cat(parts))

    def _input(self, images: torch.Tensor) -> torch.Tensor:
        if self._crop:
            height, width = images.shape[2:]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            images = images[:, :, top : top + side, left : left + side]
        with torch.autocast(images.device.type, enabled=False):  # pixels keep their 8 bits under bfloat16
            pixels = resize(images, self.input_size, "bicubic-antialias").round().clamp(0, 255)
            return self._normalised(pixels)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        """Projected text embeddings, to be compared with the features of images.

        Args:
            texts: N captions. What exceeds the model's length (77 tokens with both ends) is cut off before the end
                token, as OpenAI's code does.

        Returns:
            float32 (N, d) on the CPU, not normalised; and how many texts were cut.

        Raises:
            UsageError: not a sequence of strings.
            MissingWeightsError: the model's folder has no tokenizer.
            DataError: a damaged tokenizer, or that of another model.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UsageError("CLIP needs a list of texts, one string per caption.")
        if not texts:
            return torch.zeros(0, self.num_features), 0
        tokens = self._tokens(list(texts))
        limit = self.model.config.text_config.max_position_embeddings
        cut = [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in tokens]
        parts = [self._embed(cut[start : start + _SLICE]) for start in range(0, len(cut), _SLICE)]
        return torch.cat(parts), sum(len(ids) > limit for ids in tokens)

    def _embed(self, tokens: list[list[int]]) -> torch.Tensor:
        length = max(map(len, tokens))  # attention is causal, so what stands behind the end token has no effect
        padded = torch.tensor([ids + ids[-1:] * (length - len(ids)) for ids in tokens], device=self.device)
        with torch.autocast(self.device.type, DTYPES[self._dtype], enabled=self._dtype != "float32"):
            return self.model.text_projection(self.model.text_model(padded).pooler_output).float().cpu()

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        self._tokenizer = self._tokenizer or _load_tokenizer(self._folder)
        with quiet_transformers():
            tokens = self._tokenizer(texts)["input_ids"]
        config = self.model.config.text_config
        for ids in tokens:
            end = max(ids) if config.eos_token_id == _LEGACY_END else config.eos_token_id
            if ids[-1] != end or max(ids) >= config.vocab_size:  # the model reads its result at the end token
                raise DataError(
                    f"The tokenizer in {self._folder} does not belong to the model there: it ends texts with token "
                    f"{ids[-1]}, expected {end}; take both from one repository."
                )
        return tokens


def _load_tokenizer(folder: Path):
    whole, *parts = _TOKENIZER
    if not (folder / whole).is_file() and not all((folder / part).is_file() for part in parts):
        raise MissingWeightsError(
            f"{folder} has no tokenizer, which texts need: copy {whole}, or {' and '.join(parts)}, of the same model "
            f"into it (`hf download {CLIP.default} {' '.join(_TOKENIZER)} --local-dir {folder}` for the default model)."
        )
    from transformers import CLIPTokenizerFast

    with quiet_transformers():
        try:
            return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises plain exceptions
            raise DataError(f"The tokenizer in {folder} is damaged: {str(error).strip().rstrip('.')}.") from error
