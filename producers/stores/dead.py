"""The desk for failures: what failed for good, kept until somebody has seen to it.

======================================= ==================================================================
key                                     what
======================================= ==================================================================
``dagrelay:dead``                       sorted set: id of a dead letter → when it came
``dagrelay:dead-replayed``              sorted set: the same, of those that were replayed
``dagrelay:dead:<id>``                  hash, kept 14 days (the workers' settings say how long): the letter
``dagrelay:dead-dropped``               counter: letters that went unseen, because there were too many
``dagrelay:look:<id>``                  list, for minutes: what a worker says of runs somebody asks about
======================================= ==================================================================

A letter's id is that of the task that failed. Its fields, all text: ``at`` (when it failed), ``request``
(JSON: task, args, kwargs, callbacks, errbacks, chain, priority), ``history`` (one line each: instant, space,
words), ``traceback``, ``replayed_as``, ``replayed_at``, ``replayed_by``; what the record said
(`letters.FROM_RECORD`). A message that no worker could read, and whose request is not known, has ``raw`` (its
bytes) and ``queue_key`` (the list where it lay) instead; ``unrecorded`` says that no request has ended with
it.

A letter is written by the script that ends its request (`records.STORE_DEAD`), and only then its message is
acknowledged: so at every moment what fails is on its way, or on the desk. REPLAY marks the letter in the
script that sends its successor: so nothing is replayed twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .. import errors
from .claim_check import upload
from .letters import DEAD, DROPPED, LETTERS, REPLAYED, Keeping, dead_key
from .records import ACCEPT, KEEP_S, Accepted, Script, buried_with, record_key

if TYPE_CHECKING:
    from redis import Redis

EXPIRED: Final = "Expired"
"""The error of what expired before a worker could begin it; its caller gets RequestCancelled."""

DESK_LOOK: Final = "tasks.desk_look"
"""The task that asks Airflow for the runs of dead letters."""

LOOK_PAGE: Final = 50
"""How many runs one such task asks for."""

LOOK_KEPT_S: Final = 600
"""For how long what it says is kept."""

READ_AT_ONCE: Final = 200
"""Letters that a listing reads in one step, without their requests."""

IDS_AT_ONCE: Final = 10_000
COUNTED_AT_ONCE: Final = 1000
SENT_AT_ONCE_BYTES: Final = 1 << 20


def look_key(look_id: str) -> str:
    """Return the list of what workers say of the runs that a look asks for."""
    return f"dagrelay:look:{look_id}"


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter. Instants are seconds since 1970 by Redis' clock; what is not known is None."""

    id: str
    at: float
    """When it failed."""
    task: str | None = None
    dag_id: str | None = None
    dag_run_id: str | None = None
    key: str | None = None
    connection: str | None = None
    service: str | None = None
    job_id: str | None = None
    reference: str | None = None
    by: str | None = None
    fan_out: str | None = None
    accepted_at: float | None = None
    due_at: float | None = None
    attempts: int = 0
    unsure: bool = False
    """An answer was lost: the run may exist."""
    error: str | None = None
    """The class in `errors`, or `Expired`."""
    error_args: list[Any] | None = None
    reason: str | None = None
    """Why, in Airflow's or the service's words."""
    replay_of: str | None = None
    replayed_as: str | None = None
    replayed_at: float | None = None
    replayed_by: str | None = None
    queue_key: str | None = None
    unrecorded: bool = False
    request_bytes: int = 0
    """0 where the request is not known."""
    raw_bytes: int = 0
    # Only where the letter is read by itself:
    traceback: str | None = None
    history: tuple[tuple[float, str], ...] = ()
    request: dict[str, Any] | None = None
    raw: bytes | None = None

    @property
    def told(self) -> str:
        """The reason as it may be listed: without the words of errors that are not ours, which may quote."""
        if self.reason and self.error != EXPIRED and not _is_ours(self.error):
            return f"{self.error}: its words may quote a value, and are shown with --with-conf"
        return self.reason or ""

    def to_json(self) -> dict[str, Any]:
        """Return what is known and may be listed, as JSON values: not the request, which holds the conf."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["request"], values["raw"]
        if self.told != self.reason:
            values |= {"reason": self.told, "error_args": None}
        values["history"] = [{"at": at, "what": what} for at, what in self.history]
        return {name: value for name, value in values.items() if value not in (None, "", [], False)}


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters: all that is given must be so. Instants are seconds since 1970."""

    dag_id: str | None = None
    error: str | None = None
    connection: str | None = None
    service: str | None = None
    key_prefix: str | None = None
    reason: str | None = None
    """A part of the reason, whatever its case."""
    fan_out: str | None = None
    since: float | None = None
    until: float | None = None
    replayed: bool = False
    """Those that were replayed, instead of those that were not."""

    def takes(self, letter: Letter) -> bool:
        """Tell whether a letter is among them, as far as its fields say."""
        connection, service = self.connection, self.service
        return (
            self.dag_id in (None, letter.dag_id)
            and self.error in (None, letter.error)
            and (connection is None or connection.lower() == letter.connection)
            and (service is None or service.lower() == letter.service)
            and self.fan_out in (None, letter.fan_out)
            and (self.key_prefix is None or (letter.key or "").startswith(self.key_prefix))
            and (self.reason is None or self.reason.lower() in (letter.reason or "").lower())
        )


