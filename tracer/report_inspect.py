"""A diagnosis into text and JSON, under the names that QEMU's source and the vendors' articles use.

Knows: formats. Does not know where values come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tracer.events import Diagnosis, InspectedCoroutine, InspectedPool, InspectedRequest, InspectedThread
from tracer.report import as_hex, bugs_json, rfc3339, shown, size, wrapped

#: Requests of a pool that people see in full; the others get one line each.
MOST_IN_FULL = 3
MOST_LINES = 20


def diagnosis_json(found: Diagnosis) -> dict[str, Any]:
    """The contract's one object of `inspect --json`."""
    whose = {"core": found.core} if found.core else {"pid": found.pid}
    return {
        "event": "inspect",
        "time": rfc3339(found.time),
        **whose,
        "exe": found.exe,
        "version": found.version,
        "pools": [_pool_json(pool) for pool in found.pools],
        "threads": [_thread_json(thread) for thread in found.threads],
        "coroutines": [_coroutine_json(coroutine) for coroutine in found.waiting],
        "draining": found.draining,
        "run_state": found.run_state,
        "verdict": found.verdict,
        "explanation": found.explanation,
        "overdue": found.overdue,
        "known_bugs": bugs_json(found.known_bugs),
        "barrier_fixed": found.barrier_fixed,
        "bypassing": list(found.bypassing),
        "notes": list(found.notes),
        "watched_s": round(found.watched_s, 3),
        "took_s": round(found.took_s, 3),
    }


def _pool_json(pool: InspectedPool) -> dict[str, Any]:
    return {
        "pool": as_hex(pool.pool),
        "context": as_hex(pool.context),
        "main_loop": pool.main_loop,
        "home_tid": pool.home_tid,
        "home": pool.home_name or None,
        "bottom_half": {"address": as_hex(pool.bottom_half), "scheduled": pool.scheduled},
        "threads": {"current": pool.current, "idle": pool.idle, "max": pool.max},
        "requests": [_request_json(request) for request in pool.requests],
        "torn": pool.torn,
    }


def _request_json(request: InspectedRequest) -> dict[str, Any]:
    age, deadline = request.age_s, request.deadline_s
    known = age is not None and deadline is not None and request.overdue
    return {
        "request": as_hex(request.request),
        "pool": as_hex(request.pool),
        "context": as_hex(request.context),
        "kind": request.kind,
        "file": request.file,
        "offset": request.offset,
        "bytes": request.bytes,
        "node": request.node,
        "state": request.state,
        "ret": request.ret,
        "age_s": None if age is None else round(age, 6),
        "deadline_s": deadline,
        "overdue_s": round(age - deadline, 6) if known and age is not None and deadline is not None else None,
        "cause": request.cause,
        "explanation": request.explanation,
        "evidence": None if request.evidence is None else dict(request.evidence),
        "seen_from": "memory",
        "func": as_hex(request.func),
        "func_name": request.func_name,
        "arg": as_hex(request.arg),
        "callback": as_hex(request.callback),
        "callback_name": request.callback_name,
        "opaque": as_hex(request.opaque),
        "all": {"le_next": as_hex(request.next), "le_prev": as_hex(request.prev)},
        "coroutine": as_hex(request.coroutine),
        "coroutine_entry": request.coroutine_entry_name or as_hex(request.coroutine_entry),
        "coroutine_entry_address": as_hex(request.coroutine_entry),
        "coroutine_entry_arg": as_hex(request.coroutine_entry_arg),
        "coroutine_caller": as_hex(request.coroutine_caller),
        "coroutine_stack": list(request.coroutine_stack),
    }


def _coroutine_json(coroutine: InspectedCoroutine) -> dict[str, Any]:
    return {
        "coroutine": as_hex(coroutine.coroutine),
        "waits_in": coroutine.waits_in,
        "stack": list(coroutine.stack),
    }


def _thread_json(thread: InspectedThread) -> dict[str, Any]:
    return {
        "tid": thread.tid,
        "name": thread.name or None,  # a core does not tell
        "state": thread.state,
        "syscall": thread.syscall,
        "stack": list(thread.stack),
        "stack_missing": thread.stack_missing,
        "home": thread.home,
    }


def diagnosis_text(found: Diagnosis, verbose: bool = False) -> str:
    """For people: the verdict, then every pool with its requests, then the threads that matter."""
    found = shown(found)
    version = f"QEMU {found.version}" if found.version else "QEMU (version not found)"
    whose = f"core file {found.core}" if found.core else f"process {found.pid}"
    lines = [
        f"{found.exe or 'executable not known'}, {whose}: {version}",
        f"VERDICT {found.verdict}: {found.overdue} overdue",
        wrapped(found.explanation),
    ]
    for pool in found.pools:
        lines += ["", *_pool_lines(pool, verbose)]
    lines += _waiting_lines(found.waiting, verbose)
    lines += ["", *_thread_lines(found, verbose)]
    for note in found.known_bugs or ():
        if note.fixed is not True:
            lines.append(f"known bug {note.bug.commit} (class {note.bug.kind}): {note.bug.versions}")
    lines += [f"note: {note}" for note in found.notes]
    looked = "read" if found.core else f"watched for {found.watched_s:.2f} s, not stopped"
    lines.append(f"{looked}; took {found.took_s:.2f} s")
    return "\n".join(lines)


