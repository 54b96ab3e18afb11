"""Signatures of our tasks: the only module that needs Celery, imported when one is asked for."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from celery.canvas import Signature

from .contract import (
    POLL_EXTERNAL_JOB,
    PollRequest,
    TriggerRequest,
    is_sealed,
    reference_in,
    shown_message,
    shown_poll,
)
from .errors import ConfKeyMissing

if TYPE_CHECKING:
    from .stubs import TaskStub

# Options that only a canvas gives: it, or the worker that goes on with it, sends the task then.
_OF_A_CANVAS = {"group_id", "group_index", "chord", "chain", "root_id", "parent_id", "producer"}


class RelaySignature(Signature):
    """A signature which, called by itself, goes through our door and not through the host's app."""

    _stub: TaskStub[..., Any, Any]

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:  # type: ignore[override]
        """Send it, by the host's app when it is part of a canvas."""
        if _OF_A_CANVAS & (options.keys() | self.options.keys()):
            return super().apply_async(args, kwargs, **options)
        from .stubs import body_from_chain, conf_from_chain

        merged = {**self.options, **options}
        for ours in ("queue", "argsrepr", "kwargsrepr"):
            merged.pop(ours, None)
        take = body_from_chain if self._stub.name == POLL_EXTERNAL_JOB else conf_from_chain
        positional, keywords = take(
            tuple(args or ()) if not self.immutable else (),
            {**_opened(self.kwargs), **(kwargs or {} if not self.immutable else {})},
        )
        return self._stub.apply_async(positional, keywords, **merged)


def signature(
    stub: TaskStub[..., Any, Any], request: TriggerRequest | PollRequest, *, immutable: bool
) -> RelaySignature:
    """Return a signature for a checked request; what Flower may show of it travels with it.

    It carries its conf, sealed where there is a key. Raises InvalidRequest for one over 1 MB.
    """
    message = _sealed(type(request).from_message(request.to_message()).to_message())
    shown = shown_message(message) if isinstance(request, TriggerRequest) else shown_poll(message)
    made = RelaySignature(
        stub.name,
        args=(),
        kwargs=message,
        options={"queue": stub.queue, "argsrepr": "()", "kwargsrepr": shown},
        immutable=immutable,
    )
    made._stub = stub
    return made


def _sealed(message: dict[str, Any]) -> dict[str, Any]:
    from .client import conf_keys

    then = message.get("then")
    if isinstance(then, dict):
        message = {**message, "then": _sealed(then)}
    conf = message.get("conf")
    if conf is None or reference_in(conf) is not None or not (keys := conf_keys()):
        return message
    return {**message, "conf": conf if is_sealed(conf) else keys.seal(conf)}


def _opened(message: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request with its conf as it was: our door decides anew how it goes."""
    from .client import conf_keys

    fields = TriggerRequest.fields_of(message)
    with suppress(ConfKeyMissing):  # then it goes on as it is
        fields |= {"conf": conf_keys().open(fields["conf"])} if "conf" in fields else {}
    return fields
