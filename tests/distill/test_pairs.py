"""Pairs of the teacher: their cache against the exact flow of a Gaussian, and what regression and reflow make of them."""

import json
import shutil

import pytest
import torch
from distilling import draw, tiny_task, trained, weights
from torch import nn

from diffaccel.core.errors import UsageError
from diffaccel.core.prediction import convert
from diffaccel.core.schedule import EDM, VE, Flow, VPDiscrete
from diffaccel.distill.methods.pairs import Pairs
from diffaccel.distill.pairs import PART, PairCache
from diffaccel.distill.task import Task
from diffaccel.models.conditions import NoConditions
from diffaccel.models.denoiser import NetworkDenoiser
from diffaccel.testing.teachers import GaussianTeacher

VP = VPDiscrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
SCHEDULES = {"vp": VP, "flow": Flow(), "ve": VE(), "edm": EDM()}
MEAN, STD = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.3, 1.0, 0.7])


class Map(nn.Module):
    """The exact clean sample, of one kind or another, plus a trainable affine function of the state."""

    def __init__(self, exact, schedule, kind):
        super().__init__()
        self.exact, self.schedule, self.kind = [exact], schedule, kind  # in a list: not a part of this network
        self.gain, self.bias = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x_t, t):
        level = (value.float().reshape(-1, 1) for value in self.schedule.level(t))
        x0 = self.exact[0](x_t, t) + self.gain * x_t + self.bias
        return convert(x0, x_t, "sample", self.kind, *level)


class Affine(NetworkDenoiser):
    """A Gaussian's denoiser as a network of any prediction type."""

    def __init__(self, exact, schedule, kind="sample"):
        super().__init__(Map(exact, schedule, kind), schedule, kind)
        self.sample_shape = (3,)

    def predict(self, x_t, t, condition):
        return self.net(x_t, t)

    def feature_modules(self):
        return []


def gaussian(schedule=VP, kind="sample") -> Task:
    return Task(Affine(GaussianTeacher(MEAN, STD, schedule), schedule, kind), NoConditions())


def straight(schedule):
    """x0 given the state, where noise and sample are x0 = μ + s·z: no two lines meet."""

    def exact(x_t, t):
        alpha, sigma = (value.float().reshape(-1, 1) for value in schedule.level(t))
        return MEAN + STD * (x_t - alpha * MEAN) / (alpha * STD + sigma)

    return exact


class ExactPairs:
    """In place of a cache: noise and where the flow of the Gaussian takes it."""

    def batch(self, draw):
        noise = draw.normal("z", (3,))
        return noise, MEAN + STD * noise, None


@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_pairs_are_the_ends_of_the_exact_flow(tmp_path, name):
    schedule, task = SCHEDULES[name], gaussian(SCHEDULES[name])
    noise, x0, _ = PairCache(tmp_path, task, task.teacher, 8, 200, 0).batch(draw(8))
    exact = GaussianTeacher(MEAN, STD, schedule)
    start = tuple(map(float, schedule.level(schedule.t_max)))
    expected = exact.transport(noise * schedule.initial_scale, start, (1.0, 0.0))
    assert torch.allclose(x0, expected, atol=1e-3)


def test_what_is_drawn_once_is_kept_and_what_is_damaged_is_drawn_again(tmp_path):
    calls = []

    class Counting(Affine):
        def forward(self, x_t, t, condition=None):
            calls.append(len(x_t))
            return super().forward(x_t, t, condition)

    task = Task(Counting(GaussianTeacher(MEAN, STD, VP), VP), NoConditions())
    count = 2 * PART + 10

    def pairs():
        calls.clear()
        return PairCache(tmp_path / "pairs", task, task.teacher, count, 4, 3)

    first = pairs()
    assert len(first) == count and sum(calls) == 4 * count
    batch = first.batch(draw(20))
    assert torch.equal(pairs().x0, first.x0) and not calls
    file = tmp_path / "pairs/part-0001/samples.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    shutil.rmtree(tmp_path / "pairs/part-0002")
    again = pairs()
    assert torch.equal(again.x0, first.x0) and sum(calls) == 4 * (PART + 10)
    assert all(torch.equal(*both) for both in zip(batch[:2], again.batch(draw(20))[:2], strict=True))
    parts = [draw(20).__class__(**{**vars(draw(20)), "start": start, "count": 10}) for start in (0, 10)]
    halves = [again.batch(part) for part in parts]
    assert torch.equal(torch.cat([half[0] for half in halves]), batch[0])


def test_conditions_take_turns_and_stay_with_their_noise(tmp_path):
    task = tiny_task()
    pairs = PairCache(tmp_path, task, task.teacher, 25, 2, 0)
    noise, x0, condition = pairs.batch(draw(40))
    label = {tuple(row.flatten().tolist()): int(c) for row, c in zip(noise, condition["class_labels"], strict=True)}
    for number in range(25):
        own = tuple(pairs.random.normal("pairs", 0, number, 1, (1, 8, 8)).flatten().tolist())
        assert label.get(own, number % 10) == number % 10
    assert len(label) > 10 and x0.shape == (40, 1, 8, 8)


