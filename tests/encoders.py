"""Tiny random DINOv2 and CLIP folders as transformers saves them, the latter with a tokenizer of single letters."""

import json

import torch

from diffaccel.models.quiet import quiet_transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
BLOCK = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LIMIT, END = 12, len(TOKENS) - 1


def _save(model, folder):
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    with quiet_transformers():
        model.eval().save_pretrained(folder)
    return model


def save_dinov2(folder, image_size=56, **settings):
    """Save a Dinov2Model (16 features, patches of 14) and return it."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    return _save(Dinov2Model(Dinov2Config(**BLOCK, image_size=image_size, patch_size=14, **settings)), folder)


def save_clip(folder, **text):
    """Save a CLIPModel (8 features, 28×28 images, texts of LIMIT tokens) with its tokenizer and return it."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    ends = {"bos_token_id": END - 1, "eos_token_id": END, "pad_token_id": END}
    sizes = {**BLOCK, "intermediate_size": 32}
    text = {**sizes, **ends, "vocab_size": len(TOKENS), "max_position_embeddings": LIMIT, **text}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    model = _save(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)), folder)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return model
