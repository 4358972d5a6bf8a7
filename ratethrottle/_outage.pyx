# cython: auto_pickle=False, autotestdict=False
"""What one process admits on its own while the store is away, and what it owes the store afterwards (DESIGN: outage policy).

No I/O and no clock: times are passed in, in the server's time as far as it is known. Each of N processes runs a rule with
capacity and rate divided by N, from what was known of the key divided by N, of a bucket from the room in it. All rounding is
against the caller: N processes that begin from the same knowledge admit no more together than the rule would.
"""

cimport cython
from cpython.bytes cimport PyBytes_Check
from cpython.unicode cimport PyUnicode_FromObject
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from ratethrottle._arithmetic cimport (
    ceil_div, Counts, judge, KEEP, NO_MEMORY, Outcome, report, same_definition, settle, Terms, Units, UNITS_MAX, View, view_ahead,
    view_audit, view_charge_other, view_derive, view_free, view_fresh_at, view_rebase, view_roll, Window, window_clone, window_drop,
    window_live, window_new, window_push,
)
from ratethrottle._bound cimport Bound, bound_learn
from ratethrottle._core cimport CompiledRule

from ratethrottle.terms import drain_rate, steps


cdef extern from *:
    """
    /* ceil(level * to / from), at most `most`: a level in ticks of one size, in ticks of another. The factors fill 53, 52 and 52 bits. */
    static int64_t rt_scaled_up(int64_t level, int64_t to, int64_t from, int64_t most) {
        unsigned __int128 scaled = ((unsigned __int128)level * to + from - 1) / from;
        return scaled > (unsigned __int128)most ? most : (int64_t)scaled;
    }

    /* The level that leaves of a part's capacity an nth of the room in a whole bucket, rounded down; 0 to `most`. In ticks of which a
       unit has `to`, the whole one's level in such of which it has `from`. */
    static int64_t rt_level_of_part(int64_t level, int64_t to, int64_t from, int64_t whole, int64_t part, int64_t n, int64_t most) {
        __int128 room = (__int128)whole * to - ((__int128)level * to + from - 1) / from, left;
        room = room >= 0 ? room / n : -((-room + n - 1) / n);
        left = (__int128)part * to - room;
        return left < 0 ? 0 : left > most ? most : (int64_t)left;
    }
    """
    int64_t scaled_up "rt_scaled_up"(int64_t level, int64_t to, int64_t ticks, int64_t most) noexcept nogil
    int64_t level_of_part "rt_level_of_part"(int64_t level, int64_t to, int64_t ticks, int64_t whole, int64_t part, int64_t n,
                                             int64_t most) noexcept nogil


cdef enum:
    PLACE_KEYS = 2048                        # of one dict, about: it grows in well under a millisecond
    SHARES_MAX = 1024
    SWEPT = 16                               # accounts looked at for the one that has no room

cdef int64_t LEVEL_MAX = (<int64_t>1 << 53) - 1


# -------------------------------------------------------------------------------------------------------------- views

cdef void roll(View* view, int64_t now_us) noexcept nogil:
    """Bring any view to now, for good."""
    cdef uint32_t expired
    cdef int64_t total
    if view_ahead(view, now_us):
        view_rebase(view, now_us)
    if view.terms.kind == c"s":
        window_live(view.amount.window, now_us - view.terms.window_us, &expired, &total)
        window_drop(view.amount.window, expired, total)
    else:
        view_roll(view, now_us)


cdef int read_as(const View* view, View* read, const Terms* terms, int64_t now_us) noexcept nogil:
    """The view, or a new one if `terms` are of another definition: as a rule that has changed reads it."""
    if not same_definition(view.terms, terms):
        return view_derive(read, terms, view, now_us)
    read[0] = view[0]
    read.terms = terms
    return KEEP


cdef Window* window_part(const View* known, int64_t known_now_us, int64_t ahead_us, int64_t n) noexcept nogil:
    """An nth of its units, each with what leaves after it rounded up: n parts never hold less than the whole, at no time."""
    cdef const Window* whole = known.amount.window
    cdef Window* part = window_new(whole.count + 1)
    cdef const Units* entry
    cdef uint32_t i, expired
    cdef int64_t left, units
    if part == NULL:
        return NULL
    window_live(whole, known_now_us - known.terms.window_us, &expired, &left)
    for i in range(whole.first + expired, whole.first + whole.count):
        entry = &whole.entries[i]
        units = ceil_div(left, n) - ceil_div(left - entry.units, n)
        left -= entry.units
        if units:
            part.entries[part.count] = Units(entry.at_us + ahead_us, units)
            part.count += 1
            part.total += units
    return part


