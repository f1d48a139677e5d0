"""bpf/aio_trace.c as BCC compiles it for aarch64: which of the registers the probes read.

BPF programs are the same on every machine but for struct pt_regs, so one look at the bytecode tells. Nothing
is run: there is no aarch64 machine here.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require
from tracer.layout import ElementLayout
from tracer.probes import Parameters, compile_flags, source_folder
from tracer.sites.model import CALLBACK, DONE, SITE_NAMES, SUBMIT, Site

ELEMENT = ElementLayout(
    callback=0x10, opaque=0x18, pool=0x28, func=0x30, arg=0x38, state=0x40, ret=0x44, next=0x58, prev=0x60
)
COMPILE = """
import sys
import bcc
program = bcc.BPF(src_file=sys.argv[1].encode(), cflags=sys.argv[3:])
print("bytecode", program.dump_func(sys.argv[2].encode()).hex())
"""
LOAD_U64, ADD_CONSTANT = 0x79, 0x07
CONTEXT = 1  # the register that holds struct pt_regs when a program begins


def bytecode(site: str, register: str, atomics: bool) -> list[tuple[int, int, int, int]]:
    """(operation, source register, offset, constant) of a site's program, compiled for aarch64."""
    require(importlib.util.find_spec("bcc"), "bcc is not installed")
    require(os.geteuid() == 0, "BCC needs root")
    sites = [Site(name, 0, register, "bl", "code", cheap=True) for name in SITE_NAMES]
    flags = compile_flags(sites, ELEMENT, Parameters(64, set_bits=4), atomics)
    # ARCH is what kernel developers call the machine they build for; BCC believes it.
    environment = {**os.environ, "ARCH": "arm64", "BCC_KERNEL_SOURCE": str(source_folder())}
    source = str(source_folder() / "aio_trace.c")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, source, f"on_{site}", *flags],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code = bytes.fromhex(done.stdout.split("bytecode ")[1])
    return [(op, registers >> 4, offset, value) for op, registers, offset, value in struct.iter_unpack("<BBhi", code)]


@pytest.mark.parametrize(
    ("site", "register", "number", "added", "atomics"),
    [
        (SUBMIT, "x19", 19, 0, True),
        (DONE, "x26", 26, 0, True),
        (DONE, "x19-0x44", 19, -0x44, True),
        (CALLBACK, "x20", 20, 0, False),
    ],
)
def test_a_probe_reads_the_register_it_was_told(
    site: str, register: str, number: int, added: int, atomics: bool
) -> None:
    code = bytecode(site, register, atomics)
    read = [offset for operation, source, offset, _ in code if (operation, source) == (LOAD_U64, CONTEXT)]
    assert read[0] == 8 * number  # struct user_pt_regs begins with x0 to x30
    assert ((ADD_CONSTANT, -0x44) in [(operation, value) for operation, _, _, value in code]) is bool(added)
