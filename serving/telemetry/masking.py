"""What must not be in a log: keys, passwords and tokens that strayed into a message, as with an exception that shows headers.

A secret is found by what stands before it, a pattern of bounded length but for blanks, which are looked at where a name ends
right before them and never tried again, and it ends at the first mark that ends its kind of value; nothing behind it is looked
at twice. So the work grows with the text and no faster, whatever the text is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Blanks, and one end of a line: the next one may be another matter.
_GAP = r"[^\S\r\n]*+(?:(?:\r*+\n|\r)[^\S\r\n]*+)?+"
# A name counts by its end: AWS_SECRET_ACCESS_KEY, x-steelyard-secret, "clientSecret", X-Amz-Signature.
_BEGINS = re.compile(
    rf"""(?P<key> sk-steelyard-[0-9a-f]{{8}}- )  # a public id: it stays
      | (?P<token> \b(?: hf_ | gh[opsu]_ | github_pat_ | glpat- | xox[abp]- | sk-(?:ant|proj)- )(?=[\w-]{{16}}) )
      | (?P<url> :// )
      | (?i: (?P<bearer> \bbearer(?=\s){_GAP} )
           | (?P<mark> [-_?&.]? )
             (?P<name> x-steelyard-secret | x-api-key | authorization | secret | passw(?:or)?d | passphrase
                     | credentials? | signature | token | otlp_headers
                     | (?: api | access | secret | private | account | auth | ingest(?:ion)? | license )[-_.]?key
                     | (?<=-)team | (?<=[?&])(?:key|sig|auth) )
             (?P<closed> \\{{0,4}}["'] )? {_GAP} (?P<is> [:=] | ,(?=\ b') ) {_GAP}
             (?:b(?=['"]))? (?P<open> \\{{0,4}}["'] )? (?: (?:bearer|basic|token|api-?key)(?=\s){_GAP} )? )""",
    re.X,
)
# Without any of them there is nothing to look for, and most texts have none: a request's id, what engines print.
_HINTS = (
    *("://", "sk-", "hf_", "ghp_", "gho_", "ghs_", "ghu_", "github_pat_", "glpat-", "xox", "bearer"),
    *("secret", "passw", "passphrase", "credential", "signature", "authorization", "otlp_headers", "key", "team"),
    *("sig=", "auth=", "token=", "token:", "token ", "token\t", "token\r", "token\n", "token'", 'token"', "token\\"),
)
_PUBLIC = re.compile(r"sk-steelyard-(?:[0-9a-f]{8}-|\.\.\.)")
_TOKEN_END = re.compile(r"[^\w-]|$")
_LINE_END = re.compile(r"[\r\n]|$")
_VALUE_END = re.compile(r"""[\s"']|&(?=[\w.~-]{1,64}=)|$""")
_URL_END = re.compile(r'[\s"<>]|://|$')
_QUOTED_END = {"'": re.compile(r"""(?<!\\)'|[\r\n]|$"""), '"': re.compile(r"""(?<!\\)"|[\r\n]|$""")}
_PORT = re.compile(r"\d{1,5}(?=[/?#])")
_LOOK = 64  # characters by which a value is judged
# A digit, and not digits alone.
_RANDOM = re.compile(r"(?=[A-Za-z_.~+/=%-]*\d)(?!\d+(?:[^\w.~+/=%-]|$))[\w.~+/=%-]{6}")


def masked(text: str) -> str:
    """The text without the secrets in it: of a key of ours its public id stays, of others what they are."""
    low = text.lower()
    if not any(hint in low for hint in _HINTS):
        return text
    pieces, at = list[str](), 0
    for begin, end in _secrets(text):
        pieces += text[at:begin], "***"
        at = end
    return "".join((*pieces, text[at:]))


def _secrets(text: str) -> Iterator[tuple[int, int]]:
    """Where each begins and ends, in order."""
    at = 0
    while found := _BEGINS.search(text, at):
        begin = at = found.end()
        match found.lastgroup:
            case "key" | "token":
                end = _end(_TOKEN_END, text, begin)
            case "url":
                begin, end = _password(text, begin)
            case "bearer":
                end = _end(_VALUE_END, text, begin) if _looks_secret(text, begin) else begin
            case _:
                end = _value_end(text, found)
                inner = _BEGINS.match(text, begin)
                if (
                    inner is not None and inner.end() > end
                ):  # "token= authorization: ...": what it ends at is another's name
                    end = begin
        if end > begin:
            yield begin, end
            at = end


def _end(mark: re.Pattern[str], text: str, begin: int) -> int:
    found = mark.search(text, begin)
    assert found is not None  # the end of the text is a mark
    return found.start()


def _password(text: str, begin: int) -> tuple[int, int]:
    """Of a URL whose `://` ends at `begin`. One that was not encoded as it must be may hold any `@`, `/`, `?` and `#`."""
    url = text[begin : _end(_URL_END, text, begin)]
    authority = re.split("[/?#]", url, maxsplit=1)[0]
    user, colon, rest = url.partition(":")
    at = authority.rfind("@")
    nowhere = at >= 0 and at == len(authority) - 1  # no host behind it: it is the password's
    if nowhere or (at < 0 and not authority.startswith("[") and len(user) < len(authority) and not _PORT.match(rest)):
        at = url.rfind("@")
    if not colon or at < len(user):
        return begin, begin
    return begin + len(user) + 1, begin + at


def _value_end(text: str, found: re.Match[str]) -> int:
    """Where what was named ends; where it begins, if it is no secret."""
    begin, name = found.end(), found["name"].lower()
    told = found["closed"] or found["is"] == "=" or name in ("authorization", "x-api-key", "x-steelyard-secret")
    if not told or (name == "token" and found["mark"] not in ("?", "&")):
        if not _looks_secret(text, begin):
            return begin  # "cluster-secret: No such file", "pad_token=</s>"
    elif _PUBLIC.match(text, begin):
        return begin
    if found["open"]:
        quote = found["open"][-1]
        if len(found["open"]) == 1:
            return _end(_QUOTED_END[quote], text, begin)
        end = text.find(quote, begin)
        return begin + len(text[begin : end if end >= 0 else None].rstrip("\\"))
    if name == "otlp_headers":
        return _end(_LINE_END, text, begin)
    return begin + len(text[begin : _end(_VALUE_END, text, begin)].rstrip(",;)]}"))


def _looks_secret(text: str, begin: int) -> bool:
    return not _PUBLIC.match(text, begin) and _RANDOM.match(text, begin, begin + _LOOK) is not None
