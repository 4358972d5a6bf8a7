# cython: auto_pickle=False, autotestdict=False
"""What a table counts although nobody asked for it, and what it takes back: charges and refunds, in memory.

`docs/arithmetic.md` specifies both under «Corrections».
"""

from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport calloc, free, malloc

from ratethrottle._engine.arithmetic cimport (
    CHARGED, correct_views, dated_start, Outcome, report, same_definition, SLIDING, Terms, View, view_ahead, view_debt, view_free,
)
from ratethrottle._engine.turns cimport book_views, Booking
from ratethrottle._engine.dated cimport dated_bring, dated_write
from ratethrottle._engine.decision cimport Entry, MEMORY
from ratethrottle._engine.joint cimport CHARGES, Joint, joint_count, joint_decision, joint_new, part_uncounted, PARTS_MAX
from ratethrottle._engine.keys cimport KeyTable, Removal, Removals, REMOVALS_MAX
from ratethrottle._engine.pieces cimport piece_free
from ratethrottle._engine.table cimport Cell, cell_at, cell_views, Hash128, Pair, Place, Shard, shard_find, shard_place
from ratethrottle._engine.window cimport KEEP, NO_MEMORY, Window, window_clone, WRITE


def expect_refunds(KeyTable table not None):
    """Have the table remember which keys it forgets from now on: what was granted before a reset must not come back after it."""
    if table.removals == NULL:
        table.removals = <Removals*>calloc(1, sizeof(Removals))
        if table.removals == NULL:
            raise MemoryError


cdef bint forgotten(KeyTable table, Hash128 hashed, int64_t granted_us) noexcept:
    """Whether the key has been forgotten since, or may have been."""
    cdef const Removal* removal
    cdef int64_t i
    if table.removals == NULL or granted_us <= table.removals.forgotten_us:
        return table.removals != NULL
    for i in range(min(table.removals.count, <int64_t>REMOVALS_MAX)):
        removal = &table.removals.ring[i]
        if removal.at_us >= granted_us and removal.hashed.lo == hashed.lo and removal.hashed.hi == hashed.hi:
            return True
    return False


cdef int correct_place(KeyTable table, const Place* place, int64_t now_us, int64_t units, int64_t granted_us, const Booking* booking,
                       Outcome* out) except -1:
    """Give back units that were granted then, or charge them (CHARGED). Says what is left of the key. Runs no Python code.

    booking: what is charged is booked, what comes back was; else NULL.
    """
    cdef const Terms* terms = place.terms if place.terms.kept == NULL else place.terms.kept
    cdef View[2] views
    cdef View dropped
    cdef Window* windows[2]                  # stored, and views have copies of them
    cdef Window* copies[2]
    cdef Shard* shard = place.shard
    cdef int64_t found = shard_find(shard, place.hashed)
    cdef Cell* cell
    cdef Pair* pair
    cdef int count, status, i
    cdef bint changed, charges = granted_us == CHARGED
    if found < 0:
        return correct_new(table, place, terms, now_us, units, granted_us, booking, out)
    if not charges and forgotten(table, place.hashed, granted_us):
        units = 0
    cell = cell_at(shard, <uint32_t>found)
    count = cell_views(cell, views)
    pair = <Pair*>cell.view.amount.pair if cell.view.terms == NULL else <Pair*>malloc(sizeof(Pair))
    if pair == NULL or copy_ahead(views, 0 if charges else count, now_us, windows, copies) == NO_MEMORY:
        if cell.view.terms != NULL:
            free(pair)
        raise MemoryError
    if not charges and terms.calendar != NULL and not same_definition(views.terms, terms) and (
            count == 1 or not same_definition(views[1].terms, terms)):
        units = 0                            # a view that is made only now doesn't hold what was granted
    changed = dated_bring(views, &count, &dropped, terms, now_us)
    if booking != NULL:
        status = book_views(views, &count, terms, now_us, units, booking, out)
    else:
        status = correct_views(views, &count, terms, now_us, units, granted_us, out)
    for i in range(2):
        piece_free(windows[i] if status == WRITE else copies[i])
    if changed and charges and status == KEEP:
        status = dated_write(views, &count, terms, now_us)
    if status == WRITE and dropped.terms != NULL:
        view_free(&dropped)
    if status == WRITE:
        table.write_back(shard, <uint32_t>found, terms, views, count, pair, now_us)
    elif cell.view.terms != NULL:
        free(pair)
    if status == NO_MEMORY:
        raise MemoryError
    return 0


