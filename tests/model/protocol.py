"""The protocol of epochs, bounds and repair as a machine small enough to try every order of events.

One key under an exact sliding window, cost 1, and time in ticks. A state is a tuple of tuples, a step a function from state to
state; `steps` lists all that can come next, faults included. What is abstracted:

- A tick is the reach of a deadline: a reply comes within its tick, whatever overtakes it, unless the fault `delay` holds it
  until a later one. A process that is connected and knows something beats in each tick, so an undisturbed process has come within `learn`;
  when all that knew have come, learning ends with the tick. It may assert what it knows at any time: there are other
  keys, and it tells the store as little as may be of how far it has come with them (`is_complete`). A request
  and its run by the server are one step: nothing of one key overtakes on its connection, and what a call says depends on replies to
  the same process alone. With two connections, a reply on that of the decisions may come while the other one has found a new epoch.
- Failover: at `fork` the replica stops to follow (any prefix may survive), `failover` makes it the master, with another run.
  The old master goes on for the processes that are still connected to it. A restart is a fork and a failover.
- Denials by pre-filter and circuit breaker consume nothing, so they are no steps. N and ranks are known and right.
- No clock is ahead of another, no key is evicted by the server, and no two epochs get one name by chance.
- What was inherited, added and granted since are kept apart here, so that a slot in which they meet is not modelled.

Beside the protocol a state holds what no process knows: each admitted unit, which processes have a reply that counts it, and
which servers count it still (`Unit`). A unit is excused, and leaves the account, when it was lost and at the end of learning
nobody has told of it, nor has joined and could have: then it was known only to processes
that died or couldn't assert. What newcomers get from an empty store,
before a process comes that knows that it isn't a new one, may break the promise as it is admitted; after that it counts like all
else, so that the excess is at most that. Every other admission must keep the promise with all that is in the account.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

AWAY, MASTER, OLD, REPLICA, OWED = 0, 1, 2, 4, 8
BEAT, CHARGE, LEARN, READY = range(4)
LEASE_TICKS = 1
NEWCOMER = -1  # of Unit.alone


MUTANTS = frozenset({
    "", "max-merge", "base stays", "no learning", "waits for nobody", "epoch unchecked", "generation ignored",
    "generation untold", "no marker", "charge forgotten", "late grant", "kept for ever", "no gate", "oldest first", "held till failover",
})  # fmt: skip  # a line for each word would be a page


@dataclass(frozen=True)
class Config:
    """The size of a model, its budgets of faults, and what is wrong in it on purpose. Times in ticks."""

    processes: int = 2
    limit: int = 2
    window: int = 2
    learn: int = 2
    repair: int = 3
    faults: int = 2
    losses: int = 1
    resets: int = 0
    lease: bool = False
    local: bool = False
    connections: int = 1
    mutant: str = ""

    def __post_init__(self) -> None:
        if self.mutant not in MUTANTS:
            raise ValueError(f"there is no mutant {self.mutant!r}; there are {', '.join(sorted(MUTANTS - {''}))}")

    def share(self, process: int) -> int:
        """Return what a process may admit alone."""
        return self.limit // self.processes + (process < self.limit % self.processes)


class Store(NamedTuple):
    """What one server holds; `inherited` and `since` count units, by the ticks until they leave, less one."""

    epoch: int  # 0: there is no epoch key
    own_run: bool  # the epoch names the run of this server
    marked: int  # M is set: a process came that knew an older epoch; 2: all have come that do
    learn: int  # ticks of learning that are left
    come: int  # processes that came while others were waited for, as bits
    untold: int  # those that came and have something left to tell, as bits
    told: int  # the order of the newest knowledge that was asserted
    before: int  # the epoch that the first of them knew
    mixed: bool  # others knew another one
    held: int  # until which decision, in order, all is in the data that this store began with
    repair: int  # ticks until it is too late to assert
    base: int  # units that were inherited when the state was first touched in this epoch, -1 before
    extra: int  # units that assertions have added
    extra_leaves: int  # ticks until they leave
    generation: int
    markers: int  # processes whose charge was applied, as bits
    inherited: tuple[int, ...]
    since: tuple[int, ...]

    @property
    def total(self) -> int:
        """Return the units that count."""
        return sum(self.inherited) + sum(self.since) + self.extra

    @property
    def leaves(self) -> int:
        """Return the ticks until the last unit leaves."""
        pairs = enumerate(zip(self.inherited, self.since, strict=True), 1)
        return max([self.extra_leaves, *(i for i, (a, b) in pairs if a or b)])


class Reply(NamedTuple):
    """A reply on its way."""

    kind: str
    granted: bool = False
    total: int = 0
    leaves: int = 0
    ahead: int = 0
    generation: int = 0
    epoch: int = 0
    marked: int = 0
    learn: int = 0
    order: int = 0  # of the decision, among all
    kept: int = 0  # what of the past the store has, up to which decision
    held: bool = False  # until a later tick, when the check has been answered by policy


class Proc(NamedTuple):
    """What one process knows; the last unit of its bound leaves in `leaves` ticks."""

    conn: int
    epoch: int  # 0: it has never known one
    marked: int
    stage: int
    learn: int
    behind: bool  # it has yet to assert in this epoch
    units: int
    leaves: int
    young: bool  # its bound came after the state was first touched in the master's epoch
    generation: int
    order: int  # of the decision that it heard of last
    age: int  # of it: 0 for the epoch that it knows, 1 for the one before, 2 for older ones
    owed: tuple[int, ...]  # admitted alone, by ticks until they leave, less one
    lease: int
    lease_left: int
    reply: Reply | None
    side: Reply | None  # one of the connection that it had before it moved


class Unit(NamedTuple):
    """One unit that was admitted, or may be yet."""

    left: int  # ticks in which an interval holds it and what is admitted then
    known: int  # processes that have a reply which counts it, as bits
    telling: int  # processes to which such a reply is on its way
    held: int  # servers that count it, as bits; OWED while only its process does
    owner: int  # 0: admitted; p + 1: a reply to p grants it; -p - 1: in p's lease
    alone: int  # p + 1: admitted by p alone; NEWCOMER: by a store that was taken for new


class State(NamedTuple):
    """A state of the whole; `broken` names the invariant that the last step broke."""

    master: Store
    old: Store | None
    replica: Store | None
    procs: tuple[Proc, ...]
    units: tuple[Unit, ...]
    faults: int
    losses: int
    resets: int
    last_reset: int
    unused: bool  # nothing was charged since the last reset
    broken: str


Step = tuple[str, State]


def initial(config: Config) -> State:
    """Return the start: all are connected to a store whose epoch has been known for long."""
    nothing = (0,) * (config.window + LEASE_TICKS)
    store = Store(1, True, 1, 0, 0, 0, 0, 0, False, 0, 0, -1, 0, 0, 0, 0, nothing, nothing)
    proc = Proc(MASTER, 1, 1, READY, 0, False, 0, 0, False, 0, 0, 0, (0,) * config.window, 0, 0, None, None)
    return State(store, None, None, (proc,) * config.processes, (), config.faults, config.losses, config.resets, 0, False, "")


def steps(config: Config, state: State) -> Iterator[Step]:
    """Yield all that can happen next, each in words."""
    # Nothing that others do changes what a reply says, and on one connection nothing overtakes it: it is heard, or hit, at once.
    everybody = list(enumerate(state.procs))
    hearing = [(p, q) for p, q in everybody if q.reply and not q.reply.held and config.connections == 1]
    late = 0
    for p, proc in hearing or everybody:
        for what, after in own_steps(config, state, p, proc):
            yield f"P{p + 1} {what}", after
        if state.faults:
            for what, after in faults_of(state._replace(faults=state.faults - 1), p, proc):
                yield f"FAULT: P{p + 1} {what}", after
        if is_urgent(state, proc):
            # To stay on the old master for a tick is a fault: it is left at once.
            stays = proc.conn == OLD and not proc.side and (not proc.reply or proc.reply.held)
            late += 1 if stays else state.faults + 1
    if hearing:
        return
    if late <= state.faults:
        yield ("FAULT: a tick, with processes still on the old master" if late else "a tick"), tick(config, state, late)
    if state.losses and state.faults:
        poorer = state._replace(losses=state.losses - 1, faults=state.faults - 1)
        yield "FAULT: flush", flush(config, poorer)
        if not (state.replica or state.old):
            yield "FAULT: the replica stops to follow", fork(poorer)
    if state.replica:
        yield "the replica becomes the master", failover(config, state)


def is_urgent(state: State, proc: Proc) -> bool:
    """Say whether an undisturbed process does more within this tick."""
    if proc.side or (proc.reply and not proc.reply.held) or proc.conn == OLD:
        return True
    if proc.conn == AWAY or not proc.epoch or proc.reply:
        return False
    return proc.stage < LEARN or is_elsewhere(proc, state.master)


def is_elsewhere(proc: Proc, store: Store) -> bool:
    """Say whether the store refuses what expects the process's epoch."""
    return (proc.epoch, proc.marked) != (store.epoch, store.marked)


