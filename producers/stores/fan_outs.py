"""Fan-outs: many requests that were accepted together, and end together.

Each request is one like any other, with a record and a result of its own; what holds them together:

======================================= ==================================================================
key                                     what
======================================= ==================================================================
``dagrelay:fan-out:<id>``               hash, from acceptance to 14 days after the end: total, chunks,
                                        on_error, then (a signature as JSON), ended, failed, cancelled
                                        (counts), stopped (why nothing more is started), outside:<chunk> (how
                                        many of its requests have a message of their own and have not ended),
                                        launched, then_sent, over
``dagrelay:fan-out:<id>:requests``      hash: chunk → its requests, a JSON list of the Celery messages that
                                        they would have had by themselves; ``ids:<chunk>`` → the place of the
                                        first, and their ids. Until the chunk has ended
``dagrelay:fan-out:<id>:outcomes``      hash: place → outcome as JSON, as they come. Until the end
``dagrelay:fan-out:<id>:confs``         set: the stored confs of its requests, which it holds. Until the end
``dagrelay:record:<id>``                the record of the fan-out itself; `fan_out` is its own id
``dagrelay:record:<request's id>``      `fan_out`, `part` (chunk and place) and `outside` of a request
======================================= ==================================================================

The id is that of the chord's body; all others that belong to it are made from it (`chunk_id` and the others
below), so that scripts can name them, Flower shows what belongs together, and whatever is done twice is done
to the same messages.

Steps, each one script: ADD_CHUNK writes some requests with their records, which expire after weeks until
their chunk is begun; ACCEPT_FAN_OUT accepts all of it, or nothing; SEND_ONCE pushes the chord's messages;
BEGIN_CHUNK tells what is to be done of a chunk; END_ITEMS writes results, records and outcomes of what became
a run; LEAVE gives messages of their own to those that did not; CLOSE_CHUNK tells whether any of these are
still to be waited for; SEND_ONCE pushes the callback. The end of a request with a message of its own is told
to its fan-out by the script that writes it (`records.PART_ENDED`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from ..contract import VERSION
from ..errors import ConfGone
from .claim_check import HOLDING, Packed, upload
from .envelope import _envelope
from .records import CONF_KEEP_S, ENDED, KEEP_S, PART_ENDED, RESULT_PREFIX, Script, record_key
from .waits import CANCELLED, DUE, PARKED, Waits, seen_key

if TYPE_CHECKING:
    from redis import Redis

FAN_OUT: Final = "tasks.fan_out"
TRIGGER_CHUNK: Final = "tasks.trigger_chunk"
FAN_OUT_END: Final = "tasks.fan_out_end"
WATCH_FAN_OUT: Final = "tasks.watch_fan_out"

CHUNK_ITEMS: Final = 200
CHUNK_BYTES: Final = 1_000_000
AT_ONCE_BYTES: Final = 2_000_000
"""How much a call sends before it waits for Redis' answers."""

OUTCOMES_AT_ONCE: Final = 16
"""How many outcomes are read in one step where they are large: each may be over a megabyte."""

FIRST_WATCH_S: Final = 60.0

ASKED_BY: Final = "asked by "
"""How the reason of what somebody cancelled begins."""


def fan_out_key(fan_out_id: str) -> str:
    """Return the hash of a fan-out."""
    return f"dagrelay:fan-out:{fan_out_id}"


def chunk_id(fan_out_id: str, index: int) -> str:
    """Return the task id of a chunk."""
    return f"{fan_out_id}.{index}"


def launcher_id(fan_out_id: str) -> str:
    """Return the task id of what launches the chord."""
    return f"{fan_out_id}.launch"


def group_id(fan_out_id: str) -> str:
    """Return the id of the chord's header."""
    return f"{fan_out_id}.header"


def watch_id(fan_out_id: str) -> str:
    """Return the task id of what watches over it."""
    return f"{fan_out_id}.watch"


def then_id(fan_out_id: str) -> str:
    """Return the task id of the callback, unless its signature has one."""
    return f"{fan_out_id}.then"


def message_of(task: str, task_id: str, queue: str, fan_out_id: str, by: str) -> bytes:
    """Return the Celery message of a task that takes a fan-out's id."""
    return _envelope(
        task=task,
        task_id=task_id,
        queue=queue,
        kwargs={"v": VERSION, "fan_out_id": fan_out_id},
        callbacks=None,
        errbacks=None,
        kwargsrepr=f"fan_out={fan_out_id}",
        eta=None,
        expires=None,
        priority=0,
        origin=by,
        ignore_result=True,
    )


