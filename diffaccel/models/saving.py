"""Pipelines in folders, with all that the folder they came from brought."""

import shutil
from contextlib import nullcontext
from pathlib import Path

from .quiet import quiet_diffusers, quiet_transformers


def save_pipeline(pipe, folder: Path) -> None:
    """Write a pipeline, and what only the folder that it was opened from has: prompts, older forms of its tokenizers."""
    with quiet_diffusers(), quiet_transformers() if hasattr(pipe, "tokenizer") else nullcontext():
        pipe.save_pretrained(folder)
    source = Path(getattr(pipe, "name_or_path", None) or "")
    if not (source / "model_index.json").is_file():
        return
    for file in (source / "prompts.txt", *source.glob("tokenizer*/*.*")):
        target = folder / file.relative_to(source)
        if file.is_file() and not target.exists() and target.parent.is_dir():
            shutil.copyfile(file, target)
