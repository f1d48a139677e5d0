"""Where it was measured: kernel, CPU, versions. What cannot be told is said to be unknown."""

from __future__ import annotations

import os
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

from tracer import __version__

UNKNOWN = "unknown"


def header() -> dict[str, str]:
    """What belongs above every table."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "kernel": f"{os.uname().release} {os.uname().machine}",
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores, {_virtualised()}",
        "load average before": " ".join(f"{value:.2f}" for value in os.getloadavg()),
        "aio-trace": f"{__version__}, {_commit()}",
        "QEMU": _first_line("qemu-img", "--version"),
        "bpftrace": _first_line("bpftrace", "--version"),
        "bcc": _package("python3-bpfcc"),
        "perf, strace, gdb": ", ".join(_package(name) for name in ("linux-perf", "strace", "gdb")),
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _first_line(*command: str) -> str:
    return (_output(*command).splitlines() or [UNKNOWN])[0]


def _package(name: str) -> str:
    return _output("dpkg-query", "-W", "-f", "${Version}", name) or UNKNOWN


def _commit() -> str:
    changed = "+" if _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    return f"commit {_output('git', 'rev-parse', '--short', 'HEAD') or UNKNOWN}{changed}"


def _cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    return found[1] if found else UNKNOWN


def _virtualised() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return "virtualised" if re.search(r"^flags.*\bhypervisor\b", text, re.MULTILINE) else "no hypervisor seen"