def own_steps(config: Config, state: State, p: int, proc: Proc) -> Iterator[Step]:
    """Yield what a process may do without a fault."""
    yield from joining_steps(config, state, p, proc)
    if proc.lease:
        yield "spends its lease", spend(config, state, p, proc)
    if config.local and proc.stage < READY and not proc.reply and alone(config, p, proc):
        yield "admits alone", admit_alone(config, state, p, proc)
    store = state.master if proc.conn == MASTER else state.old
    if proc.reply or proc.conn == AWAY or proc.stage < READY or store is None:
        return
    if proc.conn == MASTER and not is_complete(config, state):
        return  # the policy decides
    if not is_elsewhere(proc, store) or config.mutant == "epoch unchecked":
        yield "asks", decide(config, state, p, proc, ahead=0)
        if config.lease and not proc.lease and config.limit - store.total > 2:
            yield "asks, and takes one ahead", decide(config, state, p, proc, ahead=1)
        if state.resets and proc.conn == MASTER:
            yield "resets", reset(config, state, p, proc)


def joining_steps(config: Config, state: State, p: int, proc: Proc) -> Iterator[Step]:
    """Yield what it does to be answered by the store again."""
    reply = proc.reply
    if proc.side:
        yield "hears from the connection it has left", hear_aside(config, state, p, proc)
    if reply:
        yield f"hears: {reply.kind}", hear(config, state, p, proc, reply)
        if reply.held:
            yield "gives a late reply up", drop(state, p)
    if proc.conn == OLD:
        yield "leaves the old master", move(config, state, p, proc)
    elif reply:
        return
    elif proc.conn == AWAY:
        yield "connects", put(state, p, proc._replace(conn=MASTER, stage=BEAT))
    elif proc.stage == BEAT:
        yield "beats", beat(config, state, p, proc)
    elif proc.stage != LEARN and is_elsewhere(proc, state.master):
        if config.mutant != "epoch unchecked" or proc.stage < READY:
            yield "hears of another epoch", put(state, p, proc._replace(stage=BEAT))
    else:
        if proc.stage == CHARGE:
            yield f"charges {sum(proc.owed)}", charge(config, state, p, proc)
        if proc.behind:
            yield f"asserts {proc.units}", assert_bound(config, state, p, proc)


