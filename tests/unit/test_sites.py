"""tracer.sites on the distribution's stripped QEMUs, and on copies that were tampered with."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import require
from tracer.elf import Image
from tracer.errors import SitesNotFound, UsageError
from tracer.layout import BottomHalfLayout, ElementLayout, PoolLayout
from tracer.sites import STRATEGIES, NoStrategyWorked, locate
from tracer.sites.decoders import decoder_for
from tracer.sites.flow import Stored
from tracer.sites.model import CALLBACK, DONE, SITE_NAMES, SUBMIT, Located
from tracer.sites.placing import placed
from tracer.sites.pool_code import locate_by_code
from tracer.sites.program import Code, DynamicNames, Program
from tracer.sites.proof import NotProved
from tracer.sites.thread_pool import read_worker

NAMES = ("qemu-system-x86_64", "qemu-storage-daemon", "qemu-nbd", "qemu-img", "qemu-io")
REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
CALL = b"\xe8"
NEAR = 48  # bytes around a site in which its neighbours must stand


@pytest.fixture(params=NAMES)
def image(request: pytest.FixtureRequest) -> Image:
    path = Path("/usr/bin") / request.param
    require(path.exists(), f"{path} is not installed")
    return Image.open(path)


@pytest.fixture
def tampered(tmp_path: Path) -> Callable[[int, bytes], Image]:
    """A copy of qemu-img with other bytes at one address."""

    def patch(address: int, code: bytes) -> Image:
        with Image.open("/usr/bin/qemu-img") as whole:
            offset = whole.offset_of(address, len(code))
        data = bytearray(Path("/usr/bin/qemu-img").read_bytes())
        data[offset : offset + len(code)] = code
        (tmp_path / "qemu-img").write_bytes(data)
        return Image.open(tmp_path / "qemu-img")

    return patch


@pytest.fixture
def qemu_img() -> Image:
    require(Path("/usr/bin/qemu-img").exists(), "/usr/bin/qemu-img is not installed")
    return Image.open("/usr/bin/qemu-img")


def memory_operand(opcode: bytes, extension: int, register: str, offset: int) -> bytes:
    """An instruction with an 8-bit displacement from `register` (not rsp or r12)."""
    number = REGISTERS.index(register)
    prefix = b"\x41" if number > 7 else b""
    return prefix + opcode + bytes((0x40 | extension << 3 | number & 7, offset))


def call_target(image: Image, address: int) -> int:
    code = image.read(address, 5)
    assert code[:1] == CALL
    return int(address + 5 + struct.unpack("<i", code[1:])[0])


def named(image: Image, name: str) -> int:
    symbol = image.symbol(name)
    assert symbol is not None
    return symbol.address


def test_every_site_is_a_direct_call_of_the_right_function(image: Image) -> None:
    found = locate(image)
    assert set(found.sites) == set(SITE_NAMES)
    targets = {name: call_target(image, site.address) for name, site in found.sites.items()}
    assert targets == {
        SUBMIT: named(image, "qemu_mutex_unlock_impl"),
        DONE: named(image, "qemu_bh_schedule"),
        CALLBACK: named(image, "qemu_bh_schedule"),
    }
    for site in found.sites.values():
        assert site.cheap
        assert site.strategy == "code"
        assert site.instruction.startswith("call 0x")


class NoNames:
    """As if nothing were exported."""

    def addresses(self, name: str) -> tuple[int, ...]:
        return ()


def test_without_any_name_the_same_is_found(image: Image) -> None:
    """Exported names are a witness for what strings and shapes lead to."""
    known = locate(image, only="code")
    code = Code(image, decoder_for(image.machine))
    nameless = locate_by_code(Program(code, NoNames()), "code", by_strings=True)
    assert {name: placed(image, site) for name, site in nameless.sites.items()} == dict(known.sites)
    assert nameless.layout == known.layout
    assert nameless.main_context == known.main_context
    assert nameless.functions["worker_thread"] == known.functions["worker_thread"]


def test_sites_are_in_the_functions_they_belong_to(image: Image) -> None:
    found = locate(image)
    for name, function in (
        (SUBMIT, "thread_pool_submit_aio"),
        (DONE, "worker_thread"),
        (CALLBACK, "thread_pool_completion_bh"),
    ):
        bounds = image.bounds(found.functions[function])
        assert bounds is not None
        assert found.sites[name].address in bounds
        assert found.functions[function] == bounds.start


def test_the_neighbours_of_a_site_use_its_register(image: Image) -> None:
    """Seen in the bytes alone, without the disassembler or the flow."""
    found = locate(image)
    element, done, callback = found.layout.element, found.sites[DONE], found.sites[CALLBACK]
    store = memory_operand(b"\xc7", 0, done.register, element.state) + struct.pack("<I", 2)
    assert store in image.read(done.address - NEAR, NEAR)
    calls = memory_operand(b"\xff", 2, callback.register, element.callback)
    assert calls in image.read(callback.address, NEAR)


def test_layout_of_7_2(image: Image) -> None:
    require(str(image.qemu_version()).startswith("7.2."), "the installed QEMU is not 7.2")
    layout = locate(image).layout
    assert layout.element == ElementLayout(
        callback=0x10, opaque=0x18, pool=0x28, func=0x30, arg=0x38, state=0x40, ret=0x44, next=0x58, prev=0x60
    )
    assert layout.pool == PoolLayout(
        context=0x0,
        completion_bh=0x8,
        head=0xB8,
        cur_threads=0xD0,
        idle_threads=0xD4,
        new_threads=0xD8,
        pending_threads=0xDC,
        max_threads=0xE4,
    )
    assert layout.bottom_half == BottomHalfLayout(
        context=0x0, callback=0x10, opaque=0x18, flags=0x28, flags_width=4, name=0x8
    )


def test_bottom_half_functions_bear_their_names(image: Image) -> None:
    """Since QEMU 6.2 the pool's constructor names them; the names are next to the code that uses them."""
    found = locate(image)
    constructor = named(image, "thread_pool_new")
    code = image.read(constructor, 256)
    pointers = [
        constructor + at + 7 + struct.unpack_from("<i", code, at + 3)[0]
        for at in range(len(code) - 7)
        if code[at : at + 3] in (b"\x48\x8d\x0d", b"\x48\x8d\x35")  # lea to rcx (name), rsi (function)
    ]
    functions = [address for address in pointers if image.is_executable(address)]
    names = [image.string_at(address) for address in pointers if not image.is_executable(address)]
    assert dict(zip(names, functions)) == {
        name: found.functions[str(name)] for name in ("thread_pool_completion_bh", "spawn_thread_bh_fn")
    }


