# cython: auto_pickle=False, autotestdict=False
"""What one process admits on its own while the store is away, and what it owes the store afterwards (docs/arithmetic.md, "Shares").

No I/O and no clock: times are passed in, in the server's time as far as it is known. Each of N processes runs a rule with
capacity and rate divided by N, from what was known of the key divided by N, of a bucket from the room in it. All rounding is
against the caller: N processes that begin from the same knowledge admit no more together than the rule would.
"""

cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memset

from ratethrottle._core cimport CHECK, Parts, PEEK, PendingDecision
from ratethrottle._engine.arithmetic cimport (
    BUCKET, COUNTER, FIXED, LEVEL_MAX, Outcome, report, RT_OVERFLOWS, same_definition, settle, SLIDING, Terms, View,
    view_audit, view_charge_other, view_derive, view_free, view_look, view_refund,
)
from ratethrottle._engine.bound cimport aged_late, Bound, bound_learn
from ratethrottle._engine.definitions cimport ALLOW, CompiledRule, DENY, LOCAL, Policy
from ratethrottle._engine.joint cimport Joint, joint_outcome
from ratethrottle._engine.keys cimport KeyTable
from ratethrottle._engine.pieces cimport piece_free, piece_new
from ratethrottle._engine.table cimport Account, cell_at, fingerprints_of, Place, Shard
from ratethrottle._engine.window cimport KEEP, NO_MEMORY, UNITS_MAX, Window, window_clone
from ratethrottle.storage._shared.keynames cimport KeyNames, pending_for
from ratethrottle.storage._shared.parts cimport derive, read_as, rebase, roll, scaled_up, view_join, view_part

from ratethrottle._engine.terms import drain_rate, steps


cdef extern from "Python.h":
    void Py_INCREF(PyObject*)
    void Py_DECREF(PyObject*)


cdef enum:
    UNASKED = 2                              # of `everything`
    SHARES_MAX = 1024
    SHARDS_TAKEN = 16                        # looked through for what is owed: a millisecond at most


# ----------------------------------------------------------------------------------------------------------- accounts

@cython.final
cdef class Share:
    """What one process may admit by one definition of a rule."""


cdef int64_t part_of(int64_t units, int64_t n, int64_t rank) noexcept:
    """One process's part: the parts of all ranks add up to `units`."""
    return units // n + (rank < units % n)


cdef tuple ticks(int64_t limit, int64_t window_us, int64_t capacity):
    rate = drain_rate(limit, window_us, capacity)
    return rate.denominator, rate.numerator


cdef Share share_new(CompiledRule rule, int64_t n, int64_t rank):
    """n 0: unknown, so that nothing is admitted."""
    cdef Share share = Share.__new__(Share)
    cdef CompiledRule smaller
    cdef int64_t limit = part_of(rule.limit, n, rank) if n else 0
    cdef int64_t capacity = part_of(rule.terms.capacity, n, rank) if n else 0
    share.n = n
    share.rule = rule
    if limit == 0 or capacity == 0:          # a bucket that can't hold a unit, or that would never drain
        share.terms.capacity = 0
        return share
    share.owed = rule.terms
    if rule.calendar is not None:            # it is the same but for the limit
        share.owed.kind = COUNTER
        share.terms = rule.terms
        share.terms.capacity = capacity
        return share
    unit_ticks, drain_ticks = 0, 0
    if rule.terms.kind == BUCKET:
        unit_ticks, drain_ticks = ticks(limit, rule.terms.window_us, capacity)
        # It drains by the share's rate, in ticks of which the whole rule's capacity holds no more than fit.
        share.owed.unit_ticks, share.owed.drain_ticks = ticks(limit, rule.terms.window_us, rule.terms.capacity)
    elif rule.terms.kind == FIXED:
        share.owed.kind = COUNTER               # whose views know the window before, too
    smaller = CompiledRule(rule.name, rule.strategy, rule.kind, limit, capacity, rule.terms.window_us, unit_ticks, drain_ticks,
                           *steps(rule.kind, limit, rule.terms.window_us))
    share.terms = smaller.terms
    return share


