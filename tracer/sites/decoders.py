"""The decoder of a machine; imports its disassembler only when one is asked for."""

from __future__ import annotations

from tracer.sites.isa import Decoder
from tracer.sites.proof import NotProved


def decoder_for(machine: str) -> Decoder:
    """The decoder for "x86_64"; NotProved for machines whose code cannot be read yet."""
    if machine != "x86_64":
        raise NotProved(f"code of {machine} cannot be read yet")
    try:
        from tracer.sites.x86 import X86Decoder
    except ImportError as error:
        raise NotProved(f"the Python package capstone is not usable: {error}") from error
    return X86Decoder()
