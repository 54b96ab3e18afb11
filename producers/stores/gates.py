"""The gate of a DAG: whether a run may be handed over to Airflow now, for all workers together.

A request passes it before its POST if it says what is to be done while its DAG is paused, or has a window (so
many unfinished runs of the DAG at the most). For each connection and DAG, `<gate>` being `<conn>:<dag>`:

================================ =========================================================================
key                              what
================================ =========================================================================
``dagrelay:gate:<gate>:<class>`` sorted set: task id → its rank, as in a connection's line. Its message is
                                 parked. A class is what its requests ask: `hold,2`, `trigger,max_active_runs`
``dagrelay:gate-lines:<gate>``   set: the classes of which somebody may wait
``dagrelay:gate-facts:<gate>``   hash: what Airflow said last (below)
``dagrelay:gate-tickets:<gate>`` sorted set: task id → until when its place is kept, while it is called, or
                                 its run is handed over
``dagrelay:gate-made:<gate>``    sorted set: run id → when it was handed over; the last of them
``dagrelay:gates:<conn>``        sorted set: DAG → when Airflow is asked for it again, while somebody waits
``dagrelay:gate-asker:<conn>``   there while a worker asks for those that are due
================================ =========================================================================

**Places.** Taken are the runs that Airflow counted as queued or running, those handed over since that
question was asked, and the tickets. Whoever passes has a ticket at once (ENTER); it becomes a run handed over
when Airflow has answered (MADE), or is given back when there will be none (NOT_MADE). After a lost answer it
is kept: the request tries again with its own ticket, and at last it runs out. So many workers together never
hand over more than there is room for: a run may count twice for a moment, and never not at all.

**Who is next.** Who may not pass parks in the line of its class. When Airflow has been asked (ANSWERED), and
between two questions while there is more than can be called in one step (TICK), the first in rank of those
classes that may pass now are called: sent on, with a ticket for some seconds. Requests that ask for less do
not wait for those that ask for more, and a newcomer never overtakes its own class.

**Asking.** What Airflow said is taken for true for two seconds. While somebody waits, one worker at a time
asks for what is due: every second, and ever more rarely, down to every 15 s, while nothing changes. A request
that finds nothing that is fresh enough asks itself, if nobody does just then.

The hash: asked_at, seen_at (when the question was asked, and when it was answered), paused (0 or 1), limit
(the DAG's max_active_runs; empty for none), active (runs queued or running), problem (an error as JSON,
instead of all that), changed_at (since when nothing has changed), asking (until when the question is left to
the one who asks), paused_total and paused_from (for how long it was paused so far, and since when it is, by a
clock that stands still while the connection is held). Of one that has waited, the record has `gated`, and
while it waits `held_at` and, with `hold`, `paused_at`: what was held and paused so far. Instants are seconds
since 1970 by Redis' clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from ..contract import MAX_ACTIVE_RUNS
from ..errors import DagrelayError, error_from
from .lines import AIRFLOWS, called_key
from .parking import CALL_S, GATE_LINE, PARKING
from .records import KEEP_S, Script, record_key

if TYPE_CHECKING:
    from redis import Redis

FRESH_S: Final = 2.0
"""For how long what Airflow said is taken for true."""

RENEW_S: Final = 1.0
"""What is older is asked for again by the next that comes, while others still take it for true."""

CALLED_FRESH_S: Final = 10.0
"""For how long it is by somebody who was called for it."""

HAND_S: Final = 60.0
"""How long a ticket is kept: a killed worker's message is back by then, and so is what lost an answer."""

SOONEST_S: Final = 1.0
SLOWEST_S: Final = 15.0
PATIENCE: Final = 30
"""While somebody waits, Airflow is asked every second; where nothing has changed for longer, every thirtieth
part of that time, and at least every 15 s: who waits waits 3 % longer for it."""

ASKING_S: Final = 20.0
"""How long a question is left to the worker that asks it: another asks if it was killed."""

ASKED_AT_ONCE: Final = 5
PAUSE_S: Final = 0.5
"""So many gates of a connection are asked for in a row, with two short questions each, and then none for so
long."""

CALLED_AT_ONCE: Final = 100
RUNS_KEPT: Final = 10_000
"""Of so many runs handed over it is known: more than are between two questions."""

