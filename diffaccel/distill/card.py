"""The model card of a student: README.md in the form that the Hugging Face hub reads."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.config import to_yaml

FOLDER, TEACHER = "path/to/this/folder", "path/to/its/teacher"
"""What the code of a card calls the student's folder, and that of a teacher which is not on the hub."""

_CODE = """import diffaccel  # lets diffusers find the student's classes
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{source}")
"""
_ADAPTED = """pipe.load_lora_weights("{folder}")
pipe.scheduler = diffaccel.FewStepScheduler.from_pretrained("{folder}", subfolder="scheduler")
"""
_LICENCES = {  # as the hub calls them
    "Apache-2.0": "apache-2.0",
    "CC BY-NC 4.0": "cc-by-nc-4.0",
    "CreativeML OpenRAIL-M": "creativeml-openrail-m",
    "CreativeML OpenRAIL++-M": "openrail++",
    "MIT": "mit",
}
_MEASURED = "## Measured\n"
_LIMITATIONS = """## Limitations

- It knows what its teacher knows, with the teacher's faults and under the teacher's licence.
- Images of few steps vary less than the teacher's, and fine detail suffers first; compare with
  `diffaccel evaluate` before you rely on it.
- It was trained at the times above and for nothing else: other schedulers, more steps and partial noise (image to image)
  work as far as those times allow.
"""


def model_card(
    *,
    teacher: str,
    times: Sequence[float],
    noise: str,
    call: str,
    method: str = "",
    summary: str = "",
    paper: str = "",
    licence: str = "",
    repository: str = "",
    recipe: Mapping[str, Any] | None = None,
    trained_for: str = "",
    text: bool = False,
    adapter: bool = False,
    metrics: Mapping[str, float | str] | None = None,
) -> str:
    """The text of README.md.

    Args:
        teacher: its name, or its folder, of which only the last part is told.
        times: at which the student is called.
        noise: between them, see `samplers.few_step.FewStep`.
        call: arguments of the pipeline's call that draws an image, as Python code.
        method, summary, paper: of the distillation method.
        licence: of the teacher, under its usual name; "" if nobody knows.
        repository: of the teacher on the hub; "" for none.
        recipe: all settings of the run; those of the method tell the guidance that was folded in.
        trained_for: the conditions that it was trained for, in words.
        text: whether it draws prompts.
        adapter: whether it is also there as a LoRA adapter of the teacher.
        metrics: figures by name, see `with_metrics`.
    """
    name, calls = Path(teacher).name, len(times)
    several = "s" * (calls > 1)
    between = f", with {noise} noise in between" if several else ""
    scale = (recipe or {}).get("method", {}).get("guidance_scale") or 1.0
    guided = f"Guidance of scale {scale:g} is folded in. " if scale != 1.0 else ""
    code = _CODE.format(source=FOLDER) + f"image = pipe({call}).images[0]"
    more = "A `guidance_scale` above 1 guides it once more, at twice the cost. " if call else ""
    more += "Without one, negative prompts have no effect. " if text else ""
    parts = [
        f"---\n{to_yaml(_front_matter(licence, repository, method, text, adapter))}---\n",
        f"# {name} in {calls} step{several}\n",
        f"A student of {_link(name, repository)}, distilled with diffaccel. It draws an image in {calls} network "
        f"evaluation{several}, at the time{several} {', '.join(f'{t:g}' for t in times)}{between}.\n",
        "## Use\n",
        f"```python\n{code}\n```\n",
        "The pipeline carries the student's scheduler and list of times, so a call needs neither steps nor guidance. "
        f"{guided}{more}NFE is {calls} (a guidance pair would count as two).\n",
    ]
    if adapter:
        unguided = "" if "guidance_scale" in call else "guidance_scale=1.0"
        told = ", ".join(filter(None, [call, f"num_inference_steps={calls}", unguided]))
        code = _CODE.format(source=repository or TEACHER) + _ADAPTED.format(folder=FOLDER)
        parts += [
            "It is also here as a LoRA adapter, `pytorch_lora_weights.safetensors`, for the pipeline of its teacher:\n",
            f"```python\n{code}image = pipe({told}).images[0]\n```\n",
        ]
    facts = {
        "Teacher": _link(name, repository),
        "Licence of the teacher": licence or "unknown; ask whoever you have it from",
        "Method": f"{method}: {summary}" if summary else method,
        "Paper": paper,
        "Trained for": trained_for,
    }
    parts += ["## Training\n", "\n".join(f"- {key}: {value}" for key, value in facts.items() if value) + "\n"]
    if recipe:
        parts += ["All settings:\n", f"```yaml\n{to_yaml(recipe)}```\n"]
    return with_metrics("\n".join([*parts, _LIMITATIONS]), metrics or {})


def with_metrics(card: str, metrics: Mapping[str, float | str]) -> str:
    """A card with these figures in the place of any that it has; without figures it has no such section."""
    card = re.sub(rf"^{_MEASURED}.*?(?=^## )", "", card, flags=re.MULTILINE | re.DOTALL)
    if not metrics:
        return card
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in metrics.items()}
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
    section = f"{_MEASURED}\n| | |\n|---|---|\n{rows}\n\n"
    head, mark, tail = card.partition("## Limitations\n")
    return head + section + mark + tail


def _front_matter(licence: str, repository: str, method: str, text: bool, adapter: bool) -> dict[str, Any]:
    known = _LICENCES.get(licence, "other" if licence else "unknown")
    matter: dict[str, Any] = {"library_name": "diffusers", "license": known}
    if known == "other":
        matter["license_name"] = re.sub(r"[^a-z0-9.+]+", "-", licence.lower()).strip("-")
    if repository:
        matter |= {"base_model": repository, "base_model_relation": "adapter" if adapter else "finetune"}
    if text:
        matter["pipeline_tag"] = "text-to-image"
    tags = ["diffaccel", "distillation", "few-step", method, "text-to-image" if text else "", "lora" if adapter else ""]
    return {**matter, "tags": [tag for tag in tags if tag]}


def _link(name: str, repository: str) -> str:
    return f"[{name}](https://huggingface.co/{repository})" if repository else name
