"""Where the windows of a calendar begin: days, weeks and months of a time zone, as integer µs."""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, date, datetime, timedelta, tzinfo
from hashlib import blake2b
from typing import Final
from zoneinfo import ZoneInfo

Spec = tuple[str, str, int]  # "day", "week" or "month"; the time zone; the day of the month or week that a window begins on

# Of a window. A month's is that of the Gregorian calendar, which repeats after 400 years.
MEAN_US: Final = {"day": 86_400_000_000, "week": 604_800_000_000, "month": 2_629_746_000_000}
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
DAY: Final = timedelta(days=1)


def number_of(spec: Spec) -> int:
    """Give the number, from 1 to 2^52 − 1, that a calendar has in stored states: the same in every process and version."""
    unit, timezone, anchor = spec
    digest = blake2b(f"{unit},{anchor},{timezone}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) % (2**52 - 1) + 1


def zone_of(timezone: str) -> tzinfo:
    """Find a time zone. Raises ZoneInfoNotFoundError, or another error for what is no name of one."""
    return UTC if timezone == "UTC" else ZoneInfo(timezone)


def boundaries(spec: Spec, from_us: int, until_us: int) -> list[int]:
    """Find where windows begin, from the one that contains `from_us` to the first one after `until_us`."""
    unit, timezone, anchor = spec
    zone = zone_of(timezone)
    margin = timedelta(days=2)  # a time zone is less than a day away
    day = first_day(unit, anchor, (EPOCH + timedelta(microseconds=from_us)).date() - margin)
    instants = [instant_of(day, zone)]
    while instants[-1] <= until_us:
        day = next_day(unit, anchor, day)
        at_us = instant_of(day, zone)
        # A day that a time zone has skipped is no window.
        if at_us > instants[-1]:
            instants.append(at_us)
    kept = [at_us for at_us in instants if at_us > from_us]
    return instants[len(instants) - len(kept) - 1 :]


def first_day(unit: str, anchor: int, day: date) -> date:
    """Find the first day of the window that a day is in."""
    if unit == "day":
        return day
    if unit == "week":
        return day - (day.weekday() + 1 - anchor) % 7 * DAY
    begins = in_month(day.year, day.month, anchor)
    return begins if begins <= day else in_month(day.year - (day.month == 1), (day.month - 2) % 12 + 1, anchor)


def next_day(unit: str, anchor: int, day: date) -> date:
    """Find the first day of the window after the one that begins on this day."""
    if unit != "month":
        return day + (DAY if unit == "day" else 7 * DAY)
    return in_month(day.year + day.month // 12, day.month % 12 + 1, anchor)


def in_month(year: int, month: int, day: int) -> date:
    """Give that day of a month, or its last one."""
    return date(year, month, min(day, monthrange(year, month)[1]))


def instant_of(day: date, zone: tzinfo) -> int:
    """Find the first instant of a day, in µs since 1970-01-01 00:00 UTC."""
    # If the clock shows midnight twice, it is the first one. If it skips midnight, the day begins where the clock goes on.
    midnight = datetime(day.year, day.month, day.day, tzinfo=zone)
    late = seconds_of(midnight)
    if shown(late - 1, zone) < day:
        return late * 1_000_000
    early = late - 86_400
    while late - early > 1:
        middle = (early + late) // 2
        if shown(middle, zone) < day:
            early = middle
        else:
            late = middle
    return late * 1_000_000


def seconds_of(instant: datetime) -> int:
    """Count the seconds since 1970-01-01 00:00 UTC."""
    return round((instant - EPOCH) / timedelta(seconds=1))


def shown(seconds: int, zone: tzinfo) -> date:
    """Give the date that a clock in the zone shows."""
    return (EPOCH + timedelta(seconds=seconds)).astimezone(zone).date()
