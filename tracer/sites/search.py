"""What every strategy gets: the image, its code, and its debug files.

Knows: nothing but how to make them when they are first asked for. Does not know what is looked for.
"""

from __future__ import annotations

from functools import cached_property

from tracer.debug_files import DebugFiles, Place
from tracer.elf import Image
from tracer.sites.decoders import decoder_for
from tracer.sites.program import Code


class Search:
    """One image that is searched by all strategies; close it."""

    def __init__(self, image: Image, place: Place | None = None) -> None:
        self.image = image
        self.debug = DebugFiles(image, place)

    @cached_property
    def code(self) -> Code:
        """The image's functions; NotProved where its machine's code cannot be read."""
        return Code(self.image, decoder_for(self.image.machine))

    def close(self) -> None:
        """Close the debug files; the image itself is its owner's."""
        self.debug.close()
