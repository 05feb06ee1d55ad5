"""Who may ask: no key 401, wrong scope 403, in the words of each dialect; keys come and go without a restart."""

from __future__ import annotations

import time

import anthropic
import openai
import pytest

from serving.gateway import app
from serving.gateway.keys import create_key, revoke_key
from serving.gateway.routes import OWN, REFUSED, SERVED
from tests.gateway.harness import CHAT, MESSAGES, EngineRoom, Front, Keys, chat, eventually

OPEN = [path for path, scope in OWN.items() if scope == ""]


def bad_tokens(keys: Keys) -> list[str]:
    return ["nonsense", keys.all[:-1], keys.all.swapcase(), keys.expired, keys.revoked]


async def test_openai_users_get_an_authentication_error(gateway: Front, keys: Keys) -> None:
    for token in bad_tokens(keys):
        with pytest.raises(openai.AuthenticationError) as caught:
            await gateway.openai(token).chat.completions.create(**chat())
        assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")


async def test_anthropic_users_get_an_authentication_error(gateway: Front, keys: Keys) -> None:
    for token in bad_tokens(keys):
        with pytest.raises(anthropic.AuthenticationError) as caught:
            await gateway.anthropic(token).messages.create(**chat())
        assert caught.value.request_id == caught.value.body["request_id"]


async def test_every_reason_for_401_is_told_alike(gateway: Front, keys: Keys) -> None:
    answers = [await gateway.ask(body=chat(), key=token) for token in ("", *bad_tokens(keys))]
    assert {(a.status, a.headers["www-authenticate"]) for a in answers} == {(401, "Bearer")}
    assert len({a.error["message"] for a in answers}) == 1


async def test_nothing_but_health_is_open(front: Front) -> None:
    for path in {*SERVED, *OWN, *REFUSED, "/nowhere"} - {*OPEN}:
        for method in ("GET", "POST"):
            assert (await front.ask(path, method=method, key="")).status == 401, path
    for path in OPEN:
        assert (await front.ask(path, method="GET", key="")).status in (200, 503)


async def test_either_header_carries_the_key_on_either_dialect(gateway: Front, keys: Keys) -> None:
    for headers in ({"authorization": f"bearer {keys.all}"}, {"x-api-key": keys.all}):
        for path in (CHAT, "/tokenize"):
            body = chat() if path == CHAT else {"model": "tiny", "prompt": "x"}
            assert (await gateway.ask(path, body, key="", headers=headers)).status == 200


async def test_a_key_for_one_model_is_no_key_for_another(gateway: Front, keys: Keys) -> None:
    with pytest.raises(openai.PermissionDeniedError) as caught:
        await gateway.openai(keys.other).chat.completions.create(**chat())
    assert (caught.value.code, "infer:tiny" in caught.value.message) == ("scope_missing", True)
    with pytest.raises(anthropic.PermissionDeniedError):
        await gateway.anthropic(keys.other).messages.create(**chat())
    assert await gateway.openai(keys.tiny).chat.completions.create(**chat())


async def test_a_key_for_one_version_opens_that_version_only(gateway: Front, keys: Keys, room: EngineRoom) -> None:
    _, token = create_key(keys.path, name="test", scopes=["infer:tiny@v2"], now=time.time())
    gateway.gateway.keys.reload_if_changed()
    gateway.table(room.shared(), room.shared(version="v2"))
    assert (await gateway.ask(body=chat(model="tiny@v2"), key=token)).status == 200
    assert (await gateway.ask(body=chat(model="pirate@v2"), key=token)).status == 200
    assert (await gateway.ask(body=chat(model="tiny"), key=token)).status == 403


async def test_a_key_without_an_infer_scope_generates_nothing(gateway: Front, keys: Keys) -> None:
    answer = await gateway.ask(body=chat(), key=keys.metrics)
    assert (answer.status, answer.error["code"]) == (403, "scope_missing")


@pytest.fixture
def quick_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "KEYS_CHECK_EVERY_S", 0.01)


async def test_a_key_works_and_stops_working_without_a_restart(quick_reload: None, gateway: Front, keys: Keys) -> None:
    key, token = create_key(keys.path, name="test", scopes=["infer:tiny"], now=time.time())

    async def status() -> int:
        return (await gateway.ask(body=chat(), key=token)).status

    await eventually("the new key works", lambda: _is(status, 200))
    revoke_key(keys.path, key.id, time.time())
    await eventually("the revoked key does not", lambda: _is(status, 401))
    assert (await gateway.ask(body=chat())).status == 200


async def _is(status: object, wanted: int) -> bool:
    return bool(await status() == wanted)


async def test_a_key_that_expires_stops_working_by_itself(gateway: Front, keys: Keys) -> None:
    now = time.time()
    _, token = create_key(keys.path, name="test", scopes=["infer:tiny"], now=now, expires_at=now + 0.2)
    gateway.gateway.keys.reload_if_changed()
    await eventually("it has expired", lambda: time.time() > now + 0.2)
    assert (await gateway.ask(MESSAGES, chat(), key=token)).json()["error"]["type"] == "authentication_error"