def _is_ours(error: str | None) -> bool:
    known = getattr(errors, error or "", None)
    return (
        isinstance(known, type) and issubclass(known, errors.DagrelayError) and known is not errors.TaskFailed
    )


class Replayed(NamedTuple):
    """What became of a replay: sent, replayed (before), gone (there is no such letter), or no conf (what its
    conf refers to is gone)."""

    verdict: str
    task_id: str
    """The id of what came of the letter; empty where there is none."""


_LIGHT: Final = tuple(
    field.name
    for field in fields(Letter)
    if field.name not in ("id", "request_bytes", "raw_bytes", "traceback", "history", "request", "raw")
)

# Send the successor of a letter, and mark the letter. KEYS: the record and the queue of the successor, the
# letter. ARGV: what ACCEPT takes of the successor, the letter's id, the successor's, by whom. Returns the
# verdict and the id of what came of the letter.
REPLAY: Final = Script(
    """
local letter = table.remove(KEYS)
local by, new, id = table.remove(ARGV), table.remove(ARGV), table.remove(ARGV)
local function accept()
"""
    + ACCEPT.lua
    + """
end
local known = redis.call('HMGET', letter, 'at', 'replayed_as')
if not known[1] then return {'gone', ''} end
-- The successor's own id: this call is repeated, because its answer was lost.
if known[2] then return {known[2] == new and 'sent' or 'replayed', known[2]} end
if accept() == '2' then return {'no conf', ''} end
local at = redis.call('TIME')
at = string.format('%.6f', at[1] + at[2] / 1e6)
redis.call('HSET', letter, 'replayed_as', new, 'replayed_at', at, 'replayed_by', by)
redis.call('ZREM', 'dagrelay:dead', id)
redis.call('ZADD', 'dagrelay:dead-replayed', known[1], id)
redis.call('RPUSH', 'dagrelay:history:' .. id, at .. ' replayed as ' .. new .. ' by ' .. by)
redis.call('EXPIRE', 'dagrelay:history:' .. id, """
    + str(KEEP_S)
    + """)
return {'sent', new}
"""
)

# Put a message that was put aside back to its queue, as it was, and mark the letter. KEYS: the letter. ARGV:
# its id, by whom. Returns the verdict.
PUT_BACK: Final = Script("""
local known = redis.call('HMGET', KEYS[1], 'at', 'replayed_as', 'raw', 'queue_key')
if not known[1] then return {'gone', ''} end
if known[2] then return {'replayed', known[2]} end
if not known[3] or not known[4] then return {'gone', ''} end
redis.call('HDEL', KEYS[1], '')  -- nothing: a deletion first, so that it goes on where Redis is full
redis.call('LPUSH', known[4], known[3])
local at = redis.call('TIME')
redis.call('HSET', KEYS[1], 'replayed_as', ARGV[1], 'replayed_by', ARGV[2],
  'replayed_at', string.format('%.6f', at[1] + at[2] / 1e6))
redis.call('HDEL', KEYS[1], 'raw')
redis.call('ZREM', 'dagrelay:dead', ARGV[1])
redis.call('ZADD', 'dagrelay:dead-replayed', known[1], ARGV[1])
return {'sent', ARGV[1]}
""")

# KEYS: none. ARGV: by whom, ids. Returns a text with 1 for each letter that was there.
DISCARD: Final = Script(
    LETTERS
    + """
local found = {}
local at = redis.call('TIME')
at = string.format('%.6f', at[1] + at[2] / 1e6)
for i = 2, #ARGV do
  local id = ARGV[i]
  local there = redis.call('EXISTS', 'dagrelay:dead:' .. id)
  unbury(id)
  if there == 1 and redis.call('EXISTS', 'dagrelay:record:' .. id) == 1 then
    redis.call('RPUSH', 'dagrelay:history:' .. id, at .. ' dead letter discarded by ' .. ARGV[1])
    redis.call('EXPIRE', 'dagrelay:history:' .. id, """
    + str(KEEP_S)
    + """)
  end
  found[#found + 1] = there
end
return table.concat(found)
"""
)

