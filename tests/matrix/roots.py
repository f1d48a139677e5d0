"""Other Debian releases, each in a folder of its own, made once and kept.

Knows: debootstrap, and where the host's own apt gets Debian from. A root is complete when its marker is
there; one that was interrupted is made again. Does not know QEMU beyond its packages' names.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tracer.lab.guest import cache_folder

PACKAGES = ("qemu-system-x86", "qemu-utils")
MARKER = ".aio-trace-complete"
PATIENCE_S = 1200.0


@dataclass(frozen=True)
class Release:
    """A Debian release and the QEMU in it; `backports` names the suite that QEMU is taken from instead."""

    name: str
    suite: str
    qemu: str  # how its version begins
    backports: str | None = None


RELEASES = (
    Release("bullseye", "bullseye", "5.2."),
    Release("bookworm", "bookworm", "7.2."),
    Release("trixie", "trixie", "10.0."),
    Release("trixie-backports", "trixie", "11.", backports="trixie-backports"),
)


class RootMissing(Exception):
    """The root could not be made; one sentence says why."""


def root_of(release: Release) -> Path:
    """The folder of that release, complete; made if need be. Raises RootMissing."""
    cache = cache_folder() / "roots"
    cache.mkdir(parents=True, exist_ok=True)
    root = cache / release.name
    with locked(cache / f".{release.name}.lock") as lock:
        if not is_complete(root):
            remove(root)
            _make(release, root, lock)
            (root / MARKER).touch()
    return root


def is_complete(root: Path) -> bool:
    """Whether it was made to the end."""
    return (root / MARKER).is_file()


def remove(root: Path) -> None:
    """Take away a half-made root; what debootstrap may have left mounted in it goes first."""
    for mount in sorted(_mounts_in(root), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=True)
    if root.exists():
        shutil.rmtree(root)


def _mounts_in(root: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [point for point in (line.split()[1] for line in lines) if Path(point).is_relative_to(root)]


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Two runs at once make one root. Whoever has the descriptor holds the lock."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _make(release: Release, root: Path, lock: int) -> None:
    if release.backports is None:
        debootstrap(release.suite, root, PACKAGES, lock)
        return
    debootstrap(release.suite, root, (), lock)
    (root / "etc/apt/sources.list.d/backports.list").write_text(f"deb {mirror()} {release.backports} main\n")
    run(["chroot", str(root), "apt-get", "update"], lock)
    install = ["apt-get", "install", "-y", "--no-install-recommends", "-t", release.backports, *PACKAGES]
    run(["chroot", str(root), *install], lock)
    run(["chroot", str(root), "apt-get", "clean"])


def debootstrap(suite: str, root: Path, packages: Sequence[str], *locks: int, foreign: str | None = None) -> None:
    """Make a root of that suite with these packages; of a `foreign` architecture the first stage. RootMissing."""
    if platform.machine() != "x86_64":
        raise RootMissing("roots are made on x86-64 only")
    if not shutil.which("debootstrap"):
        raise RootMissing("debootstrap is not installed")
    # A mount namespace of its own: what debootstrap mounts is gone when it is, however it ends.
    command = ["unshare", "--mount", "debootstrap", "--variant=minbase"]
    command += ["--foreign", f"--arch={foreign}"] if foreign else []
    if packages:
        command.append("--include=" + ",".join(packages))
    run([*command, suite, str(root), mirror()], *locks)


def mirror() -> str:
    """Where this host's apt gets its own Debian release from. Raises RootMissing."""
    found = re.search(r"^VERSION_CODENAME=\"?(\w+)", Path("/etc/os-release").read_text(), re.M)
    codename = found[1] if found else ""
    try:
        lines = run(["apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)", *_INDEXES])
    except RootMissing as error:
        raise RootMissing(f"this host's apt does not tell a Debian mirror: {error}") from error
    for line in lines.splitlines():
        name, component, uri = line.split(maxsplit=2)
        if (name, component) == (codename, "main") and uri.startswith(("http:", "https:", "file:")):
            return uri
    raise RootMissing(f"this host's apt has no web mirror of {codename or 'its own release'}")


_INDEXES = ("Created-By: Packages",)


def run(command: Sequence[str | Path], *locks: int) -> str:
    """What the command prints. It keeps `locks` as long as it runs, even if this process is killed meanwhile."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8", **_proxies()}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RootMissing(f"{command[0]} failed: {error}") from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip()[-500:]
        raise RootMissing(f"{' '.join(command)} ended with {done.returncode}: {last}")
    return done.stdout


def _proxies() -> dict[str, str]:
    """The proxies that the host's apt uses; debootstrap takes them from the environment."""
    found = {}
    for scheme in ("http", "https"):
        done = subprocess.run(
            ["apt-config", "dump", "--format", "%v", f"Acquire::{scheme}::Proxy"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.stdout.strip() not in ("", "DIRECT"):
            found[f"{scheme}_proxy"] = done.stdout.strip()
    return found
