"""Text computed once, and guidance on two processes: that results are equal in every bit, and what is saved.

    python benchmarks/execution.py text tiny-sd            # ten evaluations with and without, in turn; --threads 1
    python benchmarks/execution.py text sd15 --steps 2 --threads 2   # SD1.5's U-Net with random weights (5 minutes, 6 GB)
    torchrun --nproc_per_node 2 benchmarks/execution.py parallel tiny-sd

--json FILE keeps the figures.
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from released import RELEASED, released

import diffaccel
from diffaccel.attention.examples import example_call
from diffaccel.attention.timing import alternate, medians
from diffaccel.execution.accelerations import ACCELERATIONS

ROUNDS = 7


def text(options) -> dict:
    """A run's evaluations with the text computed in each and once, in turn."""
    network = released(options.model) if options.model in RELEASED else diffaccel.load_pipeline(options.model).unet
    call = example_call(network)

    @torch.no_grad()
    def evaluate():
        return [network(**call)[0] for _ in range(options.steps)]

    switch = ACCELERATIONS["text"].make(network, {})
    with diffaccel.reuse_text(network) as reuse:
        once, kept = evaluate(), reuse.bytes
    equal = all(torch.equal(a, b) for a, b in zip(once, evaluate(), strict=True))
    before = {"every step": switch.off, "once": switch.on}
    times = medians(alternate(dict.fromkeys(before, evaluate), torch.device("cpu"), ROUNDS, options.seconds, before))
    saved, most = 1 - times["once"] / times["every step"], _share(network, call, reuse.modules)
    print(
        f"{options.model}, {options.steps} evaluations: bit-equal: {equal}; time saved {saved:.1%}, of the {most:.1%} of an "
        f"evaluation that text projections take; {kept / 2**20:.2f} MiB kept"
    )
    return {"bit_equal": equal, "saved": saved, "most": most, "bytes": kept, "seconds": times}


@torch.no_grad()
def _share(network, call: dict, names: tuple[str, ...]) -> float:
    """Time of the projections of the text alone, over that of an evaluation."""
    modules, text = dict(network.named_modules()), call["encoder_hidden_states"]
    projections = [modules[name.split(".", 1)[1]] for name in names]
    runs = {"text": lambda: [module(text) for module in projections], "all": lambda: network(**call)}
    times = medians(alternate(runs, torch.device("cpu"), 5, 30.0))
    return times["text"] / times["all"]


def parallel(options) -> dict:
    """A whole image by the processes of torchrun and by each of them alone, in turn, one thread each."""
    pipe = diffaccel.load_pipeline(options.model)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": options.steps, "output_type": "latent", "return_dict": False}
        return pipe("red apple", generator=generator, **settings)[0]

    with diffaccel.sequential_cfg(pipe):
        alone = draw()
    taken = {"alone": [], "together": []}
    for _ in range(ROUNDS + 1):
        for name, times in taken.items():
            with diffaccel.parallel_cfg(pipe) if name == "together" else nullcontext():
                torch.distributed.is_initialized() and torch.distributed.barrier()
                start = time.perf_counter()
                latents = draw()
                times.append(time.perf_counter() - start)
    times, equal = medians({name: times[1:] for name, times in taken.items()}), torch.equal(latents, alone)
    if torch.distributed.get_rank():
        return {}
    ratio = times["alone"] / times["together"]
    print(
        f"{options.model}, {options.steps} steps: {times['alone']:.2f} s alone, {times['together']:.2f} s on two processes ({ratio:.2f}×)"
    )
    print(f"bit-equal to guidance in turn in one process: {equal}")
    return {"bit_equal": equal, "ratio": ratio, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["text", "parallel"])
    parser.add_argument("model", help=f"a teacher, or for text {', '.join(RELEASED)}")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120.0, help="after which no round begins")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = globals()[options.part](options)
    if options.json and found:
        known = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps({**known, f"{options.part} {options.model}": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
