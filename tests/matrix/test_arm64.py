"""tracer.sites on Debian's stripped QEMUs for arm64, which are read here and not run.

The witnesses are words of the code, compared by hand with what the search found.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import require
from tests.matrix.arm64 import PackagesMissing, programs_of
from tracer.elf import Image
from tracer.layout import BottomHalfLayout, ElementLayout, PoolLayout
from tracer.sites import NoStrategyWorked, locate
from tracer.sites.model import CALLBACK, DONE, SITE_NAMES, SUBMIT, Located

PROGRAMS = ("qemu-system-aarch64", "qemu-system-arm", "qemu-storage-daemon", "qemu-nbd", "qemu-img", "qemu-io")
NEAR = 12  # instructions around a site in which its neighbours must stand
NOP = struct.pack("<I", 0xD503201F)

# The pool's mutex and condition variables are larger than on x86-64.
ELEMENT = ElementLayout(
    callback=0x10, opaque=0x18, pool=0x28, func=0x30, arg=0x38, state=0x40, ret=0x44, next=0x58, prev=0x60
)
POOL = PoolLayout(
    context=0x0,
    completion_bh=0x8,
    head=0xC0,
    cur_threads=0xD8,
    idle_threads=0xDC,
    new_threads=0xE0,
    pending_threads=0xE4,
    max_threads=0xEC,
)
POOL_5_2 = PoolLayout(
    context=0x0,
    completion_bh=0x8,
    head=0xF8,
    cur_threads=0x110,
    idle_threads=0x114,
    new_threads=0x118,
    pending_threads=0x11C,
    max_threads=0xE8,
)
BOTTOM_HALF = BottomHalfLayout(context=0x0, callback=0x10, opaque=0x18, flags=0x28, flags_width=4, name=0x8)
BOTTOM_HALF_5_2 = BottomHalfLayout(context=0x0, callback=0x8, opaque=0x10, flags=0x20, flags_width=4)

# The first run downloads some 60 MB.
pytestmark = pytest.mark.timeout(900)


@dataclass(frozen=True)
class Suite:
    """A Debian suite, how its QEMU's version begins, and what its structures are like."""

    name: str
    qemu: str
    pool: PoolLayout = POOL
    bottom_half: BottomHalfLayout = BOTTOM_HALF


SUITES = (
    Suite("bullseye", "5.2.", POOL_5_2, BOTTOM_HALF_5_2),
    Suite("bookworm", "7.2."),
    Suite("trixie", "10.0."),
    Suite("trixie-backports", "11."),
)


@pytest.fixture(scope="session", params=SUITES, ids=lambda suite: str(suite.name))
def suite(request: pytest.FixtureRequest) -> Suite:
    """Each suite in turn."""
    chosen: Suite = request.param
    return chosen


@pytest.fixture(scope="session")
def programs(suite: Suite) -> Path:
    """The folder of its programs."""
    try:
        return programs_of(suite.name)
    except PackagesMissing as error:
        require(False, f"no arm64 packages of {suite.name}: {error}")
        raise


@pytest.fixture(params=PROGRAMS)
def image(request: pytest.FixtureRequest, programs: Path) -> Iterator[Image]:
    with Image.open(programs / request.param) as opened:
        yield opened


def words(image: Image, address: int, count: int) -> list[int]:
    """`count` instructions from `address` on; before it, if negative."""
    start = address + 4 * min(count, 0)
    return list(struct.unpack(f"<{abs(count)}I", image.read(start, 4 * abs(count))))


def bl_target(image: Image, address: int) -> int:
    (word,) = words(image, address, 1)
    assert word >> 26 == 0b100101, f"{word:#x} is no bl"
    distance = (word & 0x3FFFFFF) << 2
    return address + distance - ((distance & 1 << 27) << 1)


def named(image: Image, name: str) -> int:
    symbol = image.symbol(name)
    assert symbol is not None
    return symbol.address


def add(target: int, base: int, value: int) -> int:
    return 0x91000000 | value << 10 | base << 5 | target


def store_word(source: int, base: int, offset: int) -> int:
    return 0xB9000000 | offset // 4 << 10 | base << 5 | source


def load_pair(first: int, second: int, base: int, offset: int) -> int:
    return 0xA9400000 | offset // 8 << 15 | second << 10 | base << 5 | first


def test_the_files_are_what_they_should_be(image: Image, suite: Suite) -> None:
    assert image.machine == "aarch64"
    assert image.section(".symtab") is None
    assert str(image.qemu_version()).startswith(suite.qemu)


