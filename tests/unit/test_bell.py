"""The eventfd in an AioContext, told from counters that look like one."""

from __future__ import annotations

import struct

from tracer.home import SLICES, notifiers

CONTEXT = 0x55D97DE27DD8
NOTIFIER, COUNTERS = 204, 320  # as in QEMU 11.1


def context(slices_last: int) -> bytes:
    """An AioContext with fd 10 as its notifier, and two equal counters further on."""
    data = bytearray(1024)
    struct.pack_into("<QQ", data, NOTIFIER - SLICES, 0, slices_last)
    struct.pack_into("<ii", data, NOTIFIER, 10, 10)
    struct.pack_into("<ii", data, COUNTERS, 18, 18)
    return bytes(data)


def test_the_list_ahead_of_the_notifier_proves_it() -> None:
    assert notifiers(context(CONTEXT + NOTIFIER - SLICES), CONTEXT) == {10}


def test_without_proof_both_remain() -> None:
    assert notifiers(context(0x1000), CONTEXT) == {10, 18}


def test_a_cut_context_has_none() -> None:
    assert notifiers(context(CONTEXT)[: NOTIFIER + 6], CONTEXT) == set()
