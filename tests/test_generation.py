"""Generated images depend on seed and index only."""

import pytest
import torch

from diffaccel.core.errors import UsageError
from diffaccel.generation import generate
from diffaccel.models.teachers import load_pipeline


def drawn(**settings) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*generate(settings.pop("model", "digits"), settings.pop("num", 7), **settings), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("sampler", ["ddim", "deis"])
def test_batch_size_does_not_change_images(sampler):
    one, labels = drawn(steps=3, sampler=sampler, batch_size=1)
    all_at_once, _ = drawn(steps=3, sampler=sampler, batch_size=7)
    # Convolutions of other batch sizes round differently; a grey level of 255 may flip where it falls on a half.
    assert (one.int() - all_at_once.int()).abs().max() <= 1
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_seeds_classes_and_guidance_matter():
    base, _ = drawn(steps=2)
    assert torch.equal(base, drawn(steps=2)[0])
    assert not torch.equal(base, drawn(steps=2, seed=1)[0])
    assert drawn(steps=2, classes=[8, 3])[1].tolist() == [8, 3, 8, 3, 8, 3, 8]
    assert not torch.equal(base, drawn(steps=2, guidance_scale=3.0)[0])


def test_the_scheduler_of_an_opened_pipeline_is_left_as_it_was():
    pipeline = load_pipeline("digits")
    own = pipeline.scheduler
    drawn(model=pipeline, sampler="ddim", steps=1)
    assert pipeline.scheduler is own


@pytest.mark.parametrize(
    ("settings", "word"), [({"num": 0}, "num"), ({"steps": 0}, "steps"), ({"classes": [10]}, "classes")]
)
def test_impossible_requests(settings, word):
    with pytest.raises(UsageError, match=word):
        drawn(**settings)
