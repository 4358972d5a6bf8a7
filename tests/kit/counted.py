"""How many checks were decided, by rule and source."""

from __future__ import annotations

from ratethrottle import Outcomes, RateThrottleCore


def counted(core: RateThrottleCore) -> dict[str, dict[str, Outcomes]]:
    """What decided at least once."""
    decisions = core.statistics().decisions
    some = {
        rule: {source: found for source, found in sources.items() if found != Outcomes()} for rule, sources in decisions.items()
    }
    return {rule: sources for rule, sources in some.items() if sources}
