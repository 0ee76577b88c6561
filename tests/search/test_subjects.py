"""What is searched for: denoisers and pipelines draw the same samples as anyone who calls them by hand."""

import copy
import warnings

import pytest
import torch
from pipelines import PIPELINES, check_close

import diffaccel
from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.rng import KeyedRandom
from diffaccel.core.schedule import EDM, VE, Flow, VPCosine, VPLinear, from_diffusers
from diffaccel.models.denoiser import Guided
from diffaccel.samplers.deis import deis_plan
from diffaccel.samplers.sample import sample
from diffaccel.samplers.searched import PlanFile, SearchedScheduler
from diffaccel.samplers.usf import Decision, SolverSchedule
from diffaccel.search.space import Axis
from diffaccel.search.subjects import DenoiserSubject, PipelineSubject
from diffaccel.testing import GaussianMixtureTeacher, spectral_mixture

LABELS = [{"class_labels": label} for label in range(10)]


def searched_file(subject, calls=3, skip_first=False):
    """A plan as searches make them, with a corrector and momentum."""
    axis = Axis(subject.schedule)
    times = axis.times([axis.top * (1.0 - index / (calls + skip_first)) for index in range(calls + skip_first)])
    steps = [
        Decision(2, "velocity", "angle", corrector="pseudo", carry=0.1 * (index > 0)) for index in range(len(times))
    ]
    steps[-1] = Decision(2, "velocity", "angle")
    decisions = SolverSchedule(times, tuple(steps), skip_first=skip_first)
    return subject.file(decisions.compile(subject.schedule), decisions)


def split(arguments, count):
    """(conditions by sample, settings) of a call for ``count`` samples."""
    rows = {key: value for key, value in arguments.items() if isinstance(value, (list, torch.Tensor))}
    rest = {key: value for key, value in arguments.items() if key not in rows and key != "batch_size"}
    return [{key: value[index] for key, value in rows.items()} for index in range(count)], rest


def subject_of(case, pipe=None, batch_size=64, guidance=None, **more):
    given = {**case.arguments(3), **(case.guided(guidance, 3) if guidance else {}), **more}
    return PipelineSubject(pipe or case.build(), *split(given, 3), batch_size=batch_size)


@pytest.fixture(scope="module")
def digits():
    return diffaccel.load_pipeline("digits")


# ---- denoisers


def test_denoisers_are_sampled_as_by_hand():
    denoiser = diffaccel.load_denoiser("digits")
    classes = torch.arange(3)
    subject = DenoiserSubject(denoiser, {}, lambda start, count: {"class_labels": classes[start : start + count]})
    file = searched_file(subject)
    noise = KeyedRandom(5).normal("search", 0, 0, 3, denoiser.sample_shape)
    with torch.no_grad():
        expected = sample(denoiser, noise, file.plan, {"class_labels": classes})
    found = subject.draw(file, 5, 3)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(subject.images(file, 5, 3), expected)


def test_batches_make_no_difference_to_denoisers():
    teacher, config = spectral_mixture(from_diffusers({}), 8, 3), {}
    file = searched_file(DenoiserSubject(teacher, config), 4)
    whole, parts = (DenoiserSubject(teacher, config, batch_size=size).draw(file, 1, 10) for size in (10, 3))
    check_close(parts, whole, 1e-5)
    assert torch.equal(DenoiserSubject(teacher, config).draw(file, 1, 4), whole[:4])
    assert not torch.equal(DenoiserSubject(teacher, config).draw(file, 2, 4), whole[:4])


@pytest.mark.parametrize("schedule", [from_diffusers({}), EDM(), EDM(0.01, 700.0, 1.0)])
def test_denoisers_start_at_the_scale_of_their_schedule(schedule):
    """From the second level where the first step is skipped; the result is in the scale of the data."""
    teacher = GaussianMixtureTeacher([1.0], [[0.0] * 4], [[0.25] * 4], schedule)
    subject = DenoiserSubject(teacher)
    for skip_first in (False, True):
        file = searched_file(subject, 12, skip_first)
        assert (file.plan.initial != 1.0) == skip_first
        assert float(subject.draw(file, 0, 4000).std()) == pytest.approx(0.5, rel=0.05)


