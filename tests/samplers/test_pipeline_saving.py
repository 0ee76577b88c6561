"""A pipeline saved with one of our schedulers gives the same result in a fresh process."""

import json
from pathlib import Path

import pytest
from pipelines import IMAGE_TO_IMAGE, INPAINTING, PIPELINES, one_of_each_class
from safetensors.torch import save_file

from diffaccel.samplers.registry import SAMPLERS

STEPS = 3
PROGRAM = """
import json, sys
import diffaccel
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from pathlib import Path
from safetensors.torch import load_file
import pipelines

logging.disable_progress_bar()
root, errors = Path(sys.argv[1]), {}
for name, result in load_file(root / "expected.safetensors").items():
    table, key, sampler = name.split("/")
    case = getattr(pipelines, table)[key]
    index = json.loads((root / name / "model_index.json").read_text())
    absent = {part: None for part, value in index.items() if value == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(root / name, **absent)
    assert type(pipe).__name__ == index["_class_name"] and type(pipe.scheduler).__module__ == "diffaccel", name
    pipe.set_progress_bar_config(disable=True)
    for weight in getattr(pipe, case.network).parameters():
        weight.data = weight.data.clone()  # files leave them unaligned, which changes the last bits of a product
    errors[name] = float((case.call(pipe, int(sys.argv[2])) - result).abs().max())
print(json.dumps(errors))
"""


@pytest.fixture(scope="module", params=["classes", pytest.param("all", marks=pytest.mark.slow)])
def saved(tmp_path_factory, request) -> Path:
    """Every pipeline with one sampler of each class; or with all, and those that start from a picture with one of each."""
    root, expected = tmp_path_factory.mktemp("saved"), {}
    tables = {"PIPELINES": (PIPELINES, one_of_each_class())}
    if request.param == "all":
        tables = {
            "PIPELINES": (PIPELINES, SAMPLERS),
            "IMAGE_TO_IMAGE": (IMAGE_TO_IMAGE, one_of_each_class()),
            "INPAINTING": (INPAINTING, one_of_each_class()),
        }
    for table, (cases, samplers) in tables.items():
        for case in cases.values():
            for sampler in samplers:
                name = f"{table}/{case.name}/{sampler}"
                pipe = case.build(sampler)
                pipe.save_pretrained(root / name)
                expected[name] = case.call(pipe, STEPS).contiguous()
    save_file(expected, root / "expected.safetensors")
    return root


def test_saved_pipelines_load_in_a_fresh_process(saved, python):
    tests = Path(__file__).parents[1]
    done = python("-c", PROGRAM, saved, STEPS, cwd=tests)
    assert done.code == 0, done.err[-2000:]
    errors = json.loads(done.out.splitlines()[-1])
    assert len(errors) == len(list(saved.glob("*/*/*/model_index.json"))) >= len(PIPELINES) * len(one_of_each_class())
    assert {name: error for name, error in errors.items() if not error <= 1e-6} == {}


def test_a_saved_scheduler_names_only_this_package(saved):
    for path in saved.glob("*/*/*/model_index.json"):
        cls = SAMPLERS[path.parent.name].load().__name__
        assert json.loads(path.read_text())["scheduler"] == ["diffaccel", cls]
        config = json.loads((path.parent / "scheduler" / "scheduler_config.json").read_text())
        assert config["_class_name"] == cls
