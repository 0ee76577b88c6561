"""The plan of a run: of a method that is built, or of one whose teacher's weights are not on this machine."""

from collections.abc import Mapping

import torch

from ..core.processes import rank_and_world
from ..core.schedule import VPDiscrete
from ..models.conditions import ClassConditions, NoConditions, PromptConditions
from ..models.denoiser import Condition
from ..models.prompts import own_prompts
from ..models.released import released_teacher
from ..training.recipes import RunConfig
from .base import Distillation
from .plan import Plan, make_plan
from .run import adapter_config, card_facts, check_settings
from .task import Task

SMALL = 5_000_000  # parameters of a teacher below which memory is no question and nothing is planned before training


def plan_run(method: Distillation, config: RunConfig) -> Plan:
    """The plan of a method that is about to train."""
    condition = method.conditions.at(method.conditions.members[:1])
    textual = isinstance(method.conditions, PromptConditions)
    return _plan(method, config, condition, None, textual and own_prompts(config.teacher) is not None)


def plan_unseen(config: RunConfig) -> Plan:
    """The plan of a run with a released teacher whose weights are not here.

    Raises:
        UsageError: a teacher that `models.released.has_released` does not know, wrong settings of the method, or no real samples where it needs them.
    """
    method_class, settings = check_settings(config)
    teacher = released_teacher(config.teacher)
    teacher.schedule = VPDiscrete(torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
    null, classes = teacher.null_condition(1), getattr(teacher, "num_classes", None)
    conditions = ClassConditions(classes) if classes else PromptConditions([""], null) if null else NoConditions()
    method = method_class(
        Task(teacher, conditions, data=_Unseen() if config.data else None), settings, config.trainer.seed
    )
    return _plan(method, config, null, adapter_config(config), False)


def _plan(method: Distillation, config: RunConfig, condition: Condition | None, adapters, own: bool) -> Plan:
    gpu = torch.cuda.is_available() and config.trainer.device != "cpu"
    roles = {
        name: (module, trained)
        for part, trained in ((method.frozen(), False), (method.roles, True))
        for name, module in part.items()
    }
    return make_plan(
        roles,
        method.updates(config.trainer.steps),
        config.trainer,
        adapters=adapters,
        device="cuda" if gpu else "cpu",
        processes=rank_and_world()[1],
        condition=condition,
        facts=_facts(method, config, own),
    )


def _facts(method: Distillation, config: RunConfig, own: bool) -> Mapping[str, str]:
    """What else a plan tells; ``own`` is whether the teacher brings prompts."""
    known = card_facts(config)
    licence = f" ({known['licence']})" if known["licence"] else ""
    facts = {"method": f"{known['method']}: {known['summary']}", "teacher": f"{config.teacher}{licence}"}
    if config.description:
        facts["recipe"] = config.description
    facts["data"] = config.data or "none needed"
    if isinstance(method.conditions, PromptConditions):
        captions = f"the captions of {config.data}" if config.data else "to be given: --prompts FILE, one a line"
        facts["prompts"] = config.prompts or ("the teacher's own" if own else captions)
    return facts


class _Unseen:
    """Real samples of which nothing is known yet."""

    def __len__(self) -> int:
        return 1

    def only(self, members) -> "_Unseen":
        return self
