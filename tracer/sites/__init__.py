"""Where the probe sites of a QEMU are: what is found (model), and the search for it (locating).

The search is imported when it is first asked for: a trace of a build that was met before does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracer.sites.locating import STRATEGIES, NoStrategyWorked, Strategy, differences, locate

__all__ = ["STRATEGIES", "NoStrategyWorked", "Strategy", "differences", "locate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tracer.sites import locating

    return getattr(locating, name)