def is_complete(config: Config, state: State) -> bool:
    """Say whether nobody can know anything newer of the key than the master knows."""
    store = state.master
    untold = [q for p, q in enumerate(state.procs) if store.untold >> p & 1]
    if not untold or config.mutant == "no gate":
        return True
    if config.mutant == "oldest first":
        return store.told > 0
    # On coming, each has said that it has told all that is newer than the newest.
    return not store.mixed and store.told > max(q.order if q.age == 1 else 0 for q in untold)


def newest(state: State) -> int:
    """Return the order of the last decision that anybody may speak of."""
    replies = [r.order for q in state.procs for r in (q.reply, q.side) if r]
    stores = [order for s in (state.master, state.old, state.replica) if s for order in (s.told, s.held)]
    return max([*replies, *stores, *(q.order for q in state.procs)])


def put(state: State, p: int, proc: Proc) -> State:
    """Return the state with another process p."""
    return state._replace(procs=(*state.procs[:p], proc, *state.procs[p + 1 :]))


# What the scripts do.


def stamp(store: Store) -> Store:
    """Note what was inherited, at the first touch in an epoch that is being repaired."""
    return store._replace(base=sum(store.inherited)) if store.repair and store.base < 0 else store


def decide(config: Config, state: State, p: int, proc: Proc, *, ahead: int) -> State:
    """Run one check, and answer."""
    store = state.master if proc.conn == MASTER else state.old
    assert store
    units, granted = state.units, store.total < config.limit
    if granted:
        store = stamp(store)
        since = list(store.since)
        since[max(store.leaves, config.window) - 1] += 1
        since[-1] += ahead
        store = store._replace(since=tuple(since))
        unit = Unit(config.window, 0, 0, proc.conn, p + 1, 0 if store.marked else NEWCOMER)
        units += (unit,) + (unit._replace(owner=-p - 1),) * ahead
    units = tuple(u._replace(telling=u.telling | 1 << p) if u.held & proc.conn else u for u in units)
    kind, order = "granted" if granted else "denied", newest(state) + 1
    reply = Reply(kind, granted, store.total, store.leaves, ahead, store.generation, order=order)
    after = state._replace(units=units, unused=state.unused and not granted)
    after = after._replace(master=store) if proc.conn == MASTER else after._replace(old=store)
    return excuse(put(after, p, proc._replace(reply=reply)))


