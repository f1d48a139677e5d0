"""Debian's QEMU packages for arm64, downloaded once, unpacked and kept; never installed, never run.

Knows: apt with a state of its own, so that nothing of the host's changes, and where the host's apt gets
Debian from. Does not know what is in the files.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tracer.lab.guest import cache_folder

PACKAGES = ("qemu-system-arm", "qemu-system-common", "qemu-utils")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PATIENCE_S = 600.0


class PackagesMissing(Exception):
    """They could not be had; one sentence says why."""


def programs_of(suite: str) -> Path:
    """The folder with the programs (usr/bin) of that Debian suite's QEMU for arm64. Raises PackagesMissing."""
    cache = cache_folder() / "arm64"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / suite
    with _locked(cache / f".{suite}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{suite}-") as work:
                _unpack(suite, Path(work))
                os.rename(Path(work) / "root", folder)
    return folder / "usr/bin"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two runs at once download once."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unpack(suite: str, work: Path) -> None:
    """Download the packages into `work` and unpack their programs into work/root."""
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise PackagesMissing(f"{tool} is not installed")
    apt = _private_apt(suite, work)
    _run([*apt, "update"], work)
    _run([*apt, "download", *PACKAGES], work)
    for package in sorted(work.glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(package), str(work / "all")], work)
    (work / "root/usr").mkdir(parents=True)
    os.rename(work / "all/usr/bin", work / "root/usr/bin")


def _private_apt(suite: str, work: Path) -> list[str]:
    """apt-get for arm64 and this suite alone, with lists, cache and status in `work`."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    signed = f" [signed-by={KEYRING}]" if KEYRING.exists() else ""
    (work / "sources.list").write_text(f"deb{signed} {_mirror()} {suite} main\n")
    (work / "status").touch()
    options = {
        "Dir::State": work / "state",
        "Dir::State::status": work / "status",
        "Dir::Cache": work / "cache",
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Sandbox::User": "root",  # the other user must not enter a temporary folder
    }
    return ["apt-get", "-qq", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]


def _mirror() -> str:
    """Where this host's apt gets its own Debian release from."""
    found = re.search(r"^VERSION_CODENAME=\"?(\w+)", Path("/etc/os-release").read_text(), re.M)
    codename = found[1] if found else ""
    form = ("--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)", "Created-By: Packages")
    for line in _run(["apt-get", "indextargets", *form]).splitlines():
        name, component, uri = line.split(maxsplit=2)
        if (name, component) == (codename, "main"):
            return uri
    raise PackagesMissing(f"this host's apt has no mirror of Debian {codename}")


def _run(command: list[str], folder: Path | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PackagesMissing(f"{command[0]} failed: {error}") from error
    if done.returncode:
        raise PackagesMissing(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout
