"""Where to look for the thread pool's functions in a build that gives no names: strings lead there.

Knows: which strings the functions of util/thread-pool.c use, and who calls or names whom. Everything
found is a candidate only, for the readers of tracer/sites/thread_pool.py to prove.
"""

from __future__ import annotations

from collections.abc import Iterator

from tracer.sites.program import Code

# Names of the bottom half (since v6.1, aio_bh_new is a macro that hands its function's name on), of the
# worker's thread (since v2.0, qemu_thread_create's argument), and of the file (asserts; since v2.12 locks).
_COMPLETION = b"thread_pool_completion_bh"
_WORKER = b"worker"
_FILE = b"thread-pool.c"
_NEAR = 1 << 15  # the compiled file is not longer, in any build seen


def constructors(code: Code) -> Iterator[int]:
    """Functions that may make the pool's bottom halves: thread_pool_new() or what it is inlined into."""
    seen: set[int] = set()
    for found in (_by_name, _by_worker):
        for start in sorted(found(code) - seen):
            seen.add(start)
            yield start


def submitters(code: Code, near: int) -> Iterator[int]:
    """Functions that may submit requests; `near` is the address of one of the pool's functions."""
    yield from sorted(code.users_of(frozenset(code.image.strings(_FILE, whole=False))))
    yield from functions_near(code, near)


def functions_near(code: Code, address: int) -> Iterator[int]:
    """The functions around `address`, the nearest first."""
    found = code.image.functions_in(address - _NEAR, address + _NEAR)
    yield from sorted(found, key=lambda start: abs(start - address))


def _by_name(code: Code) -> frozenset[int]:
    return code.users_of(frozenset(code.image.strings(_COMPLETION)))


def _by_worker(code: Code) -> frozenset[int]:
    """Those that name the function that starts a thread named "worker", or a caller of it."""
    starting = code.users_of(frozenset(code.image.strings(_WORKER)))
    starting |= frozenset(caller for start in starting for caller in code.callers(start, _NEAR))
    return code.users_of(starting) if starting else frozenset()
