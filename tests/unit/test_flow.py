"""tracer.sites.flow on functions of a few instructions, assembled by hand."""

from __future__ import annotations

import pytest

from tracer.sites.decoders import decoder_for
from tracer.sites.flow import Argument, Called, Compared, Flow, FlowError, Load, Merged, Part, Returned, Stored, Sum
from tracer.sites.isa import Control

BASE = 0x1000


def follow(*code: str, returns: bool = True) -> Flow:
    """The flow of hand-assembled code (hex, one instruction each) at BASE."""
    decoder = decoder_for("x86_64")
    instructions = decoder.decode(bytes.fromhex("".join(code)), BASE)
    assert len(instructions) == len(code), [step.text for step in instructions]
    return Flow(BASE, instructions, decoder.convention, lambda target: returns)


def returned(flow: Flow) -> object:
    (event,) = (event for event in flow.events if isinstance(event, Returned))
    return event.value


def test_callee_saved_registers_survive_calls_and_others_do_not() -> None:
    flow = follow(
        "4889fb",  # mov rbx, rdi
        "e800000000",  # call .+5
        "4889d8",  # mov rax, rbx
        "c3",
    )
    assert returned(flow) == Argument(0)
    clobbered = follow("e800000000", "4889f8", "c3")  # call; mov rax, rdi
    assert returned(clobbered) != Argument(0)


def test_pushed_and_popped_values_are_the_same() -> None:
    assert returned(follow("57", "e800000000", "58", "c3")) == Argument(0)  # push rdi; call; pop rax
    assert returned(follow("57", "c6042401", "58", "c3")) != Argument(0)  # movb $1, (%rsp) between


def test_half_a_pointer_is_not_the_pointer() -> None:
    assert returned(follow("89f8", "c3")) == Part(Argument(0), 4)  # mov eax, edi
    assert returned(follow("8b4740", "c3")) == Load(Argument(0), 0x40, 4, BASE)  # mov eax, [rdi+0x40]


def test_the_same_place_read_twice_may_hold_two_values() -> None:
    flow = follow("488b07", "488b0f", "4839c8", "c3")  # mov rax,[rdi]; mov rcx,[rdi]; cmp rax,rcx
    (test,) = (event for event in flow.events if isinstance(event, Compared))
    assert test.left != test.right


def test_pointer_arithmetic_is_followed() -> None:
    flow = follow(
        "488d4758",  # lea rax, [rdi+0x58]
        "4883c008",  # add rax, 8
        "488930",  # mov [rax], rsi
        "c3",
    )
    assert returned(flow) == Sum(Argument(0), 0x60)
    (store,) = (event for event in flow.events if isinstance(event, Stored))
    assert (store.base, store.offset, store.value) == (Argument(0), 0x60, Argument(1))


def test_what_differs_between_two_ways_is_merged() -> None:
    flow = follow(
        "4889f8",  # mov rax, rdi
        "85d2",  # test edx, edx
        "7403",  # je the ret
        "4889f0",  # mov rax, rsi
        "c3",
    )
    value = returned(flow)
    assert isinstance(value, Merged)
    assert flow.origins(value) == {Argument(0), Argument(1)}


def test_what_is_the_same_on_two_ways_is_not_merged() -> None:
    flow = follow("4889f8", "85d2", "7403", "4889f8", "c3")  # mov rax, rdi on both ways
    assert returned(flow) == Argument(0)


def test_a_list_walk_tells_its_head_and_next() -> None:
    flow = follow(
        "488b9fb8000000",  # mov rbx, [rdi+0xb8]
        "837b4002",  # loop: cmp dword [rbx+0x40], 2
        "488b5b58",  # mov rbx, [rbx+0x58]
        "4885db",  # test rbx, rbx
        "75f3",  # jne loop
        "c3",
    )
    test = next(event for event in flow.events if isinstance(event, Compared))
    assert isinstance(test.left, Load)
    element = test.left.base
    ways = {(way.base, way.offset) for way in flow.origins(element) if isinstance(way, Load)}
    assert ways == {(Argument(0), 0xB8), (element, 0x58)}


def test_a_loop_that_changes_nothing_merges_nothing() -> None:
    flow = follow("4889fb", "ffca", "75fc", "4889d8", "c3")  # mov rbx,rdi; dec edx; jne; mov rax,rbx
    assert returned(flow) == Argument(0)


def test_which_calls_every_way_passes() -> None:
    flow = follow(
        "85ff",  # 1000 test edi, edi
        "7405",  # 1002 je 1009
        "e800000000",  # 1004 call
        "e800000000",  # 1009 call
        "c3",
    )
    maybe, always = (event.at for event in flow.events if isinstance(event, Called))
    assert flow.always_before(BASE, always)
    assert not flow.always_before(maybe, always)
    assert flow.always_after(BASE, always)
    assert not flow.always_after(BASE, maybe)
    assert flow.always_after(maybe, always)


def test_nothing_follows_a_call_that_does_not_return() -> None:
    code = ("e800000000", "c3")
    assert [type(event) for event in follow(*code).events] == [Called, Returned]
    assert [type(event) for event in follow(*code, returns=False).events] == [Called]


def test_a_jump_out_of_the_function_is_a_tail_call() -> None:
    flow = follow("488b7f08", "e900010000")  # mov rdi, [rdi+8]; jmp elsewhere
    (call,) = (event for event in flow.events if isinstance(event, Called))
    assert call.tail
    assert not call.direct
    assert call.arguments[0] == Load(Argument(0), 8, 8, BASE)


@pytest.mark.parametrize(
    ("code", "cheap"),
    [
        ("e800000000", True),  # call
        ("eb00", True),  # jmp
        ("7400", True),  # je
        ("0f8400000000", True),  # je, long
        ("0f1f440000", True),  # nop
        ("55", True),  # push rbp
        ("4155", True),  # push r13
        ("4883ec08", False),  # sub rsp, 8
        ("ffd0", False),  # call rax
        ("ff35aabbccdd", False),  # push [rip+...]
        ("c3", False),  # ret
    ],
)
def test_what_the_kernel_emulates_is_cheap(code: str, cheap: bool) -> None:
    (step,) = decoder_for("x86_64").decode(bytes.fromhex(code), BASE)
    assert step.cheap is cheap


def test_an_entry_without_code_is_an_error() -> None:
    with pytest.raises(FlowError):
        Flow(BASE, [], decoder_for("x86_64").convention)


def test_indirect_calls_tell_what_they_call() -> None:
    (step,) = decoder_for("x86_64").decode(bytes.fromhex("ff5310"), BASE)
    assert (step.control, step.target) == (Control.CALL, None)
    flow = follow("4889fb", "ff5310", "c3")  # mov rbx, rdi; call [rbx+0x10]
    (call,) = (event for event in flow.events if isinstance(event, Called))
    assert call.callee == Load(Argument(0), 0x10, 8, BASE + 3)
    assert "rbx" in call.holders(Argument(0))
