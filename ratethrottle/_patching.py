"""Lets tests replace methods of a limiter, which has no instance dict to put them in."""

from __future__ import annotations

import inspect
from typing import Any


class _Replaced:
    """What stands in a limiter's own class in the place of a method: found as it is, not bound."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self.value

    def __call__(self, *args: Any, **options: Any) -> Any:  # as a method can be: see `Patchable`
        return self.value(*args, **options)


class _Patched:
    """The class of a limiter of which a method was replaced."""

    __slots__ = ()

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # what is set on this limiter alone, for a patcher to restore
        return {name: found.value for name, found in vars(type(self)).items() if isinstance(found, _Replaced)}


class Patchable:
    """Gives an object of which a method is replaced a class of its own, which is dropped with the last of them.

    `unittest.mock.patch.object` and its like set a method on the object, and delete it again.
    """

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute, or replace a method of this object alone."""
        patched = isinstance(self, _Patched)
        method = not name.startswith("__") and callable(inspect.getattr_static(type(self), name, None))
        if not method or (hasattr(self, "__dict__") and not patched):
            super().__setattr__(name, value)
            return
        if not patched:
            own = type(type(self).__name__, (_Patched, type(self)), {"__slots__": (), "__module__": type(self).__module__})
            super().__setattr__("__class__", own)
        setattr(type(self), name, _Replaced(value))

    def __delattr__(self, name: str) -> None:
        """Take a replaced method away again."""
        if not isinstance(self, _Patched) or name not in self.__dict__:
            super().__delattr__(name)
            return
        delattr(type(self), name)
        if not self.__dict__:
            super().__setattr__("__class__", type(self).__mro__[2])
