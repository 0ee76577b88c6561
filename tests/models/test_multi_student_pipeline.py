"""Several students in one pipeline: each sample is drawn by the owner of its condition, whoever else is in the batch."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from networks import tiny_unet

from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.images import to_uint8
from diffaccel.core.rng import KeyedRandom
from diffaccel.generation import generate
from diffaccel.models.multi_student import MultiStudentModel
from diffaccel.models.partition import ClassPartition, QuadrantPartition, pooled
from diffaccel.models.pipeline import ClassConditionalPipeline
from diffaccel.models.teachers import load_pipeline
from diffaccel.samplers.few_step import FewStepScheduler

PARTS = ClassPartition(((0, 5), (1, 2), (3, 4)))
LABELS = [4, 0, 1, 5, 2, 0, 3]
NOISE = KeyedRandom(0).normal("noise", 0, 0, len(LABELS), (1, 8, 8))


def networks() -> list:
    """Three with other weights, the last one narrower."""
    found = [
        tiny_unet(7),
        tiny_unet(7),
        type(tiny_unet(7)).from_config({**tiny_unet(7).config, "block_out_channels": (4, 8)}),
    ]
    for index, network in enumerate(found):
        torch.manual_seed(index)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return [network.eval() for network in found]


def scheduler(times=(999,)) -> FewStepScheduler:
    return FewStepScheduler(timesteps=list(times), prediction_type="v_prediction")


def pipeline(students, partition=PARTS, times=(999,), **settings) -> ClassConditionalPipeline:
    pipe = ClassConditionalPipeline.of(MultiStudentModel(students, partition, **settings), scheduler(times), len(times))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, labels=LABELS, noise=NOISE) -> torch.Tensor:
    return pipe(class_labels=labels, noise=noise, output_type="pt").images


def alone(index: int, rows: list[int], times=(999,)) -> torch.Tensor:
    """What one student draws of some rows of the batch."""
    pipe = ClassConditionalPipeline.of(networks()[index], scheduler(times), len(times))
    pipe.set_progress_bar_config(disable=True)
    return images(pipe, [LABELS[row] for row in rows], NOISE[rows])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students") / "final"
    pipeline(networks()).save_pretrained(folder)
    return folder


def test_a_mixed_batch_is_what_each_student_draws_alone_in_order():
    found = images(pipeline(networks()))
    for index in range(3):
        rows = [row for row, label in enumerate(LABELS) if label in PARTS.members[index]]
        assert torch.allclose(found[rows], alone(index, rows), atol=1e-6)
    assert (found[:, None] - found).abs().amax((2, 3, 4)).fill_diagonal_(1.0).min() > 1e-3  # all differ


def test_an_image_does_not_depend_on_the_batch():
    pipe = pipeline(networks())
    whole = images(pipe)
    for row in range(len(LABELS)):
        assert torch.allclose(whole[row], images(pipe, LABELS[row : row + 1], NOISE[row : row + 1])[0], atol=1e-6)
    sheets = [torch.cat([batch for batch, _ in generate(pipe, 12, batch_size=size)]) for size in (12, 5)]
    assert (sheets[0].int() - sheets[1].int()).abs().max() <= 1


def test_a_folder_opens_lazily_and_draws_the_same(folder):
    pipe = load_pipeline(folder)
    assert isinstance(pipe, ClassConditionalPipeline)
    assert len(pipe.unet.resident) == 0
    assert (pipe.num_classes, pipe.sample_shape) == (6, (1, 8, 8))
    images(pipe, [1, 2, 1], NOISE[:3])
    assert list(pipe.unet.resident) == ["1"]
    assert torch.equal(images(pipe), images(pipeline(networks())))
    assert sorted(pipe.unet.resident) == ["0", "1", "2"]


def test_a_fresh_process_draws_the_same(folder, python, tmp_path):
    code = (
        "import sys, torch, diffaccel\nfrom diffusers import DiffusionPipeline\nfrom safetensors.torch import load_file, save_file\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(folder)!r})\n"
        f"noise = load_file({str(tmp_path / 'noise')!r})['noise']\n"
        f"images = pipe(class_labels={LABELS}, noise=noise, output_type='pt').images\n"
        f"save_file({{'images': images.contiguous()}}, {str(tmp_path / 'images')!r})\n"
    )
    from safetensors.torch import load_file, save_file

    save_file({"noise": NOISE}, tmp_path / "noise")
    outcome = python("-c", code)
    assert outcome.code == 0, outcome.err
    assert torch.equal(load_file(tmp_path / "images")["images"], images(pipeline(networks())))


@pytest.mark.parametrize("from_folder", [True, False])
@pytest.mark.parametrize("limit", [1, 2])
def test_those_that_were_not_used_for_longest_make_room(folder, from_folder, limit):
    students = [folder / "unet" / f"student-{index}" for index in range(3)] if from_folder else networks()
    pipe = pipeline(students, max_resident=limit)
    calls = []
    for labels in ([0], [1], [0], [3]):
        images(pipe, labels, NOISE[:1])
        calls.append([int(key) for key in pipe.unet.resident])
    assert calls == ([[0], [1], [0], [2]] if limit == 1 else [[0], [0, 1], [1, 0], [0, 2]])
    assert torch.equal(images(pipe), images(pipeline(networks())))
    assert len(pipe.unet.resident) <= limit


def test_precision_and_place_are_those_of_the_model(folder):
    pipe = load_pipeline(folder).to(torch.float64)
    assert pipe.unet.dtype == torch.float64
    assert images(pipe).dtype == torch.float64
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float64}
    assert torch.allclose(images(pipe).float(), images(pipeline(networks())), atol=1e-4)
    half = DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    assert half.unet.dtype == half.unet.student(1).dtype == torch.float16


def test_a_saved_copy_is_complete(folder, tmp_path):
    load_pipeline(folder).save_pretrained(tmp_path / "copy")  # none of the students was opened
    shutil.copytree(folder, tmp_path / "moved")
    for copy in ("copy", "moved"):
        assert torch.equal(images(load_pipeline(tmp_path / copy)), images(pipeline(networks())))


def test_the_verbs_take_it_as_any_other_model(folder, run, tmp_path):
    run("sample", folder, "--num", 12, "--seed", 3, "-o", tmp_path / "images", "--grid", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()
    assert len(list((tmp_path / "images").rglob("*.png"))) == 12
    first = torch.cat([batch for batch, _ in generate(str(folder), 4, seed=3)])
    noise = KeyedRandom(3).normal("sample", 0, 0, 4, (1, 8, 8))
    assert torch.equal(first, to_uint8(images(load_pipeline(folder), [0, 1, 2, 3], noise)))


def test_prompts_are_routed_by_their_states():
    def network(seed):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=6,
            attention_head_dim=4,
        ).eval()  # fmt: skip

    partition = QuadrantPartition(((0.0, 1.0, 0, 0, 0, 0),), ((0.0,),))
    students = [network(0), network(1)]
    model = MultiStudentModel(students, partition)
    states = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    owners = partition.route(pooled(states))
    assert len(owners.unique()) == 2
    with torch.no_grad():
        found = model(x, torch.tensor(500), encoder_hidden_states=states, return_dict=False)[0]
        own = [
            students[owner](x[i : i + 1], 500, states[i : i + 1]).sample[0] for i, owner in enumerate(owners.tolist())
        ]
    assert torch.allclose(found, torch.stack(own), atol=1e-6)
    assert model.config.cross_attention_dim == 6


def test_guidance_is_refused_in_one_sentence():
    with pytest.raises(UsageError, match="guidance"):
        pipeline(networks())(class_labels=LABELS, noise=NOISE, guidance_scale=2.0)


def test_networks_must_take_the_same():
    with pytest.raises(DataError, match=r"6 classes and .*3 classes|3 classes and .*6 classes"):
        MultiStudentModel([tiny_unet(7), tiny_unet(4), tiny_unet(7)], PARTS)
    with pytest.raises(UsageError, match=r"2 networks .* 3 students"):
        MultiStudentModel(networks()[:2], PARTS)
    with pytest.raises(UsageError, match="max_resident"):
        images(pipeline(networks(), max_resident=0))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda unet: (unet / "partition.json").unlink(), r"partition\.json"),
        (lambda unet: (unet / "partition.json").write_text("{"), r"partition\.json"),
        (lambda unet: shutil.rmtree(unet / "student-2"), "student-2"),
        (lambda unet: (unet / "student-1/config.json").write_text("[]"), "student-1"),
    ],
)
def test_a_damaged_folder_is_refused_when_it_is_opened(folder, tmp_path, damage, word):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy / "unet")
    with pytest.raises(DataError, match=word):
        load_pipeline(copy)


@pytest.mark.parametrize("content", [b"", b"no weights"])
def test_a_damaged_student_is_refused_when_it_is_needed(folder, tmp_path, content):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "unet/student-1/diffusion_pytorch_model.safetensors").write_bytes(content)
    pipe = load_pipeline(copy)
    images(pipe, [0, 3], NOISE[:2])
    with pytest.raises(DataError, match="student-1"):
        images(pipe, [1], NOISE[:1])


def test_code_of_strangers_is_not_run(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = copy / "unet/student-0/config.json"
    config.write_text(config.read_text().replace("UNet2DModel", "DiffusionPipeline"))
    with pytest.raises(DataError, match="DiffusionPipeline"):
        images(load_pipeline(copy), [0], NOISE[:1])
