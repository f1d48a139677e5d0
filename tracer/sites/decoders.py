"""The decoder of a machine; imports its disassembler only when one is asked for."""

from __future__ import annotations

from tracer.sites.isa import Decoder
from tracer.sites.proof import NotProved


def decoder_for(machine: str) -> Decoder:
    """The decoder for "x86_64" or "aarch64"; NotProved for machines whose code cannot be read yet."""
    try:
        if machine == "x86_64":
            from tracer.sites.x86 import X86Decoder

            return X86Decoder()
        if machine == "aarch64":
            from tracer.sites.a64 import A64Decoder

            return A64Decoder()
    except ImportError as error:
        raise NotProved(f"the Python package capstone is not usable: {error}") from error
    raise NotProved(f"code of {machine} cannot be read yet")
