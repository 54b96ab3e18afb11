"""How many requests stand, in one look: for whoever waits for thousands of them and may not hold a thread,
a connection or a subscription for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .script import Script
from .states import ENDED

if TYPE_CHECKING:
    from redis import Redis

AT_ONCE: Final = 1000
"""So many requests a call of `LOOK` at the most: Redis does nothing else meanwhile, for about 1 ms."""

# ARGV: pairs of a task id and what was told of it last ('' for nothing yet). Returns such pairs for those
# that stand otherwise now: `Standing`, NUL between its parts.
LOOK: Final = Script("""
local changed = {}
for i = 1, #ARGV, 2 do
  local now = redis.call('HMGET', 'dagrelay:record:' .. ARGV[i],
    'state', 'seen', 'progress', 'job_id', 'waits_for', 'attempts', 'reason')
  for part = 1, 7 do now[part] = now[part] and string.gsub(now[part], '%z', ' ') or '' end
  local text = table.concat(now, '\\0')
  if text ~= ARGV[i + 1] then
    changed[#changed + 1] = ARGV[i]
    changed[#changed + 1] = text
  end
end
return changed
""")


class Standing(NamedTuple):
    """How one request stands, as its record has it; what is not known is ""."""

    state: str
    """accepted, waiting, done, failed or cancelled; "" for an id that is not on record."""
    seen: str
    """The state in which its run, or its job, was seen last."""
    progress: str
    job_id: str
    waits_for: str
    attempts: str
    reason: str

    @property
    def ended(self) -> bool:
        """Whether the request has come to its one end."""
        return self.state in ENDED

    def text(self) -> str:
        """Return it as `LOOK` takes it."""
        return "\0".join(self)


def look_args(known: Mapping[str, Standing | None]) -> list[str]:
    """Return what `LOOK` takes: the requests, and how each was known to stand."""
    return [text for task_id, one in known.items() for text in (task_id, one.text() if one else "")]


def changes_in(answer: Sequence[Any]) -> dict[str, Standing]:
    """Return what `LOOK` has answered: those that stand otherwise than they were known to."""
    texts = [one.decode(errors="replace") if isinstance(one, bytes) else str(one) for one in answer]
    return {
        task_id: Standing(*text.split("\0")) for task_id, text in zip(texts[::2], texts[1::2], strict=True)
    }


def look(client: Redis, task_id: str, known: Standing | None = None) -> Standing | None:
    """Return how one request stands, or None where that is as it is known. Raises what redis-py raises."""
    return changes_in(LOOK.run(client, (), look_args({task_id: known}))).get(task_id)
