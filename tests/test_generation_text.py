"""Text-to-image pipelines draw prompts in turn, each image from seed and index only, as the stock pipeline would."""

import diffusers
import pytest
import torch
from pipelines import PIPELINES

from diffaccel import APG, CFG, AutoGuidance, Interval, PerpNeg
from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.rng import KeyedRandom
from diffaccel.generation import DEFAULT_STEPS, generate
from diffaccel.guidance.attach import guide
from diffaccel.models.conditioning import conditioning_of

PROMPTS = ["red apple", "grinning face", "umbrella"]


@pytest.fixture(scope="module")
def pipe():
    """Stable Diffusion of a few thousand weights; its decoder is turned up until images differ in 8 bits too."""
    import copy

    pipe = copy.deepcopy(PIPELINES["sd"].build())
    torch.manual_seed(1)
    for weight in (pipe.unet.conv_out.weight, *(p for n, p in pipe.unet.named_parameters() if "attn2" in n)):
        torch.nn.init.normal_(weight, std=0.5)
    torch.nn.init.normal_(pipe.vae.decoder.conv_out.weight, std=0.2)
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    return pipe


@pytest.fixture
def draw(pipe):
    """`draw(7, steps=2)`: uint8 images of the three prompts in turn."""

    def draw(num=7, **settings):
        settings = {"prompts": PROMPTS, "steps": 2, **settings}
        batches = list(generate(settings.pop("model", pipe), num, **settings))
        assert all(labels is None for _, labels in batches)
        return torch.cat([images for images, _ in batches])

    return draw


def test_prompts_come_in_turn(pipe, draw):
    drawing = generate(pipe, 7, steps=2, prompts=PROMPTS)
    assert drawing.prompts == [*PROMPTS, *PROMPTS, PROMPTS[0]] and drawing.shape == (3, 8, 8)
    images = next(drawing)[0]
    assert images.dtype == torch.uint8 and images.shape == (7, 3, 8, 8)
    alone = draw(7, prompts="grinning face")
    same = [bool((images[i].int() - alone[i].int()).abs().max() <= 1) for i in range(7)]
    assert same == [i % 3 == 1 for i in range(7)]


@pytest.mark.parametrize("guidance", [None, APG(5.0), Interval(CFG(6.0), sigma_range=(0.3, 5.0)), PerpNeg(4.0, "leaf")])
@pytest.mark.parametrize("sampler", [None, "deis-sde"])
def test_neither_batches_nor_shards_change_images(draw, sampler, guidance):
    settings = {"sampler": sampler, "guidance": guidance, "steps": 3}
    whole, parts = draw(**settings), draw(**settings, batch_size=3)
    assert (whole.int() - parts.int()).abs().max() <= 1
    assert torch.equal(draw(**settings, batch_size=3, shard=(1, 2)), parts[3:6])


def test_seeds_negatives_and_scales_matter(draw):
    base = draw()
    assert torch.equal(base, draw()) and torch.equal(base, draw(guidance_scale=7.5))  # the pipeline's own scale
    for other in ({"seed": 1}, {"guidance_scale": 1.0}, {"guidance_scale": 3.0}, {"negative_prompt": "leaf"}):
        assert not torch.equal(base, draw(**other)), other


@pytest.mark.parametrize("sampler", [None, "deis"])
@pytest.mark.parametrize("arguments", [{}, {"guidance_scale": 3.0, "negative_prompt": "leaf"}, {"guidance_scale": 1.0}])
def test_images_are_those_of_the_stock_pipeline(pipe, sampler, arguments):
    """The same noise, prompts and scheduler, before 8 bits."""
    from diffaccel.samplers.registry import get_sampler

    seen = []
    drawing = generate(pipe, 3, steps=4, seed=5, prompts=PROMPTS, sampler=sampler, **arguments)
    own, convert = pipe.scheduler, pipe.image_processor.postprocess
    try:
        pipe.image_processor.postprocess = lambda *a, **k: seen.append(convert(*a, **k)) or seen[-1]
        next(drawing)
        drawing.close()
        pipe.scheduler = get_sampler(sampler).build(own.config) if sampler else own
        noise = KeyedRandom(5).normal("sample", 0, 0, 3, (4, 8, 8))
        negative = [arguments.get("negative_prompt", "")] * 3
        call = {"num_inference_steps": 4, "output_type": "pt", "latents": noise}
        call["guidance_scale"] = arguments.get("guidance_scale", 7.5)
        stock = pipe(PROMPTS, negative_prompt=negative, **call).images
    finally:
        pipe.scheduler = own
        del pipe.image_processor.postprocess
    assert (seen[0] - stock).abs().max() <= 1e-5


