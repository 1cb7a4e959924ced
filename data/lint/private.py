"""Secrets and personal data, found by their patterns. What is found is never handed on whole."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

# Kind → (a text without which the pattern cannot be there, the pattern). The formats are those that
# their issuers document; a group, where there is one, is the secret within what tells it.
_SECRETS = {
    "aws_access_key": (("AKIA", "ASIA"), r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "aws_secret_key": (
        ("aws", "AWS"),
        r"(?i:aws_?secret_?(?:access_?)?key)\W{1,8}([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
    ),
    "github_token": (
        ("gh", "github_pat_"),
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255})\b",
    ),
    "gitlab_token": (("glpat-",), r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "hugging_face_token": (("hf_",), r"\bhf_[A-Za-z0-9]{34,}\b"),
    "openai_or_anthropic_key": (("sk-",), r"\bsk-(?:[a-z]+[0-9]*-)?[A-Za-z0-9_-]{32,}"),
    "google_api_key": (("AIza",), r"\bAIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])"),
    "slack_token": (("xox",), r"\bxox[abeoprs]-[0-9A-Za-z-]{10,}"),
    "stripe_key": (("k_live_",), r"\b[rs]k_live_[0-9A-Za-z]{24,}"),
    "json_web_token": (("eyJ",), r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{16,}"),
    "private_key": (
        ("PRIVATE KEY",),
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    ),
    "password_in_url": (("://",), r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"]+:([^\s/:@'\"{}$<>]+)@[\w.-]"),
}
_PATTERNS = {kind: (signs, re.compile(pattern)) for kind, (signs, pattern) in _SECRETS.items()}
_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b"
)
_EMAIL_SIGN = re.compile(r"\w@\w")
# Names that RFC 2606 keeps for examples, and what looks like an address but is a file's name or a
# repository's.
_EXAMPLE_DOMAIN = re.compile(
    r"@(?:.*\.)?(?:example\.(?:com|net|org)|.*\.(?:example|invalid|test|localhost))$", re.IGNORECASE
)
_NO_ADDRESS = re.compile(r"^git@|\.(?:png|jpe?g|gif|svg|webp|py|js|ts|css|html?)$", re.IGNORECASE)
_ADDRESS = re.compile(r"(?<![\w.-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w.-]*[\w-])")
_ADDRESS_SIGN = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]")


def private_data(text: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, masked example) for each kind of secret or personal data in a text.

    Beside the kinds of secrets there are `email_address`, `example_email_address` (at a domain that
    is kept for examples) and `ip_address` (public; those of private networks tell nothing).
    """
    for kind, (signs, pattern) in _PATTERNS.items():
        if any(sign in text for sign in signs) and (found := pattern.search(text)):
            yield kind, masked(found[found.lastindex or 0])
    if "@" in text and _EMAIL_SIGN.search(text):
        # What stands before the host of a URL is no name.
        text = _PATTERNS["password_in_url"][1].sub("", text) if "://" in text else text
        addresses = [address for address in _EMAIL.findall(text) if not _NO_ADDRESS.search(address)]
        real = [address for address in addresses if not _EXAMPLE_DOMAIN.search(address)]
        if real:
            yield "email_address", masked(real[0])
        elif addresses:
            yield "example_email_address", masked(addresses[0])
    if _ADDRESS_SIGN.search(text):
        public = [address for address in _ADDRESS.findall(text) if _is_public(address)]
        if public:
            yield "ip_address", masked(public[0])


def masked(secret: str) -> str:
    """Return the beginning of a secret, a quarter of it and at most four characters."""
    return f"{secret[: max(1, min(4, len(secret) // 4))]}… ({len(secret)} characters)"


def _is_public(address: str) -> bool:
    try:
        return ipaddress.IPv4Address(address).is_global
    except ValueError:
        return False
