"""The desk for failures as callers have it: `RelayClient.dead`.

::

    for letter in relay.dead.list(error="DagNotFound"):
        relay.dead.replay(letter.id)

A replay is a new request, with a task id of its own, that names the letter's. It keeps the key, or else the
run id, so it is still the same run; its clock starts anew; an external job is submitted with a new key. What
was to follow it in a chain, and its callbacks, go with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from .contract import (
    POLL_EXTERNAL_JOB,
    QUEUE_LOOKS,
    TRIGGER_DAG,
    VERSION,
    PollRequest,
    TriggerRequest,
)
from .errors import (
    AlreadyReplayed,
    ConfGone,
    DeadLetterUnknown,
    DeskError,
    InvalidRequest,
    NotReplayable,
    ResultNotReady,
)
from .handle import Handle
from .stores.dead import DESK_LOOK, LOOK_PAGE, Dead, Filter, Letter, look_key
from .stores.envelope import _envelope, _iso, trace_of
from .stores.fan_outs import FAN_OUT_END

if TYPE_CHECKING:
    from .client import RelayClient
    from .stores.records import Accepted

Choice = Literal["reuse", "clear"]

HEAR_EVERY_S: Final = 0.05
AT_ONCE: Final = 50
"""How many letters are read, checked and sent in one go: each may be over a megabyte."""


@dataclass(frozen=True, slots=True)
class RunSeen:
    """What Airflow says of the run of a letter."""

    state: str | None = None
    """Its state; None where there is no such run."""
    url: str | None = None
    unknown: str = ""
    """Why it could not be found out, if so."""

    @property
    def exists(self) -> bool:
        return self.state is not None


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of the replay of one letter: the id of what came of it, or the error that kept it back."""

    letter_id: str
    task_id: str = ""
    error: DeskError | InvalidRequest | None = None


