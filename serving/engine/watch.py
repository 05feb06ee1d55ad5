"""Looks at one running engine through its door: load, health, and whether it generates. `health.judge` has the say."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Literal

import aiohttp

from serving.engine import stats
from serving.engine.door import PROBE_HEADER, STATUS_PATH
from serving.engine.health import Judgement, Limits, Look, Memory, Probe, judge, limit_of

LOOK_S = 1.0  # longest wait for one answer
HEALTH_EVERY_S = 1.0
IDLE_EVERY_S = 5.0  # the counters of one that has nothing to do; of one that is busy in every look
PUT_OFF_TRIES = 5  # in a row may it be too busy for one token with nothing inside
_NO_SUCH_ROUTE = (404, 405, 501)  # a pooling model
_TROUBLE = (aiohttp.ClientError, TimeoutError, OSError, KeyError, ValueError, TypeError)


Answer = Literal[Probe, "busy"]


class Watch:
    """Of one engine that has generated its first token a moment ago. Load as of the last look."""

    def __init__(self, http: aiohttp.ClientSession, url: str, model: str, alive: Callable[[], bool]) -> None:
        self.in_flight = 0  # generations behind the door
        self.tokens = 0  # that they may take
        self.waiting = 0  # of them, in the engine's own queue
        self.kv_usage = 0.0
        self.stuck_after_s = 0.0  # without a step, while it has work, it is suspect
        self._http, self._url, self._model, self._alive = http, url, model, alive
        now = time.monotonic()
        self._memory = Memory(proved_at=now, read_at=now)
        self._probe: asyncio.Task[Answer] | None = None
        self._put_off = 0  # probes in a row that were told 503 while nothing was inside
        self._healthy = True
        self._vitals: stats.Vitals | None = None
        self._pace = stats.Pace()
        self._asked_health_at = self._counted_at = 0.0
        self._entered = self._counted_entered = 0

    async def look(self, limits: Limits) -> Judgement:
        """One look, and the verdict. Takes a few seconds at most, whatever the engine does."""
        began = time.monotonic()
        answers = await self._ask_door()
        mark = await self._look_deeper(began) if answers else None
        now = time.monotonic()
        look = Look(
            alive=self._alive(),
            answers=answers,
            waited_s=min(now - began, LOOK_S),
            healthy=self._healthy,
            in_flight=self.in_flight,
            entered=self._entered,
            inside=self._vitals.running + self._vitals.waiting if self._vitals else 0,
            mark=mark,
            probe=self._probed(),
            asleep=self._vitals is not None and self._vitals.asleep,
        )
        judged = judge(look, limits, self._memory, now)
        self._memory = judged.memory
        self.stuck_after_s = limit_of(limits, judged.memory)
        if judged.probe:
            self._probe = asyncio.create_task(generates(self._http, self._url, self._model))
        elif judged.memory.proved_at == now:  # also where it was proved otherwise
            self.close()
            self._put_off = 0
        return judged

    def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            self._probe = None

    async def _ask_door(self) -> bool:
        try:
            async with asyncio.timeout(LOOK_S), self._http.get(self._url + STATUS_PATH) as r:
                door = await r.json()
                self.in_flight, self.tokens = int(door["in_flight"]), int(door["tokens"])
                self._entered = int(door["entered"])
        except _TROUBLE:
            return False
        if not self.in_flight:
            self.waiting = 0
        return True

    async def _look_deeper(self, now: float) -> tuple[float, ...] | None:
        """/health and the counters, in their time; the counters, when they were read."""
        if now - self._asked_health_at >= HEALTH_EVERY_S:
            self._asked_health_at = now
            with contextlib.suppress(*_TROUBLE):
                async with asyncio.timeout(LOOK_S), self._http.get(self._url + "/health") as r:
                    self._healthy = r.status < 500
        idle = not self.in_flight and self._entered == self._counted_entered and self._probe is None
        if idle and now - self._counted_at < IDLE_EVERY_S:
            return None
        with contextlib.suppress(*_TROUBLE):
            async with asyncio.timeout(LOOK_S), self._http.get(self._url + stats.VITALS_PATH) as r:
                found = stats.vitals(await r.text()) if r.status == 200 else None
            self._counted_at, self._counted_entered, self._vitals = now, self._entered, found
            if found is not None:
                self.waiting, self.kv_usage = found.waiting, found.kv_usage
                return self._pace.mark(found)
        return None

    def _probed(self) -> Probe:
        if self._probe is None:
            return "none"
        if not self._probe.done():
            return "pending"
        done, self._probe = self._probe, None
        answer = done.result()
        self._put_off = self._put_off + 1 if answer == "busy" and not self.in_flight else 0
        if answer == "busy":
            return "refused" if self._put_off >= PUT_OFF_TRIES else "none"
        return answer


async def generates(http: aiohttp.ClientSession, url: str, model: str) -> Answer:
    """Asks the engine for one token, past its slots: nobody waits for it, and it counts as nobody's."""
    body = {"model": model, "prompt": "a", "max_tokens": 1, "temperature": 0}
    try:
        async with http.post(
            url + "/v1/completions", json=body, headers={PROBE_HEADER.decode(): "1"}, timeout=_PATIENT
        ) as r:
            await r.read()
            if r.status in (200, *_NO_SUCH_ROUTE):
                return "ok"
            if r.status == 503:  # it has too much to do, or says so
                return "busy"
            return "refused" if r.status >= 500 else "none"
    except _TROUBLE:
        return "none"  # nobody answers, which is told otherwise


_PATIENT = aiohttp.ClientTimeout(total=None)  # whoever waits judges, and cancels