cdef Share share_of_everything(CompiledRule rule):
    """What is admitted is counted by the whole rule, however much it is, and what is owed doesn't drain."""
    cdef Share share = Share.__new__(Share)
    share.n = 1
    share.rule = rule
    share.terms = share.owed = rule.terms
    share.owed.drain_ticks = 0
    if rule.terms.kind == FIXED:
        share.owed.kind = COUNTER
    return share


cdef int account_twin(Account* twin, const Account* account) noexcept:
    """One that can be rolled and charged without changing this one. Its share is borrowed. Returns NO_MEMORY or KEEP."""
    twin[0] = account[0]
    twin.owes = False
    if twin.held.terms.kind == SLIDING:
        twin.held.amount.window = window_clone(account.held.amount.window)
        if twin.held.amount.window == NULL:
            return NO_MEMORY
    if view_derive(&twin.owed, account.owed.terms, NULL, 0) == NO_MEMORY:
        view_free(&twin.held)
        return NO_MEMORY
    return KEEP


cdef int account_bring(Account* account, Share share, int64_t now_us) noexcept:
    """Bring it to the share that decides, and what is from too far ahead of now to where it may be. The share is borrowed."""
    if account.share == NULL:
        if derive(&account.held, &share.terms, NULL, now_us) == NO_MEMORY:
            return NO_MEMORY
        if derive(&account.owed, &share.owed, NULL, now_us) == NO_MEMORY:
            view_free(&account.held)
            return NO_MEMORY
    else:
        rebase(&account.held, now_us)
        rebase(&account.owed, now_us)
        account.taken_us = min(account.taken_us, now_us)
        if account.share != <PyObject*>share and account_change(account, share, now_us) == NO_MEMORY:
            return NO_MEMORY
    account.share = <PyObject*>share
    return KEEP


