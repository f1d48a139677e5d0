"""Strategy "usdt": the notes of QEMU's static probes say where a request passes, and in which register.

Knows: the probes thread_pool_submit and thread_pool_complete of provider qemu (their names end in _aio
since QEMU v10.0) and their arguments. Each stands on a nop; its semaphore is left alone, since the nop is
passed whether it is raised or not, which is proved. There is no such probe where a request becomes
THREAD_DONE: that site, and the layout, come from the code. What a note says must be what the code says.
The probe thread_pool_complete is passed by requests without a callback, too, so it is a witness only,
unless the code has no cheap site.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from tracer.elf import StaticProbe
from tracer.sites.flow import Flow, FlowError, Value
from tracer.sites.model import CALLBACK, SUBMIT, Attempt, Located, Site
from tracer.sites.pool_code import Shown, located, read_shown
from tracer.sites.program import AnyNames, DynamicNames, Program
from tracer.sites.proof import NotProved
from tracer.sites.search import Search
from tracer.sites.symbols import SymbolNames

NAME = "usdt"
_CODE = "code"  # what the sites that are no probes come from
_PROVIDER = "qemu"
_SUBMIT = ("thread_pool_submit", "thread_pool_submit_aio")
_COMPLETE = ("thread_pool_complete", "thread_pool_complete_aio")
_REQUEST = 1  # both probes' arguments begin with pool, request
_REGISTER = re.compile(r"-?8@%([a-z0-9]+)")


def locate(search: Search) -> Located:
    """All sites, proved; NotProved with the reason otherwise."""
    probes = [probe for probe in search.image.static_probes if probe.provider == _PROVIDER]
    submits = [probe for probe in probes if probe.name in _SUBMIT]
    completes = [probe for probe in probes if probe.name in _COMPLETE]
    if not submits or not completes:
        raise NotProved("there are no notes of qemu:thread_pool_submit and thread_pool_complete")
    program = Program(search.code, AnyNames(DynamicNames(search.image), SymbolNames(search)))
    try:
        shown = read_shown(program, by_strings=True)
        found = replace(located(program, shown, _CODE), attempts=(Attempt(NAME, "found and proved", ok=True),))
        notes: list[str] = []
        sites = [
            *_submit_sites(program, shown, found, submits, notes),
            *found.sites_of("done"),
            *_callback_sites(program, shown, found, completes, notes),
        ]
    except FlowError as error:
        raise NotProved(str(error)) from error
    if not any(site.strategy == NAME for site in sites):
        raise NotProved("; ".join(notes))
    first = {site.name: site for site in reversed(sites)}
    more = tuple(site for site in sites if site not in first.values())
    return replace(found, sites=first, more_sites=more, notes=(*found.notes, *notes))


def request_register(arguments: str) -> str | None:
    """The register that holds the request by a probe's argument string; None if it is not in one."""
    words = arguments.split()
    found = _REGISTER.fullmatch(words[_REQUEST]) if len(words) > _REQUEST else None
    return found[1] if found else None


def _submit_sites(
    program: Program, shown: Shown, found: Located, probes: list[StaticProbe], notes: list[str]
) -> list[Site]:
    """For every copy of submit its probe's nop, or where that cannot be used what the code says."""
    sites = []
    left = list(probes)
    for (function, submit), known in zip(shown.submits, found.sites_of(SUBMIT)):
        flow = program.flow(function)
        mine = [probe for probe in left if probe.address in flow.instructions]
        usable = [
            probe
            for probe in mine
            if flow.always_before(submit.linked, probe.address) and flow.always_before(probe.address, submit.queued_at)
        ]
        left = [probe for probe in left if probe not in usable]
        sites.append(_chosen(flow, usable, submit.element, known, notes, "submit"))
    if left:
        told = ", ".join(f"{probe.address:#x}" for probe in left)
        raise NotProved(f"the note of thread_pool_submit at {told} is not where the code submits a request")
    return sites


def _callback_sites(
    program: Program, shown: Shown, found: Located, probes: list[StaticProbe], notes: list[str]
) -> list[Site]:
    """The code's site where it is cheap: the probe is passed by requests without a callback, too."""
    flow = program.flow(shown.halves.completion)
    for probe in probes:
        if probe.address not in flow.instructions:
            raise NotProved(f"the note of thread_pool_complete at {probe.address:#x} is not in its function")
    known = found.sites_of(CALLBACK)
    nops: dict[int, Site] = {}
    missed = False
    for at, element in shown.callback.calls:
        usable = [probe for probe in probes if flow.always_before(probe.address, at)]
        proved = [_proved(flow, probe, element, notes, CALLBACK) for probe in usable]
        nops.update({site.address: replace(site, without_callback=True) for site in proved if site is not None})
        missed = missed or not usable or None in proved
    if missed:
        notes.append("a callback can be reached without its probe thread_pool_complete")
    return list(known) if missed or all(site.cheap for site in known) else list(nops.values())


def _chosen(
    flow: Flow, probes: Iterable[StaticProbe], element: Value, known: Site, notes: list[str], name: str
) -> Site:
    for probe in probes:
        site = _proved(flow, probe, element, notes, name)
        if site is not None:
            return site
    return known


def _proved(flow: Flow, probe: StaticProbe, element: Value, notes: list[str], name: str) -> Site | None:
    """The probe's nop as a site; None, with a note, where its request is not in a register.

    NotProved if the code says that another register holds the request there.
    """
    register = request_register(probe.arguments)
    if register is None:
        notes.append(f"the probe {probe.name} at {probe.address:#x} has the request in memory ({probe.arguments})")
        return None
    step = flow.instructions[probe.address]
    if not step.cheap:
        raise NotProved(f"the probe {probe.name} is not on a nop but on {step.text}")
    if register not in flow.holders_at(probe.address, element):
        raise NotProved(f"by its note {register} holds the request at {probe.address:#x}, by the code it does not")
    return Site(name, probe.address, register, step.text, NAME, True)
