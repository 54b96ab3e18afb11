"""How webhooks are signed, for callers and workers alike: workers sign with it, the gateway verifies. Pure.

- **standard**: Standard Webhooks (https://www.standardwebhooks.com). Signed are the message's id, the
  timestamp and the body; a secret is base64, with or without the prefix ``whsec_``. There may be several
  signatures, one for each secret, while a secret is being replaced.
- **github**: the body alone, in ``X-Hub-Signature-256``. A secret is any text.
- **stripe**: a timestamp and the body, in ``Stripe-Signature``. A secret is any text, prefix and all.
- **hmac**: the body alone, in a header of one's own.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping, Sequence
from typing import Final, Literal

Scheme = Literal["standard", "github", "stripe", "hmac"]
Algorithm = Literal["sha256", "sha512", "sha384", "sha1"]
Encoding = Literal["hex", "base64"]

SCHEMES: Final[tuple[Scheme, ...]] = ("standard", "github", "stripe", "hmac")
ALGORITHMS: Final[tuple[Algorithm, ...]] = ("sha256", "sha512", "sha384", "sha1")

ID: Final = "webhook-id"
TIMESTAMP: Final = "webhook-timestamp"
SIGNATURE: Final = "webhook-signature"
GITHUB_SIGNATURE: Final = "x-hub-signature-256"

SHORTEST_KEY_BYTES: Final = 24
"""Of a standard secret, as its specification has it."""

SHORTEST_SECRET: Final = 8
"""Of any other, in characters."""

_PREFIX: Final = "whsec_"


def key_of(scheme: Scheme, secret: str) -> bytes:
    """Return the key that a secret is. Raises ValueError, whose text says what is wrong and shows nothing."""
    if scheme != "standard":
        if len(secret) < SHORTEST_SECRET:
            raise ValueError(f"is shorter than {SHORTEST_SECRET} characters")
        return secret.encode()
    text = secret.removeprefix(_PREFIX)
    try:
        # Padding may be left out, as the official libraries let it be.
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is no base64, which a standard secret is after its whsec_") from None
    if len(key) < SHORTEST_KEY_BYTES:
        raise ValueError(f"holds fewer than {SHORTEST_KEY_BYTES} bytes: openssl rand -base64 32 makes one")
    return key


def mac(key: bytes, signed: bytes, algorithm: Algorithm = "sha256", encoding: Encoding = "hex") -> bytes:
    """Return a message authentication code, as text."""
    digest = hmac.digest(key, signed, algorithm)
    return base64.b64encode(digest) if encoding == "base64" else digest.hex().encode()


def standard_mac(key: bytes, delivery_id: str, timestamp: str, body: bytes) -> bytes:
    """Return the part after ``v1,`` of a signature."""
    return mac(key, f"{delivery_id}.{timestamp}.".encode() + body, encoding="base64")


def sign_standard(keys: Sequence[bytes], delivery_id: str, at: float, body: bytes) -> Mapping[str, str]:
    """Return the headers of a delivery; `at` is in seconds since 1970."""
    timestamp = str(int(at))
    signatures = [standard_mac(key, delivery_id, timestamp, body).decode() for key in keys]
    return {
        ID: delivery_id,
        TIMESTAMP: timestamp,
        SIGNATURE: " ".join(f"v1,{signature}" for signature in signatures),
    }


def sign_github(key: bytes, body: bytes) -> Mapping[str, str]:
    """Return the header of a delivery, as GitHub signs it."""
    return {GITHUB_SIGNATURE: f"sha256={mac(key, body).decode()}"}
