"""One id follows a request: from the client, to the engine, to the answer and into the log."""

from __future__ import annotations

import re

import pytest

from tests.gateway.harness import CHAT, MESSAGES, Front, chat

OURS = re.compile(r"req_[0-9a-f]{32}")


@pytest.mark.parametrize("given", ["a", "my-id_1:2.3", "x" * 128])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_clients_id_goes_all_the_way(gateway: Front, given: str, stream: bool) -> None:
    answer = await gateway.ask(body=chat(stream=stream), headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given
    assert f'"chatcmpl-{given}"'.encode() in answer.body  # the engine makes its id of it
    assert (await gateway.line(given))["status"] == 200


@pytest.mark.parametrize("given", ["", " ", "a b", 'x"y', "x" * 129, "é", "a,b", "../x", "<script>"])
async def test_an_id_that_is_no_plain_token_is_replaced(gateway: Front, given: str) -> None:
    answer = await gateway.ask(body=chat(), headers={"x-request-id": given})
    assert OURS.fullmatch(answer.headers["x-request-id"])


async def test_every_answer_has_an_id_of_its_own(gateway: Front) -> None:
    asked = [("GET", "/healthz"), ("GET", "/nowhere"), ("POST", CHAT), ("POST", MESSAGES), ("GET", "/v1/models")]
    ids = [(await gateway.ask(path, b"{", method=method)).headers["x-request-id"] for method, path in asked]
    assert len(set(ids)) == len(asked) and all(map(OURS.fullmatch, ids))


async def test_anthropic_clients_find_it_where_they_look(gateway: Front) -> None:
    answer = await gateway.ask(MESSAGES, b"{", headers={"x-request-id": "mine"})
    assert (answer.headers["request-id"], answer.json()["request_id"]) == ("mine", "mine")


async def test_the_log_line_tells_the_request_and_not_what_was_said(gateway: Front) -> None:
    secret = "the password is swordfish"
    await gateway.ask(body=chat(secret, model="pirate"), headers={"x-request-id": "told"})
    line = await gateway.line("told")
    expected = {"model": "tiny", "version": "v1", "adapter": "pirate", "route": CHAT, "reason": "ok", "attempts": 1}
    assert expected.items() <= line.items()
    assert line["replica"] == gateway.engines[0].endpoint.id
    assert line["key_id"] and line["key_id"] not in ("", None) and line["e2e_ms"] >= line["queue_ms"]
    log = gateway.log.path.read_text()
    assert "swordfish" not in log and gateway.keys.all not in log


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [(CHAT, b"{", "invalid_request"), (CHAT, b'{"model":"nobody"}', "model_not_found"), ("/nowhere", b"", "not_found")],
)
async def test_refusals_are_written_down_by_their_code(front: Front, path: str, body: bytes, reason: str) -> None:
    await front.ask(path, body, headers={"x-request-id": "refused"})
    line = await front.line("refused")
    assert (line["reason"], line["route"], line["model"]) == (reason, path, None)
    assert front.metric("steelyard_requests_total", model="unknown", reason=reason) == 1


async def test_a_path_of_any_length_makes_no_new_series(front: Front) -> None:
    await front.ask("/" + "x" * 5000, b"", headers={"x-request-id": "long"})
    assert len((await front.line("long"))["route"]) == 200
    assert front.metric("steelyard_requests_total", route="other", status="404") == 1