class Desk:
    """The dead letters of one relay. Every method raises BrokerUnavailable when Redis does not answer."""

    def __init__(self, relay: RelayClient) -> None:
        self._relay = relay
        self.store = Dead(relay.redis)
        """What lies beneath. Its methods raise what redis-py raises."""

    def list(
        self,
        *,
        dag_id: str | None = None,
        error: str | None = None,
        connection: str | None = None,
        service: str | None = None,
        key_prefix: str | None = None,
        reason: str | None = None,
        fan_out: str | None = None,
        since: float | None = None,
        until: float | None = None,
        replayed: bool = False,
    ) -> Iterator[Letter]:
        """Yield letters, the newest first, without their requests: all of them, or those that match.

        `error` is a class in `errors`, or "Expired"; `reason` is in the reason, whatever its case; `since`
        and `until` are in seconds since 1970; `replayed` asks for those that were replayed, instead of those
        that were not.
        """
        from .client import told_as_unavailable

        wanted = Filter(
            dag_id, error, connection, service, key_prefix, reason, fan_out, since, until, replayed
        )
        with told_as_unavailable():
            yield from self.store.list(wanted)

    def get(self, letter_id: str) -> Letter | None:
        """Return one letter, with its request (the conf in it), its history and its traceback; or None."""
        from .client import told_as_unavailable

        with told_as_unavailable():
            return self.store.get(letter_id)

    def count_by_error(self) -> dict[str, int]:
        """Return how many letters there are of each error that nobody has replayed."""
        from .client import told_as_unavailable

        with told_as_unavailable():
            return self.store.count_by_error()

    def replay(
        self,
        letter_id: str,
        *,
        if_exists: Choice | None = None,
        changed: Mapping[str, Any] | None = None,
    ) -> Handle[Any]:
        """Send the request of a letter again, once; return the handle of the new request.

        `if_exists` says what to do where its run is there already, instead of what the request says.
        `changed` are the fields of the request to be sent instead of the letter's own: see `fields_of`.

        Raises DeadLetterUnknown, AlreadyReplayed, NotReplayable, and InvalidRequest for what is wrong with
        the request: the letter stays as it is.
        """
        (sent,) = self.replay_many([letter_id], if_exists=if_exists, changed=changed)
        if sent.error is not None:
            raise sent.error
        return Handle(sent.task_id, None, self._relay)

    def replay_many(
        self,
        letter_ids: Sequence[str],
        *,
        if_exists: Choice | Mapping[str, Choice] | None = None,
        changed: Mapping[str, Any] | None = None,
    ) -> Sequence[Sent]:
        """Do as `replay` does for many, and return what became of each, in order.

        `if_exists` may be given for each by its id. Where the connection breaks some may have been sent: what
        was is marked, so that to repeat it sends the rest.
        """
        from .client import told_as_unavailable

        by = self._relay.settings.client_name
        sent: list[Sent] = []
        with told_as_unavailable():
            for start in range(0, len(letter_ids), AT_ONCE):
                page = letter_ids[start : start + AT_ONCE]
                made: dict[str, Accepted | DeskError | InvalidRequest | None] = {}
                for letter_id in page:
                    choice = if_exists.get(letter_id) if isinstance(if_exists, Mapping) else if_exists
                    made[letter_id] = self._made(letter_id, choice, changed)
                ready = [(one, item) for one, item in made.items() if isinstance(item, tuple)]
                answers = {
                    one: answer for (one, _), answer in zip(ready, self.store.replay(ready, by), strict=True)
                }
                for letter_id in page:
                    item = made[letter_id]
                    if isinstance(item, Exception):
                        sent.append(Sent(letter_id, error=item))
                        continue
                    said = answers[letter_id] if item else self.store.put_back(letter_id, by)
                    if said.verdict == "sent":
                        sent.append(Sent(letter_id, said.task_id))
                    elif said.verdict == "no conf":
                        why = str(ConfGone(item.reference if item else ""))
                        sent.append(Sent(letter_id, error=NotReplayable(letter_id, why)))
                    elif said.verdict == "replayed":
                        sent.append(Sent(letter_id, error=AlreadyReplayed(letter_id, said.task_id)))
                    else:
                        sent.append(Sent(letter_id, error=DeadLetterUnknown(letter_id)))
        return sent

    def _made(
        self, letter_id: str, if_exists: Choice | None, changed: Mapping[str, Any] | None
    ) -> Accepted | DeskError | InvalidRequest | None:
        """Return what is to be accepted for a letter, None where its message goes back as it was, or why
        not."""
        letter = self.store.get(letter_id)
        try:
            if letter is None:
                raise DeadLetterUnknown(letter_id)
            if letter.replayed_as is not None:
                raise AlreadyReplayed(letter_id, letter.replayed_as)
            if goes_back(letter):
                return None
            given = fields_of(letter) if changed is None else dict(changed)
            request = checked(letter, given, if_exists)
            kept = letter.request or {}
            trace = trace_of(kept)
            item = self._relay.item(
                request,
                priority=_priority(kept.get("priority")),
                link=kept.get("callbacks"),
                link_error=kept.get("errbacks"),
                chain=[anew(one) for one in kept.get("chain") or ()] or None,
                traceparent=trace and trace.traceparent,
                tracestate=(trace and trace.tracestate) or None,
            )
        except (DeskError, InvalidRequest) as exc:
            return exc
        return item._replace(more=f"{item.more}\0replay_of\0{letter_id}")

    def discard(self, letter_ids: Sequence[str]) -> int:
        """Take letters off the desk for good; return how many of them there were."""
        from .client import told_as_unavailable

        with told_as_unavailable():
            return sum(self.store.discard(letter_ids, self._relay.settings.client_name))

    def look(self, runs: Mapping[str, tuple[str, str, str]], timeout_s: float = 30.0) -> dict[str, RunSeen]:
        """Have workers ask Airflow for the runs of letters, and return what it says of each.

        `runs` has connection, DAG id and run id for each letter. Raises ResultNotReady when no worker has
        said all of it within the time.
        """
        from .client import new_task_id, told_as_unavailable

        look_id = new_task_id()
        each = [(letter_id, *run) for letter_id, run in runs.items()]
        pages = [each[start : start + LOOK_PAGE] for start in range(0, len(each), LOOK_PAGE)]
        seen: dict[str, RunSeen] = {}
        answered: set[int] = set()
        deadline = time.monotonic() + timeout_s
        with told_as_unavailable():
            redis = self._relay.redis
            with redis.pipeline(transaction=False) as pipe:
                for page, some in enumerate(pages):
                    message = _look_message(look_id, page, some, self._relay.settings.client_name, timeout_s)
                    pipe.lpush(QUEUE_LOOKS, message)
                pipe.execute()
            read = 0
            while len(answered) < len(pages):
                for said in self.store.heard(look_id, read):
                    read += 1
                    answered.add(said["page"])
                    for letter_id, run in said["runs"].items():
                        seen[letter_id] = RunSeen(**run) if run is not None else RunSeen()
                if len(answered) < len(pages):
                    if time.monotonic() >= deadline:
                        raise ResultNotReady(look_id, f"{len(seen)} of {len(runs)} runs were asked for")
                    time.sleep(HEAR_EVERY_S)
            if pages:
                redis.delete(look_key(look_id))
        return seen


def goes_back(letter: Letter) -> bool:
    """Tell whether a replay puts the letter's message back to its queue as it was: it is no request of
    ours."""
    return letter.raw_bytes > 0 and letter.unrecorded


def why_not(letter: Letter) -> str:
    """Return why a letter that has not been replayed cannot be, as far as that can be told without its
    request."""
    if letter.task == FAN_OUT_END or (letter.fan_out and letter.fan_out == letter.id):
        return f"it is a whole fan-out: its requests have letters of their own, with --fan-out {letter.id}"
    if letter.request_bytes or goes_back(letter):
        return ""
    if letter.raw_bytes:
        return (
            "no worker could read its message, and its id is used up: send it again from where it came from"
        )
    if letter.task not in (TRIGGER_DAG, POLL_EXTERNAL_JOB):
        return f"{letter.task or 'its task'} is nothing that was asked for by itself"
    return "its message was lost from Redis: send it again from where it came from"