# Write some requests. KEYS: the requests, the record of the fan-out. ARGV: fan-out id, chunk, the messages as
# a JSON list, seconds until it expires, the place of the first, then per request its id and six fields of its
# record with NUL between them, and names and values of further ones. Sent twice (a call repeats what got no
# answer) it changes nothing. Returns the reference of a stored conf that is not there, where there is one.
ADD_CHUNK: Final = Script(
    HOLDING
    + """
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local confs = 'dagrelay:fan-out:' .. ARGV[1] .. ':confs'
for i = 7, #ARGV, 2 do
  local conf = conf_of(ARGV[i])
  if conf then
    local left = redis.call('TTL', 'dagrelay:conf:' .. conf)
    if left == -2 then return conf end
    if left >= 0 and left < tonumber(ARGV[4]) then redis.call('EXPIRE', 'dagrelay:conf:' .. conf, ARGV[4]) end
    redis.call('SADD', confs, conf)
    redis.call('EXPIRE', confs, ARGV[4])
  end
end
local time = redis.call('TIME')
local now_text = string.format('%.6f', time[1] + time[2] / 1e6)
local ids = {ARGV[5]}
for i = 6, #ARGV, 2 do
  local id = ARGV[i]
  local record = 'dagrelay:record:' .. id
  local about = {}
  for text in string.gmatch(ARGV[i + 1] .. '\\0', '(%Z*)%z') do about[#about + 1] = text end
  redis.call('HSET', record, 'state', 'accepted', 'accepted_at', now_text, 'due_at', now_text,
    'task', about[1], 'dag_id', about[2], 'dag_run_id', about[3], 'key', about[4],
    'connection', about[5], 'by', about[6], 'fan_out', ARGV[1],
    'part', ARGV[2] .. ' ' .. (ARGV[5] + (i - 6) / 2))
  if #about > 6 then redis.call('HSET', record, unpack(about, 7)) end
  redis.call('EXPIRE', record, ARGV[4])
  ids[#ids + 1] = id
end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3], 'ids:' .. ARGV[2], table.concat(ids, ' '))
redis.call('EXPIRE', KEYS[1], ARGV[4])
return 1
"""
)

# Accept a fan-out whose requests are there. KEYS: record, fan-out, requests, parked, due, the launcher's
# queue. ARGV: id, total, chunks, on_error, then, dag id, by, the launcher's message, the watch's id, queue
# list, message, and seconds until its first look. An id that is on record is not accepted a second time.
ACCEPT_FAN_OUT: Final = Script(
    HOLDING
    + """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
if redis.call('HLEN', KEYS[3]) ~= 2 * ARGV[3] then
  return redis.error_reply('a part of the fan-out was not written')
end
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local now_text = string.format('%.6f', now)
redis.call('LPUSH', KEYS[6], ARGV[8])
redis.call('HSET', KEYS[2], 'total', ARGV[2], 'chunks', ARGV[3], 'on_error', ARGV[4], 'then', ARGV[5],
  'ended', 0, 'failed', 0, 'cancelled', 0)
redis.call('HSET', KEYS[1], 'state', 'accepted', 'accepted_at', now_text, 'due_at', now_text,
  'task', '"""
    + FAN_OUT_END
    + """', 'dag_id', ARGV[6], 'by', ARGV[7], 'fan_out', ARGV[1], 'progress', '0 of ' .. ARGV[2])
redis.call('PERSIST', KEYS[3])
for _, conf in ipairs(redis.call('SMEMBERS', KEYS[2] .. ':confs')) do hold(conf, ARGV[1]) end
redis.call('PERSIST', KEYS[2] .. ':confs')
redis.call('HSET', KEYS[4], ARGV[9],
  '0\\0' .. string.format('%.3f', now) .. '\\0' .. ARGV[10] .. '\\0' .. ARGV[11])
redis.call('ZADD', KEYS[5], string.format('%.6f', now + ARGV[12]), ARGV[9])
return 1
"""
)