def beat(config: Config, state: State, p: int, proc: Proc) -> State:
    """Name the epoch, if it has no name or that of another run; begin to learn when somebody knows an older one."""
    store, procs = state.master, state.procs
    if not store.epoch or not store.own_run:
        names = [store.epoch, *(q.epoch for q in procs), *(s.epoch for s in (state.old, state.replica) if s)]
        inherited = list(map(sum, zip(store.inherited, store.since, strict=True)))
        if store.extra:
            inherited[store.extra_leaves - 1] += store.extra
        # A run that ended is always followed by learning.
        marked = int(bool(proc.epoch or store.epoch))
        store = store._replace(
            epoch=max(names) + 1, own_run=True, marked=marked, learn=config.learn * marked, come=0, repair=config.repair,
            untold=0, told=0, before=0, mixed=False,
            base=-1, extra=0, extra_leaves=0, inherited=tuple(inherited), since=(0,) * len(store.since),
        )  # fmt: skip  # a line for each word would be a page
        procs = tuple(q._replace(young=False) for q in procs)
    elif proc.epoch and proc.epoch != store.epoch and not store.marked and store.repair:
        store = store._replace(marked=1, learn=config.learn, come=0)
    if proc.epoch and proc.epoch != store.epoch and store.repair and tells(config, proc, store.held):
        mixed = store.mixed or (store.before > 0 and store.before != proc.epoch)
        store = store._replace(untold=store.untold | 1 << p, before=store.before or proc.epoch, mixed=mixed)
    if proc.epoch and proc.epoch != store.epoch and store.learn:
        store = store._replace(come=store.come | 1 << p)
        if store.come == (1 << config.processes) - 1:
            store = store._replace(marked=2, learn=1)
    learn = 0 if config.mutant == "no learning" else min(store.learn, 1) if config.mutant == "waits for nobody" else store.learn
    reply = Reply("an epoch", epoch=store.epoch, marked=store.marked, learn=learn, kept=store.held)
    return put(state._replace(master=store, procs=procs), p, procs[p]._replace(reply=reply))


def tells(config: Config, proc: Proc, held: int) -> bool:
    """Say whether a process that comes has something to tell that the store may not have."""
    knows = proc.units > 0 or (proc.generation > 0 and config.mutant != "generation untold")
    return knows and (proc.age > 0 or proc.order > held)


