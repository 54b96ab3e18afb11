"""Confs that do not travel: large ones lie in Redis, and a reference goes instead; and confs that are sealed.

======================================= ==================================================================
key                                     what
======================================= ==================================================================
``dagrelay:conf:<reference>``           string: the conf as JSON, compressed, and encrypted where there is a
                                        key. Without a time to live while somebody holds it
``dagrelay:conf:<reference>:held``      set: the ids of the requests (and fan-outs) that hold it
``dagrelay:conf:<reference>:new:<id>``  string, for an hour: one that is being uploaded in pieces
======================================= ==================================================================

**A reference** is the conf of a run whose real conf lies there: ``{"dagrelay_conf": "sha256:<hex>", "bytes":
N}``, the hash of the conf as canonical JSON, and the size of that. So equal confs are one, whatever the order
of their keys. Where there is a key the hash is an HMAC, and the reference names the key that made it:
``hmac-sha256:<key>:<hex>``. A plain hash would tell who can guess a conf that he has guessed right.

**Its life.** Who hands over a request uploads the conf first, for an hour; the script that accepts the
request makes it held, or does not accept it. Each request holds by its id (a fan-out for all of its parts),
and the script that ends it lets go: with the last of them the conf's time to live begins, which is never
shorter than that of a dead letter. What replays a letter, or hands on the conf of a run, holds it anew.

**A sealed conf** is one in a message: ``{"dagrelay_sealed": "<token>"}``, a Fernet token of the compressed
JSON. It is sealed where the message is made, and opened where the run is: queues, the parking lot, fan-outs
and dead letters have it sealed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..contract import (
    MAX_REFERENCED_BYTES,
    REFERENCE,
    SEALED,
    canonical_json,
    conf_bytes,
    is_sealed,
    reference_in,
)
from ..errors import ConfGone, ConfKeyMissing, ConfUnreadable
from ..settings import CONF_LIMIT_BYTES, read_conf
from .script import Script

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet
    from redis import Redis

PROVISIONAL_S: Final = 3600
"""How long a conf is kept that no request holds yet: far longer than the call takes that uploads it."""

PIECE_BYTES: Final = 1 << 20
"""How much is sent in one step: a call's time limit is for each step, and Redis serves others in between."""

LEVEL: Final = 3
"""Of zlib: half the time of its default for nearly the same size."""


def conf_key(reference: str) -> str:
    """Return the key of a stored conf."""
    return f"dagrelay:conf:{reference}"


