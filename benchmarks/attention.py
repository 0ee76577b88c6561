"""Attention backends measured in turns within one run.

    python benchmarks/attention.py shapes      # SD1.5's attention: every backend, and what is installed (5 minutes)
    python benchmarks/attention.py denoiser    # an SD1.5-sized U-Net as a whole (10 minutes, 6 GB of memory)
    python benchmarks/attention.py ideas       # what of FastAttention does not pay on a CPU: tiling, padding, mask tiles
    python benchmarks/attention.py gpu         # SD1.5, SDXL, SD3, Flux at 512² and 1024², bfloat16, on CUDA

--threads 2 by default; --json FILE keeps the figures.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from released import RELEASED, released

import diffaccel
from diffaccel.attention.backends import BACKENDS, candidates
from diffaccel.attention.choose import choose
from diffaccel.attention.collect import Use, collect
from diffaccel.attention.examples import example_call
from diffaccel.attention.inputs import make_inputs
from diffaccel.attention.install import attention_by, installation_of
from diffaccel.attention.kernels import additive, default, flex
from diffaccel.attention.measure import measure
from diffaccel.attention.route import Installation
from diffaccel.attention.signature import Signature
from diffaccel.attention.timing import alternate, medians
from diffaccel.cli.output import table
from diffaccel.core.memory import peak_bytes

CPU = torch.device("cpu")
# Of SD1.5 at 512², both branches of guidance: (tokens, keys, dim), 8 heads.
SD15 = [(s, k, d) for s, d in ((4096, 40), (1024, 80), (256, 160), (64, 160)) for k in (s, 77)]


def shapes(options) -> dict:
    """Per shape: every usable backend and what `optimize_attention` would install, in one alternating run."""
    backends = [backend for backend in candidates(None, False, CPU)[0] if backend.name != "flex"]
    record = [
        _shape(Signature(2, 8, tokens, keys, dim, dim, torch.float32, "cpu"), backends, options.seconds)
        for tokens, keys, dim in SD15
    ]
    rows = []
    for one in record:
        times, ours = one["times"], one["installed"]
        cells = [f"{1000 * times[b.name]:.2f}" if b.name in times else "–" for b in backends]
        ratios = [f"{ours / min(times.values()):.3f}", f"{max(times.values()) / ours:.2f}"]
        rows.append([one["shape"], *cells, one["chosen"], f"{1000 * ours:.2f}", *ratios])
    print(table(["ms", *(b.name for b in backends), "chosen", "installed", "/ best", "slowest /"], rows))
    return {"shapes": record}


def _shape(signature: Signature, backends: list, seconds: float) -> dict:
    use = Use(signature, (1.0, 1.0, 1.0), True, CPU)
    chosen, *_ = choose(measure(use, backends, rounds=20, seconds=4.0))
    inputs, attention = make_inputs(use), attention_by({signature: BACKENDS[chosen].kernel})
    usable = [backend for backend in backends if backend.refuses(signature) is None]
    runs = {backend.name: partial(backend.kernel, *inputs, False, None) for backend in usable}
    with torch.no_grad():
        times = medians(alternate({**runs, "installed": partial(attention, *inputs)}, CPU, 60, seconds))
    return {"shape": signature.text, "chosen": chosen, "installed": times.pop("installed"), "times": times}


def denoiser(options) -> dict:
    """A whole evaluation of the U-Net: PyTorch's choice, matrix products throughout, and ours."""
    network = released("sd15")
    call = example_call(network)
    with (
        torch.no_grad(),
        diffaccel.optimize_attention(network, backends=["flash", "math", "chunked"], cache=False) as report,
    ):
        print(report.explain())
        report.undo()
        states = {
            "default": None,
            "math": _by(network, call, BACKENDS["math"]),
            "ours": report.networks[0].installation,
        }
        runs = dict.fromkeys(states, partial(network, **call))
        times = medians(alternate(runs, CPU, 7, options.seconds * 20, _switches(states)))
    print(
        "evaluation of an SD1.5-sized U-Net, 2 × 4 × 64 × 64: " + ", ".join(f"{k} {v:.2f} s" for k, v in times.items())
    )
    print(
        f"ours against default {times['default'] / times['ours']:.3f}×, against math {times['math'] / times['ours']:.2f}×"
    )
    return {"denoiser": times}


def _by(network, call: dict, backend) -> Installation | None:
    """All attention that a backend takes, routed to it; not installed."""
    collection = collect(network, [((), call)])
    able = {use.signature: backend.kernel for use in collection.uses.values() if backend.refuses(use.signature) is None}
    return installation_of(collection, able) if able else None


def _switches(states: dict[str, Installation | None]) -> dict[str, Callable]:
    """For each name, a function after which its installation is in use and no other."""

    def to(name: str) -> None:
        for installation in filter(None, states.values()):
            installation.remove()
        if states[name] is not None:
            states[name].install()

    return {name: partial(to, name) for name in states}


