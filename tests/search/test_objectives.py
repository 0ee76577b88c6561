"""What schedules are judged by: distances to the fine trajectory, and functions of samples."""

import pytest
from pipelines import PIPELINES
from test_subjects import LABELS, searched_file, subject_of

import diffaccel
from diffaccel.core.errors import UsageError
from diffaccel.core.grids import make_grid
from diffaccel.core.schedule import from_diffusers
from diffaccel.samplers.deis import deis_plan
from diffaccel.search.objectives import Samples, Trajectory
from diffaccel.search.subjects import DenoiserSubject, PipelineSubject, fine_plan
from diffaccel.testing import spectral_mixture


@pytest.fixture(scope="module")
def digits():
    return diffaccel.load_pipeline("digits")


def test_the_fine_trajectory_is_at_no_distance_from_itself(digits):
    subject, judge = PipelineSubject(digits, LABELS), Trajectory(20)
    assert judge.score(subject, subject.file(fine_plan(subject.schedule, 20)), 0, 8) == 0.0


def test_distances_fall_with_the_order_and_with_the_steps():
    """On the analytic mixture: roughly by 2ⁿ from 20 to 40 steps, as the order is n."""
    subject, judge = DenoiserSubject(spectral_mixture(from_diffusers({}), 16, 4), {}), Trajectory(400)

    def score(steps, degree):
        plan = deis_plan(make_grid(subject.schedule, steps, "fast"), degree)
        return judge.score(subject, subject.file(plan), 0, 64)

    for degree in (0, 1, 2):
        assert score(20, degree) / score(40, degree) > 1.6 * 1.4**degree
    assert score(20, 0) > score(20, 1) > score(20, 2)


@pytest.mark.slow
def test_the_fine_trajectory_is_fine_enough(digits):
    """Within two per cent of what ten times the steps say of five-step schedules, a twentieth of a per cent of noise."""
    subject = PipelineSubject(digits, LABELS)
    usual, exact = Trajectory(), Trajectory(1000)
    for degree, grid in ((0, "fast"), (1, "fast"), (2, "quadratic"), (2, "log-snr")):
        file = subject.file(deis_plan(make_grid(subject.schedule, 5, grid), degree))
        scores = [judge.score(subject, file, 0, 48) for judge in (usual, exact)]
        assert scores[0] == pytest.approx(scores[1], rel=0.02)


def test_measures_of_samples():
    subject = subject_of(PIPELINES["sd"])
    file = searched_file(subject)
    shapes = []

    def measure(samples):
        shapes.append(tuple(samples.shape))
        return samples.mean()

    for decoded in (False, True):
        score = Samples(measure, "mean", "mean", decoded).score(subject, file, 0, 3)
        assert isinstance(score, float)
    assert shapes == [(3, 4, 8, 8), (3, 3, 8, 8)]
    with pytest.raises(UsageError, match="function of samples; got 3"):
        Samples(3, "x", "x")