# Push messages once. KEYS: the fan-out, the record. ARGV: the mark, then queue list and message in turn.
# Nothing is done where the mark is there, or the fan-out has ended. The mark comes last: a push that fails (a
# key of another type) leaves none.
SEND_ONCE: Final = Script("""
local state = redis.call('HGET', KEYS[2], 'state')
if not state or state == 'done' or state == 'failed' or state == 'cancelled' then return 0 end
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 0 end
for i = 2, #ARGV, 2 do redis.call('LPUSH', ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], ARGV[1], '1')
return 1
""")

# Begin a chunk, or go on with it. KEYS: fan-out, cancelled. ARGV: fan-out id, chunk, the place of its first,
# ids. Returns why nothing more is to be started (''), on_error, and for each request one letter: `ended`,
# `outside` (it has a message of its own), `cancelled` (somebody asked for it), `fresh`.
BEGIN_CHUNK: Final = Script("""
local letters = {}
for i = 4, #ARGV do
  local record = 'dagrelay:record:' .. ARGV[i]
  local known = redis.call('HMGET', record, 'state', 'outside')
  local state = known[1]
  if state == 'done' or state == 'failed' or state == 'cancelled'
    or redis.call('HEXISTS', KEYS[1] .. ':outcomes', ARGV[3] + i - 4) == 1 then  -- its record may be gone
    letters[#letters + 1] = 'e'
  else
    if not state then  -- it has expired: nobody worked for weeks
      local time = redis.call('TIME')
      local now_text = string.format('%.6f', time[1] + time[2] / 1e6)
      redis.call('HSET', record, 'state', 'accepted', 'accepted_at', now_text, 'due_at', now_text,
        'fan_out', ARGV[1], 'part', ARGV[2] .. ' ' .. (ARGV[3] + i - 4))
    end
    redis.call('PERSIST', record)
    if known[2] then letters[#letters + 1] = 'o'
    elseif redis.call('ZSCORE', KEYS[2], ARGV[i]) then letters[#letters + 1] = 'c'
    else letters[#letters + 1] = 'f' end
  end
end
local about = redis.call('HMGET', KEYS[1], 'stopped', 'on_error')
return {about[1] or '', about[2] or '', table.concat(letters)}
""")

# What became a run. KEYS: none. ARGV: seconds to keep the result, seconds to keep the record, the instant as
# Celery writes it, seconds to keep a stored conf that nobody else holds, then per request its id and its run
# as JSON. What has ended already stays as it is.
END_ITEMS: Final = Script(
    PART_ENDED
    + """
local time = redis.call('TIME')
local now_text = string.format('%.6f', time[1] + time[2] / 1e6)
local ended = 0
for i = 5, #ARGV, 2 do
  local id, run = ARGV[i], ARGV[i + 1]
  local record, result = 'dagrelay:record:' .. id, '"""
    + RESULT_PREFIX
    + """' .. id
  local known = redis.call('HMGET', record,
    'state', 'fan_out', 'part', 'outside', 'dag_id', 'dag_run_id', 'cancel_by', 'conf_ref')
  local state = known[1]
  if state ~= 'done' and state ~= 'failed' and state ~= 'cancelled' then
    local meta = '{"status": "SUCCESS", "result": ' .. run
      .. ', "traceback": null, "children": [], "date_done": "' .. ARGV[3] .. '", "task_id": "' .. id .. '"}'
    redis.call('SET', result, meta, 'EX', ARGV[1])
    redis.call('HSET', record, 'state', 'done', 'run', run, 'ended_at', now_text)
    redis.call('HINCRBY', record, 'attempts', 1)
    redis.call('EXPIRE', record, ARGV[2])
    if known[7] then redis.call('ZREM', 'dagrelay:cancelled', id) end
    if known[8] then release(known[8], id, ARGV[4]) end
    if known[2] and known[3] then
      local outcome = '{"id":"' .. id .. '","dag_id":"' .. (known[5] or '') .. '","dag_run_id":"'
        .. (known[6] or '') .. '","state":"done","run":' .. run .. ',"error":null,"reason":null}'
      part_ended(known[2], known[3], 'done', outcome, known[4] and record, false)
    end
    tell_end(record, id, 'ended')
    redis.call('PUBLISH', result, meta)
    ended = ended + 1
  end
end
return ended
"""
)

