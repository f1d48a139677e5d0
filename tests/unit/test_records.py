"""tracer.records beside dataclasses itself: the same classes, made by both, do the same."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import FrozenInstanceError, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tracer import records

ROOT = Path(__file__).resolve().parents[2]
Decorator = Callable[..., Any]


def frozen_base(dataclass: Decorator) -> Any:
    @dataclass(frozen=True)
    class Base:
        """A documented one."""

        first: int
        second: str = "two"

    return Base


def frozen(dataclass: Decorator) -> Any:
    @dataclass(frozen=True)
    class Frozen(frozen_base(dataclass)):  # type: ignore[misc]
        third: tuple[int, ...] = (1, 2)
        fourth: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

        @property
        def half(self) -> float:
            return self.first / 2

        @cached_property
        def twice(self) -> int:
            return int(self.first * 2)

    return Frozen


def plain(dataclass: Decorator) -> Any:
    @dataclass
    class Plain:
        first: int
        rest: list[int] = field(default_factory=list)

    return Plain


def empty(dataclass: Decorator) -> Any:
    @dataclass(frozen=True)
    class Empty:
        pass

    return Empty


def said(make: Callable[[], Any]) -> Any:
    """What comes of it: the value as text, or the error."""
    try:
        return repr(make())
    except Exception as error:
        return type(error), str(error)


DOINGS: dict[str, Callable[[Any], Any]] = {
    "all arguments": lambda cls: cls(1, "b", (3,), {"d": 4}),
    "by name": lambda cls: cls(first=1),
    "defaults": lambda cls: cls(1).fourth,
    "each a default of its own": lambda cls: cls(1).fourth is cls(1).fourth,
    "class attributes": lambda cls: (cls.second, cls.third, hasattr(cls, "first")),
    "none": lambda cls: cls(),
    "too many": lambda cls: cls(1, 2, 3, 4, 5),
    "a wrong name": lambda cls: cls(1, sixth=6),
    "equal": lambda cls: (cls(1) == cls(1), cls(1) != cls(1), cls(1) == cls(2), cls(1, fourth={"a": 1}) == cls(1)),
    "another class": lambda cls: (cls(1) == (1,), cls(1).__eq__(1), cls(1) == cls.__mro__[1](1)),
    "hash": lambda cls: (hash(cls(1)) == hash(cls(1, fourth={"a": 1})), {cls(1): 2}[cls(1)], len({cls(1), cls(2)})),
    "set": lambda cls: setattr(cls(1), "first", 2),
    "set another": lambda cls: setattr(cls(1), "other", 2),
    "delete": lambda cls: delattr(cls(1), "first"),
    "property": lambda cls: cls(3).half,
    "cached property": lambda cls: cls(3).twice,
    "replace": lambda cls: dataclasses.replace(cls(1), second="b"),
    "asdict": lambda cls: dataclasses.asdict(cls(1, fourth={"a": 1})),
    "fields": lambda cls: [(each.name, each.default) for each in dataclasses.fields(cls) if each.name != "fourth"],
    "is one": lambda cls: (dataclasses.is_dataclass(cls), dataclasses.is_dataclass(cls(1))),
    "match": lambda cls: cls(1).__match_args__,
    "order": lambda cls: cls(1) < cls(2),
    "copy": lambda cls: (copy.copy(cls(1)), copy.deepcopy(cls(1))),
    "unhashable": lambda cls: hash(cls(1, third=[])),
    "documentation": lambda cls: cls.__mro__[1].__doc__,
}


@pytest.mark.parametrize("doing", DOINGS)
def test_frozen_ones_do_as_dataclasses_do(doing: str) -> None:
    # Of each a new class: whatever is done first must find what it needs.
    mine, theirs = (
        said(lambda each=each: DOINGS[doing](frozen(each))) for each in (records.dataclass, dataclasses.dataclass)
    )
    assert mine == theirs


@pytest.mark.parametrize(
    "doing",
    [
        lambda cls: cls(1),
        lambda cls: cls(1).rest is cls(1).rest,
        lambda cls: cls(1) == cls(1, []),
        lambda cls: hash(cls(1)),
        lambda cls: setattr(cls(1), "first", 2),
        lambda cls: vars(cls(1)),
        lambda cls: dataclasses.replace(cls(1), rest=[2]),
    ],
)
def test_plain_ones_do_as_dataclasses_do(doing: Callable[[Any], Any]) -> None:
    assert said(lambda: doing(plain(records.dataclass))) == said(lambda: doing(plain(dataclasses.dataclass)))


def test_empty_ones_do_as_dataclasses_do() -> None:
    for doing in (lambda cls: cls(), lambda cls: cls() == cls(), lambda cls: hash(cls()), lambda cls: cls(1)):
        assert said(lambda d=doing: d(empty(records.dataclass))) == said(
            lambda d=doing: d(empty(dataclasses.dataclass))
        )


def test_nothing_is_made_before_it_is_needed() -> None:
    cls = frozen_base(records.dataclass)
    made = cls(1)
    assert type(vars(cls)["__init__"]) is type(lambda: None)
    assert type(vars(cls)["__eq__"]) is not type(lambda: None)
    assert made == cls(1)
    assert type(vars(cls)["__eq__"]) is type(lambda: None)


def test_a_method_of_its_own_stays() -> None:
    @records.dataclass(frozen=True)
    class Own:
        first: int

        def __repr__(self) -> str:
            return "own"

    assert repr(Own(1)) == "own"


def test_what_it_does_not_know_is_an_error() -> None:
    @records.dataclass
    class Later:
        first: int

        def __post_init__(self) -> None:
            self.first += 1

    with pytest.raises(TypeError, match="does not know"):
        Later(1)


def test_threads_that_need_it_at_once() -> None:
    """Each of many threads makes an instance of a class that none has made yet."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            cls = frozen(records.dataclass)
            ready, made = threading.Barrier(4), []

            def make(cls: Any = cls, ready: threading.Barrier = ready, made: list[Any] = made) -> None:
                ready.wait()
                made.append((cls(1), cls(1) == cls(1), hash(cls(1)), repr(cls(1))))

            threads = [threading.Thread(target=make) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(made) == 4
            assert len(set(made)) == 1
    finally:
        sys.setswitchinterval(before)


def test_the_errors_of_dataclasses() -> None:
    with pytest.raises(FrozenInstanceError):
        frozen(records.dataclass)(1).first = 2


def test_every_class_of_the_project_can_be_made() -> None:
    """One whose fields tracer.records does not know would fail only when it is first used."""
    program = """
import pkgutil, importlib, inspect, dataclasses, tracer
from tracer import records
seen = 0
for module in pkgutil.walk_packages(tracer.__path__, "tracer."):
    for name, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
        if any(isinstance(value, records._Later) for value in vars(cls).values()):
            for method in ("__init__", "__eq__", "__hash__", "__repr__"):
                getattr(cls, method)
            assert not any(isinstance(value, records._Later) for value in vars(cls).values()), cls
            assert dataclasses.is_dataclass(cls)
            seen += 1
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80


def test_instances_can_be_pickled() -> None:
    from tracer.layout import ElementLayout

    layout = ElementLayout(*range(9))
    assert pickle.loads(pickle.dumps(layout)) == layout
