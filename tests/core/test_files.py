"""Atomic files and folders: complete or absent, and verifiable."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from diffaccel.core.errors import DataError, DiffaccelError, UsageError
from diffaccel.core.files import atomic_directory, inside, sha256_file, verify_manifest, write_atomic


def test_write_atomic_replaces_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_sha256_of_a_known_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("target", [".", "missing/a.txt"])
def test_write_atomic_names_an_impossible_path(tmp_path, target):
    with pytest.raises(UsageError, match="Cannot write"):
        write_atomic(tmp_path / target, b"x")


def test_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DiffaccelError, match="100000 bytes"):
            write_atomic(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def _build(path):
    with atomic_directory(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_bytes(b"b" * 1000)
        (folder / "a.txt").write_text("hello")
        assert not path.exists()
    return path


def test_directory_appears_whole_with_a_valid_manifest(tmp_path):
    folder = _build(tmp_path / "step-1")
    assert verify_manifest(folder) == []
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files["sub/b.bin"] == {"size": 1000, "sha256": sha256_file(folder / "sub" / "b.bin")}
    assert sorted(files) == ["a.txt", "sub/b.bin"]
    assert os.listdir(tmp_path) == ["step-1"]


def test_failure_inside_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("a")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_existing_target_is_refused_before_any_work(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UsageError, match="exists"), atomic_directory(tmp_path / "x"):
        pytest.fail("the block must not run")


def test_kill_during_the_build_leaves_only_a_hidden_folder(tmp_path):
    code = (
        "import os, sys\nfrom diffaccel.core.files import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as f:\n    (f / 'a').write_text('a')\n    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=False).returncode == 9
    assert not (tmp_path / "x").exists()
    assert all(name.startswith(".tmp-") for name in os.listdir(tmp_path))
    assert verify_manifest(next(tmp_path.iterdir())) == ["manifest.json is missing: the folder was not completed."]


def _flip(folder):
    data = bytearray((folder / "sub" / "b.bin").read_bytes())
    data[500] ^= 1
    (folder / "sub" / "b.bin").write_bytes(data)


DAMAGE = {
    "SHA-256 differs": _flip,
    "has 5 bytes, expected 1000": lambda folder: (folder / "sub" / "b.bin").write_bytes(b"short"),
    "a.txt is missing": lambda folder: (folder / "a.txt").unlink(),
    "cannot be read": lambda folder: (folder / "manifest.json").write_text("{"),
    "not a manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("sentence", DAMAGE)
def test_damage_is_named(tmp_path, sentence):
    folder = _build(tmp_path / "x")
    DAMAGE[sentence](folder)
    (problem,) = verify_manifest(folder)
    assert sentence in problem


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "", "..\\secret", "link/secret"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "x"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(DataError, match="not allowed"):
        inside(folder, name)
    record = {"size": 1, "sha256": sha256_file(tmp_path / "secret")}
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "files": {name: record}}))
    assert "not allowed" in verify_manifest(folder)[0]


def test_links_are_not_stored(tmp_path):
    with pytest.raises(DataError, match="not a plain file"), atomic_directory(tmp_path / "x") as folder:
        (folder / "link").symlink_to("/etc/hostname")
    assert os.listdir(tmp_path) == []
