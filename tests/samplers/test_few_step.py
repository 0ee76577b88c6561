"""The few-step sampler of students: its mathematics, the same in training and in pipelines."""

import functools

import diffusers
import pytest
import torch
from pipelines import BETAS, PIPELINES, check_close

from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.prediction import convert
from diffaccel.core.schedule import EDM, VE, Flow, VPDiscrete, VPLinear, from_diffusers
from diffaccel.models.few_step_pipelines import student_pipeline
from diffaccel.samplers.ddim import ddim_plan
from diffaccel.samplers.few_step import FewStep, FewStepScheduler

CONFIGS = {
    "epsilon": {**BETAS},
    "v_prediction": {**BETAS, "prediction_type": "v_prediction"},
    "sample": {**BETAS, "prediction_type": "sample"},
    "flow_prediction": dict(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config),
    "edm": dict(diffusers.EDMEulerScheduler().config),
}
TIMES = [999, 749, 499, 249]
SHAPE = (2, 3, 4, 4)
normal = functools.partial(torch.randn, dtype=torch.float64)


def scheduler(kind: str = "epsilon", **settings) -> FewStepScheduler:
    steps = FewStep.trailing(from_diffusers(CONFIGS[kind]), 4, **settings)
    return FewStepScheduler.carrying(steps, CONFIGS[kind])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_lists_of_times():
    table, flow = from_diffusers(BETAS), Flow()
    assert FewStep.trailing(table, 4).times == (999, 749, 499, 249)
    assert FewStep.trailing(table, 3).times == (999, 666, 332)  # as diffusers rounds trailing steps
    assert FewStep.trailing(table, 1, start=0.4).times == (399,)  # SDXL's one-step student of DMD2
    s = torch.tensor([1.0, 0.75, 0.5, 0.25])
    assert FewStep.trailing(flow, 4, shift=3.0).times == pytest.approx((1000 * 3 * s / (1 + 2 * s)).tolist(), rel=1e-6)
    assert FewStep.trailing(VE(), 2).times[0] == pytest.approx(80.0)
    assert len(FewStep.trailing(table, 1000).times) == 1000
    assert [FewStep(tuple(TIMES)).fewer(n).times for n in (1, 2, 3, 9)] == [
        (999,),
        (999, 499),
        (999, 749, 499),
        tuple(TIMES),
    ]


@pytest.mark.parametrize(
    "schedule", [from_diffusers(BETAS), Flow(), EDM(), VE(), VPLinear()], ids=lambda s: type(s).__name__
)
def test_the_consistency_function_is_the_identity_at_the_cleanest_time(schedule):
    steps, x0, noise = FewStep.trailing(schedule, 1, boundary=10.0), normal(SHAPE), normal(SHAPE)
    rho = float(schedule.rho(schedule.t_min))
    alpha, sigma = schedule.end_from_rho(rho)  # in the scale of results
    state = schedule.alpha(schedule.t_min) * x0 + schedule.sigma(schedule.t_min) * noise
    clean = steps.consistency(schedule, state, normal(SHAPE), schedule.t_min)
    torch.testing.assert_close(clean, alpha * x0 + sigma * noise, rtol=1e-9, atol=1e-9)
    assert FewStep.trailing(schedule, 1).consistency(schedule, state, x0, schedule.t_min) is x0


def test_predicted_noise_is_ddim():
    for schedule in (from_diffusers(BETAS), Flow(), EDM()):
        steps = FewStep.trailing(schedule, 4, noise="predicted")
        reference = ddim_plan(make_grid(schedule, timesteps=list(steps.times)))
        for row, other in zip(steps.plan(schedule).rows, reference.rows, strict=True):
            assert (row.t, row.noise) == (other.t, 0.0)
            assert (*row.states, *row.outputs) == pytest.approx((*other.states, *other.outputs), abs=1e-12)


def test_a_student_is_fed_noise_alone():
    noise = normal(SHAPE)
    assert torch.equal(FewStep((399.0,)).start(from_diffusers(BETAS), noise), noise)
    assert torch.equal(FewStep((2.5,)).start(VE(), noise), 2.5 * noise)
    torch.testing.assert_close(FewStep.trailing(EDM(), 1).start(EDM(), noise), noise, rtol=1e-4, atol=0)


def test_calls_and_times_differ_between_samples_of_a_batch():
    schedule, x0, x, noise = from_diffusers(BETAS), normal(3, 2), normal(3, 2), normal(3, 2)
    for kind in ("fresh", "predicted"):
        steps, index = FewStep(tuple(TIMES), kind, boundary=10.0), torch.tensor([0, 2, 1])
        together = steps.renoise(schedule, x0, x, index, noise), steps.consistency(schedule, x, x0, index * 300.0)
        for i, call in enumerate(index.tolist()):
            one = slice(i, i + 1)
            assert torch.equal(together[0][one], steps.renoise(schedule, x0[one], x[one], call, noise[one]))
            assert torch.equal(together[1][one], steps.consistency(schedule, x[one], x0[one], call * 300.0))
        assert steps.renoise(schedule, x0.float(), x.float(), index, noise.float()).dtype == torch.float32