class ConfKeys:
    """The Fernet keys that callers, workers and Airflow share: the first one seals, each of them opens.

    `text` has them with commas between them, as the settings do; none at all is a value too.
    """

    def __init__(self, text: str = "") -> None:
        self._keys = [one.strip() for one in text.split(",") if one.strip()]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __repr__(self) -> str:
        return f"<ConfKeys {', '.join(self.names) or 'none'}>"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What each key may be called in public: 8 hex digits of its hash."""
        return tuple(hashlib.sha256(f"dagrelay {key}".encode()).hexdigest()[:8] for key in self._keys)

    @cached_property
    def _fernet(self) -> MultiFernet:
        from cryptography.fernet import Fernet, MultiFernet  # here: nobody needs it without a key

        return MultiFernet([Fernet(key) for key in self._keys])

    def reference_of(self, data: bytes, like: str | None = None) -> str:
        """Return the reference of a conf as canonical JSON: by the first key, or as an other one was made.

        Raises ConfKeyMissing where that was made by a key that is not here.
        """
        name = self.check(like) if like is not None else self.names[0] if self._keys else ""
        if not name:
            return f"sha256:{hashlib.sha256(data).hexdigest()}"
        key = base64.urlsafe_b64decode(self._keys[self.names.index(name)])
        subkey = hmac.digest(key, b"dagrelay conf reference", "sha256")
        return f"hmac-sha256:{name}:{hmac.digest(subkey, data, 'sha256').hex()}"

    def references_of(self, data: bytes) -> list[str]:
        """Return the reference of a conf by the first key, by each of the others, and without one."""
        likes = [*(f"hmac-sha256:{name}:" for name in self.names), "sha256:"]
        return [self.reference_of(data, like) for like in likes]

    def check(self, reference: str) -> str:
        """Return the name of the key by which a reference was made; "" for none. Raises ConfKeyMissing."""
        name = reference.split(":")[1] if reference.startswith("hmac-") else ""
        if name and name not in self.names:
            raise ConfKeyMissing(f"the conf {reference}", name, ", ".join(self.names))
        return name

    def encrypt(self, data: bytes) -> bytes:
        """Return a Fernet token; the bytes that its text stands for."""
        return base64.urlsafe_b64decode(self._fernet.encrypt(data))

    def decrypt(self, token: bytes, what: str) -> bytes:
        """Return what is in a token. Raises ConfKeyMissing."""
        return self._decrypted(base64.urlsafe_b64encode(token), what)

    def seal(self, conf: Mapping[str, Any]) -> dict[str, Any]:
        """Return a conf as it travels in a message."""
        token = self._fernet.encrypt(zlib.compress(canonical_json(conf), LEVEL))
        return {SEALED: token.decode()}

    def open(self, conf: Any) -> Any:
        """Return a conf of a message as it was; one that is not sealed stays as it is.

        Raises ConfKeyMissing where it was sealed by a key that is not here.
        """
        if not is_sealed(conf):
            return conf
        what = "a sealed conf"
        return _read(
            _unpacked(self._decrypted(conf[SEALED].encode(), what), what, MAX_REFERENCED_BYTES), what
        )

    def _decrypted(self, token: bytes, what: str) -> bytes:
        """Return what is in a Fernet token. Raises ConfKeyMissing."""
        if not self:
            raise ConfKeyMissing(what, "", "")
        from cryptography.fernet import InvalidToken

        try:
            return self._fernet.decrypt(token)
        except InvalidToken:
            raise ConfKeyMissing(what, "", ", ".join(self.names)) from None


class Packed(NamedTuple):
    """A conf as it goes into a message: whole, sealed, or a reference."""

    conf: dict[str, Any] | None
    reference: str = ""
    """What the request is to hold; empty where the conf is in the message."""
    blob: Callable[[], bytes] | None = None
    """Makes what is to be stored; None where it is stored already."""


@dataclass(frozen=True)
class ConfRules:
    """How confs leave this process."""

    keys: ConfKeys = ConfKeys()  # noqa: RUF009 - frozen
    limit_bytes: int = CONF_LIMIT_BYTES

    def __str__(self) -> str:
        first, *others = self.keys.names or ("",)
        also = f", opened by {', '.join(others)} too" if others else ""
        sealed = f"sealed by key {first}{also}" if first else "not sealed (DAGRELAY_CONF_KEY is not set)"
        return f"{sealed}, by reference above {self.limit_bytes} bytes"

    def packed(self, conf: dict[str, Any] | None, by: str = "auto") -> Packed:
        """Return a checked conf as it goes into a message. `by`: as in `TriggerRequest.conf_by`."""
        if conf is None or is_sealed(conf):
            return Packed(conf)
        if (reference := reference_in(conf)) is not None:
            return Packed(conf, reference)
        if by == "reference" or (by == "auto" and conf_bytes(conf) > self.limit_bytes):
            data = canonical_json(conf)
            reference = self.keys.reference_of(data)
            made = {REFERENCE: reference, "bytes": len(data)}
            return Packed(made, reference, partial(_blob, data, self.keys))
        return Packed(self.keys.seal(conf) if self.keys else conf)


def read_conf_rules(environ: Mapping[str, str], mistakes: list[str]) -> ConfRules:
    """Return the rules that the environment gives, and note every mistake by its variable's name."""
    key, limit_bytes = read_conf(environ, mistakes)
    return ConfRules(ConfKeys(key), limit_bytes)


def _blob(data: bytes, keys: ConfKeys) -> bytes:
    compressed = zlib.compress(data, LEVEL)
    return keys.encrypt(compressed) if keys else compressed


def _unpacked(compressed: bytes, what: str, most_bytes: int) -> bytes:
    """Return what was compressed. Raises ConfUnreadable; never unpacks much more than it may be."""
    try:
        return zlib.decompressobj().decompress(compressed, most_bytes + 1)
    except zlib.error:
        raise ConfUnreadable(what, "it is damaged") from None


def _read(data: bytes, what: str) -> dict[str, Any]:
    try:
        conf = json.loads(data)
    except ValueError:
        conf = None
    if not isinstance(conf, dict):
        raise ConfUnreadable(what, "it is damaged")
    return conf


# Tell whether a conf is there, and keep it for a while at least. KEYS: the conf. ARGV: seconds.
_KEEP: Final = Script("""
local left = redis.call('TTL', KEYS[1])
if left == -2 then return 0 end
if left >= 0 and left < tonumber(ARGV[1]) then redis.call('EXPIRE', KEYS[1], ARGV[1]) end
return 1
""")

# Have what was uploaded in pieces in its place. KEYS: the conf, the upload. ARGV: its size, seconds.
_COMPLETE: Final = Script("""
if redis.call('EXISTS', KEYS[1]) == 0 then
  if redis.call('STRLEN', KEYS[2]) ~= tonumber(ARGV[1]) then
    return redis.error_reply('a piece of a conf was not written')
  end
  redis.call('RENAME', KEYS[2], KEYS[1])
  redis.call('EXPIRE', KEYS[1], ARGV[2])
else
  redis.call('EXPIRE', KEYS[2], 1)
  local left = redis.call('TTL', KEYS[1])
  if left >= 0 and left < tonumber(ARGV[2]) then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
end
return 1
""")

