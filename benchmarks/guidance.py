"""What guidance rules cost beside plain classifier-free guidance, as a share of a call of an SD 1.5-sized U-Net.

    python benchmarks/guidance.py               # a few minutes on one core and 4 GB of memory; on the GPU where there is one

The network (860 M random parameters) is called on (2, 4, 64, 64) latents with (2, 77, 768) embeddings. What rules cost is
the time of a whole run of Stable Diffusion's pipeline through `guide`, minus one with the pipeline's own guidance, by
evaluation; in both the network returns stored outputs at once, because differences of milliseconds drown in its seconds.
All three are measured alternately; figures are medians over rounds, the ratio is that of the figures.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging

import diffaccel
from diffaccel.cli.output import table

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
STEPS, RUNS = 20, 15  # evaluations per run; runs per round
RULES = {
    "CFG": diffaccel.CFG(7.5),
    "APG": diffaccel.APG(7.5, norm_threshold=15.0),
    "APG, raw space": diffaccel.APG(7.5, norm_threshold=15.0, space="raw"),
    "APG, rescaled": diffaccel.Rescale(diffaccel.APG(7.5, norm_threshold=15.0)),
}


def seconds(call, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Bench:
    """A pipeline whose network can be exchanged for its stored outputs."""

    def __init__(self, device: str):
        self.device, dtype = device, torch.float16 if device == "cuda" else torch.float32
        self.unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).to(device, dtype).eval()
        self.inputs = [torch.randn(2, 4, 64, 64), torch.tensor(500), torch.randn(2, 77, 768)]
        self.inputs = [x.to(device, dtype if x.is_floating_point() else x.dtype) for x in self.inputs]
        self.stored = torch.randn(4, 2, 4, 64, 64).to(device, dtype)
        scheduler = DPMSolverMultistepScheduler(**SD)
        parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
        self.pipe = StableDiffusionPipeline(unet=self.unet, scheduler=scheduler, requires_safety_checker=False, **parts)
        self.pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def network(self) -> float:
        return seconds(lambda: self.unet(*self.inputs, return_dict=False), self.device)

    def run(self, rule=None) -> float:
        """Seconds per evaluation of a run on stored outputs, under a rule or the pipeline's own guidance."""
        embeddings = self.inputs[2]
        arguments = {
            "prompt_embeds": embeddings[:1], "negative_prompt_embeds": embeddings[1:], "latents": self.inputs[0][:1],
            "num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "latent",
        }  # fmt: skip
        own, outputs = self.unet.forward, iter(self.stored.repeat(STEPS, 1, 1, 1, 1))
        self.unet.forward = lambda *_, **__: (next(outputs),)
        try:
            with diffaccel.guide(self.pipe, rule) if rule else nullcontext():
                return seconds(lambda: self.pipe(**arguments), self.device) / STEPS
        finally:
            self.unet.forward = own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    bench = Bench("cuda" if torch.cuda.is_available() else "cpu")
    bench.run(RULES["APG"])
    calls, extra = [], {name: [] for name in RULES}
    for _ in range(rounds):
        calls.append(bench.network())
        for _ in range(RUNS):
            plain = bench.run()
            for name, rule in RULES.items():
                extra[name].append(bench.run(rule) - plain)
    call = statistics.median(calls)
    rows = [
        [name, f"{1e3 * (more := statistics.median(found)):.2f}", f"{100 * more / call:.3f} %"]
        for name, found in extra.items()
    ]
    size = sum(parameter.numel() for parameter in bench.unet.parameters()) / 1e6
    print(
        f"beyond plain guidance, per evaluation; a call of the {size:.0f} M U-Net takes {call:.3f} s on {bench.device}"
    )
    print(table(["rule", "ms", "of a network call"], rows))


if __name__ == "__main__":
    main()
