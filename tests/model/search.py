"""Breadth-first search through every state of the protocol, up to the names of processes and epochs."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from .protocol import MASTER, READY, Config, Proc, State, Unit, initial, is_complete, joining_steps, steps, tick

Progress = Callable[[int, int, int], None]  # depth, states at that depth, states in all


@dataclass(frozen=True)
class Result:
    """What a search has found: `trace` is a shortest way to what is wrong, empty if nothing is."""

    states: int
    seconds: float
    broken: str = ""
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        found = f"{self.states} states in {self.seconds:.1f} s"
        lines = (f"{i:3}. {step}" for i, step in enumerate(self.trace, 1))
        return "\n".join([f"{found}: {self.broken or 'nothing is wrong'}", *lines])


def canonical(config: Config, state: State) -> tuple[State, list[int]]:
    """Return the state that stands for all that differ only in names, or in what can make no difference any more.

    The list has, for each process of that state, which one it was.
    """
    procs, units, master, old, replica = state.procs, state.units, state.master, state.old, state.replica
    last = state.last_reset
    if not ((state.losses and state.faults) or replica or old or master.repair or not master.epoch):
        # Nothing can be lost any more, so nothing is asserted.
        last = 0
        master = master._replace(generation=0)
        forgotten = {"generation": 0} if config.local else {"generation": 0, "units": 0, "leaves": 0, "young": False}
        procs = tuple(q._replace(**forgotten, reply=q.reply and q.reply._replace(generation=0)) for q in procs)
        units = tuple(u._replace(known=0, telling=0) for u in units)
    # Few steps add or forget an epoch or an order, and copying is most of the work: where each has its name, nothing is renamed.
    found = sorted({0, master.epoch, *(q.epoch for q in procs), *epochs(state)})
    if found[-1] != len(found) - 1:
        names = {e: i for i, e in enumerate(found)}
        procs = tuple(
            q._replace(epoch=names[q.epoch], reply=q.reply and q.reply._replace(epoch=names[q.reply.epoch])) for q in procs
        )
        master = master._replace(epoch=names[master.epoch], before=names.get(master.before, 0))
        old = old and old._replace(epoch=names[old.epoch])
        replica = replica and replica._replace(epoch=names[replica.epoch])
    orders = {0, master.told, master.held, *(q.order for q in procs)}
    orders.update(order for q in procs for r in (q.reply, q.side) if r for order in (r.order, r.kept))
    orders.update(order for s in (old, replica) if s for order in (s.told, s.held))
    if max(orders) != len(orders) - 1:
        ranks = {order: i for i, order in enumerate(sorted(orders))}
        procs = tuple(ranked(q, ranks) for q in procs)
        master = master._replace(told=ranks[master.told], held=ranks[master.held])
        old = old and old._replace(told=ranks[old.told], held=ranks[old.held])
        replica = replica and replica._replace(told=ranks[replica.told], held=ranks[replica.held])
    order = list(range(len(procs)))
    # With shares of their own, processes are not alike.
    if not config.local:
        order.sort(key=lambda p: sort_key(procs[p]))
        if order != list(range(len(procs))):
            bits = {1 << p: 1 << i for i, p in enumerate(order)}
            owners = {p + 1: i + 1 for i, p in enumerate(order)}
            procs = tuple(procs[p] for p in order)
            units = tuple(swapped(u, bits, owners) for u in units)
            master = master._replace(markers=0, untold=sum(to for bit, to in bits.items() if master.untold & bit))
    return state._replace(
        master=master, old=old, replica=replica, procs=procs, units=tuple(sorted(units)), last_reset=last
    ), order


def ranked(proc: Proc, ranks: dict[int, int]) -> Proc:
    reply, side = (r and r._replace(order=ranks[r.order], kept=ranks[r.kept]) for r in (proc.reply, proc.side))
    return proc._replace(order=ranks[proc.order], reply=reply, side=side)


def epochs(state: State) -> list[int]:
    """Return the epochs that are named outside the master and the processes themselves."""
    stores = [s.epoch for s in (state.old, state.replica) if s]
    stores.append(state.master.before)
    return stores + [r.epoch for q in state.procs for r in (q.reply, q.side) if r]


def sort_key(proc: Proc) -> tuple[object, ...]:
    return (*proc[:-2], proc.reply or (), proc.side or ())


def swapped(unit: Unit, bits: dict[int, int], owners: dict[int, int]) -> Unit:
    owner = owners[unit.owner] if unit.owner > 0 else -owners[-unit.owner] if unit.owner else 0
    known = sum(to for bit, to in bits.items() if unit.known & bit)
    telling = sum(to for bit, to in bits.items() if unit.telling & bit)
    return unit._replace(known=known, telling=telling, owner=owner)


def search(config: Config, *, progress: Progress | None = None, lockouts: bool = True) -> Result:
    """Visit every state; stop at the first that breaks an invariant, or from which somebody is never granted anything again.

    lockouts: look for the latter too, which takes a third of the time.
    """
    # Nothing here is cyclic, and to look for that among millions of tuples takes most of the time.
    gc.disable()
    try:
        return visit(config, progress, lockouts)
    finally:
        gc.enable()


def visit(config: Config, progress: Progress | None, lockouts: bool) -> Result:
    """Search, layer by layer."""
    began = time.process_time()
    start, _ = canonical(config, initial(config))
    came: dict[State, State | None] = {start: None}
    layer, depth, recovering = [start], 0, set[State]()
    while layer:
        if progress:
            progress(depth, len(layer), len(came))
        following = []
        for state in layer:
            for _, reached in steps(config, state):
                after, _ = canonical(config, reached)
                if after in came:
                    continue
                came[after] = state
                broken = after.broken
                if not broken and lockouts and is_lockout(config, after, recovering):
                    broken = "somebody is locked out"
                if broken:
                    return Result(len(came), time.process_time() - began, broken, trace(config, came, after))
                following.append(after)
        layer, depth = following, depth + 1
    return Result(len(came), time.process_time() - began)


def trace(config: Config, came: dict[State, State | None], state: State) -> tuple[str, ...]:
    """Return the steps to a state, with each process called the same from first to last."""
    way = [state]
    while before := came[way[-1]]:
        way.append(before)
    sentences, names = [], list(range(1, config.processes + 1))
    for here, there in pairwise(reversed(way)):
        for step, after in steps(config, here):
            reached, order = canonical(config, after)
            if reached == there:
                sentences.append(re.sub(r"P(\d)", lambda m, names=names: f"P{names[int(m[1]) - 1]}", step))
                names = [names[p] for p in order]
                break
    return tuple(sentences)


def is_lockout(config: Config, state: State, recovering: set[State]) -> bool:
    """Say whether, without another fault, the store can't grant everybody a check within bounded time.

    `recovering` has the states from which it can, and learns more of them.
    """
    state = state._replace(faults=0, losses=0, resets=0, units=(), unused=False)
    way: list[State] = []
    # Late replies, learning, two windows, and one for what is held too long.
    for _ in range(3 * config.window + config.learn + 2):
        while state not in recovering:
            way.append(state)
            after = joined(config, state)
            if after is None:
                break
            state = after
        if state in recovering or (
            state.master.total < config.limit and is_complete(config, state) and all(is_served(q) for q in state.procs)
        ):
            recovering.update(way)
            return False
        state = tick(config, state, 0)
    return True


def joined(config: Config, state: State) -> State | None:
    """Return the next thing that somebody has left to do in this tick, None if there is nothing."""
    for p, proc in enumerate(state.procs):
        for _, after in joining_steps(config, state, p, proc):
            return after
    return None


def is_served(proc: Proc) -> bool:
    return proc.conn == MASTER and proc.stage == READY and not proc.reply
