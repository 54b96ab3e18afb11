"""`Idempotency-Key`: a request that is sent twice is one.

Source: draft-ietf-httpapi-idempotency-key-header-07. The task id is made from the sender's key and this one,
so that Redis itself, which accepts an id once, keeps them apart: there is no moment at which an answer of yes
is not known yet to a second sender, and hence no 409 but for a fan-out, which is written in several steps.
What was asked lies in the record as a hash (`fingerprint`, by the key for confs where there is one): another
request under the same key is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Final

from fastapi import Request

from ..contract import PollRequest, TriggerRequest
from ..errors import ConfKeyMissing
from ..stores.claim_check import ConfKeys
from .base import Problem, gateway_of

MOST_CHARACTERS: Final = 200

# A string of RFC 8941, section 3.3.3; or, as most senders write it, its characters alone.
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_PLAIN = re.compile(r"[!#-+\--:<-\[\]-~]+")

MALFORMED: Final = (
    f"Idempotency-Key: give one string of 1 to {MOST_CHARACTERS} printable ASCII characters in double "
    'quotes, such as "8e03978e-40d5-43dd-bc93-6894a57f9324"'
)
REUSED: Final = (
    "Idempotency-Key: was used before for another request: send that one again, or take another key"
)
IN_PROGRESS: Final = "Idempotency-Key: the first request with it is still being taken: ask again in a moment"


def idempotency_key(request: Request) -> str | None:
    """Return the request's key. Raises Problem: 400 for a malformed one, or one missing where it must be."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        if gateway_of(request).settings.require_idempotency_key:
            raise Problem(400, f"Idempotency-Key: is missing, and required here. {MALFORMED}")
        return None
    key = parsed(given[0]) if len(given) == 1 else None
    if key is None:
        raise Problem(400, MALFORMED)
    return key


def parsed(text: str) -> str | None:
    """Return the key in a header's value, None for one that is malformed."""
    text = text.strip(" \t")
    if found := _QUOTED.fullmatch(text):
        text = re.sub(r"\\(.)", r"\1", found[1])
    elif not _PLAIN.fullmatch(text):
        return None
    return text if 0 < len(text) <= MOST_CHARACTERS else None


def fingerprint(request: TriggerRequest | PollRequest) -> str:
    """Return what two requests have in common if and only if they ask for the same."""
    return digest(request.fields_of(request.to_message()))


def digest(value: Any) -> str:
    """Return the hash of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def kept(asked: str, keys: ConfKeys) -> str:
    """Return a fingerprint, or a digest, as it lies in Redis: no conf is to be guessed by it, if there is a
    key for confs."""
    return keys.reference_of(asked.encode())


def is_same(there: str, asked: str, keys: ConfKeys) -> bool:
    """Tell whether what lies there was made of the same request.

    Where it was made by a key that is not here any more, that cannot be told: it is taken for the same, or
    whoever sends his request again would have it done twice, under another key.
    """
    try:
        return keys.reference_of(asked.encode(), like=there) == there
    except ConfKeyMissing:
        return True
