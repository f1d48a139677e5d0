"""One executable, understood; and the way from there into a process that runs it.

Knows: that ELF addresses plus the load bias are addresses in the process. Does not know what is done
with the pools found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from tracer.debug_files import Place
from tracer.elf import Bounds, Image
from tracer.errors import FaultError, NotQemu, SitesNotFound, TargetError
from tracer.memory import MemoryReader, read_u64
from tracer.pools import PoolReader
from tracer.records import dataclass
from tracer.sites.model import Located
from tracer.target import Target
from tracer.view import ProcessView

#: worker_thread (util/thread-pool.c) is no longer than this in any build seen; bytes.
WORKER_SIZE = 2048
_ADDRESSES = 1 << 64


@dataclass(frozen=True)
class Build:
    """An executable's file, understood once for all processes that run it."""

    located: Located
    version: str | None
    entry: int
    machine: str = "x86_64"
    bounds: Mapping[str, Bounds] = field(default_factory=dict)  # of the functions located, by name


@dataclass(frozen=True)
class Loaded:
    """A build in one process: addresses are the process's own."""

    build: Build
    reader: PoolReader
    main_context: int | None  # the main loop's AioContext
    worker_code: range  # where worker_thread stands
    functions: Mapping[str, range] = field(default_factory=dict)  # QEMU's functions that were located

    def function_at(self, address: int) -> tuple[str, int] | None:
        """(function, offset) where the address is in a function that was located, symbol or none."""
        for name, code in self.functions.items():
            if address in code:
                return name, address - code.start
        return None


def read_build(path: str, name: str, only: str | None = None, place: Place | None = None) -> Build:
    """What the executable at `path` tells; `name` is what people call it, `place` where its debug files may be.

    Raises SitesNotFound, NotQemu or ImageError.
    """
    with Image.open(path) as image:
        return build_of(image, name, only, place)


def build_of(image: Image, name: str, only: str | None = None, place: Place | None = None) -> Build:
    """As read_build, of a file that is open already."""
    from tracer.sites import locate

    version = image.qemu_version()
    try:
        located = locate(image, only, place)
    except SitesNotFound as error:
        raise _not_located(name, version, error) from error
    bounds = {function: image.bounds(address) for function, address in located.functions.items()}
    return Build(located, version, image.entry, image.machine, {name: found for name, found in bounds.items() if found})


def debug_place(target: Target) -> Place:
    """Where the debug files of a process's executable may be: under its own root, or the host's.

    What is under its root it may have put there itself. What is found so is good for this process alone.
    """
    return Place(target.exe.removesuffix(" (deleted)"), (f"/proc/{target.pid}/root", "/"))


def host_place(target: Target) -> Place:
    """The same, as far as the process has no say in it: good for all that run this executable."""
    return Place(target.exe.removesuffix(" (deleted)"), beside=False)


def _not_located(name: str, version: str | None, error: SitesNotFound) -> TargetError | SitesNotFound:
    if version is None:
        return NotQemu(f"{name} is no QEMU: it has neither a QEMU version nor a thread pool", "pgrep -a qemu")
    return error


def load(view: ProcessView, build: Build) -> Loaded:
    """The build as it stands in this process. Raises TargetError."""
    memory = view.memory
    entry = view.entry_address()
    bias = entry - build.entry
    functions = build.located.functions
    if not all(0 <= address + bias < _ADDRESSES for address in functions.values()):
        raise TargetError(f"process {view.pid} cannot run this executable: its entry point is at {entry:#x}")
    worker = functions["worker_thread"]
    end = min((f for f in functions.values() if f > worker), default=worker + WORKER_SIZE)
    return Loaded(
        build,
        PoolReader(memory, build.located.layout, functions["thread_pool_completion_bh"] + bias),
        _main_context(memory, build.located.main_context, bias),
        range(worker + bias, min(end, worker + WORKER_SIZE) + bias),
        {name: range(bounds.start + bias, bounds.end + bias) for name, bounds in build.bounds.items()},
    )


def _main_context(memory: MemoryReader, pointer: int | None, bias: int) -> int | None:
    if pointer is None:
        return None
    try:
        return read_u64(memory, pointer + bias) or None
    except FaultError:
        return None