def test_rules_replace_the_guidance_of_the_pipeline(pipe, draw):
    assert (draw(guidance_scale=4.0).int() - draw(guidance=CFG(4.0)).int()).abs().max() <= 1
    named = {"guidance": "apg", "guidance_scale": 3, "guidance_options": {"apg": {"eta": 1, "momentum": 0}}}
    assert torch.equal(draw(**named), draw(guidance=APG(3, eta=1, momentum=0)))
    noise = KeyedRandom(0).normal("sample", 0, 0, 3, (4, 8, 8))
    with guide(pipe, APG(9.0)):
        images = pipe(PROMPTS, latents=noise, num_inference_steps=2, output_type="pt").images
    assert (draw(3, guidance=APG(9.0)).int() - (255 * images).round().int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("settings", "calls"), [({"guidance_scale": 1.0}, 1), ({}, 2), ({"guidance": PerpNeg(4.0, "leaf")}, 3)]
)
def test_budgets_and_costs_are_those_of_the_rows_computed(pipe, settings, calls, monkeypatch):
    from diffaccel.generation import progress_bar

    rows, moves, bar = [], [], progress_bar(4, False)
    monkeypatch.setattr(bar, "update", lambda share: moves.append(share))
    hook = pipe.unet.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    try:
        drawing = generate(pipe, 4, sampler="deis", nfe=10, prompts=PROMPTS, batch_size=3, progress=bar, **settings)
        list(drawing)
    finally:
        hook.remove()
    assert drawing.steps == 10 // calls and drawing.nfe == calls * drawing.steps
    assert sum(rows) == 4 * drawing.nfe and sum(moves) == pytest.approx(4)


def test_defaults(pipe):
    drawing = generate(pipe, 1, prompts="apple")
    assert (drawing.steps, drawing.scale, drawing.nfe) == (DEFAULT_STEPS, 7.5, 2 * DEFAULT_STEPS)


def test_half_precision_takes_noise_of_its_own(pipe):
    import copy

    half = copy.deepcopy(pipe).to(torch.bfloat16)
    assert next(generate(half, 2, steps=1, prompts=PROMPTS))[0].shape == (2, 3, 8, 8)


def test_a_folder_brings_its_prompts(pipe, draw, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="needs prompts"):
        generate(tmp_path, 4)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    drawing = generate(tmp_path, 4, steps=2, device="cpu")
    assert drawing.prompts == [*PROMPTS, PROMPTS[0]]
    assert (next(drawing)[0].int() - draw(4).int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": None}, "needs prompts"),
        ({"prompts": []}, "needs prompts"),
        ({"prompts": ["apple", None]}, "texts.*got None"),
        ({"prompts": [3]}, "texts.*got 3"),
        ({"negative_prompt": ["leaf"]}, "texts"),
        ({"classes": [1]}, "has no classes"),
        ({"guidance_scale": 0.5}, "above 1"),
        ({"guidance_scale": 1.0, "negative_prompt": "leaf"}, "no effect without guidance"),
        ({"guidance": PerpNeg(3.0, 3)}, "are prompts"),
        ({"guidance": PerpNeg(3.0, "leaf"), "negative_prompt": "leaf"}, "not both"),
        ({"sampler": "deis", "nfe": 1, "steps": None}, "at least 2"),
        ({"nfe": 10, "steps": None}, "name a sampler"),
    ],
)
def test_impossible_requests(draw, settings, words):
    with pytest.raises(UsageError, match=words):
        draw(**settings)


def test_a_weak_model_has_to_read_texts_of_that_width(pipe):
    from networks import tiny_unet

    with pytest.raises(UsageError, match="text of width 16"):
        generate(pipe, 1, prompts="apple", guidance=AutoGuidance(2.0, tiny_unet(10)))


def test_class_models_read_no_text():
    for settings in ({"prompts": ["apple"]}, {"negative_prompt": "leaf"}):
        with pytest.raises(UsageError, match="draws classes and reads no text"):
            generate("digits", 1, **settings)


@pytest.mark.parametrize("name", ["image-to-image-sd", "sd3", "dit"])
def test_other_pipelines_are_named(name):
    from pipelines import GUIDED

    with pytest.raises(DataError, match="Stable Diffusion's layout"):
        conditioning_of(GUIDED[name].build(), prompts="apple")
