"""Times by the clock: cron's five fields in a timezone. Pure; what cannot be raises ValueError, which says what is allowed."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError


def zone(name: str) -> ZoneInfo:
    """The timezone of that name."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"timezone {name!r} is not known; write one like Europe/Berlin") from None


def check_cron(expression: str) -> str:
    """`expression`, when it is a time that ever comes."""
    try:
        if len(expression.split()) != 5:
            raise CronSimError("Wrong number of fields")
        next(CronSim(expression, datetime(2026, 1, 1, tzinfo=UTC)))
    except (CronSimError, StopIteration) as e:
        raise ValueError(f"no cron time ({e or 'it never comes'}); write five fields, e.g. 0 8 * * 1-5") from None
    return expression
