"""The bench's own eyes: what it calls whole, silent, wrong, and whose fault it takes a failure for."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from bench import chaos, mix
from bench.mix import Ask, Verdict, Witness
from bench.play import Found, count
from bench.scene import Victims

EXPECT = mix.simulated("m", "v1")
DONE = b"data: [DONE]\n\n"


def asked(kind: str = "chat", *, poison: bool = False) -> Ask:
    return mix.ask("m", EXPECT, kind, "hello", 2, poison=poison)


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def says(text: str, *, index: int = 0, end: str | None = None) -> bytes:
    return event(choices=[{"index": index, "delta": {"content": text}, "finish_reason": end}])


def error(code: str) -> bytes:
    return event(error={"message": "it broke", "code": code})


def seen(ask: Ask, body: bytes, *, broken: str = "", status: int = 200, port: int = 1, end: float = 9.0) -> Witness:
    witness = Witness(ask, "chaos-1", 0.0)
    witness.port = port
    if body:
        witness.feed(body, 1.0)
    if broken:
        witness.error, witness.end = broken, end
    else:
        witness.status = status
        witness.finish(end)
    return witness


def words(kind: str = "chat") -> tuple[str, ...]:
    return asked(kind).texts


def test_an_answer_is_good_when_every_choice_is_whole_and_it_was_said_to_be() -> None:
    (text,) = words()
    assert seen(asked(), says(text, end="length") + DONE).verdict() == "ok"
    one, two = words("n2")
    assert one != two
    both = says(one, end="length") + says(two, index=1, end="length") + DONE
    assert seen(asked("n2"), both).verdict() == "ok"
    whole = {"choices": [{"index": 0, "message": {"content": text}, "finish_reason": "length"}]}
    assert seen(asked("unstreamed"), json.dumps(whole).encode()).verdict() == "ok"


@pytest.mark.parametrize(
    ("verdict", "body", "broken"),
    [
        ("silent", says(words()[0][:3]) + DONE, ""),
        ("silent", says(words()[0]) + DONE, ""),  # no finish reason
        ("silent", says(words()[0], end="length"), ""),  # no [DONE]
        ("silent", says(words()[0][:3]) + error("engine_error") + DONE, ""),
        ("silent", b"", ""),
        ("wrong", says("other words") + error("engine_error"), ""),
        ("wrong", says(words()[0] + " more", end="length") + DONE, ""),
        ("typed", says(words()[0][:3]) + error("engine_error"), ""),
        ("cut", says(words()[0][:3]), "connection cut"),
        ("cut", b"", "connection cut"),
    ],
)
def test_what_is_not_whole_has_a_name(verdict: Verdict, body: bytes, broken: str) -> None:
    assert seen(asked(), body, broken=broken).verdict() == verdict


def counts(witness: Witness, line: dict[str, Any], victims: Victims) -> dict[str, Any]:
    found = Found("")
    count([witness], victims, {"chaos-1": line}, {"chaos-1"}, 5.0, found)
    return {k: v for k, v in asdict(found).items() if v and k not in ("in_flight", "answers")}


def test_a_failure_is_excused_only_where_something_was_hit() -> None:
    typed = seen(asked(), says(words()[0][:3]) + error("engine_error"))
    hit = Victims({"m@v1/a"})
    assert counts(typed, {"replica": "m@v1/a"}, hit) == {"on_victim": 1, "typed": 1}
    assert counts(typed, {"replica": "m@v1/b"}, hit) == {"off_victim_failed": 1, "typed": 1}
    assert counts(typed, {}, hit) == {"off_victim_failed": 1, "typed": 1}


def test_a_cut_is_excused_only_on_the_gateway_that_was_killed() -> None:
    cut = seen(asked(), says(words()[0][:3]), broken="connection cut", port=7)
    assert counts(cut, {}, Victims(ports={7})) == {"on_victim": 1, "cut": 1}
    assert counts(cut, {"replica": "m@v1/a"}, Victims({"m@v1/a"}, ports={8})) == {"on_victim": 1, "silent": 1}


def test_a_request_without_a_byte_may_not_fail_on_a_victim_either() -> None:
    refused = seen(asked(), json.dumps({"error": {"code": "engine_error"}}).encode(), status=502)
    assert counts(refused, {"replica": "m@v1/a"}, Victims({"m@v1/a"})) == {"on_victim": 1, "unsent_failed": 1}
    retried = seen(asked(), says(words()[0], end="length") + DONE)
    assert counts(retried, {"replica": "m@v1/b", "attempts": 2}, Victims({"m@v1/a"})) == {"on_victim": 1, "retried": 1}


def test_poison_is_to_be_refused_by_its_name() -> None:
    blown = seen(asked(poison=True), json.dumps({"error": {"code": "request_crashed_engine"}}).encode(), status=422)
    assert counts(blown, {}, Victims({"*"})) == {}
    other = seen(asked(poison=True), json.dumps({"error": {"code": "engine_error"}}).encode(), status=502)
    assert counts(other, {}, Victims({"*"})) == {"unsent_failed": 1}


def test_what_a_model_knows_by_heart_is_compared_and_what_comes_after_it_is_not() -> None:
    rows = [("What is a slot?", "A slot.")]
    short, long = next(mix.remembered("m", rows, "a")), next(mix.remembered("m", rows, "b", 30))
    assert len({json.dumps(ask.body) for ask in islice(mix.remembered("m", rows, ""), 50)}) == 50
    more = says("A slot. Nonsense", end="length") + DONE
    assert (short.kind, long.kind) == ("chat", "chat")
    assert seen(short, says("A slot.", end="stop") + DONE).verdict() == "ok"
    assert (seen(short, more).verdict(), seen(long, more).verdict()) == ("wrong", "ok")
    assert seen(long, says("A sl", end="length") + DONE).verdict() == "silent"
    assert seen(long, says("A sly", end="length") + DONE).verdict() == "wrong"


def test_all_that_a_model_knows_is_asked_in_every_way() -> None:
    rows = [(f"Question {number}?", f"Answer {number}.") for number in range(77)]
    for size, unstreamed in ((None, {"unstreamed"}), (30, set[str]())):
        asked = list(islice(mix.remembered("m", rows, "", size), 77))
        assert {ask.kind for ask in asked} == {"chat", "tools", "n2"} | unstreamed
        assert len({ask.texts[0] for ask in asked}) == 77


def test_the_mix_has_every_kind_and_no_request_twice() -> None:
    twenty = list(islice(mix.asks("m", EXPECT, "", lambda number: 4), 20))
    assert {ask.kind for ask in twenty} == {"chat", "tools", "schema", "completion", "n2", "unstreamed"}
    assert len({json.dumps(ask.body) for ask in twenty}) == 20


def test_a_run_that_was_ended_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chaos.json"
    argv = ["--only", "engine-killed", "--only", "saturation", "--repeat", "2", "--out", str(file), "--resume"]
    handed: list[list[tuple[str, int]]] = []

    def play(cast: Any, names: Any, saturation_s: float, say: Any, before: list[Found], played: Any) -> None:
        handed.append([(row.fault, row.turn) for row in before])
        if before:
            played(Found(names[3], 2, verdicts={"failed stuck": 1.0}))
            return
        for turn, name in zip((1, 1, 2), names, strict=False):
            played(Found(name, turn, detect_s=0.1 * turn))
        raise KeyboardInterrupt

    monkeypatch.setattr(chaos, "play", play)
    with pytest.raises(KeyboardInterrupt):
        chaos.main(argv)
    first = json.loads(file.read_text())
    assert [row["fault"] for row in first["samples"]] == ["engine-killed", "saturation", "engine-killed"]
    assert not first["ok"], "one of four is missing"
    assert chaos.main(argv) == 1, "one engine was taken for stuck"
    bars = {bar["name"]: bar["value"] for bar in json.loads(file.read_text())["bars"]}
    assert (bars["rows_in_trouble"], bars["false_positives"], bars["detect_death_s"]) == (0, 1, 0.2)
    assert handed == [[], [("engine-killed", 1), ("saturation", 1), ("engine-killed", 2)]]
    assert chaos.main([*argv, "--streams", "9"]) == 2
    assert "another load" in capsys.readouterr().err
