"""A method that is compiled, and looks like the `async def` that it stands for: see `_method.pyx`."""

cimport cython
from cpython.object cimport PyObject


ctypedef PyObject* (*Vectorcall)(PyObject*, PyObject**, size_t, PyObject*) noexcept
ctypedef PyObject* (*ParsedCall)(PyObject**, size_t, PyObject*) noexcept
ctypedef PyObject* (*KeyCall)(PyObject*, PyObject*) noexcept
ctypedef PyObject* (*RuleCall)(PyObject*, PyObject*, PyObject*, PyObject*) noexcept


@cython.final
cdef class CheckMethod:
    cdef Vectorcall vectorcall
    cdef PyObject* owner                     # the class, which outlives its attributes
    cdef object template
