# cython: auto_pickle=False, autotestdict=False
"""Replies that come after their calls were given up. Units that their leases took go back; nothing else of them counts."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t

from ratethrottle.storage._shared.call cimport Answers, answers_in, Call, CheckCall, MarkCall, was_moved
from ratethrottle.storage._shared.known cimport KnownKeys
from ratethrottle.storage._shared.reply cimport BROKEN, INCOMPLETE, REPLY_BYTES_MAX, REPLY_NUMBERS_MAX
from ratethrottle.storage._shared.resp cimport read_line

from collections import deque


cdef LateReplies late_replies_new(KnownKeys known, object in_flight, bytes rest, object returned):
    """None if no call in flight asked for a lease."""
    cdef LateReplies late = LateReplies.__new__(LateReplies)
    cdef bint leases = False
    late.known = known
    late.rest = rest
    late.returned = returned
    late.in_flight = deque()
    for sent in in_flight:
        samples = samples_of(<CheckCall>sent) if isinstance(sent, CheckCall) else None
        leases = leases or samples is not None
        late.in_flight.append((sent, samples))
    return late if leases else None


cdef list samples_of(CheckCall call):
    """The first check of each item that asked for a lease; None if there is no such item."""
    cdef list samples = []
    cdef bint asks = False
    cdef int i
    for i in range(call.size):
        if call.items[i].ahead and call.items[i].waiters.count:
            samples.append(<object>call.items[i].waiters.first)
            asks = True
        else:
            samples.append(None)
    return samples if asks else None


@cython.final
cdef class LateReplies:
    """Hears a connection whose calls were given up."""

    def __init__(self):
        raise TypeError("late replies are heard by a batch's `late_replies`")

    def received(self, bytes data not None):
        """Take what came. False once there is nothing more to hear, or if it can't be a reply to these calls.

        Much like `Batch.read`, and apart from it: there each reply is settled by its kind, and may end the connection. One loop for
        both would have to ask at each reply what to do with it, on the path of every check.
        """
        cdef int64_t[REPLY_NUMBERS_MAX] numbers
        cdef Py_ssize_t at = 0, after
        cdef int count = 0
        cdef Call sent
        data = self.rest + data
        while self.in_flight and at < PyBytes_GET_SIZE(data):
            sent, samples = self.in_flight[0]
            if PyBytes_AS_STRING(data)[at] == c"-" and not isinstance(sent, MarkCall):
                after = read_line(PyBytes_AS_STRING(data), at, PyBytes_GET_SIZE(data))
                after = after + 2 if after >= 0 else after
            else:
                after = sent.read(data, at, numbers, &count)
            if after == BROKEN or after == INCOMPLETE and PyBytes_GET_SIZE(data) - at > REPLY_BYTES_MAX:
                self.in_flight.clear()
                return False
            if after == INCOMPLETE:
                break
            self.in_flight.popleft()
            if PyBytes_AS_STRING(data)[at] != c"-" and samples is not None and not was_moved(numbers, count):
                self.take(<CheckCall>sent, samples, numbers, count)
            at = after
        self.rest = data[at:]
        return bool(self.in_flight)

    cdef int take(self, CheckCall call, list samples, const int64_t* numbers, int count) except -1:
        cdef Answers answer = answers_in(numbers, count)
        while call.next_answer(&answer):
            sample = samples[answer.index - 1]
            if answer.ahead > 0 and sample is not None:
                self.known.put_back(sample, answer.ahead, numbers[0], call.epoch)
        self.returned()
        return 0