def ideas(options) -> dict:
    """Two-level query tiling, heads padded to 16, and mask tiles, each against PyTorch's choice."""
    with torch.no_grad():
        rows = [
            row for tokens, dim in ((4096, 40), (1024, 80), (1024, 36)) for row in _tiling(tokens, dim, options.seconds)
        ]
        rows += _mask_tiles(options.seconds)
    print(table(["shape", "idea", "ms", "/ default"], rows))
    return {"ideas": rows}


def _tiling(tokens: int, dim: int, seconds: float) -> list:
    query, key, value = torch.randn(3, 2, 8, tokens, dim)
    fill = -dim % 16

    def tiled(block: int):
        return torch.cat([default(part, key, value, None, False, None) for part in query.split(block, 2)], 2)

    def padded():
        tensors = (torch.nn.functional.pad(one, (0, fill)) for one in (query, key, value))
        return default(*tensors, None, False, dim**-0.5)[..., :dim]

    runs = {"default": partial(default, query, key, value, None, False, None)}
    runs |= {f"tiles of {block} queries": partial(tiled, block) for block in (64, 256)}
    runs |= {"heads padded to 16": padded} if fill else {}
    return _against(f"2×8×{tokens}×{tokens} d{dim}", runs, seconds)


def _against(shape: str, runs: dict, seconds: float) -> list:
    times = medians(alternate(runs, CPU, 40, seconds))
    return [[shape, name, f"{1000 * t:.2f}", f"{t / times['default']:.2f}"] for name, t in times.items()]


def _mask_tiles(seconds: float) -> list:
    """A causal window of frames, as in video models: a dense mask, and a block mask that is made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, frame = 2048, 256
    query, key, value = torch.randn(3, 1, 8, tokens, 64)

    def seen(batch, head, row, column):
        return (row // frame >= column // frame) & (row // frame - column // frame <= 1)

    places = torch.arange(tokens)
    dense = additive(seen(0, 0, places[:, None], places[None]), query.dtype)[None, None]
    blocks, compiled = create_block_mask(seen, None, None, tokens, tokens, device="cpu"), torch.compile(flex_attention)
    return _against(
        f"1×8×{tokens}×{tokens} d64, windows of 2 × {frame}",
        {
            "default": lambda: default(query, key, value, dense, False, None),
            "compiled, dense mask": lambda: flex(query, key, value, dense, False, None),
            "compiled, cached mask tiles": lambda: compiled(query, key, value, block_mask=blocks),
        },
        seconds,
    )


def gpu(options) -> dict:
    """Per model and size: evaluations per second and memory with each backend, our choice, and compilation on top."""
    if not torch.cuda.is_available():
        raise SystemExit("This part needs a CUDA device.")
    device, rows, record = torch.device("cuda"), [], []
    for name in options.models.split(","):
        network = released(name, "cuda", torch.bfloat16)
        for pixels in (512, 1024):
            call = _sized(example_call(network), pixels, name)
            with torch.no_grad():
                for label, seconds, memory in _on_gpu(network, call, device, options):
                    rows.append([name, pixels, label, f"{1000 * seconds:.2f}", f"{memory / 2**20:.0f}"])
                    record.append({"model": name, "pixels": pixels, "how": label, "seconds": seconds, "bytes": memory})
        del network
        torch.cuda.empty_cache()
    print(table(["model", "pixels", "how", "ms / evaluation", "MiB"], rows))
    return {"gpu": record}


def _on_gpu(network, call: dict, device: torch.device, options):
    evaluate = partial(network, **call)
    with diffaccel.optimize_attention(network, run=evaluate, confirm=False) as report:
        print(report.explain())
    usable = [b for b in candidates(None, False, device)[0] if b.name not in ("default", "flex", "chunked")]
    states = {
        "default": None,
        "ours": report.networks[0].installation,
        **{b.name: _by(network, call, b) for b in usable},
    }
    switches = _switches({name: state for name, state in states.items() if name in ("default", "ours") or state})
    times = medians(alternate(dict.fromkeys(switches, evaluate), device, 20, options.seconds * 4, switches))
    for name, seconds in times.items():
        switches[name]()
        yield name, seconds, peak_bytes(evaluate, device)
    for name in ("default", "ours"):
        switches[name]()
        network.compile()
        seconds = medians(alternate({name: evaluate}, device, 20, options.seconds * 4))[name]
        yield f"{name}, compiled", seconds, peak_bytes(evaluate, device)
        network._compiled_call_impl = None
    switches["default"]()


def _sized(call: dict, pixels: int, name: str) -> dict:
    """Latents of another size."""
    key = "sample" if "sample" in call else "hidden_states"
    if name == "flux":
        tokens = (pixels // 16) ** 2
        return {**call, key: call[key][:, :tokens], "img_ids": call["img_ids"][:tokens]}
    rows, channels = call[key].shape[:2]
    return {**call, key: torch.randn(rows, channels, pixels // 8, pixels // 8).to(call[key])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["shapes", "denoiser", "ideas", "gpu"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="after which no round of a comparison begins")
    parser.add_argument("--models", default=",".join(RELEASED), help="for gpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = globals()[options.part](options)
    if options.json and found:
        known = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps(known | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