def assert_bound(config: Config, state: State, p: int, proc: Proc) -> State:
    """Join what the process knows to the base that the state inherited."""
    units, store, after = proc.units, stamp(state.master), put(state, p, proc._replace(reply=Reply("asserted")))
    told = max(store.told, proc.order) if proc.age == 1 and proc.units else store.told
    store = store._replace(untold=store.untold & ~(1 << p), told=told)
    after = after._replace(master=store)
    if proc.age == 0:
        return after  # it has heard of the key in this epoch
    if not store.repair or (proc.generation < store.generation and config.mutant != "generation ignored"):
        return after
    if config.mutant == "max-merge":
        missing = max(0, units - store.total)
        store = store._replace(extra=store.extra + missing, extra_leaves=max(store.extra_leaves, proc.leaves * (missing > 0)))
    else:
        if proc.generation > store.generation and config.mutant != "generation ignored":
            nothing = (0,) * len(store.since)
            store = store._replace(base=0, extra=0, extra_leaves=0, inherited=nothing, generation=proc.generation)
        # What had left when the reply came isn't among what the process knows, so it mustn't stand for any of that.
        standing = sum(store.inherited) if proc.young and config.mutant != "base stays" else store.base
        extra = max(0, units - standing)
        if extra:
            store = store._replace(extra=max(store.extra, extra), extra_leaves=max(store.extra_leaves, proc.leaves))
    told = tuple(u._replace(held=u.held | MASTER) if u.known >> p & 1 else u for u in state.units)
    return held_to_reset(after._replace(master=store, units=told))


def charge(config: Config, state: State, p: int, proc: Proc) -> State:
    """Count what the process admitted alone, once."""
    after, store = put(state, p, proc._replace(reply=Reply("charged"))), stamp(state.master)
    if store.markers >> p & 1:
        return after._replace(broken="owed units were charged twice") if config.mutant == "no marker" else after
    since = tuple(a + b for a, b in zip(store.since, (*proc.owed, *(0,) * LEASE_TICKS), strict=True))
    store = store._replace(since=since, markers=store.markers | 1 << p)
    units = tuple(u._replace(held=MASTER) if u.alone == p + 1 and u.held == OWED else u for u in state.units)
    return after._replace(master=store, units=units, unused=False)


def reset(config: Config, state: State, p: int, proc: Proc) -> State:
    """Forget what was used, and raise the generation."""
    generation, nothing, store = state.last_reset + 1, (0,) * len(state.master.since), state.master
    store = store._replace(
        base=0 if store.repair else -1, extra=0, extra_leaves=0, generation=generation, inherited=nothing, since=nothing
    )
    after = state._replace(master=store, units=(), resets=state.resets - 1, last_reset=generation, unused=True)
    return put(after, p, proc._replace(reply=Reply("reset", generation=generation)))


# What a process does with what it hears.


def hear(config: Config, state: State, p: int, proc: Proc, reply: Reply) -> State:
    """Take a reply."""
    proc = proc._replace(reply=None)
    if reply.held and reply.kind not in {"granted", "denied"}:
        return put(state, p, proc)
    if reply.kind == "an epoch":
        another = proc.epoch > 0 and reply.epoch != proc.epoch
        # A process that is waited for says that it is through, even if nothing of what it knew counts any more.
        knows = another and (tells(config, proc, reply.kept) or bool(state.master.untold >> p & 1))
        proc = proc._replace(
            epoch=reply.epoch, marked=reply.marked, learn=reply.learn, age=min(2, proc.age + another),
            behind=knows or (proc.behind and not another),
        )  # fmt: skip  # a line for each word would be a page
        if proc.behind and state.master.repair and not another:
            # It comes back after a while in which nobody waited for it. It says so again before its checks: an assertion is sent first.
            state = state._replace(master=state.master._replace(untold=state.master.untold | 1 << p))
        return held_to_reset(put(state, p, onwards(proc)))
    if reply.kind == "asserted":
        return held_to_reset(put(state, p, onwards(proc._replace(behind=False))))
    if reply.kind == "charged":
        units = state.units
        if config.mutant != "charge forgotten":
            proc = proc._replace(units=proc.units + sum(proc.owed), leaves=max(proc.leaves, longest(proc.owed)))
            units = tuple(u._replace(known=u.known | 1 << p) if u.alone == p + 1 else u for u in units)
        store = state.master._replace(markers=state.master.markers & ~(1 << p))
        return put(state._replace(master=store, units=units), p, onwards(proc._replace(owed=(0,) * config.window)))
    if reply.kind == "reset":
        return put(state, p, proc._replace(units=0, leaves=0, generation=reply.generation, order=newest(state) + 1, age=0))
    young = proc.conn == OLD or state.master.base >= 0
    heard = {"units": reply.total, "leaves": reply.leaves, "young": young, "generation": reply.generation}
    proc = proc._replace(**heard, order=reply.order, age=0)
    if reply.held:
        return put(state._replace(units=resolved(config, state, p, granted=False, told=True)), p, proc)
    if reply.ahead:
        proc = proc._replace(lease=reply.ahead, lease_left=LEASE_TICKS + 1)
    granted = reply.granted and reply.kind == "granted"
    after = put(state._replace(units=resolved(config, state, p, granted=granted, told=True)), p, proc)
    return held_to_promise(config, after) if granted and is_promised(state, p + 1) else after


