"""tracer.sites.a64: A64 code of a few instructions, assembled by hand, followed by tracer.sites.flow."""

from __future__ import annotations

import pytest

from tracer.layout import ElementLayout
from tracer.probes import Parameters, compile_flags
from tracer.sites.a64 import A64Decoder
from tracer.sites.flow import Argument, Called, Compared, Const, Exchanged, Flow, Load, Returned, Stored, Sum, Value
from tracer.sites.isa import Control, Instruction
from tracer.sites.model import DONE, Site

BASE = 0x10000
CALL, FAR = "00100094", BASE + 0x4000  # bl .+0x4000
RET = "c0035fd6"
ELEMENT = ElementLayout(
    callback=0x10, opaque=0x18, pool=0x28, func=0x30, arg=0x38, state=0x40, ret=0x44, next=0x58, prev=0x60
)


def decode(*code: str) -> list[Instruction]:
    """Hand-assembled code (hex, one instruction each) at BASE."""
    instructions = A64Decoder().decode(bytes.fromhex("".join(code)), BASE)
    assert len(instructions) == len(code), [step.text for step in instructions]
    return instructions


def follow(*code: str) -> Flow:
    return Flow(BASE, decode(*code), A64Decoder.convention)


def returned(flow: Flow) -> Value:
    (event,) = (event for event in flow.events if isinstance(event, Returned))
    return event.value


def called(flow: Flow) -> Called:
    (event,) = (event for event in flow.events if isinstance(event, Called))
    return event


def stores(flow: Flow) -> list[tuple[Value, int, int, Value]]:
    return [(e.base, e.offset, e.width, e.value) for e in flow.events if isinstance(e, Stored)]


def test_callee_saved_registers_survive_calls_and_others_do_not() -> None:
    assert returned(follow("f30300aa", CALL, "e00313aa", RET)) == Argument(0)  # mov x19, x0; bl; mov x0, x19
    assert returned(follow("e90300aa", CALL, "e00309aa", RET)) != Argument(0)  # by way of x9


def test_what_was_kept_on_the_stack_comes_back() -> None:
    code = (
        "3f2303d5",  # paciasp
        "e007bfa9",  # stp x0, x1, [sp, #-16]!
        CALL,
        "e103c1a8",  # ldp x1, x0, [sp], #16
        "bf2303d5",  # autiasp
        RET,
    )
    assert returned(follow(*code)) == Argument(1)
    overwritten = "e003803d"  # str q0, [sp]
    assert returned(follow(*code[:3], overwritten, *code[3:])) != Argument(1)


def test_a_pair_may_be_loaded_over_its_base() -> None:
    flow = follow("000441a9", "e00301aa", RET)  # ldp x0, x1, [x0, #16]; mov x0, x1
    assert returned(flow) == Load(Argument(0), 0x18, 8, BASE)


def test_the_base_register_is_written_back_after_the_access() -> None:
    pre = follow("010c0cf8", "203000f9", RET)  # str x1, [x0, #0xc0]!; str x0, [x1, #0x60]
    assert stores(pre) == [
        (Argument(0), 0xC0, 8, Argument(1)),
        (Argument(1), 0x60, 8, Sum(Argument(0), 0xC0)),
    ]
    post = follow("208440f8", "e00301aa", RET)  # ldr x0, [x1], #8; mov x0, x1
    assert returned(post) == Sum(Argument(1), 8)


def test_a_store_with_release_is_a_store() -> None:
    flow = follow("08000191", "49008052", "09fd9f88", RET)  # add x8, x0, #0x40; mov w9, #2; stlr w9, [x8]
    assert stores(flow) == [(Argument(0), 0x40, 4, Const(2))]


def test_two_members_stored_together_and_zeros() -> None:
    flow = follow(
        "49008052",  # mov w9, #2
        "09fc0729",  # stp w9, wzr, [x0, #0x3c]
        "1f8404a9",  # stp xzr, x1, [x0, #0x48]
        RET,
    )
    assert stores(flow) == [
        (Argument(0), 0x3C, 4, Const(2)),
        (Argument(0), 0x40, 4, Const(0)),
        (Argument(0), 0x48, 8, Const(0)),
        (Argument(0), 0x50, 8, Argument(1)),
    ]


def test_comparisons_and_where_they_branch() -> None:
    flow = follow(
        "014040b9",  # ldr w1, [x0, #0x40]
        "3f080071",  # cmp w1, #2
        "40000054",  # b.eq .+8
        "400000b4",  # cbz x0, .+8
        RET,
    )
    tests = [(e.left, e.right) for e in flow.events if isinstance(e, Compared)]
    assert tests == [(Load(Argument(0), 0x40, 4, BASE), Const(2)), (Argument(0), Const(0))]
    assert flow.reaches(BASE, BASE + 16, avoiding=BASE + 12)