@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_the_optimum_of_regression_is_the_transport_map(loss):
    """The student's family holds every affine map; the flow of a Gaussian is one."""
    method = Pairs(gaussian(kind="v_prediction"), Pairs.Config(loss=loss))
    method.pairs, student = ExactPairs(), method.roles["student"]
    optimizer = torch.optim.LBFGS(student.parameters(), lr=0.5, max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = method.loss(method.phases(0)[0], draw(64)).total
        value.backward()
        return value

    before = closure().item()
    optimizer.step(closure)
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    assert closure().item() < 1e-4 * before
    assert torch.allclose(method.generate(student, z, None), MEAN + STD * z, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("vp", "epsilon"), ("vp", "v_prediction"), ("vp", "sample"), ("flow", "flow_prediction"), ("ve", "epsilon")],
)
def test_reflow_of_a_gaussian_is_straight_in_every_schedule(name, kind):
    """Its pairs are joined by lines that do not meet, so the velocity's error can vanish, and one step is as good as many."""
    schedule = SCHEDULES[name]
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    ends = []
    for steps in (1, 2, 7):
        method = Pairs(gaussian(schedule, kind), Pairs.Config(objective="reflow", loss="l2", student_steps=steps))
        method.pairs = ExactPairs()
        student = method.roles["student"]
        curved = method.loss(method.phases(0)[0], draw(64)).total.item()
        student.net.exact[0] = straight(schedule)
        assert method.loss(method.phases(0)[0], draw(64)).total.item() < 1e-3 * curved
        ends.append(method.generate(student, z, None, lambda step: None))
    first = schedule.level(schedule.t_max)
    exact = straight(schedule)(z * schedule.initial_scale, torch.full((50,), schedule.t_max))
    assert torch.allclose(ends[0], exact, atol=1e-4) and float(first[1]) > 0
    assert torch.allclose(ends[1], ends[0], atol=1e-3) and torch.allclose(ends[2], ends[0], atol=1e-3)


def test_the_reflow_loss_is_the_error_of_the_velocity():
    """By its definition, for another parametrisation, within the schedule and beyond its noisy end."""
    method = Pairs(gaussian(kind="epsilon"), Pairs.Config(objective="reflow"))
    student, (noise, x0, _) = method.roles["student"], ExactPairs().batch(draw(200))
    found, _ = method.straight_error(noise, x0, None, draw(200))
    low = float(VP.sigma(0) / (VP.alpha(0) + VP.sigma(0)))
    s = low + (1 - low) * draw(200).stratified("time")
    t = VP.t_from_rho(s / (1 - s))
    alpha, sigma = (value.float().reshape(-1, 1) for value in VP.level(t))
    line = s.float().reshape(-1, 1)
    state = (alpha + sigma) * ((1 - line) * x0 + line * noise)
    beyond = (t >= 999).reshape(-1, 1)
    state = torch.where(beyond, noise, state)
    share = sigma / (alpha + sigma)
    velocity = (state / (alpha + sigma) - student(state, t, None)) / share  # of the line through state and estimate
    wanted = (state / (alpha + sigma) - x0) / share
    assert 0 < beyond.sum() < 10
    assert torch.allclose(found, (velocity - wanted).square().mean(1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["regression", "reflow"])
def test_a_run_learns_and_goes_on_with_its_pairs(tmp_path, objective):
    def method():
        return Pairs(tiny_task(), Pairs.Config(objective=objective, pairs=20, pair_steps=2, student_steps=2))

    whole = trained(method(), tmp_path / "whole", steps=6)
    for steps in (3, 6):
        parts = trained(method(), tmp_path / "parts", steps=steps)
    assert torch.equal(weights(whole), weights(parts))
    assert (weights(whole) - nn.utils.parameters_to_vector(whole.teacher.parameters())).abs().max() > 1e-4
    pieces = trained(method(), tmp_path / "pieces", steps=1, micro_batches=4)
    assert (weights(pieces) - weights(trained(method(), tmp_path / "piece", steps=1))).abs().mean() < 1e-6
    assert json.loads((tmp_path / "parts/pairs/part-0000/manifest.json").read_text())["files"]


def test_the_student_draws_without_fresh_noise():
    method = Pairs(tiny_task(), Pairs.Config(student_steps=3))
    scheduler = method.scheduler()
    assert scheduler.config.noise == "predicted" and len(scheduler.config.timesteps) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objective": "reflows"}, "method.objective.*Did you mean 'reflow'"),
        ({"loss": "lpips"}, "method.loss"),
        ({"pairs": 0}, "method.pairs must be at least 1"),
        ({"pair_steps": 0}, "method.pair_steps must be at least 1"),
        ({"student_steps": 0}, "student_steps"),
    ],
)
def test_impossible_settings_are_named(change, words):
    with pytest.raises(UsageError, match=words):
        Pairs.Config(**change)
