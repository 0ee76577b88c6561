"""Methods by name, by preset and from files outside the package; recipes and settings of a run."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from distilling import tiny_task, trained

from diffaccel.core.errors import DataError, UsageError
from diffaccel.distill.registry import METHODS, MethodInfo, get_method, register
from diffaccel.distill.run import build_method, check_method, resolve_distillation
from diffaccel.training.recipes import method_settings, recipes

DOCS = Path(__file__).parents[2] / "docs" / "distillation.md"
# The example of the docs, as a reader would copy it.
OUTSIDE = next(
    block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "register(" in block
)


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr("diffaccel.distill.registry.METHODS", dict(METHODS))


@pytest.fixture
def outside(tmp_path):
    file = tmp_path / "pulled.py"
    file.write_text(OUTSIDE)
    return file


def test_a_method_file_registers_itself_and_trains(outside, tmp_path):
    info = get_method(str(outside))
    assert info.name == "pulled"
    method_class = info.load({})
    weak, strong = (
        trained(method_class(tiny_task(), method_class.Config(pull=pull)), tmp_path / str(pull), steps=6)
        for pull in (0.0, 10.0)
    )
    z = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = [
        float(method.generate(method.roles["student"], z, {"class_labels": torch.arange(8)}).detach().square().mean())
        for method in (weak, strong)
    ]
    assert sizes[1] < sizes[0]
    assert get_method(str(outside)).load({}).__name__ == "Pulled"  # imported again, as on resume


def test_settings_of_a_method_from_a_file_are_checked(outside):
    flags = {"teacher": "digits", "method": {"name": str(outside), "pull": 0.3}}
    config = resolve_distillation(flags)
    _, settings = check_method(config)
    assert settings.pull == 0.3 and config.method["pull"] == 0.3
    with pytest.raises(UsageError, match=r"method\.pul"):
        check_method(resolve_distillation({"teacher": "digits", "method": {"name": str(outside), "pul": 1.0}}))


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("x = 1\n", UsageError, "registers 0 methods"),
        ("import nowhere_to_be_found\n", DataError, "cannot be imported"),
        ("def broken(:\n", DataError, "SyntaxError"),
    ],
)
def test_a_file_that_registers_nothing_or_breaks_says_so(tmp_path, text, error, words):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(error, match=words):
        get_method(str(file))


def test_a_missing_file_and_a_taken_name(tmp_path):
    with pytest.raises(DataError, match="no file"):
        get_method(str(tmp_path / "none.py"))
    with pytest.raises(UsageError, match="another name"):
        register(MethodInfo("dmd", "", "", "", "somewhere:Else"))


def test_unknown_names_get_the_nearest():
    with pytest.raises(UsageError, match="consistency"):
        get_method("consistancy")
    with pytest.raises(UsageError, match="dmd2"):
        resolve_distillation({"teacher": "digits", "method": {"preset": "dmd3"}})
    with pytest.raises(UsageError, match="no presets"):
        resolve_distillation({"teacher": "digits", "method": {"name": "sid", "preset": "dmd2"}})


def test_a_preset_lies_between_recipe_and_flags():
    config = resolve_distillation({"teacher": "digits", "method": {"name": "dmd", "preset": "dmd2"}})
    assert config.method["critic_steps"] == 5 and config.method["gan_weight"] == 1e-3  # the recipe has 1 critic step
    config = resolve_distillation({"teacher": "digits", "method": {"name": "dmd", "preset": "dmd2", "critic_steps": 2}})
    assert config.method["critic_steps"] == 2


@pytest.mark.parametrize("name", recipes("distill"))
def test_every_recipe_resolves_and_its_settings_are_known(name):
    recipe = yaml.safe_load(recipes("distill")[name].read_text())
    own = {} if recipe.get("teacher") else {"teacher": "digits"}
    config = resolve_distillation(own, recipe=name)
    method_settings(config, get_method(config.method["name"]).load(config.method).Config)
    assert config.description and recipe["method"]["name"] in METHODS


@pytest.mark.parametrize(
    ("method", "roles"),
    [
        ({"name": "f-distill", "divergence": "reverse-kl"}, {"student", "critic"}),
        ({"name": "dmd", "preset": "ladd"}, {"student", "discriminator"}),
    ],
)
def test_a_recipe_serves_settings_that_do_without_a_helper(method, roles):
    config = resolve_distillation({"teacher": "digits", "data": "digits", "method": method})
    assert build_method(config).roles.keys() == roles
    assert set(config.trainer.optimizers) <= roles


def test_a_recipe_of_another_method_is_refused():
    with pytest.raises(UsageError, match="is one of dmd"):
        resolve_distillation({"method": {"name": "sid"}}, recipe="digits-dmd")


def test_a_student_that_never_moves_is_refused():
    flags = {"teacher": "digits", "method": {"name": "dmd", "critic_warmup": 10}, "trainer": {"steps": 10}}
    with pytest.raises(UsageError, match="rests for the first 10 steps"):
        check_method(resolve_distillation(flags))