Verdict = Literal["pass", "ask", "paused", "full", "turn", "problem"]
"""It may be handed over; the caller is to ask Airflow, and to come again; its DAG is paused; the window is
full; others are asking, or go first; Airflow said that there is something wrong (`Entered.problem`)."""

GATES: Final = (
    """
local function fresh(facts, seconds) return facts.seen_at and now - facts.seen_at <= seconds end
local function facts_of(gate)
  local names = {'asked_at', 'seen_at', 'paused', 'limit', 'active', 'problem', 'changed_at', 'asking',
    'paused_total', 'paused_from'}
  local facts = {}
  for i, value in ipairs(redis.call('HMGET', 'dagrelay:gate-facts:' .. gate, unpack(names))) do
    if value and value ~= '' then facts[names[i]] = (names[i] == 'problem') and value or tonumber(value) end
  end
  return facts
end
local function taken(gate, facts)
  local tickets, since = 'dagrelay:gate-tickets:' .. gate, string.format('(%.6f', facts.asked_at or 0)
  redis.call('ZREMRANGEBYSCORE', tickets, '-inf', now)
  return (facts.active or 0) + redis.call('ZCARD', tickets)
    + redis.call('ZCOUNT', 'dagrelay:gate-made:' .. gate, since, '+inf')
end
local function places(window, facts)
  if window == '-' then return math.huge end
  if window == 'max_active_runs' then return facts.limit or math.huge end
  return tonumber(window)
end
local function ticket(gate, id, seconds)
  local key = 'dagrelay:gate-tickets:' .. gate
  local new = redis.call('ZADD', key, string.format('%.6f', now + seconds), id)
  redis.call('EXPIRE', key, """
    + str(int(10 * HAND_S))
    + """)
  return new
end
-- Call those that may pass. Returns whether more might.
local function call_from(gate, facts)
  local lines, sent = {}, 0
  local function head(line)
    local first = redis.call('ZRANGE', line.key, 0, 0, 'WITHSCORES')
    line.rank = first[2] and tonumber(first[2])
  end
  for _, class in ipairs(redis.call('SMEMBERS', 'dagrelay:gate-lines:' .. gate)) do
    local line = {key = '"""
    + GATE_LINE
    + """' .. gate .. ':' .. class}
    head(line)
    if line.rank then
      local if_paused, window = string.match(class, '^([^,]*),(.*)$')
      local stops = facts.paused == 1 and if_paused ~= 'trigger'
      -- One that is to fail, or to unpause the DAG, is called for that, and needs no place.
      line.free = facts.problem or (stops and if_paused ~= 'hold')
      line.once = not facts.problem and stops and if_paused == 'unpause'
      line.places = places(window, facts)
      if line.free or not stops then lines[#lines + 1] = line end
    else
      redis.call('SREM', 'dagrelay:gate-lines:' .. gate, class)
    end
  end
  local full = taken(gate, facts)
  while sent < """
    + str(CALLED_AT_ONCE)
    + """ do
    local best
    for _, line in ipairs(lines) do
      local may = line.rank and (line.free or full < line.places)
      if may and (not best or line.rank < best.rank) then best = line end
    end
    if not best then return false end
    local id = redis.call('ZPOPMIN', best.key)[1]
    local value = redis.call('HGET', 'dagrelay:parked', id)
    if value then
      send_on(id, value)
      if not best.free then full = full + ticket(gate, id, """
    + str(CALL_S)
    + """) end
      sent = sent + 1
    end
    head(best)
    if best.once and value then best.rank = nil end
  end
  return true
end
local function next_of(facts)
  local quiet = (now - (facts.changed_at or now)) / """
    + str(PATIENCE)
    + """
  return math.max("""
    + str(SOONEST_S)
    + """, math.min("""
    + str(SLOWEST_S)
    + """, quiet))
end
local function waits(gate)
  local found = false
  for _, class in ipairs(redis.call('SMEMBERS', 'dagrelay:gate-lines:' .. gate)) do
    if redis.call('EXISTS', '"""
    + GATE_LINE
    + """' .. gate .. ':' .. class) == 1 then
      found = true
    else
      redis.call('SREM', 'dagrelay:gate-lines:' .. gate, class)
    end
  end
  return found
end
local function paused_so_far(conn, facts)
  local total = facts.paused_total or 0
  if facts.paused == 1 and facts.paused_from then
    total = total + now - held_so_far(conn) - facts.paused_from
  end
  return total
end
"""
)

