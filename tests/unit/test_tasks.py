"""Work that goes on for as long as its process does is not ended by one round that fails."""

from __future__ import annotations

import asyncio
import logging

import pytest

from serving import tasks


async def test_work_that_fails_is_done_again_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", 0.0)
    rounds = 0

    async def work() -> None:
        nonlocal rounds
        rounds += 1
        if rounds < 6:
            raise ValueError(f"trouble {rounds // 3}")

    with caplog.at_level(logging.ERROR):
        async with asyncio.timeout(10):
            await tasks.for_ever("counting rounds", work)
    assert rounds == 6
    assert [record.message for record in caplog.records] == ["counting rounds failed, and goes on"] * 2
    assert "trouble 0" in caplog.text and "trouble 1" in caplog.text, "each trouble once"


async def test_it_ends_where_its_owner_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", 0.0)
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.get_running_loop().create_future()

    task = tasks.for_ever("waiting", work)
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