def test_main_context_is_a_variable(image: Image) -> None:
    variable = locate(image).main_context
    assert variable is not None
    segment = image.segment_at(variable)
    assert segment is not None
    assert segment.flags & 2, "it is writable"


def test_bottom_halves_are_scheduled_with_a_barrier(image: Image) -> None:
    """All QEMUs since 2.3 do, so all that can be installed here."""
    assert locate(image).barrier_fixed is True


def test_the_successful_attempt_is_told(image: Image) -> None:
    (attempt,) = locate(image, only="code").attempts
    assert (attempt.strategy, attempt.ok) == ("code", True)


def test_cancel_is_not_taken_for_the_worker(image: Image) -> None:
    """thread_pool_cancel() is the other function that stores DONE, next to the worker in the file."""
    found = locate(image)
    program = Program(Code(image, decoder_for(image.machine)), DynamicNames(image))
    element = found.layout.element
    cancelling = []
    for address in following(image, found.functions["worker_thread"], 5):
        flow = program.flow(address)
        stored = {(e.offset, e.width) for e in flow.events if isinstance(e, Stored)}
        if address != found.functions["worker_thread"] and (element.state, 8) in stored:
            cancelling.append(address)
            with pytest.raises(NotProved):
                read_worker(flow)
    assert len(cancelling) == 1


def following(image: Image, address: int, count: int) -> list[int]:
    """The starts of `count` functions from `address` on."""
    starts = []
    for _ in range(count):
        bounds = image.bounds(address)
        assert bounds is not None
        starts.append(bounds.start)
        address = bounds.end + 15 & ~15
    return starts


def test_another_program_has_no_sites_and_says_why() -> None:
    with Image.open("/bin/true") as image, pytest.raises(SitesNotFound) as raised:
        locate(image)
    assert isinstance(raised.value, NoStrategyWorked)
    assert [attempt.strategy for attempt in raised.value.attempts] == list(STRATEGIES)
    for attempt in raised.value.attempts:
        assert not attempt.ok
        assert attempt.outcome
        assert attempt.outcome in raised.value.message


