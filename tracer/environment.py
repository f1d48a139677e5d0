"""What of the caller's environment is taken at its word, and what is left out.

Knows: which variables name folders out of which we, or programs that we start, take code or put files, and whether
anybody else could exchange what is in such a folder. Reads metadata only. Python's own variables and the caller's
home are none of its business: the launcher (bin/aio-trace) starts Python isolated from them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import MutableMapping

#: Where programs are looked up when nothing of PATH is left.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Folders for files that do not last; sticky ones, such as /tmp, will do.
SCRATCH = ("TMPDIR", "TEMP", "TMP")
#: Folders for files that last.
CACHES = ("XDG_CACHE_HOME", "AIO_TRACE_LAB_CACHE")

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS = 16


def clean(environment: MutableMapping[str, str]) -> list[str]:
    """Take out every folder that others could put something into; what was left out, and why."""
    refused = []
    for name, shared in (*((name, True) for name in SCRATCH), *((name, False) for name in CACHES)):
        why = why_not(environment[name], shared=shared) if environment.get(name) else None
        if why:
            del environment[name]
            refused.append(f"{name} is not taken: {why}")
    kept = []
    for folder in environment.get("PATH", PATH).split(":"):
        why = why_not(folder)
        if why:
            refused.append(f"PATH is taken without {folder!r}: {why}")
        else:
            kept.append(folder)
    environment["PATH"] = ":".join(kept) or PATH
    return refused


def why_not(folder: str, *, shared: bool = False) -> str | None:
    """Why what is in a folder may be another user's choice, or None; with `shared`, one like /tmp will do.

    A folder that is not there is judged by those on the way to it.
    """
    if not folder.startswith("/"):
        return "it is no absolute path"
    return _why_not(folder, shared, _MOST_LINKS)


def _why_not(folder: str, shared: bool, links: int) -> str | None:
    path, sticky = "/", False
    for part in [*filter(None, folder.split("/")), ""]:
        try:
            found = os.lstat(path)
        except OSError:
            # Whoever could make it could do so in the folder before.
            return f"{path} is not there, and everybody may make it" if sticky and not shared else None
        ours = (os.geteuid(),) if sticky else (os.geteuid(), 0)
        if found.st_uid not in ours:
            return f"{path} belongs to user {found.st_uid}"
        if stat.S_ISLNK(found.st_mode):
            if not links:
                return f"{path} is one link too many"
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
            why = _why_not(path, True, links - 1)
            if why or not os.path.exists(path):
                return why
            found = os.stat(path)
        sticky = bool(found.st_mode & _OTHERS_MAY_WRITE)
        if sticky and not (found.st_mode & stat.S_ISVTX and found.st_uid == 0):
            return f"other users may write to {path}"
        path = os.path.join(path, part)
    return f"everybody may write to {folder}" if sticky and not shared else None
