"""Whether bottom halves are scheduled with barriers, read from small C programs of every shape QEMU had."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require
from tracer.elf import Image
from tracer.sites.bottom_half import schedules_with_barrier
from tracer.sites.decoders import decoder_for
from tracer.sites.program import Code, DynamicNames, Program

# What is common to all: a list of bottom halves, a way to tell the loop, and plain or atomic marks.
PROGRAM = r"""
#include <stddef.h>
struct context;
struct half {
    struct context *ctx;
    void (*cb)(void *);
    void *opaque;
    struct half *next;
#ifdef FLAGS
    unsigned flags;
#else
    unsigned char scheduled, idle, deleted;
#endif
};
struct context { void *source[4]; unsigned count; struct half *first; };

void aio_notify(struct context *ctx);
void __attribute__((noinline)) aio_notify(struct context *ctx)
{
    __atomic_fetch_add(&ctx->count, 1, __ATOMIC_SEQ_CST);
}

#ifdef FLAGS
static int mark(struct half *bh) { return !(__atomic_fetch_or(&bh->flags, 3, __ATOMIC_SEQ_CST) & 1); }
static int take(struct half *bh) { return __atomic_fetch_and(&bh->flags, ~3u, __ATOMIC_SEQ_CST) & 2; }
#else
static int mark(struct half *bh)
{
    bh->idle = 0;
#ifdef ATOMIC_MARK
    return !__atomic_exchange_n(&bh->scheduled, 1, __ATOMIC_SEQ_CST);
#else
    if (bh->scheduled)
        return 0;
    __sync_synchronize();
    bh->scheduled = 1;
    return 1;
#endif
}
static int take(struct half *bh)
{
    if (bh->deleted)
        return 0;
#ifdef ATOMIC_TAKE
    return __atomic_exchange_n(&bh->scheduled, 0, __ATOMIC_SEQ_CST);
#else
    if (!bh->scheduled)
        return 0;
    bh->scheduled = 0;
    __asm__ volatile("" ::: "memory");
    return 1;
#endif
}
#endif

void qemu_bh_schedule(struct half *bh);
void qemu_bh_schedule(struct half *bh)
{
    struct context *ctx = bh->ctx;
    if (mark(bh))
        aio_notify(ctx);
}

POLL int aio_bh_poll(struct context *ctx);
POLL int aio_bh_poll(struct context *ctx)
{
    int any = 0;
    for (struct half *bh = ctx->first; bh; bh = bh->next)
        if (take(bh)) {
            any = 1;
            bh->cb(bh->opaque);
        }
    return any;
}
"""

SHAPES = {
    "as before 2.3": ((), False),
    "as from 2.3 to 4.2": (("ATOMIC_MARK", "ATOMIC_TAKE"), True),
    "as from 5.0 on": (("FLAGS",), True),
    "only the loop mended": (("ATOMIC_TAKE",), False),
    "only qemu_bh_schedule mended": (("ATOMIC_MARK",), False),
}


def built(folder: Path, defines: tuple[str, ...], level: str, poll: str = "") -> Image:
    require(shutil.which("gcc"), "gcc is not installed")
    source, library = folder / "half.c", folder / "half.so"
    source.write_text(PROGRAM)
    flags = [level, "-g0", "-shared", "-fPIC", "-fvisibility=default", f"-DPOLL={poll}", *(f"-D{d}" for d in defines)]
    subprocess.run(["gcc", *flags, "-Wl,-Bsymbolic", "-s", "-o", library, source], check=True)
    return Image.open(library)


def read(image: Image) -> bool | None:
    return schedules_with_barrier(Program(Code(image, decoder_for(image.machine)), DynamicNames(image)))


@pytest.mark.parametrize("level", ["-O1", "-O2", "-O3", "-Os"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_code_tells(tmp_path: Path, shape: str, level: str) -> None:
    defines, expected = SHAPES[shape]
    with built(tmp_path, defines, level) as image:
        assert read(image) is expected


def test_what_is_not_seen_is_not_claimed(tmp_path: Path) -> None:
    """aio_bh_poll() without a name: half of the fix is known, which is not enough."""
    with built(tmp_path, ("FLAGS",), "-O2", poll="static __attribute__((used))") as image:
        assert read(image) is None


@pytest.mark.parametrize("level", ["-O1", "-O2", "-O3", "-Os"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_loop_without_a_name_is_known_by_what_it_does(tmp_path: Path, shape: str, level: str) -> None:
    """Close to qemu_bh_schedule() it takes the mark off a bottom half, and calls that one's function."""
    defines, expected = SHAPES[shape]
    with built(tmp_path, defines, level, poll="static __attribute__((used))") as image:
        program = Program(Code(image, decoder_for(image.machine)), DynamicNames(image))
        assert schedules_with_barrier(program, callback=8) is expected


def test_a_plain_mark_is_enough_to_say_no(tmp_path: Path) -> None:
    with built(tmp_path, (), "-O2", poll="static __attribute__((used))") as image:
        assert read(image) is False


def test_another_program_tells_nothing() -> None:
    with Image.open("/bin/true") as image:
        assert read(image) is None
