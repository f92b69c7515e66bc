"""Personal data and secrets in a text, replaced by a placeholder that names their kind."""

from __future__ import annotations

import ipaddress
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

Span = tuple[int, int]
KINDS = ("secret", "email", "card", "ip", "phone")  # in this order: a phone's digits may be part of all others

# Prefixes and lengths as their issuers document them, and as gitleaks and detect-secrets look for them.
SECRET = re.compile(
    r"""
      -----BEGIN[ ](?:[A-Z0-9]+[ ])*PRIVATE[ ]KEY(?:[ ]BLOCK)?-----      # PEM and PGP; a torn one as far as it goes
        (?:(?:(?!-----BEGIN)[\s\S]){0,20000}?-----END[ ](?:[A-Z0-9]+[ ])*PRIVATE[ ]KEY(?:[ ]BLOCK)?-----
          |[A-Za-z0-9+/=\s\\:,-]*)
    | (?<![A-Za-z0-9])(?:
        (?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}                              # AWS access keys
      | gh[pousr]_[A-Za-z0-9]{36,255} | github_pat_[A-Za-z0-9_]{22,255}  # GitHub
      | glpat-[A-Za-z0-9_-]{20,}                                         # GitLab
      | sk-(?=[A-Za-z_-]{0,99}[0-9])[A-Za-z0-9_-]{20,}                   # OpenAI, Anthropic and those who follow them
      | [rs]k_(?:live|test)_[A-Za-z0-9]{16,}                             # Stripe
      | xox[abeoprs]-[A-Za-z0-9-]{10,}                                   # Slack
      | AIza[A-Za-z0-9_-]{35}                                            # Google
      | hf_[A-Za-z0-9]{34,}                                              # Hugging Face
      | npm_[A-Za-z0-9]{36} | pypi-AgE[A-Za-z0-9_-]{50,}                 # npm, PyPI
      | eyJ[\w-]{8,8000}\.eyJ[\w-]{8,8000}\.[\w-]*                       # JSON web tokens (RFC 7519)
      )
    | (?<=://)[^\s/:@<>]{1,100}:[^\s/@<>]{1,200}(?=@)                    # user:password of an address (RFC 3986)
    """,
    re.VERBOSE | re.ASCII,
)
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
EMAIL = re.compile(rf"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{{1,64}}@(?:{LABEL}\.)+[A-Za-z]{{2,63}}")
DIGITS = re.compile(r"(?<![A-Za-z0-9_.])[0-9](?:[ -]?[0-9]){12,}(?![A-Za-z0-9_]|\.[0-9])")
# Prefixes (ISO/IEC 7812) and lengths of Visa, Mastercard, American Express, Diners, JCB; 6: Discover and others.
CARD = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[689]\d)\d{11}|35\d{14}|6\d{15}(?:\d{3})?"
)
OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
IPV4 = re.compile(rf"(?<![A-Za-z0-9_.])(?:{OCTET}\.){{3}}{OCTET}(?![A-Za-z0-9_]|\.[0-9])")
# What stands before four numbers that are no address: a version, or the number of a section.
NUMBERED = re.compile(
    r"(?:\b(?:v|ver|versions?|release|build|sections?|chapter|figure|table)\.?[\s:'\"(]*|[§~]\s*|[=<>!~]=\s*|[a-z]/)$",
    re.IGNORECASE,
)
# Addresses that are somebody's begin with four digits: global ones (2000::/3), local ones (fc00::/7, fe80::/10).
IPV6 = re.compile(
    r"(?<![A-Za-z0-9_:.])(?:[23][0-9a-f]{3}|f[cd][0-9a-f]{2}|fe[89ab][0-9a-f]):[0-9a-f:]{1,39}"
    r"(?![A-Za-z0-9_:])",
    re.IGNORECASE,
)
DECIMAL = re.compile(r"[+\uff0b]?\d+\.\d{1,2}")  # a number of something
FOREIGN = re.compile(r"[+\uff0b]\W{0,3}\d")  # how a phone number with a country code begins