cdef int copy_ahead(View* views, int count, int64_t now_us, Window** windows, Window** copies) noexcept:
    """Copy the windows that are ahead: if nothing comes back, nothing is written, not even where the clock was set back to.

    Returns NO_MEMORY or KEEP.
    """
    cdef int i
    windows[0] = windows[1] = copies[0] = copies[1] = NULL
    for i in range(count):
        if views[i].terms.kind == SLIDING and view_ahead(&views[i], now_us):
            windows[i] = views[i].amount.window
            copies[i] = views[i].amount.window = window_clone(windows[i])
            if copies[i] == NULL:
                piece_free(copies[0])
                return NO_MEMORY
    return KEEP


cdef int correct_new(KeyTable table, const Place* place, const Terms* terms, int64_t now_us, int64_t units, int64_t granted_us,
                     const Booking* booking, Outcome* out) except -1:
    """Correct a key of which nothing is known. A charge isn't counted if the table is full and forgets no key for a new one."""
    cdef View[2] views
    cdef Cell cell
    cdef int64_t free_at_us
    cdef int count = 0
    if granted_us != CHARGED:
        out[0] = Outcome(True, False, terms.capacity, 0, 0)
        return 0
    if table.used >= table.max_keys:
        free_at_us = table.make_place(place.shard, now_us)
        if free_at_us > now_us:
            table.charges_lost += booking == NULL
            out[0] = Outcome(booking == NULL, False, 0, free_at_us - now_us, free_at_us - now_us)
            return 0
    table.make_room(place.shard, now_us)
    if booking != NULL:
        book_views(views, &count, terms, now_us, units, booking, out)  # of a bucket, which takes no memory
    elif correct_views(views, &count, terms, now_us, units, granted_us, out) == NO_MEMORY:
        raise MemoryError
    if terms.calendar != NULL:
        views[0].at_us = dated_start(terms, now_us)
        report(terms, views, now_us, 0, out)
        out.retry_us = view_debt(terms, views, now_us, 0, 0)
    cell.hash_lo = place.hashed.lo
    cell.hash_hi = place.hashed.hi
    cell.view = views[0]
    shard_place(place.shard, &cell)
    table.used += 1
    return 0


def correct(KeyTable table not None, Joint joint not None):
    """Charge all parts of a correction, and give back what it gives back. Returns the decision, which is allowed."""
    cdef Place[PARTS_MAX] places
    cdef Outcome[PARTS_MAX] outs
    cdef int[PARTS_MAX] reported
    cdef int64_t now_us
    cdef int p
    table.locate_joint(joint, places)
    now_us = table.now_us()
    for p in range(joint.size):
        reported[p] = p
        if joint.uncounted >> p & 1:
            outs[p] = part_uncounted(joint, p)
        else:
            correct_place(table, &places[p], now_us, joint.costs[p], joint.granted_us if joint.refunds >> p & 1 else CHARGED, NULL,
                          &outs[p])
    decision = joint_decision(joint, MEMORY, outs, reported, joint.sets, True)
    joint_count(decision)
    return decision


def charge(KeyTable table not None, Entry entry not None):
    """Charge one key. Returns the decision, which is allowed."""
    return correct(table, correcting(entry))


def refund(KeyTable table not None, Entry entry not None, int64_t granted_us):
    """Give back units of one key that were granted at that time of the table's clock. Returns the decision, which is allowed."""
    cdef Joint joint = correcting(entry)
    joint.refunds = 1
    joint.granted_us = granted_us
    return correct(table, joint)


cdef Joint correcting(Entry entry):
    cdef Joint joint = joint_new([entry.rule], 0).with_keys((entry.key,), (entry.canonical,))
    joint.costs[0] = entry.cost
    joint.corrects = CHARGES
    return joint