# Ask whether a run may be handed over now. KEYS: record, tickets, made, the line of its class, those called
# to its connection. ARGV: connection, DAG, task id, run id, if_paused, window ('-', a number,
# max_active_runs), seconds by which it is moved forward. Returns the verdict, the places that there are in
# its window ('' for no limit, or not known), a problem (''), its age in seconds without what was held,
# whether it is unsure, whether its run was handed over here, whether it has waited here before, how long the
# connection and the DAG have been held and paused so far, and the time.
ENTER: Final = Script(
    PARKING
    + GATES
    + """
local conn, gate, id = ARGV[1], ARGV[1] .. ':' .. ARGV[2], ARGV[3]
local cares, window = ARGV[5] ~= 'trigger', ARGV[6]
redis.call('ZREM', KEYS[2], '')  -- nothing: a deletion first, so that it goes on where Redis is full
-- An older copy of a task whose worker stood still, while a newer one waits: that keeps its place.
local older = redis.call('HEXISTS', 'dagrelay:parked', id) == 1
if not older then redis.call('ZREM', KEYS[4], id) end
local facts = facts_of(gate)
local stopped = paused_so_far(conn, facts)
local age, unsure, before, from = 0, '0', '0', now
local of = redis.call('HMGET', KEYS[1], 'due_at', 'held_s', 'held_at', 'paused_at', 'unsure', 'gated', 'line')
-- It may have been in the line of another class, or of its connection.
if of[7] and not older then redis.call('ZREM', of[7], id) end
local held = tonumber(of[2] or 0)
if of[3] then held = held + math.max(0, held_so_far(conn) - of[3]) end
if of[4] then held = held + math.max(0, stopped - of[4]) end
if of[3] or of[4] then
  redis.call('HSET', KEYS[1], 'held_s', string.format('%.3f', held))
  redis.call('HDEL', KEYS[1], 'held_at', 'paused_at', 'line')
end
if of[1] then age, from = now - of[1] - held, tonumber(of[1]) end
unsure, before = of[5] or '0', of[6] or '0'
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local own = redis.call('ZSCORE', KEYS[2], id)
local function say(verdict)
  if verdict == 'pass' then
    ticket(gate, id, """
    + str(HAND_S)
    + """)
  elseif verdict ~= 'ask' then
    if own and unsure ~= '1' then redis.call('ZREM', KEYS[2], id) end
    if redis.call('ZREM', KEYS[5], id) == 1 then pump(conn) end  -- it was called, and does not come
  end
  local limit = places(window, facts)
  return {verdict, limit < math.huge and string.format('%.0f', limit) or '', facts.problem or '',
    string.format('%.3f', age), unsure, redis.call('ZSCORE', KEYS[3], ARGV[4]) and '1' or '0', before,
    string.format('%.3f', held_so_far(conn)), string.format('%.3f', stopped), now_text}
end
if own and not cares then return say('pass') end
local asked = facts.asking and facts.asking > now
if not fresh(facts, own and """
    + str(CALLED_FRESH_S)
    + " or "
    + str(FRESH_S)
    + """) or (not own and not asked and not fresh(facts, """
    + str(RENEW_S)
    + """) and not waits(gate)) then
  if asked then return say('turn') end
  redis.call('HSET', 'dagrelay:gate-facts:' .. gate, 'asking', string.format('%.6f', now + """
    + str(ASKING_S)
    + """))
  return say('ask')
end
if facts.problem then return say('problem') end
if cares and facts.paused == 1 then return say('paused') end
if own then return say('pass') end
local more = call_from(gate, facts)
if taken(gate, facts) >= places(window, facts) then return say('full') end
if more and redis.call('ZCOUNT', KEYS[4], '-inf', '(' .. string.format('%.6f', from - ARGV[7])) > 0 then
  return say('turn')
end
return say('pass')
"""
)

