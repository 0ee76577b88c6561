"""Picture and text encoder of the emoji: what tiny-sd reads prompts with, and what its pictures are judged by."""

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from .quiet import quiet_transformers
from .shipped import ASSETS, check_shipped

WEIGHTS = "encoder.safetensors"
_SHIPPED = "tiny-sd"
_HIDDEN, _LAYERS, _HEADS, _JOINT = 128, 3, 4, 64


class PictureEncoder(nn.Module):
    """Four halving convolutions and a 128-wide ReLU layer: (N, 3, 64, 64) in [−1, 1] → (N, 128).

    Attributes:
        feature_scale: buffer; brings the features of the training pictures to a covariance trace of 100.
    """

    num_features = 128

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, self.num_features), nn.ReLU())
        self.projection = nn.Linear(self.num_features, _JOINT, bias=False)
        self.register_buffer("feature_scale", torch.ones(()))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Scaled activations before the projection, (N, 128)."""
        return self.trunk(x) * self.feature_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Unit vectors of the joint space, (N, 64)."""
        return F.normalize(self.projection(self.trunk(x)), dim=1)


class EmojiEncoder(nn.Module):
    """Pictures and texts in one space of unit vectors, trained to agree (CLIP; Radford et al. 2021).

    Args:
        tokenizer: CLIPTokenizer of the captions.
    """

    def __init__(self, tokenizer):
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        self.tokenizer = tokenizer
        self.picture = PictureEncoder()
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_HIDDEN,
            intermediate_size=4 * _HIDDEN,
            num_hidden_layers=_LAYERS,
            num_attention_heads=_HEADS,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=_JOINT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text = CLIPTextModel(config)
        self.projection = nn.Linear(_HIDDEN, _JOINT, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # 1 / 0.07, as CLIP begins

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors of the joint space, (N, 64)."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        pooled = self.text(tokens.input_ids.to(self.log_scale.device)).pooler_output
        return F.normalize(self.projection(pooled), dim=1)

    def save(self, folder: Path) -> None:
        """Write text_encoder/ and tokenizer/ as Stable Diffusion has them, and the rest as one file."""
        with quiet_transformers():
            self.text.save_pretrained(folder / "text_encoder")
        save_tokenizer(self.tokenizer, folder / "tokenizer")
        rest = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("text.")}
        save_file(rest, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, rest: Path | None = None) -> "EmojiEncoder":
        """Inverse of `save`, in evaluation mode and frozen.

        Args:
            folder: of text_encoder/ and tokenizer/.
            rest: the file of the rest; default: in the same folder.
        """
        from transformers import CLIPTextModel, CLIPTokenizer

        with quiet_transformers():
            encoder = cls(CLIPTokenizer.from_pretrained(folder / "tokenizer"))
            encoder.text = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)
        weights = {name: tensor.float() for name, tensor in load_file(rest or folder / WEIGHTS).items()}
        missing, unexpected = encoder.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.startswith("text.") for name in missing)
        return encoder.eval().requires_grad_(False)


def picture_weights() -> Path:
    """The shipped file of the picture encoder and the projections."""
    return ASSETS / _SHIPPED / WEIGHTS


def load_picture_encoder() -> PictureEncoder:
    """The shipped picture encoder in evaluation mode, frozen; its hash is checked.

    Raises:
        DataError: the file is missing or damaged.
    """
    check_shipped(_SHIPPED, WEIGHTS)
    encoder, prefix = PictureEncoder(), "picture."
    weights = load_file(picture_weights()).items()
    encoder.load_state_dict(
        {key.removeprefix(prefix): value.float() for key, value in weights if key.startswith(prefix)}
    )
    return encoder.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def load_emoji_encoder() -> EmojiEncoder:
    """The shipped encoder of pictures and texts; the text half is the text encoder of tiny-sd.

    Raises:
        DataError: a file is missing or damaged.
    """
    for part in (WEIGHTS, "teacher/text_encoder", "teacher/tokenizer"):
        check_shipped(_SHIPPED, part)
    return EmojiEncoder.load(ASSETS / _SHIPPED / "teacher", picture_weights())


def build_tokenizer(captions: list[str], vocabulary: int, longest: int):
    """A CLIPTokenizer whose byte-pair merges come from ``captions``.

    Args:
        captions: the training texts.
        vocabulary: number of tokens: 512 bytes (within and at the end of words), merges, and two marks.
        longest: tokens of a text, marks included; longer ones are cut.
    """
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    empty = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    budget = vocabulary - 2 * len(letters) - 2
    trainer = trainers.BpeTrainer(
        vocab_size=len(letters) + 256 + budget, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    learner.train_from_iterator(sorted(captions), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:budget]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=longest)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a tokenizer so that every version of transformers reads it: its own files, vocab.json and merges.txt."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
