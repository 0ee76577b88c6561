"""The image reader: the same images and records whoever reads them and in which portions."""

import io
import os
import zipfile
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.core.containers import FolderFiles, ZipFiles, find_images
from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.imagefiles import ImageReader, check_records, read_images, summarise


def _png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _noise(seed, height=6, width=5, channels=3):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images, of which 3 cannot be used and 2 have the content of others."""
    root = tmp_path_factory.mktemp("images")
    for index in range(40):
        path = root / f"{index % 3}" / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_png(_noise(index % 38)))
    (root / "0" / "06.png").write_bytes(b"")
    (root / "1" / "31.png").write_bytes(b"text")
    (root / "2" / "11.png").write_bytes(_png(_noise(0, 3, 3)))
    return root


def _everything(container, batch_size, world=1, **options):
    """Index, images and records of all shards, joined as several processes would."""
    parts, records = [], {}
    for rank in range(world):
        reader = ImageReader(container, skip_bad=True, shard=(rank, world), **options)
        batches = list(reader.batches(batch_size))
        assert {position: record for batch in batches for position, record in batch.records.items()}.items() <= (
            reader.records.items()
        )
        parts += [(int(i), image) for batch in batches for i, image in zip(batch.index, batch.images, strict=True)]
        assert not set(records) & set(reader.records)
        records |= reader.records
    order = [position for position, _ in parts]
    assert world > 1 or order == sorted(order)
    parts.sort(key=lambda part: part[0])
    return [position for position, _ in parts], [image for _, image in parts], dict(sorted(records.items()))


@pytest.mark.parametrize(
    ("batch_size", "workers", "world"),
    [(1, 0, 1), (1, 2, 1), (17, 0, 1), (17, 1, 1), (17, 3, 1), (40, 2, 1), (1, 0, 3), (7, 2, 2), (17, 0, 5)],
)
@pytest.mark.parametrize("options", [{}, {"mixed": True, "channels": 1}, {"resize": (4, 7)}], ids=str)
def test_portions_workers_and_shards_change_nothing(folder, batch_size, workers, world, options):
    index, images, records = _everything(FolderFiles(folder), 40, **options)
    again = _everything(FolderFiles(folder), batch_size, world, workers=workers, **options)
    assert again[0] == index and len(images) == len(again[1]) == (37 if not options else 38)
    assert all(map(torch.equal, again[1], images)) and again[2] == records and len(records) == 40
    assert summarise(again[2]) == summarise(records)


def test_shards_are_whole_blocks(folder):
    reader = ImageReader(FolderFiles(folder), skip_bad=True, shard=(1, 3))
    starts = [int(batch.index[0]) // 5 for batch in reader.batches(5)]
    assert starts == [1, 4, 7] and sorted(reader.records) == [*range(5, 10), *range(20, 25), *range(35, 40)]


def test_zip_equals_folder(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(folder))
    index, images, records = _everything(FolderFiles(folder), 16)
    again = _everything(ZipFiles(tmp_path / "x.zip"), 16, workers=2)
    assert again[0] == index and all(map(torch.equal, again[1], images)) and again[2] == records


def test_pixels_are_those_of_the_files(folder):
    files = FolderFiles(folder)
    index, images, _ = _everything(files, 16)
    for position, image in zip(index, images, strict=True):
        stored = np.asarray(Image.open(io.BytesIO(files.read(files.names[position]))))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), stored)


def test_summary_and_the_definition_of_the_digest(folder):
    files = FolderFiles(folder)
    summary = summarise(_everything(files, 16)[2])
    digest, contents = sha256(), []
    for name in files.names:
        if name not in ("0/06.png", "1/31.png", "2/11.png"):
            data = (folder / name).read_bytes()
            digest.update(os.fsencode(name) + b"\0" + sha256(data).digest())
            contents.append(data)
    assert summary == {
        "count": 37,
        "digest": digest.hexdigest(),
        "first": "0/00.png",
        "last": "2/38.png",
        "formats": {"PNG": 37},
        "modes": {"RGB": 37},
        "sizes": {"6x5": 37},
        "rotated": 0,
        "duplicates": 37 - len(set(contents)),
        "skipped": [
            {"name": "0/06.png", "reason": "the file is empty"},
            {"name": "1/31.png", "reason": "not an image file, whatever its name says"},
            {"name": "2/11.png", "reason": "is 3×3×3 (channels×height×width) but 0/00.png is 3×6×5"},
        ],
    }
    assert summary["duplicates"] == 2 and summarise({})["count"] == 0 and summarise({})["first"] is None


def test_many_sizes_are_summed_up_by_pixels():
    records = {
        i: {"name": "x", "sha256": "00", "format": "PNG", "mode": "L", "size": [20 - i, 7], "rotated": i < 2}
        for i in range(13)
    }
    assert summarise(records)["sizes"] == {"number": 13, "min": "8x7", "max": "20x7"}
    assert summarise(records)["rotated"] == 2
    assert summarise({i: records[i] for i in range(12)})["sizes"]["9x7"] == 1


@pytest.fixture
def mixed(tmp_path):
    for index, (height, width, channels) in enumerate([(4, 4, 3), (4, 4, 3), (5, 3, 3), (4, 4, 1)]):
        (tmp_path / f"{index}.png").write_bytes(_png(_noise(index, height, width, channels)))
    return FolderFiles(tmp_path)


def test_mixed_sizes_are_lists_only_where_they_occur(mixed):
    first, second = ImageReader(mixed, 3, mixed=True, workers=1).batches(2)
    assert first.images.shape == (2, 3, 4, 4)
    assert [tuple(image.shape) for image in second.images] == [(3, 5, 3), (3, 4, 4)]
    with pytest.raises(DataError, match=r"3\.png: is 1×4×4 .* but 0\.png is 3×any×any"):
        list(ImageReader(mixed, mixed=True).batches(2))


def test_other_sizes_are_refused_with_the_way_out(mixed):
    with pytest.raises(DataError, match=r"2\.png: is 3×5×3 .* but 0\.png is 3×4×4.*--skip-bad.*--resize"):
        list(ImageReader(mixed, 3).batches(4))
    with pytest.raises(DataError, match=r"^3 image .*0\.png: is 3×4×4 .*, expected 3×5×3;.*--resize"):
        list(ImageReader(mixed, 3, size=(5, 3)).batches(4))
    (batch,) = ImageReader(mixed, 3, size=(5, 3), skip_bad=True).batches(9)
    assert batch.index.tolist() == [2] and batch.index.dtype == torch.int64
    (batch,) = ImageReader(mixed, 1, resize=8).batches(9)
    assert batch.images.shape == (4, 1, 8, 8) and batch.records[2]["size"] == [5, 3]


def test_first_shape_is_that_of_the_first_usable_image(mixed, folder):
    assert ImageReader(mixed, mixed=True).first_shape() == (3, 4, 4)
    assert ImageReader(mixed, 1, resize=(2, 3)).first_shape() == (1, 2, 3)
    (folder / "0" / "!.png").write_bytes(b"")
    try:
        assert ImageReader(FolderFiles(folder)).first_shape() == (3, 6, 5)
    finally:
        (folder / "0" / "!.png").unlink()


def test_shards_agree_on_the_size_of_the_set(tmp_path):
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(_png(_noise(index, 4 + index // 2, 4)))
    reader = ImageReader(FolderFiles(tmp_path), 3, shard=(1, 2))
    assert list(reader.batches(2)) == []  # no exception: the other process has to hear of it first
    with pytest.raises(DataError, match=r"^2 image .*2\.png: is 3×5×4 .* but 0\.png is 3×4×4"):
        check_records(reader.records, False, 4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 7, 50])
@pytest.mark.parametrize("good", [0, 2])
def test_strict_reading_stops_at_the_tenth(tmp_path, workers, batch_size, good):
    for index in range(15):
        (tmp_path / f"{index:02d}.png").write_bytes(_png(_noise(0)) if index < good else b"x")
    reader = ImageReader(FolderFiles(tmp_path), workers=workers)
    with pytest.raises(DataError, match=r"^10 image file\(s\).*\(reading stopped there\)") as error:
        list(reader.batches(batch_size))
    assert str(error.value).count("not an image") == 10 and len(reader.records) == 10 + good
    if not good:
        with pytest.raises(DataError, match="None of the 15"):
            list(ImageReader(FolderFiles(tmp_path), skip_bad=True, workers=workers).batches(batch_size))
        with pytest.raises(DataError, match="None of the 15"):
            ImageReader(FolderFiles(tmp_path), skip_bad=True).first_shape()


def test_a_second_pass_counts_anew_in_the_same_records(folder):
    reader = ImageReader(FolderFiles(folder), skip_bad=True)
    records = reader.records
    first = next(reader.batches(3))
    assert list(records) == [0, 1, 2] and torch.equal(first.images, next(reader.batches(3)).images)
    assert sum(len(batch.index) for batch in reader.batches(16)) == 37 and len(records) == 40


def test_read_images_takes_paths_in_any_order(folder):
    paths = [path for path in find_images(folder) if path.name not in ("06.png", "31.png", "11.png")]
    images = read_images(reversed(paths))
    assert images.shape == (37, 3, 6, 5) and torch.equal(images.flip(0), read_images(paths))
    assert len(read_images([paths[0], paths[0]], 1)) == 2
    with pytest.raises(DataError, match=r"1 image file.*06\.png: the file is empty"):
        read_images([*paths[:3], folder / "0" / "06.png"])
    with pytest.raises(DataError, match="no image files"):
        read_images([])


def test_arguments_are_checked_before_anything_is_read(mixed):
    for options in ({"channels": 2}, {"workers": -1}, {"shard": (2, 2)}, {"resize": 0}, {"resize": (3, 10**9)}):
        with pytest.raises(UsageError):
            ImageReader(mixed, **options)
    with pytest.raises(UsageError, match="batch size"):
        ImageReader(mixed).batches(0)
