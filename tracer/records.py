"""`@dataclass` whose methods are made when they are first needed.

Knows: that dataclasses compiles six methods for each frozen class, half a millisecond's work, and that a
command uses a quarter of the classes that it imports. What comes out is a dataclass (fields, replace,
asdict and match work as ever); only `frozen` may be chosen. For type checkers it is dataclasses' own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
    from types import ModuleType

    def get_ready(*modules: ModuleType) -> None:
        """Make now what instances of these modules' classes need, so that it does not take its time later."""
else:
    import dataclasses
    from _thread import RLock
    from reprlib import recursive_repr

    _making = RLock()
    _METHODS = ("__init__", "__eq__", "__hash__", "__repr__")

    def dataclass(cls=None, /, *, frozen=False):
        """As dataclasses.dataclass."""
        if cls is None:
            return lambda each: dataclass(each, frozen=frozen)
        maker = _Maker(cls, frozen)
        if frozen:
            cls.__setattr__, cls.__delattr__ = _refuse_to_set, _refuse_to_delete
        for name in (*_METHODS, "__dataclass_fields__"):
            if name not in cls.__dict__:
                setattr(cls, name, _Later(name, maker))
        return cls

    def get_ready(*modules):
        """See above."""
        for module in modules:
            for value in vars(module).values():
                if isinstance(value, type):
                    value.__init__  # noqa: B018

    def _refuse_to_set(self, name, value):
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def _refuse_to_delete(self, name):
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    class _Later:
        """Stands in a class for what is not made yet; whoever looks it up has it made, and gets that."""

        def __init__(self, name, maker):
            self._name, self._maker = name, maker

        def __get__(self, instance, owner):
            # A second thread waits, and finds that it is made.
            with _making:
                self._maker.make(self._name, self)
            return getattr(owner if instance is None else instance, self._name)

    class _Maker:
        """Makes one class's methods. Nothing is ever missing meanwhile: each takes its placeholder's place."""

        def __init__(self, cls, frozen):
            self._cls, self._frozen = cls, frozen

        def make(self, name, placeholder):
            """Put what `name` stands for in its place, and before that the fields."""
            cls = self._cls
            if isinstance(cls.__dict__["__dataclass_fields__"], _Later):
                # Without a docstring it would ask for the signature, and so for __init__.
                cls.__doc__ = cls.__doc__ or cls.__name__
                dataclasses.dataclass(cls, init=False, repr=False, eq=False)
            if cls.__dict__[name] is placeholder:
                setattr(cls, name, getattr(self, name.replace("__", "_make_", 1).rstrip("_"))())

        def _make_init(self):
            fields = dataclasses.fields(self._cls)
            odd = [field for field in fields if not field.init or getattr(field, "kw_only", False)]
            if odd or hasattr(self._cls, "__post_init__"):
                raise TypeError(f"{self._cls.__qualname__} has what tracer.records does not know")
            known = {"set_": object.__setattr__, "none_": object()}
            arguments, lines = [], []
            for field in fields:
                value = name = field.name
                if field.default is not dataclasses.MISSING:
                    known[f"default_{name}"] = field.default
                    name = f"{name}=default_{name}"
                elif field.default_factory is not dataclasses.MISSING:
                    known[f"make_{name}"] = field.default_factory
                    value = f"make_{name}() if {name} is none_ else {name}"
                    name = f"{name}=none_"
                arguments.append(name)
                lines.append(f"set_(self, {field.name!r}, {value})" if self._frozen else f"self.{field.name} = {value}")
            return self._compiled("__init__", arguments, lines or ["pass"], known)

        def _make_eq(self):
            mine, theirs = (
                "".join(f"{which}.{field.name}, " for field in dataclasses.fields(self._cls) if field.compare)
                for which in ("self", "other")
            )
            return self._compiled(
                "__eq__",
                ["other"],
                ["if other.__class__ is not self.__class__: return NotImplemented", f"return ({mine}) == ({theirs})"],
            )

        def _make_hash(self):
            if not self._frozen:
                return None
            fields = dataclasses.fields(self._cls)
            hashed = (field for field in fields if (field.compare if field.hash is None else field.hash))
            members = "".join(f"self.{field.name}, " for field in hashed)
            return self._compiled("__hash__", [], [f"return hash(({members}))"])

        def _make_repr(self):
            members = ", ".join(
                f"{field.name}={{self.{field.name}!r}}" for field in dataclasses.fields(self._cls) if field.repr
            )
            line = f"return f'{{self.__class__.__qualname__}}({members})'"
            return recursive_repr()(self._compiled("__repr__", [], [line]))

        def _compiled(self, name, arguments, lines, known=None):
            made = {}
            exec(f"def {name}({', '.join(['self', *arguments])}):\n " + "\n ".join(lines), known or {}, made)
            made[name].__qualname__ = f"{self._cls.__qualname__}.{name}"
            return made[name]
