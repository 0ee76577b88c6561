"""Rules by name, and settings that others published."""

import pytest

import diffaccel
from diffaccel.core.errors import DataError, UsageError
from diffaccel.guidance import rules
from diffaccel.guidance.registry import RULES, build_rule
from diffaccel.guidance.settings import SETTINGS


@pytest.mark.parametrize("info", RULES.values(), ids=lambda info: info.name)
def test_records_are_complete(info):
    cls = info.load()
    assert issubclass(cls, rules.Rule) and getattr(diffaccel, cls.__name__) is cls
    assert info.summary and "arXiv" in info.paper and info.evaluations
    assert not info.needs or info.needs.partition("=")[0] in info.options()
    assert info.needs or not info.wrapper


def test_rules_from_names():
    assert build_rule("cfg") == rules.CFG()
    assert build_rule("apg", 12, {"apg": {"eta": 0.5}}) == rules.APG(12, eta=0.5)
    assert build_rule("perp-neg", 3, {"perp-neg": {"negatives": 4}}) == rules.PerpNeg(3, 4)
    several = build_rule("perp-neg", 3, {"perp-neg": {"negatives": [4, "dull"], "weights": [1, 2]}})
    assert several == rules.PerpNeg(3, (4, "dull"), (1, 2))


def test_an_interval_is_around_a_rescaled_rule():
    options = {"interval": {"sigma_range": [0.3, 5]}, "rescale": {"factor": 0.5}}
    assert build_rule("cfg", 7, options) == rules.Interval(rules.Rescale(rules.CFG(7), 0.5), (0.3, 5.0))


def test_the_weak_model_by_name():
    rule = build_rule("autoguidance", None, {"autoguidance": {"model": "digits"}})
    assert rule.scale == rules.AutoGuidance.scale and type(rule.model).__name__ == "UNet2DModel"


@pytest.mark.parametrize(
    ("error", "words", "name", "options"),
    [
        (UsageError, "'apg'?", "agp", {}),
        (UsageError, "set interval.sigma_range", "interval", {}),
        (UsageError, "'eta'?", "apg", {"apg": {"etaa": 1}}),
        (UsageError, "is the guidance scale", "apg", {"apg": {"scale": 1}}),
        (UsageError, "'interval'?", "apg", {"intervall": {"sigma_range": [0, 1]}}),
        (UsageError, "choose apg as guidance", "cfg", {"apg": {"eta": 1}}),
        (UsageError, "apg is a rule", "apg", {"apg": 3}),
        (UsageError, r"momentum to be a number in \(-1, 1\)", "apg", {"apg": {"momentum": -1}}),
        (UsageError, "perp-neg.negatives=3", "perp-neg", {}),
        (UsageError, "autoguidance.model=FOLDER", "autoguidance", {}),
        (UsageError, "got 1.5", "perp-neg", {"perp-neg": {"negatives": 1.5}}),
        (UsageError, "got True", "perp-neg", {"perp-neg": {"negatives": True}}),
        (UsageError, "got \\[3, False\\]", "perp-neg", {"perp-neg": {"negatives": [3, False]}}),
        (UsageError, "'apg'?", "APG", {}),
        (UsageError, "Unknown guidance 1", "apg", {1: {"eta": 1}}),
        (UsageError, r"\['a', 'b'\]", "apg", {"interval": {"sigma_range": ["a", "b"]}}),
        (DataError, "no model folder", "autoguidance", {"autoguidance": {"model": "no/where"}}),
    ],
)
def test_refusals(error, words, name, options):
    with pytest.raises(error, match=words):
        build_rule(name, None, options)


def test_recommended_settings():
    assert diffaccel.recommended_guidance("sdxl", 12) == rules.APG(12, norm_threshold=15.0, momentum=-0.5)
    for name, setting in SETTINGS.items():
        rule = diffaccel.recommended_guidance(name, 3)
        assert rule.scale == 3 and rule.eta == 0 and rule.space == "x0"
        assert setting.source and setting.confidence
        if setting.scale is not None:
            assert diffaccel.recommended_guidance(name).scale == setting.scale


@pytest.mark.parametrize(
    ("name", "words"), [("sdxll", "'sdxl'?"), ("SDXL", "'sdxl'?"), (None, "sdxl"), ("flow", "scale=7")]
)
def test_settings_that_are_not_there(name, words):
    with pytest.raises(UsageError, match=words):
        diffaccel.recommended_guidance(name)
