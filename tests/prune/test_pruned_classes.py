"""Pruned models are saved and opened like any other, also in a process that knows nothing of them."""

import copy
import json
import subprocess
import sys

import diffusers
import pytest
import torch
from branches import inputs_of, own
from networks import tiny_unet
from pipelines import PIPELINES, check_close

import diffaccel
from diffaccel.core.errors import DataError, UsageError
from diffaccel.models.networks import network_of
from diffaccel.models.teachers import denoiser_of, load_denoiser, load_pipeline
from diffaccel.prune.classes import prune, pruned_class
from diffaccel.prune.operators import operators

_FRESH = """
import sys
sys.modules["torchvision"] = None
import torch
{imports}
inputs = torch.load(sys.argv[1], weights_only=True)
with torch.no_grad():
    found = {network}(*inputs["args"], **inputs["kwargs"])[0]
torch.save(found, sys.argv[2])
"""


def pruned_case(name):
    case = PIPELINES[name]
    pipe = own(case)
    inputs = inputs_of(case, pipe)
    network = network_of(pipe)
    names = list(operators(network))
    outer = [key for key in names if not any(key.startswith(f"{other}.") for other in names)]
    inner = [key for key in names if key not in outer and not any(key.startswith(f"{one}.") for one in outer[::2])]
    chosen = outer[::2] + inner[-1:]
    assert prune(pipe, chosen) is pipe
    return pipe, network, chosen, inputs


def plain(config) -> dict:
    """A configuration as it is in files."""
    return json.loads(json.dumps({key: value for key, value in config.items() if not key.startswith("_")}))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_saved_model_opens_as_it_was(name, tmp_path):
    _, network, chosen, (args, kwargs) = pruned_case(name)
    assert [record["name"] for record in network.config.pruned_layers] == chosen
    with torch.no_grad():
        want = network(*args, **kwargs)[0]
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == type(network).__name__ == "Pruned" + type(network)._unpruned.__name__
    assert config["pruned_layers"] == [dict(record) for record in network.config.pruned_layers]
    cls = getattr(diffaccel, config["_class_name"])
    assert cls is type(network) and cls.__module__ == "diffaccel"
    ways = [{}] if name == "wan" else [{}, {"low_cpu_mem_usage": False}]
    for settings in ways:
        opened = cls.from_pretrained(tmp_path, **settings)
        assert plain(opened.config) == plain(network.config)
        weights = opened.state_dict()
        assert list(weights) == list(network.state_dict())
        assert all(torch.equal(weights[key], value) for key, value in network.state_dict().items())
        with torch.no_grad():  # where weights lie in memory changes rounding, with the whole network too
            check_close(opened(*args, **kwargs)[0], want, 1e-6)


@pytest.mark.parametrize("name", ["sd", "classes", "dit", "ddpm"])
def test_a_saved_pipeline_runs_as_it_did(name, tmp_path):
    pipe, network, _, _ = pruned_case(name)
    case = PIPELINES[name]
    want = case.call(pipe, 2)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index[case.network] == ["diffaccel", type(network).__name__]
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    assert type(network_of(opened)) is type(network)
    check_close(case.call(opened, 2), want, 1e-5)
    assert type(network).__name__ in (tmp_path / case.network / "README.md").read_text()


