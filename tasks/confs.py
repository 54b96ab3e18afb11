"""Confs as a worker needs them: opened, held, and compared, whichever way they came.

A conf that is sealed is opened here, and goes to Airflow as it was; a reference goes to Airflow as it is.
What cannot be opened here waits for a worker that has the key: that a key is missing is no fault of the
request.
"""

from __future__ import annotations

from typing import Any, Final

from celery.utils.log import get_logger

from producers.contract import TriggerRequest, is_sealed, reference_in
from producers.errors import ConfGone, ConfKeyMissing, ConfUnreadable
from producers.stores.claim_check import ClaimChecks, upload

from .again import NEWER_RETRY_S, retry
from .app import store_client
from .settings import settings

log = get_logger("dagrelay.conf")

UNREADABLE: Final = "another conf, or one that cannot be compared: it is stored, and cannot be read here"

_told: set[str] = set()


def claim_checks() -> ClaimChecks:
    """Return the stored confs in the worker's Redis."""
    return ClaimChecks(store_client(), settings().confs.keys)


def opened(request: TriggerRequest) -> TriggerRequest:
    """Return a request with its conf as it was before it was sealed. Raises ConfUnreadable."""
    if not is_sealed(request.conf):
        return request
    return request.model_copy(update={"conf": settings().confs.keys.open(request.conf)})


def taken_up(task: Any, request: TriggerRequest, *, made: bool) -> TriggerRequest:
    """Return a request as Airflow is to have it, with what its conf refers to held by it.

    Unless its run is `made` already: that has its conf. Raises Retry where another worker is to open the
    conf, ConfGone, ConfUnreadable.
    """
    try:
        request = opened(request)
    except ConfKeyMissing as exc:
        raise left(task, exc) from exc
    if made:
        return request
    if request.conf_by == "reference" and reference_in(request.conf) is None:  # it came past our door
        packed = settings().confs.packed(request.conf, "reference")
        request = request.model_copy(update={"conf": packed.conf})
        upload(store_client(), packed)
    if (reference := reference_in(request.conf)) is not None:
        claim_checks().hold(reference, task.request.id)
    return request


def check_readable(task: Any, conf: Any) -> None:
    """Have a conf that is needed later held by the request. Raises Retry where only another worker can read
    it, and ConfGone."""
    keys = settings().confs.keys
    try:
        if is_sealed(conf):
            keys.open(conf)
        elif (reference := reference_in(conf)) is not None:
            claim_checks().hold(reference, task.request.id)  # it may have come past our door
            keys.check(reference)
    except ConfKeyMissing as exc:
        raise left(task, exc) from exc


def left(task: Any, exc: ConfKeyMissing) -> Exception:
    """Leave a message to a worker that has its key; return the exception to raise. It is said once."""
    if str(exc) not in _told:
        _told.add(str(exc))
        log.error("requests wait for a worker with their key, task_id=%s first: %s", task.request.id, exc)
    return retry(task, exc, NEWER_RETRY_S)


def to_compare(asked: Any, there: Any) -> tuple[Any, Any] | str:
    """Return two confs, of which one may be a reference, as they are compared; or how they differ, or "".

    Those that cannot both be read are compared by their references: that of a conf is the same for all who
    have its key. Raises ConfKeyMissing where the key of what is asked for is not here: another worker can.
    """
    mine, theirs = reference_in(asked), reference_in(there)
    if mine == theirs:
        return "" if mine is not None else (asked, there)
    confs = claim_checks()
    if mine is not None:
        settings().confs.keys.check(mine)
    try:
        return confs.real(asked), confs.real(there)
    except (ConfGone, ConfUnreadable):
        pass
    for conf, reference in ((asked, theirs), (there, mine)):
        try:
            if reference is not None and confs.is_it(reference, confs.real(conf)):
                return ""
        except (ConfGone, ConfUnreadable):
            continue
    return UNREADABLE
