"""What callers pass: costs, rules and keys that no one should."""

from __future__ import annotations

import asyncio
import random
from decimal import Decimal
from typing import Any

from ratethrottle import RateThrottleCore, RateThrottleRule, create_limiter
from ratethrottle.errors import ConfigurationError, InvalidRequest
from tests.faults.board import Run, row
from tests.faults.rows.callers import held_by
from tests.kit.servers import RedisServer

COSTS: tuple[Any, ...] = (
    float("nan"), float("inf"), -float("inf"), -1, 0, True, False, 1.5, 1.0, "5", b"5", None, [], 1j, Decimal(1),
    2**53, 2**63, 2**64, 10**30,
)  # fmt: skip  # a list to be read at a glance
KEYS: tuple[Any, ...] = (
    "",
    (),
    b"user",
    "\ud800",
    "a\udfffb",
    None,
    5,
    1.5,
    ["a"],
    ("a", b"b"),
    ("a", 1.5),
    ("a", None),
    ("a", True),
    ("\ud800",),
)
ODD_KEYS: tuple[Any, ...] = (
    "x" * 1_000_000, "\x00", "a\x00b", "\r\n", "a\r\nFLUSHALL\r\n", "{}", "{a}{b}", "*?[", "(s1:a", "=a", "#a", "ü" * 65,
    ("a",), ("a", 1), ("a", "1"),
)  # fmt: skip  # a list to be read at a glance


@row(short=True)
def bad_costs_and_rules(run: Run) -> None:
    """NaN, ±inf, −1, 0, True, 1.5, "5", 2^53, 2^63, 10^30, Decimal: a clear error before any I/O; state unchanged"""
    with RedisServer() as server, server.client() as client:

        async def main() -> None:
            async with create_limiter(
                "redis", redis_url=server.url, rules=[RateThrottleRule("r", 10, 3600)], deadline=5
            ) as limiter:
                await limiter.check("user", cost=3)
                before = {key: client.get(key) for key in client.scan_iter("*:=user")}
                asked = limiter.statistics().items
                for cost in COSTS:
                    asks = type(cost) is int and cost == 0  # what is left, which a peek may
                    for call in (limiter.check,) if asks else (limiter.check, limiter.peek):
                        await expect_refused(run, call, cost)
                run.expect(limiter.statistics().items == asked, "a bad cost reached Redis")
                run.expect(
                    {key: client.get(key) for key in client.scan_iter("*:=user")} == before, "a bad cost changed the state"
                )
                run.expect((await limiter.peek("user")).remaining == 7, "a bad cost consumed something")

        asyncio.run(main())
    for value in COSTS:
        for name, make in (
            ("limit", lambda value: RateThrottleRule("r", value, 1)),
            ("burst", lambda value: RateThrottleRule("r", 1, 1, strategy="token_bucket", burst=value)),
            ("window", lambda value: RateThrottleRule("r", 1, value)),
        ):
            fits = (
                (name == "window" and type(value) is float and value in {1.0, 1.5})
                or (name == "burst" and value is None)
                or (name == "limit" and type(value) is int and value == 0)  # denies everything
            )
            try:
                make(value)
            except ConfigurationError:
                run.expect(not fits, f"{name}={value!r} was refused")
            except Exception as error:  # noqa: BLE001  # any other kind is the finding
                run.expect(False, f"{name}={value!r} raised {error!r}")
            else:
                run.expect(fits, f"{name}={value!r} was taken")
    if not run.short:
        held_by(run, "tests/scripts/test_decide.py::test_bad_arguments_are_refused_and_state_stays_byte_for_byte")


async def expect_refused(run: Run, call: Any, cost: Any) -> None:
    """It raises our InvalidRequest."""
    try:
        answer = await call("user", cost=cost)
    except InvalidRequest:
        return
    except Exception as error:  # noqa: BLE001  # any other kind is the finding
        run.expect(False, f"{call.__name__}(cost={cost!r}) raised {error!r}")
        return
    run.expect(False, f"{call.__name__}(cost={cost!r}) gave {answer!r}")


@row()
def bad_keys(run: Run) -> None:
    """Empty, 1 MB, NUL, CR LF, braces, globs, lone surrogates, bytes: a typed error, or faithful; no collision; bounded in Redis"""
    rng = random.Random(run.seed)
    with RedisServer() as server, server.client() as client:

        async def main() -> None:
            rule = RateThrottleRule("r", 1, 3600, strategy="fixed_window")
            async with create_limiter("redis", redis_url=server.url, rules=[rule], deadline=10, on_outage="raise") as limiter:
                for key in KEYS:
                    await expect_invalid(run, limiter, key)
                run.expect(not client.keys("*:r:*"), "a bad key reached Redis")
                first = [bool(await limiter.check(key)) for key in ODD_KEYS]
                again = [bool(await limiter.check(key)) for key in ODD_KEYS]
                run.expect(
                    all(first), f"two odd keys are one: {[key[:20] for key, new in zip(ODD_KEYS, first, strict=True) if not new]}"
                )
                run.expect(not any(again), "an odd key is not found again")
                pairs = {(random_text(rng), random_text(rng)) for _ in range(run.count(1_000_000, 5_000))} - set(ODD_KEYS)
                batch = list(pairs)
                for start in range(0, len(batch), 5_000):
                    decisions = await limiter.check_many(batch[start : start + 5_000])
                    run.expect(all(decision.allowed for decision in decisions), "two different pairs are one key")
                    run.expect(
                        all(d.key == key for d, key in zip(decisions, batch[start : start + 5_000], strict=True)), "another's key"
                    )
                run.note(f"{len(batch)} random pairs are as many keys")

        asyncio.run(main())
        longest = max(map(len, client.scan_iter("*", count=10_000)))
        run.note(f"the longest key in Redis has {longest} bytes")
        run.expect(longest < 256, f"a key in Redis has {longest} bytes")
    held_by(run, "tests/unit/test_keys.py")


async def expect_invalid(run: Run, limiter: RateThrottleCore, key: Any) -> None:
    """It raises our InvalidRequest, and says nothing of the key."""
    try:
        answer = await limiter.check(key)
    except InvalidRequest:
        return
    except Exception as error:  # noqa: BLE001  # any other kind is the finding
        run.expect(False, f"the key {key!r} raised {error!r}")
        return
    run.expect(False, f"the key {key!r} was decided: {answer!r}")


def random_text(rng: random.Random) -> str:
    """A few characters that have a meaning somewhere."""
    return "".join(rng.choices("ab/:=#(){}*\x00\r\n,1ü", k=rng.randint(1, 5)))