ZERO_SNR = {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear", "num_train_timesteps": 500}


@pytest.mark.parametrize(
    "schedule",
    [from_diffusers({}), from_diffusers(ZERO_SNR), Flow(), Flow(200), EDM(), EDM(0.01, 700.0, 1.0)],
)
def test_plans_for_denoisers_open_again(schedule):
    """The file says the noise schedule, which is the denoiser's own."""
    subject = DenoiserSubject(spectral_mixture(schedule, 4, 2))
    file = searched_file(subject, 4)
    again = PlanFile.from_dict(file.to_dict())
    assert again.plan == file.plan and again.decisions == file.decisions
    known = from_diffusers({**subject.config, "beta_start": 0.0001} if isinstance(schedule, EDM) else subject.config)
    assert type(known) is type(schedule)
    times = torch.linspace(schedule.t_min, schedule.t_max, 50, dtype=torch.float64)
    for ours, theirs in zip(known.level(times), schedule.level(times), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_schedules_that_no_pipeline_has():
    for schedule in (VPLinear(), VPCosine(), VE()):
        with pytest.raises(UsageError, match=f"a table of steps, a flow or EDM; got {type(schedule).__name__}"):
            DenoiserSubject(spectral_mixture(schedule, 4, 2))


def test_guidance_pairs_of_denoisers_count_twice():
    denoiser = diffaccel.load_denoiser("digits")

    def labels(start, count):
        return {"class_labels": torch.arange(start, start + count) % 10}

    assert DenoiserSubject(Guided(denoiser, 3.0), {}, labels).evaluations == 2
    assert DenoiserSubject(Guided(denoiser, 1.0), {}, labels).evaluations == 1
    assert DenoiserSubject(denoiser, {}, labels).evaluations == 1
    assert DenoiserSubject(Guided(denoiser, 3.0), {}).evaluations == 1  # without condition there is no pair


def test_layers_of_denoisers():
    denoiser = diffaccel.load_denoiser("digits")

    def labels(start, count):
        return {"class_labels": torch.arange(start, start + count)}

    plain, guided = (DenoiserSubject(one, {}, labels) for one in (denoiser, Guided(denoiser, 2.0)))
    assert plain.shares() == guided.shares() and min(plain.shares().values()) > 0.0
    file = searched_file(plain)
    name = next(iter(plain.shares()))
    for subject in (plain, guided):
        shorter = subject.file(file.plan, file.decisions, layers={"skip": [[], [name], []]})
        whole = subject.draw(file, 0, 2)
        assert not torch.equal(subject.draw(shorter, 0, 2), whole) and torch.equal(subject.draw(file, 0, 2), whole)
    with pytest.raises(UsageError, match="no network of which layers"):
        DenoiserSubject(spectral_mixture(from_diffusers({}), 4, 2), {}).shares()


# ---- pipelines


def test_digits_by_hand(digits):
    """The pipeline, the denoiser and a loop written down here agree to rounding."""
    subject = PipelineSubject(digits, LABELS)
    for skip_first in (False, True):
        file = searched_file(subject, 4, skip_first)
        found = subject.draw(file, 7, 5)
        seeds = KeyedRandom(7).integers("search", 0, 0, 5, 2**53).tolist()
        noise = torch.cat(
            [torch.randn(1, *digits.sample_shape, generator=torch.Generator().manual_seed(one)) for one in seeds]
        )
        with torch.no_grad():
            denoiser = diffaccel.load_denoiser("digits")
            expected = sample(denoiser, noise * file.plan.initial, file.plan, {"class_labels": torch.arange(5)})
        check_close(found, expected, 1e-5)
        assert torch.equal(subject.images(file, 7, 5), found)  # the states are the pixels


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_are_called_as_their_users_do(name):
    case = PIPELINES[name]
    pipe = case.build()
    subject = subject_of(case, pipe)
    file = searched_file(subject)
    found = subject.draw(file, 3, 3)
    by_hand = case.build()
    by_hand.scheduler = SearchedScheduler.from_config(by_hand.scheduler.config, plan=file.to_dict())
    seeds = KeyedRandom(3).integers("search", 0, 0, 3, 2**53).tolist()
    expected = case.call(by_hand, 3, seeds)
    assert found.dtype == torch.float32 and torch.isfinite(found).all() and len(found) == 3
    if "pt" not in subject.settings.values() or name == "classes":  # else pictures are made of the states
        check_close(found, expected, 1e-5)
    # Sample i depends on the seed and on i only.
    check_close(subject_of(case, batch_size=2).draw(file, 3, 3), found, 1e-5)
    assert not torch.equal(subject.draw(file, 4, 3), found)


@pytest.mark.parametrize("name", PIPELINES)
def test_guidance_pairs_count_twice(name):
    case = PIPELINES[name]
    if case.scales:
        assert subject_of(case, guidance=3.0).evaluations == 2
        assert subject_of(case, guidance=1.0).evaluations == 1 or name == "pixart"
    else:
        assert subject_of(case).evaluations == 1


@pytest.mark.parametrize("name", PIPELINES)
def test_layers_of_pipelines(name):
    subject = subject_of(PIPELINES[name])
    shares = subject.shares()
    assert shares and all(0.0 < share < 1.0 for share in shares.values())
    file = searched_file(subject)
    shorter = subject.file(file.plan, file.decisions, layers={"skip": [[], list(shares)[:1], []]})
    whole = subject.draw(file, 0, 2)
    assert not torch.equal(subject.draw(shorter, 0, 2), whole) and torch.equal(subject.draw(file, 0, 2), whole)


@pytest.mark.parametrize("name", ["sd", "dit", "ddpm", "flux", "svd", "classes"])
def test_images_are_pictures(name):
    case = PIPELINES[name]
    subject = subject_of(case)
    images = subject.images(searched_file(subject), 0, 3)
    frames = 2 if name == "svd" else 1
    assert images.ndim == 4 and len(images) == 3 * frames and images.shape[1] == (1 if name == "classes" else 3)
    assert -1.0 <= float(images.min()) < 0.0 < float(images.max()) <= 1.0 or name == "classes"


def test_prompts_are_given_in_turn():
    pipe = PIPELINES["sd"].build()
    settings = {"height": 8, "width": 8, "guidance_scale": 2.0}
    prompts = [{"prompt": "a cat"}, {"prompt": "two dogs on a hill"}]
    subject = PipelineSubject(pipe, prompts, settings, batch_size=3)
    file = searched_file(subject)
    found = subject.draw(file, 0, 4)
    alone = [PipelineSubject(pipe, [one], settings).draw(file, 0, 4) for one in prompts]
    check_close(found, torch.stack([alone[0][0], alone[1][1], alone[0][2], alone[1][3]]), 1e-5)
    assert float((alone[0] - alone[1]).abs().max()) > 1e-4 and subject.evaluations == 2
    # A prompt for all, and what goes with prompts.
    same = PipelineSubject(pipe, settings={**settings, "prompt": "a cat"})
    same.check_conditions()
    check_close(same.draw(file, 0, 4), alone[0], 1e-5)
    unlike = PipelineSubject(pipe, prompts, {**settings, "negative_prompt": "rain"}).draw(file, 0, 4)
    assert float((unlike - found).abs().max()) > 1e-5


def test_one_class_for_all(digits):
    one = PipelineSubject(digits, settings={"class_labels": 3})
    file = searched_file(one)
    assert torch.equal(one.draw(file, 0, 4), PipelineSubject(digits, [{"class_labels": 3}]).draw(file, 0, 4))


def test_what_is_not_a_condition():
    pipe = PIPELINES["sd"].build()
    with pytest.raises(UsageError, match="needs prompts"):
        PipelineSubject(pipe).check_conditions()
    for conditions in ([], [{"prompt": "a"}, {}], [{"prompt": "a"}, {"prompt": "a", "height": 8}]):
        with pytest.raises(UsageError, match="same names for all"):
            PipelineSubject(pipe, conditions)
    for name in ("colour", "latents", "generator", "num_inference_steps", "num_images_per_prompt", "timesteps"):
        with pytest.raises(UsageError, match=f"cannot pass '{name}' to StableDiffusionPipeline"):
            PipelineSubject(pipe, [{"prompt": "a"}], {name: 1})


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("bar", [None, {"disable": True}, {"desc": "mine", "disable": True}])
def test_pipelines_are_as_they_were(bar):
    """Also after an error in the middle of a run."""
    pipe = copy.copy(PIPELINES["sd"].build())
    vars(pipe).pop("_progress_bar_config", None)
    if bar is not None:
        pipe.set_progress_bar_config(**bar)
    scheduler, entry = pipe.scheduler, pipe.config["scheduler"]

    def check_as_before():
        assert pipe.scheduler is scheduler and pipe.config["scheduler"] == entry
        assert vars(pipe).get("_progress_bar_config") == bar
        assert not any(hasattr(type(module), "_bypassed") for module in pipe.unet.modules())
        assert not pipe.unet._forward_pre_hooks

    subject = PipelineSubject(pipe, [{"prompt": "a cat"}], {"height": 8, "width": 8})
    file = searched_file(subject)
    layers = {"skip": [[], list(subject.shares())[:1], []]}

    def stop(row, x, output):
        if row.t < file.plan.rows[1].t:
            raise Interrupt

    for broken in (file, subject.file(file.plan, file.decisions, layers=layers)):
        with pytest.raises(Interrupt):
            subject.draw(broken, 0, 2, stop)
        check_as_before()
    subject.draw(file, 0, 2)
    assert subject.evaluations == 2
    check_as_before()


def test_watchers_see_every_network_call(digits):
    """Inputs are on the trajectory; outputs, in the row's quantity, make the next one."""
    pairs = {}
    teacher = diffaccel.load_denoiser("digits")
    labelled = DenoiserSubject(
        teacher, {}, lambda start, count: {"class_labels": torch.arange(start, start + count)}, batch_size=2
    )
    for subject in (PipelineSubject(digits, LABELS, batch_size=2), labelled):
        plan = deis_plan(make_grid(subject.schedule, 5, "fast"), 1)
        seen = []
        final = subject.draw(subject.file(plan), 0, 4, lambda *args, seen=seen: seen.append(args))
        assert [row for row, _, _ in seen] == list(plan.rows) * 2
        assert all(x.shape == output.shape == (2, *digits.sample_shape) for _, x, output in seen)
        for part in (0, 1):
            mine = seen[5 * part : 5 * part + 5]
            row, x, output = mine[-1]
            states, outputs = [x, *(one[1] for one in mine[-2::-1])], [output, *(one[2] for one in mine[-2::-1])]
            made = sum(weight * value for weight, value in zip(row.states, states, strict=False))
            made = made + sum(weight * value for weight, value in zip(row.outputs, outputs, strict=False))
            check_close(made, final[2 * part : 2 * part + 2], 1e-5)
        pairs[type(subject)] = seen
    assert len(pairs) == 2


def test_fingerprints_are_of_the_weights():
    pipe = copy.deepcopy(PIPELINES["sd"].build())
    subject = PipelineSubject(pipe, [{"prompt": "a"}])
    first = subject.fingerprint()
    assert first == subject.fingerprint() == PipelineSubject(PIPELINES["sd"].build(), [{"prompt": "b"}]).fingerprint()
    assert len(first) == 16 and int(first, 16)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert subject.fingerprint() != first
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] -= 1e-6
        pipe.unet.to(torch.float64)
    assert subject.fingerprint() != first
    teacher = spectral_mixture(from_diffusers({}), 4, 2)
    before = DenoiserSubject(teacher, {}).fingerprint()
    teacher.means += 1e-9
    assert DenoiserSubject(teacher, {}).fingerprint() != before


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_half_precision(name):
    case = PIPELINES[name]
    pipe = copy.deepcopy(case.build()).to(torch.bfloat16)
    given = case.arguments(2)
    given = {
        key: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) else value for key, value in given.items()
    }
    subject = PipelineSubject(pipe, *split(given, 2))
    file = searched_file(subject)
    seen = []
    found = subject.draw(file, 0, 2, lambda *args: seen.append(args))
    assert found.dtype == torch.float32 and torch.isfinite(found).all() and len(subject.fingerprint()) == 16
    assert {tensor.dtype for _, *pair in seen for tensor in pair} == {torch.float32}
    whole = subject_of(case).draw(file, 0, 2)
    assert 0.0 < float((found - whole).abs().max()) < 0.1 * float(whole.abs().max())


def test_nothing_is_warned_of(digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subject = PipelineSubject(digits, LABELS)
        subject.draw(searched_file(subject), 0, 2)
