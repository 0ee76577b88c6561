"""Tokenizer and encoder of tiny-sd: words are tokens, files are those that Stable Diffusion's parts are read from."""

import json
import os
import subprocess
import sys

import pytest
import torch
from emoji import synthetic_pictures

from diffaccel.core.errors import UsageError
from diffaccel.models.emoji_encoder import EmojiEncoder, build_tokenizer, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for captions in synthetic_pictures().captions for text in captions]
    return build_tokenizer(texts, vocabulary=600, longest=16)


def test_words_of_the_captions_are_single_tokens_and_others_are_spelled(tokenizer):
    assert tokenizer.tokenize("Red square, DARK") == ["red</w>", "square</w>", ",</w>", "dark</w>"]
    assert "".join(tokenizer.tokenize("zebra")) == "zebra</w>" and len(tokenizer.tokenize("zebra")) > 1
    ids = tokenizer("red bar", padding="max_length", max_length=16).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[3] == tokenizer.eos_token_id and set(ids[4:]) == {ids[3]}
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "red bar"
    assert len(tokenizer) <= 600 and tokenizer.model_max_length == 16


def test_the_same_texts_give_the_same_tokenizer_in_every_process(tokenizer):
    script = """
import hashlib, sys
from emoji import synthetic_pictures
from diffaccel.models.emoji_encoder import build_tokenizer
texts = [text for captions in synthetic_pictures().captions for text in captions]
sys.stdout.write(build_tokenizer(texts, vocabulary=600, longest=16).backend_tokenizer.to_str())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    other = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(other.stdout)["model"] == json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UsageError, match="at least 514"):
        build_tokenizer(["red"], vocabulary=513, longest=16)
    with pytest.raises(UsageError, match="at least 3"):
        build_tokenizer(["red"], vocabulary=600, longest=2)


def test_saved_files_suit_old_and_new_readers(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    save_tokenizer(tokenizer, tmp_path)
    text = "a yellow frame, dark skin tone"
    assert CLIPTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    merges = (tmp_path / "merges.txt").read_text().splitlines()[1:]
    old = CLIPTokenizer(vocab=vocab, merges=[tuple(line.split()) for line in merges], model_max_length=16)
    assert old(text).input_ids == tokenizer(text).input_ids


def test_the_encoder_survives_the_way_through_its_files(tokenizer, tmp_path):
    torch.manual_seed(0)
    encoder = EmojiEncoder(tokenizer).eval()
    encoder.save(tmp_path)
    again = EmojiEncoder.load(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder.picture(x), again.picture(x))
        texts = encoder.embed_texts(["red bar", "blue frame, dark skin tone"])
        assert torch.allclose(texts, again.embed_texts(["red bar", "blue frame, dark skin tone"]), atol=1e-6)
        alone = encoder.embed_texts(["red bar"])  # padding of the batch does not matter
    assert torch.allclose(texts[:1], alone, atol=1e-5) and torch.allclose(texts.norm(dim=1), torch.ones(2), atol=1e-5)
