"""What is allowed: rules, and the exact integers that they compile to (docs/arithmetic.md)."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from fractions import Fraction
from typing import Any, Final, Literal, cast
from zoneinfo import available_timezones

from ratethrottle._engine.dates import MEAN_US, zone_of
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle._engine.terms import drain_rate, steps
from ratethrottle.errors import ConfigurationError, InvalidRequest, shown

MAX_UNITS: Final = 10**9
MIN_WINDOW_US: Final = 1_000
MAX_WINDOW_US: Final = 366 * 86_400 * 1_000_000
MAX_DRAIN_US: Final = 2**48
MIN_TTL_S: Final = 1
MAX_TTL_S: Final = 86_400
LEASE_MIN_US: Final = 5_000

STRATEGIES: Final = {
    "sliding_window": "s",
    "token_bucket": "b",
    "leaky_bucket": "b",
    "sliding_counter": "c",
    "fixed_window": "f",
}
ON_OUTAGE: Final = ("local", "allow", "deny", "raise")
ENFORCE: Final = ("deny", "flag", "off")
ANCHORS: Final = {"week": 7, "month": 31}  # the last day that such a window may begin on
MAX_NAME = 128
NAME = re.compile(r"[A-Za-z0-9_.-]+\Z")
# No more digits than any limit or window has: what follows is computed exactly, and must stay cheap and finite.
RATE = re.compile(r"\s*(\d[\d_]{0,14})\s*(?:/|\bper\b)\s*(\d{1,15}(?:\.\d{1,15})?)?\s*([A-Za-z]+)\s*\Z", re.ASCII)
UNITS_S: Final = {
    "ms": Fraction(1, 1000),
    "millisecond": Fraction(1, 1000),
    "s": Fraction(1),
    "sec": Fraction(1),
    "second": Fraction(1),
    "m": Fraction(60),
    "min": Fraction(60),
    "minute": Fraction(60),
    "h": Fraction(3600),
    "hr": Fraction(3600),
    "hour": Fraction(3600),
    "d": Fraction(86400),
    "day": Fraction(86400),
    "w": Fraction(7 * 86400),
    "week": Fraction(7 * 86400),
}
WORDS: Final = ("millisecond", "sec", "second", "min", "minute", "hr", "hour", "day", "week")  # that have a plural
NOT_FIXED: Final = {"mo": 30, "mon": 30, "month": 30, "quarter": 90, "y": 365, "yr": 365, "year": 365}  # about so many days
RATE_FORM: Final = (
    'a rate is written as "1000/minute", "10/s", "100 per 5 minutes" or "5/15m", its unit one of ms, s, sec(s), second(s), m, '
    "min(s), minute(s), h, hr(s), hour(s), d, day(s), w, week(s)"
)


@dataclass(frozen=True)
class RateThrottleRule:
    """Allow `limit` units in each `window`, counted by `strategy`.

    name: at most 128 letters, digits and `_.-`. A limiter has one rule of a name, and the name is part of the keys in Redis.
    limit: units, 1 to 10^9, or 0, which denies everything. window: seconds (int, float) or a timedelta, 1 ms to 366 days, a whole
    number of µs. strategy: "sliding_window" (never more than `limit` in any interval), "token_bucket", "leaky_bucket",
    "sliding_counter" or "fixed_window". burst: capacity of a bucket in units, 1 to 10^9 (default: `limit`).

    A fixed window, or that of a counter, begins at a multiple of its length since 1970-01-01 00:00 UTC. A day begins at midnight
    UTC, and a window of whole weeks on a Monday.

    A fixed window may also be "day", "week" or "month": one by the calendar. It begins at midnight in `timezone`, the IANA name of a
    time zone, so that a day has 23 or 25 hours when the clocks change. anchor: the day that it begins on, of the week (1, the
    default, is Monday, and 7 Sunday) or of the month (1 to 31; in a shorter month its last day). `window_us` is the mean length
    then. Such a rule takes no leases.

    lease: lets a busy process take units in advance from Redis, and spend them without asking. True, or the most units at once.
    lease_ttl: how many seconds a lease lasts, 0.005 to 1. It is never longer than a quarter of the window (of a sliding one, an
    eighth), or of the time in which a burst comes back. Units not spent by then go back. A bucket with leases grants less than
    `burst`, by what drains in that time, so that it keeps its promise.

    on_outage: what answers while the storage can't: "local" (this process admits its share of the rule), "allow", "deny" or
    "raise". None: what the storage's `on_outage` says.

    enforce: what a denial does. "deny" denies. "flag" decides and counts alike, but what would be denied is allowed, consumes
    nothing, and has `decision.over`. With "off" everything is allowed at once, and nothing is counted. Errors are raised alike.

    Raises ConfigurationError, which says what would be accepted.
    """

    name: str
    limit: int
    window: float | timedelta | Literal["day", "week", "month"]
    strategy: str = field(default="sliding_window", kw_only=True)
    burst: int | None = field(default=None, kw_only=True)
    lease: bool | int = field(default=False, kw_only=True)
    lease_ttl: float = field(default=0.1, kw_only=True)
    on_outage: Literal["local", "allow", "deny", "raise"] | None = field(default=None, kw_only=True)
    enforce: Literal["deny", "flag", "off"] = field(default="deny", kw_only=True)
    timezone: str = field(default="UTC", kw_only=True)
    anchor: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not isinstance(self.strategy, str) or self.strategy not in STRATEGIES:
            near = difflib.get_close_matches(str(self.strategy), STRATEGIES, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigurationError(
                f"rule {self.name!r} has no strategy {shown(self.strategy)}: {hint}there are {', '.join(STRATEGIES)}"
            )
        _check_limit(self.name, self.limit)
        if self.burst is not None:
            if STRATEGIES[self.strategy] != "b":
                raise ConfigurationError(
                    f"rule {self.name!r}: burst belongs to token_bucket and leaky_bucket; a {self.strategy} has only its limit"
                )
            _check_units(self.name, "burst", self.burst)
            if self.limit == 0:
                raise ConfigurationError(f"rule {self.name!r}: a limit of 0 denies everything, and has no burst; leave burst out")
        _check_policy(self.name, self.on_outage)
        if not isinstance(self.enforce, str) or self.enforce not in ENFORCE:
            raise ConfigurationError(f"rule {self.name!r}: enforce is {shown(self.enforce)}; it is deny, flag or off")
        calendar = self._calendar()
        window_us = MEAN_US[calendar[0]] if calendar else _window_us(self.name, self.window)
        object.__setattr__(self, "_compiled", self._compile(window_us, calendar))

    @classmethod
    def parse(cls, name: str, rate: str, **options: Any) -> RateThrottleRule:
        """Make a rule from a rate such as "1000/minute", "10/s", "100 per 5 minutes" or "5/15m".

        Units are ms, s, m, h, d and w, and their names, also in the plural ("2 hours", not "2 hs"). A week is 7 days, and begins as
        the class says. Months and years have no fixed length, and are refused. `options` are those of the class. Raises
        ConfigurationError.
        """
        found = RATE.match(rate) if isinstance(rate, str) else None
        unit = found[3].lower() if found else ""
        word = unit.removesuffix("s")
        seconds = UNITS_S.get(word if word in WORDS else unit)
        if found is None or seconds is None:
            raise ConfigurationError(f"rule {shown(name)}: {shown(rate)} is not a rate; {_rate_advice(rate, unit)}")
        window = Fraction(found[2] or 1) * seconds
        window_us = window * 1_000_000
        exact: float | timedelta = int(window) if window.denominator == 1 else float(window)
        if window.denominator != 1 and window_us.denominator == 1 and window_us <= MAX_WINDOW_US:
            exact = timedelta(microseconds=int(window_us))
        return cls(name, int(found[1].replace("_", "")), exact, **options)

    @classmethod
    def parse_many(cls, name: str, rates: str, **options: Any) -> tuple[RateThrottleRule, ...]:
        """Make a rule of each rate in a string such as "10/second;1000/day"; they are separated by `;` or `,`.

        The last one may end with a separator too. An empty part elsewhere is refused.

        Each is called by `name` and its window: "api.1s" and "api.1d" of `name` "api". The window is written in the largest unit
        that it is a whole number of (w, d, h, m, s, ms, us), so that "60s" and "minute" are both "1m". `options` are those of the class,
        for each rule. Raises ConfigurationError, also for two rates with the same window.
        """
        if not isinstance(rates, str):
            raise ConfigurationError(f"rule {shown(name)}: {shown(rates)} is not a str of rates; {RATE_FORM}")
        rules: dict[str, RateThrottleRule] = {}
        parts = re.split(r";|(?<!\d),", rates)  # after a digit a comma separates thousands, which `parse` refuses
        if len(parts) > 1 and not parts[-1].strip():
            parts.pop()
        if len(parts) > 1 and not all(part.strip() for part in parts):
            raise ConfigurationError(f"rule {shown(name)}: {shown(rates)} has an empty part; write a rate before each ; or ,")
        for rate in parts:
            rule = cls.parse(name, rate, **options)
            own = f"{name}.{_window_text(rule.window_us)}"
            if own in rules:
                raise ConfigurationError(f"rule {shown(name)}: {shown(rates)} holds two rates with a window of {rule.window} s")
            rules[own] = replace(rule, name=own)
        return tuple(rules.values())

    @property
    def window_us(self) -> int:
        """The window in µs; of one by the calendar its mean length, such as 30.436875 days of a month."""
        return self.compiled.window_us

    @property
    def capacity(self) -> int:
        """The most units that can be used at once: `burst` of a bucket, `limit` otherwise; with leases, a bucket's is less."""
        return self.compiled.capacity if self.limit else 0

    @property
    def compiled(self) -> CompiledRule:
        """The exact integers that storages decide by."""
        return cast(CompiledRule, self.__dict__["_compiled"])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RateThrottleRule):
            return NotImplemented
        return self.compiled == other.compiled

    def __hash__(self) -> int:
        return hash(self.compiled)

    def __reduce__(self) -> tuple[Any, ...]:
        options = ("strategy", "burst", "lease", "lease_ttl", "on_outage", "enforce", "timezone", "anchor")
        return _restore, (self.name, self.limit, self.window, {name: getattr(self, name) for name in options})

    def _calendar(self) -> tuple[str, str, int] | None:
        """Return the unit, the time zone and the anchor of a window by the calendar."""
        name, unit = self.name, self.window
        if not isinstance(unit, str):
            if self.timezone != "UTC" or self.anchor is not None:
                raise ConfigurationError(f'rule {name!r}: timezone and anchor belong to window="day", "week" or "month"')
            return None
        if unit not in MEAN_US:
            raise ConfigurationError(
                f"rule {name!r}: window is {shown(unit)}; it is seconds (int or float), a timedelta, or by the calendar "
                '"day", "week" or "month"'
            )
        if self.strategy != "fixed_window":
            raise ConfigurationError(
                f'rule {name!r}: window="{unit}" is by the calendar, which takes strategy="fixed_window"; a {self.strategy} has a '
                "length, in seconds"
            )
        if self.lease is not False:
            raise ConfigurationError(f"rule {name!r}: a window by the calendar takes no leases; leave lease out")
        return str.__str__(unit), _timezone(name, self.timezone), _anchor(name, unit, self.anchor)

    def _compile(self, window_us: int, calendar: tuple[str, str, int] | None) -> CompiledRule:
        kind = STRATEGIES[self.strategy] if calendar is None else "d"
        if self.limit == 0:
            # Denied before anything is counted; what was used under another limit is kept as one of 1 would keep it.
            return replace(self, limit=1, lease=False).compiled.blocking()
        unit_ticks, drain_ticks = self._ticks(window_us) if kind == "b" else (0, 0)
        slot_us, coarse_us = steps(kind, self.limit, window_us)
        lease_us, lease_units = self._lease(window_us)
        # A unit taken ahead may be spent up to lease_us after it was counted.
        unspent = -(-lease_us * drain_ticks // unit_ticks) if kind == "b" else 0
        if self._most() <= unspent:
            raise ConfigurationError(
                f"rule {self.name!r}: with leases its burst of {self._most()} would leave nothing to grant; leave lease out"
            )
        return CompiledRule(
            str.__str__(self.name),
            str.__str__(self.strategy),
            kind,
            self.limit,
            self._most() - unspent,
            window_us,
            unit_ticks,
            drain_ticks,
            slot_us,
            coarse_us,
            lease_us,
            lease_units,
            None if self.on_outage is None else ON_OUTAGE[ON_OUTAGE.index(self.on_outage)],  # of a subclass of str: its text
            ENFORCE[ENFORCE.index(self.enforce)],
            calendar,
        )

    def _most(self) -> int:
        return self.limit if self.burst is None else self.burst

    def _lease(self, window_us: int) -> tuple[int, int]:
        """For how many µs units may be taken ahead, and how many at most; two zeros without leases."""
        ttl = self.lease_ttl
        if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 0.005 <= ttl <= 1:
            raise ConfigurationError(f"rule {self.name!r}: lease_ttl is {shown(ttl)}; it is seconds, from 0.005 to 1")
        if self.lease is False:
            return 0, 0
        if self.lease is not True:
            _check_units(self.name, "lease", self.lease)
        kind = STRATEGIES[self.strategy]
        longest_us = window_us // 8 if kind == "s" else self._most() * window_us // (4 * self.limit)
        lease_us = min(round(ttl * 1_000_000), longest_us)
        if lease_us < LEASE_MIN_US:
            raise ConfigurationError(
                f"rule {self.name!r}: a lease of it could last {lease_us / 1e6:g} s at most, and below 0.005 s none is worth its "
                "cost; leave lease out"
            )
        return lease_us, self._most() if self.lease is True else self.lease

    def _ticks(self, window_us: int) -> tuple[int, int]:
        if self._most() * window_us > MAX_DRAIN_US * self.limit:
            raise ConfigurationError(
                f"rule {self.name!r}: a burst of {self._most()} at {self.limit} per {window_us / 1e6:.14g} s takes longer to come "
                f"back than a rule can count (2^48 µs, almost 9 years); the largest burst at this rate is "
                f"{MAX_DRAIN_US * self.limit // window_us}"
            )
        rate = fitting_rate(self.limit, window_us, self._most())
        if rate is None:
            what = "limit" if self.burst is None else "burst"
            near = (
                nearest_limit(self.limit, window_us) if self.burst is None else largest_burst(self.limit, window_us, self.burst)
            )
            raise ConfigurationError(
                f"rule {self.name!r}: {self.limit} per {window_us / 1e6:.14g} s with a burst of {self._most()} can't be counted to "
                f"within a billionth; the nearest {what} that can is {near}"
            )
        return rate.denominator, rate.numerator


@dataclass(frozen=True)
class ConcurrencyRule:
    """Allow `limit` units to be held at once, by `limiter.slot`.

    name: as that of a RateThrottleRule, and a limiter has one rule of a name. limit: units, 1 to 10^9, or 0, which denies everything.
    A slot holds one unit, or its `cost`.

    ttl: seconds (int or float), 1 to 86,400, taken to the nearest µs. On Redis the slots of a process that has died, or that can't reach
    Redis, are free again within `ttl` + 1 s. A process renews all of its slots by one call in a third of that. In memory slots last
    as long as they are held.

    on_outage: what answers while the storage can't: "local" (this process holds its share of the limit), "allow", "deny" or "raise".
    None: what the storage's `on_outage` says.

    Raises ConfigurationError, which says what would be accepted.
    """

    name: str
    limit: int
    ttl: float = 30
    on_outage: Literal["local", "allow", "deny", "raise"] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_limit(self.name, self.limit)
        _check_policy(self.name, self.on_outage)
        object.__setattr__(self, "_ttl_us", _ttl_us(self.name, self.ttl))
        # Of a window only because a decision tells of one; nothing is counted by it.
        policy: Any = None if self.on_outage is None else ON_OUTAGE[ON_OUTAGE.index(self.on_outage)]
        units = max(self.limit, 1)
        compiled = CompiledRule(
            str.__str__(self.name), "concurrency", "f", units, units, self.ttl_us, 0, 0, 0, 0, on_outage=policy
        )
        object.__setattr__(self, "_compiled", compiled if self.limit else compiled.blocking())

    @property
    def ttl_us(self) -> int:
        """The time to live in µs."""
        return cast(int, self.__dict__["_ttl_us"])

    @property
    def compiled(self) -> CompiledRule:
        """What decisions are made of."""
        return cast(CompiledRule, self.__dict__["_compiled"])

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_concurrency, (self.name, self.limit, self.ttl, self.on_outage)


@dataclass(frozen=True, init=False, repr=False)
class FirstOf:
    """Several rules, of which the first that would allow a check pays for it alone.

    rules: from 2 on, names of rules or rules of the caller's own. With other limits in one check it stands as one of them.

        await limiter.check(key, FirstOf("included", "credits"))

    Raises InvalidRequest.
    """

    rules: tuple[str | RateThrottleRule, ...]

    def __init__(self, *rules: str | RateThrottleRule) -> None:
        for rule in rules:
            if isinstance(rule, FirstOf):
                raise InvalidRequest("FirstOf stands within FirstOf; name all its rules in one, in their order")
            if not isinstance(rule, (str, RateThrottleRule)):
                raise InvalidRequest(
                    f'FirstOf got a {type(rule).__name__}; it takes names of rules, or rules, one by one: FirstOf("a", "b")'
                )
        if len(rules) < 2:
            raise InvalidRequest(f"FirstOf got {len(rules)} rules; it takes at least 2, and the first that allows pays")
        object.__setattr__(self, "rules", rules)

    def __repr__(self) -> str:
        names = (rule if isinstance(rule, str) else rule.name for rule in self.rules)
        return f"FirstOf({', '.join(repr(str(name)) for name in names)})"


OneRule = str | RateThrottleRule | FirstOf
Rules = OneRule | Sequence[OneRule]
Costs = Mapping[Any, int]  # the cost of each OneRule; Any, since a Mapping[str, int] is no Mapping[OneRule, int] to type checkers


def fitting_rate(limit: int, window_us: int, capacity: int) -> Fraction | None:
    """Find the units per µs that a bucket drains by; None if what fits is 10^-9 of the rate below it, or more."""
    rate, near = Fraction(limit, window_us), drain_rate(limit, window_us, capacity)
    return near if (rate - near) * 10**9 < rate else None


def largest_burst(limit: int, window_us: int, below: int) -> int:
    """Find the largest burst under `below` that fits: the fewer units, the finer the ticks, and one unit always fits."""
    fits, fails = 1, below
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if fitting_rate(limit, window_us, middle) is None:
            fails = middle
        else:
            fits = middle
    return fits


def nearest_limit(limit: int, window_us: int) -> int:
    """Find the nearest limit, the lower of two, that fits as its own burst; one unit always does."""
    for distance in range(1, limit):
        for near in (limit - distance, limit + distance):
            if near <= MAX_UNITS and fitting_rate(near, window_us, near) is not None:
                return near
    return 1


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not NAME.match(name):
        raise ConfigurationError(
            f"the name of a rule is letters, digits and any of _ . - (it becomes part of a key), not {shown(name)}"
        )
    if len(name) > MAX_NAME:
        raise ConfigurationError(
            f"the name of a rule has at most {MAX_NAME} characters (it becomes part of every key), and {shown(name)} has {len(name):,}"
        )


def _check_policy(name: str, on_outage: object) -> None:
    if on_outage is not None and (not isinstance(on_outage, str) or on_outage not in ON_OUTAGE):
        raise ConfigurationError(
            f"rule {name!r}: on_outage is {shown(on_outage)}; it is {', '.join(ON_OUTAGE)}, or None for the storage's"
        )


def _check_units(name: str, what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"rule {name!r}: {what} is {shown(value)}; it is a whole number (int) of units")
    if not 1 <= value <= MAX_UNITS:
        raise ConfigurationError(f"rule {name!r}: {what} is {shown(value)}; it is from 1 to {MAX_UNITS:,} units")


def _timezone(name: str, timezone: object) -> str:
    """Check the name of a time zone."""
    if not isinstance(timezone, str):
        raise ConfigurationError(f'rule {name!r}: timezone is {shown(timezone)}; it is an IANA name, such as "Europe/Berlin"')
    try:
        zone_of(str.__str__(timezone))
    except (LookupError, ValueError, OSError):  # it isn't known, or is no name of a file
        known = available_timezones()
        if not known:
            raise ConfigurationError(
                f"rule {name!r}: this machine has no time zones, so that timezone is UTC; for {shown(timezone)} pip install tzdata"
            ) from None
        near = difflib.get_close_matches(timezone, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else 'it is an IANA name, such as "Europe/Berlin"'
        raise ConfigurationError(f"rule {name!r}: there is no time zone {shown(timezone)}; {hint}") from None
    return str.__str__(timezone)


def _anchor(name: str, unit: str, anchor: object) -> int:
    """Check the day that a window begins on. That of a day has none."""
    if unit == "day":
        if anchor is not None:
            raise ConfigurationError(f'rule {name!r}: anchor belongs to window="week" or "month"; a day begins at midnight')
        return 0
    if anchor is None:
        return 1
    if isinstance(anchor, bool) or not isinstance(anchor, int) or not 1 <= anchor <= ANCHORS[unit]:
        days = "1 (Monday) to 7 (Sunday)" if unit == "week" else "1 to 31, in a shorter month its last day"
        raise ConfigurationError(f"rule {name!r}: anchor is {shown(anchor)}; of a {unit} it is {days}")
    return int(anchor)


def _check_limit(name: str, limit: object) -> None:
    if limit is None or (isinstance(limit, float) and limit == math.inf):
        raise ConfigurationError(
            f"rule {name!r}: limit is {limit}; for no limit leave the rule out (a limit is 0 to {MAX_UNITS:,})"
        )
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise ConfigurationError(f"rule {name!r}: limit is {shown(limit)}; it is a whole number (int) of units")
    if not 0 <= limit <= MAX_UNITS:
        raise ConfigurationError(
            f"rule {name!r}: limit is {shown(limit)}; it is from 1 to {MAX_UNITS:,} units, or 0 to deny everything"
        )


def _rate_advice(rate: object, unit: str) -> str:
    """Say what to write instead of what isn't a rate."""
    days = NOT_FIXED.get(unit.removesuffix("s"))
    if days:
        named = unit.startswith("month")
        return f"a {unit.removesuffix('s')} has no fixed length: write it in days, such as {days}d" + (
            ', or say window="month" with strategy="fixed_window"' if named else ""
        )
    if isinstance(rate, str) and re.search(r"\d,\d", rate):
        return "a number has no commas: write 1000/s or 1_000/s"
    if isinstance(rate, str) and re.search("[;,]", rate):
        return f"for several rates there is parse_many; {RATE_FORM}"
    if isinstance(rate, str) and rate.strip().lower() in ("unlimited", "none", "inf", "infinity", "infinite"):
        return f"for no limit leave the rule out; {RATE_FORM}"
    return RATE_FORM


def _window_text(window_us: int) -> str:
    """Write a window in the largest unit that it is a whole number of."""
    units_us = {
        "w": 604_800_000_000,
        "d": 86_400_000_000,
        "h": 3_600_000_000,
        "m": 60_000_000,
        "s": 1_000_000,
        "ms": 1_000,
        "us": 1,
    }
    unit = next(unit for unit, us in units_us.items() if window_us % us == 0)
    return f"{window_us // units_us[unit]}{unit}"


def _window_us(name: str, window: object) -> int:
    if isinstance(window, timedelta):
        window_us: int | float = window // timedelta(microseconds=1)
    elif isinstance(window, bool) or not isinstance(window, (int, float)):
        raise ConfigurationError(f"rule {name!r}: window is {shown(window)}; it is seconds (int or float) or a timedelta")
    elif isinstance(window, float) and not math.isfinite(window):
        raise ConfigurationError(f"rule {name!r}: window is {window}; it is a finite number of seconds")
    else:
        window_us = window * 1_000_000
    if not MIN_WINDOW_US <= window_us <= MAX_WINDOW_US:
        raise ConfigurationError(f"rule {name!r}: window is {shown(window)}; it is from 1 ms to 366 days (int or float: seconds)")
    # 0.3 s is no exact double: what is within a thousandth of a whole µs, or its nearest double, was meant to be one.
    whole_us = round(window_us)
    if abs(window_us - whole_us) > 0.001 and whole_us / 1_000_000 != window:
        raise ConfigurationError(f"rule {name!r}: window is {shown(window)} s; it is a whole number of µs")
    return whole_us


def _ttl_us(name: str, ttl: object) -> int:
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not MIN_TTL_S <= ttl <= MAX_TTL_S:
        raise ConfigurationError(
            f"rule {name!r}: ttl is {shown(ttl)}; it is seconds (int or float), {MIN_TTL_S} to {MAX_TTL_S:,}"
        )
    return round(ttl * 1_000_000)


def _restore_concurrency(name: str, limit: int, ttl: float, on_outage: Any) -> ConcurrencyRule:
    return ConcurrencyRule(name, limit, ttl, on_outage=on_outage)


def _restore(name: str, limit: int, window: Any, options: dict[str, Any]) -> RateThrottleRule:
    return RateThrottleRule(name, limit, window, **options)