cdef int view_part(View* part, const Terms* terms, const View* known, int64_t known_now_us, int64_t now_us,
                   int64_t n, const Terms* whole) noexcept nogil:
    """An nth of what is known, rounded up, as `terms` read it now; of a bucket, of the room that it leaves in the rule's, `whole`.
    `known` is kept in another clock, in which it is now `known_now_us`."""
    cdef View source = known[0]
    cdef int64_t ahead_us = now_us - known_now_us, window_us = known.terms.window_us
    cdef int status
    if known.terms.kind == c"s":
        source.amount.window = window_part(known, known_now_us, ahead_us, n)
        if source.amount.window == NULL:
            return NO_MEMORY
    elif known.terms.kind == c"b":
        source.at_us = min(known.at_us, known_now_us)
        if not same_definition(known.terms, whole):
            view_roll(&source, known_now_us)     # as the store would: by the rate that it was kept by
        if terms.kind == c"b":
            # All parts together have the room of the whole, and gain it by no more than its rate: each by its own, from then on.
            part.terms = terms
            part.at_us = source.at_us + ahead_us
            part.amount.level_ticks = level_of_part(source.amount.level_ticks, terms.unit_ticks, known.terms.unit_ticks,
                                                    whole.capacity, terms.capacity, n, LEVEL_MAX)
            view_roll(part, now_us)
            return KEEP
        source.at_us = now_us
        source.amount.level_ticks = ceil_div(source.amount.level_ticks, n)
    else:
        # The clocks agree but roughly: it is the window whose beginning is nearest.
        source.at_us = max(<int64_t>0, known.at_us + ahead_us + window_us // 2)
        source.at_us = min(source.at_us, now_us)
        source.at_us -= source.at_us % window_us
        source.amount.counts = Counts(<uint32_t>ceil_div(known.amount.counts.cur, n), <uint32_t>ceil_div(known.amount.counts.prev, n))
        view_roll(&source, now_us)
        if same_definition(known.terms, terms):
            part[0] = source
            part.terms = terms
            return KEEP
    status = view_derive(part, terms, &source, now_us)
    view_free(&source)
    return status


cdef int window_join(Window** own, const Window* other, bint exact) noexcept nogil:
    """At every instant as much as the one that holds more then."""
    cdef Window* joined = window_new(own[0].count + other.count + 1)
    cdef int64_t a_left = own[0].total, b_left = other.total, before, at_us
    cdef const Units* a = &own[0].entries[own[0].first]
    cdef const Units* b = &other.entries[other.first]
    if joined == NULL:
        return NO_MEMORY
    while a_left or b_left:
        before = max(a_left, b_left)
        at_us = a.at_us if a_left and (b_left == 0 or a.at_us <= b.at_us) else b.at_us
        if a_left and a.at_us == at_us:
            a_left -= a.units
            a += 1
        if b_left and b.at_us == at_us:
            b_left -= b.units
            b += 1
        if max(a_left, b_left) < before:
            window_push(&joined, exact, at_us, before - max(a_left, b_left))  # it has room
    free(own[0])
    own[0] = joined
    return KEEP


cdef int view_join(View* own, const View* other) noexcept nogil:
    """Charge a view up to another one of its definition, both rolled to the same instant."""
    if own.terms.kind == c"s":
        return window_join(&own.amount.window, other.amount.window, own.terms.slot_us == 1)
    if own.terms.kind == c"b":
        own.amount.level_ticks = max(own.amount.level_ticks, other.amount.level_ticks)
    else:
        own.amount.counts.cur = max(own.amount.counts.cur, other.amount.counts.cur)
        own.amount.counts.prev = max(own.amount.counts.prev, other.amount.counts.prev)
    return KEEP


# ----------------------------------------------------------------------------------------------------------- accounts

@cython.final
cdef class Share:
    """What one process may admit by one definition of a rule."""


cdef int64_t part_of(int64_t units, int64_t n, int64_t rank) noexcept:
    """One process's part: the parts of all ranks come to `units`."""
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
    if limit == 0 or capacity == 0:          # a bucket that can't hold a unit, or that would never drain
        share.terms.capacity = 0
        return share
    share.owed = rule.terms
    unit_ticks, drain_ticks = 0, 0
    if rule.terms.kind == c"b":
        unit_ticks, drain_ticks = ticks(limit, rule.terms.window_us, capacity)
        # It drains by the share's rate, in ticks of which the whole rule's capacity holds no more than fit.
        share.owed.unit_ticks, share.owed.drain_ticks = ticks(limit, rule.terms.window_us, rule.terms.capacity)
    elif rule.terms.kind == c"f":
        share.owed.kind = c"c"               # whose views know the window before, too
    smaller = CompiledRule(rule.name, rule.strategy, rule.kind, limit, capacity, rule.terms.window_us, unit_ticks, drain_ticks,
                           *steps(rule.kind, limit, rule.terms.window_us))
    share.terms = smaller.terms
    return share


cdef Share share_of_everything(CompiledRule rule):
    """What is admitted is counted by the whole rule, whatever it comes to, and what is owed doesn't drain."""
    cdef Share share = Share.__new__(Share)
    share.n = 1
    share.terms = share.owed = rule.terms
    share.owed.drain_ticks = 0
    if rule.terms.kind == c"f":
        share.owed.kind = c"c"
    return share


@cython.final
@cython.no_gc
cdef class Account:
    """What a key holds of this process's share, and what of that the store hasn't heard."""

    def __dealloc__(self):
        if self.held.terms != NULL:
            view_free(&self.held)
        if self.owed.terms != NULL:
            view_free(&self.owed)

    cdef Account twin(self):
        """One that can be rolled and charged without changing this one."""
        cdef Account twin = Account.__new__(Account)
        twin.rule = self.rule
        twin.share = self.share
        twin.outage = self.outage
        twin.held = self.held
        if self.held.terms.kind == c"s":
            twin.held.amount.window = window_clone(self.held.amount.window)
            if twin.held.amount.window == NULL:
                raise MemoryError
        if view_derive(&twin.owed, self.owed.terms, NULL, 0) == NO_MEMORY:
            raise MemoryError
        return twin

    cdef int bring(self, CompiledRule rule, Share share, int64_t now_us) except -1:
        """Bring it to the rule and share that decide, and what is from too far ahead of now to where it may be."""
        cdef int held = KEEP, owed = KEEP
        if self.held.terms == NULL:
            held = view_derive(&self.held, &share.terms, NULL, now_us)
            owed = view_derive(&self.owed, &share.owed, NULL, now_us)
            if held == NO_MEMORY or owed == NO_MEMORY:
                raise MemoryError
        else:
            if view_ahead(&self.held, now_us):
                view_rebase(&self.held, now_us)
            if view_ahead(&self.owed, now_us):
                view_rebase(&self.owed, now_us)
            if self.share is not share:
                self.change(share, now_us)
        self.rule = rule
        self.share = share
        return 0

    cdef int change(self, Share share, int64_t now_us) except -1:
        """Both views or none: they point into one share."""
        cdef View held, owed
        if (read_as(&self.held, &held, &share.terms, now_us) == NO_MEMORY
                or read_as(&self.owed, &owed, &share.owed, now_us) == NO_MEMORY):
            raise MemoryError
        if not same_definition(self.held.terms, held.terms):
            view_free(&self.held)
        if not same_definition(self.owed.terms, owed.terms):
            view_free(&self.owed)
        self.held = held
        self.owed = owed
        self.outage = 0                      # a larger share owes a larger part of what was known
        return 0

    cdef int meet(self, const View* known, int64_t known_now_us, int64_t now_us) except -1:
        """Charge it up to its part of what is known."""
        cdef View part
        cdef int status
        roll(&self.held, now_us)
        if view_part(&part, &self.share.terms, known, known_now_us, now_us, self.share.n, &self.rule.terms) == NO_MEMORY:
            raise MemoryError
        status = view_join(&self.held, &part)
        view_free(&part)
        if status == NO_MEMORY:
            raise MemoryError
        return 0

    cdef int charge(self, int64_t now_us, int64_t cost) except -1:
        """Count what is admitted: within the share, or all that comes; saturated then, a bucket at its capacity."""
        roll(&self.held, now_us)
        roll(&self.owed, now_us)
        if (view_charge_other(&self.held, now_us, cost) == NO_MEMORY
                or view_charge_other(&self.owed, now_us, cost) == NO_MEMORY):
            raise MemoryError
        view_audit(&self.held, now_us)
        view_audit(&self.owed, now_us)
        return 0

    cdef bint over(self, int64_t now_us) noexcept:
        """Whether nothing tells it from a new account."""
        if view_fresh_at(&self.held) > now_us:
            return False
        if self.owed.terms.kind == c"b" and self.owed.terms.drain_ticks == 0:
            return self.owed.amount.level_ticks == 0
        return view_fresh_at(&self.owed) <= now_us

    cdef tuple take(self, int64_t now_us):
        """What is owed, as `take_owed` gives it, or None; it isn't owed any more."""
        cdef View owed
        cdef CompiledRule rule = self.rule
        cdef Share _share = self.share           # kept: `owed` points into it
        cdef list ages = []
        roll(&self.owed, now_us)
        # Out of the account before more objects are made, which may let another thread in.
        owed = self.owed
        if view_derive(&self.owed, owed.terms, NULL, now_us) == NO_MEMORY:
            self.owed = owed
            raise MemoryError
        try:
            owed_ages(ages, &owed, rule, now_us)
        finally:
            view_free(&owed)
        return (rule, self.key[2], chr(self.key[1]), self.tag, ages) if ages else None


cdef int owed_ages(list ages, const View* owed, CompiledRule rule, int64_t now_us) except -1:
    cdef const Terms* terms = owed.terms
    cdef const Window* window
    cdef int64_t half_us = terms.window_us // 2, beyond, left_out
    cdef uint32_t i
    if terms.kind == c"s":
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
    elif terms.kind == c"c":
        # From the middle of a window, which is in the same one by a clock that is a little off.
        if owed.amount.counts.prev:
            ages.append((now_us - owed.at_us + terms.window_us - half_us, owed.amount.counts.prev))
        if owed.amount.counts.cur:
            ages.append((max(0, now_us - owed.at_us - half_us), owed.amount.counts.cur))
    elif owed.amount.level_ticks:
        ages.append((0, scaled_up(owed.amount.level_ticks, rule.terms.unit_ticks, terms.unit_ticks,
                                  rule.terms.capacity * rule.terms.unit_ticks)))
    return 0


cdef object plain(object text, char mark):
    """The one form of a key's text; a key as it is comes as a str, or as the canonical bytes of an entry."""
    if mark == c"=":
        return (<bytes>text)[1:].decode() if PyBytes_Check(text) else PyUnicode_FromObject(text)
    return text


cdef void deny(Outcome* out, int64_t retry_us) noexcept:
    out.allowed = out.in_ticks = False
    out.remaining = 0
    out.retry_us = out.reset_us = retry_us


@cython.final
cdef class Shares:
    """What this process admits of each key on its own, by its share of the rules, and what it owes the store for that.

    max_keys: accounts at most. What is over makes room; else a check that would need one more is denied, and counted in `refused`.
    Used under the GIL, from any thread.
    """

    def __cinit__(self, int64_t max_keys):
        cdef Py_ssize_t places = 1
        if max_keys < 1:
            raise ValueError("there is room for at least one key")
        self.max_keys = max_keys
        while places * PLACE_KEYS < max_keys:
            places *= 2
        self.places = tuple([{} for _ in range(places)])
        self.accounts = []
        self.made = {}
        self.outage = 1                      # an account that has met nothing yet has 0

    def __len__(self):
        return len(self.accounts)

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

    cdef int decide(self, CompiledRule rule, object text, char mark, uint32_t tag, const View* known, int64_t known_now_us,
                    int64_t now_us, int64_t cost, int64_t retry_us, bint everything, bint consume, Outcome* out) except -1:
        """Decide on a key and, if `consume`, count and owe what was admitted. `out` is settled: by the share's ticks.

        known: what the store said of the key, or NULL, and known_now_us: what time it is now in the clock that it is kept in;
        it stands in for the store, so it ages from when it came. retry_us: what a denial says that no waiting for the share
        ends. everything: admit whatever it comes to.
        """
        cdef View copy, held
        cdef uint32_t expired = 0
        cdef int64_t total = 0
        cdef Share share
        cdef Account stored, account
        cdef tuple key
        # Its table may change as soon as an object is made, which may let another thread in.
        if known != NULL:
            copy = known[0]
            if copy.terms.kind == c"s":
                copy.amount.window = window_clone(known.amount.window)
                if copy.amount.window == NULL:
                    raise MemoryError
        try:
            share = self.share_of(rule, everything)
            if share.terms.capacity == 0:
                deny(out, retry_us)
                return 0
            key = (rule.name, <int>mark, plain(text, mark))
            # From here on no Python code runs, so that this is one step to other threads.
            stored = self.place(key).get(key)
            account = Account.__new__(Account) if stored is None else stored if consume else stored.twin()
            account.bring(rule, share, now_us)
            if account.outage != self.outage:
                if known != NULL:
                    account.meet(&copy, known_now_us, now_us)
                account.outage = self.outage
            # A denial leaves the account as it was, for a clock that steps back.
            held = account.held
            if held.terms.kind == c"s":
                window_live(held.amount.window, now_us - held.terms.window_us, &expired, &total)
            else:
                view_roll(&held, now_us)
            judge(&share.terms, &held, now_us, cost, expired, total, out)
            if everything:
                out.allowed = True
                out.retry_us = 0
            if consume and out.allowed:
                if stored is None and not self.keep(account, key, tag, now_us):
                    self.refused += 1
                    deny(out, retry_us)
                    return 0
                account.charge(now_us, cost)
                held = account.held
                total = held.amount.window.total if held.terms.kind == c"s" else 0
                if account.index >= self.owing:
                    self.swap(account, self.owing)
                    self.owing += 1
            report(&share.terms, &held, now_us, total, out)
            if out.in_ticks:
                settle(&share.terms, out)
            if not out.allowed and cost > share.terms.capacity:
                out.retry_us = retry_us
            return 0
        finally:
            if known != NULL:
                view_free(&copy)

    def take_owed(self, Py_ssize_t most, int64_t now_us):
        """Take what at most `most` keys owe: (rule, text, mark, tag, [(age_us, units), ...]) for each, ages at `now_us`.

        A key's units come oldest first; a bucket's as (0, ticks of the rule). There may be fewer than `most`, or none, before
        all is taken: `owing` is 0 then. The account of the share stays.
        """
        cdef Account account
        cdef list taken = []
        while most > 0 and self.owing > 0:
            most -= 1
            self.owing -= 1
            account = self.accounts[self.owing]
            item = account.take(now_us)
            if item is not None:
                taken.append(item)
        return taken

    def sweep(self, int64_t now_us, Py_ssize_t count=256):
        """Let go of the accounts that are over, among the next `count`."""
        cdef Account account
        for _ in range(count):
            if not self.accounts:
                return
            if self.hand >= len(self.accounts):
                self.hand = 0
            account = self.accounts[self.hand]
            if account.over(now_us):
                self.drop(account)           # another one takes its place, and is looked at next
            else:
                self.hand += 1

    def clear(self):
        """Forget everything: in a forked child, what is owed is its parent's to pay."""
        cdef dict place
        for place in self.places:
            place.clear()
        self.accounts.clear()
        self.owing = 0

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

    cdef dict place(self, tuple key):
        return <dict>self.places[(<uint64_t>hash(key) >> 32) & <uint64_t>(len(self.places) - 1)]

    cdef bint keep(self, Account account, tuple key, uint32_t tag, int64_t now_us) except -1:
        """Take a new account in, if there is room."""
        if len(self.accounts) >= self.max_keys:
            self.sweep(now_us, SWEPT)
        if len(self.accounts) >= self.max_keys:
            return False
        account.key = key
        account.tag = tag
        account.index = len(self.accounts)
        self.accounts.append(account)
        self.place(key)[key] = account
        return True

    cdef int swap(self, Account account, Py_ssize_t index) except -1:
        """Put an account where another one is, and that in its place."""
        cdef Account other = self.accounts[index]
        other.index = account.index
        self.accounts[other.index] = other
        account.index = index
        self.accounts[index] = account
        return 0

    cdef int drop(self, Account account) except -1:
        if account.index < self.owing:
            self.owing -= 1
            self.swap(account, self.owing)
        self.swap(account, len(self.accounts) - 1)
        self.accounts.pop()
        del self.place(account.key)[account.key]
        return 0

    def _decide(self, CompiledRule rule not None, text, str mark not None, int64_t now_us, int64_t cost, *, known=None,
                int64_t known_now_us=0, int64_t retry_us=0, bint everything=False, bint consume=True, uint32_t tag=0):
        """Decide, for tests. known: (rule without leases, numbers of the script's answer, cost, when it was asked).

        Returns allowed, remaining, retry_us and reset_us.
        """
        cdef Bound bound
        cdef CompiledRule known_rule
        cdef int64_t[6] numbers
        cdef Outcome out
        cdef int i
        memset(&bound, 0, sizeof(Bound))
        if known is not None:
            known_rule, answer, known_cost, asked_us = known
            for i in range(len(answer)):
                numbers[i] = answer[i]
            if bound_learn(&bound, &known_rule.terms, numbers, len(answer) > 4, known_cost, asked_us, asked_us, 0) == NO_MEMORY:
                raise MemoryError
        try:
            self.decide(rule, text, <char>ord(mark), tag, &bound.slot.view if known is not None else NULL, known_now_us, now_us,
                        cost, retry_us, everything, consume, &out)
            return out.allowed, out.remaining, out.retry_us, out.reset_us
        finally:
            if known is not None:
                view_free(&bound.slot.view)
