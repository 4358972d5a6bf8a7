# cython: auto_pickle=False, autotestdict=False
"""Reads replies: from bytes to numbers, or that they are INCOMPLETE or BROKEN. Pure: no object is kept and nothing is decided here.

A proxy, a bug or another client's reply may stand where ours is expected. What can't be the reply to this very request is BROKEN.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t
from libc.string cimport memcmp, memset

from ratethrottle._engine.arithmetic cimport LEVEL_MAX
from ratethrottle.storage._shared.request cimport EPOCH_BYTES
from ratethrottle.storage._shared.resp cimport BROKEN, INCOMPLETE, read_line, read_number


cdef enum:
    SHA_BYTES = 40
    COUNT_DIGITS = 66                        # of what is counted of processes: beat.lua has them
    LEARNING_MAX_US = 10_000_000

cdef Py_ssize_t read_bulk(const char* text, Py_ssize_t at, Py_ssize_t size, int64_t most, Py_ssize_t* begins, int64_t* length) noexcept:
    """Read a bulk string of at most so many bytes, or none (length −1); returns where the next reply begins, INCOMPLETE or BROKEN."""
    at = read_number(text, at, size, c"$", length)
    if at < 0 or length[0] == -1:
        return at
    if not 0 <= length[0] <= most:
        return BROKEN
    begins[0] = at
    if at + length[0] + 2 > size:
        return INCOMPLETE
    at += length[0]
    return at + 2 if text[at] == c"\r" and text[at + 1] == c"\n" else BROKEN


cdef Py_ssize_t read_numbers(const char* text, Py_ssize_t at, Py_ssize_t size, bytes request, int64_t* numbers, int* count) noexcept:
    """Read the reply of a script: the id of the request, then numbers, for at most REPLY_NUMBERS_MAX of which there is room."""
    cdef int64_t number
    cdef Py_ssize_t begins
    cdef int i
    count[0] = 0
    at = read_number(text, at, size, c"*", &number)
    if at < 0:
        return at
    if not 1 <= number <= REPLY_NUMBERS_MAX + 1:
        return BROKEN
    count[0] = <int>(number - 1)
    at = read_bulk(text, at, size, PyBytes_GET_SIZE(request), &begins, &number)
    if at < 0:
        return at
    if number != PyBytes_GET_SIZE(request) or memcmp(text + begins, PyBytes_AS_STRING(request), number):
        return BROKEN
    for i in range(count[0]):
        at = read_number(text, at, size, c":", &numbers[i])
        if at < 0:
            return at
    return at


cdef Py_ssize_t read_loaded(const char* text, Py_ssize_t at, Py_ssize_t size) noexcept:
    """Read the reply to SCRIPT LOAD."""
    cdef int64_t length
    cdef Py_ssize_t begins
    at = read_bulk(text, at, size, SHA_BYTES, &begins, &length)
    return BROKEN if at >= 0 and length != SHA_BYTES else at


cdef int64_t digits_at(const char* text, int size) noexcept:
    cdef int64_t value = 0
    cdef int i
    for i in range(size):
        value = value * 10 + (text[i] - c"0")
    return value


cdef bint are_digits(const char* text, int size) noexcept:
    cdef int i
    for i in range(size):
        if not c"0" <= text[i] <= c"9":
            return False
    return True


cdef Py_ssize_t read_mark(const char* text, Py_ssize_t at, Py_ssize_t size, int integers, bytes epoch_text, int64_t* numbers) noexcept:
    """Read the replies to a mark: so many integers, then the epoch's key and the count of processes.

    numbers: whether all is as it was; the rank (−1 if it wasn't asked for); and of the count: when its period began, how many
    processes there are, when that set has changed last, and since when they have been counted without a gap.
    What isn't as it was, an error included, is for a script to find out.
    """
    cdef bint same = True
    cdef Py_ssize_t end, begins = 0
    cdef int64_t number
    cdef int i, k
    memset(numbers, 0, MARK_NUMBERS * sizeof(int64_t))
    numbers[1] = -1
    for i in range(integers + 1):
        if at >= size:
            return INCOMPLETE
        if text[at] == c"-":
            end = read_line(text, at, size)
            if end < 0:
                return end
            same = False
            at = end + 2
            continue
        if i < integers:
            at = read_number(text, at, size, c":", &number)
            if at < 0:
                return at
            if i == 1:
                numbers[1] = number
            continue
        at = read_number(text, at, size, c"*", &number)
        if at < 0 or number != 2:
            return at if at < 0 else BROKEN
        for k in range(2):
            at = read_bulk(text, at, size, REPLY_BYTES_MAX - 1, &begins, &number)
            if at < 0:
                return at
            if number == -1:
                same = False
            elif k == 0:
                same = same and number >= EPOCH_BYTES and memcmp(text + begins, PyBytes_AS_STRING(epoch_text), EPOCH_BYTES) == 0
            elif number != COUNT_DIGITS:
                same = False
            else:
                same = same and are_digits(text + begins, COUNT_DIGITS)
                numbers[2] = digits_at(text + begins, 16)
                numbers[3] = digits_at(text + begins + 16, 8)
                numbers[4] = digits_at(text + begins + 24, 16)
                numbers[5] = digits_at(text + begins + 50, 16)
    numbers[0] = same and 1 <= numbers[3] <= PROCESSES_MAX and numbers[1] < numbers[3]
    return at


cdef bint possible_beat(const int64_t* numbers, int count) noexcept:
    """Whether this may be the reply to a beat: now, epoch, when learning began, what is left of it, processes, rank, evictions,
    whether to forget, what the store still holds, slot, for how long processes have been counted without a gap.

    Whatever else says so must not spoil what is known here for as long as this process lives.
    """
    return (count == 11
            and 0 <= numbers[0] <= LEVEL_MAX
            and 1 <= numbers[1] <= numbers[0] + YEAR_US
            and 0 <= numbers[2] <= numbers[0] + YEAR_US
            and 0 <= numbers[3] <= LEARNING_MAX_US
            and 0 <= numbers[4] <= PROCESSES_MAX
            and (0 <= numbers[5] < numbers[4] or numbers[4] == numbers[5] == 0)
            and -1 <= numbers[6] <= LEVEL_MAX
            and 0 <= numbers[7] <= 1
            and 0 <= numbers[8] <= LEVEL_MAX
            and -1 <= numbers[9] < PROCESSES_MAX
            and 0 <= numbers[10] <= LEVEL_MAX)


def parse(str kind not None, bytes data not None, bytes request not None=b"", int integers=0):
    """Read one reply, for tests: (its numbers, how many bytes it has), "incomplete" or "broken".

    kind: `script` (request: its id), `load` or `mark` (request: the epoch's text; integers: how many its replies begin with).
    """
    cdef int64_t[REPLY_NUMBERS_MAX] numbers
    cdef const char* text = PyBytes_AS_STRING(data)
    cdef Py_ssize_t at = BROKEN
    cdef int count = 0
    if kind == "script":
        at = read_numbers(text, 0, len(data), request, numbers, &count)
    elif kind == "load":
        at = read_loaded(text, 0, len(data))
    elif kind == "mark" and len(request) >= EPOCH_BYTES:
        at = read_mark(text, 0, len(data), integers, request, numbers)
        count = MARK_NUMBERS
    if at < 0:
        return "incomplete" if at == INCOMPLETE else "broken"
    return [numbers[i] for i in range(count)], at