# What Airflow has said. KEYS: made, the connection's gates. ARGV: connection, DAG, when it was asked, paused
# (0/1), limit ('' for none), active, problem (''). An answer to an older question than the last is none.
ANSWERED: Final = Script(
    PARKING
    + GATES
    + """
local conn, dag, gate = ARGV[1], ARGV[2], ARGV[1] .. ':' .. ARGV[2]
local key = 'dagrelay:gate-facts:' .. gate
redis.call('HDEL', key, 'asking')
local facts = facts_of(gate)
if not facts.asked_at or tonumber(ARGV[3]) >= facts.asked_at then
  local clock = now - held_so_far(conn)
  local paused = ARGV[7] ~= '' and (facts.paused or 0) or tonumber(ARGV[4])
  if paused == 1 and facts.paused ~= 1 then
    redis.call('HSET', key, 'paused_from', string.format('%.3f', clock))
  elseif paused == 0 and facts.paused == 1 then
    redis.call('HSET', key, 'paused_total', string.format('%.3f', paused_so_far(conn, facts)))
  end
  if facts.paused ~= paused or facts.limit ~= tonumber(ARGV[5]) or facts.active ~= tonumber(ARGV[6])
    or not facts.changed_at then
    redis.call('HSET', key, 'changed_at', now_text)
  end
  redis.call('HSET', key, 'asked_at', ARGV[3], 'seen_at', now_text, 'paused', paused, 'limit', ARGV[5],
    'active', ARGV[6], 'problem', ARGV[7])
  redis.call('EXPIRE', key, """
    + str(KEEP_S)
    + """)
  facts = facts_of(gate)
end
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -"""
    + str(RUNS_KEPT + 1)
    + """)
local more = call_from(gate, facts)
if waits(gate) then
  redis.call('ZADD', KEYS[2], string.format('%.6f', more and now or now + next_of(facts)), dag)
else
  redis.call('ZREM', KEYS[2], dag)
end
return 1
"""
)

# Airflow has said nothing. KEYS: the facts, the connection's gates. ARGV: DAG.
NOT_ANSWERED: Final = Script(
    PARKING
    + """
redis.call('HDEL', KEYS[1], 'asking')
redis.call('ZADD', KEYS[2], 'XX', string.format('%.6f', now + """
    + str(FRESH_S)
    + """), ARGV[1])
return 1
"""
)

# A run was handed over. KEYS: tickets, made, the facts. ARGV: task id, run id.
MADE: Final = Script(
    PARKING
    + """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], now_text, ARGV[2])
redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -"""
    + str(RUNS_KEPT + 1)
    + """)
redis.call('EXPIRE', KEYS[2], """
    + str(KEEP_S)
    + """)
redis.call('HSET', KEYS[3], 'changed_at', now_text)
redis.call('EXPIRE', KEYS[3], """
    + str(KEEP_S)
    + """)
return 1
"""
)

# There will be no run. KEYS: tickets, the record. ARGV: connection, DAG, task id. After a lost answer there
# may be one all the same: the ticket runs out by itself.
NOT_MADE: Final = Script(
    PARKING
    + GATES
    + """
if redis.call('HGET', KEYS[2], 'unsure') == '1' then return 0 end
if redis.call('ZREM', KEYS[1], ARGV[3]) == 0 then return 0 end
local facts = facts_of(ARGV[1] .. ':' .. ARGV[2])
if fresh(facts, """
    + str(FRESH_S)
    + """) then call_from(ARGV[1] .. ':' .. ARGV[2], facts) end
return 1
"""
)

