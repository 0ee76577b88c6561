"""Copy finished runs of the recipes into the package and renew the hashes.

python tools/ship_digits.py --teacher runs/teacher/final --classifier runs/features/final
"""

import argparse
import json
import shutil
from pathlib import Path

from diffaccel.core.files import sha256_file

ASSETS = Path(__file__).parents[1] / "diffaccel/models/assets/digits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="final/ of `diffaccel train --recipe digits`")
    parser.add_argument("--classifier", type=Path, help="final/ of `diffaccel train --recipe digits-features`")
    arguments = parser.parse_args()
    if arguments.classifier:
        shutil.copy(arguments.classifier / "classifier.safetensors", ASSETS)
    if arguments.teacher:
        shutil.rmtree(ASSETS / "teacher", ignore_errors=True)
        shutil.copytree(arguments.teacher, ASSETS / "teacher", ignore=shutil.ignore_patterns("manifest.json"))
    files = sorted(
        p for p in ASSETS.rglob("*") if p.suffix in (".npz", ".safetensors") or p.name.endswith("config.json")
    )
    hashes = {
        path.relative_to(ASSETS).as_posix(): sha256_file(path) for path in [*files, ASSETS / "teacher/model_index.json"]
    }
    (ASSETS / "SHA256.json").write_text(json.dumps(hashes, indent=1) + "\n")
    print(f"{ASSETS}: {len(hashes)} files, {sum((ASSETS / name).stat().st_size for name in hashes)} bytes")


if __name__ == "__main__":
    main()
