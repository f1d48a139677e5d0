"""The file that a process runs, opened once.

Knows: that /proc/PID/exe is no name but a wish: a process in a user namespace of its own changes what it leads to
whenever it likes (prctl(2), PR_SET_MM). So it is opened once, and what is read, compared and attached to is what
this descriptor refers to. While it is open the file's inode is nobody else's. Does not know what is in the file.
"""

from __future__ import annotations

import os
import stat
from types import TracebackType

from tracer.elf import Image
from tracer.errors import OUT_OF_FILES, HostError, ImageError, NotPermitted, pasted
from tracer.target import Target, ended

Identity = tuple[int, ...]


class Executable:
    """One opened file; close it, or use it as a context manager."""

    def __init__(self, fd: int, name: str) -> None:
        """The descriptor is ours from now on; `name` is for messages."""
        self._fd = fd
        self.name = name

    @classmethod
    def of(cls, target: Target) -> Executable:
        """What /proc/PID/exe leads to now, though it be deleted, replaced or in a container.

        Raises TargetExited, NotPermitted, HostError or ImageError.
        """
        try:
            return cls.open(target.image_path)
        except PermissionError as error:
            raise NotPermitted(f"the executable of process {target.pid} may not be read", None) from error
        except OSError as error:
            raise ended(target.pid, error) from error

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Executable:
        """That file. Raises OSError, or ImageError where it is no file."""
        name = os.fspath(path)
        file = cls(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), name)
        if not stat.S_ISREG(os.fstat(file._fd).st_mode):
            file.close()
            raise ImageError(f"{name} is not a file", f"ls -ld {pasted(name)}")
        return file

    @property
    def identity(self) -> Identity:
        """What tells it from every other file, and from itself once it is written to."""
        return identity_of(os.fstat(self._fd))

    @property
    def fd(self) -> int:
        """The descriptor, for a child process to keep."""
        return self._fd

    @property
    def path(self) -> str:
        """A path for the kernel that leads to this very file, under no name of the file's own."""
        return f"/proc/self/fd/{self._fd}"

    def image(self) -> Image:
        """The file as ELF, through the same descriptor; to be closed by itself. ImageError."""
        try:
            return Image.of_descriptor(os.dup(self._fd), self.name)
        except OSError as error:
            if error.errno in OUT_OF_FILES:
                raise HostError("aio-trace may open no more files", "ulimit -n 65536") from error
            raise

    def read(self, offset: int, size: int) -> bytes:
        """What the file holds now; fewer bytes where it ends or cannot be read."""
        try:
            return os.pread(self._fd, size, offset)
        except OSError:
            return b""

    def close(self) -> None:
        """Give the descriptor back; a second time is no error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Executable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def identity_of(found: os.stat_result) -> Identity:
    """Device, inode, size and times: what changes with a file's content, or when another takes its name."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
