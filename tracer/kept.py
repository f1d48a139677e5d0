"""Builds that were located before, kept from one trace to the next (tracer/cache).

Knows: what makes two files the same, and how what was kept for one shows again that it is true of this
one. What does not is located afresh, and so is what was never kept. Does not know how sites are found.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.machinery import PathFinder
from typing import Any

from tracer import cache
from tracer.build import Build, build_of
from tracer.debug_files import DebugFiles, Place
from tracer.elf import Bounds, Image
from tracer.errors import AioTraceError
from tracer.executable import Executable, Identity, identity_of
from tracer.layout import BottomHalfLayout, ElementLayout, Layout, PoolLayout
from tracer.sites.model import SITE_NAMES, Attempt, Located, Site
from tracer.sites.placing import placed

KIND = "builds"

_MOST_CODE = 1 << 20
_LARGEST_STRUCTURE = 1 << 16
_ALWAYS_THERE = ("thread_pool_completion_bh", "worker_thread")
_REGISTER = r"[a-z][a-z0-9]{1,3}(-0x[0-9a-f]+)?"
#: What reads the code: a newer one may read it better.
_LIBRARIES = ("capstone", "elftools")


class _NotTrue(Exception):
    """What was kept is not so in this file, or cannot be so in any."""


def read_build(file: Executable, name: str, place: Place) -> Build:
    """As tracer.build.build_of; what was kept of an earlier time is taken where it proves itself.

    Nothing that the process made up may be in `place`: what is found is kept for all that run this file.
    """
    with file.image() as image:
        key = _key(image, file, place)
        build = _recalled(image, key) if key else None
        if build is None:
            build = build_of(image, name, None, place)
            _keep(image, key, build)
        return build


def _key(image: Image, file: Executable, place: Place) -> bytes | None:
    """All that what is found depends on: the file, its debug files, and the programs that search."""
    try:
        debug = DebugFiles(image, place).candidates()
        key = {
            "file": file.identity,
            "headers": image.headers.hex(),
            "build id": image.build_id,
            "debug files": [(candidate, identity(candidate)) for candidate in debug],
            "programs": [identity(program) for program in _programs()],
        }
    except (OSError, AioTraceError):
        return None
    return json.dumps(key).encode()


def identity(path: str) -> Identity:
    """What changes with a file's content, or when another takes its name; nothing where there is none."""
    try:
        return identity_of(os.stat(path))
    except (OSError, ValueError):
        return ()


def _programs() -> list[str]:
    """This package's files, and the libraries that it reads code with."""
    here = os.path.dirname(__file__)
    folders = (here, os.path.join(here, "sites"))
    own = [os.path.join(folder, name) for folder in folders for name in os.listdir(folder) if name.endswith(".py")]
    found = (PathFinder.find_spec(library, sys.path) for library in _LIBRARIES)
    return [*sorted(own), *(spec.origin for spec in found if spec and spec.origin)]


# What is kept: what was found, and the code that it was found in.


def _keep(image: Image, key: bytes | None, build: Build) -> None:
    located = build.located
    try:
        sites = (*located.sites.values(), *located.more_sites)
        kept = {
            "version": build.version,
            "sites": {name: asdict(site) for name, site in located.sites.items()},
            "more sites": [asdict(site) for site in located.more_sites],
            "layout": asdict(located.layout),
            "functions": dict(located.functions),
            "bounds": {name: (found.start, found.end) for name, found in build.bounds.items()},
            "attempts": [asdict(attempt) for attempt in located.attempts],
            "main context": located.main_context,
            "barrier fixed": located.barrier_fixed,
            "notes": located.notes,
            "code": [(code.start, code.end, _code_digest(image, code)) for code in _code_of(image, build, sites)],
        }
    except (AioTraceError, _NotTrue):
        return
    content = json.dumps(kept).encode()
    # What would not be believed need not be kept.
    if key is not None and _believed(image, content) == build:
        cache.store(KIND, key, content)


