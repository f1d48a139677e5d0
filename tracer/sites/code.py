"""Strategy "code": exported names, or else strings, lead to the thread pool's code, which tells the rest.

Works on stripped binaries, whether they export their global functions for modules, as Debian's do, or
nothing at all.
"""

from __future__ import annotations

from tracer.sites.model import Located
from tracer.sites.pool_code import locate_by_code
from tracer.sites.program import DynamicNames, Program
from tracer.sites.search import Search

NAME = "code"


def locate(search: Search) -> Located:
    """All sites, proved; NotProved with the reason otherwise."""
    return locate_by_code(Program(search.code, DynamicNames(search.image)), NAME, by_strings=True)
