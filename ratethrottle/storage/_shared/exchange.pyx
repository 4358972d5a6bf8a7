# cython: auto_pickle=False, autotestdict=False
"""What is on its way to the store on one connection. Replies come in the order of the calls."""

cimport cython
from libc.stdint cimport int64_t

from ratethrottle.storage._shared.call cimport Call, CheckCall
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.request cimport Writer
from ratethrottle.storage._shared.waiting cimport NEVER_US, Waiting

from collections import deque


@cython.final
cdef class Exchange:
    """The calls in flight."""

    def __init__(self, StorageContext context not None, Waiting waiting not None):
        self.context = context
        self.waiting = waiting
        self.writer = Writer(context.names)
        self.writer.context = context.repair
        self.writer.ahead_us = &context.repair.ahead_us
        self.in_flight = deque()
        self.rest = b""

    cdef int begin(self, write, dict scripts, bytes run) except -1:
        """There is a connection. scripts: what is loaded there, name -> (SHA-1, text)."""
        self.write = write
        self.writer.connect(scripts, run)
        self.rest = b""
        return 0

    cdef object end(self):
        """The connection is gone. Returns the calls that were in flight, which may have been run."""
        in_flight, self.in_flight = self.in_flight, deque()
        self.write = None
        self.rest = b""
        self.writer.by_value = False
        return in_flight

    cdef int send(self, Call call) except -1:
        """Send a call, and expect its reply. Returns how many items it has."""
        cdef int64_t now_us
        cdef int items
        if not isinstance(call, CheckCall):  # else it was filled just now
            now_us = self.context.bounds.now_us()
            call.sent_us = now_us
            call.deadline_us = now_us + self.context.deadline_us
            self.waiting.arm_timer(now_us, self.waiting.tick_us(now_us))
        items = call.write(self.writer)
        # First: a call that could not be written must not stand in the way of the next one's reply.
        self.write(self.writer.written())
        self.in_flight.append(call)
        if isinstance(call, CheckCall):
            self.sent_calls += 1
            self.sent_items += items
        return items

    cdef int64_t first_deadline_us(self) except -1:
        """When the next call, or a check in it, has waited for too long; NEVER_US if none is in flight."""
        cdef int64_t first_us = NEVER_US
        cdef Call call
        for call in self.in_flight:
            first_us = min(first_us, call.deadline_us)
            if isinstance(call, CheckCall):
                first_us = min(first_us, call.sent_us + self.context.deadline_us)
        return first_us
