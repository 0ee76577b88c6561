"""`diffaccel list`, `env` and `--version`: what there is, from the registries."""

import json

import pytest

import diffaccel


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("samplers", {"ddim", "deis"}),
        ("methods", {"dmd", "f-distill"}),
        ("divergences", {"reverse-kl", "forward-kl", "js", "softened-rkl", "squared-hellinger", "jeffreys"}),
        ("teachers", {"digits", "sd15", "sdxl", "sd3", "flux", "pixart"}),
        ("recipes", {"digits", "digits-features", "digits-dmd", "digits-f-distill"}),
        ("features", {"digits64", "random-conv"}),
    ],
)
def test_list(run, kind, some):
    rows = json.loads(run("list", kind, "--json").out)
    assert some <= {row["name"] for row in rows} and all(all(row.values()) for row in rows)
    lines = run("list", kind).out.splitlines()
    assert len(lines) == len(rows) + 2 and lines[0].startswith("name")


def test_env(run):
    facts = json.loads(run("env", "--json").out)
    assert facts["diffaccel"] == diffaccel.__version__ and "torch" in facts
    assert all(key in run("env").out for key in facts)


def test_version(run):
    assert run("--version").out == f"diffaccel {diffaccel.__version__}\n"
