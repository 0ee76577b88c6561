"""What two processes of a test run: the same pipeline, once with equal and once with different noise."""

import sys
from pathlib import Path

import torch
from pipelines import PIPELINES

import diffaccel
from diffaccel.core.errors import NumericalError

CASE = PIPELINES["sd"]


def drawn() -> dict[str, torch.Tensor]:
    """Latents of one image and of three, with guidance."""
    pipe = CASE.build()
    return {
        "one": CASE.call(pipe, 2, **CASE.guided(3.0)),
        "three": CASE.call(pipe, 2, [0, 1, 2], **CASE.guided(3.0, 3)),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    with diffaccel.parallel_cfg(CASE.build()):
        rank = torch.distributed.get_rank()
        torch.save(drawn(), folder / f"{rank}.pt")
        others = {
            "noise": {"seed": rank},
            "text": {"prompt": f"a cat of process {rank}"},
            "size": {"height": 8 + 8 * rank},
        }
        for name, arguments in others.items():
            try:
                CASE.call(CASE.build(), 2, **CASE.guided(3.0), **arguments)
            except NumericalError as error:
                (folder / f"{rank}-{name}.txt").write_text(str(error))


if __name__ == "__main__":
    main()