def longest(owed: tuple[int, ...]) -> int:
    """Return the ticks until the last owed unit leaves."""
    return max((i for i, n in enumerate(owed, 1) if n), default=0)


def onwards(proc: Proc) -> Proc:
    """Return the process at the next of assert, charge, learn and ready."""
    stage = CHARGE if any(proc.owed) else LEARN if proc.learn else READY
    return proc._replace(stage=stage)


def resolved(config: Config, state: State, p: int, *, granted: bool, told: bool) -> tuple[Unit, ...]:
    """Return the units once a reply to p came, or never will: one is admitted or none, and p knows or doesn't."""
    bit, units = 1 << p, []
    for u in state.units:
        if u.owner == p + 1 and not granted:
            continue
        known, owner = u.known | (u.telling & bit if told else 0), 0 if u.owner == p + 1 else u.owner
        units.append(u._replace(known=known, telling=u.telling & ~bit, owner=owner))
    return tuple(units)


def drop(state: State, p: int) -> State:
    """Lose p's connection, and with it the reply on its way; a check is answered by policy."""
    proc, bit = state.procs[p], 1 << p
    unsure = -p - 1 if proc.reply and proc.reply.ahead else 0
    units = tuple(u._replace(telling=u.telling & ~bit) for u in state.units if u.owner not in {p + 1, unsure or p + 1})
    return put(state._replace(units=units), p, proc._replace(conn=AWAY, stage=BEAT, reply=None))


def move(config: Config, state: State, p: int, proc: Proc) -> State:
    """Leave the old master for the new one."""
    if config.connections == 2 and proc.reply and proc.reply.kind in {"granted", "denied"} and not proc.reply.held:
        return put(state, p, proc._replace(conn=MASTER, stage=BEAT, reply=None, side=proc.reply))
    dropped = drop(state, p)
    return put(dropped, p, dropped.procs[p]._replace(conn=MASTER))


def hear_aside(config: Config, state: State, p: int, proc: Proc) -> State:
    """Take a reply from before the process moved. What it grants nobody could assert any more: the policy answers."""
    reply, taken = proc.side, config.mutant == "late grant"
    assert reply
    proc = proc._replace(side=None)
    if taken:
        proc = proc._replace(
            units=reply.total, leaves=reply.leaves, young=True, generation=reply.generation, order=reply.order, age=0
        )
    units = resolved(config, state, p, granted=taken and reply.granted, told=taken)
    if not taken:
        units = tuple(u for u in units if u.owner != -p - 1 or not reply.ahead)
    after = put(state._replace(units=units), p, proc)
    return held_to_promise(config, after) if taken and is_promised(state, p + 1) else after


def spend(config: Config, state: State, p: int, proc: Proc) -> State:
    """Admit a unit that was taken ahead."""
    units, lease = list(state.units), proc.lease - 1
    for i, u in enumerate(units):
        if u.owner == -p - 1:
            units[i] = u._replace(owner=0, left=config.window)
            break
    left = proc.lease_left if lease else 0
    after = put(state._replace(units=tuple(units)), p, proc._replace(lease=lease, lease_left=left))
    return held_to_promise(config, after) if is_promised(state, -p - 1) else after


