"""Strategy "code": exported names lead to the thread pool's code, and the code tells the rest.

Works on stripped binaries that export their global functions for modules, as Debian's do.
"""

from __future__ import annotations

from tracer.elf import Image
from tracer.sites.decoders import decoder_for
from tracer.sites.model import Located
from tracer.sites.pool_code import locate_by_code
from tracer.sites.program import Code, DynamicNames, Program

NAME = "code"


def locate(image: Image) -> Located:
    """All sites, proved; NotProved with the reason otherwise."""
    return locate_by_code(Program(Code(image, decoder_for(image.machine)), DynamicNames(image)), NAME, by_strings=True)
