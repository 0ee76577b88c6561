"""What a side may be, and the sentence when it is none of these."""

import json

import numpy as np
import pytest
import torch

from diffaccel.core.errors import DataError
from diffaccel.core.images import save_png
from diffaccel.evaluate.run import evaluate_fid
from diffaccel.evaluate.sources import Generation, Reading, StatisticsSource, resolve
from diffaccel.models.data import load_digits


def _write(folder, images):
    folder.mkdir()
    for index, image in enumerate(images):
        save_png(image, folder / f"{index:04d}.png")
    return folder


def _images(source, channels=1, batch_size=100):
    batches = list(source.batches(channels, batch_size))
    source.check(source.records)
    usable = [position for position, record in sorted(source.records.items()) if "reason" not in record]
    assert torch.cat([batch.index for batch in batches]).tolist() == usable
    return torch.cat([batch.images for batch in batches])


def test_folder_and_tensor_deliver_the_same_images(tmp_path):
    images = load_digits("heldout")[0][:25]
    folder = resolve(_write(tmp_path / "a", images))
    assert (folder.kind, folder.shape) == ("folder", (1, 8, 8))
    for batch_size in (1, 7, 100):
        assert torch.equal(_images(folder, 1, batch_size), images)
    details = folder.describe(folder.records)
    assert details["count"] == 25 and details["formats"] == {"PNG": 25}
    as_rgb = _images(resolve(images), 3, 10)
    assert torch.equal(_images(folder, 3, 10), as_rgb)


def test_grey_from_rgb_tensors_is_what_a_file_would_give(tmp_path):
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    files = resolve(_write(tmp_path / "a", images))
    assert torch.equal(_images(files), _images(resolve(images)))


@pytest.mark.parametrize(
    ("name", "split"), [("digits", "train"), ("digits:train", "train"), ("digits:heldout", "heldout")]
)
def test_dataset_names(name, split):
    source = resolve(name)
    assert source.kind == "dataset"
    assert torch.equal(_images(source), load_digits(split)[0])
    assert torch.equal(source.labels, load_digits(split)[1])
    assert source.describe(source.records)["fixed_mix_of_classes"] == 10


