"""Bytes kept from one run to the next, in a folder where nobody else can have put them.

Knows: where the folder is, whom it must belong to, how a file in it shows that it is whole and was kept
for this very key. What cannot be trusted is not there: to load it gives None, to store there does
nothing, and neither raises; `refusals` says why. Knows nothing of what the bytes mean, and whoever loads
some must still prove that they fit.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

try:
    # hashlib loads OpenSSL, which takes as long as all that is done with it here. In Python up to 3.11:
    from _sha256 import sha256  # type: ignore[import-not-found]
except ImportError:
    from hashlib import sha256

#: Files kept of a kind, the newest; and the largest content that is kept or believed.
KEEP = 64
LARGEST = 8 << 20

#: Why something was not loaded or stored, the newest last: for tests, and for whoever looks for a reason.
refusals: deque[str] = deque(maxlen=16)

_MAGIC = b"aio-trace cache 1\n"
_DIGEST = 32
_HEADER = len(_MAGIC) + 2 * _DIGEST
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC


class _Refused(Exception):
    """A folder or file is not as it would be had only we written it."""


def load(kind: str, key: bytes) -> bytes | None:
    """What was stored last for `key`, or None when it is not there or not to be trusted."""
    try:
        with _folder(kind, make=False) as folder:
            return _read(folder, kind, key)
    except FileNotFoundError:
        return None
    except (OSError, _Refused) as refused:
        refusals.append(f"{kind}: {refused}")
        return None


def store(kind: str, key: bytes, content: bytes) -> None:
    """Keep `content` for `key`, in place of what was kept before; without a trustworthy folder, do nothing."""
    try:
        if len(content) > LARGEST:
            raise _Refused(f"{len(content)} bytes are more than the {LARGEST} that are kept")
        with _folder(kind, make=True) as folder:
            _write(folder, _name(key), _header(kind, key, content) + content)
            _forget_the_oldest(folder)
    except (OSError, _Refused) as refused:
        refusals.append(f"{kind}: {refused}")


def _base() -> tuple[str, int]:
    """The folder of all caches, and how many of its last components may be made where they are missing."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return chosen, 1
    if os.geteuid() == 0:
        return "/var/cache", 0
    return os.path.join(os.environ.get("HOME", ""), ".cache"), 1


@contextmanager
def _folder(kind: str, *, make: bool) -> Iterator[int]:
    """The opened folder of a kind, each component on the way to it seen to be safe."""
    base, own = _base()
    parts = base.split("/")[1:]
    if not base.startswith("/") or {".", ".."} & {*parts, kind} or "/" in kind:
        raise _Refused(f"{base!r} is not the absolute path of a folder")
    parts = [*filter(None, parts), "aio-trace", kind]
    folder = os.open("/", os.O_DIRECTORY | _OPEN)
    try:
        shared = _check_folder(folder, "/", below_shared=False)
        for position, part in enumerate(parts):
            below = _enter(folder, part, make=make and position >= len(parts) - 2 - own)
            os.close(folder)
            folder = below
            # What is ours is nobody's to share; above it, /tmp and its like may be.
            path = "/" + "/".join(parts[: position + 1])
            shared = _check_folder(folder, path, below_shared=shared)
        if shared:
            raise _Refused(f"everybody may write to {path}")
        yield folder
    finally:
        os.close(folder)


def _enter(folder: int, part: str, *, make: bool) -> int:
    if make:
        with suppress(FileExistsError):
            os.mkdir(part, 0o700, dir_fd=folder)
    return os.open(part, os.O_RDONLY | os.O_DIRECTORY | _OPEN, dir_fd=folder)


def _check_folder(folder: int, path: str, *, below_shared: bool) -> bool:
    """Refuse a folder in which another user could exchange things; True when it is one like /tmp.

    Where all may make folders, one that is not ours could be another's choice of one: root's, say.
    """
    found = os.fstat(folder)
    shared = bool(found.st_mode & stat.S_ISVTX) and found.st_uid == 0
    if found.st_uid not in ((os.geteuid(),) if below_shared else (os.geteuid(), 0)):
        raise _Refused(f"{path} belongs to user {found.st_uid}")
    if not found.st_mode & _OTHERS_MAY_WRITE:
        return False
    if not shared:
        raise _Refused(f"other users may write to {path}")
    return True


def _read(folder: int, kind: str, key: bytes) -> bytes:
    name = _name(key)
    # Not to hang where somebody left a FIFO.
    with open(os.open(name, os.O_RDONLY | os.O_NONBLOCK | _OPEN, dir_fd=folder), "rb", buffering=0) as file:
        _check_file(os.fstat(file.fileno()), name)
        whole = file.read(_HEADER + LARGEST + 1)
    content = whole[_HEADER:]
    if len(content) > LARGEST or whole[:_HEADER] != _header(kind, key, content):
        raise _Refused(f"{name} is damaged, or was kept for something else")
    return content


def _check_file(found: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _Refused(f"{name} is not a file")
    if found.st_uid != os.geteuid():
        raise _Refused(f"{name} belongs to user {found.st_uid}")
    if found.st_mode & _OTHERS_MAY_WRITE:
        raise _Refused(f"other users may write to {name}")
    if found.st_nlink > 1:  # 0 where another run has just put a newer one in its place
        raise _Refused(f"{name} has {found.st_nlink} names")


def _write(folder: int, name: str, whole: bytes) -> None:
    """Whoever reads sees the file before or the file after, never half of one."""
    new = f"{name}.{os.getpid()}"
    with suppress(FileNotFoundError):
        os.unlink(new, dir_fd=folder)
    written = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o600, dir_fd=folder)
    try:
        with open(written, "wb") as file:
            file.write(whole)
        os.rename(new, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with suppress(OSError):
            os.unlink(new, dir_fd=folder)
        raise


def _forget_the_oldest(folder: int) -> None:
    """Whatever lies there counts, also what a writer that was killed left behind."""
    files = []
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):
            files.append((os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime_ns, name))
    for _, name in sorted(files)[:-KEEP]:
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)


def digest(content: bytes) -> str:
    """SHA-256, as text."""
    return str(sha256(content).hexdigest())


def _name(key: bytes) -> str:
    return digest(key)


def _header(kind: str, key: bytes, content: bytes) -> bytes:
    of_key = bytes.fromhex(digest(kind.encode() + b"\0" + key))
    return _MAGIC + of_key + bytes.fromhex(digest(content))
