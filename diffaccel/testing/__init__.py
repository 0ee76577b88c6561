"""Public referees: analytic teachers, reference solutions and the conformance suite of schedulers."""

from .mixtures import spectral_mixture
from .reference import reference_solution
from .schedulers import check_scheduler
from .teachers import GaussianMixtureTeacher, GaussianTeacher

__all__ = ["GaussianMixtureTeacher", "GaussianTeacher", "check_scheduler", "reference_solution", "spectral_mixture"]