# Letters that have expired are still named in the sets. KEYS: none. ARGV: ids. One that came again stays.
FORGET: Final = Script("""
for _, id in ipairs(ARGV) do
  if redis.call('EXISTS', 'dagrelay:dead:' .. id) == 0 then
    redis.call('ZREM', 'dagrelay:dead', id)
    redis.call('ZREM', 'dagrelay:dead-replayed', id)
  end
end
return 1
""")

# KEYS: none. ARGV: ids. Returns the errors of these letters and how many have each, in turn.
COUNT: Final = Script("""
local count = {}
for _, id in ipairs(ARGV) do
  local error = redis.call('HGET', 'dagrelay:dead:' .. id, 'error')
  if error then count[error] = (count[error] or 0) + 1 end
end
local answer = {}
for error, many in pairs(count) do
  answer[#answer + 1] = error
  answer[#answer + 1] = many
end
return answer
""")

# Put what is on no record on the desk. KEYS: none. ARGV: id, seconds to keep it, how many there may be,
# fields in pairs. Returns how many went for it.
BURY: Final = Script(
    LETTERS
    + """
local time = redis.call('TIME')
local more = {unpack(ARGV, 4)}
local id, now = ARGV[1], time[1] + time[2] / 1e6
return bury('dagrelay:record:' .. id, id, now, tonumber(ARGV[2]), tonumber(ARGV[3]), more)
"""
)


