# cython: auto_pickle=False, autotestdict=False
"""What stands in a limiter's class in the place of `async def check`. What it calls is in `_core.pyx`."""

cimport cython
from cpython.object cimport PyObject

from types import FunctionType


cdef extern from "Python.h":
    object PyMethod_New(object function, object instance)


@cython.final
cdef class CheckMethod:
    """`check` of a limiter's class. A call runs compiled code; every other attribute is that of the `async def` it stands for.

    So `inspect.iscoroutinefunction`, `inspect.signature`, `isinstance` and `unittest.mock` see a coroutine function.
    """

    def __set_name__(self, owner, name):
        self.owner = <PyObject*>owner

    def __get__(self, instance, owner):
        return self if instance is None else PyMethod_New(self, instance)

    def __getattr__(self, name):
        return getattr(self.template, name)

    @property
    def __doc__(self):
        return self.template.__doc__

    @property
    def __module__(self):
        return self.template.__module__

    @property
    def __class__(self):
        return FunctionType                  # `unittest.mock` checks the arguments of functions only

    def __repr__(self):
        return f"<compiled method {self.template.__qualname__}>"
