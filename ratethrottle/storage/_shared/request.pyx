# cython: auto_pickle=False, autotestdict=False
"""Writes requests into one buffer that is used again. What a call says is its own affair: see `call.pyx`."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdlib cimport free

from ratethrottle.storage._shared.keynames cimport KeyNames
from ratethrottle.storage._shared.resp cimport put, put_bulk, put_head

from os import urandom


@cython.final
cdef class Writer:
    """Writes one request at a time, for one connection."""

    def __cinit__(self, KeyNames names not None):
        self.names = names
        self.session = urandom(6).hex().encode() + b"-"

    def __dealloc__(self):
        free(self.buffer.bytes)

    cdef bytes next_id(self):
        """An id that no other request has, of this or of any other process."""
        cdef bytes request = self.session + b"%d" % self.requests
        self.requests += 1
        return request

    cdef int connect(self, dict scripts, bytes run) except -1:
        """There is a connection to that run of a server, which has these scripts loaded."""
        self.scripts = scripts
        self.decide_name, self.decide_text = scripts["decide"]
        self.run = run
        return 0

    cdef int begin(self, str script, Py_ssize_t words) except -1:
        """Begin to call a script, with so many words after it."""
        name, text = self.scripts[script]
        return self.put_script(name, text, words)

    cdef int begin_decide(self, Py_ssize_t words) except -1:
        return self.put_script(self.decide_name, self.decide_text, words)

    cdef int put_script(self, bytes name, bytes text, Py_ssize_t words) except -1:
        """Call it by name, or once with its text if the server has lost it."""
        cdef bytes what = text if self.by_value else name
        self.buffer.used = 0
        self.room(4096 + PyBytes_GET_SIZE(what))
        put_head(&self.buffer, c"*", 2 + words)
        if self.by_value:
            put_bulk(&self.buffer, "EVAL", 4)
        else:
            put_bulk(&self.buffer, "EVALSHA", 7)
        put_bulk(&self.buffer, PyBytes_AS_STRING(what), PyBytes_GET_SIZE(what))
        # What is run by value is kept by the server too.
        self.by_value = False
        return 0

    cdef int put_word(self, bytes word) except -1:
        self.room(PyBytes_GET_SIZE(word) + 32)
        put_bulk(&self.buffer, PyBytes_AS_STRING(word), PyBytes_GET_SIZE(word))
        return 0

    cdef int put_words(self, list words) except -1:
        cdef bytes word
        for word in words:
            self.put_word(word)
        return 0

    cdef int put_packed(self, bytes packed) except -1:
        """Append words that are written already."""
        if packed is not None:
            self.room(PyBytes_GET_SIZE(packed))
            put(&self.buffer, PyBytes_AS_STRING(packed), PyBytes_GET_SIZE(packed))
        return 0

    cdef bytes written(self):
        """What was written since `begin`."""
        return PyBytes_FromStringAndSize(self.buffer.bytes, self.buffer.used)