@pytest.mark.parametrize("settings", [{}, {"noise": "predicted"}, {"boundary": 10.0}], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_pipelines_draw_as_training_does(kind, settings):
    drawn = scheduler(kind, **settings)
    steps, schedule, generator = drawn.steps, drawn.noise_schedule, seeded(1)
    x = trained = steps.start(schedule, normal(SHAPE))
    drawn.set_timesteps(50)
    for index, t in enumerate(drawn.timesteps):
        output = normal(SHAPE)
        x = drawn.step(output, t, x, generator=seeded(index)).prev_sample
        source = {"epsilon": "edm"}.get(kind, kind) if isinstance(schedule, EDM) else kind
        x0 = convert(output, trained, source, "sample", *schedule.level(steps.times[index]))
        before, trained = trained, steps.consistency(schedule, trained, x0, steps.times[index])
        if index < 3:
            noise = torch.randn(SHAPE, generator=generator.manual_seed(index)).double()
            trained = steps.renoise(schedule, trained, before, index, noise)
    torch.testing.assert_close(x, trained, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_with_its_boundary_it_is_the_lcm_scheduler_of_diffusers(kind):
    ours = scheduler(kind, boundary=10.0)
    stock = diffusers.LCMScheduler.from_config(CONFIGS[kind], original_inference_steps=4)
    stock.set_timesteps(timesteps=TIMES, device="cpu")
    assert torch.equal(ours.timesteps, stock.timesteps) and ours.init_noise_sigma == stock.init_noise_sigma
    x = y = torch.randn(SHAPE, generator=seeded())
    for t in TIMES:
        output = torch.randn(SHAPE, generator=seeded(t))
        x = ours.step(output, t, x, generator=seeded(1)).prev_sample
        y = stock.step(output, t, y, generator=seeded(1)).prev_sample
        check_close(x, y, 1e-5)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "dit", "classes"])
def test_pipelines_of_students_need_no_arguments(name):
    case = PIPELINES[name]
    pipe = case.build()
    steps = FewStep.trailing(from_diffusers(pipe.scheduler), 4)
    own = FewStepScheduler.carrying(steps, pipe.scheduler.config)
    student = student_pipeline(pipe, getattr(pipe, case.network), own, 4)
    student.set_progress_bar_config(disable=True)
    bare = {"guidance_scale": 1.0} if name == "classes" else {}
    with case.watched(student) as evaluations:
        drawn = case.call(student, None, **bare)
    assert len(evaluations) == 4

    pipe.scheduler = own  # a stock pipeline, which asks for 50 steps and hands its generator to no step of SD3 and DiT
    with case.watched(pipe) as evaluations, own.drawing_from(generator := seeded()):
        stock = torch.as_tensor(pipe(**{**case.arguments(1), "guidance_scale": 1.0, "generator": generator})[0])
    assert len(evaluations) == 4
    check_close(stock, drawn, 0.0)

    torch.manual_seed(1)  # seeds decide whatever state torch's own generator is in
    again = case.call(student, None, **bare, seed=[3, 0])
    assert not torch.equal(again[:1], drawn)
    check_close(again[1:], case.call(student, None, **bare, seed=[0]), 1e-5)


def test_a_guided_call_is_guided():
    case = PIPELINES["dit"]
    pipe = case.build()
    own = FewStepScheduler.from_config(pipe.scheduler.config, timesteps=TIMES)
    student = student_pipeline(pipe, pipe.transformer, own, 4)
    one, two = case.call(student, 2, guidance_scale=1.0), case.call(student, 2, guidance_scale=3.0, seed=[0])
    assert not torch.allclose(one, two) and two.shape == one.shape


def test_shorter_runs_and_runs_from_the_middle():
    ours = scheduler()
    assert ours.timesteps.tolist() == TIMES and ours.num_inference_steps == 4
    ours.set_timesteps(2, sigmas=[1.0, 0.5, 0.2], mu=1.0)
    assert ours.timesteps.tolist() == [999, 499] and ours.calls(9) == 4 and ours.steps_for(9) == 4
    ours.set_timesteps()
    x, outputs = normal(SHAPE), [normal(SHAPE) for _ in TIMES]
    middle = ours.step(outputs[0], 999, x, generator=seeded(0)).prev_sample
    whole = ours.step(outputs[1], 749, middle, generator=seeded(1)).prev_sample
    ours.set_timesteps()
    ours.set_begin_index(1)  # image to image
    assert torch.equal(ours.step(outputs[1], 749, middle, generator=seeded(1)).prev_sample, whole)


def test_configurations():
    teacher = diffusers.DDIMScheduler(**BETAS, clip_sample=True, thresholding=True)
    ours = FewStepScheduler.from_config(teacher.config, timesteps=(999, 499.5), noise="predicted")
    assert not ours.config.clip_sample and not ours.config.thresholding  # the teacher's; students are trained without
    assert ours.timesteps.dtype == torch.float32
    again = FewStepScheduler.from_config(ours.config)
    assert again.steps == ours.steps == FewStep((999.0, 499.5), "predicted")
    assert FewStepScheduler.from_config(teacher.config, timesteps=[999], clip_sample=True).config.clip_sample
    assert isinstance(ours.noise_schedule, VPDiscrete)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs the student's list"),
        ({"timesteps": []}, "must fall"),
        ({"timesteps": [499, 999]}, "must fall"),
        ({"timesteps": [1000]}, "from 0 to 999"),
        ({"timesteps": [999], "noise": "new"}, "Valid: fresh, predicted"),
        ({"timesteps": [999], "boundary": -1.0}, "boundary must be"),
        ({"timesteps": 999}, "timesteps must be"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        FewStepScheduler(**settings)


def test_calls_that_make_no_sense_are_refused():
    for arguments, message in (
        ({"timesteps": [500]}, "its own times"),
        ({"num_inference_steps": 0}, "at least 1; got 0"),
    ):
        with pytest.raises(UsageError, match=message):
            scheduler().set_timesteps(**arguments)
    with pytest.raises(UsageError, match="count ≥ 1"):
        FewStep.trailing(Flow(), 0)
    with pytest.raises(UsageError, match="must fall"):
        FewStep.trailing(from_diffusers(BETAS), 3, start=0.001)