@pytest.mark.parametrize(
    ("code", "control", "target"),
    [
        (CALL, Control.CALL, FAR),
        ("60003fd6", Control.CALL, None),  # blr x3
        ("02000014", Control.JUMP, BASE + 8),  # b .+8
        ("00021fd6", Control.JUMP, None),  # br x16
        ("41001836", Control.BRANCH, BASE + 8),  # tbz w1, #3, .+8
        ("41000035", Control.BRANCH, BASE + 8),  # cbnz w1, .+8
        (RET, Control.RETURN, None),
        ("ff0b5fd6", Control.RETURN, None),  # retaa
        ("000020d4", Control.STOP, None),  # brk #0
        ("5f2403d5", Control.NEXT, None),  # bti c
    ],
)
def test_where_control_goes(code: str, control: Control, target: int | None) -> None:
    (step,) = decode(code)
    assert (step.control, step.target) == (control, target)


def test_a_page_and_an_offset_make_an_address() -> None:
    flow = follow("000000f0", "00a01e91", RET)  # adrp x0, .+0x3000; add x0, x0, #0x7a8
    assert returned(flow) == Const(BASE + 0x37A8)
    assert returned(follow("000000f0", CALL, "00a01e91", RET)) != Const(BASE + 0x37A8)
    assert returned(follow("80000010", RET)) == Const(BASE + 16)  # adr x0, .+16
    assert returned(follow("40000058", RET)) == Load(Const(BASE + 8), 0, 8, BASE)  # ldr x0, .+8


@pytest.mark.parametrize(
    "code",
    [
        "200c028b",  # add x0, x1, x2, lsl #3
        "2000829a",  # csel x0, x1, x2, eq
        "2000a0f2",  # movk x0, #1, lsl #16
        "203020b8",  # ldset w0, w0, [x1]
        "20fc5f88",  # ldaxr w0, [x1]
        "207862f8",  # ldr x0, [x1, x2, lsl #3]
        "0078df4c",  # ld1 {v0.4s}, [x0], #16
        "40d03bd5",  # mrs x0, tpidr_el0
    ],
)
def test_what_is_not_followed_is_no_argument_any_more(code: str) -> None:
    assert returned(follow(code, RET)) not in [Argument(number) for number in range(8)]


@pytest.mark.parametrize(
    ("code", "exchanged"),
    [
        (("2030e0b8",), [(Argument(1), 0, 4)]),  # ldsetal w0, w0, [x1]
        (("20fc5f88", "31fc0f88", "cfffff35"), [(Argument(1), 0, 4)]),  # ldaxr; stlxr w15, w17, [x1]; cbnz
        (("203020b8",), []),  # ldset, without release: it orders nothing
        (("20fc5f88", "317c0f88"), []),  # stxr, likewise
    ],
)
def test_an_atomic_access_is_an_exchange_if_it_has_release(code: tuple[str, ...], exchanged: list[object]) -> None:
    flow = follow(*code, RET)
    assert [(e.base, e.offset, e.width) for e in flow.events if isinstance(e, Exchanged)] == exchanged


@pytest.mark.parametrize(
    ("code", "cheap"),
    [
        (CALL, True),
        ("02000014", True),  # b
        ("40000054", True),  # b.eq
        ("400000b4", True),  # cbz
        ("41001836", True),  # tbz
        ("60003fd6", True),  # blr
        (RET, True),
        ("000000f0", True),  # adrp
        ("1f2003d5", True),  # nop
        ("ff0b5fd6", False),  # retaa
        ("5f2403d5", False),  # bti c
        ("09fd9f88", False),  # stlr
        ("e007bfa9", False),  # stp
    ],
)
def test_what_the_kernel_simulates_is_cheap(code: str, cheap: bool) -> None:
    (step,) = decode(code)
    assert step.cheap is cheap


def test_a_register_may_hold_a_place_in_the_request() -> None:
    """QEMU 11's worker keeps the addresses of ret and state, for a store with release takes no offset."""
    flow = follow("08100191", "e00308aa", CALL, RET)  # add x8, x0, #0x44; mov x0, x8; bl
    call = called(flow)
    assert call.holders(Argument(0)) == ("x0-0x44", "x8-0x44")
    assert call.holders(Argument(1)) == ("x1",)
    assert called(follow("08100191", CALL, RET)).holders(Argument(0)) == ("x0",)


@pytest.mark.parametrize(
    ("register", "member"),
    [("x19", "regs[19]"), ("x19-0x44", "regs[19]-0x44"), ("rbp", "bp"), ("r12", "r12"), ("rbx+0x8", "bx+0x8")],
)
def test_registers_as_the_probes_name_them(register: str, member: str) -> None:
    site = Site(DONE, BASE, register, "bl #0x14000", "code", cheap=True)
    assert f"-DDONE_REGISTER={member}" in compile_flags([site], ELEMENT, Parameters(16), atomics=True)


def test_addresses_and_calls_are_found_by_their_bytes() -> None:
    code = bytes.fromhex("000000f0" + "1f2003d5" + "00a01e91" + CALL + RET)  # adrp; nop; add; bl; ret
    decoder = A64Decoder()
    assert list(decoder.references(code, BASE, (BASE + 0x37A8, BASE + 0x47A8))) == [(BASE + 8, BASE + 0x37A8)]
    assert list(decoder.calls_to(code, BASE, FAR + 12)) == [BASE + 12]
    assert list(decoder.calls_to(code, BASE, FAR)) == []
    backwards = bytes.fromhex("ffffff97")  # bl .-4
    assert list(decoder.calls_to(backwards, BASE, BASE - 4)) == [BASE]
