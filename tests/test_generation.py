"""Generated images depend on seed and index only."""

import pytest
import torch

from diffaccel.core.errors import UsageError
from diffaccel.generation import generate
from diffaccel.models.teachers import load_pipeline


def drawn(**settings) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*generate(settings.pop("model", "digits"), settings.pop("num", 7), **settings), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("sampler", ["flow-adams", "deis", "deis-sde"])
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


def test_a_budget_counts_guidance_pairs_twice():
    assert torch.equal(drawn(sampler="deis", nfe=5)[0], drawn(sampler="deis", steps=5)[0])
    guided = {"sampler": "rho-heun", "guidance_scale": 2.0}
    assert torch.equal(drawn(nfe=11, **guided)[0], drawn(steps=3, **guided)[0])  # 2·(2·2 + 1) calls


def test_samplers_take_options_and_are_told_of_guidance():
    options = {"solver_order": 1}
    assert torch.equal(
        drawn(sampler="deis", steps=4, sampler_options=options)[0],
        drawn(sampler="ipndm", steps=4, sampler_options=options)[0],
    )
    guided = {"sampler": "flow-adams", "steps": 4, "guidance_scale": 7.5}
    assert torch.equal(drawn(**guided)[0], drawn(**guided, sampler_options={"guidance_scale": 7.5})[0])
    assert not torch.equal(drawn(**guided)[0], drawn(**guided, sampler_options={"guidance_scale": 1.0})[0])


def test_the_scheduler_of_an_opened_pipeline_is_left_as_it_was():
    pipeline = load_pipeline("digits")
    own = pipeline.scheduler
    drawn(model=pipeline, sampler="ddim", steps=1)
    assert pipeline.scheduler is own


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num": 0}, "num"),
        ({"steps": 0}, "steps"),
        ({"classes": [10]}, "classes"),
        ({"steps": 4, "nfe": 4}, "not both"),
        ({"sampler": "deis", "nfe": 0}, "at least 1"),
        ({"sampler": "deis", "nfe": 1, "guidance_scale": 3.0}, "at least 2"),
        ({"sampler_options": {"eta": 1.0}}, "name one"),
        ({"sampler": "ddim", "sampler_options": {"etta": 1.0}}, "Did you mean 'eta'"),
    ],
)
def test_impossible_requests(settings, word):
    with pytest.raises(UsageError, match=word):
        drawn(**settings)
