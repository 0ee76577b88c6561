"""final/ opens in plain diffusers once `import diffaccel` ran, whoever was imported first; before, diffusers says why not."""

import numpy as np
import pytest
from PIL import Image

IMPORTS = {
    "diffaccel first": "import diffaccel, diffusers",
    "after a failure": """
import sys, diffusers
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except Exception as error:
    assert "ClassConditionalPipeline" in str(error), error
    assert not any(name.split(".")[0] == "diffaccel" for name in sys.modules)
else:
    raise AssertionError("opened without diffaccel")
import diffaccel
""",
}
GENERATE = """
import sys, numpy, torch
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
calls = []
pipe.unet.register_forward_hook(lambda *_: calls.append(1))
from diffaccel.core.rng import KeyedRandom
noise = KeyedRandom(3).normal("sample", 0, 0, 10, (1, 8, 8))
images = pipe(class_labels=list(range(10)), noise=noise, output_type="np").images
numpy.save(sys.argv[2], (images * 255).round().astype("uint8"))
print(len(calls), type(pipe).__name__, type(pipe.scheduler).__name__)
"""


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_one_network_call_and_the_images_of_the_command_line(python, run, tiny_run, tmp_path, imports):
    done = python("-c", imports + GENERATE, tiny_run / "final", tmp_path / "images.npy")
    assert done.code == 0, done.err
    assert done.out.split()[:2] == ["1", "ClassConditionalPipeline"]
    run("sample", tiny_run / "final", "--num", 10, "--seed", 3, "-o", tmp_path / "cli")
    drawn = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "cli").glob("*.png"))]
    difference = np.load(tmp_path / "images.npy")[..., 0].astype(int) - np.stack(drawn)
    assert np.abs(difference).max() <= 1  # a level apart where half a level is rounded
