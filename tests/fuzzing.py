"""Inputs that nobody sane would send, from a seed: cores, ELF files, texts of /proc, answers of QMP, our cache's files.

`python -m tests.fuzzing KIND COUNT SEED FOLDER` tries so many of a kind, and prints what came of them as one object.
Whatever is no AioTraceError, takes more than LONGEST_S of a processor, or leaves the process larger than MOST_MIB,
is a failure with the number by which the same input is made again: SEED:NUMBER.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.targets import Recipe, build, stripped, with_mini_debug_info
from tracer import cache, cgroup, kept, target
from tracer.build import Build, build_of, load
from tracer.check import check_file
from tracer.compiler import Compiled, MapShape
from tracer.core import CoreView
from tracer.elf import Image
from tracer.errors import AioTraceError, SitesNotFound
from tracer.inspect import diagnose
from tracer.lab.process import wait_until
from tracer.live import LiveView
from tracer.nudge import drives_of
from tracer.qmp import SocketMonitor
from tracer.report import TableWriter, as_json, json_line
from tracer.report_inspect import diagnosis_json, diagnosis_text
from tracer.save import save
from tracer.sites import locate

LONGEST_S = 5.0
MOST_MIB = 300
#: No test may take the machine's memory from others, whatever it finds.
GUARD = 6 << 30
#: One of so many goes all the way through a command, where that takes long.
SELDOM = 16
NUMBERS = (0, 1, 2, 7, 8, 63, 64, 4095, 4096, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, 1 << 40)
NUMBERS += ((1 << 47) - 1, 1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)
TEXTS = (
    "",
    "\x1b]0;owned\x07",
    "a\nFORGED",
    "\u202e",
    "x" * 70_000,
    "\x0b\x0c\x1c\x85\u2028",
    "%s{}{0}",
    "../../../etc",
    "\0",
)
#: What JSON may hold, and Python's own writer would not write.
RAW = ("9" * 5000, "-" + "9" * 400, "1e999", "NaN", "-Infinity", '"\\ud800"', '"\\u0000"', "[" * 3000 + "]" * 3000, "")
TOKEN = "a token of ours"

#: One input: made of dice, tried; what came of it, in a word.
Trial = Callable[[random.Random], str]


def altered(data: bytes, dice: random.Random, places: list[int] | None = None) -> bytes:
    """One to eight changes: bits, noise, numbers that matter, bytes moved; perhaps an end, a doubling, a gap."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 3, 8)) if changed else 0):
        at = dice.choice(places) if places and dice.random() < 0.8 else dice.randrange(len(changed))
        kind = dice.randrange(7)
        if kind == 0:
            changed[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            changed[at] = dice.choice(b"\0\n\r \x0b\x1b:/()-0\xff")
        elif kind in (2, 3):
            width = dice.choice((2, 4, 8))
            number = dice.choice(NUMBERS) if dice.random() < 0.8 else dice.randrange(len(changed))
            changed[at : at + width] = (number & (1 << 8 * width) - 1).to_bytes(width, "little")
        elif kind == 4:
            other = dice.randrange(len(changed))
            changed[at : at + 8] = changed[other : other + 8]
        elif kind == 5:
            changed[at : at + dice.choice((1, 4, 64))] = b""
        else:
            changed[at:at] = changed[at : at + dice.choice((1, 8, 64))]
        if not changed:
            break
    return bytes(changed[: dice.randrange(len(changed) + 1)] if dice.random() < 0.05 else changed)


def odd_json(value: Any, dice: random.Random) -> bytes:
    """The value with something in it replaced by what does not belong there; or its text altered."""
    value = json.loads(json.dumps(value))
    for _ in range(dice.choice((1, 1, 2, 4))):
        path = [value]
        while isinstance(path[-1], (dict, list)) and path[-1] and dice.random() < 0.85:
            inside = path[-1]
            key = dice.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
            path.append(inside[key])
            parent, where = inside, key
        if len(path) == 1:
            continue
        if isinstance(parent, dict) and dice.random() < 0.15:
            del parent[where]
        else:
            parent[where] = _odd(dice)
    text = json.dumps(value)
    while TOKEN in text:
        text = text.replace(f'"{TOKEN}"', dice.choice(RAW), 1)
    data = text.encode()
    return altered(data, dice) if dice.random() < 0.3 else data


def _odd(dice: random.Random) -> Any:
    numbers = (*NUMBERS, -1, -(1 << 63), 0.5, 1e300)
    return dice.choice((TOKEN, TOKEN, None, True, [], {}, [[]], {"": 1}, dice.choice(TEXTS), dice.choice(numbers)))


# Cores


def core_file(folder: Path, program: Path) -> tuple[Path, Build, list[int]]:
    """A saved core of a small pool with a request that is done, the build, and the places that matter in the file."""
    path = folder / "core"
    with Image.open(program) as image:
        found = build_of(image, str(program))
    with subprocess.Popen([program, "3", "0", "0", "w"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin
        try:
            child.stdin.write(b"\n")
            child.stdin.flush()
            with closing(LiveView(target.open_target(child.pid))) as view:
                wait_until(lambda: list(_pools(view, found)), what="its pool")
                save(view, str(path))
        finally:
            child.kill()
    return path, found, _planted(path, found)


def _pools(view: LiveView | CoreView, found: Build) -> Iterator[Any]:
    with suppress(AioTraceError):
        yield from load(view, found).reader.find(view.heap_chunks())


def _planted(path: Path, found: Build) -> list[int]:
    """Put a finished request into the pool; where in the file the words are that a diagnosis follows."""
    element, pool_at = found.located.layout.element, found.located.layout.pool
    with closing(CoreView(str(path))) as view:
        pool = next(_pools(view, found))
        address = max(end for start, end in _heap_of(view)) - 4096

        def place(at: int) -> int:
            segment = view.file.load_at(at)
            assert segment
            return segment.offset + at - segment.start

        head = place(pool.address + pool_at.head)
        words = {element.callback: 0x1234, element.pool: pool.address, element.prev: pool.address + pool_at.head}
        places = [head, place(pool.address + pool_at.completion_bh), place(pool.address + pool_at.context)]
        places += [place(address + offset) for offset in (element.callback, element.opaque, element.pool, element.func)]
        places += [place(address + offset) for offset in (element.arg, element.state, element.next, element.prev)]
        places += [*range(24, 64, 2), *range(64, 64 + 56 * 12, 8)]
        notes = view.file._data.read(0, 1 << 16).find(b"CORE\0")
        places += range(notes - 12, notes + 2048, 4)
        with path.open("r+b") as file:
            for offset, value in words.items():
                os.pwrite(file.fileno(), struct.pack("<Q", value), place(address + offset))
            os.pwrite(file.fileno(), struct.pack("<I", 2), place(address + element.state))
            os.pwrite(file.fileno(), struct.pack("<Q", address), head)
    return places


def _heap_of(view: CoreView) -> list[tuple[int, int]]:
    return [(start, start + len(data)) for start, data in view.heap_chunks()]


def cores(folder: Path) -> Trial:
    """Headers, notes, memory, the note of ours; also larger than they are, with holes."""
    program = build(Recipe(), folder)
    path, found, places = core_file(folder, program)
    sound = path.read_bytes()
    with closing(CoreView(str(path))) as view:
        (facts,) = [view.file.facts]
        told = diagnose(view, found)
        assert told.pools
        assert told.pools[0].requests, "or little is tried"
    note_at = sound.index(json.dumps(facts)[:40].encode())
    note_size = len(sound[note_at:].split(b"}}\0", 1)[0]) + 2 if b"}}\0" in sound[note_at:] else 4096
    damaged = folder / "damaged"

    def trial(dice: random.Random) -> str:
        data = sound
        if dice.random() < 0.3:
            odd = odd_json(facts, dice)[:note_size].ljust(note_size)
            data = data[:note_at] + odd + data[note_at + note_size :]
        if dice.random() < 0.8:
            data = _altered_in_place(data, dice, places)
        with damaged.open("wb") as file:
            file.write(data[: dice.randrange(len(data))] if dice.random() < 0.05 else data)
            if dice.random() < 0.2:
                file.truncate(dice.choice((1 << 20, 1 << 32, 1 << 36)))
        given = str(program) if dice.random() < 0.2 else None
        with closing(CoreView(str(damaged), given)) as view:
            with suppress(AioTraceError), view.open_image() as image:
                image.qemu_version()
            view.missing(), view.files(), view.arguments()
            seen = diagnose(view, found)
        json_line(diagnosis_json(seen))
        diagnosis_text(seen, verbose=True)
        return str(seen.verdict)

    return trial


def _altered_in_place(data: bytes, dice: random.Random, places: list[int]) -> bytes:
    """As altered(), but everything stays where it is."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 2, 4, 16))):
        at = dice.choice(places) if dice.random() < 0.8 else dice.randrange(len(changed) - 8)
        other = struct.unpack_from("<Q", changed, dice.choice(places))[0]
        number = dice.choice((*NUMBERS, other, other + 8, dice.randrange(len(changed))))
        width = dice.choice((1, 2, 4, 8))
        changed[at : at + width] = (number & (1 << 8 * width) - 1).to_bytes(width, "little")
    return bytes(changed)


# ELF files


def elves(folder: Path) -> Trial:
    """Headers of files, segments and sections, notes, tables; also far larger than they are, with holes."""
    program = build(Recipe(probes=True), folder)
    forms = [path.read_bytes() for path in (program, stripped(program), with_mini_debug_info(program))]
    damaged = folder / "damaged.elf"

    def trial(dice: random.Random) -> str:
        data = dice.choice(forms)
        phnum, shoff, shnum = struct.unpack_from("<H", data, 56)[0], *struct.unpack_from("<Q", data, 40), data[60]
        places = [*range(16, 64, 2), *range(64, 64 + 56 * phnum, 8), *range(shoff, shoff + 64 * shnum, 8)]
        data = _altered_in_place(data, dice, [place for place in places if place < len(data) - 8])
        damaged.write_bytes(data[: dice.randrange(len(data))] if dice.random() < 0.05 else data)
        if dice.random() < 0.2:
            os.truncate(damaged, dice.choice((1 << 20, 1 << 31, 1 << 33, 1 << 40)))
        if dice.randrange(SELDOM) == 0:
            findings = check_file(str(damaged))
            TableWriter(io.StringIO(), lambda text: None).write(findings.event)
            json_line(as_json(findings.event))
            return "checked"
        with Image.open(damaged) as image:
            return _walked(image, dice)

    return trial


def _walked(image: Image, dice: random.Random) -> str:
    """All that is asked of any file; what is refused is refused for its own reason."""
    asked: list[Callable[[], object]] = [
        lambda: (image.build_id, image.is_pie, image.entry, image.headers, image.has_symtab),
        lambda: image.static_probes,
        image.qemu_version,
        image.qemu_evidence,
        lambda: image.functions_named("worker_thread"),
        lambda: image.symbol("qemu_bh_schedule"),
        lambda: [image.symbol_names_at(image.entry), image.bounds(image.entry), image.frame_entry(image.entry)],
        lambda: [image.plt_name(image.entry), image.string_at(image.entry), image.functions_in(0, image.entry)],
        lambda: image.strings(b"worker"),
    ]
    refused = 0
    for question in asked:
        try:
            question()
        except AioTraceError:
            refused += 1
    if dice.random() < 0.25:
        with suppress(SitesNotFound):
            locate(image)
    return f"{refused} refused" if refused else "walked"


# Texts of /proc


PROC = {
    "stat": b"4711 (a (b) c) S 1 4711 4711 0 -1 4194304" + b" 1" * 12 + b" 12345" + b" 0" * 15 + b" 17 3 0\n",
    "status": b"Name:\ta\nTgid:\t4711\nNSpid:\t4711\t7\nvoluntary_ctxt_switches:\t12\nnonvoluntary_ctxt_switches:\t3\n",
    "syscall": b"202 0x7f00 0x189 0x0 0x0 0x0 0xffffffff 0x7ffd00 0x7f0000\n",
    "schedstat": b"123456 789 12\n",
    "cgroup": b"12:freezer:/a\n0::/user.slice\n",
    "maps": b"55f2aafbb000-55f2ab364000 rw-p 00001000 fe:00 2156318    /usr/bin/a b\n7f00-8f00 r-xp 0 00:00 0 [vdso]\n",
    "fdinfo": b"pos:\t0\nflags:\t02\nmnt_id:\t15\neventfd-count:         7\ntfd:       12 events:       19 data: 1\n",
    "auxv": struct.pack("<8Q", 3, 64, 9, 0x55F2AAFBB000, 6, 4096, 0, 0),
    "sched": b"a (4711, #threads: 1)\nse.exec_start                                :      12345.678901\n",
    "stack": b"[<0>] do_wait+0x12/0x34\n[<0>] ep_poll\n",
    "unix": b"Num RefCount Protocol Flags Type St Inode Path\n0000: 00000002 00000000 00010000 0001 01 123 /a b\n",
}


@contextmanager
def shown_instead(texts: dict[str, bytes]) -> Iterator[None]:
    """Whatever reads a text of /proc by tracer.target gets one of these, by the last part of its path."""
    with ExitStack() as stack:
        modules: list[Any] = [module for name, module in sys.modules.items() if name.startswith("tracer.")]
        for module in modules:
            name = "_text" if module is cgroup else "read_text"
            if hasattr(module, name):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, lambda path: os.fsdecode(_text_of(path, texts)))
        yield


def _text_of(path: str, texts: dict[str, bytes]) -> bytes:
    parts = path.split("/")
    return texts.get(parts[-1], texts["fdinfo"] if "fdinfo" in parts else b"")


def proc_texts(folder: Path) -> Trial:
    """Fields that are missing, numbers that are none, names of any bytes, lines without an end."""
    del folder
    pid = os.getpid()

    def trial(dice: random.Random) -> str:
        texts = {name: altered(text, dice) if dice.random() < 0.5 else text for name, text in PROC.items()}
        with shown_instead(texts):
            refused = 0
            process = target.Target(pid, 12345, "/usr/bin/qemu")
            for question in (
                lambda: process.alive,
                lambda: process.frozen,
                lambda: process.thread(pid),
                lambda: process.last_cpu(pid),
                process.regions,
                lambda: process.eventfd_count(7),
                lambda: process.name,
                lambda: target.open_target(pid),
                lambda: target.qemu_hint(pid),
                lambda: (cgroup.memory_limit(pid), cgroup.thaw_line(pid)),
            ):
                try:
                    question()
                except AioTraceError:
                    refused += 1
        return f"{refused} refused" if refused else "read"

    return trial


# Answers of QMP


GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 8}, "package": "x"}, "capabilities": ["oob"]}}
ANSWERS = (
    {"return": {}},
    {
        "return": [
            {
                "device": "d0",
                "qdev": "/machine/peripheral/vda",
                "node-name": "top",
                "parent": {"node-name": "file", "stats": {}},
                "backing": {"node-name": "base", "parent": {"node-name": "base-file"}},
            }
        ],
        "id": "ID",
    },
    {"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}, "data": {}},
    {"error": {"class": "GenericError", "desc": "no\x1b[31m"}, "id": "ID"},
)


class Monitor:
    """A UNIX socket of this very process that answers what it is told to, line by line, and then hangs up."""

    def __init__(self, path: Path) -> None:
        self.lines: list[bytes] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(8)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, suppress(OSError):
                connection.settimeout(0.05)
                name = b""
                for line in self.lines:
                    connection.sendall(line.replace(b"ID", name) + b"\r\n")
                    found = re.search(rb'"id": *"([^"]*)"', connection.recv(4096))
                    name = found[1] if found else name


def qmp_answers(folder: Path) -> Trial:
    """Greetings and answers with anything in them, to a real client on a real socket."""
    path = folder / "qmp"
    monitor = Monitor(path)
    me = target.open_target(os.getpid())

    def trial(dice: random.Random) -> str:
        odd = dice.randrange(4)
        lines = [GREETING, *ANSWERS[:1], dice.choice(ANSWERS[1:]), dice.choice(ANSWERS)]
        monitor.lines = [
            odd_json(line, dice) if number == odd or dice.random() < 0.2 else json.dumps(line).encode()
            for number, line in enumerate(lines)
        ]
        drives_of(_loaded(odd_json(ANSWERS[1]["return"], dice)))
        with closing(SocketMonitor(me, str(path), 1.0)) as client:
            return f"{len(drives_of(client.execute('query-blockstats')))} drives"

    return trial


def _loaded(data: bytes) -> Any:
    """As a client would have it; what no JSON reader takes, is an empty list."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return []


# Our cache


def cache_files(folder: Path) -> Trial:
    """Files that were kept, altered in any way: not believed, or believed to be what they were."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    (folder / "cache").mkdir(mode=0o700)
    program = build(Recipe(), folder)
    contents: list[bytes] = []
    image = Image.open(program)
    store, cache.store = cache.store, lambda kind, key, content: contents.append(content)
    kept._keep(image, b"key", build_of(image, "qemu"))
    cache.store = store
    whole = json.loads(contents[0])
    sound = kept._believed(image, contents[0])
    assert sound is not None
    addresses = [site.address for site in sound.located.sites.values()]
    compiled = Compiled((MapShape("a", 1, 4, 8, 16, 0),), {"done": bytes(64)}).to_bytes()
    shapes = json.loads(compiled)

    def trial(dice: random.Random) -> str:
        if dice.random() < 0.3:
            with suppress(ValueError, KeyError, TypeError):
                Compiled.from_bytes(odd_json(shapes, dice)).instructions("done", [3])
            return "compiled"
        if dice.random() < 0.1:
            return _stored(folder, compiled, dice)
        believed = kept._believed(image, odd_json(whole, dice))
        if believed is None:
            return "refused"
        assert [site.address for site in believed.located.sites.values()] == addresses
        return "believed"

    return trial


def _stored(folder: Path, content: bytes, dice: random.Random) -> str:
    """A file in the cache's own folder: it is there as it was stored, or not at all."""
    cache.store("fuzz", b"key", content)
    (path,) = (folder / "cache/aio-trace/fuzz").iterdir()
    path.write_bytes(altered(path.read_bytes(), dice))
    found = cache.load("fuzz", b"key")
    assert found in (None, content)
    return "loaded" if found else "not loaded"


KINDS: dict[str, Callable[[Path], Trial]] = {
    "cores": cores,
    "elves": elves,
    "proc": proc_texts,
    "qmp": qmp_answers,
    "cache": cache_files,
}


def _most_memory() -> int:
    """The most that this program had in memory; getrusage() would count what its parent had before the exec; bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = re.search(r"^VmHWM:\s*(\d+) kB", text, re.M)
    assert found
    return int(found[1]) << 10


def run(kind: str, count: int, seed: int, folder: Path, first: int = 0) -> dict[str, Any]:
    """So many of a kind; see the module."""
    trial = KINDS[kind](folder)
    outcomes: Counter[str] = Counter()
    slowest, failures = (0.0, ""), []
    for number in range(first, first + count):
        began = time.process_time()
        try:
            outcome = trial(random.Random(f"{kind} {seed}:{number}"))
        except AioTraceError as error:
            outcome = type(error).__name__
            if not error.message.isprintable():
                failures.append(f"{seed}:{number} says {error.message!r}")
        except Exception:
            outcome = "FAILED"
            failures.append(f"{seed}:{number}\n{traceback.format_exc()}")
        outcomes[outcome] += 1
        took = time.process_time() - began
        slowest = max(slowest, (took, f"{seed}:{number}"))
        if took > LONGEST_S:
            failures.append(f"{seed}:{number} took {took:.1f} s")
        if len(failures) >= 8:
            break
    mib = _most_memory() >> 20
    if mib > MOST_MIB:
        failures.append(f"{mib} MiB in the end")
    figures = {"kind": kind, "count": sum(outcomes.values()), "slowest_s": round(slowest[0], 2), "at": slowest[1]}
    return figures | {"mib": mib, "outcomes": dict(outcomes.most_common(12)), "failures": failures}


def main() -> None:
    """See the module."""
    kind, count, seed, folder, *first = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (GUARD, GUARD))
    print(json.dumps(run(kind, int(count), int(seed), Path(folder), *map(int, first))))
    sys.stdout.flush()
    os._exit(0)  # the monitor's thread waits


if __name__ == "__main__":
    main()