def test_an_unknown_strategy_is_a_usage_error(qemu_img: Image) -> None:
    with pytest.raises(UsageError, match="guess"):
        locate(qemu_img, only="guess")


def refused(image: Image) -> str:
    with pytest.raises(NoStrategyWorked) as raised:
        locate(image, only="code")
    return raised.value.attempts[0].outcome


Tamper = Callable[[int, bytes], Image]


def done_store(image: Image, found: Located) -> int:
    """Where worker_thread() stores DONE."""
    site = found.sites[DONE]
    store = memory_operand(b"\xc7", 0, site.register, found.layout.element.state) + struct.pack("<I", 2)
    return site.address - NEAR + image.read(site.address - NEAR, NEAR).index(store)


NOP = b"\x0f\x1f\x44\x00\x00"  # as long as a call


def test_a_submit_without_an_unlock_is_refused(qemu_img: Image, tampered: Tamper) -> None:
    assert "0 unlocks follow" in refused(tampered(locate(qemu_img).sites[SUBMIT].address, NOP))


def test_without_a_call_a_nop_is_taken_and_without_that_a_dear_instruction(qemu_img: Image, tampered: Tamper) -> None:
    call = locate(qemu_img).sites[DONE]
    nop = locate(tampered(call.address, NOP)).sites[DONE]
    assert (nop.address, nop.register, nop.cheap) == (call.address, call.register, True)
    dear = locate(tampered(call.address, b"\xc3" + NOP[:4])).sites[DONE]  # it returns
    assert (dear.register, dear.cheap) == (call.register, False)
    assert call.address - NEAR < dear.address < call.address


def test_another_call_before_the_callback_serves_as_well(qemu_img: Image, tampered: Tamper) -> None:
    """In 7.2 aio_context_release() comes next; with that gone too, a nop is cheap as well."""
    first = locate(qemu_img).sites[CALLBACK]
    other = tampered(first.address, NOP)
    second = locate(other).sites[CALLBACK]
    assert first.address < second.address < first.address + NEAR
    assert second.register == first.register
    assert call_target(other, second.address) == named(other, "aio_context_release")
    both = NOP + other.read(first.address + 5, second.address - first.address - 5) + NOP
    third = locate(tampered(first.address, both)).sites[CALLBACK]
    assert (third.instruction.partition(" ")[0], third.cheap) == ("nop", True)
    assert first.address <= third.address <= second.address
    assert third.register == first.register


def test_a_done_store_to_another_element_is_refused(qemu_img: Image, tampered: Tamper) -> None:
    found = locate(qemu_img)
    store = memory_operand(b"\xc7", 0, "rsi", found.layout.element.state)
    assert "DONE" in refused(tampered(done_store(qemu_img, found), store))


def test_functions_that_disagree_about_an_offset_are_refused(qemu_img: Image, tampered: Tamper) -> None:
    found = locate(qemu_img)
    store = memory_operand(b"\xc7", 0, found.sites[DONE].register, found.layout.element.state + 8)
    reason = refused(tampered(done_store(qemu_img, found), store))
    assert "state is told differently" in reason
    assert str(found.layout.element.state) in reason


def test_a_state_other_than_done_is_refused(qemu_img: Image, tampered: Tamper) -> None:
    found = locate(qemu_img)
    element = memory_operand(b"\xc7", 0, found.sites[DONE].register, found.layout.element.state)
    assert "DONE" in refused(tampered(done_store(qemu_img, found), element + struct.pack("<I", 3)))


def test_a_register_that_was_overwritten_is_refused(qemu_img: Image, tampered: Tamper) -> None:
    """The completion's pointer is loaded into the element's register instead of rdi."""
    found = locate(qemu_img)
    site = found.sites[CALLBACK]
    assert site.register == "rbp"
    load = site.address - 5
    assert qemu_img.read(load, 5) == bytes.fromhex("498b7c2408")  # mov 8(%r12),%rdi
    assert refused(tampered(load, bytes.fromhex("498b6c2408")))  # mov 8(%r12),%rbp


def test_a_function_that_cannot_be_decoded_is_refused(qemu_img: Image, tampered: Tamper) -> None:
    worker = locate(qemu_img).functions["worker_thread"]
    assert refused(tampered(worker, b"\x06" * 16))  # no instruction in 64-bit mode
