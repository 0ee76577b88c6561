"""Hand-set schedules: every deterministic sampler, each rule once, with exactly the calls that were asked for."""

import functools
import warnings
from collections import Counter

import pytest
import torch
from pipelines import is_stochastic

from diffaccel.core.schedule import from_diffusers
from diffaccel.core.spacings import GRIDS
from diffaccel.samplers.registry import SAMPLERS, get_sampler
from diffaccel.samplers.sample import sample
from diffaccel.search.seeds import PLANNED, RULES, hand_set
from diffaccel.search.subjects import DenoiserSubject
from diffaccel.testing import spectral_mixture

CONFIGS = {
    "vp": {"num_train_timesteps": 1000},
    "zero-snr": {"num_train_timesteps": 1000, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "flow": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "edm": {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
}
START = torch.linspace(-2.0, 2.0, 11, dtype=torch.float64)[:, None]


def subject(name: str) -> DenoiserSubject:
    return DenoiserSubject(spectral_mixture(from_diffusers(CONFIGS[name]), 4, 3), CONFIGS[name])


@functools.cache
def seeds(name: str, nfe: int) -> dict:
    found = list(hand_set(subject(name), nfe))
    assert len(dict(found)) == len(found)
    return dict(found)


def network(x, t, condition):
    return torch.tanh(2.0 * x - 0.3) + 0.2 * torch.cos(5.0 * x + 1e-2 * t[:, None])


def test_every_deterministic_sampler_has_a_rule():
    deterministic = {name for name in SAMPLERS if not is_stochastic(name)}
    assert {rule.sampler for rule in RULES} == deterministic
    assert len({rule.label for rule in RULES}) == len(RULES) and all(rule in RULES for rule in PLANNED)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("nfe", [2, 5])
def test_each_is_there_once_with_its_calls(name, nfe):
    labels, files = zip(*seeds(name, nfe).items(), strict=True)
    assert all(file.plan.nfe == nfe for file in files)
    ends = torch.stack([sample(network, START, file.plan).flatten() for file in files])
    assert torch.isfinite(ends).all()
    distances = torch.cdist(ends, ends, p=torch.inf) + torch.eye(len(files))
    assert float(distances.min()) > 1e-8, labels[int(distances.argmin()) // len(files)]
    if nfe > 3:
        samplers = Counter(label.split()[0] for label in labels)
        # Runge–Kutta rules spend several calls a step, and some rules agree with others before them on flows.
        missing = {rule.sampler for rule in RULES if SAMPLERS[rule.sampler].nfe_per_step == 1} - set(samplers)
        assert missing <= ({"deis-log-rho", "deis-rho", "heavy-ball", "ghvb"} if name == "flow" else set())


@pytest.mark.parametrize("nfe", [5])
@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_what_the_schedulers_do(name, nfe):
    """Plan by plan, and the decisions, compiled anew, lead to the same places."""
    model, found = subject(name), seeds(name, nfe)
    decided, rounding = 0, 1e-6 if name == "zero-snr" else 1e-10  # of noise at ρ = 3·10⁴
    for label, file in found.items():
        sampler, *options = label.split()
        rule = max(
            (rule for rule in RULES if label.startswith(rule.label + " ") and rule.sampler == sampler),
            key=lambda rule: len(rule.label),
        )
        grid = dict(pair.split("=") for pair in options if pair.startswith("grid"))
        grid = {key: float(value) if key == "grid_power" else value for key, value in grid.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = get_sampler(sampler).build(model.config, **{**rule.options, **grid})
            scheduler.set_timesteps(scheduler.steps_for(nfe))
        expected = sample(network, START, scheduler.current_plan)
        error = (sample(network, START, file.plan) - expected).abs().max() / expected.abs().max()
        assert float(error) < rounding, label
        if file.decisions is not None:
            decided += 1
            compiled = file.decisions.compile(model.schedule)
            assert compiled.rows == file.plan.rows and file.decisions.nfe == nfe
    assert decided > 0.6 * len(found)


def test_every_grid_is_tried():
    labels = list(seeds("vp", 5))
    tried = {grid for grid in GRIDS if any(label.endswith(f"grid={grid}") for label in labels)}
    # Uniform in log ρ is uniform in the log-SNR; Align Your Steps belong to one kind of model each.
    assert {grid for grid in GRIDS if grid[:3] != "ays"} - tried == {"log-snr"}
    assert "flow-adams grid=fast grid_power=2.0" in labels


@pytest.mark.parametrize("name", CONFIGS)
def test_one_call_leaves_only_the_start_to_choose(name):
    found = seeds(name, 1).values()
    starts = {file.plan.rows[0].t for file in found}
    assert len(starts) == len(found) <= 4


@pytest.mark.parametrize("name", CONFIGS)
def test_files_open_again(name):
    from diffaccel.samplers.searched import PlanFile

    for file in list(seeds(name, 5).values())[::20]:
        assert PlanFile.from_dict(file.to_dict()).plan == file.plan


def test_rules_at_other_times():
    """What `decide` says of orders, corrector and momentum."""
    times = (900.0, 600.0, 300.0, 100.0)
    unipc = next(rule for rule in RULES if rule.label == "unipc solver_order=3").decide(times, False)
    assert [step.order for step in unipc.steps] == [1, 2, 2, 1]
    assert [step.corrector for step in unipc.steps] == ["pseudo"] * 3 + ["none"]
    adams = RULES[0].decide(times, True)
    assert [step.carry for step in adams.steps] == [0.0, 0.125, 0.125, 0.125]
    assert {step.core for step in adams.steps} == {"velocity"}
    assert {step.core for step in RULES[4].decide(times, True).steps} == {"velocity"}
    assert {step.core for step in RULES[4].decide(times, False).steps} == {"noise"}