# Give requests messages of their own. KEYS: the fan-out, the queue list. ARGV: chunk, then per request its id
# and its message. One that has such a message, or has ended, is left alone. Its conf is its own to hold then:
# it may end after its fan-out, where that is broken.
LEAVE: Final = Script(
    HOLDING
    + """
local count = 0
for i = 2, #ARGV, 2 do
  local record = 'dagrelay:record:' .. ARGV[i]
  local known = redis.call('HMGET', record, 'state', 'outside', 'conf_ref')
  local state = known[1]
  if not known[2] and state ~= 'done' and state ~= 'failed' and state ~= 'cancelled' then
    redis.call('LPUSH', KEYS[2], ARGV[i + 1])
    redis.call('HSET', record, 'outside', '1')
    if known[3] then hold(known[3], ARGV[i]) end
    count = count + 1
  end
end
if count > 0 then redis.call('HINCRBY', KEYS[1], 'outside:' .. ARGV[1], count) end
return count
"""
)

# Have nothing more started. KEYS: the fan-out, its record. ARGV: why. Returns 0, and does nothing, if it has
# ended.
STOP: Final = Script("""
local state = redis.call('HGET', KEYS[2], 'state')
if not state or state == 'done' or state == 'failed' or state == 'cancelled' then return 0 end
redis.call('HSETNX', KEYS[1], 'stopped', ARGV[1])
return 1
""")

# KEYS: the fan-out, the requests, the mailbox of the chunk's task. ARGV: chunk, whether all of it was begun
# (0/1). Returns how many of its requests are to be waited for; with none, and all begun, the chunk has ended.
# What is in the mailbox is known herewith: a line that comes later says that the last has ended since.
CLOSE_CHUNK: Final = Script("""
local outside = tonumber(redis.call('HGET', KEYS[1], 'outside:' .. ARGV[1]) or 0)
redis.call('DEL', KEYS[3])
if outside == 0 and ARGV[2] == '1' then redis.call('HDEL', KEYS[2], ARGV[1], 'ids:' .. ARGV[1]) end
return outside
""")


# KEYS: the outcomes. Returns how many bytes they have.
OUTCOMES_BYTES: Final = Script("""
local size = 0
for _, place in ipairs(redis.call('HKEYS', KEYS[1])) do
  size = size + redis.call('HSTRLEN', KEYS[1], place)
end
return size
""")


class Item(NamedTuple):
    """One request as it goes to Redis: its message, ready, and what its record says of it."""

    task_id: str
    message: bytes
    about: str
    """Fields of the record with NUL between them, as `records.Accepted.args` has them."""
    conf: Packed | None = None
    """What is to be uploaded before."""


@dataclass(frozen=True, slots=True)
class FanOutState:
    """Where a fan-out stands."""

    total: int
    chunks: int
    ended: int
    failed: int
    cancelled: int
    on_error: Literal["continue", "stop"]
    then: dict[str, Any] | None
    launched: bool
    stopped: str


class Begun(NamedTuple):
    """A chunk that is to be worked on: why nothing more is to be started (""), and its requests."""

    stopped: str
    on_error: str
    items: list[tuple[str, dict[str, Any], str]]
    """Each with its id, its message as a dict, and a letter: see BEGIN_CHUNK."""


