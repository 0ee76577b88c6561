"""The picture in docs/architecture.md, checked against the imports; and what must not appear in the code at all."""

import ast
import re
from pathlib import Path

import pytest

import diffaccel

ROOT = Path(diffaccel.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TOP = ("__init__", "__main__", "_registration")  # may name anything, lazily

# An import must point to a lower rank.
RANK = {
    "core": 0,
    "models": 1,
    "samplers": 2,
    "guidance": 2,
    "attention": 2,
    "search": 3,
    "training": 3,
    "execution": 3,
    "prune": 4,
    "distill": 4,
    "generation": 4,
    "evaluate": 5,
    "testing": 5,
    "distillation": 6,
    "pruning": 6,
    "solver_search": 6,
    "distill_comparison": 7,
    "cli": 8,
}
# Arrows that point down and are forbidden all the same.
FORBIDDEN = {
    ("samplers", "models"),
    ("generation", "training"),
    ("evaluate", "training"),
    ("evaluate", "distill"),
    ("generation", "prune"),
    ("testing", "training"),
    ("testing", "distill"),
    ("testing", "generation"),
    ("cli", "testing"),
}


def _part(module: str) -> str:
    """diffaccel.core.files → core; diffaccel → ""."""
    return [*module.split("."), ""][1]


def _owner(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imported(path: Path) -> list[str]:
    """Absolute names of this package's modules that a file imports, inside functions and by registry strings too."""
    module = ".".join(["diffaccel", *path.relative_to(ROOT).with_suffix("").parts])
    package = module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += re.findall(r"^(diffaccel\.[\w.]+)(?::\w+)?$", node.value)
    return [name for name in found if name.split(".")[0] == "diffaccel"]


def _arrow_is_allowed(source: str, target: str) -> bool:
    return source == target or (RANK[target] < RANK[source] and (source, target) not in FORBIDDEN)


def test_every_part_has_a_rank():
    assert {_owner(path) for path in FILES} - set(TOP) <= set(RANK)


@pytest.mark.parametrize("path", [path for path in FILES if _owner(path) not in TOP], ids=_name)
def test_imports_point_down(path):
    source = _owner(path)
    for name in _imported(path):
        if name == "diffaccel.__version__":
            continue
        assert _part(name) in RANK, f"{source} imports {name} through the top level; import it from its own module"
        assert _arrow_is_allowed(source, _part(name)), f"{source} must not import {name}"


def test_the_check_sees_relative_nested_and_named_imports(tmp_path, monkeypatch):
    file = tmp_path / "samplers" / "wrong.py"
    file.parent.mkdir()
    file.write_text(
        "from ..models.denoiser import Denoiser\nNAME = 'diffaccel.cli.app:main'\n"
        "def late():\n    import diffaccel.training.ema\n    from .. import evaluate\n"
    )
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    parts = {_part(name) for name in _imported(file)}
    assert parts == {"models", "cli", "training", "evaluate"}
    assert not any(_arrow_is_allowed("samplers", part) for part in parts)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_nothing_executes_code_from_files(path):
    """No pickle, no unsafe loaders, no eval: a model folder or configuration of a stranger is data."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {name.split(".")[0] for name in names} & {"pickle", "dill", "joblib", "shelve", "marshal"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
            if called == "torch.load":  # published weights that exist as .pth only
                assert "weights_only=True" in ast.unparse(node)
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "trust_remote_code"):
                    assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False, ast.unparse(node)


def test_files_stay_short():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert max(lengths.values()) <= 400, max(lengths, key=lengths.get)
    assert sorted(lengths.values())[len(lengths) // 2] <= 150
