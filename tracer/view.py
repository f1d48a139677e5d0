"""What a diagnosis needs of a process, be it alive (tracer/live) or a core file (tracer/core).

Knows: names and shapes only. Whatever one of the two cannot tell is None, never a guess. Frames and
stacks are made by tracer/unwind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from tracer.elf import Image
from tracer.machine import Machine
from tracer.memory import MemoryReader
from tracer.records import dataclass
from tracer.target import Region, Thread


@dataclass(frozen=True)
class Frame:
    """One frame: `address` in the process, `offset` in bytes from the start of `function`, `module` a path."""

    address: int
    function: str | None = None
    offset: int | None = None
    module: str | None = None

    def __str__(self) -> str:
        if self.function is not None:
            return self.function if self.offset is None else f"{self.function}+{self.offset:#x}"
        return f"{self.address:#x}" + (f" ({self.module.rpartition('/')[2]})" if self.module else "")


@dataclass(frozen=True)
class Stack:
    """A thread's frames, innermost first. `why_not` says why it is not `complete`, in words."""

    frames: tuple[Frame, ...] = ()
    complete: bool = False
    why_not: str | None = None

    def functions(self) -> tuple[str, ...]:
        """The names of the frames that have one, innermost first."""
        return tuple(frame.function for frame in self.frames if frame.function is not None)


class ProcessView(Protocol):
    """A process to look at. Nothing here stops or changes it; nothing raises but where said."""

    @property
    def pid(self) -> int:
        """The process, and its main thread."""
        ...

    @property
    def machine(self) -> Machine:
        """The kind of processor that it ran on."""
        ...

    @property
    def core(self) -> str | None:
        """The core file's path; None for a live process."""
        ...

    @property
    def exe(self) -> str | None:
        """The executable's path, for people to read."""
        ...

    @property
    def memory(self) -> MemoryReader:
        """Exact bytes or FaultError."""
        ...

    def open_image(self) -> Image:
        """The executable's file, to be closed by the caller. ImageError or TargetError where it is not at hand."""
        ...

    def entry_address(self) -> int:
        """Where the executable's entry point was loaded (AT_ENTRY). TargetError where that is not known."""
        ...

    def regions(self) -> list[Region]:
        """The mappings, in order of address. TargetExited when a live process ended."""
        ...

    def heap_chunks(self) -> Iterable[tuple[int, bytes]]:
        """(address, bytes) of malloc's memory, as LiveMemory.chunks() gives it; without guest RAM."""
        ...

    def thread(self, tid: int) -> Thread | None:
        """One thread now, or None when it is gone. A core's threads have no `switches`, perhaps no `state`."""
        ...

    def threads(self) -> list[Thread]:
        """All threads, the main thread first."""
        ...

    def stack(self, tid: int) -> Stack:
        """A thread's stack; empty with `why_not` where it cannot be had (a live thread that runs)."""
        ...

    def stack_at(self, pc: int, sp: int, others: Mapping[int, int] | None = None) -> Stack:
        """The stack from there on; `others` are registers that are known besides, by DWARF's numbers."""
        ...

    def stack_above(self, address: int) -> Stack:
        """The stack from the function on that the return address saved at `address` leads back into.

        Used for the stacks of coroutines that wait.
        """
        ...

    def function_at(self, address: int) -> tuple[str, int] | None:
        """(function, offset) of code at `address` by the symbols at hand, or None."""
        ...

    @property
    def frozen(self) -> bool:
        """Stopped with its whole cgroup; the threads look asleep then. False where not known."""
        ...

    def knows_files(self) -> bool:
        """Whether file_of() answers: where it does, None means that the descriptor is not open."""
        ...

    def files(self) -> dict[int, str]:
        """Every open file descriptor, as /proc/PID/fd names it; empty where not known."""
        ...

    def file_of(self, fd: int) -> str | None:
        """What a file descriptor refers to, or None."""
        ...

    def eventfd_count(self, fd: int) -> int | None:
        """The counter of an eventfd, None where it is none or not known."""
        ...

    def epoll_holds(self, epoll_fd: int, fd: int) -> bool | None:
        """Whether that epoll set holds `fd`; None where not known."""
        ...

    def kernel_stack(self, tid: int) -> tuple[str, ...]:
        """The thread's kernel functions, innermost first; empty where it may not be read."""
        ...

    def missing(self) -> tuple[str, ...]:
        """What this core file should hold and does not, in words; empty for a live process."""
        ...

    def arguments(self) -> tuple[str, ...]:
        """The command line; empty where not known."""
        ...

    def asleep_s(self, tid: int) -> float | None:
        """How long the thread has not run, in seconds; None where not known (always for a core)."""
        ...
