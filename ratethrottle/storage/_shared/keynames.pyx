# cython: auto_pickle=False, autotestdict=False
"""What keys are called in Redis."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free
from libc.string cimport memchr, memcpy, memset

from ratethrottle._core cimport CHECK, JOINT, MADE, Mode, Parts, PendingDecision, WHOLE
from ratethrottle._engine.decision cimport Entry
from ratethrottle._engine.definitions cimport CompiledRule
from ratethrottle._engine.pieces cimport piece_new
from ratethrottle.storage._shared.resp cimport Buffer, buffer_room, put, put_bulk, put_head

from hashlib import blake2b


cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object, Py_ssize_t*) except NULL


cdef enum:
    KEY_BYTES_MAX = 128                      # longer keys are digested
    SLOTS = 16384                            # of a Redis Cluster
    TAG_BYTES = 5                            # of a tag's name, its length in front

cdef uint32_t[256] CRC_TABLE
cdef dict NAMES = {}                        # how many tags -> their names


cdef void fill_crc_table() noexcept:
    """CRC-32 of ISO 3309, reflected: what zlib.crc32 computes."""
    cdef uint32_t i, value
    cdef int _bit
    for i in range(256):
        value = i
        for _bit in range(8):
            value = (value >> 1) ^ 0xEDB88320U if value & 1 else value >> 1
        CRC_TABLE[i] = value

fill_crc_table()


cdef inline uint32_t crc32(const char* data, Py_ssize_t size) noexcept nogil:
    cdef uint32_t value = 0xFFFFFFFFU
    cdef Py_ssize_t i
    for i in range(size):
        value = CRC_TABLE[(value ^ <unsigned char>data[i]) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFFU


cdef uint32_t slot_of(const char* tag, int size) noexcept nogil:
    """The slot of a Redis Cluster that a hash tag belongs to: CRC-16/XMODEM, modulo 16,384."""
    cdef uint32_t value = 0
    cdef int i, _bit
    for i in range(size):
        value ^= <uint32_t><unsigned char>tag[i] << 8
        for _bit in range(8):
            value = ((value << 1) ^ 0x1021 if value & 0x8000 else value << 1) & 0xFFFF
    return value & 16383


cdef bytes chosen_tags(uint32_t tags):
    """Choose the names of the tags, of TAG_BYTES each: how long it is, and then the text.

    The slots of a cluster are cut into as many ranges of equal length, and each tag lies in the middle half of its own: however the slots
    are spread over nodes, each node has its part of the tags. Names are the shortest of digits and lower-case letters; of those, the
    one that is nearest to the middle, and of equals the first.
    """
    cdef bytearray names = bytearray(TAG_BYTES * tags)
    cdef list nearest
    cdef char[TAG_BYTES] tag
    cdef uint32_t slot, at, left = tags
    cdef int size, i
    cdef int64_t number, rest, distance, count = 1
    for size in range(1, TAG_BYTES):
        nearest = [SLOTS] * tags
        count *= 36
        for number in range(count):
            rest = number
            for i in range(size - 1, -1, -1):
                tag[i] = b"0123456789abcdefghijklmnopqrstuvwxyz"[rest % 36]
                rest //= 36
            slot = slot_of(tag, size)
            at = slot * tags // SLOTS
            # In parts of a range, of which it has SLOTS; a slot has `tags` of them.
            distance = abs(<int64_t>slot * tags - <int64_t>at * SLOTS - SLOTS // 2)
            if distance * 4 > max(<int64_t>SLOTS, 2 * <int64_t>tags) or distance >= <int64_t>nearest[at]:
                continue
            if names[TAG_BYTES * at] not in (0, size):
                continue                     # it has a shorter one
            left -= names[TAG_BYTES * at] == 0
            nearest[at] = distance
            names[TAG_BYTES * at] = size
            names[TAG_BYTES * at + 1:TAG_BYTES * at + 1 + size] = tag[:size]
        if left == 0:
            return bytes(names)
    raise ValueError(f"{tags} tags are more than there are names for")


cdef Py_ssize_t parts_end(const char* data, Py_ssize_t size, int parts) noexcept nogil:
    """Where the first so many parts of a joined tuple end, or all of it."""
    cdef Py_ssize_t at = 0, length
    cdef int _part
    for _part in range(parts):
        if at >= size:
            break
        length = 0
        if data[at] == c"s":                 # s<length>:<text>
            at += 1
            while data[at] != c":":
                length = 10 * length + data[at] - c"0"
                at += 1
            at += 1 + length
        else:                                # i<number>, and a space
            while data[at] != c" ":
                at += 1
            at += 1
    return at


@cython.final
cdef class KeyNames:
    """What keys are called in Redis: `prefix:{tag}:rule:=key`.

    The tag is of the key alone, so that all rules of a key share a slot of a cluster; with `tag_parts`, of so many first parts of a
    tuple. The key comes last and is marked `=` (as it is), `(` (a tuple, joined) or `#` (a digest of a long one), so that no two keys
    collide.
    """

    def __init__(self, bytes prefix not None, uint32_t tags, int tag_parts=0):
        self.opening = prefix + b":{"
        self.tags = tags
        self.tag_parts = tag_parts
        self.tag_names = NAMES.get(tags) or NAMES.setdefault(tags, chosen_tags(tags))
        self.epoch_key = prefix + b":epoch"
        self.processes_key = prefix + b":processes"
        self.charged_key = prefix + b":charged:"
        self.holders_key = prefix + b":slots"
        self.layout_key = prefix + b":layout"
        self.layout = b"tags=%d,parts=%d" % (tags, tag_parts)

    cdef int address(self, PendingDecision pending) except -1:
        """Find the key's tag; digest a long key. Of a joint check, whose size is −1, do so for each part."""
        cdef Py_ssize_t size = pending.size
        if self.tag_parts and pending.mark == c"(":
            size = parts_end(pending.data, size, self.tag_parts)
        pending.tag = crc32(pending.data, size) % self.tags
        if <size_t>pending.size > KEY_BYTES_MAX:
            if pending.mark == JOINT:
                return self.address_parts(<Parts>pending.text)
            whole = (b"=" if pending.mark == c"=" else b"(") + pending.data[:pending.size]
            pending.text = blake2b(whole, digest_size=16).hexdigest().encode()
            pending.data = PyBytes_AS_STRING(pending.text)
            pending.size = PyBytes_GET_SIZE(pending.text)
            pending.mark = c"#"
        return 0

    cdef int address_parts(self, Parts parts) except -1:
        cdef PendingDecision member
        for member in parts.members:
            self.address(member)
        return 0

    cdef int put_key(self, Buffer* buffer, PendingDecision pending) except -1:
        cdef Py_ssize_t name_size
        cdef const char* name = PyUnicode_AsUTF8AndSize(pending.rule.name, &name_size)
        cdef const char* tag = PyBytes_AS_STRING(self.tag_names) + TAG_BYTES * pending.tag
        cdef int tag_size = tag[0]
        cdef size_t size = PyBytes_GET_SIZE(self.opening) + tag_size + 2 + name_size + 2 + pending.size
        if pending.mark == WHOLE:
            if not buffer_room(buffer, pending.size + 32):
                raise MemoryError
            put_bulk(buffer, pending.data, pending.size)
            return 0
        if not buffer_room(buffer, size + 32):
            raise MemoryError
        put_head(buffer, c"$", size)
        put(buffer, PyBytes_AS_STRING(self.opening), PyBytes_GET_SIZE(self.opening))
        put(buffer, tag + 1, tag_size)
        put(buffer, "}:", 2)
        put(buffer, name, name_size)
        put(buffer, ":", 1)
        put(buffer, &pending.mark, 1)
        put(buffer, pending.data, pending.size)
        put(buffer, "\r\n", 2)
        return 0

    cdef bytes name(self, PendingDecision pending):
        """What the state of an addressed check is called."""
        cdef Buffer buffer
        memset(&buffer, 0, sizeof(Buffer))
        try:
            self.put_key(&buffer, pending)
            return (<bytes>buffer.bytes[:buffer.used]).partition(b"\r\n")[2].removesuffix(b"\r\n")
        finally:
            free(buffer.bytes)

    cdef char* name_new(self, PendingDecision pending, size_t* size) except NULL:
        """The name of an addressed check's state. Its bound owns it, to assert it by name after a loss."""
        cdef Buffer buffer
        cdef const char* name
        cdef char* kept = NULL
        memset(&buffer, 0, sizeof(Buffer))
        try:
            self.put_key(&buffer, pending)
            name = <const char*>memchr(buffer.bytes, c"\n", buffer.used) + 1
            size[0] = buffer.bytes + buffer.used - name - 2
            kept = <char*>piece_new(size[0])
            if kept == NULL:
                raise MemoryError
            memcpy(kept, name, size[0])
            return kept
        finally:
            free(buffer.bytes)

    cdef str rule_of(self, bytes name):
        """The rule of a state, by its name."""
        return name[len(self.opening):].partition(b"}:")[2].partition(b":")[0].decode()

    def slots_key(self, Entry entry not None):
        """The name of what is held of a request's key."""
        cdef bytes name = self.state_key(entry)
        cdef Py_ssize_t at = name.index(b":", name.index(b"}:") + 2)
        return name[:at] + b"@slots" + name[at:]

    def state_key(self, Entry entry not None):
        """The name of a request's state."""
        cdef PendingDecision pending = pending_of(entry, CHECK)
        self.address(pending)
        return self.name(pending)


