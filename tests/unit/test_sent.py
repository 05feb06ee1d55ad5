"""What clients have of their streams is kept within bounds, and given back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.sent import Store

EVENT = b'data: {"choices":[{"delta":{"content":"da\\r\\n"}}]}\n\n'
KIB = 1024


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@given(st.lists(st.tuples(st.binary(max_size=40), st.booleans()), max_size=20))
def test_the_framing_of_http_is_no_part_of_it(said: list[tuple[bytes, bool]]) -> None:
    events = [(b"data: %b\n\n" % text.replace(b"\n", b" "), framed) for text, framed in said]
    with Store().sent() as sent:
        for event, framed in events:
            sent.add(chunk(event) if framed else event)
        assert sent.events() == b"".join(event for event, _ in events)


def test_a_stream_that_says_too_much_is_kept_no_longer_and_gives_its_room_back() -> None:
    store = Store(room=256 * KIB, of_one=64 * KIB)
    with store.sent() as long, store.sent() as short:
        short.add(EVENT)
        for _ in range(64 * KIB // len(EVENT)):
            long.add(EVENT)
        assert long.events() is None
        assert short.events() == EVENT
        assert store.taken == 1
        long.add(EVENT)
        assert long.events() is None
    assert store.taken == 0


def test_where_all_streams_together_have_no_room_the_next_ones_are_not_kept() -> None:
    store = Store(room=32 * KIB)
    with store.sent() as first, store.sent() as second:
        first.add(EVENT)
        second.add(EVENT)
        with store.sent() as third:
            third.add(EVENT)
            assert third.events() is None
        assert (first.events(), second.events()) == (EVENT, EVENT)
    with store.sent() as later:
        later.add(EVENT)
        assert later.events() == EVENT
