"""Settings: layers, types, packaged recipes."""

from dataclasses import dataclass, field

import pytest

from diffaccel.core.config import build, differences, merge, parse_overrides, read_yaml, to_dict
from diffaccel.core.errors import UsageError
from diffaccel.distill.registry import METHODS
from diffaccel.distill.run import resolve_distillation
from diffaccel.training.config import OptimizerConfig, TrainerConfig
from diffaccel.training.recipes import RunConfig, complete, method_settings, read_recipe, recipes, resolve
from diffaccel.training.registry import load_method


@dataclass
class Inner:
    rate: float = 0.1
    names: tuple[str, ...] = ()


@dataclass
class Outer:
    count: int
    inner: Inner = field(default_factory=Inner)
    many: dict[str, Inner] = field(default_factory=dict)
    note: str | None = None


def test_nested_settings_are_built_and_survive_the_way_back():
    data = {"count": 3, "inner": {"rate": "1e-3", "names": ["a"]}, "many": {"x": {"rate": 2}}, "note": None}
    config = build(Outer, data)
    assert config.inner.rate == 1e-3 and config.many["x"].rate == 2.0 and config.inner.names == ("a",)
    assert build(Outer, to_dict(config)) == config


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"cuont": 3}, "count"),
        ({}, "count"),
        ({"count": 1.5}, "count must be int"),
        ({"count": True}, "count must be int"),
        ({"count": 1, "inner": {"rte": 1}}, "inner.rate"),
        ({"count": 1, "inner": 3}, "group"),
        ({"count": 1, "inner": {"rate": "fast"}}, "inner.rate must be float"),
        ({"count": 1, "inner": {"names": "a"}}, "list"),
    ],
)
def test_wrong_settings_name_their_path(data, word):
    with pytest.raises(UsageError, match=word):
        build(Outer, data)


def test_overrides_are_typed_nested_and_merged():
    assert parse_overrides(["a.b=1", "a.c=x", "d=[1, 2]"]) == {"a": {"b": 1, "c": "x"}, "d": [1, 2]}
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 5}}) == {"a": {"b": 5, "c": 2}}
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}, "c": 3}) == ["a.b: 1 -> 2", "c: None -> 3"]
    for wrong in ("novalue", "=1", "a..b=1"):
        with pytest.raises(UsageError, match="--set"):
            parse_overrides([wrong])


def test_later_layers_win(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("trainer: {steps: 20, seed: 2}\n")
    base = {"method": {"name": "dmd"}, "trainer": {"steps": 10, "seed": 1, "ema": 0.5}}
    config = resolve(base, file, ["trainer.seed=3"], {"trainer": {"batch_size": 4}})
    assert (config.trainer.steps, config.trainer.seed, config.trainer.ema, config.trainer.batch_size) == (20, 3, 0.5, 4)


@pytest.mark.parametrize("text", ["- a list", "a: [", "\x00"])
def test_files_that_are_no_settings(tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml"):
        read_yaml(file)


@pytest.mark.parametrize("name", recipes("train"))
def test_training_recipes_fit_their_method(name):
    config = resolve(read_recipe("train", name), None, [], {})
    method_settings(config, load_method(config.method["name"]).Config)
    assert config.description


@pytest.mark.parametrize("name", recipes("distill"))
def test_distillation_recipes_fit_their_method(name):
    config = resolve(read_recipe("distill", name), None, [], {})
    method_settings(config, METHODS[config.method["name"]].load(config.method).Config)
    assert config.description


def test_the_recipe_follows_teacher_and_method():
    assert resolve_distillation({"teacher": "digits"}).method["name"] == "dmd"
    chosen = resolve_distillation({"teacher": "digits", "method": {"name": "f-distill"}})
    assert chosen.data == "digits" and chosen.method["divergence"] == "js"
    general = resolve_distillation({"teacher": "some/folder", "method": {"name": "f-distill"}})
    assert general.data is None and general.trainer.steps > chosen.trainer.steps
    with pytest.raises(UsageError, match="--teacher"):
        resolve_distillation({})


def test_what_a_run_stores_shows_every_later_change():
    stored = complete(RunConfig({"name": "dmd"}), ["student", "critic"])
    rate = {"critic": OptimizerConfig(lr=1e-3)}
    changed = complete(RunConfig({"name": "dmd"}, TrainerConfig(optimizers=rate), data="digits"), ["student", "critic"])
    found = differences(stored, changed, additions=False)
    assert found == ["data: None -> 'digits'", "trainer.optimizers.critic.lr: 0.0001 -> 0.001"]


def test_defaults_of_the_loop_are_valid():
    assert TrainerConfig().optimizers == {} and OptimizerConfig().lr > 0