def _code_of(image: Image, build: Build, sites: Iterable[Site]) -> list[Bounds]:
    """The functions in which something was found."""
    around = [image.bounds(site.address) for site in sites]
    found = {(code.start, code.end) for code in (*build.bounds.values(), *around) if code is not None}
    return [Bounds(*code) for code in sorted(found)]


def _code_digest(image: Image, code: Bounds) -> str:
    if not 0 < code.end - code.start <= _MOST_CODE or not image.is_executable(code.start):
        raise _NotTrue(f"there is no function at {code.start:#x}")
    return cache.digest(image.read(code.start, code.end - code.start))


# What is believed of it.


def _recalled(image: Image, key: bytes) -> Build | None:
    content = cache.load(KIND, key)
    return None if content is None else _believed(image, content)


def _believed(image: Image, content: bytes) -> Build | None:
    """The build that was kept, as far as it is true of this image; else None, with the reason in cache.refusals."""
    try:
        kept = json.loads(content)
        build = _build(image, kept)
        _prove(image, build, [Bounds(start, end) for start, end, _ in kept["code"]])
        for start, end, told in kept["code"]:
            _must(_code_digest(image, Bounds(start, end)) == told, f"the code at {start:#x} is another")
    except (_NotTrue, AioTraceError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as reason:
        cache.refusals.append(f"{KIND}: {reason}")
        return None
    return build


def _build(image: Image, kept: Mapping[str, Any]) -> Build:
    layout = kept["layout"]
    located = Located(
        {name: Site(**site) for name, site in kept["sites"].items()},
        Layout(
            ElementLayout(**layout["element"]),
            PoolLayout(**layout["pool"]),
            BottomHalfLayout(**layout["bottom_half"]),
            layout["source"],
        ),
        kept["functions"],
        tuple(Attempt(**attempt) for attempt in kept["attempts"]),
        kept["main context"],
        kept["barrier fixed"],
        tuple(kept["notes"]),
        tuple(Site(**site) for site in kept["more sites"]),
    )
    bounds = {name: Bounds(start, end) for name, (start, end) in kept["bounds"].items()}
    return Build(located, kept["version"], image.entry, image.machine, bounds)


def _prove(image: Image, build: Build, code: list[Bounds]) -> None:
    """That each address leads to code that was looked at, and that nothing is what it can be in no build.

    The functions begin and end where this file says so: what was an instruction in them is one.
    """
    located = build.located
    for each in code:
        _must(image.bounds(each.start) == each, f"there is no function from {each.start:#x} to {each.end:#x}")
    _must(set(located.sites) == set(SITE_NAMES), "a site is missing")
    for name, site in [*located.sites.items(), *((site.name, site) for site in located.more_sites)]:
        _must(site.name == name and name in SITE_NAMES, f"a site is called {site.name}")
        _must(re.fullmatch(_REGISTER, site.register) is not None, f"there is no register {site.register}")
        _must(any(site.address in each for each in code), f"no code was kept for the site at {site.address:#x}")
        _must(site == placed(image, site), f"the instruction at {site.address:#x} is another")
    for name in _ALWAYS_THERE:
        _must(located.functions[name] == build.bounds[name].start, f"{name} is not where it begins")
    for name, bounds in build.bounds.items():
        _must(bounds in code and located.functions[name] in bounds, f"no code was kept for {name}")
    _must(located.main_context is None or image.segment_at(located.main_context) is not None, "no such variable")
    _prove_layout(asdict(located.layout))


def _prove_layout(layout: Mapping[str, Any]) -> None:
    for structure in ("element", "pool", "bottom_half"):
        for member, offset in layout[structure].items():
            known = offset is None or (type(offset) is int and 0 <= offset < _LARGEST_STRUCTURE)
            _must(known, f"{structure}.{member} cannot be at {offset}")


def _must(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _NotTrue(otherwise)