class FanOuts:
    """The fan-outs in one Redis. Every method raises what redis-py raises."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    # What callers do

    def accept(
        self,
        fan_out_id: str,
        items: Iterable[Item],
        *,
        launcher: tuple[str, bytes],
        watch: tuple[str, bytes],
        on_error: str,
        then: dict[str, Any] | None,
        dag_id: str,
        by: str,
    ) -> int:
        """Accept all of them, or none; return how many there are.

        `launcher` and `watch` are queue and message. Unless this returns, it may have been accepted or not;
        with ConfGone it was not.
        """
        key, record = fan_out_key(fan_out_id), record_key(fan_out_id)
        requests = f"{key}:requests"
        client = self._client
        total = chunks = 0
        # Redis works on some of them while the next are made: that is half of what a call takes.
        with ThreadPoolExecutor(1) as sending:
            pipe, size = client.pipeline(transaction=False), 0
            sent: Future[Any] | None = None
            for chunk in in_chunks(self._uploaded(items)):
                if len(pipe) == 0:
                    pipe.execute_command("SCRIPT", "LOAD", ADD_CHUNK.lua)
                payload = b"[" + b",".join(item.message for item in chunk) + b"]"
                flat = [text for item in chunk for text in (item.task_id, item.about)]
                ADD_CHUNK.queue(pipe, (requests, record), (fan_out_id, chunks, payload, KEEP_S, total, *flat))
                total += len(chunk)
                chunks += 1
                size += len(payload)
                if size >= AT_ONCE_BYTES:
                    if sent is not None:
                        _check_confs(sent.result())
                    sent = sending.submit(pipe.execute)
                    pipe, size = client.pipeline(transaction=False), 0
            if sent is not None:
                _check_confs(sent.result())
            _check_confs(pipe.execute())
        ACCEPT_FAN_OUT.run(
            client,
            (record, key, requests, PARKED, DUE, launcher[0]),
            (
                *(fan_out_id, total, chunks, on_error, json.dumps(then) if then else ""),
                *(dag_id, by, launcher[1], watch_id(fan_out_id), *watch, FIRST_WATCH_S),
            ),
        )
        return total

    def _uploaded(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the requests, each when its conf is in Redis."""
        known: set[str] = set()
        for item in items:
            if item.conf is not None and item.conf.reference not in known:
                upload(self._client, item.conf)
                known.add(item.conf.reference)
            yield item._replace(conf=None)

    def get(self, fan_out_id: str) -> FanOutState | None:
        """Return where a fan-out stands, or None when nothing is known of it."""
        raw = self._client.hgetall(fan_out_key(fan_out_id))
        if not raw:
            return None
        found = {_text(name): _text(value) for name, value in raw.items()}
        return FanOutState(
            total=int(found.get("total", 0)),
            chunks=int(found.get("chunks", 0)),
            ended=int(found.get("ended", 0)),
            failed=int(found.get("failed", 0)),
            cancelled=int(found.get("cancelled", 0)),
            on_error="stop" if found.get("on_error") == "stop" else "continue",
            then=json.loads(found["then"]) if found.get("then") else None,
            launched="launched" in found,
            stopped=found.get("stopped", ""),
        )

    def cancel(self, fan_out_id: str, by: str) -> bool:
        """Start nothing more of it, and ask for what has a message of its own to be cancelled.

        The rest ends by the first alone. Returns False, and does nothing, if it has ended.
        """
        if not self.stop(fan_out_id, ASKED_BY + by):
            return False
        for task_ids in self.open_chunks(fan_out_id).values():
            outside = [task_id for task_id, left in self.unended(task_ids).items() if left]
            if outside:
                Waits(self._client).cancel_many(outside, by)
        return True

    # What workers do

    def stop(self, fan_out_id: str, why: str) -> bool:
        """Start nothing more of it, for the first reason that was given; False if it has ended."""
        return bool(STOP.run(self._client, (fan_out_key(fan_out_id), record_key(fan_out_id)), (why,)))

    def send_once(self, fan_out_id: str, mark: str, messages: Sequence[tuple[str, bytes]]) -> bool:
        """Push messages to their queues, once for this mark; tell whether it was now."""
        flat = [text for pair in messages for text in pair]
        keys = (fan_out_key(fan_out_id), record_key(fan_out_id))
        return bool(SEND_ONCE.run(self._client, keys, (mark, *flat)))

    def begin(self, fan_out_id: str, index: int) -> Begun | None:
        """Return what is to be done of a chunk; None when it has ended, or its requests are gone."""
        key = fan_out_key(fan_out_id)
        payload, known = self._client.hmget(f"{key}:requests", [str(index), f"ids:{index}"])
        if payload is None or known is None:
            return None
        first, *ids = _text(known).split(" ")
        stopped, on_error, letters = BEGIN_CHUNK.run(
            self._client, (key, CANCELLED), (fan_out_id, index, first, *ids)
        )
        items = list(zip(ids, json.loads(payload), _text(letters), strict=True))
        return Begun(_text(stopped), _text(on_error), items)

    def messages_beside(self, task_id: str) -> dict[str, dict[str, Any]]:
        """Return the messages that the requests of a request's chunk would have by themselves, by their ids.

        Empty once the chunk has ended, and for what is no part of a fan-out.
        """
        fan_out_id, part = self._client.hmget(record_key(task_id), ["fan_out", "part"])
        if fan_out_id is None or part is None:
            return {}
        index = _text(part).split(" ")[0]
        payload, known = self._client.hmget(
            f"{fan_out_key(_text(fan_out_id))}:requests", [index, f"ids:{index}"]
        )
        if payload is None or known is None:
            return {}
        return dict(zip(_text(known).split(" ")[1:], json.loads(payload), strict=True))

    def end_items(
        self,
        runs: Sequence[tuple[str, str]],
        *,
        result_ttl_s: int,
        date_done: str,
        conf_keep_s: int = CONF_KEEP_S,
    ) -> int:
        """Write what became of requests: ids and runs as JSON; return how many had not ended before."""
        if not runs:
            return 0
        flat = [text for pair in runs for text in pair]
        return int(END_ITEMS.run(self._client, (), (result_ttl_s, KEEP_S, date_done, conf_keep_s, *flat)))

    def leave(self, fan_out_id: str, index: int, queue: str, messages: Sequence[tuple[str, bytes]]) -> int:
        """Push requests of a chunk to a queue, each once, to be ended by themselves; return how many."""
        if not messages:
            return 0
        flat = [text for pair in messages for text in pair]
        return int(LEAVE.run(self._client, (fan_out_key(fan_out_id), queue), (index, *flat)))

    def close(self, fan_out_id: str, index: int, *, all_begun: bool) -> int:
        """Return how many requests of a chunk are to be waited for; with none, it has ended."""
        key = fan_out_key(fan_out_id)
        mailbox = seen_key(chunk_id(fan_out_id, index))
        return int(CLOSE_CHUNK.run(self._client, (key, f"{key}:requests", mailbox), (index, int(all_begun))))

    def stopped(self, fan_out_id: str) -> str:
        """Return why nothing more of it is to be started, or ""."""
        return _text(self._client.hget(fan_out_key(fan_out_id), "stopped") or "")

    def outcomes(
        self, fan_out_id: str, total: int, *, with_results: bool = True
    ) -> list[dict[str, Any] | None]:
        """Return all outcomes in the order of the requests; None where there is none yet.

        Without the results of tasks they are read a few at a time, and never lie in memory all together.
        """
        key = f"{fan_out_key(fan_out_id)}:outcomes"
        found: dict[int, dict[str, Any]] = {}
        client = self._client
        few = client.hscan_iter(key, count=OUTCOMES_AT_ONCE)
        for place, text in client.hgetall(key).items() if with_results else few:
            outcome = json.loads(text)
            if not with_results and outcome.get("run"):
                outcome["run"]["result"] = None
            found[int(place)] = outcome
        return [found.get(place) for place in range(total)]

    def outcomes_bytes(self, fan_out_id: str) -> int:
        """Return the size of all outcomes together."""
        return int(OUTCOMES_BYTES.run(self._client, (f"{fan_out_key(fan_out_id)}:outcomes",), ()))

    def open_chunks(self, fan_out_id: str) -> dict[int, list[str]]:
        """Return the chunks that have not ended, with the ids of their requests."""
        key = f"{fan_out_key(fan_out_id)}:requests"
        names = [name for name in map(_text, self._client.hkeys(key)) if name.startswith("ids:")]
        values = self._client.hmget(key, names) if names else []
        return {
            int(name[4:]): _text(value).split(" ")[1:]
            for name, value in zip(names, values, strict=True)
            if value is not None
        }

    def unended(self, task_ids: Sequence[str]) -> dict[str, bool]:
        """Return those that have not ended, and whether each has a message of its own."""
        with self._client.pipeline(transaction=False) as pipe:
            for task_id in task_ids:
                pipe.hmget(record_key(task_id), ["state", "outside"])
            known = pipe.execute()
        return {
            task_id: outside is not None
            for task_id, (state, outside) in zip(task_ids, known, strict=True)
            if state is None or _text(state) not in ENDED
        }


def _check_confs(answers: Iterable[Any]) -> None:
    """Raise ConfGone where a chunk was not written, because a conf is not there."""
    for answer in answers:  # of SCRIPT LOAD, and of ADD_CHUNK
        if isinstance(answer, bytes) and b":" in answer:
            raise ConfGone(answer.decode())


def in_chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield the requests in chunks, each small enough that Redis, which does nothing else meanwhile, is soon
    through with it."""
    chunk: list[Item] = []
    size = 0
    for item in items:
        if chunk and (len(chunk) == CHUNK_ITEMS or size + len(item.message) > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += len(item.message)
    if chunk:
        yield chunk


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
