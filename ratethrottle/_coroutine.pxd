"""CPython's side of an awaitable and a method that are compiled: what Cython doesn't offer. Only `_core.pyx` may cimport this.

Its C code keeps one exception object, and a module that cimports it would get one of its own.
"""

from cpython.object cimport PyObject, PyTypeObject


cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    size_t PY_VECTORCALL_ARGUMENTS_OFFSET
    PyObject* PyDict_GetItemWithError(object dict, object key) except? NULL
    void PyErr_Clear()
    bint PyUnicode_Check(object)
    bint PyUnicode_CheckExact(object)
    PyTypeObject* Py_TYPE(PyObject*)
    void PyObject_GC_UnTrack(PyObject*)
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1
    object PyObject_Vectorcall(PyObject*, PyObject**, size_t, PyObject*)
    void Py_INCREF(object)
    void Py_DECREF(PyObject*)
    void Py_XDECREF(PyObject*)


cdef extern from *:
    """
    /* A result reaches `await` as the value of a StopIteration. Since 3.12 the interpreter no longer uses am_send for that. So one
       exception object is kept, and used again while nobody else holds it: making one costs more than the decision. */
    #if PY_VERSION_HEX >= 0x030C0000
    static PyObject *rt_kept_stop = NULL;
    #endif

    /* Takes over the reference to `value`. */
    static void rt_set_stop(PyObject *value) {
    #if PY_VERSION_HEX >= 0x030C0000
        PyStopIterationObject *stop = (PyStopIterationObject *)rt_kept_stop;
        if (stop != NULL && Py_REFCNT(stop) == 1 && stop->traceback == NULL && stop->context == NULL
                && stop->cause == NULL && stop->notes == NULL) {
            Py_XSETREF(stop->value, value);
            PyErr_SetRaisedException(Py_NewRef((PyObject *)stop));
            return;
        }
        PyObject *fresh = PyObject_CallOneArg(PyExc_StopIteration, value);
        Py_DECREF(value);
        if (fresh == NULL) return;
        /* Its args would go on naming this value when `value` has become another one. */
        Py_XSETREF(((PyBaseExceptionObject *)fresh)->args, PyTuple_New(0));
        Py_XSETREF(rt_kept_stop, Py_NewRef(fresh));
        PyErr_SetRaisedException(fresh);
    #else
        PyObject *stop = PyObject_CallOneArg(PyExc_StopIteration, value);
        Py_DECREF(value);
        if (stop == NULL) return;
        PyErr_SetObject(PyExc_StopIteration, stop);
        Py_DECREF(stop);
    #endif
    }

    /* Most keys are ASCII, and their text is its own UTF-8. NULL, with an error set, for a lone surrogate. */
    static inline const char *rt_utf8(PyObject *text, Py_ssize_t *size) {
        if (PyUnicode_IS_COMPACT_ASCII(text)) {
            *size = PyUnicode_GET_LENGTH(text);
            return (const char *)PyUnicode_DATA(text);
        }
        return PyUnicode_AsUTF8AndSize(text, size);
    }

    /* The kept exception holds its last value until it carries the next one, or until this drops it. */
    static inline void rt_drop_stop_value(void) {
    #if PY_VERSION_HEX >= 0x030C0000
        PyStopIterationObject *stop = (PyStopIterationObject *)rt_kept_stop;
        if (stop != NULL && stop->value != NULL && Py_REFCNT(stop) == 1) Py_CLEAR(stop->value);
    #endif
    }

    /* Tells Cython that an exception is already set: its bare `raise` raises only one that is being handled. */
    static inline void rt_raise_set(void) {}

    /* Cython fills neither am_send nor a tp_iternext that may return NULL without a traceback entry. */
    static destructor rt_free_pending;
    static void rt_set_slots(PyTypeObject *type, sendfunc send, iternextfunc next, destructor dealloc) {
        type->tp_as_async->am_send = send;
        type->tp_iternext = next;
        rt_free_pending = type->tp_dealloc;
        type->tp_dealloc = dealloc;
    }

    /* For an object that has lost its last reference. Returns whether somebody keeps it after all, such as a hook for warnings. */
    static int rt_warn_unawaited(PyObject *dying) {
        PyObject *kind, *value, *traceback;
        Py_SET_REFCNT(dying, 1);
        PyErr_Fetch(&kind, &value, &traceback);
        if (PyErr_WarnEx(PyExc_RuntimeWarning, "coroutine 'RateThrottleCore.check' was never awaited", 1) < 0)
            PyErr_WriteUnraisable(dying);
        PyErr_Restore(kind, value, traceback);
        Py_SET_REFCNT(dying, Py_REFCNT(dying) - 1);
        return Py_REFCNT(dying) > 0;
    }

    /* The interpreter calls a method of this type as `limiter.check(...)` without making a bound method. */
    static void rt_set_method(PyTypeObject *type, Py_ssize_t vectorcall_offset) {
        type->tp_vectorcall_offset = vectorcall_offset;
        type->tp_call = PyVectorcall_Call;
        type->tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR;
        PyType_Modified(type);
    }

    """
    void rt_set_stop(PyObject* value) noexcept
    void rt_drop_stop_value() noexcept
    const char* rt_utf8(object text, Py_ssize_t* size) noexcept
    void rt_raise_set() except *
    Py_ssize_t Py_REFCNT(PyObject*)
    void rt_set_slots(PyTypeObject* type, PySendResult (*send)(PyObject*, PyObject*, PyObject**) noexcept,
                      PyObject* (*next)(PyObject*) noexcept, void (*dealloc)(PyObject*) noexcept)
    void rt_free_pending(PyObject*) noexcept
    bint rt_warn_unawaited(PyObject*) noexcept
    void rt_set_method(PyTypeObject* type, Py_ssize_t vectorcall_offset)
