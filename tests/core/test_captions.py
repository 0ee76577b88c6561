"""Captions of images: three kinds of files, files beside the images, and every fault."""

import json

import pytest

from diffaccel.core.captions import find_captions, load_captions
from diffaccel.core.errors import DataError, UsageError

NAMES = ["0.png", "10.png", "sub/a b.jpg"]
CAPTIONS = ["a cat", "a dog, “quoted”", "ein Vögelchen"]


def _lines(*objects):
    return "\n".join(json.dumps(entry) for entry in objects) + "\n"


def _entries(key="text", names=NAMES):
    return [{"file_name": name, key: caption} for name, caption in zip(names, CAPTIONS, strict=True)]


def _write(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.txt", "\n".join(CAPTIONS)),
        ("c.txt", "\n".join(CAPTIONS) + "\n"),
        ("c.TXT", "\r\n".join(f"  {caption} " for caption in CAPTIONS) + "\r\n"),
        ("c.txt", b"\xef\xbb\xbf" + "\n".join(CAPTIONS).encode()),
        ("c.json", json.dumps(dict(zip(NAMES, CAPTIONS, strict=True)))),
        ("c.json", json.dumps({"other.png": "x", **dict(zip(NAMES, CAPTIONS, strict=True))}, ensure_ascii=False)),
        ("c.jsonl", _lines(*_entries("text"))),
        ("c.jsonl", _lines(*_entries("prompt"), {"file_name": "other.png", "prompt": "x"})),
        ("c.jsonl", "\n" + _lines(*reversed(_entries("caption"))) + "\n"),
        ("c.jsonl", _lines(*_entries(names=[f"./{name}" for name in NAMES]), *_entries())),
    ],
)
def test_every_kind_of_file_gives_the_same_captions(tmp_path, name, content):
    assert load_captions(_write(tmp_path, name, content), NAMES) == CAPTIONS


def test_only_line_feeds_end_captions(tmp_path):
    captions = ["a\u2028b", "c\x0bd", "e\x85f"]  # str.splitlines would make six of them
    assert load_captions(_write(tmp_path, "c.txt", "\n".join(captions)), NAMES) == captions


def test_the_first_key_wins(tmp_path):
    entry = {"file_name": "0.png", "caption": "c", "prompt": "p", "text": "t"}
    assert load_captions(_write(tmp_path, "c.jsonl", _lines(entry)), ["0.png"]) == ["t"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("c.txt", "a\nb\n", r"has 2 captions, .* 3 images \(sorted by name: 0.png first, sub/a b.jpg last\)"),
        ("c.txt", "a\nb\nc\nd\n", "has 4 captions"),
        ("c.txt", "", "has 0 captions"),
        ("c.txt", "a\n\nc\n", "empty lines, .*: 2"),
        ("c.txt", "a\n" + "\n" * 12 + "c\n", "2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more"),
        ("c.txt", b"\x89PNG\r\n\x1a\n\0\0", "contains zero bytes"),
        ("c.txt", "a\nb\nc".encode("utf-16"), "contains zero bytes"),
        ("c.txt", "a\nV\u00f6gel\nc".encode("latin-1"), r"not text in UTF-8 \(line 2\)"),
        ("c.json", "{", "is not valid JSON"),
        ("c.json", "[" * 100_000, "is not valid JSON"),
        ("c.json", '["a"]', "one object from image names to captions, not a list"),
        ("c.json", '{"0.png": 1}', "0.png: the caption must be a text"),
        ("c.json", '{"0.png": " "}', "0.png: the caption must be a text that is not empty"),
        ("c.json", '{"0.png": "\\ud800"}', "do not exist in Unicode"),
        ("c.json", '{"0.png": "a"}', r"lacks captions of 2 of 3 images: 10.png, sub/a b.jpg\.$"),
        ("c.json", '{"0": "a"}', "of 3 of 3 images: .* It names 0, for example"),
        ("c.jsonl", "{}\n", 'line 1 must be an object with "file_name" and one of text, prompt, caption'),
        ("c.jsonl", "\n[1]\n", "line 2 must be an object"),
        ("c.jsonl", '{"file_name": "0.png", "label": 3}', "line 1 must be an object"),
        ("c.jsonl", '{"file_name": "0.png", "text": "a"}\nx', "line 2 is not valid JSON"),
        ("c.jsonl", _lines(*_entries()) + '{"file_name": "0.png", "text": "b"}', "line 4 gives 0.png a second caption"),
        ("c.jsonl", "", "lacks captions of 3 of 3 images"),
    ],
)
def test_faults_are_sentences(tmp_path, name, content, sentence):
    with pytest.raises(DataError, match=sentence):
        load_captions(_write(tmp_path, name, content), NAMES)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"captions\.csv is no file of captions; expected \.txt"):
        load_captions(tmp_path / "captions.csv", NAMES)
    with pytest.raises(DataError, match=r"Cannot read the captions .*: No such file"):
        load_captions(tmp_path / "absent.txt", NAMES)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="Cannot read the captions"):
        load_captions(tmp_path / "folder.txt", NAMES)


def test_metadata_beside_the_images_comes_first():
    files = {"metadata.jsonl": _lines(*_entries()).encode(), "0.txt": b"other"}
    assert find_captions(NAMES, files.get) == CAPTIONS
    with pytest.raises(DataError, match=r"metadata\.jsonl lacks captions of 1 of 1 images: 7\.png"):
        find_captions(["7.png"], files.get)


def test_text_files_beside_the_images():
    files = {"0.txt": b"a cat\n", "10.txt": "a dog,\n\t“quoted”".encode(), "sub/a b.txt": "ein Vögelchen".encode()}
    assert find_captions(NAMES, files.get) == CAPTIONS
    assert find_captions([], files.get) == []
    names = [*NAMES, *(f"{i}.webp" for i in range(20, 32))]
    with pytest.raises(DataError, match=r"lack captions of 12 of 15 images: 20\.webp, .*, 29\.webp and 2 more"):
        find_captions(names, files.get)
    with pytest.raises(DataError, match=r"sub/a b\.txt: the caption must be a text that is not empty"):
        find_captions(NAMES, {**files, "sub/a b.txt": b" \n"}.get)
    with pytest.raises(DataError, match=r"^10\.txt is not text in UTF-8"):
        find_captions(NAMES, {**files, "10.txt": b"\xff\xfe"}.get)


def test_no_captions_at_all_names_the_option():
    with pytest.raises(DataError, match=r"neither metadata\.jsonl nor text files such as 0\.txt .* --captions FILE"):
        find_captions(NAMES, lambda name: None)
