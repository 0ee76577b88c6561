"""Single-base mode against three networks: peak memory and seconds per step on a U-Net of Stable Diffusion 1.5's layout.

    python benchmarks/single_base.py                 # on CUDA, or on a CPU with 32 GB of memory
    python benchmarks/single_base.py --width 0.5     # half of the channels: 215 M parameters, 9 GB
    python benchmarks/single_base.py --plan --only "three networks" "single base"

A step is one of DMD with random weights, one image of 64 × 64 latents and guidance: student forward, critic forward and
backward, optimiser; student forward, teacher (a pair) and critic forward, student backward, optimiser. There is no moving
average, which adds another copy of what the student trains.

Each variant runs in a process of its own. Memory is what PyTorch allocates on CUDA, and on the CPU the peak of the process
above what it has after a step of a tiny network; "planned" is what the plan before a distillation says of it. Times are of the fastest
step after the first.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from diffaccel.cli.output import table
from diffaccel.core.rng import KeyedRandom, seeded
from diffaccel.core.schedule import VPDiscrete
from diffaccel.distill.adapters import AdapterConfig, SharedBase
from diffaccel.distill.machine import Speed
from diffaccel.distill.methods.dmd import DMD
from diffaccel.distill.plan import make_plan
from diffaccel.distill.task import Task
from diffaccel.models.conditions import PromptConditions
from diffaccel.models.released import released_network
from diffaccel.models.unet_condition import UNetConditionDenoiser
from diffaccel.training.config import OptimizerConfig, TrainerConfig
from diffaccel.training.method import Draw
from diffaccel.training.optimizers import make_optimizer

VARIANTS = {  # base of adapters, gradient checkpointing
    "three networks": (None, False),
    "three networks, checkpointing": (None, True),
    "single base": ("float32", False),
    "single base, checkpointing": ("float32", True),
    "single base in bfloat16": ("bfloat16", False),
    "single base in bfloat16, checkpointing": ("bfloat16", True),
}


def make_method(width: float, size: int, variant: str, options, device: str) -> DMD:
    """DMD of a random teacher for latents of size × size."""
    dtype, checkpointing = VARIANTS[variant]
    device = torch.device(device)
    cls, config = released_network("sd15")
    channels = tuple(int(count * width) for count in (320, 640, 1280, 1280))
    with seeded(0), device:
        net = cls(**config | {"block_out_channels": channels, "sample_size": size})
    schedule = VPDiscrete(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0))
    states = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(0))
    null = {"encoder_hidden_states": torch.zeros(77, 768, device=device)}
    teacher = UNetConditionDenoiser(net, schedule, "epsilon", null)
    shared = SharedBase(teacher, AdapterConfig(rank=options.rank, base_dtype=dtype)) if dtype else None
    conditions = PromptConditions(["a cat"], {"encoder_hidden_states": states})
    method = DMD(Task(teacher, conditions, shared=shared), DMD.Config(guidance_scale=7.5))
    if checkpointing:
        method.enable_gradient_checkpointing()
    return method


def train(method: DMD, steps: int, options) -> list[float]:
    """Seconds of each step."""
    device, times = torch.device(options.device), []
    optimizers = {
        role: make_optimizer(module.parameters(), OptimizerConfig(lr=1e-5)) for role, module in method.roles.items()
    }
    for step in range(steps):
        start = time.perf_counter()
        for phase in method.phases(step):
            update(method, phase, step, optimizers, device, options.precision)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def measure(variant: str, options) -> dict:
    """One variant, in this process."""
    torch.set_num_threads(options.threads)
    if options.plan:
        return {
            "planned": planned(make_method(options.width, 64, variant, options, "meta"), VARIANTS[variant][1], options)
        }
    # Imports and kernels that are made ready are not memory of a variant.
    train(make_method(0.1, 8, variant, options, options.device), 1, options)
    cuda, began = options.device == "cuda", memory()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    method = make_method(options.width, 64, variant, options, options.device)
    times = train(method, options.steps + 1, options)
    peak = torch.cuda.max_memory_allocated() if cuda else memory(peak=True) - began
    trained = sum(p.numel() for module in method.roles.values() for p in module.parameters())
    return {
        "parameters": sum(p.numel() for p in method.teacher.parameters()), "trained": trained, "peak": peak,
        "planned": planned(method, VARIANTS[variant][1], options), "seconds": min(times[1:]), "times": times,
    }  # fmt: skip


def planned(method: DMD, checkpointing: bool, options) -> int:
    """Bytes that the plan before such a run says."""
    roles = {"teacher": (method.teacher, False)} | {name: (module, True) for name, module in method.roles.items()}
    trainer = TrainerConfig(batch_size=1, precision=options.precision, gradient_checkpointing=checkpointing)
    return make_plan(roles, method.updates(1), trainer, average="", device=options.device, speed=Speed(1.0, 1.0)).bytes


def update(method: DMD, phase, step: int, optimizers: dict, device: torch.device, precision: str) -> None:
    """As `training.trainer.Trainer` makes one."""
    for role, module in method.roles.items():
        module.requires_grad_(role in phase.trains)
    draw = Draw(KeyedRandom(0), phase.name, step, 0, 1, 1, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = method.loss(phase, draw).total
    loss.backward()
    for role in phase.trains:
        nn.utils.clip_grad_norm_(method.roles[role].parameters(), 1.0)
        optimizers[role].step()
        optimizers[role].zero_grad()


def memory(peak: bool = False) -> int:
    """Bytes that this process has in memory, or had at most, on Linux."""
    field = "VmHWM" if peak else "VmRSS"
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=1.0, help="share of the channels")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="timed, after one that is not")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT", default=list(VARIANTS))
    parser.add_argument("--plan", action="store_true", help="only what the plan says; nothing is computed")
    parser.add_argument("--json", type=Path, help="keeps the figures")
    parser.add_argument("--part", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        options.json.write_text(json.dumps(measure(options.part, options)))
        return
    found = {}
    settings = [
        f"--{name}={getattr(options, name)}" for name in ("width", "rank", "steps", "device", "precision", "threads")
    ]
    settings += ["--plan"] * options.plan
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        for name in options.only:
            subprocess.run([sys.executable, __file__, *settings, "--part", name, "--json", str(file)], check=True)
            found[name] = json.loads(file.read_text())
            print(name, found[name], file=sys.stderr, flush=True)
    first = found[options.only[0]]
    print(f"width {options.width}, {options.device}, precision {options.precision}, {options.threads} threads")
    if options.plan:
        print(table(("variant", "planned GiB"), [(name, f"{f['planned'] / 2**30:.2f}") for name, f in found.items()]))
    else:
        rows = [
            (name, f"{f['trained'] / 1e6:,.1f}", f"{f['peak'] / 2**30:.2f}", f"{f['peak'] / first['peak']:.2f}",
             f"{f['planned'] / 2**30:.2f}", f"{f['seconds']:.2f}", f"{f['seconds'] / first['seconds']:.2f}")
            for name, f in found.items()
        ]  # fmt: skip
        print(table(("variant", "M trained", "peak GiB", "ratio", "planned GiB", "s/step", "ratio"), rows))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
