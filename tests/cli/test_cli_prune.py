"""`diffaccel prune`: the run folder, what opens from it, resuming, and what is refused."""

import json
import os
import shutil
import signal

import diffusers
import pytest
import torch
from branches import own
from pipelines import PIPELINES
from test_cli_interrupted import stop_after

import diffaccel
from diffaccel.core.files import verify_manifest
from diffaccel.models.teachers import load_pipeline
from diffaccel.prune.scores import CRITERIA

WEIGHTS = "final/unet/diffusion_pytorch_model.safetensors"
STEPS = 6


def command(folder, *more) -> tuple:
    """A pruning of seconds, with a recovery and a checkpoint every second step."""
    return ("prune", "--model", "digits", "--ratio", 0.35, "--samples", 4, "--steps", 2, "--num", 60, "--repeats", 0,
            "--curve", "0.2", "--recover", STEPS, "--quiet", "--set", "trainer.batch_size=8", "--set", "method.pool=16",
            "--set", "method.pool_steps=2", "--set", "trainer.checkpoint_every=2", "-o", folder, *more)  # fmt: skip


def brief(folder, *more) -> tuple:
    """Scores and surgery alone."""
    return ("prune", "--model", "digits", "--samples", 2, "--steps", 2, "--num", 0, "--repeats", 0, "--curve", "",
            "--quiet", "-o", folder, *more)  # fmt: skip


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of a finished run, and what was printed; read it, do not change it."""
    folder = tmp_path_factory.mktemp("prune") / "run"
    return folder, run(*command(folder))


def test_run_folder(whole):
    folder, done = whole
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "run.json", "scores.jsonl", "distances.jsonl", "plan.json", "metrics.jsonl", "samples", "checkpoints",
        "final", "scores.png", "tradeoff.png", "tradeoff.json", "report.json", "report.html",
    }  # fmt: skip
    assert verify_manifest(folder / "final") == [] and done.err == ""
    report = json.loads((folder / "report.json").read_text())
    assert [point["ratio"] for point in report["tradeoff"]] == [0.0, 0.2, 0.35]
    assert report["tradeoff"] == json.loads((folder / "tradeoff.json").read_text())
    assert report["distance"] == "FD-digits64" and report["recovered"]["fd"] != report["pruned"]["fd"]
    assert report["whole"]["parameters"] == 177_553 and report["pruned"]["parameters"] <= 0.65 * 177_553
    assert "177,553" in done.out and "recovered" in done.out and "Finished:" in done.out
    assert "<svg" in (folder / "report.html").read_text()
    card = (folder / "final" / "README.md").read_text()
    assert "import diffaccel" in card and "| recovered |" in card and "mid_block" in card
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"recover/output", "recover/features"} <= set(logged[1]) and "validation/output" in logged[0]


def test_what_it_leaves_opens_like_any_other(whole):
    folder, _ = whole
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "final")
    plan = json.loads((folder / "plan.json").read_text())
    assert type(pipe.unet) is diffaccel.PrunedUNet2DModel
    assert [dict(one)["name"] for one in pipe.unet.config.pruned_layers] == [one["name"] for one in plan["removed"]]
    assert sum(weight.numel() for weight in pipe.unet.parameters()) == plan["after"]["parameters"]
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[3, 1], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 1, 8, 8) and bool(torch.isfinite(images).all())
    assert pipe.config.num_inference_steps == load_pipeline("digits").config.num_inference_steps


def test_nothing_removed_is_the_model_itself(run, tmp_path):
    run(*brief(tmp_path / "run", "--ratio", 0))
    pipe, teacher = load_pipeline(str(tmp_path / "run" / "final")), load_pipeline("digits")
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [one(noise=noise, num_inference_steps=3, output_type="pt").images for one in (pipe, teacher)]
    assert torch.equal(*images)
    assert "Nothing." in (tmp_path / "run" / "final" / "README.md").read_text()


@pytest.mark.parametrize("method", CRITERIA)
def test_every_method(run, method, tmp_path):
    done = run(*brief(tmp_path / "run", "--method", method, "--ratio", 0.2, "--cost", "macs", "--json"))
    told = json.loads(done.out)
    assert told["pruned"]["macs"] <= 0.8 * told["whole"]["macs"] and told["distance"] is None
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["method"], plan["select"]) == (method, CRITERIA[method].solver)
    assert told["plan"] == str(tmp_path / "run" / "plan.json") and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("way", ["searched", "iterative"])
def test_joint_ways_to_select(run, way, tmp_path):
    run(*brief(tmp_path / "run", "--ratio", 0.3, "--select", way, "--evaluations", 6, "--seed", 2))
    lines = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert any("+" in line.get("key", "") for line in lines), "joint losses are written down, too"


def test_latency_is_decided_once(run, cli, tmp_path, monkeypatch):
    """A run that is continued does not measure again what was decided by the first measurement."""
    from diffaccel import pruning

    folder = tmp_path / "run"
    arguments = [*brief(folder, "--ratio", 0.2, "--cost", "latency"), "--repeats", 1]
    survey_network = pruning.survey_network
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "save_pipeline", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert cli(*arguments).code == 143
    plan = json.loads((folder / "plan.json").read_text())

    def slower(*given):
        from dataclasses import replace

        found = survey_network(*given)
        slow = [replace(one, seconds=one.seconds * (7 if i % 2 else 1)) for i, one in enumerate(found.candidates)]
        return replace(found, candidates=tuple(slow))

    monkeypatch.setattr(pruning, "survey_network", slower)
    run(*arguments, "--resume")
    again = json.loads((folder / "plan.json").read_text())
    assert [one["name"] for one in again["removed"]] == [one["name"] for one in plan["removed"]]


def test_interrupted_while_scoring(run, cli, tmp_path, monkeypatch):
    from diffaccel.prune.criteria import Laptop

    folder, loss, calls = tmp_path / "run", Laptop.loss, []

    def stopped(self, names):
        calls.append(names)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, names)

    monkeypatch.setattr(Laptop, "loss", stopped)
    done = cli(*brief(folder, "--ratio", 0.2))
    assert done.code == 130 and done.err.count("\n") == 1 and "repeat the command with --resume" in done.err
    assert not (folder / "final").exists() and not (folder / ".lock").exists()
    before = len(calls)
    run("prune", "-o", folder, "--resume", "--quiet")
    assert len(calls) - before == 12 - 4, "four of twelve scores were in the file"
    assert (folder / "final" / "model_index.json").is_file()


def test_interrupted_while_recovering_is_bit_identical(run, cli, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        stopped = cli(*command(folder))
    assert stopped.code == 143 and f"step 3 of {STEPS}" in stopped.err and "--resume" in stopped.err
    done = run("prune", "-o", folder, "--resume", "--quiet")
    assert done.out.replace(str(folder), str(whole[0])) == whole[1].out
    assert (folder / WEIGHTS).read_bytes() == (whole[0] / WEIGHTS).read_bytes()


def test_resume_of_a_finished_run_measures_it_again(run, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    (folder / "report.json").unlink()
    done = run("prune", "-o", folder, "--resume", "--quiet")
    assert done.out.replace(str(folder), str(whole[0])) == whole[1].out and (folder / "report.json").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--ratio", 0.5), "pruning.ratio: 0.35 -> 0.5"),
        (("--features", "plain"), "method.features: 'normalized' -> 'plain'"),
        (("--recover", 9), "trainer.steps: 6 -> 9"),
        (("--model", "mnist"), "'digits' -> 'mnist'"),
    ],
)
def test_resume_with_other_settings_lists_them(cli, whole, change, words):
    refused = cli("prune", "-o", whole[0], "--resume", "--quiet", *change)
    assert refused.code == 2 and words in refused.err, refused


@pytest.mark.parametrize(
    ("code", "words", "arguments"),
    [
        (2, "Say what to prune", ()),
        (2, ["Unknown teacher", "digits"], ("--model", "digit")),
        (3, "There is no model folder", ("--model", "no/such/model")),
        (4, "not on this machine", ("--model", "sd15")),
        (2, "from 0 to below 1", ("--model", "digits", "--ratio", 1.2)),
        (2, ["At most 0.", "got a ratio of 0.95", "always stay"], ("--model", "digits", "--ratio", 0.95)),
        (2, "Unknown pruning method 'ld'", ("--model", "digits", "--method", "ld")),
        (2, "Unknown cost", ("--model", "digits", "--cost", "size")),
        (2, "Unknown way to select", ("--model", "digits", "--select", "best")),
        (2, "--curve takes ratios", ("--model", "digits", "--curve", "some")),
        (2, "have no effect without one", ("--model", "digits", "--features", "plain")),
        (2, "Unknown method.features 'some'", ("--model", "digits", "--recover", 5, "--features", "some")),
        (2, "method.pol", ("--model", "digits", "--recover", 5, "--set", "method.pol=3")),
        (3, "No data set or image folder", ("--model", "digits", "--recover", 5, "--data", "nowhere")),
        (3, "nowhere", ("--model", "digits", "--reference", "nowhere")),
        (3, "digits64 reads 1×8×8 images", ("--model", "mnist", "--reference", "digits")),
        (2, "--resume needs the run's folder", ("--resume",)),
        (2, "holds no run to resume", ("--resume", "-o", "empty")),
        (2, "torch can use here", ("--model", "digits", "--device", "gpu")),
    ],
)
def test_refused_with_one_sentence(refuse, code, words, arguments, tmp_path):
    refuse(code, words, "prune", *arguments)
    assert not (tmp_path / "runs").exists(), "nothing was written"


def test_other_folders_are_refused(refuse, tiny_run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refuse(2, "is not empty", "prune", "--model", "digits", "-o", "full")
    refuse(2, "holds another kind of run", "prune", "--resume", "-o", tiny_run)


def test_a_model_of_which_everything_went_already(refuse, tmp_path):
    pipe = load_pipeline("digits")
    from diffaccel.prune.classes import prune
    from diffaccel.prune.operators import operators

    names = list(operators(pipe.unet))
    prune(pipe, names)
    pipe.save_pretrained(tmp_path / "nothing-left")
    refuse(2, "At most 0 of the parameters", "prune", "--model", tmp_path / "nothing-left", "--num", 0)


def test_damaged_files_of_a_run(cli, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    (folder / "scores.jsonl").write_text("nonsense\n")
    refused = cli("prune", "-o", folder, "--resume", "--quiet")
    assert refused.code == 3 and "scores.jsonl is not the journal of a scoring" in refused.err


def test_a_pruned_model_is_pruned_further_and_drawn_from(run, whole, tmp_path):
    """Composition: its folder is a model like any other for every command."""
    run(*brief(tmp_path / "again", "--model", whole[0] / "final", "--ratio", 0.1))
    again = load_pipeline(str(tmp_path / "again" / "final")).unet.config.pruned_layers
    assert len(again) > len(load_pipeline(str(whole[0] / "final")).unet.config.pruned_layers)
    run("sample", tmp_path / "again" / "final", "-n", 4, "--steps", 2, "--grid", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()
    run("evaluate", "fid", tmp_path / "again" / "final", "digits", "--num", 60, "--steps", 2)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
def test_a_latent_model_of_classes(run, refuse, tmp_path):
    """Scored on all classes in turn; no distance, since its images cannot be drawn here, and that is said."""
    own(PIPELINES["dit"]).save_pretrained(tmp_path / "dit")
    arguments = [*brief(tmp_path / "run", "--model", tmp_path / "dit", "--ratio", 0.1), "--num", 4]
    refuse(3, "This is a DiTPipeline", *arguments, "--reference", "digits")
    done = run(*arguments)
    assert "No Fréchet distance" in done.out and "1 layer, chosen" in (tmp_path / "run/final/README.md").read_text()
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run" / "final")
    assert type(opened.transformer) is diffaccel.PrunedDiTTransformer2DModel


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
def test_a_text_to_image_model(run, tmp_path):
    """In Stable Diffusion's layout, with a recovery on prompts; its folder brings prompts and tokenizer along."""
    (tmp_path / "prompts.txt").write_text("red apple\nrose\ncat face\n")
    small = ("--set", "trainer.batch_size=2", "--set", "method.pool=4", "--set", "method.pool_steps=2")
    run(*brief(tmp_path / "run", "--model", "tiny-sd", "--prompts", tmp_path / "prompts.txt", "--ratio", 0.2,
               "--guidance-scale", 3, "--recover", 2, *small))  # fmt: skip
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run" / "final")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("rose", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 64, 64) and type(pipe.unet) is diffaccel.PrunedUNet2DConditionModel
    run("sample", tmp_path / "run" / "final", "-n", 1, "--steps", 2, "--grid", tmp_path / "grid.png")


def test_from_python(tmp_path, whole):
    settings = {"samples": 4, "steps": 2, "num": 60, "repeats": 0, "curve": (0.2,), "ratio": 0.35}
    recovery = ["trainer.batch_size=8", "method.pool=16", "method.pool_steps=2", "trainer.checkpoint_every=2"]
    found = diffaccel.prune_model(
        "digits", tmp_path / "run", recover=STEPS, recovery=recovery, progress=False, **settings
    )
    assert (found.final / "unet").is_dir() and found.recovered.fd > 0
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (whole[0] / WEIGHTS).read_bytes()
    assert found.pruned.parameters < found.whole.parameters == 177_553


def test_lists(run):
    rows = {row["name"]: row for row in json.loads(run("list", "pruning", "--json").out)}
    assert set(rows) == {"ld-pruner", "laptop", "magnitude", "random"} and "2404.11936" in rows["ld-pruner"]["paper"]
    assert "knapsack" in {row["name"] for row in json.loads(run("list", "selections", "--json").out)}
    assert {"recovery", "digits-recovery"} <= {row["name"] for row in json.loads(run("list", "recipes", "--json").out)}
