"""Passwords, keys and tokens in what bigtrain writes or prints: each is replaced by MASK. Free of torch."""

from __future__ import annotations

import os
import re
from typing import Any

MASK = "***"
SHORTEST = 8  # characters of a variable's value that is taken for a secret

# Prefixes and lengths as their issuers document them, and as gitleaks and detect-secrets look for them. Verbose, ASCII.
TOKENS = r"""
    (?<![A-Za-z0-9])(?:
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
"""
SECRET = re.compile(
    rf"""
      (?<=://)(?P<user>[^\s/?\#@:\[]*):(?!:|\d+(?:[/?\#\s]|$))  # user:password@ of an address; no port
        (?:[^\s/?\#]*|(?:(?!://)[^\s?\#@])*)@                   # an AWS key may hold a slash
    | (?<=://)[\w-]{{20,}}@                                     # a token in the place of the user
    | (?<=[?&;\#])(?P<parameter>[\w.-]*(?:token|key|key_?id|access_?id|secret|sig|signature|password|passwd|pwd|auth
        |credentials?)=)[^\s&;\#'"<>,()[\]{{}}]+
    | \b(?P<variable>[A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)=)[^\s'"<>,()[\]{{}}]+
    | (?P<bearer>\bBearer\s+)[\w.~+/=-]+
    | {TOKENS}
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)
VARIABLE = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|PRIVATE_KEY)$")


def masked(text: str) -> str:
    """A text without passwords in URLs, secret parameters of URLs, known forms of keys, and what the environment holds
    under names like HF_TOKEN and AWS_SECRET_ACCESS_KEY. Idempotent; where there is nothing to mask, the text as it is.

    The user of a URL stays, unless it looks like a key: two sources that differ in more than a secret still differ.
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and VARIABLE.search(name) and value in text:
            text = text.replace(value, MASK)
    return SECRET.sub(_mask, text)


def masked_values(value: Any) -> Any:
    """Plain values (dicts, lists, texts, numbers) with every text in them masked; keys stay."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {key: masked_values(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [masked_values(below) for below in value]
    return value


def _mask(found: re.Match[str]) -> str:
    user = found["user"]
    if user is not None:
        return f"{MASK if re.fullmatch(r'[A-Za-z0-9_-]{16,}', user) else user}:{MASK}@"  # AWS: a key in its place
    kept = found["parameter"] or found["variable"] or found["bearer"]
    if kept:
        return f"{kept}{MASK}"
    return f"{MASK}@" if found[0].endswith("@") else MASK
