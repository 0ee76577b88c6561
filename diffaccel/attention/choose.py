"""Which backend a signature gets."""

from .measure import Measurement

HYSTERESIS = 0.05
"""By how much another backend must be faster than the default to replace it."""


def choose(measured: list[Measurement], memory_cap: int | None = None) -> tuple[str, str, bool]:
    """The fastest backend that keeps to the memory, and the default unless that is 5 % slower.

    Args:
        measured: of all candidates, "default" among them.
        memory_cap: bytes that one call may allocate; None for no limit.

    Returns:
        The backend's name, the reason as a clause, and whether it is chosen for its memory.
    """
    usable = [one for one in measured if one.excluded is None]
    within = [one for one in usable if memory_cap is None or one.bytes <= memory_cap]
    if not within:
        least = min(usable, key=lambda one: one.bytes)
        return least.backend, f"none keeps to {memory_cap} bytes; this one allocates least", True
    best = min(within, key=lambda one: one.seconds)
    default = next((one for one in within if one.backend == "default"), None)
    if default is None:
        return best.backend, f"the default allocates more than {memory_cap} bytes", True
    if best.seconds < (1 - HYSTERESIS) * default.seconds:
        return best.backend, f"{default.seconds / best.seconds:.2f}× as fast as the default", False
    return "default", "nothing is 5 % faster" if len(within) > 1 else "nothing else is usable", False