@pytest.mark.parametrize("name", ["classes", pytest.param("dit", marks=pytest.mark.slow)])
def test_in_a_fresh_process(name, tmp_path):
    pipe, network, _, (args, kwargs) = pruned_case(name)
    pipe.save_pretrained(tmp_path / "pipe")
    torch.save({"args": args, "kwargs": kwargs}, tmp_path / "inputs.pt")
    with torch.no_grad():
        want = network(*args, **kwargs)[0]
    imports = f"""import diffaccel, diffusers
pipe = diffusers.DiffusionPipeline.from_pretrained({str(tmp_path / "pipe")!r})"""
    program = _FRESH.format(imports=imports, network=f"pipe.{PIPELINES[name].network}")
    subprocess.run(
        [sys.executable, "-c", program, tmp_path / "inputs.pt", tmp_path / "found.pt"], check=True, timeout=120
    )
    check_close(torch.load(tmp_path / "found.pt", weights_only=True), want, 1e-6)


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({"variant": "fp16"}, ["diffusion_pytorch_model.fp16.safetensors"]),
        ({"safe_serialization": False}, ["diffusion_pytorch_model.bin"]),
    ],
)
def test_how_a_pipeline_is_saved_holds_for_its_pruned_network(options, files, tmp_path):
    pipe, network, _, (args, kwargs) = pruned_case("sd")
    pipe.save_pretrained(tmp_path, **options)
    assert [path.name for path in (tmp_path / "unet").glob("diffusion*")] == files
    settings = {key: value for key, value in options.items() if key == "variant"}
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **settings)
    with torch.no_grad():
        check_close(opened.unet(*args, **kwargs)[0], network(*args, **kwargs)[0], 1e-6)


def test_a_compiled_pipeline(tmp_path):
    pipe = own(PIPELINES["sd"])
    network = pipe.unet
    pipe.unet = torch.compile(network, backend="eager")
    assert prune(pipe, ["mid_block.attentions.0"]) is pipe and pipe.unet._orig_mod is network
    pipe.save_pretrained(tmp_path)
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(opened.unet) is type(network) is diffaccel.PrunedUNet2DConditionModel


@pytest.mark.parametrize("name", ["sd", "dit", "flux"])
def test_nothing_is_called_like_what_is_gone(name):
    """Adapters such as LoRA find layers by the names of modules; of one that is gone only the weights' name is left."""
    _, network, chosen, _ = pruned_case(name)
    whole = network_of(PIPELINES[name].build())
    modules, weights = dict(network.named_modules()), network.state_dict()
    for layer in chosen:
        inside = [key for key, _ in whole.named_parameters() if key.startswith(f"{layer}.")]
        empty = [key for key in inside if key in weights and not weights[key].numel()]
        assert len(empty) == 1
        gone = {key.rpartition(".")[0] for key in inside if key not in weights or key in empty} - {layer}
        assert gone and not any(key in modules and [*modules[key].state_dict()] == [] for key in gone), layer
        assert empty[0].rpartition(".")[0] not in modules


def test_weights_of_the_whole_model_are_refused():
    _, network, _, _ = pruned_case("classes")
    weights = network.state_dict()
    assert network.load_state_dict(weights).missing_keys == []
    whole = PIPELINES["classes"].build().unet.state_dict()
    with pytest.raises(RuntimeError, match="has weights, but the ResnetBlock2D they belong to is gone"):
        network.load_state_dict({key: whole[key] for key in weights})
    (key, *_) = [key for key, value in weights.items() if not value.numel()]
    with pytest.raises(RuntimeError, match="Missing key"):
        network.load_state_dict({name: value for name, value in weights.items() if name != key})


def test_the_plain_class_refuses_it(tmp_path):
    """Instead of random weights where layers are missing."""
    _, network, _, _ = pruned_case("classes")
    network.save_pretrained(tmp_path)
    for settings in ({}, {"low_cpu_mem_usage": False}):
        with pytest.raises((ValueError, RuntimeError), match=r"(?s)(shape.*\[0\]|size mismatch)"):
            diffusers.UNet2DModel.from_pretrained(tmp_path, **settings)
    assert "import diffaccel" in (tmp_path / "README.md").read_text()


