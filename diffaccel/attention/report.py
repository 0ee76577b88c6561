"""What `optimize_attention` did: to read, to print and to undo."""

from collections import Counter
from dataclasses import asdict, dataclass, field

from .collect import Use
from .install import Confirmation
from .measure import Measurement
from .route import Installation


@dataclass(frozen=True)
class Choice:
    """The backend of one signature.

    Attributes:
        use: the signature and the modules that have it.
        backend: name of the chosen one.
        reason: a clause.
        for_memory: whether it is chosen for its memory, faster or not.
        measured: of every candidate.
        cached: whether measurements are from an earlier process.
    """

    use: Use
    backend: str
    reason: str
    for_memory: bool
    measured: tuple[Measurement, ...]
    cached: bool


@dataclass(frozen=True)
class NetworkReport:
    """One network.

    Attributes:
        name: of the pipeline's component, or "network".
        choices: one per signature, the most expensive first.
        left_alone: names of modules that keep what they have, with the reason.
        confirmation: end to end; None where the default was chosen throughout, or confirmation was not wanted.
        installed: whether the choice is in use (until `undo`).
        installation: the routes, None where there are none.
    """

    name: str
    choices: tuple[Choice, ...]
    left_alone: tuple[tuple[str, str], ...]
    confirmation: Confirmation | None
    installed: bool
    installation: Installation | None = field(repr=False, default=None)

    @property
    def outcome(self) -> str:
        """What became of the choice, as a clause."""
        if not self.choices:
            return "nothing to choose"
        if self.confirmation is None:
            return "installed, not confirmed end to end" if self.installed else "PyTorch's choice is kept throughout"
        if self.confirmation.problem is not None:
            return f"not installed: {self.confirmation.problem}{_times(self.confirmation)}"
        return f"installed{_times(self.confirmation)}"


@dataclass
class AttentionReport:
    """What was measured and installed.

    Attributes:
        networks: one for each network of the pipeline.
        not_tried: backends with the reason.
    """

    networks: tuple[NetworkReport, ...]
    not_tried: tuple[tuple[str, str], ...]

    def undo(self) -> None:
        """Give every module back the very processor it had; without effect the second time."""
        for network in self.networks:
            if network.installation is not None:
                network.installation.remove()

    def explain(self) -> str:
        """A table: every signature with its choice, the times of all candidates, and why others are out."""
        lines = []
        for network in self.networks:
            lines += _network(network)
        if self.not_tried:
            lines += ["not tried:", *(f"  {name}: {reason}" for name, reason in self.not_tried)]
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """The same as plain data, for JSON."""
        return {
            "networks": [_plain(network) for network in self.networks],
            "not_tried": [{"backend": name, "reason": reason} for name, reason in self.not_tried],
        }

    def __str__(self) -> str:
        return self.explain()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()


def _plain(network: NetworkReport) -> dict:
    choices = [
        {
            "signature": choice.use.signature.text,
            "kinds": sorted(choice.use.kinds),
            "calls": len(choice.use.modules),
            "backend": choice.backend,
            "reason": choice.reason,
            "measured": [asdict(one) for one in choice.measured],
            "cached": choice.cached,
        }
        for choice in network.choices
    ]
    return {
        "name": network.name,
        "installed": network.installed,
        "choices": choices,
        "left_alone": [{"module": name, "reason": reason} for name, reason in network.left_alone],
        "confirmation": None if network.confirmation is None else asdict(network.confirmation),
    }


def _network(network: NetworkReport) -> list[str]:
    lines = [f"{network.name}: {network.outcome}"]
    for choice in network.choices:
        use = choice.use
        kinds = "/".join(sorted(use.kinds))
        cached = ", measured before" if choice.cached else ""
        lines.append(
            f"  {use.signature.text}  {kinds} × {len(use.modules)}: {choice.backend} ({choice.reason}{cached})"
        )
        lines += _rows(choice)
    for reason, count in Counter(reason for _, reason in network.left_alone).items():
        lines.append(f"  left alone: {count} module{'s' if count > 1 else ''}, because {reason}")
    return lines


def _rows(choice: Choice) -> list[str]:
    timed = sorted((one for one in choice.measured if one.excluded is None), key=lambda one: one.seconds)
    rows = []
    for one in timed:
        mark = "*" if one.backend == choice.backend else " "
        rows.append(f"   {mark} {one.backend:<14}{1000 * one.seconds:>10.3f} ms{one.bytes / 2**20:>10.3g} MiB")
    return rows + [f"     {one.backend:<14} out: {one.excluded}" for one in choice.measured if one.excluded is not None]


def _times(confirmation: Confirmation) -> str:
    if not confirmation.chosen:
        return ""
    ratio = confirmation.default / confirmation.chosen
    return (
        f", {1000 * confirmation.default:.2f} ms per evaluation before, {1000 * confirmation.chosen:.2f} after "
        f"({ratio:.2f}×), outputs differ by {confirmation.difference:.1g}"
    )
