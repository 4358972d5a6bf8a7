"""Writes requests: see `request.pyx`."""

from libc.stdint cimport int64_t, uint64_t

from ratethrottle.storage._shared.keynames cimport KeyNames
from ratethrottle.storage._shared.resp cimport Buffer, buffer_room, put_number


cdef enum:
    EPOCH_BYTES = 72                         # of what an epoch is called: the run id, when it began, and when learning did


cdef class Writer:
    cdef KeyNames names
    cdef Buffer buffer
    cdef readonly bytes session              # begins the id of each request
    cdef uint64_t requests                   # how many there were
    cdef dict scripts                        # name -> (SHA-1, text)
    cdef bytes decide_name                   # those of `decide`, which is called all the time
    cdef bytes decide_text
    cdef bint by_value                       # the server has lost its scripts: the next call brings its own
    cdef bytes run                           # the server's run id
    cdef bytes epoch_text                    # what calls expect the epoch to be called
    cdef object context                      # has the next
    cdef const int64_t* ahead_us             # how far the store's clock is ahead of this process's

    cdef bytes next_id(self)
    cdef int connect(self, dict scripts, bytes run) except -1
    cdef int begin(self, str script, Py_ssize_t words) except -1
    cdef int begin_decide(self, Py_ssize_t words) except -1
    cdef int put_script(self, bytes name, bytes text, Py_ssize_t words) except -1
    cdef int put_word(self, bytes word) except -1
    cdef int put_words(self, list words) except -1
    cdef int put_packed(self, bytes packed) except -1
    cdef bytes written(self)

    cdef inline int room(self, size_t more) except -1:
        if not buffer_room(&self.buffer, more):
            raise MemoryError
        return 0

    cdef inline void put_int(self, int64_t number) noexcept:
        """Where there is room for it: 32 bytes."""
        put_number(&self.buffer, number)
