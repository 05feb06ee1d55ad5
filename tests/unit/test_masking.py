"""No secret reaches a log, and what is none stays as it was said."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.telemetry import masking
from serving.telemetry.masking import masked

TOKEN = "sk-steelyard-0123abcd-" + "Ab3_" * 10


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (f"Bearer {TOKEN}", "Bearer sk-steelyard-0123abcd-***"),
        (f"authorization: Bearer {TOKEN}", "authorization: Bearer sk-steelyard-0123abcd-***"),
        (f"x-api-key: {TOKEN}", "x-api-key: sk-steelyard-0123abcd-***"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer ***'}"),
        ("gave Bearer abc123def to it", "gave Bearer *** to it"),
        ("x-steelyard-secret: abc", "x-steelyard-secret: ***"),
        ('X-Steelyard-Secret: "abc"', 'X-Steelyard-Secret: "***"'),
        ('{"x-steelyard-secret":"a\\"c","y":1}', '{"x-steelyard-secret":"***","y":1}'),
        (r"{\"x-steelyard-secret\": \"abc\"}", r"{\"x-steelyard-secret\": \"***\"}"),
        ("[(b'x-steelyard-secret', b'abc')]", "[(b'x-steelyard-secret', b'***')]"),
        ("token hf_" + "a" * 34, "token hf_***"),
        ("GET s3://user:pass@host/x http://host:80/a@b", "GET s3://user:***@host/x http://host:80/a@b"),
        ("postgres://u:p@ss@host/db?x=1", "postgres://u:***@host/db?x=1"),
        ("postgres://u:p/s#s@host/db", "postgres://u:***@host/db"),
        ("postgres://u:0000@?@host/db", "postgres://u:***@host/db"),
        ("redis://:pw@host:6379/0", "redis://:***@host:6379/0"),
        ("http://h:80/a,redis://:pw@host", "http://h:80/a,redis://:***@host"),
        ("GET /v1/models?token=abc123def&limit=5", "GET /v1/models?token=***&limit=5"),
        ("https://h/x?limit=5&api_key=abc&y=1", "https://h/x?limit=5&api_key=***&y=1"),
        ("https://h/x?X-Amz-Signature=0a1b&y=1", "https://h/x?X-Amz-Signature=***&y=1"),
        ("AWS_SECRET_ACCESS_KEY=wJalr/x+n&p AWS_REGION=eu", "AWS_SECRET_ACCESS_KEY=*** AWS_REGION=eu"),
        ("OTEL_EXPORTER_OTLP_HEADERS=api-key=abc,auth=Basic xyz", "OTEL_EXPORTER_OTLP_HEADERS=***"),
        ("x-honeycomb-team: abc123def", "x-honeycomb-team: ***"),
        ("Client(api_key=abc, timeout=5)", "Client(api_key=***, timeout=5)"),
        ("password: hunter2", "password: ***"),
        (f"x-api-key:{' ' * 6}abc", f"x-api-key:{' ' * 6}***"),
        (f"x-api-key{' ' * 9}={' ' * 900}'abc' x", f"x-api-key{' ' * 9}={' ' * 900}'***' x"),
        ("authorization:\t\t\t\t\t\t Bearer       abc", "authorization:\t\t\t\t\t\t Bearer       ***"),
        ("with bearer          abc123def", "with bearer          ***"),
        ("token\t=\tabc123def", "token\t=\t***"),
        ("x-api-key:\r\n  abc123def", "x-api-key:\r\n  ***"),
        ("password=\rabc123def", "password=\r***"),
        ("password: \r\r\nhunter22", "password: \r\r\n***"),
    ],
)  # fmt: skip
def test_of_a_secret_only_its_name_stays(said: str, kept: str) -> None:
    assert masked(said) == kept


@pytest.mark.parametrize(
    "said",
    [
        "the authorization of tiny@v1",
        "authorization:\n\n  2026-11-22 all well with 1a2b3c",
        "no bearer\n\n2026-11-22 all well",
        "no valid API key: send `Authorization: Bearer sk-steelyard-...`; unknown, expired and revoked keys are refused",
        "cannot read the cluster secret /srv/state/cluster-secret: No such file or directory",
        "error: no secret: run `steelyard up`",
        "Avg generation throughput: 12.0 tokens/s, max_tokens=512, prompt_tokens: 12345678, eos_token_id=128009",
        'pad_token=</s>, eos_token: \'<|im_end|>\', bos_token=None, {"token": " hello", "logprob": -0.1}',
        "JSON is malformed: unexpected token: '}' at byte 5",
        "replica tiny@v1#a is at http://[::1]:8000/x@y and http://10.0.0.5:8000, mail ops@example.org",
        "Foo.bar(self, secret) missing; signature: (self, x: int)",
        "req_fecd5ce534de50e2a402b61a90e4a0df",
    ],
)
def test_what_is_no_secret_stays(said: str) -> None:
    assert masked(said) == said


PASSWORDS = st.text(st.characters(exclude_characters='"<>', exclude_categories=("Z", "C")), min_size=6).filter(
    # `host:80/path`, and `password@host/path`
    lambda p: "://" not in p and not re.match(r"\d{1,5}[/?#]|[^/?#]*@[^@/?#]+[/?#]", p)
)
VALUES = st.builds("a1{}7z".format, st.text(string.ascii_letters + string.digits + "+/=_.~%-", min_size=4))
AROUND = st.lists(
    st.sampled_from(["x", " ", "5", ":", "=", "'", "@", "/", "&", "é", "\n", "token", "http://h:80/ "])
).map("".join)
SHAPES = [
    "x-steelyard-secret: {}", "'x-api-key': '{}'", '"authorization":"Bearer {}"', "HF_TOKEN={}", "?token={}&a=b",
    "&key={}", "AWS_SECRET_ACCESS_KEY={}", "(b'authorization', b'Basic {}')", "client_secret={}", "Bearer {}",
    r'{{\"password\":\"{}\"}}', "secret: {}", "OTLP_HEADERS=a=b,c={}",
]  # fmt: skip


@settings(max_examples=40)
@given(AROUND, st.sampled_from(["postgres://u:", "redis://:", "amqp+ssl://some.user:"]), PASSWORDS)
def test_no_password_of_a_url_survives(before: str, url: str, password: str) -> None:
    kept = masked(f"{before} {url}{password}@host/path")
    assert kept.endswith((f"{url}***@host/path", "= ***", ": ***"))  # all of it where it stands behind a secret's name


@settings(max_examples=40)
@given(AROUND, st.sampled_from(SHAPES), st.integers(1, 40), VALUES, AROUND)
def test_no_named_secret_survives(before: str, shape: str, blanks: int, value: str, after: str) -> None:
    said = shape if "(b'" in shape else shape.replace(" ", " " * blanks)
    assert value not in masked(f"{before} {said.format(value)} {after}")


WORDS = ["secret", "token", "api_key", "x-api-key", "password", "the", "of", "://", "5", "http://h:80/x"]


@settings(max_examples=40)
@given(st.lists(st.sampled_from(WORDS)))
def test_words_without_a_value_stay(words: list[str]) -> None:
    text = " and ".join(words)
    assert masked(text) == text


NASTY = [
    "token:", "secret=)", "://u:", "://:a@", "://a:b/", "secret:", "bearer ", "-secret\\", "'\"secret", "secret    ",
    "&secret=&", "?key=", "hf_", "sk-steelyard-", "password:\"\\", "a", "=", "@", "\\", "secret='",
    "x-api-key" + " " * 20_000, "x-api-key" + " " * 99, "secret:" + " " * 99,
]  # fmt: skip


@pytest.mark.parametrize("piece", NASTY)
def test_nothing_is_looked_at_more_than_twice(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (piece * (16_384 // len(piece) + 1))[:16_384]
    looked = 0

    class Counted:
        """A pattern that tells how far it went for its answer."""

        def __init__(self, real: re.Pattern[str]) -> None:
            self._real = real

        def search(self, of: str, at: int) -> re.Match[str] | None:
            nonlocal looked
            found = self._real.search(of, at)
            looked += (found.end() if found else len(of)) - at
            return found

        def match(self, of: str, at: int) -> re.Match[str] | None:
            return self._real.match(of, at)  # at one place: the length of the pattern bounds it, see below

    for name in ("_BEGINS", "_TOKEN_END", "_LINE_END", "_VALUE_END", "_URL_END"):
        monkeypatch.setattr(masking, name, Counted(getattr(masking, name)))
    monkeypatch.setattr(masking, "_QUOTED_END", {q: Counted(p) for q, p in masking._QUOTED_END.items()})
    masked(text)
    assert looked <= 2 * len(text) + 64


def test_what_a_secret_begins_with_is_short_but_for_blanks() -> None:
    """So a search that fails at a place has looked at so many characters there, and no more; at blanks only where a name ends
    right before them, without a second try."""
    import re._parser as parser  # type: ignore[import-not-found]

    for pattern in (masking._BEGINS, masking._RANDOM, masking._PUBLIC, masking._PORT):
        but_for_blanks = re.sub(r"(\[\^\\S\\r\\n\]|\\r)\*\+", r"\1", pattern.pattern)
        assert parser.parse(but_for_blanks, pattern.flags).getwidth()[1] <= 64