def test_digest_depends_on_pixels_only():
    images = load_digits("heldout")[0]
    digests = []
    for tensor, batch_size in ((images, 7), (images.clone(), 100), (images.flip(0), 100)):
        source = resolve(tensor)
        list(source.batches(3, batch_size))
        digests.append(source.describe(source.records)["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_statistics_files_are_recognised(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "ref.npz").rename(tmp_path / "ref.NPZ")
    assert isinstance(resolve(tmp_path / "ref.NPZ"), StatisticsSource)


def test_sample_batches_can_be_used_as_images(tmp_path):
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "samples.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    with pytest.raises(DataError, match="write images:"):
        resolve(tmp_path / "samples.npz")
    assert torch.equal(_images(resolve(f"images:{tmp_path / 'samples.npz'}"), 3), images)
    np.savez(tmp_path / "wrong.npz", arr_0=np.zeros((2, 8, 8, 3)))
    with pytest.raises(DataError, match="uint8"):
        resolve(f"images:{tmp_path / 'wrong.npz'}")


def _single_image(folder):
    _write(folder / "one", load_digits()[0][:1])
    return _images(resolve(folder / "one"))


def _mixed_sizes(folder):
    _write(folder / "mixed", load_digits()[0][:2])
    save_png(torch.zeros(1, 9, 9, dtype=torch.uint8), folder / "mixed" / "z.png")
    return _images(resolve(folder / "mixed"))


def _all_bad(folder):
    (folder / "bad").mkdir()
    (folder / "bad" / "a.png").write_bytes(b"text")
    return resolve(folder / "bad")


def _text_only(folder):
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("text")
    return resolve(folder / "text")


def _one_file(folder, name):
    (folder / name).write_bytes(b"x")
    return resolve(folder / name)


FAULTS = {
    "does not exist": lambda folder: resolve(folder / "nope"),
    "Did you mean digits": lambda _: resolve("digts"),
    "Did you mean .*samples": lambda folder: ((folder / "samples").mkdir(), resolve(folder / "sample")),
    "contains no image files": _text_only,
    "1 usable image": _single_image,
    "a.png: not an image": _all_bad,
    "z.png: is 1×9×9": _mixed_sizes,
    "single image": lambda folder: _one_file(folder, "a.png"),
    "neither a folder": lambda folder: _one_file(folder, "ref.pkl"),
    "no split 'test'": lambda _: resolve("digits:test"),
    "as many labels": lambda _: resolve((torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(3))),
    "must be uint8": lambda _: resolve(torch.zeros(4, 1, 8, 8)),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_faults_end_in_one_sentence(tmp_path, sentence):
    with pytest.raises(DataError, match=sentence) as error:
        FAULTS[sentence](tmp_path)
    assert "\n" not in str(error.value)


def test_skip_bad_lists_what_it_left_out(tmp_path):
    folder = _write(tmp_path / "a", load_digits()[0][:3])
    (folder / "0000.png").write_bytes(b"")
    source = resolve(folder, reading=Reading(skip_bad=True))
    assert len(_images(source)) == 2
    assert source.describe(source.records)["skipped"] == [{"name": "0000.png", "reason": "the file is empty"}]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """An untrained pixel model with three classes, saved as a pipeline."""
    from diffusers import DDIMScheduler, UNet2DModel

    from diffaccel.models.pipeline import ClassConditionalPipeline

    torch.manual_seed(0)
    size = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    net = UNet2DModel(num_class_embeds=4, **size, **blocks)
    folder = tmp_path_factory.mktemp("model")
    ClassConditionalPipeline(net, DDIMScheduler(), num_inference_steps=3).save_pretrained(folder)
    return folder


def test_a_model_side_generates_the_same_images_for_any_batch_size(model_folder):
    generated = []
    for batch_size in (3, 8):
        source = resolve(model_folder, Generation(num=8, steps=2, seed=5, batch_size=batch_size))
        assert (source.kind, source.shape) == ("model", (1, 8, 8))
        generated.append(_images(source).int())
        details = source.describe(source.records)
        assert details["count"] == 8 and details["seed"] == 5
    # The network itself may round differently in another batch size: at most one grey level.
    assert int((generated[0] - generated[1]).abs().max()) <= 1
    assert len(generated[0].flatten(1).unique(dim=0)) == 8


def test_shards_together_are_the_whole(model_folder):
    whole = _images(resolve(model_folder, Generation(num=10, steps=2, batch_size=3)))
    parts = {}
    for rank in range(3):
        source = resolve(model_folder, Generation(num=10, steps=2, batch_size=3))
        parts |= {int(b.index[0]): b.images for b in source.batches(1, 3, shard=(rank, 3))}
    assert torch.equal(torch.cat([parts[start] for start in sorted(parts)]), whole)


def test_a_model_prefix_means_the_teacher_even_where_a_dataset_has_the_name():
    assert resolve("digits").kind == "dataset"
    assert resolve("model:digits", Generation(num=2, steps=1)).kind == "model"


def test_labels_beside_the_images_balance_the_jackknife(tmp_path):
    images, labels = load_digits("heldout")
    turns = torch.stack([(labels == k).nonzero()[:30, 0] for k in range(10)], dim=1).flatten()
    images, labels = images[turns], labels[turns]
    names = [f"{index:04d}.png" for index in range(len(images))]
    for name, image in zip(names, images, strict=True):
        save_png(image, tmp_path / name)
    plain = evaluate_fid(tmp_path, "digits")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": list(zip(names, labels.tolist(), strict=True))}))
    labelled, in_memory = evaluate_fid(tmp_path, "digits"), evaluate_fid((images, labels), "digits")
    assert labelled.value == pytest.approx(plain.value, rel=1e-6)  # other groups, other rounding
    assert labelled.bias_corrected == pytest.approx(in_memory.bias_corrected, rel=1e-6)
    assert labelled.bias_corrected != pytest.approx(plain.bias_corrected, abs=1e-3)
    drawn = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
    drawn[0][1], drawn[1][1] = 5, 5  # no longer equally frequent: independent draws
    for content in (
        {"labels": drawn},
        {"labels": drawn[1:]},
        {"labels": [[n, [0.5]] for n in names]},
        {"labels": None},
    ):
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        unused = evaluate_fid(tmp_path, "digits")
        assert unused.bias_corrected == plain.bias_corrected
        told = any("dataset.json is not used" in warning for warning in unused.warnings)
        assert told == (content["labels"] is not None)  # null says that there are none, as for samples of prompts
    (tmp_path / "dataset.json").write_text("[1, 2")
    with pytest.raises(DataError, match=r"dataset\.json"):
        evaluate_fid(tmp_path, "digits")
