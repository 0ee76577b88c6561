"""Settings from text, and the errors for names that are not there."""

import math

import pytest

from diffaccel.core.config import parse_overrides, read_yaml
from diffaccel.core.errors import unknown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-1", 0.1),
        ("-2E3", -2000.0),
        (".5e+1", 5.0),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("[3e-1, inf]", [0.3, math.inf]),
        ("{a: [1e2]}", {"a": [100.0]}),
        ("12", 12),
        ("0.3", 0.3),
        ("true", True),
        ("info", "info"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("'1e5'", "1e5"),
        ("runs/1e5", "runs/1e5"),
        ("[a", "[a"),
        ("", None),
    ],
)
def test_values_of_overrides(text, value):
    found = parse_overrides([f"rule.name={text}"])["rule"]["name"]
    assert found == value and type(found) is type(value)


def test_files_are_read_alike(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-3\n")
    assert read_yaml(tmp_path / "a.yaml") == {"lr": 0.001}


@pytest.mark.parametrize(
    ("name", "words"), [("APG", "'apg'?"), ("ap", "'apg'?"), ("edm", "'EDM'?"), (3, "Unknown rule 3.")]
)
def test_suggestions_ignore_case(name, words):
    assert words in str(unknown("rule", name, ["apg", "EDM", "cfg"]))
