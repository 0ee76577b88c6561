"""Copy finished runs of the recipes into the package, write reference statistics, and renew the hashes.

python tools/ship.py digits --teacher runs/digits/final --features runs/digits-features/final
python tools/ship.py mnist --teacher runs/mnist/final --features runs/mnist-features/final
python tools/ship.py digits-flow --teacher runs/digits-flow/final
python tools/ship.py tiny-sd --teacher runs/tiny-sd/final --features runs/tiny-sd-text/final

Weights of all but digits are stored in half precision; they compute in single precision once they are opened.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffaccel.core.files import sha256_file

UNHASHED = ("SHA256.json", "README.md", "figures.json", "samples.png")
ASSETS = Path(__file__).parents[1] / "diffaccel/models/assets"


def halve(path: Path) -> None:
    """Store the single-precision tensors of a safetensors file in half precision."""
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def copy_teacher(source: Path, target: Path, half: bool) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("manifest.json"))
    for path in target.rglob("*.safetensors") if half else ():
        halve(path)


def check_same_text(features: Path, teacher: Path) -> None:
    """The features only say which caption fits if their text half is the teacher's text encoder."""
    ours, theirs = (load_file(path / "text_encoder/model.safetensors") for path in (features, teacher))
    if any(not torch.equal(tensor.half(), theirs[name].half()) for name, tensor in ours.items()):
        raise SystemExit(f"{features} was trained with another text encoder than {teacher}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("digits", "digits-flow", "mnist", "tiny-sd"))
    parser.add_argument("--teacher", type=Path, help="final/ of the teacher's recipe")
    parser.add_argument("--features", type=Path, help="final/ of the recipe of the features")
    arguments = parser.parse_args()
    folder, name = ASSETS / arguments.name, arguments.name
    for source in (arguments.teacher, arguments.features):
        if source is not None and not source.is_dir():
            parser.error(f"there is no folder {source}")
    if arguments.features and name == "digits-flow":
        parser.error("digits-flow has the features of digits")
    folder.mkdir(exist_ok=True)
    if arguments.teacher:
        copy_teacher(arguments.teacher, folder / "teacher", half=name != "digits")
    if arguments.features:
        file = "encoder.safetensors" if name == "tiny-sd" else "classifier.safetensors"
        shutil.copy(arguments.features / file, folder / file)
        if name == "tiny-sd":
            check_same_text(arguments.features, folder / "teacher")
            halve(folder / file)
    write_hashes(folder)
    if arguments.features and name != "digits":
        write_reference(name, folder)
        write_hashes(folder)
    size = sum((folder / file).stat().st_size for file in json.loads((folder / "SHA256.json").read_text()))
    print(f"{folder}: {size / 2**20:.2f} MiB")


def write_reference(name: str, folder: Path) -> None:
    """Statistics of the training images, with the features themselves."""
    from diffaccel.evaluate.run import write_statistics
    from diffaccel.models.data import load_mnist
    from diffaccel.models.emoji import load_emoji

    if name == "tiny-sd":
        pictures = load_emoji()
        real, features = pictures.on_white()[pictures.reference()], "emoji128"
    else:
        real, features = load_mnist("train"), "mnist64"
    write_statistics(real, folder / "statistics.safetensors", features, vectors=True)


def write_hashes(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNHASHED)
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    (folder / "SHA256.json").write_text(json.dumps(hashes, indent=1) + "\n")


if __name__ == "__main__":
    main()