cdef int account_change(Account* account, Share share, int64_t now_us) noexcept:
    """Both views or none: they point into one share."""
    cdef View held, owed
    cdef int64_t units
    if read_as(&account.held, &held, &share.terms, now_us) == NO_MEMORY:
        return NO_MEMORY
    if read_as(&account.owed, &owed, &share.owed, now_us) == NO_MEMORY:
        if not same_definition(account.held.terms, held.terms):
            view_free(&held)
        return NO_MEMORY
    if not same_definition(account.held.terms, held.terms):
        view_free(&account.held)
    if not same_definition(account.owed.terms, owed.terms):
        view_free(&account.owed)
    # The store drains what was charged by the whole rule's rate at most.
    units = still_charged(account, &(<Share>account.share).rule.terms, now_us) // max(<int64_t>1, account.owed.terms.unit_ticks)
    account.taken_ticks = 0
    if owed.terms.kind == BUCKET and owed.terms.drain_ticks:
        account.taken_ticks = min(units, owed.amount.level_ticks // owed.terms.unit_ticks) * owed.terms.unit_ticks
    account.taken_us = now_us
    account.held = held
    account.owed = owed
    account.outage = 0                       # a larger share owes a larger part of what was known
    return KEEP


cdef int64_t drained(int64_t ticks, int64_t drain_ticks, int64_t past_us) noexcept nogil:
    cdef int64_t gone_ticks
    return 0 if RT_OVERFLOWS(past_us, drain_ticks, &gone_ticks) else max(<int64_t>0, ticks - gone_ticks)


cdef int64_t still_charged(const Account* account, const Terms* whole, int64_t now_us) noexcept nogil:
    """How much of what was taken the store still holds at least: it drains by the rule's whole rate."""
    cdef const Terms* owed = account.owed.terms
    cdef int64_t past_us = max(<int64_t>0, now_us - account.taken_us), gone_ticks
    if account.taken_ticks == 0 or RT_OVERFLOWS(past_us, whole.drain_ticks, &gone_ticks):
        return 0
    return max(<int64_t>0, account.taken_ticks - scaled_up(gone_ticks, owed.unit_ticks, whole.unit_ticks, LEVEL_MAX))


cdef int account_charge_known(Account* account, Share share, const View* known, int64_t known_now_us, int64_t now_us) noexcept:
    """Charge it up to its part of what is known."""
    cdef View part
    cdef int status
    roll(&account.held, now_us)
    if view_part(&part, &share.terms, known, known_now_us, now_us, share.n, &share.rule.terms) == NO_MEMORY:
        return NO_MEMORY
    status = view_join(&account.held, &part)
    view_free(&part)
    return status


cdef int account_charge(Account* account, int64_t now_us, int64_t cost) noexcept:
    """Count what is admitted: within the share, or all that comes; saturated then, a bucket at its capacity."""
    roll(&account.held, now_us)
    roll(&account.owed, now_us)
    if (view_charge_other(&account.held, now_us, cost) == NO_MEMORY
            or view_charge_other(&account.owed, now_us, cost) == NO_MEMORY):
        return NO_MEMORY
    account.newest_us = now_us
    view_audit(&account.held, now_us)
    view_audit(&account.owed, now_us)
    return KEEP


cdef Py_ssize_t work_of(tuple item) except -1:
    """How long the store takes to charge this, as a multiple of one of which only a number changes: about 8 µs."""
    return 12 + len(<list>item[4]) // 4 if (<CompiledRule>item[0]).terms.kind == SLIDING else 1


cdef int owed_ages(list ages, const View* owed, CompiledRule rule, int64_t now_us) except -1:
    """What is owed of a window, as ages and units."""
    cdef const Terms* terms = owed.terms
    cdef const Window* window
    cdef int64_t half_us = terms.window_us // 2, beyond, left_out
    cdef uint32_t i
    if terms.kind == SLIDING:
        window = owed.amount.window
        # The newest: the oldest leave first, and no limit depends on more.
        beyond = max(<int64_t>0, window.total - UNITS_MAX)
        for i in range(window.first, window.first + window.count):
            left_out = min(beyond, window.entries[i].units)
            beyond -= left_out
            if left_out == window.entries[i].units:
                continue
            # From the last instant of a slot they count from its end, as they did here.
            age_us = now_us - window.entries[i].at_us + (terms.slot_us > 1)
            ages.append((max(0, age_us), window.entries[i].units - left_out))
    elif terms.kind == COUNTER:
        # From the middle of a window, which is in the same one by a clock that is a little off.
        if owed.amount.counts.prev:
            ages.append((max(0, now_us - owed.at_us + terms.window_us - half_us), owed.amount.counts.prev))
        if owed.amount.counts.cur:
            ages.append((max(0, now_us - owed.at_us - half_us), owed.amount.counts.cur))
    return 0


cdef int owed_level(list ages, const Account* account, int64_t level_ticks, CompiledRule rule, int64_t now_us) except -1:
    """What is owed of a bucket, as ticks of the rule: what has drained from the store too early, and what is new.

    Of all that was admitted here `level_ticks` are left, by the share's rate; the store holds a part of that, which was taken before.
    By that rate it is the same part still; but the store drains it by the whole rate, where other processes have charged less.
    """
    cdef const Terms* owed = account.owed.terms
    cdef const Terms* whole = &rule.terms
    cdef int64_t part_ticks = drained(account.taken_ticks, owed.drain_ticks, max(<int64_t>0, now_us - account.taken_us))
    cdef int64_t again_ticks = max(<int64_t>0, part_ticks - still_charged(account, whole, now_us))
    cdef int64_t most_ticks = whole.capacity * whole.unit_ticks
    if level_ticks > part_ticks:
        if again_ticks:
            ages.append((now_us - account.taken_newest_us, scaled_up(again_ticks, whole.unit_ticks, owed.unit_ticks, most_ticks)))
        ages.append((0, scaled_up(level_ticks - part_ticks, whole.unit_ticks, owed.unit_ticks, most_ticks)))
    return 0


cdef void deny(Outcome* out, int64_t retry_us) noexcept:
    out.allowed = out.in_ticks = False
    out.remaining = 0
    out.retry_us = out.reset_us = retry_us


@cython.final
cdef class Shares:
    """What this process admits of each key on its own, by its share of the rules, and what it owes the store for that.

    Both stand with the key's bound, and a table of bounds that is full forgets them like all the rest: the least used first.
    Used under the GIL, from any thread.
    """

    def __cinit__(self, KeyTable bounds not None, KeyNames names not None):
        self.bounds = bounds
        self.names = names
        self.made = {}
        self.outage = 1                      # an account that has met nothing yet has 0

    def __len__(self):
        """How many keys have an account. Counts them."""
        cdef Py_ssize_t count = 0
        cdef uint32_t i, j
        for i in range(self.bounds.shard_count):
            for j in range(self.bounds.shards[i].room):
                if fingerprints_of(&self.bounds.shards[i])[j]:
                    count += (<Bound*>cell_at(&self.bounds.shards[i], j)).account != NULL
        return count

    @property
    def owing(self):
        """Accounts from which something may be owed."""
        return self.bounds.owing

    def set_share(self, int64_t n, int64_t rank):
        """This process is the one of `rank` (from 0) among `n`. n 0: nobody knows, and nothing is admitted."""
        if not (0 <= rank < n or n == rank == 0):
            raise ValueError("the rank is from 0 to n − 1")
        if n != self.n or rank != self.rank:
            self.n = n
            self.rank = rank
            self.made.clear()
            self.last_rule = None

    def begin(self):
        """A new outage begins: at its next check each key's account is charged up to its part of what is known by then."""
        self.outage += 1

    cdef int decide(self, PendingDecision pending, Share share, int64_t table_us, int64_t now_us, int64_t retry_us, int everything,
                    Outcome* out) except -1:
        """Decide on a check or a peek that has its hash and address; count and owe what a check is granted. `out` is settled.

        table_us, now_us: the time in the table of bounds, and in the store. What the store said of the key stands in for it, so it
        ages from when it came. retry_us: what a denial says that no waiting for the share ends. everything: admit however
        much it is, by a share of everything; or UNASKED: by any share, and say when that would have granted it.
        """
        cdef Account* account
        cdef Account fresh
        cdef Bound* bound
        cdef Shard* shard
        cdef View held
        cdef uint32_t index = 0, expired = 0
        cdef int64_t total = 0, units = pending.units
        cdef bint consume = pending.mode == CHECK, lasting
        if share.terms.capacity == 0:
            deny(out, retry_us)
            return 0
        self.bounds.terms_of(pending.rule)   # it may run other code, which must not come later
        # From here on no Python code runs, so that this is one step to other threads.
        bound = self.bounds.bound_of(pending.hashed, &shard, &index)
        account = bound.account if bound != NULL else NULL
        lasting = account != NULL and consume
        if not lasting:
            if account == NULL:
                memset(&fresh, 0, sizeof(Account))
            elif account_twin(&fresh, account) == NO_MEMORY:
                raise MemoryError
            account = &fresh
        try:
            _before = self.bring(account, share, bound, lasting, table_us, now_us)
            # A denial leaves the account as it was, for a clock that steps back.
            held = account.held
            view_look(&held, &share.terms, now_us, units, &expired, &total, out)
            if everything:
                out.allowed = True
                out.retry_us = out.retry_us if everything == UNASKED else 0
            if consume and out.allowed:
                if account_charge(account, now_us, units) == NO_MEMORY:
                    raise MemoryError
                account.ahead_us = now_us - table_us
                if not lasting:
                    account = self.keep(&fresh, pending, table_us, &bound, &shard)
                    lasting = True
                self.bounds.note_owes(shard, bound, True)
                held = account.held
                total = held.amount.window.total if held.terms.kind == SLIDING else 0
            report(&share.terms, &held, now_us, total, out)
            if out.in_ticks:
                settle(&share.terms, out)
            if out.retry_us and units > share.terms.capacity:
                out.retry_us = retry_us
            return 0
        finally:
            if not lasting and fresh.share != NULL:
                view_free(&fresh.held)
                view_free(&fresh.owed)

    cdef int charge(self, PendingDecision member, Policy policy, int64_t table_us, int64_t now_us, int64_t retry_us,
                    Outcome* out) except -1:
        """Count what nobody was asked for, and owe it. `out` says when the share would have granted it."""
        cdef Share share = self.share_of(member.rule, policy != LOCAL)
        if share.terms.capacity == 0:        # nobody knows how large it is
            share = self.share_of(member.rule, True)
        member.mode = CHECK
        return self.decide(member, share, table_us, now_us, retry_us, UNASKED, out)

    cdef int give_back(self, PendingDecision member, int64_t now_us, int64_t granted_us) except -1:
        """Owe less, by units that were granted here then, unless the store has heard of them. What is held of the share stays.

        What is held may be what was known instead, of which nothing comes back.
        """
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound
        cdef Account* account
        self.bounds.terms_of(member.rule)
        bound = self.bounds.bound_of(member.hashed, &shard, &index)
        account = bound.account if bound != NULL else NULL
        if account == NULL or not account.owes or account.taken_ticks or not same_definition(&(<Share>account.share).rule.terms,
                                                                                             &member.rule.terms):
            return 0
        roll(&account.owed, now_us)
        view_refund(&account.owed, now_us, member.units, granted_us)
        view_audit(&account.owed, now_us)
        return 0

    cdef bint decide_joint(self, Parts parts, const Policy* policies, bint consumes, int64_t table_us, int64_t now_us, int64_t retry_us,
                           Outcome* outs, int* reported, int* sets) except -1:
        """Decide on a joint check, each part by its policy: whether it is allowed. Then its payers are counted, or nothing is."""
        cdef Joint joint = parts.joint
        cdef PendingDecision member
        cdef CompiledRule rule
        cdef list shares = []
        cdef int p, s
        for p in range(joint.size):
            rule = <CompiledRule>joint.rules[p]
            self.bounds.terms_of(rule)
            shares.append(self.share_of(rule, policies[p] == ALLOW))
        # From here on no other code runs: whatever the looks said is still so when the payers are counted.
        for p in range(joint.size):
            member = <PendingDecision>parts.members[p]
            if policies[p] == DENY:
                deny(&outs[p], retry_us)
            else:
                member.mode = PEEK
                self.decide(member, <Share>shares[p], table_us, now_us, retry_us, policies[p] == ALLOW, &outs[p])
        if not joint_outcome(joint, outs, reported, sets):
            return False
        for s in range(sets[0] if consumes else 0):
            p = reported[s]
            if outs[p].allowed:              # else it only flags, and is over
                member = <PendingDecision>parts.members[p]
                member.mode = CHECK
                self.decide(member, <Share>shares[p], table_us, now_us, retry_us, policies[p] == ALLOW, &outs[p])
        return True

    cdef Share bring(self, Account* account, Share share, const Bound* bound, bint lasting, int64_t table_us, int64_t now_us):
        """Bring an account to its share, and up to its part of what is known. lasting: it is the bound's own.

        Returns the share that it had, which the caller keeps: no other code may run before the caller is done.
        """
        cdef Share before = <Share>account.share if lasting else None
        if account_bring(account, share, now_us) == NO_MEMORY:
            raise MemoryError
        if lasting and before is not share:
            Py_INCREF(<PyObject*>share)
            Py_DECREF(<PyObject*>before)
        # Or the store has answered since: a check may be decided here before anybody says that the next outage has begun.
        if account.outage != self.outage or (bound != NULL and bound.heard and bound.received_us > account.met_us):
            if bound != NULL and bound.heard:
                account.met_us = bound.received_us
                if account_charge_known(account, share, &bound.cell.view, aged_late(bound, table_us), now_us) == NO_MEMORY:
                    raise MemoryError
            account.outage = self.outage
        return before

    cdef Account* keep(self, const Account* fresh, PendingDecision pending, int64_t table_us, Bound** bound,
                       Shard** shard) except NULL:
        """Have the key's bound, made where there is none, hold a new account."""
        cdef Account* account
        if bound[0] == NULL:
            bound[0] = self.add_bound(pending, table_us, shard[0])
        account = <Account*>piece_new(sizeof(Account))
        if account == NULL:
            raise MemoryError
        account[0] = fresh[0]
        Py_INCREF(account.share)
        bound[0].account = account
        return account

    cdef Bound* add_bound(self, PendingDecision pending, int64_t now_us, Shard* shard) except NULL:
        """A bound of a key of which nothing is known."""
        cdef Bound bound
        memset(&bound, 0, sizeof(Bound))
        bound.cell.hash_lo = pending.hashed.lo
        bound.cell.hash_hi = pending.hashed.hi
        if view_derive(&bound.cell.view, self.bounds.terms_of(pending.rule), NULL, now_us) == NO_MEMORY:
            raise MemoryError
        try:
            bound.name = self.names.name_new(pending, &bound.name_size)
            return <Bound*>self.bounds.insert(shard, &bound.cell, now_us)
        except BaseException:
            piece_free(bound.name)
            view_free(&bound.cell.view)
            raise

    def take_owed(self, Py_ssize_t most, int64_t now_us, Py_ssize_t work=0):
        """Take what at most `most` keys owe: (rule, name, hash, newest_age_us, [(age_us, units), ...]) for each, ages at `now_us`.

        work: stop once they take the store about as long as so many of which only a number changes; 0: never.

        A key's units come oldest first. A bucket's are ticks of the rule: new ones of age 0, and before them such as were taken
        before, of which the newest is so old: the store may have drained them too early. There may be fewer than `most`, or none,
        before all is taken: `owing` is 0 then. What a key holds of the share stays.
        """
        cdef KeyTable bounds = self.bounds
        cdef list taken = []
        cdef uint32_t i
        cdef uint32_t _shard
        cdef int visited = 0
        cdef int64_t work_left = work or (<int64_t>1 << 62)
        for _shard in range(bounds.shard_count):
            if most <= 0 or bounds.owing == 0 or visited >= SHARDS_TAKEN:
                break
            if bounds.owing_in[self.hand]:
                visited += 1
                i = 0
                # What is taken makes objects, which may let another thread in, and that may move what stands here.
                while most > 0 and i < bounds.shards[self.hand].room and bounds.owing_in[self.hand]:
                    if fingerprints_of(&bounds.shards[self.hand])[i]:
                        item = self.take(&bounds.shards[self.hand], i, now_us)
                        if item is not None:
                            most -= 1
                            work_left -= work_of(item)
                            taken.append(item)
                            if work_left <= 0:
                                most = 0
                    i += 1
                if bounds.owing_in[self.hand]:
                    break                    # it goes on there
            self.hand = self.hand + 1 if self.hand + 1 < bounds.shard_count else 0
        return taken

    cdef tuple take(self, Shard* shard, uint32_t index, int64_t now_us):
        cdef Bound* bound = <Bound*>cell_at(shard, index)
        cdef Account* account = bound.account
        cdef Account before
        cdef Share share
        cdef View owed
        cdef list ages = []
        if account == NULL or not account.owes:
            return None
        name = bound.name[:bound.name_size]
        hashed = (bound.cell.hash_lo, bound.cell.hash_hi)
        # Making these may have let another thread in.
        if index >= shard.room or not fingerprints_of(shard)[index]:
            return None
        bound = <Bound*>cell_at(shard, index)
        account = bound.account
        if bound.cell.hash_lo != hashed[0] or bound.cell.hash_hi != hashed[1] or account == NULL or not account.owes:
            return None
        share = <Share>account.share             # kept: `owed` points into it
        newest_age_us = max(<int64_t>0, now_us - account.newest_us)
        account.taken_us = min(account.taken_us, now_us)  # the clock has stepped back, and what was taken drains from now, as it does
        roll(&account.owed, now_us)
        owed = account.owed
        if owed.terms.kind == BUCKET:
            # It goes on with all that it has: what is admitted next must not drain while this drains from the store.
            self.bounds.note_owes(shard, bound, False)
            before = account[0]
            if owed.terms.drain_ticks == 0:
                account.owed.amount.level_ticks = 0
            account.taken_ticks = account.owed.amount.level_ticks
            account.taken_us = now_us
            account.taken_newest_us = account.newest_us
            owed_level(ages, &before, owed.amount.level_ticks, share.rule, now_us)
            return (share.rule, name, hashed, newest_age_us, ages) if ages else None
        if view_derive(&account.owed, owed.terms, NULL, now_us) == NO_MEMORY:
            account.owed = owed
            raise MemoryError
        self.bounds.note_owes(shard, bound, False)
        try:
            owed_ages(ages, &owed, share.rule, now_us)
        finally:
            view_free(&owed)
        return (share.rule, name, hashed, newest_age_us, ages) if ages else None

    def sweep(self, int64_t now_us):
        """Drop what is over, wherever it stands. `now_us` is in the time of the table of bounds."""
        cdef uint32_t i
        for i in range(self.bounds.shard_count):
            if self.bounds.shards[i].room:
                self.bounds.rebuild(&self.bounds.shards[i], now_us)

    def clear(self):
        """Forget everything that was admitted here."""
        cdef uint32_t i, j
        cdef Shard* shard
        for i in range(self.bounds.shard_count):
            shard = &self.bounds.shards[i]
            for j in range(shard.room):
                if fingerprints_of(shard)[j]:
                    self.bounds.drop_account(shard, <Bound*>cell_at(shard, j))

    cdef Share share_of(self, CompiledRule rule, bint everything):
        cdef int64_t n = self.n, rank = self.rank
        cdef Share share
        if rule is self.last_rule and everything == self.last_everything:
            return self.last_share
        numbers = (everything, rule.limit, rule.shape())
        share = self.made.get(numbers)
        if share is None:
            share = share_of_everything(rule) if everything else share_new(rule, n, rank)
        if n == self.n and rank == self.rank:    # another thread may have set it meanwhile
            if len(self.made) >= SHARES_MAX:
                self.made.clear()
            self.made[numbers] = share
            self.last_rule = rule
            self.last_everything = everything
            self.last_share = share
        return share

    def _decide(self, CompiledRule rule not None, text, str mark not None, int64_t now_us, int64_t cost, *, known=None,
                known_now_us=None, int64_t retry_us=0, bint everything=False, bint consume=True, uint32_t tag=0):
        """Decide, for tests. known: (rule without leases, numbers of the script's answer, cost, when it was asked).

        known_now_us: the time in the table of bounds, if it isn't the store's. Returns allowed, remaining, retry_us and reset_us.
        """
        cdef PendingDecision pending = pending_for(rule, text, <char>ord(mark), tag, CHECK if consume else PEEK)
        cdef int64_t table_us = now_us if known_now_us is None else known_now_us
        cdef Bound* bound
        cdef Shard* shard
        cdef Place place
        cdef CompiledRule known_rule
        cdef int64_t[6] numbers
        cdef uint32_t index
        cdef Outcome out
        cdef int i
        pending.units = cost
        self.bounds.locate(rule, mark == "(", pending.data, pending.size, &place)
        pending.hashed = place.hashed
        bound = self.bounds.bound_of(place.hashed, &shard, &index)
        if known is not None:
            known_rule, answer, known_cost, asked_us = known
            for i in range(len(answer)):
                numbers[i] = answer[i]
            if bound == NULL:
                bound = self.add_bound(pending, table_us, shard)
            if bound_learn(bound, self.bounds.terms_of(known_rule), numbers, len(answer) > 4, known_cost, asked_us, asked_us, 0) != KEEP:
                raise MemoryError
        elif bound != NULL:
            bound.heard = False
        self.decide(pending, self.share_of(rule, everything), table_us, now_us, retry_us, everything, &out)
        return out.allowed, out.remaining, out.retry_us, out.reset_us