def alone(config: Config, p: int, proc: Proc) -> bool:
    """Say whether p, which must have heard of N, has room in its share; it starts at its part of the bound, rounded up."""
    return proc.epoch > 0 and -(-proc.units // config.processes) + sum(proc.owed) < config.share(p)


def admit_alone(config: Config, state: State, p: int, proc: Proc) -> State:
    """Admit by the local policy."""
    owed = (*proc.owed[:-1], proc.owed[-1] + 1)
    unit = Unit(config.window, 0, 0, OWED, 0, p + 1)
    after = put(state._replace(units=(*state.units, unit)), p, proc._replace(owed=owed))
    count = sum(u.alone == p + 1 for u in after.units)
    return after._replace(broken=f"{count} units alone, not {config.share(p)}") if count > config.share(p) else after


# Faults.


def faults_of(state: State, p: int, proc: Proc) -> Iterator[Step]:
    """Yield what can go wrong with one process."""
    reply = proc.reply
    if reply and not reply.held:
        yield f"loses the reply: {reply.kind}", drop(state, p)
        yield (
            f"has to wait for the reply: {reply.kind}",
            put(state, p, proc._replace(reply=reply._replace(held=True), stage=BEAT)),
        )
        if reply.granted:
            yield "cancels", put(state, p, proc._replace(reply=reply._replace(kind="cancelled")))
    elif proc.conn != AWAY:
        yield "is cut off", drop(state, p)
    yield "dies, and starts anew", kill(state, p, proc)


def kill(state: State, p: int, proc: Proc) -> State:
    """Start p anew, knowing nothing."""
    bit = 1 << p
    kept = (u for u in state.units if u.owner not in {p + 1, -p - 1})
    # Its share alone was spent by a life that has ended: a new life has another one.
    units = tuple(u._replace(known=u.known & ~bit, telling=u.telling & ~bit) for u in kept if u.alone != p + 1)
    fresh = Proc(MASTER, 0, 0, BEAT, 0, False, 0, 0, False, 0, 0, 0, (0,) * len(proc.owed), 0, 0, None, None)
    store = state.master._replace(markers=state.master.markers & ~bit, untold=state.master.untold & ~bit)
    return put(state._replace(units=units, master=store), p, fresh)


def flush(config: Config, state: State) -> State:
    """Empty the master."""
    nothing = (0,) * len(state.master.since)
    store = Store(0, True, 0, 0, 0, 0, 0, 0, False, 0, 0, -1, 0, 0, 0, 0, nothing, nothing)
    return state._replace(master=store, units=tuple(u._replace(held=u.held & ~MASTER) for u in state.units))


def fork(state: State) -> State:
    """Let the replica stop to follow."""
    units = tuple(u._replace(held=u.held | REPLICA) if u.held & MASTER else u for u in state.units)
    return state._replace(replica=state.master._replace(own_run=False, held=newest(state)), units=units)


def failover(config: Config, state: State) -> State:
    """Make the replica the master. Processes that were connected to the old one still are."""
    assert state.replica
    replica = state.replica._replace(held=newest(state)) if config.mutant == "held till failover" else state.replica
    place = {True: MASTER, False: 0}
    units = tuple(
        u._replace(held=u.held & OWED | place[bool(u.held & REPLICA)] | (OLD if u.held & MASTER else 0)) for u in state.units
    )
    procs = tuple(q._replace(conn=OLD if q.conn == MASTER else q.conn) for q in state.procs)
    return state._replace(master=replica, old=state.master, replica=None, procs=procs, units=units)


# Time.


def tick(config: Config, state: State, faults: int) -> State:
    """Let a tick pass."""
    procs = tuple(older(q) for q in state.procs)
    units = []
    for u in state.units:
        p = abs(u.owner) - 1
        if u.owner > 0 or (u.owner < 0 and (not procs[p].lease or (state.procs[p].reply or NO_REPLY).ahead)):
            continue  # answered by policy; or a lease that has ended
        if u.owner < 0:
            units.append(u)
        elif u.left > 1:
            units.append(u._replace(left=u.left - 1))
    old = aged(state.old) if state.old and any(q.conn == OLD for q in procs) else None
    if not old:
        units = [u._replace(held=u.held & ~OLD) for u in units]
    replica = aged(state.replica) if state.replica else None
    # A process that doesn't come back is waited for no longer than it is counted.
    gone = sum(1 << p for p, q in enumerate(procs) if q.conn == AWAY)
    master = aged(state.master._replace(untold=state.master.untold & ~gone))
    if config.mutant == "kept for ever":
        master = master._replace(inherited=tuple(map(max, master.inherited, state.master.inherited)))
    return excuse(state._replace(
        master=master, old=old, replica=replica, procs=procs, units=tuple(units), faults=state.faults - faults,
    ))  # fmt: skip  # a line for each word would be a page


NO_REPLY = Reply("")


def older(proc: Proc) -> Proc:
    """Return a process one tick on."""
    leaves, left = max(0, proc.leaves - 1), max(0, proc.lease_left - 1)
    learn = max(0, proc.learn - 1)
    return proc._replace(
        learn=learn, stage=READY if proc.stage == LEARN and not learn else proc.stage,
        units=proc.units if leaves else 0, leaves=leaves, young=proc.young and leaves > 0,
        owed=(*proc.owed[1:], 0), lease=proc.lease if left else 0, lease_left=left,
    )  # fmt: skip  # a line for each word would be a page


def aged(store: Store) -> Store:
    """Return a store one tick on; where it is too late to assert, what was added is like the rest."""
    leaves, repair = max(0, store.extra_leaves - 1), max(0, store.repair - 1)
    learn = max(0, store.learn - 1)
    repair = max(repair, 1) if store.untold else repair
    store = store._replace(
        learn=learn, come=store.come if learn else 0, repair=repair, extra=store.extra if leaves else 0, extra_leaves=leaves,
        inherited=(*store.inherited[1:], 0), since=(*store.since[1:], 0),
    )  # fmt: skip  # a line for each word would be a page
    if repair or store.epoch == 0:
        return store
    inherited = [a + b for a, b in zip(store.inherited, store.since, strict=True)]
    if store.extra:
        inherited[leaves - 1] += store.extra
    return store._replace(base=-1, extra=0, extra_leaves=0, inherited=tuple(inherited), since=(0,) * len(inherited))


# Invariants.


def excuse(state: State) -> State:
    """Take out of the account what nobody can tell of any more."""
    store = state.master
    over = store.epoch and store.own_run and (not store.learn if store.marked else not store.repair)
    if not over:
        return state
    # A process that has joined can tell, however late.
    joined = sum(
        1 << p for p, q in enumerate(state.procs) if q.conn == MASTER and q.stage >= LEARN and not is_elsewhere(q, store)
    )
    return state._replace(units=tuple(u for u in state.units if u.held & (MASTER | OWED) or u.known & joined))


def is_promised(state: State, owner: int) -> bool:
    """Say whether a unit that is admitted now is in the account, and not a newcomer's."""
    return any(u.owner == owner and u.alone != NEWCOMER for u in state.units)


def held_to_promise(config: Config, state: State) -> State:
    """Hold the admission of a unit by a store against the promise; what newcomers had before counts too."""
    # With two connections a reply may come after newcomers have had theirs, although its unit was counted before.
    units = [u for u in state.units if not u.owner and (u.alone != NEWCOMER or config.connections == 1)]
    most = config.limit + sum(config.share(p) for p in {u.alone - 1 for u in units if u.alone > 0})
    return state._replace(broken=f"{len(units)} units in a window, not {most}") if len(units) > most else state


def held_to_reset(state: State) -> State:
    """Hold what repair has done against the last reset."""
    store = state.master
    if state.unused and store.generation == state.last_reset and store.total:
        return state._replace(broken="repair brought back what a reset had forgotten")
    joined = (q for q in state.procs if q.conn == MASTER and q.stage >= CHARGE and not is_elsewhere(q, store))
    if store.own_run and any(q.generation > store.generation and not q.behind for q in joined):
        return state._replace(broken="a reset that a process knows is not the store's, although it has asserted")
    return state
