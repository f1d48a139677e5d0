"""Where in its file a site is, and what stands there.

Knows: addresses and offsets of one image. Does not know how a site was found, nor what attaches to it.
"""

from __future__ import annotations

from dataclasses import replace

from tracer.elf import Image
from tracer.errors import ImageError
from tracer.sites.model import Site

#: Bytes at a site that are compared: an instruction is no longer, on either architecture.
INSTRUCTION = 16


def placed(image: Image, site: Site) -> Site:
    """The site with its place in the image's file. ImageError where its address is not in the file, or no code."""
    segment = image.segment_at(site.address)
    if segment is None or not segment.executable:
        raise ImageError(f"there is no code at {site.address:#x}")
    size = min(INSTRUCTION, segment.vaddr + segment.filesz - site.address)
    return replace(site, offset=image.offset_of(site.address), code=image.read(site.address, max(1, size)).hex())