# Have go on what may, and say what the caller is to ask for: pairs of connection and DAG. KEYS: none. ARGV:
# connections. Of one that is held, or does not answer, nothing is asked.
TICK: Final = Script(
    PARKING
    + GATES
    + """
local answer = {}
for _, conn in ipairs(ARGV) do
  local gates = 'dagrelay:gates:' .. conn
  redis.call('ZREM', gates, '')
  if redis.call('EXISTS', gates) == 1 then
    local known = redis.call('HMGET', 'dagrelay:airflow:' .. conn, 'breaker', 'held')
    local asks = known[1] ~= 'open' and (known[2] or '') == ''
      and redis.call('EXISTS', 'dagrelay:gate-asker:' .. conn) == 0
    local claimed = 0
    for _, dag in ipairs(redis.call('ZRANGE', gates, '-inf', now, 'BYSCORE', 'LIMIT', 0, """
    + str(4 * ASKED_AT_ONCE)
    + """)) do
      local gate = conn .. ':' .. dag
      local facts = facts_of(gate)
      if not waits(gate) then
        redis.call('ZREM', gates, dag)
      elseif fresh(facts, math.min("""
    + str(FRESH_S)
    + """, next_of(facts) - 0.001)) then
        local more = call_from(gate, facts)
        redis.call('ZADD', gates, string.format('%.6f', more and now or facts.seen_at + next_of(facts)), dag)
      elseif facts.asking and facts.asking > now then
        redis.call('ZADD', gates, string.format('%.6f', now + """
    + str(PAUSE_S)
    + """), dag)
      elseif asks and claimed < """
    + str(ASKED_AT_ONCE)
    + """ then
        claimed = claimed + 1
        answer[#answer + 1] = conn
        answer[#answer + 1] = dag
        redis.call('HSET', 'dagrelay:gate-facts:' .. gate, 'asking', string.format('%.6f', now + """
    + str(ASKING_S)
    + """))
        redis.call('ZADD', gates, string.format('%.6f', now + """
    + str(ASKING_S)
    + """), dag)
      end
    end
    if claimed > 0 then redis.call('SET', 'dagrelay:gate-asker:' .. conn, '1', 'PX', """
    + str(int(1000 * ASKING_S))
    + """) end
  end
end
return answer
"""
)

# KEYS: the connections. Returns how many wait at their gates.
WAITING: Final = Script(
    """
local waiting = 0
for _, conn in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  for _, dag in ipairs(redis.call('ZRANGE', 'dagrelay:gates:' .. conn, 0, -1)) do
    local gate = conn .. ':' .. dag
    for _, class in ipairs(redis.call('SMEMBERS', 'dagrelay:gate-lines:' .. gate)) do
      waiting = waiting + redis.call('ZCARD', '"""
    + GATE_LINE
    + """' .. gate .. ':' .. class)
    end
  end
end
return waiting
"""
)


def line_key(connection: str, dag_id: str, if_paused: str, window: int | str | None) -> str:
    """Return the line of the requests that ask for the same of a DAG; a window of None is none."""
    return f"{GATE_LINE}{connection}:{dag_id}:{if_paused},{_window(window)}"


def waits_for(
    dag_id: str, if_paused: str, window: int | str | None, *, paused: bool, places: int | None
) -> str:
    """Say in words what keeps a request from passing; `places`: how many its window allows, if known."""
    if paused and if_paused != "trigger":
        return f"DAG {dag_id} is paused"
    if window is None or places is None:
        return f"its turn at DAG {dag_id}"
    runs = "the 1 run" if places == 1 else f"the {places} runs"
    return f"a free place among {runs} of DAG {dag_id}"


def facts_key(line: str) -> str:
    """Return the hash that says how things stand at the gate of a line."""
    return "dagrelay:gate-facts:" + line.removeprefix(GATE_LINE).rpartition(":")[0]


def waits_for_now(line: str, paused: Any, limit: Any) -> str:
    """Say what keeps those in a line from passing now; `paused` and `limit` as its gate's hash has them."""
    gate, _, asked = line.removeprefix(GATE_LINE).rpartition(":")
    if_paused, _, window = asked.partition(",")
    places = _text(limit or "") if window == MAX_ACTIVE_RUNS else window
    return waits_for(
        gate.partition(":")[2],
        if_paused,
        None if window == "-" else window,
        paused=_text(paused or "0") == "1",
        places=int(places) if places.isdecimal() else None,
    )


def gates_key(connection: str) -> str:
    """Return the sorted set of the DAGs for whose gates Airflow is asked."""
    return f"dagrelay:gates:{connection}"


def _facts(connection: str, dag_id: str) -> str:
    return facts_key(f"{GATE_LINE}{connection}:{dag_id}:")


def _tickets(connection: str, dag_id: str) -> str:
    return f"dagrelay:gate-tickets:{connection}:{dag_id}"


def _made(connection: str, dag_id: str) -> str:
    return f"dagrelay:gate-made:{connection}:{dag_id}"


def _window(window: int | str | None) -> str:
    return "-" if window is None else str(window)