cdef PendingDecision pending_of(Entry entry, Mode mode):
    cdef PendingDecision pending = PendingDecision.__new__(PendingDecision)
    pending.stage = MADE
    pending.mode = mode
    pending.rule = entry.rule
    pending.key = entry.key
    pending.units = entry.cost
    pending.text = entry.canonical
    pending.mark = PyBytes_AS_STRING(entry.canonical)[0]
    pending.data = PyBytes_AS_STRING(entry.canonical) + 1
    pending.size = PyBytes_GET_SIZE(entry.canonical) - 1
    return pending


cdef PendingDecision pending_for(CompiledRule rule, object text, char mark, uint32_t tag, Mode mode):
    """Ask about a key, with what an addressed check has of it, or by its name, marked WHOLE. Nobody waits for the answer."""
    cdef PendingDecision pending = PendingDecision.__new__(PendingDecision)
    pending.stage = MADE
    pending.mode = mode
    pending.rule = rule
    pending.units = 1
    pending.text = text
    pending.mark = mark
    pending.tag = tag
    if mark == WHOLE:
        pending.data = PyBytes_AS_STRING(text)
        pending.size = PyBytes_GET_SIZE(text)
    elif isinstance(text, bytes):
        pending.data = PyBytes_AS_STRING(text) + (mark != c"#")  # which stands before it, but not before a digest
        pending.size = PyBytes_GET_SIZE(text) - (mark != c"#")
    else:
        pending.data = PyUnicode_AsUTF8AndSize(text, &pending.size)
    return pending
