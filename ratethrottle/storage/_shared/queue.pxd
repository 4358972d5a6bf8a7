"""An intrusive queue of pending decisions: each is in at most one queue, which holds a reference to it."""

from cpython.object cimport PyObject

from ratethrottle._core cimport PendingDecision


cdef extern from "Python.h":
    void Py_INCREF(PyObject*)
    void Py_DECREF(PyObject*)


cdef struct Queue:
    PyObject* first
    PyObject* last
    Py_ssize_t count


cdef inline void push(Queue* queue, PendingDecision pending) noexcept:
    Py_INCREF(<PyObject*>pending)
    pending.before = queue.last
    pending.after = NULL
    if queue.last == NULL:
        queue.first = <PyObject*>pending
    else:
        (<PendingDecision>queue.last).after = <PyObject*>pending
    queue.last = <PyObject*>pending
    queue.count += 1


cdef inline void take(Queue* queue, PendingDecision pending) noexcept:
    """Take a member out, wherever it stands. The caller holds a reference of its own."""
    if pending.before == NULL:
        queue.first = pending.after
    else:
        (<PendingDecision>pending.before).after = pending.after
    if pending.after == NULL:
        queue.last = pending.before
    else:
        (<PendingDecision>pending.after).before = pending.before
    pending.before = pending.after = NULL
    queue.count -= 1
    Py_DECREF(<PyObject*>pending)


cdef inline void take_over(Queue* source, Queue* target, PendingDecision pending) noexcept:
    Py_INCREF(<PyObject*>pending)
    take(source, pending)
    push(target, pending)
    Py_DECREF(<PyObject*>pending)


cdef inline void insert(Queue* queue, PyObject* before, PendingDecision pending) noexcept:
    """Put in front of a member, or last for NULL."""
    if before == NULL:
        push(queue, pending)
        return
    Py_INCREF(<PyObject*>pending)
    pending.after = before
    pending.before = (<PendingDecision>before).before
    if pending.before == NULL:
        queue.first = <PyObject*>pending
    else:
        (<PendingDecision>pending.before).after = <PyObject*>pending
    (<PendingDecision>before).before = <PyObject*>pending
    queue.count += 1


cdef inline void merge(Queue* source, Queue* target) noexcept:
    """Move all members over, each to its place by the order in which they entered."""
    cdef PendingDecision pending
    cdef PyObject* at = target.first
    while source.first != NULL:
        pending = <PendingDecision>source.first
        take(source, pending)
        while at != NULL and (<PendingDecision>at).turn < pending.turn:
            at = (<PendingDecision>at).after
        insert(target, at, pending)


cdef inline void drain(Queue* queue) noexcept:
    """Release all members."""
    while queue.first != NULL:
        take(queue, <PendingDecision>queue.first)