def fields_of(letter: Letter, *, pinned: bool = True) -> dict[str, Any]:
    """Return the fields of the request that a replay sends; with the run id that it had, if it has no key.

    Raises NotReplayable, and InvalidRequest where what came by position contradicts them.
    """
    problem = why_not(letter)
    if problem or letter.request is None:
        raise NotReplayable(letter.id, problem or "it is no request")
    task, args = letter.request["task"], letter.request["args"]
    version = letter.request["kwargs"].get("v", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise NotReplayable(letter.id, f"its request is of v{version}: use a newer release of dagrelay")
    given = TriggerRequest.fields_of(letter.request["kwargs"])
    merged = _trigger_fields(args, given) if task == TRIGGER_DAG else _poll_fields(args, given)
    return pinned_fields(letter, merged) if pinned and task == TRIGGER_DAG else merged


def fields_to_edit(letter: Letter) -> dict[str, Any]:
    """Return the fields as they were asked for; what came by position is left out where it contradicts them.

    Raises NotReplayable.
    """
    try:
        return fields_of(letter, pinned=False)
    except InvalidRequest:
        return TriggerRequest.fields_of((letter.request or {})["kwargs"])


def pinned_fields(letter: Letter, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a trigger with the run id that the letter's request had, unless it has a key."""
    if given.get("key") is not None or given.get("dag_run_id") is not None:
        return given
    return {**given, "dag_run_id": letter.dag_run_id or TriggerRequest("any").run_id_for(letter.id)}


def checked(
    letter: Letter, given: Mapping[str, Any], if_exists: Choice | None = None
) -> TriggerRequest | PollRequest:
    """Return the request that these fields are. Raises InvalidRequest, naming every wrong one."""
    if letter.task == POLL_EXTERNAL_JOB:
        return PollRequest(**given)
    # "skip" is to reuse it, whatever its conf is.
    if if_exists == "clear" or (if_exists == "reuse" and given.get("if_exists") != "skip"):
        given = {**given, "if_exists": if_exists}
    return TriggerRequest(**given)


def run_of(
    letter: Letter, request: TriggerRequest | PollRequest | None = None
) -> tuple[str, str, str] | None:
    """Return connection, DAG id and run id of the run that a replay may find there; None for no such."""
    if request is None:
        if letter.task != TRIGGER_DAG or not letter.dag_id or not letter.dag_run_id:
            return None
        return letter.connection or "default", letter.dag_id, letter.dag_run_id
    if isinstance(request, PollRequest) or (request.key is None and request.dag_run_id is None):
        return None
    return request.connection, request.dag_id, request.run_id_for(letter.id)


def anew(signature: Any) -> Any:
    """Return a signature of a chain to be sent anew: without its id, which has ended, and its chord."""
    if not isinstance(signature, dict):
        return signature
    options = signature.get("options") or {}
    kept = {name: value for name, value in options.items() if name not in _OF_BEFORE}
    made = {**signature, "options": kept}
    body = (signature.get("kwargs") or {}).get("body")
    if signature.get("subtask_type") == "chord" and isinstance(body, dict):
        made["kwargs"] = {**signature["kwargs"], "body": anew(body)}
    return made


_OF_BEFORE: Final = ("task_id", "chord", "group_id", "group_index", "root_id", "parent_id")


def _trigger_fields(args: Sequence[Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with what came by position: DAG id, conf, as `tasks/trigger.py` reads them."""
    merged, rest = dict(given), [*args]
    if rest and isinstance(rest[0], str) and merged.setdefault("dag_id", rest[0]) != rest.pop(0):
        raise InvalidRequest("dag_id: given by position and by name, and they differ")
    if rest and rest[0] is not None and "conf" in merged:
        raise InvalidRequest("conf: given by position (or by the task before) and by name")
    if rest and rest[0] is not None:
        merged["conf"] = rest[0]
    return merged


def _poll_fields(args: Sequence[Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with what came by position as the body of `submit`."""
    if not args or args[0] is None:
        return dict(given)
    submit = given.get("submit")
    if not isinstance(submit, Mapping) or submit.get("body") is not None:
        raise InvalidRequest(
            "submit: the result of the task before becomes its body: give a submit without one"
        )
    return {**given, "submit": {**submit, "body": args[0]}}


def _priority(kept: Any) -> int:
    return kept if isinstance(kept, int) and not isinstance(kept, bool) and 0 <= kept <= 9 else 0


def _look_message(look_id: str, page: int, runs: Sequence[Any], by: str, timeout_s: float) -> bytes:
    return _envelope(
        task=DESK_LOOK,
        task_id=f"{look_id}.{page}",
        queue=QUEUE_LOOKS,
        kwargs={"v": VERSION, "look": look_id, "page": page, "runs": runs},
        callbacks=None,
        errbacks=None,
        kwargsrepr=f"runs={len(runs)}",
        eta=None,
        # Whoever asks has gone by then. A worker's clock may be behind or ahead of this one.
        expires=_iso(time.time() + timeout_s + 60),
        priority=0,
        origin=by,
        ignore_result=True,
    )
