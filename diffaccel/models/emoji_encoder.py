"""Picture and text encoder of the emoji: what tiny-sd reads prompts with, and what its pictures are judged by."""

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ..core.errors import UsageError
from .quiet import quiet_transformers
from .shipped import ASSETS, check_shipped

WEIGHTS = "encoder.safetensors"
_SHIPPED = "tiny-sd"
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_PRIVATE_USE = 0xE000  # of Unicode
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
        own = {f"text.{name}": tensor for name, tensor in encoder.text.state_dict().items()}
        encoder.load_state_dict(weights | own)
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
        vocabulary: number of tokens, at most: 512 bytes (within and at the end of words), merges, and two marks.
        longest: tokens of a text, marks included; longer ones are cut.

    Raises:
        UsageError: a vocabulary without room for the bytes and marks, or texts without room for a token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary < 2 * len(letters) + 2 or longest < 3:
        raise UsageError(
            f"A vocabulary has at least {2 * len(letters) + 2} tokens and a text at least 3; got {vocabulary} and {longest}."
        )
    # Letters that end a word are symbols of their own here: tokenizers numbers "</w>" pieces at random, and ties with them.
    ends = {letter: chr(_PRIVATE_USE + index) for index, letter in enumerate(letters)}
    spelled = {end: f"{letter}</w>" for letter, end in ends.items()}
    split = CLIPTokenizer(vocab={_BEGIN: 0, _END: 1}, merges=[]).backend_tokenizer.pre_tokenizer
    words = [word for text in sorted(captions) for word, _ in split.pre_tokenize_str(text.lower())]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 2, initial_alphabet=[*letters, *spelled], show_progress=False)
    learner.train_from_iterator([word[:-1] + ends[word[-1]] for word in words], trainer)
    pairs = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple("".join(spelled.get(sign, sign) for sign in piece) for piece in pair) for pair in pairs]
    tokens = [*letters, *spelled.values(), *("".join(pair) for pair in merges), _BEGIN, _END]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=longest)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a tokenizer so that every version of transformers reads it: its own files, vocab.json and merges.txt."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