def _pool_lines(pool: InspectedPool, verbose: bool) -> list[str]:
    home = "a thread that was not found"
    if pool.home_tid is not None:
        home = _thread_name(pool.home_tid, pool.home_name)
    told = {True: "scheduled", False: "not scheduled", None: "could not be read"}[pool.scheduled]
    loop = "main loop" if pool.main_loop else "iothread"
    lines = [
        f"ThreadPool {pool.pool:#x}, ctx {pool.context:#x} ({loop}), run by {home}",
        f"  completion_bh {pool.bottom_half:#x}: {told}",
        f"  threads: cur {_known(pool.current)}, idle {_known(pool.idle)}, max {_known(pool.max)}",
        f"  head: {len(pool.requests) or 'no'} element{'' if len(pool.requests) == 1 else 's'}"
        + (f"; INCOMPLETE: {pool.torn}" if pool.torn else ""),
    ]
    ordered = sorted(pool.requests, key=lambda request: not request.overdue)
    for number, request in enumerate(ordered):
        if number < MOST_IN_FULL or verbose:
            lines += _element_lines(request)
        elif number < MOST_LINES:
            lines.append(_element_title(request))
    if len(ordered) > MOST_LINES and not verbose:
        lines.append(f"  … and {len(ordered) - MOST_LINES} more (-v shows all)")
    return lines


def _known(value: int | None) -> str:
    return "?" if value is None else str(value)


def _element_title(request: InspectedRequest) -> str:
    place = f" on {request.file}" if request.file else ""
    extent = ""
    if request.bytes is not None and request.offset is not None:
        extent = f" ({size(request.bytes)} at {request.offset})"
    node = f", node {request.node}" if request.node else ""
    late = f"  <- {request.cause}" if request.cause else ""
    kind = request.kind or "request"
    return f"  ThreadPoolElement {request.request:#x}: {request.state}, {kind}{place}{extent}{node}{late}"


def _element_lines(request: InspectedRequest) -> list[str]:
    ret = "" if request.ret is None else f", ret = {request.ret}"
    age = "" if request.age_s is None else f", for at least {request.age_s:.1f} s"
    lines = [
        _element_title(request),
        f"    common.cb = {_code(request.callback, request.callback_name)}, common.opaque = {request.opaque:#x}",
        f"    func = {_code(request.func, request.func_name)}, arg = {request.arg:#x}",
        f"    state = {request.state}{ret}{age}",
        f"    all = {{le_next = {request.next:#x}, le_prev = {request.prev:#x}}}",
    ]
    if request.coroutine is None or request.coroutine_entry is None:
        return [*lines, "    opaque leads to no coroutine"] if request.callback else [*lines, "    nobody waits for it"]
    entry = _code(request.coroutine_entry, request.coroutine_entry_name)
    arg, caller = request.coroutine_entry_arg or 0, request.coroutine_caller or 0
    lines.append(f"    Coroutine {request.coroutine:#x}: entry = {entry},")
    lines.append(f"      entry_arg = {arg:#x}, caller = {caller:#x}")
    return lines + [f"      #{number} {frame}" for number, frame in enumerate(request.coroutine_stack)]


def _waiting_lines(waiting: Sequence[InspectedCoroutine], verbose: bool) -> list[str]:
    """The first of each place in full, the others counted."""
    lines: list[str] = []
    places: set[str] = set()
    for coroutine in waiting:
        if verbose or coroutine.waits_in not in places:
            lines += ["", f"Coroutine {coroutine.coroutine:#x}: waits in {coroutine.waits_in}"]
            lines += [f"  #{number} {frame}" for number, frame in enumerate(coroutine.stack)]
        places.add(coroutine.waits_in)
    if len(waiting) > len(places) and not verbose:
        lines.append(f"{len(waiting) - len(places)} more wait there (-v shows them)")
    return lines


def _thread_name(tid: int, name: str | None) -> str:
    """A core holds the main thread's name alone."""
    return f"thread {tid} ({name})" if name else f"thread {tid}"


def _code(address: int, name: str | None) -> str:
    return f"{address:#x} <{name}>" if name else f"{address:#x}"


def _thread_lines(found: Diagnosis, verbose: bool) -> list[str]:
    lines = []
    shown = [thread for thread in found.threads if thread.home or verbose]
    for thread in shown:
        where = f"in {thread.syscall}" if thread.syscall else "runs"
        lines.append(f"{_thread_name(thread.tid, thread.name)} {where}")
        lines += [f"  #{number} {frame}" for number, frame in enumerate(thread.stack)]
        if thread.stack_missing:
            lines.append(f"  ({thread.stack_missing})")
    if len(shown) < len(found.threads):
        lines.append(f"{len(found.threads) - len(shown)} other threads (-v shows them)")
    return lines