# Have a request hold a conf, unless it has ended. KEYS: the record, the conf. ARGV: the request's id, the
# reference. Returns 0 where there is no such conf. A request that came past our door has no record yet.
_HOLD: Final = Script("""
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'done' or state == 'failed' or state == 'cancelled' then return 1 end
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
local time = redis.call('TIME')
local now_text = string.format('%.6f', time[1] + time[2] / 1e6)
for _, name in ipairs({'accepted_at', 'due_at'}) do redis.call('HSETNX', KEYS[1], name, now_text) end
redis.call('HSETNX', KEYS[1], 'state', 'accepted')
redis.call('HSET', KEYS[1], 'conf_ref', ARGV[2])
redis.call('SADD', KEYS[2] .. ':held', ARGV[1])
redis.call('PERSIST', KEYS[2])
return 1
""")

HOLDING: Final = """
local function conf_of(about)  -- the reference among the fields of a record, with NUL between them
  local _, last = string.find(about, '\\0conf_ref\\0', 1, true)
  return last and string.match(about, '^%Z+', last + 1)
end
local function hold(reference, id)
  local conf = 'dagrelay:conf:' .. reference
  redis.call('SADD', conf .. ':held', id)
  redis.call('PERSIST', conf)
end
"""
"""Lua: `conf_of(about)` and `hold(reference, id)`, which does not look whether it is there."""

RELEASE: Final = """
local function release(reference, id, keep)
  local conf = 'dagrelay:conf:' .. reference
  if redis.call('SREM', conf .. ':held', id) == 1 and redis.call('EXISTS', conf .. ':held') == 0 then
    redis.call('EXPIRE', conf, keep)
  end
end
"""
"""Lua: `release(reference, id, seconds)`. With the last that holds a conf its time to live begins."""


def upload(client: Redis, packed: Packed | None) -> None:
    """Have a conf in Redis, for an hour at least, where a message refers to one that is not there yet.

    Raises what redis-py raises.
    """
    if packed is None or packed.blob is None:
        return
    key = conf_key(packed.reference)
    if _KEEP.run(client, (key,), (PROVISIONAL_S,)):
        return
    blob = packed.blob()
    if len(blob) <= PIECE_BYTES:
        if not client.set(key, blob, ex=PROVISIONAL_S, nx=True):
            _KEEP.run(client, (key,), (PROVISIONAL_S,))
        return
    new = f"{key}:new:{uuid.uuid4()}"
    view = memoryview(blob)
    client.set(new, bytes(view[:PIECE_BYTES]), ex=PROVISIONAL_S)  # one step: who dies leaves what expires
    for start in range(PIECE_BYTES, len(blob), PIECE_BYTES):
        client.setrange(new, start, bytes(view[start : start + PIECE_BYTES]))
    _COMPLETE.run(client, (key, new), (len(blob), PROVISIONAL_S))


def keep(client: Redis, references: Sequence[str]) -> list[bool]:
    """Have stored confs kept for an hour at least; tell of each whether it is there.

    Raises what redis-py raises.
    """
    with client.pipeline(transaction=False) as pipe:
        pipe.execute_command("SCRIPT", "LOAD", _KEEP.lua)
        for reference in references:
            _KEEP.queue(pipe, (conf_key(reference),), (PROVISIONAL_S,))
        return [bool(there) for there in pipe.execute()[1:]]


class ClaimChecks:
    """The stored confs in one Redis, and the keys for them. Every method raises what redis-py raises."""

    def __init__(self, client: Redis, keys: ConfKeys) -> None:
        self._client, self._keys = client, keys

    def hold(self, reference: str, task_id: str) -> None:
        """Have a request hold a conf. Raises ConfGone."""
        from .records import record_key

        if not _HOLD.run(self._client, (record_key(task_id), conf_key(reference)), (task_id, reference)):
            raise ConfGone(reference)

    def real(self, conf: Any) -> dict[str, Any]:
        """Return the real conf of a run, or of a message: what it refers to, or opened; {} for None.

        Raises ConfGone, ConfKeyMissing, ConfUnreadable.
        """
        reference = reference_in(conf)
        if reference is None:
            opened: dict[str, Any] = self._keys.open(conf)
            return {} if opened is None else opened
        what = f"the conf {reference}"
        name = self._keys.check(reference)
        blob: Any = self._client.get(conf_key(reference))
        if blob is None:
            raise ConfGone(reference)
        if name:
            blob = self._keys.decrypt(blob, what)
        data = _unpacked(blob, what, conf["bytes"])
        # Whoever can write to Redis is not to choose what a DAG runs with.
        if self._keys.reference_of(data, like=reference) != reference:
            raise ConfUnreadable(what, "what lies there is not what the reference names")
        return _read(data, what)

    def is_it(self, reference: str, conf: dict[str, Any] | None) -> bool:
        """Tell whether a reference is that of a conf. Raises ConfKeyMissing where that cannot be told."""
        return self._keys.reference_of(canonical_json(conf or {}), like=reference) == reference


__all__ = [
    "ClaimChecks",
    "ConfKeys",
    "ConfRules",
    "Packed",
    "conf_key",
    "keep",
    "read_conf_rules",
    "upload",
]
