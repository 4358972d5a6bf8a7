"""RESP2, as far as calls of ours need it: requests are written into a buffer, replies are read from one."""

from libc.stdint cimport int64_t
from libc.stdlib cimport realloc
from libc.string cimport memchr, memcpy


cdef struct Buffer:
    char* bytes
    size_t used
    size_t room


cdef enum:
    INCOMPLETE = -1                        # a reply that goes on in what is still to come
    BROKEN = -2                            # not the reply that was expected
    LINE_MAX = 1 << 16


cdef inline bint buffer_room(Buffer* buffer, size_t more) noexcept nogil:
    """Make room for more bytes; False without memory."""
    cdef size_t room = buffer.room
    cdef char* larger
    if buffer.used + more <= room:
        return True
    while room < buffer.used + more:
        room = 2 * room if room else 4096
    larger = <char*>realloc(buffer.bytes, room)
    if larger == NULL:
        return False
    buffer.bytes = larger
    buffer.room = room
    return True


cdef inline void put(Buffer* buffer, const char* data, size_t size) noexcept nogil:
    """Append, if there is room."""
    memcpy(buffer.bytes + buffer.used, data, size)
    buffer.used += size


cdef inline int digits(int64_t number, char* text) noexcept nogil:
    """Write a number that isn't negative; returns how many digits it has."""
    cdef char[20] backwards
    cdef int size = 0, i
    while True:
        backwards[size] = <char>(c"0" + number % 10)
        number //= 10
        size += 1
        if number == 0:
            break
    for i in range(size):
        text[i] = backwards[size - 1 - i]
    return size


cdef inline void put_head(Buffer* buffer, char kind, int64_t number) noexcept nogil:
    buffer.bytes[buffer.used] = kind
    buffer.used += 1
    buffer.used += digits(number, buffer.bytes + buffer.used)
    buffer.bytes[buffer.used] = c"\r"
    buffer.bytes[buffer.used + 1] = c"\n"
    buffer.used += 2


cdef inline void put_bulk(Buffer* buffer, const char* data, size_t size) noexcept nogil:
    put_head(buffer, c"$", size)
    put(buffer, data, size)
    put(buffer, "\r\n", 2)


cdef inline void put_number(Buffer* buffer, int64_t number) noexcept nogil:
    cdef char[20] text
    put_bulk(buffer, text, digits(number, text))


cdef inline Py_ssize_t read_line(const char* data, Py_ssize_t at, Py_ssize_t size) noexcept nogil:
    """Where the line that begins at `at` ends (its \\r\\n not included), INCOMPLETE or BROKEN."""
    cdef const char* end = <const char*>memchr(data + at, c"\n", size - at)
    if end == NULL:
        return BROKEN if size - at > LINE_MAX else INCOMPLETE
    if end == data + at or (end - 1)[0] != c"\r":
        return BROKEN
    return end - data - 1


cdef inline Py_ssize_t read_number(const char* data, Py_ssize_t at, Py_ssize_t size, char kind, int64_t* number) noexcept nogil:
    """Read `:123\\r\\n`, or such a line of another kind; returns where the next one begins, INCOMPLETE or BROKEN."""
    cdef int64_t value = 0
    cdef bint negative = False
    cdef Py_ssize_t first
    if at >= size:
        return INCOMPLETE
    if data[at] != kind:
        return BROKEN
    at += 1
    if at < size and data[at] == c"-":
        negative = True
        at += 1
    first = at
    while at < size and c"0" <= data[at] <= c"9":
        if at - first == 18:
            return BROKEN
        value = value * 10 + (data[at] - c"0")
        at += 1
    if at + 1 >= size:
        return BROKEN if at < size and data[at] != c"\r" else INCOMPLETE
    if at == first or data[at] != c"\r" or data[at + 1] != c"\n":
        return BROKEN
    number[0] = -value if negative else value
    return at + 2
