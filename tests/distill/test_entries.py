"""What a comparison is told to train: entries, their labels and folders, and where their settings lie."""

import pytest

from diffaccel.core.errors import UsageError
from diffaccel.distill.entries import parse_entries

FLAGS = {"teacher": "digits"}


def test_settings_of_an_entry_are_those_of_its_method_unless_they_say_otherwise():
    text = "dmd, f-distill:divergence=forward-kl:time_range=[0.1,0.9] ,dmd:data=teacher:100:trainer.ema=0.5"
    plain, kl, drawn = parse_entries(text)
    assert (plain.label, plain.method, plain.assignments) == ("dmd", "dmd", ())
    assert kl.assignments == ("method.divergence=forward-kl", "method.time_range=[0.1,0.9]")
    assert kl.folder(2) == "f-distill-divergence-forward-kl-time_range-0.1-0.9-seed-2"
    assert drawn.assignments == ("data=teacher:100", "trainer.ema=0.5") and drawn.method == "dmd"
    config = kl.resolve(FLAGS, ["method.divergence=js", "trainer.ema=0.25"], 7, 60)
    assert config.method["divergence"] == "forward-kl" and list(config.method["time_range"]) == [0.1, 0.9]
    assert (config.trainer.seed, config.trainer.steps, config.trainer.ema, config.data) == (7, 60, 0.25, "digits")


def test_recipes_and_files():
    recipe, file = parse_entries(["recipe:digits-f-distill:divergence=kl", "some/where/mine.py:eta=0.5"])
    assert (recipe.label, recipe.method) == ("recipe:digits-f-distill:divergence=kl", None)
    assert recipe.resolve(FLAGS, [], 0, None).method["name"] == "f-distill"
    assert recipe.resolve(FLAGS, [], 0, None).trainer.steps == 550  # its own
    assert (file.label, file.method, file.folder(0)) == ("mine:eta=0.5", "some/where/mine.py", "mine-eta-0.5-seed-0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "--methods dmd,"),
        (" , ", "--methods dmd,"),
        ("dmd,sid,dmd", "told apart"),
        ("divergence=js", "METHOD:NAME=VALUE"),
        ("recipe:", "recipe:NAME"),
    ],
)
def test_what_is_no_list_of_methods(text, words):
    with pytest.raises(UsageError, match=words):
        parse_entries(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dmdd", "dmdd: Unknown method .* 'dmd'"),
        ("recipe:digits", "recipe:digits: Unknown recipe"),
        ("dmd:trainer.seed=3", "trainer.seed belongs to the whole"),
        ("dmd:trainer.step=3", "trainer.steps"),
    ],
)
def test_what_cannot_be_trained(text, words):
    (entry,) = parse_entries(text)
    with pytest.raises(UsageError, match=words):
        entry.resolve(FLAGS, [], 0, None)


def test_steps_are_set_once():
    (entry,) = parse_entries("dmd:trainer.steps=3")
    assert entry.resolve(FLAGS, [], 0, None).trainer.steps == 3
    with pytest.raises(UsageError, match=r"trainer\.steps belongs to the whole"):
        entry.resolve(FLAGS, [], 0, 4)
