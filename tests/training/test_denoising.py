"""Training of pixel teachers: both kinds of network, on the bundled digits."""

import json

import pytest
import torch

import diffaccel
from diffaccel.core.errors import UsageError
from diffaccel.core.rng import KeyedRandom
from diffaccel.models.pipeline import ClassConditionalPipeline
from diffaccel.training.denoising import Denoising
from diffaccel.training.flow_matching import FlowMatching
from diffaccel.training.method import Draw, Phase

SMALL = {
    "u-net": lambda: Denoising(Denoising.Config(channels=(8, 16), sampling_steps=2), 0),
    "transformer": lambda: FlowMatching(FlowMatching.Config(layers=2, heads=2, head_dim=8, sampling_steps=2), 0),
}


@pytest.fixture(params=SMALL)
def method(request):
    return SMALL[request.param]()


def draw(step: int = 0, start: int = 0, count: int = 8) -> Draw:
    return Draw(KeyedRandom(0), "denoise/0", step, start, count, 8, torch.device("cpu"))


def test_the_loss_is_the_same_whenever_it_is_taken_and_however_it_is_split(method):
    phase = Phase("denoise", ("model",))
    method.roles["model"].train()
    whole = method.loss(phase, draw()).total
    assert torch.equal(whole, method.loss(phase, draw()).total)  # no random number but the keyed ones
    halves = [method.loss(phase, draw(start=start, count=4)).total for start in (0, 4)]
    assert torch.allclose(whole, sum(halves) / 2, rtol=1e-5)


def test_the_exported_pipeline_opens_and_draws(method, tmp_path):
    model = method.roles["model"]
    method.export(model, tmp_path)
    images, labels = next(diffaccel.generate(tmp_path, 12, guidance_scale=2.0))
    assert images.shape == (12, 1, 8, 8) and labels.tolist() == [*range(10), 0, 1]
    again = diffaccel.load_denoiser(tmp_path)
    assert type(again.net) is type(model.net) and again.num_classes == 10
    assert (again.schedule.t_max, again.prediction_type) == (model.schedule.t_max, model.prediction_type)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([900.0, 500.0, 10.0])
    condition = {"class_labels": torch.tensor([1, 2, 10])}
    with torch.no_grad():
        assert torch.allclose(again.eval()(x, t, condition), model.eval()(x, t, condition), atol=1e-6)
        assert torch.equal(again.train()(x, t, condition), again.eval()(x, t, condition))  # no label is dropped unasked
    assert method.samples(model, KeyedRandom(0)).shape == (100, 1, 8, 8)


def test_every_sampler_and_guidance_rule_takes_a_flow_transformer(tmp_path, capsys):
    method = SMALL["transformer"]()
    method.export(method.roles["model"], tmp_path)
    for sampler in ("deis", "flow-adams", "ghvb", "unipc"):
        drawn = diffaccel.generate(tmp_path, 2, sampler=sampler, nfe=12, guidance="apg", guidance_scale=4.0)
        assert drawn.nfe <= 12 and next(drawn)[0].shape == (2, 1, 8, 8)
    assert "ignored" not in capsys.readouterr().err
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"] and index["unet"] == [None, None]


def test_a_pipeline_has_one_network(method):
    net, scheduler = method.roles["model"].net, method.scheduler
    pipeline = ClassConditionalPipeline.of(net, scheduler)
    assert pipeline.network is net and pipeline.num_classes == 10
    with pytest.raises(UsageError, match="either"):
        ClassConditionalPipeline(None, scheduler)
    with pytest.raises(UsageError, match="either"):
        ClassConditionalPipeline(net, scheduler, transformer=net)


def test_features_of_a_transformer_are_maps():
    model = SMALL["transformer"]().roles["model"].eval()
    x, t, labels = torch.randn(2, 1, 8, 8), torch.full((2,), 500.0), {"class_labels": torch.tensor([0, 1])}
    with torch.no_grad():
        x0, features = model.forward_with_features(x, t, labels)
        assert torch.equal(x0, model(x, t, labels))
    assert [tuple(f.shape) for f in features] == [(2, 16, 4, 4)] * 2 and all(f.is_contiguous() for f in features)
    tokens = model.net.transformer_blocks[0]  # row by row, as the patches are
    kept = []
    hook = tokens.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        model(x, t, labels)
    hook.remove()
    assert torch.equal(kept[0][:, 5], features[0][:, :, 1, 1])


def test_an_unknown_data_set_names_the_known_ones():
    with pytest.raises(UsageError, match="mnist"):
        Denoising(Denoising.Config(data="cifar"), 0)
