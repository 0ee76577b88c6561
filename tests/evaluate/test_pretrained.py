"""Folders of transformers models: identity, shards, damage, pickled weights, and what happens without weights."""

import io
import json
import pickle
import shutil

import pytest
import torch
from encoders import save_clip, save_dinov2
from safetensors.torch import load_file, save_file

from diffaccel.core.errors import DataError, MissingWeightsError
from diffaccel.evaluate.features import get_features, pretrained

NAMES = ["dinov2", "clip"]
IMAGES = torch.arange(2 * 3 * 30 * 30).reshape(2, 3, 30, 30).to(torch.uint8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of a model by the name of its extractor."""
    root = tmp_path_factory.mktemp("models")
    save_dinov2(root / "dinov2")
    save_clip(root / "clip")
    return {name: root / name for name in NAMES}


@pytest.fixture(params=NAMES)
def copy(request, models, tmp_path):
    """(name, a copy of its folder to damage)."""
    return request.param, shutil.copytree(models[request.param], tmp_path / "model")


def test_identity_is_that_of_the_tensors(models, copy):
    name, folder = copy
    before = get_features(name, weights=models[name]).identity()
    assert before == get_features(name, weights=folder).identity() and len(before["sha256"]) == 64
    assert before["dim"] == {"dinov2": 16, "clip": 8}[name]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, {"format": "pt", "comment": "other header"})
    assert get_features(name, weights=folder).identity() == before
    first = next(iter(tensors))
    tensors[first] = torch.nextafter(tensors[first], torch.tensor(torch.inf))
    save_file(tensors, file, {"format": "pt"})
    assert get_features(name, weights=folder).identity()["sha256"] != before["sha256"]


def test_shards_are_the_same_model(models, copy):
    name, folder = copy
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {tensor: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, tensor in enumerate(names)}
    for file in set(index.values()):
        save_file({n: tensors[n] for n in names if index[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    whole, parts = (get_features(name, weights=path) for path in (models[name], folder))
    assert whole.identity() == parts.identity()
    torch.testing.assert_close(whole(IMAGES), parts(IMAGES), rtol=0, atol=0)
    (folder / file).unlink()
    with pytest.raises(DataError, match=f"lacks {file}"):
        get_features(name, weights=folder)


class _Marker:
    """Pickled, it is a program that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_and_not_opened(copy, tmp_path, file):
    name, folder = copy
    (folder / "model.safetensors").unlink()
    stream = io.BytesIO()
    pickle.dump(_Marker(tmp_path / "marker"), stream)
    (folder / file).write_bytes(stream.getvalue())
    with pytest.raises(DataError, match=f"{file}.* run code .*save_pretrained"):
        get_features(name, weights=folder)
    assert not (tmp_path / "marker").exists()


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(sorted(tensors)[5])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _widen(folder):
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("vision_config", {})):
        part["hidden_size"] = 32
    (folder / "config.json").write_text(json.dumps(config))


FAULTS = {
    "truncated": (_truncate, "damaged"),
    "a page instead of tensors": (lambda f: (f / "model.safetensors").write_text("<html>"), "damaged"),
    "a tensor is missing": (_drop_tensor, "lacks 1 of the tensors"),
    "other shapes": (_widen, "Cannot open"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "not a model folder"),
    "configuration cut": (lambda f: (f / "config.json").write_text('{"model_type'), "config.json is damaged"),
    "configuration of no model": (lambda f: (f / "config.json").write_text("[]"), "type None"),
    "another architecture": (lambda f: (f / "config.json").write_text('{"model_type": "vit"}'), "type 'vit'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_folders_are_refused(copy, fault):
    name, folder = copy
    damage, sentence = FAULTS[fault]
    damage(folder)
    with pytest.raises(DataError, match=sentence):
        get_features(name, weights=folder)


def test_models_of_other_channels_or_kinds_are_refused(models, tmp_path):
    save_dinov2(tmp_path, num_channels=1)
    with pytest.raises(DataError, match="1-channel"):
        get_features("dinov2", weights=tmp_path)
    with pytest.raises(DataError, match="type 'dinov2'; expected 'clip'"):
        get_features("clip", weights=models["dinov2"])
    with pytest.raises(DataError, match="single file"):
        get_features("clip", weights=models["clip"] / "config.json")


@pytest.mark.parametrize("weights", ["no folder", "./models/clip", "/nowhere/at/all", "clip", "a/b/c", "../x"])
def test_what_cannot_be_a_hub_name_is_a_missing_folder(weights):
    with pytest.raises(DataError, match="There is no folder"):
        get_features("clip", weights=weights)


@pytest.mark.parametrize("name", NAMES)
def test_missing_weights_name_the_remedies_and_ask_nobody(name, monkeypatch):
    monkeypatch.setattr(pretrained, "_download", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    default = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14-336"}[name]
    with pytest.raises(MissingWeightsError, match=f"hf download {default} config.json") as caught:
        get_features(name)
    assert caught.value.exit_code == 4 and "FOLDER" in str(caught.value) and "--download" in str(caught.value)
    with pytest.raises(MissingWeightsError, match="hf download some/model"):
        get_features(name, weights="some/model")


def test_downloads_are_tried_only_on_demand_and_failures_are_sentences(monkeypatch, models):
    with pytest.raises(MissingWeightsError, match="Cannot fetch some/model"):  # HF_HUB_OFFLINE is set in tests
        get_features("dinov2", weights="some/model", download=True)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(models["clip"]),
    )
    assert get_features("clip", weights="some/model", download=True).num_features == 8
    ((name, patterns),) = asked
    assert name == "some/model" and {"config.json", "model.safetensors", "tokenizer.json"} <= set(patterns)
    assert not any(pattern.endswith((".bin", "*")) for pattern in patterns)


def test_a_repository_without_safetensors_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path))
    with pytest.raises(MissingWeightsError, match=r"does not publish .*save_pretrained"):
        get_features("clip", download=True)


def test_models_in_the_hubs_cache_are_used_without_asking(models, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    shutil.copytree(models["dinov2"], snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "_download", lambda *_: pytest.fail("the hub was asked"))
    assert get_features("dinov2", weights="some/model", download=True).num_features == 16
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(MissingWeightsError, match="hf download"):
        get_features("dinov2", weights="some/model")


def test_refusal_is_quick_and_imports_no_transformers(python):
    program = """
import sys, time
from diffaccel.evaluate.features import get_features
from diffaccel.core.errors import MissingWeightsError
start = time.perf_counter()
try:
    get_features("dinov2")
except MissingWeightsError:
    print(time.perf_counter() - start < 2, "transformers" in sys.modules)
"""
    assert python("-c", program).out.split() == ["True", "False"]