class Entered(NamedTuple):
    """What a request is told that wants to hand its run over."""

    verdict: Verdict
    places: int | None
    """How many unfinished runs its window allows; None for any number, or for one that is not known yet."""
    problem: DagrelayError | None
    age_s: float
    """Since when it counts, without the time for which its connection was held, or it for its DAG."""
    unsure: bool
    """An answer was lost: its run may exist."""
    made_here: bool
    """Its run was handed over through this gate, by itself or by another with the same key."""
    before: bool
    """It has waited at a gate before."""
    held_s: float
    paused_s: float
    """For how long its connection has been held, and its DAG paused, as far as was seen; both in all."""
    now: float
    """By Redis' clock, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class DagFacts:
    """What Airflow said of a DAG."""

    paused: bool = False
    limit: int | None = None
    """Its max_active_runs; None where there is no such limit."""
    active: int = 0
    """Its runs that are queued or running."""


class Gates:
    """The gates of all DAGs, in one Redis. Each method is one round trip; raises what redis-py raises."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    def enter(
        self,
        connection: str,
        dag_id: str,
        task_id: str,
        run_id: str,
        *,
        if_paused: str,
        window: int | str | None,
        ahead_s: float = 0.0,
    ) -> Entered:
        """Ask whether a run may be handed over now; with a `pass` it has a place, to be `made` or not."""
        keys = (
            record_key(task_id),
            _tickets(connection, dag_id),
            _made(connection, dag_id),
            line_key(connection, dag_id, if_paused, window),
            called_key(connection),
        )
        args = (connection, dag_id, task_id, run_id, if_paused, _window(window), ahead_s)
        verdict, places, problem, age_s, unsure, made, before, held_s, paused_s, now = map(
            _text, ENTER.run(self._client, keys, args)
        )
        return Entered(
            verdict=verdict,  # type: ignore[arg-type]
            places=int(places) if places else None,
            problem=error_from(*json.loads(problem)) if problem else None,
            age_s=float(age_s),
            unsure=unsure == "1",
            made_here=made == "1",
            before=before == "1",
            held_s=float(held_s),
            paused_s=float(paused_s),
            now=float(now),
        )

    def answered(self, connection: str, dag_id: str, asked_at: float, said: DagFacts | DagrelayError) -> None:
        """Say what Airflow answered, or what is wrong with the DAG; `asked_at` by Redis' clock."""
        facts = said if isinstance(said, DagFacts) else DagFacts()
        problem = json.dumps([type(said).__name__, said.args]) if isinstance(said, DagrelayError) else ""
        ANSWERED.run(
            self._client,
            (_made(connection, dag_id), gates_key(connection)),
            (
                *(connection, dag_id, f"{asked_at:.6f}", int(facts.paused)),
                *("" if facts.limit is None else facts.limit, facts.active, problem),
            ),
        )

    def not_answered(self, connection: str, dag_id: str) -> None:
        """Say that Airflow was not asked, or gave no answer: others may ask."""
        NOT_ANSWERED.run(self._client, (_facts(connection, dag_id), gates_key(connection)), (dag_id,))

    def made(self, connection: str, dag_id: str, task_id: str, run_id: str) -> None:
        """Say that a run was handed over."""
        keys = (_tickets(connection, dag_id), _made(connection, dag_id), _facts(connection, dag_id))
        MADE.run(self._client, keys, (task_id, run_id))

    def not_made(self, connection: str, dag_id: str, task_id: str) -> None:
        """Say that no run will be handed over, or that there was one already."""
        keys = (_tickets(connection, dag_id), record_key(task_id))
        NOT_MADE.run(self._client, keys, (connection, dag_id, task_id))

    def tick(self, connections: Iterable[str]) -> list[tuple[str, str]]:
        """Have go on what may; return connections and DAGs that the caller is to ask for, soon."""
        flat = [_text(one) for one in TICK.run(self._client, (), tuple(connections))]
        return list(zip(flat[::2], flat[1::2], strict=True))

    def asked(self, connection: str) -> None:
        """Say that the caller has asked for all that it was to: after a pause somebody may ask for more."""
        self._client.set(f"dagrelay:gate-asker:{connection}", "1", px=int(1000 * PAUSE_S))

    def waiting(self) -> int:
        """Return how many requests wait at gates."""
        return int(WAITING.run(self._client, (AIRFLOWS,), ()))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
