"""A Celery transport on Redis that loses nothing, waits for free, and is stopped by no message.

Registered for redis:// and rediss:// in a worker (`register`), wire-compatible with every stock producer
and with Flower. It knows nothing of what the tasks do. Redis 6.2 or newer, or Valkey; one server (or a
primary with replicas), no Cluster; Sentinel is not supported.

**Where a message is.** At every moment in exactly one of these places; every arrow is one command or one
script, so whatever is killed between two of them finds it in one place::

    publish ──LPUSH──▶ queue ──BLMOVE──▶ hand ──CLAIM──▶ held ──ACKNOWLEDGE──▶ (gone)
       │                 ▲  └──────────CLAIM───────────────▲ │
       │                 │◀───────GIVE_BACK, RESTORE─────────┤
       │                 │◀──MOVE── parked ◀──────PARK───────┤
       └──────PARK───────┼────────────▲                      │
                         └───REPLAY── quarantine ◀───────────┘

=========== ==================================================== ==========================================
place       key                                                  who writes it
=========== ==================================================== ==========================================
queue       list ``<queue>``, ``<queue>\\x06\\x16<priority>``      everybody; it is kombu's own
hand        list ``<ns>:hand:<owner>:<queue>``                   the owner's blocking moves; any claim of it
held        hash ``<ns>:held:<owner>``                           the owner; RESTORE of anybody when it is dead
parked      hash ``<ns>:parked``, sorted set ``<ns>:due``        everybody; one message for each task id
quarantine  hash ``<ns>:quarantine``                             whoever claimed what it could not read
=========== ==================================================== ==========================================

An application may keep what no worker can read elsewhere (`Channel.put_elsewhere`): it is then acknowledged.

An *owner* is a worker process. Its lease (sorted set ``<ns>:leases``) is renewed every third of the
visibility timeout while the process lives, however long its tasks take; when it has run out, RESTORE by any
other worker puts back its hands and all it held. ``<ns>:hands:<owner>`` lists its hands, ``<ns>:gone``
those whose hands are to be looked at once more, because a blocking move of a machine that was cut off can
still fetch a message. ``<ns>:returned`` counts by SHA-1 how often a message came back from a worker, or from
a child of a pool, that died; after more than ten times it goes to quarantine, as the likely reason. What was
begun and came back for another reason is noted there too, with a 0: it may have done its work already.

**What a crash leaves.** After the LPUSH: the message in its queue. After BLMOVE: in the hand, restored with
the lease. After CLAIM: held, restored with the lease, and redelivered. After the task's own work, before
ACKNOWLEDGE: held; the task runs again. After PARK of a retry, before ACKNOWLEDGE: parked, and the older
copy held; when that comes back, it is dropped, because a copy with more retries waits (STALE). After PARK
of a claimed message: parked only. In MOVE: parked or queued. What a client does not know the outcome of, it
finds out: a claim whose answer was lost by comparing what it holds with what Redis says, all else by
repeating it.

**Waiting.** A message with an eta is parked under its task id, when a worker publishes it or when it claims
it, without its eta: the due time is the score, by Redis' clock, and what comes back is runnable at once
whatever the clocks of workers say. A later park of the same task replaces an earlier one, unless it has
fewer retries. Every worker moves what is due back to its queue. A parked task can be listed, sent on early,
and revoked: it is then sent on at once with a mark, and Celery itself ends it (`lot.Lot`, `worker`).

A published message with the header ``parked_wait`` waits for more than its time: the application parks it, in
a script of its own (`Channel.park_waiting`). ``<ns>:cancelled`` (sorted set: task id → when somebody
asked for it) is what no worker is to begin and PARK does not park; ``<ns>:cancels`` counts the wishes, so
that workers, who ask for it as they move what is due, see within 0.16 s that there is a new one.
"""

from __future__ import annotations

import kombu.transport

from .channel import Channel, Transport, parked, quarantined
from .hand import Why
from .keys import Keys
from .lot import Lot, Parked, Quarantined

__all__ = [
    "Channel",
    "Keys",
    "Lot",
    "Parked",
    "Quarantined",
    "Transport",
    "Why",
    "parked",
    "quarantined",
    "register",
]


def register() -> None:
    """Make this the transport of redis:// and rediss:// in this process."""
    for scheme in ("redis", "rediss"):
        kombu.transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
        kombu.transport._transport_cache.pop(scheme, None)
