"""`diffaccel list`: what there is, from the registries themselves."""

import json
from typing import Annotated

import typer

from ..core.errors import unknown
from .output import table


def _samplers():
    from ..samplers.registry import SAMPLERS

    return [
        {"name": s.name, "nfe/step": s.nfe_per_step, "what": s.summary, "paper": s.paper} for s in SAMPLERS.values()
    ]


def _grids():
    from ..core.spacings import GRIDS

    return [{"name": g.name, "what": g.summary, "source": g.source} for g in GRIDS.values()]


def _guidance():
    from ..guidance.registry import RULES

    return [
        {"name": r.name, "what": r.summary, "evaluations": r.evaluations, "options": _options(r), "paper": r.paper}
        for r in RULES.values()
    ]


def _options(rule) -> str:
    """Options with their defaults, as `--set` takes them; without those that are off or have to be given."""
    text = [
        option.name if option.default in (None, ()) else f"{option.name}={option.default}"
        for option in rule.options().values()
    ]
    return ", ".join(text) or "none"


def _guidance_settings():
    from ..guidance.settings import SETTINGS

    return [
        {
            "name": s.name,
            "models": s.models,
            "scale": "any" if s.scale is None else f"{s.scale:g}",
            "eta": f"{s.eta:g}",
            "norm_threshold": "calibrate" if s.norm_threshold is None else f"{s.norm_threshold:g}",
            "momentum": f"{s.momentum:g}",
            "source": s.source,
            "how sure": s.confidence,
        }
        for s in SETTINGS.values()
    ]


def _methods():
    from ..distill.registry import METHODS

    return [
        {
            "name": m.name,
            "what": m.summary,
            "network calls": m.cost,
            "presets": ", ".join(m.presets) or "none",
            "paper": m.paper,
        }
        for m in METHODS.values()
    ]


def _teachers():
    from ..models.teachers import TEACHERS

    return [_teacher(info) for info in TEACHERS.values()]


def _teacher(info) -> dict:
    from ..models.shipped import ASSETS, PICTURE, shipped_figures, shipped_size

    shipped = not info.repository
    figures, picture = shipped_figures(info.name), ASSETS / info.name / PICTURE
    return {
        "name": info.name,
        "what": info.summary,
        "size": f"{shipped_size(info.name, 'teacher/') / 2**20:.1f} MiB" if shipped else info.size,
        "from": "embedded" if shipped else info.repository,
        "data": info.data or "–",
        "licence": info.licence,
        "FD (real images)": "{fd:.2f} ({floor:.2f}) {features}".format(**figures) if figures else "–",
        "picture": str(picture) if picture.is_file() else "–",
    }


def _recipes():
    from ..core.config import read_yaml
    from ..training.recipes import recipes

    return [
        {"name": name, "for": kind, "what": read_yaml(path).get("description", "")}
        for kind in ("train", "distill", "prune")
        for name, path in recipes(kind).items()
    ]


def _features():
    from ..evaluate.features import FEATURES

    return [{"name": f.name, "length": f.num_features, "what": f.summary, "paper": f.paper} for f in FEATURES.values()]


def _metrics():
    from ..evaluate.measure import METRICS

    return [{"name": m.name, "what": m.summary, "paper": m.paper} for m in METRICS.values()]


def _presets():
    from ..evaluate.presets import PRESETS

    return [
        {"name": p.name, "filter": p.resize, "what": p.summary, "read": p.source, "differences": list(p.remarks)}
        for p in PRESETS.values()
    ]


def _filters():
    from ..evaluate.features.resize import FILTERS

    return [{"name": f.name, "what": f.summary, "used by": ", ".join(f.used_by)} for f in FILTERS.values()]


def _divergences():
    from ..distill.divergences import DIVERGENCES

    return [{"name": d.name, "character": d.character} for d in DIVERGENCES.values()]


def _pruning():
    from ..prune.scores import CRITERIA

    return [
        {"name": c.name, "what": c.summary, "cost of a score": c.cost, "selects": c.solver, "paper": c.paper or "–"}
        for c in CRITERIA.values()
    ]


def _selections():
    from ..prune.settings import WAYS

    return [{"name": name, "what": what} for name, what in WAYS.items()]


def _attention():
    from ..attention.backends import BACKENDS
    from ..core.processes import usable_device

    device = usable_device("auto")
    return [
        {"name": b.name, "what": b.summary, "kind": b.kind, "here": b.unusable(device) or f"usable on {device.type}"}
        for b in BACKENDS.values()
    ]


def _accelerations():
    from ..execution.accelerations import ACCELERATIONS

    return [{"name": a.name, "what": a.summary, "images": a.exact} for a in ACCELERATIONS.values()]


def _search(registry: str):
    """Rows of one of the tables of `solver_search`."""

    def rows():
        from .. import solver_search

        return [{"name": name, "what": what} for name, what in getattr(solver_search, registry).items()]

    return rows


_KINDS = {
    "samplers": _samplers,
    "grids": _grids,
    "guidance": _guidance,
    "guidance-settings": _guidance_settings,
    "methods": _methods,
    "divergences": _divergences,
    "pruning": _pruning,
    "selections": _selections,
    "teachers": _teachers,
    "recipes": _recipes,
    "objectives": _search("OBJECTIVES"),
    "strategies": _search("STRATEGIES"),
    "decisions": _search("DECISIONS"),
    "accelerations": _accelerations,
    "attention": _attention,
    "metrics": _metrics,
    "features": _features,
    "filters": _filters,
    "presets": _presets,
}


def show(
    kind: Annotated[str, typer.Argument(help=f"One of: {', '.join(_KINDS)}.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
):
    """List what there is of a kind, with one line each.

    Example: `diffaccel list samplers`
    """
    if kind not in _KINDS:
        raise unknown("list", kind, _KINDS)
    rows = _KINDS[kind]()
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        short = [key for key, value in rows[0].items() if not isinstance(value, list)]  # lists are for --json
        typer.echo(table(short, [[row[key] for key in short] for row in rows]))