def test_a_pipeline_without_the_package_names_it(tmp_path):
    pipe, _, _, _ = pruned_case("ddpm")
    pipe.save_pretrained(tmp_path)
    program = f"""
import sys
sys.modules["torchvision"] = sys.modules["diffaccel"] = None
import diffusers
diffusers.DiffusionPipeline.from_pretrained({str(tmp_path)!r})"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode and "diffaccel" in done.stderr.strip().splitlines()[-1], done.stderr


def test_other_precision_and_several_files(tmp_path):
    _, network, _, (args, kwargs) = pruned_case("sd")
    network.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    opened = type(network).from_pretrained(tmp_path, torch_dtype=torch.float64)
    args = [one.double() if torch.is_tensor(one) and one.is_floating_point() else one for one in args]
    kwargs = {key: one.double() if torch.is_tensor(one) else one for key, one in kwargs.items()}
    with torch.no_grad():
        check_close(opened(*args, **kwargs)[0], network.double()(*args, **kwargs)[0], 1e-9)


def test_nothing_removed_is_the_model_itself(tmp_path):
    network = tiny_unet()
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        want = network(x, 5, labels).sample
        config = dict(network.config)
        assert prune(network, []) is network
        check_close(network(x, 5, labels).sample, want, 0)
    assert dict(network.config) == config | {"pruned_layers": []}


def test_pruned_again():
    """What is removed later replaces what was removed inside it."""
    _, network, _, (args, kwargs) = pruned_case("sd")
    network = prune(copy.deepcopy(PIPELINES["sd"].build().unet), ["mid_block.attentions.0.transformer_blocks.0.ff"])
    cls = type(network)
    prune(network, ["mid_block.attentions.0", "mid_block.resnets.0"])
    assert type(network) is cls
    names = [record["name"] for record in network.config.pruned_layers]
    assert names == ["mid_block.attentions.0", "mid_block.resnets.0"]
    other = cls.from_config(network.config)
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        check_close(other(*args, **kwargs)[0], network(*args, **kwargs)[0], 0)


@pytest.mark.parametrize("name", ["digits", "digits-flow"])
def test_a_pruned_teacher_is_a_teacher(name, tmp_path):
    """Opened by this package's loader, as a denoiser, trained without labels dropped, copied."""
    pipe = load_pipeline(name)
    names = list(operators(pipe.network))
    prune(pipe, names[:1])
    denoiser = denoiser_of(pipe)
    x, t = torch.randn(2, *denoiser.sample_shape), torch.tensor([500.0, 100.0])
    condition = {"class_labels": torch.tensor([3, 7])}
    with torch.no_grad():
        want = denoiser(x, t, condition)
        pipe.save_pretrained(tmp_path)
        opened = load_denoiser(str(tmp_path))
        check_close(opened(x, t, condition), want, 0)
        check_close(opened.clone().train()(x, t, condition), want, 1e-6)
        check_close(opened.forward_with_features(x, t, condition)[0], want, 0)


def test_class_names():
    assert diffaccel.PrunedUNet2DModel is pruned_class(diffusers.UNet2DModel)
    assert diffaccel.PrunedFluxTransformer2DModel._unpruned is diffusers.FluxTransformer2DModel
    assert pruned_class(diffaccel.PrunedUNet2DModel) is diffaccel.PrunedUNet2DModel
    for wrong in ("PrunedNothing", "PrunedDDIMScheduler"):
        with pytest.raises(AttributeError, match=wrong):
            getattr(diffaccel, wrong)
    with pytest.raises(UsageError, match="models of diffusers"):
        prune(torch.nn.Linear(1, 1), [])


def test_adapters_go_first():
    network = tiny_unet()
    network._hf_peft_config_loaded = True  # as diffusers notes it
    with pytest.raises(UsageError, match="fuse LoRA"):
        prune(network, ["mid_block.resnets.0"])
    assert type(network) is diffusers.UNet2DModel


def test_a_damaged_list_of_layers():
    config = dict(tiny_unet().config)
    with pytest.raises(DataError, match="pruned_layers of this PrunedUNet2DModel: Unknown removable layer"):
        diffaccel.PrunedUNet2DModel.from_config(config | {"pruned_layers": [{"name": "nothing"}]})
    with pytest.raises(DataError, match="list of names"):
        diffaccel.PrunedUNet2DModel.from_config(config | {"pruned_layers": "mid_block"})