def test_every_site_is_a_bl_to_the_right_function(image: Image) -> None:
    found = locate(image)
    assert set(found.sites) == set(SITE_NAMES)
    assert {name: bl_target(image, site.address) for name, site in found.sites.items()} == {
        SUBMIT: named(image, "qemu_mutex_unlock_impl"),
        DONE: named(image, "qemu_bh_schedule"),
        CALLBACK: named(image, "qemu_bh_schedule"),
    }
    assert all(site.cheap for site in found.sites.values())


def test_sites_are_in_the_functions_they_belong_to(image: Image) -> None:
    found = locate(image)
    owners = {SUBMIT: "thread_pool_submit_aio", DONE: "worker_thread", CALLBACK: "thread_pool_completion_bh"}
    for name, function in owners.items():
        bounds = image.bounds(found.functions[function])
        assert bounds is not None
        assert found.sites[name].address in bounds
        assert bounds.start == found.functions[function]


def test_the_layout(image: Image, suite: Suite) -> None:
    layout = locate(image).layout
    assert (layout.element, layout.pool, layout.bottom_half) == (ELEMENT, suite.pool, suite.bottom_half)


def test_the_worker_stores_the_result_into_what_the_register_tells(image: Image) -> None:
    """`str w0, ret(element)` after the call of func; QEMU 11 keeps the address of ret instead."""
    site = locate(image).sites[DONE]
    register, minus, offset = site.register.partition("-")
    number = int(register.removeprefix("x"))
    before = words(image, site.address, -NEAR)
    assert store_word(0, number, ELEMENT.ret - int(offset or "0", 16)) in before
    if minus:
        assert add(number, number, int(offset, 16)) in before


def test_the_callback_is_called_with_what_the_register_holds(image: Image) -> None:
    site = locate(image).sites[CALLBACK]
    number = int(site.register.removeprefix("x"))
    after = words(image, site.address, NEAR)
    callbacks = [first for first in range(1, 19) if load_pair(first, 0, number, ELEMENT.callback) in after]
    assert len(callbacks) == 1
    assert 0xD63F0000 | callbacks[0] << 5 in after  # blr
    assert store_word(1, number, ELEMENT.ret) | 0x00400000 in after  # ldr w1