class Dead:
    """The dead letters in one Redis. Every method raises what redis-py raises."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    # What operators do

    def size(self) -> int:
        """Return how many there are that nobody has replayed; one or the other may just have expired."""
        return int(self._client.zcard(DEAD))

    def replayed(self) -> int:
        """Return how many were replayed, and are still kept."""
        return int(self._client.zcard(REPLAYED))

    def dropped(self) -> int:
        """Return how many went unseen so far, because there were too many."""
        return int(self._client.get(DROPPED) or 0)

    def oldest_at(self) -> float | None:
        """Return when the oldest came that nobody has replayed, in seconds since 1970."""
        first: list[Any] = self._client.zrange(DEAD, 0, 0, withscores=True)
        return float(first[0][1]) if first else None

    def count_by_error(self) -> dict[str, int]:
        """Return how many there are of each error that nobody has replayed."""
        counts: dict[str, int] = {}
        for ids in self._ids(Filter(), COUNTED_AT_ONCE):
            found = COUNT.run(self._client, (), ids)
            for error, many in zip(found[::2], found[1::2], strict=True):
                counts[_text(error)] = counts.get(_text(error), 0) + int(many)
        return counts

    def list(self, wanted: Filter = Filter()) -> Iterator[Letter]:
        """Yield letters without their requests, the newest first."""
        for ids in self._ids(wanted, READ_AT_ONCE):
            for letter in self.some(ids).values():
                if wanted.takes(letter):
                    yield letter

    def _ids(self, wanted: Filter, page: int) -> Iterator[Sequence[str]]:
        """Yield the ids of letters, page by page, the newest first. What comes meanwhile is left out."""
        since = f"{wanted.since:.6f}" if wanted.since is not None else "-inf"
        before = f"{wanted.until:.6f}" if wanted.until is not None else "+inf"
        name = REPLAYED if wanted.replayed else DEAD
        seen: set[str] = set()
        while True:
            # By score, not by place: the caller may take letters off the desk as they come.
            found: list[Any] = self._client.zrevrangebyscore(
                name, before, since, start=0, num=IDS_AT_ONCE, withscores=True
            )
            new = [letter_id for raw, _ in found if (letter_id := _text(raw)) not in seen]
            for start in range(0, len(new), page):
                yield new[start : start + page]
            if len(found) < IDS_AT_ONCE or not new:
                return
            seen.update(new)
            before = f"{found[-1][1]:.6f}"

    def some(self, ids: Sequence[str]) -> dict[str, Letter]:
        """Return those of these letters that there are, without their requests."""
        with self._client.pipeline(transaction=False) as pipe:
            for letter_id in ids:
                pipe.hmget(dead_key(letter_id), _LIGHT)
                pipe.hstrlen(dead_key(letter_id), "request")
                pipe.hstrlen(dead_key(letter_id), "raw")
            answers: list[Any] = pipe.execute()
        found: dict[str, Letter] = {}
        gone: list[str] = []
        for i, letter_id in enumerate(ids):
            values, request_bytes, raw_bytes = answers[3 * i : 3 * i + 3]
            known = {name: value for name, value in zip(_LIGHT, values, strict=True) if value is not None}
            if "at" not in known:
                gone.append(letter_id)
                continue
            found[letter_id] = _letter(letter_id, known, int(request_bytes), int(raw_bytes))
        if gone:
            FORGET.run(self._client, (), gone)
        return found

    def get(self, letter_id: str) -> Letter | None:
        """Return one letter, whole, or None."""
        raw = self._client.hgetall(dead_key(letter_id))
        if not raw:
            return None
        known = {_text(name): value for name, value in raw.items()}
        return _letter(letter_id, known, len(known.get("request", b"")), len(known.get("raw", b"")))

    def replay(self, sent: Sequence[tuple[str, Accepted]], by: str) -> Sequence[Replayed]:
        """Send successors of letters, each once; return what became of each.

        `sent` has the ids of the letters, and what is to be accepted for each. Where the connection breaks
        some may have been sent, and others not: what was is marked.
        """
        answers: list[Any] = []
        for some in _in_parts(sent):
            with self._client.pipeline(transaction=False) as pipe:
                pipe.execute_command("SCRIPT", "LOAD", REPLAY.lua)
                for letter_id, item in some:
                    upload(self._client, item.conf)
                    keys = (record_key(item.task_id), item.queue, dead_key(letter_id))
                    REPLAY.queue(pipe, keys, (*item.args(), letter_id, item.task_id, by))
                answers += pipe.execute()[1:]
        return [Replayed(_text(verdict), _text(task_id)) for verdict, task_id in answers]

    def put_back(self, letter_id: str, by: str) -> Replayed:
        """Put a message that was put aside back to its queue as it was."""
        verdict, task_id = PUT_BACK.run(self._client, (dead_key(letter_id),), (letter_id, by))
        return Replayed(_text(verdict), _text(task_id))

    def discard(self, ids: Sequence[str], by: str) -> Sequence[bool]:
        """Take letters off the desk; return for each whether it was there."""
        found: list[bool] = []
        for start in range(0, len(ids), COUNTED_AT_ONCE):
            page = ids[start : start + COUNTED_AT_ONCE]
            found += [digit == "1" for digit in _text(DISCARD.run(self._client, (), (by, *page)))]
        return found

    # What is said of runs

    def say(self, look_id: str, said: Mapping[str, Any]) -> None:
        """Tell whoever asks what is known of some runs."""
        with self._client.pipeline() as pipe:
            pipe.rpush(look_key(look_id), json.dumps(said))
            pipe.expire(look_key(look_id), LOOK_KEPT_S)
            pipe.execute()

    def heard(self, look_id: str, after: int = 0) -> Sequence[dict[str, Any]]:
        """Return what was said so far, without the first ones."""
        return [json.loads(text) for text in self._client.lrange(look_key(look_id), after, -1)]

    # What workers do

    def bury(self, letter_id: str, letter: Mapping[str, str | bytes], keeping: Keeping) -> int:
        """Put a message that no request has ended with on the desk; return how many letters went for it."""
        args = (letter_id, *buried_with({**letter, "unrecorded": "1"}, keeping))
        return int(BURY.run(self._client, (), args))


def _in_parts(sent: Iterable[tuple[str, Accepted]]) -> Iterator[list[tuple[str, Accepted]]]:
    """Yield them in parts that are not too large for one round trip."""
    part: list[tuple[str, Accepted]] = []
    size = 0
    for letter_id, item in sent:
        part.append((letter_id, item))
        size += len(item.message)
        if size >= SENT_AT_ONCE_BYTES or len(part) == READ_AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def _letter(letter_id: str, known: Mapping[str, Any], request_bytes: int, raw_bytes: int) -> Letter:
    """Return a letter as its fields say it."""
    text = {name: _text(value) for name, value in known.items() if name != "raw"}

    def number(name: str) -> float | None:
        return float(text[name]) if text.get(name) else None

    plain = {name: text[name] for name in _LIGHT if name in text and name not in _NOT_TEXT}
    return Letter(
        letter_id,
        float(text["at"]),
        **plain,
        accepted_at=number("accepted_at"),
        due_at=number("due_at"),
        replayed_at=number("replayed_at"),
        attempts=int(text.get("attempts") or 0),
        unsure=text.get("unsure") == "1",
        unrecorded=text.get("unrecorded") == "1",
        error_args=json.loads(text["error_args"]) if text.get("error_args") else None,
        request_bytes=request_bytes,
        raw_bytes=raw_bytes,
        traceback=text.get("traceback"),
        history=tuple(_history(text.get("history", ""))),
        request=json.loads(text["request"]) if text.get("request") else None,
        raw=known.get("raw"),
    )


_NOT_TEXT: Final = (
    "at",
    "accepted_at",
    "due_at",
    "replayed_at",
    "attempts",
    "unsure",
    "unrecorded",
    "error_args",
)


def _history(lines: str) -> Iterator[tuple[float, str]]:
    for line in lines.split("\n"):
        at, _, words = line.partition(" ")
        with suppress(ValueError):  # it is empty, or the rest of a line whose words had several
            yield float(at), words


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
