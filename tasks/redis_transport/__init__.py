"""The Celery transport on Redis that workers use, registered for the schemes redis:// and rediss://.

So far it is kombu's own, with one repair: what a server answers while it fails over (UNBLOCKED when a primary
becomes a replica, READONLY from the replica, LOADING, OOM) is a reason to connect again, and not, as in
kombu 5.7, an error that ends the worker.
"""

from __future__ import annotations

import kombu.transport
from kombu.transport.redis import Transport as KombuTransport
from redis.exceptions import ResponseError


class Transport(KombuTransport):
    """kombu's Redis transport, for a worker that outlives a failover."""

    connection_errors = (*KombuTransport.connection_errors, ResponseError)


def register() -> None:
    """Make this the transport of redis:// and rediss:// in this process."""
    for scheme in ("redis", "rediss"):
        kombu.transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