def test_the_submitter_returns_what_the_register_holds(image: Image) -> None:
    site = locate(image).sites[SUBMIT]
    bounds = image.bounds(site.address)
    assert bounds is not None
    rest = words(image, site.address, (bounds.end - site.address) // 4)
    assert 0xAA0003E0 | int(site.register.removeprefix("x")) << 16 in rest  # mov x0, register


def test_bottom_half_functions_bear_their_names(image: Image, suite: Suite) -> None:
    """The pool's constructor names them since QEMU 6.2; adrp and add make function and name."""
    found = locate(image)
    made = made_by(image, constructor(image))
    strings = {image.string_at(address) for address in made}
    for name in ("thread_pool_completion_bh", "spawn_thread_bh_fn"):
        assert found.functions[name] in made
        assert (name in strings) is (suite.bottom_half.name is not None)


def constructor(image: Image) -> int:
    names = ("thread_pool_new_aio", "thread_pool_new", "aio_get_thread_pool")
    return next(found.address for name in names if (found := image.symbol(name)) is not None)


def made_by(image: Image, function: int) -> set[int]:
    """The addresses that a function makes with adrp and add."""
    bounds = image.bounds(function)
    assert bounds is not None
    pages: dict[int, int] = {}
    made = set()
    for number, word in enumerate(words(image, bounds.start, (bounds.end - bounds.start) // 4)):
        if word & 0x9F000000 == 0x90000000:
            page = (word >> 29 & 3) | (word >> 5 & 0x7FFFF) << 2
            page -= (page & 1 << 20) << 1
            pages[word & 31] = (bounds.start + 4 * number & ~0xFFF) + (page << 12)
        elif word & 0xFFC00000 == 0x91000000 and word >> 5 & 31 in pages:
            made.add(pages[word >> 5 & 31] + (word >> 10 & 0xFFF))
    return made


def test_main_context_is_a_variable(image: Image) -> None:
    variable = locate(image).main_context
    assert variable is not None
    segment = image.segment_at(variable)
    assert segment is not None
    assert segment.flags & 2, "it is writable"


def test_bottom_halves_are_scheduled_with_a_barrier(image: Image) -> None:
    assert locate(image).barrier_fixed is True


Tamper = Callable[[int, bytes], Image]


@pytest.fixture
def qemu_img(programs: Path) -> Iterator[Image]:
    with Image.open(programs / "qemu-img") as opened:
        yield opened


@pytest.fixture
def tampered(programs: Path, tmp_path: Path) -> Tamper:
    """A copy of qemu-img with other bytes at one address."""

    def patch(address: int, code: bytes) -> Image:
        with Image.open(programs / "qemu-img") as whole:
            offset = whole.offset_of(address, len(code))
        data = bytearray((programs / "qemu-img").read_bytes())
        data[offset : offset + len(code)] = code
        (tmp_path / "qemu-img").write_bytes(data)
        return Image.open(tmp_path / "qemu-img")

    return patch


def refused(image: Image) -> str:
    with image, pytest.raises(NoStrategyWorked) as raised:
        locate(image, only="code")
    return raised.value.attempts[-1].outcome


def before_done(image: Image, found: Located, matching: int, mask: int) -> int:
    """The address of the one instruction shortly before the done site that has these bits."""
    site = found.sites[DONE].address
    (at,) = (n for n, word in enumerate(words(image, site, -NEAR)) if word & mask == matching)
    return site - 4 * (NEAR - at)


@pytest.mark.parametrize("name", [SUBMIT, DONE])
def test_a_site_that_is_no_call_is_not_taken(qemu_img: Image, tampered: Tamper, name: str) -> None:
    """It is refused, or what stands there now, or close by, proves itself in its turn."""
    first = locate(qemu_img).sites[name]
    with tampered(first.address, NOP) as other:
        try:
            second = locate(other).sites[name]
        except NoStrategyWorked:
            return
    assert second.instruction != first.instruction
    assert abs(second.address - first.address) < 4 * NEAR
    assert second.register == first.register


def test_a_state_other_than_done_is_refused(qemu_img: Image, tampered: Tamper) -> None:
    two = 0x52800000 | 2 << 5  # mov wn, #2
    at = before_done(qemu_img, locate(qemu_img), two, 0xFFFFFFE0)
    (word,) = words(qemu_img, at, 1)
    assert refused(tampered(at, struct.pack("<I", word + (1 << 5))))


@pytest.mark.parametrize("further", [4, 8])
def test_a_result_in_another_place_is_refused(qemu_img: Image, tampered: Tamper, further: int) -> None:
    found = locate(qemu_img)
    register, _, offset = found.sites[DONE].register.partition("-")
    number, displacement = int(register.removeprefix("x")), ELEMENT.ret - int(offset or "0", 16)
    at = before_done(qemu_img, found, store_word(0, number, displacement), 0xFFFFFFFF)
    assert "told differently" in refused(tampered(at, struct.pack("<I", store_word(0, number, displacement + further))))


def test_a_result_in_another_structure_is_refused(qemu_img: Image, tampered: Tamper) -> None:
    found = locate(qemu_img)
    register, _, offset = found.sites[DONE].register.partition("-")
    number, displacement = int(register.removeprefix("x")), ELEMENT.ret - int(offset or "0", 16)
    at = before_done(qemu_img, found, store_word(0, number, displacement), 0xFFFFFFFF)
    assert refused(tampered(at, struct.pack("<I", store_word(0, 21, displacement))))  # 21: not the request


def test_a_helper_without_release_is_no_barrier(qemu_img: Image, tampered: Tamper) -> None:
    """The libgcc helper that qemu_bh_schedule() calls, patched to its relaxed form: nothing is proved then."""
    helper = outlined(qemu_img)
    code = words(qemu_img, helper, NEAR)
    relaxed = [word & ~0x00C00000 if word >> 24 == 0xB8 else word for word in code]  # ldsetal to ldset
    relaxed = [word & ~0x8000 if word & 0xFFE08000 == 0x88008000 else word for word in relaxed]  # stlxr to stxr
    assert sum(old != new for old, new in zip(code, relaxed)) == 2
    assert "QEMUBH" in refused(tampered(helper, struct.pack(f"<{NEAR}I", *relaxed)))


def outlined(image: Image) -> int:
    """Where the helper is that qemu_bh_schedule(), or what it jumps to, calls first."""
    address = named(image, "qemu_bh_schedule")
    for _ in range(32):
        (word,) = words(image, address, 1)
        if word >> 26 == 0b100101:
            return bl_target(image, address)
        distance = (word & 0x3FFFFFF) << 2
        address += distance - ((distance & 1 << 27) << 1) if word >> 26 == 0b000101 else 4
    raise AssertionError("qemu_bh_schedule calls nothing")
