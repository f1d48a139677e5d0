"""Which part of a thread's extended state goes into its signal frame, by recordings from a processor with AMX."""

from __future__ import annotations

import platform
import struct
from pathlib import Path

import pytest

from tracer import xstate
from tracer.errors import InjectionRefused
from tracer.xstate import EXTENDED, HEADER, SW_RESERVED, Area, area_of, same_state, signal_state

RECORDED = Path(__file__).with_name("xstate")
#: cpuid(0xd, number) on that processor: eax, ebx, ecx.
CPUID = {
    2: (256, 576, 0),
    5: (64, 1088, 0),
    6: (512, 1152, 0),
    7: (1024, 1664, 0),
    11: (16, 0, 1),  # the kernel's own
    17: (64, 2752, 2),
    18: (8192, 2816, 6),
}
AREAS = {number: area for number, words in CPUID.items() if (area := area_of(*words)) is not None}
TILES = 18
YMM9 = bytes(range(0xA0, 0xC0))


def regset(name: str) -> bytes:
    """What PTRACE_GETREGSET gave."""
    return (RECORDED / f"regset-{name}.bin").read_bytes()


def using(state: bytes, *numbers: int) -> bytes:
    """That area, with those states in use as well."""
    (used,) = struct.unpack_from("<Q", state, HEADER)
    for number in numbers:
        used |= 1 << number
    return state[:HEADER] + struct.pack("<Q", used) + state[HEADER + 8 :]


@pytest.mark.parametrize("name", ["amx-absent", "amx-permitted"])
def test_a_frame_is_what_the_kernel_lays_for_that_thread(name: str) -> None:
    state, recorded = signal_state(regset(name), AREAS), (RECORDED / f"frame-{name}.bin").read_bytes()
    assert len(state) == len(recorded) == 2820
    assert state[SW_RESERVED:EXTENDED] == recorded[SW_RESERVED:EXTENDED]
    assert state[-4:] == recorded[-4:]
    # The register in which both were seen to be the same: its two halves stand apart.
    for frame in (state, recorded):
        assert frame[160 + 9 * 16 :][:16] + frame[EXTENDED + 9 * 16 :][:16] == YMM9


def test_tiles_that_are_used_are_in_the_frame() -> None:
    state = signal_state(using(regset("amx-permitted"), TILES), AREAS)
    magic, extended, features, size = struct.unpack_from("<IIQI", state, SW_RESERVED)
    assert (magic, extended, features, size) == (xstate.FP_XSTATE_MAGIC1, 11012, 0x600E7, 11008)
    assert len(state) == 11012


def test_a_processor_without_anything_on_demand() -> None:
    """The whole area is the frame, as on all processors before AMX."""
    plain = using(bytes(832), 0, 1, 2)
    plain = plain[:SW_RESERVED] + struct.pack("<Q", 7) + plain[SW_RESERVED + 8 :]
    state = signal_state(plain, {2: Area(576, 256, on_demand=False)})
    assert (len(state), struct.unpack_from("<IIQI", state, SW_RESERVED)[2:]) == (836, (7, 832))


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (b"", "could not be read"),
        (regset("amx-absent")[:575], "could not be read"),
        (using(regset("amx-absent"), 30), "of an unknown kind"),
        (regset("amx-absent")[:HEADER] + struct.pack("<QQ", 7, 1 << 63) + bytes(2000), "of an unknown kind"),
        (regset("amx-absent")[:2800], "has 2800 bytes, not the 2816"),
        (using(regset("amx-absent"), TILES)[:11000], "has 11000 bytes, not the 11008"),
    ],
)
def test_what_cannot_be_restored_whole_is_refused(state: bytes, why: str) -> None:
    with pytest.raises(InjectionRefused, match=why):
        signal_state(state, AREAS)


def test_a_state_that_the_processor_does_not_tell_about_is_refused() -> None:
    known = {number: area for number, area in AREAS.items() if number != 17}
    with pytest.raises(InjectionRefused, match="about its state 17"):
        signal_state(regset("amx-absent"), known)


@pytest.mark.parametrize(
    ("at", "same"),
    [(0, False), (8, True), (24, False), (160, False), (420, True), (470, True), (600, False), (2752, False)],
)
def test_every_register_counts(at: int, same: bool) -> None:
    """But not the last instruction's place, which processors need not keep, nor what is reserved."""
    state = bytearray(regset("amx-absent"))
    before = bytes(state)
    state[at] ^= 0xFF
    assert same_state(before, bytes(state)) is same
    assert same_state(before, before)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are states of x86-64")
def test_this_processors_own_states() -> None:
    """Where they stand follows from nothing else; AVX's place is the same on all."""
    areas = xstate.areas()
    if 2 in areas:
        assert areas[2] == Area(576, 256, on_demand=False)
    assert all(area.offset >= EXTENDED and area.size for area in areas.values())