class Redaction:
    """Replaces personal data by `<EMAIL>`, `<PHONE>`, `<CARD>`, `<IP>`, `<SECRET>`. Idempotent.

    kinds: of KINDS. region: the country (ISO 3166, like `US`) whose phone numbers are known without `+`.
    placeholder: for all kinds, instead of theirs.
    """

    def __init__(self, kinds: Iterable[str] = KINDS, region: str | None = None, placeholder: str | None = None):
        finders: dict[str, Callable[[str], Iterator[Span]]] = {
            "secret": partial(_matches, SECRET),
            "email": _emails,
            "card": _cards,
            "ip": _addresses,
            "phone": partial(_phones, region=region),
        }
        chosen = set(kinds)
        self._finders = [(kind, placeholder or f"<{kind.upper()}>", finders[kind]) for kind in KINDS if kind in chosen]

    def __call__(self, text: str, found: Counter[str] | None = None) -> str:
        """The text redacted; `found` counts what was, by kind."""
        while True:  # what one replacement separates may be a match by itself; each takes characters away, so it ends
            before = text
            for kind, placeholder, find in self._finders:
                spans = list(find(text))
                if spans:
                    text = _replaced(text, spans, placeholder)
                if spans and found is not None:
                    found[kind] += len(spans)
            if text == before:
                return text


def passes_luhn(digits: str) -> bool:
    """Whether the last of the digits is the check digit of the others (ISO/IEC 7812-1, annex B; H. P. Luhn 1960)."""
    values = [int(digit) for digit in reversed(digits)]
    return (sum(values[::2]) + sum(sum(divmod(2 * value, 10)) for value in values[1::2])) % 10 == 0


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    return (match.span() for match in pattern.finditer(text))


def _emails(text: str) -> Iterator[Span]:
    if "@" in text:
        yield from _matches(EMAIL, text)


def _cards(text: str) -> Iterator[Span]:
    """Among digits that stand together, groups that make up a card's number."""
    for match in DIGITS.finditer(text):
        groups = [(match.start() + g.start(), g.group()) for g in re.finditer("[0-9]+", match.group())]
        i = 0
        while i < len(groups):
            taken = _card_at(groups[i : i + 19])
            if taken:
                start, digits = groups[i + taken - 1]
                yield groups[i][0], start + len(digits)
            i += max(taken, 1)


def _card_at(groups: Sequence[tuple[int, str]]) -> int:
    """How many of the groups, from the first, are a card's number; the most that are, or 0."""
    for count in range(len(groups), 0, -1):
        number = "".join(digits for _, digits in groups[:count])
        if CARD.fullmatch(number) and passes_luhn(number):
            return count
    return 0


def _addresses(text: str) -> Iterator[Span]:
    """IP addresses, but for those of this machine, of none, and netmasks: they are nobody's."""
    found = []
    for match in IPV4.finditer(text):
        address = ipaddress.ip_address(match.group())
        is_somebodys = not (address.is_loopback or match.group().startswith(("0.", "255.")))
        if is_somebodys and not NUMBERED.search(text, max(0, match.start() - 16), match.start()):
            found.append(match.span())
    if ":" in text:
        for match in IPV6.finditer(text):
            span = _address(text, *match.span())
            if span is not None:
                found.append(span)
    yield from _apart(found)


def _address(text: str, start: int, stop: int) -> Span | None:
    """The span without what ends a sentence, if it is an IPv6 address."""
    candidate = text[start:stop]
    for shorter in (candidate, candidate[:-1]):
        try:
            ipaddress.IPv6Address(shorter)
        except ValueError:
            continue
        return start, start + len(shorter)
    return None


def _phones(text: str, region: str | None) -> Iterator[Span]:
    """Valid numbers of any country as libphonenumber knows them."""
    if region is None and not FOREIGN.search(text):
        return
    import phonenumbers

    for match in phonenumbers.PhoneNumberMatcher(text, region, max_tries=sys.maxsize):
        number = match.raw_string
        opened = number.startswith("(") and number.count("(") > number.count(")")  # of a parenthesis around it
        if not DECIMAL.fullmatch(number):
            yield match.start + opened, match.end


def _apart(spans: list[Span]) -> Iterator[Span]:
    """Sorted, and without those that lie in an earlier one."""
    end = 0
    for start, stop in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start >= end:
            yield start, stop
            end = stop


def _replaced(text: str, spans: list[Span], placeholder: str) -> str:
    parts, end = [], 0
    for start, stop in spans:
        parts += [text[end:start], placeholder]
        end = stop
    return "".join([*parts, text[end:]])
