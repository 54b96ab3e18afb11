"""Operators that start DAG runs, of this Airflow or another: one, or many at once.

**Which run it is.** A run id that is given is taken as it is. Else it is made from the task instance and what
it asks for: the same on every try and after a clear, so that there is one child; with another conf it is
another one, for the conf of a run cannot be changed. A try that follows a failure, or a clear, has the same
run run again; where it has not ended yet it is waited for.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, ClassVar, Final, NoReturn

from ..client import RelayClient, told_as_unavailable
from ..contract import (
    MAX_FAN_OUT,
    MAX_RESULT_BYTES,
    DagRun,
    Outcome,
    TriggerRequest,
    canonical_json,
    reference_in,
)
from ..errors import (
    BrokerUnavailable,
    DagRunFailed,
    InvalidRequest,
    LogicalDateTaken,
    ResultExpired,
    RunConflict,
    RunExists,
)
from ..fan_out import OnError, fan_out
from ..queues.message import task_id_for
from ..stores import serving
from ..stores.claim_check import ConfKeys
from ..stores.fan_outs import FanOuts
from ..stores.records import Record
from .base import RelayOperator, asked_by, ended_as, has_template, name_of, refused_for_good
from .compat import AIRFLOW_3, AirflowException, AirflowSkipException, parse_datetime
from .hook import DagrelayHook, RelayTarget, client_for
from .links import TRIGGERED_URL, FlowerLink, TriggeredDagLink
from .triggers import RelayTrigger

RUN_ID: Final = "trigger_run_id"
"""The XCom with the id of the run, as Airflow's own operator has it."""

SUMMARY: Final = "dagrelay_fan_out"
"""The XCom with how many requests of a fan-out ended how."""

CREATED_WITHIN_S: Final = 3.0
"""How long a worker stays for the run to be there, so that its link is, before the task is deferred."""

MOST_NAMED: Final = 5
"""How many failures of a fan-out the task's error names."""

# Of the run ids that are made from task instances. Never to change: a retry would start another run.
_CHILDREN: Final = uuid.UUID("9d1f3b52-5a0c-5c2e-8d5d-1c2f7d1b6e0f")

_STATES: Final = ("success", "failed")


class DagRunTrigger(RelayTrigger):
    """Ends a task with what is known of the run that it started."""

    def xcoms(self, outcome: Any) -> dict[str, Any] | None:
        """Do as `RelayTriggerDagRunOperator.outcome` does."""
        return {"return_value": outcome, **_link(outcome.get("url"))}


class DagRunResultTrigger(RelayTrigger):
    """Ends a task with what a task of the run has returned."""

    def xcoms(self, outcome: Any) -> dict[str, Any] | None:
        """Do as `RelayTriggerDagRunOperator.outcome` does."""
        return {"return_value": outcome.get("result"), **_link(outcome.get("url"))}


class FanOutTrigger(RelayTrigger):
    """Ends a task with the outcomes of its requests, where all of them ended well."""

    def xcoms(self, outcome: Any) -> dict[str, Any] | None:
        """Do as `RelayFanOutOperator.outcome` does."""
        if any(one["state"] != "done" for one in outcome):
            return None
        return {"return_value": shortened(outcome), SUMMARY: summary_of(self.request_id, outcome)}


class RelayTriggerDagRunOperator(RelayOperator):
    """Starts one run of a DAG, here or in another Airflow, and waits for its end if it is to.

    Takes the arguments of Airflow's TriggerDagRunOperator, so that a DAG moves over by the name of the class.
    What is otherwise is said here. The XCom `return_value` has what is known of the run (the fields of
    `DagRun`), or what its task `result_from` returned; `trigger_run_id` has the run's id.

    trigger_dag_id, trigger_run_id, conf, note
        Templated. `conf` is a dict, or its JSON as text (``{{ … | tojson }}``), of any size: see
        `relay_conf`. Without a `trigger_run_id` the run has an id that is made from this task instance.
    logical_date
        Templated. None by default, and not the current time: Airflow allows one run for each, and few DAGs
        read it. With one, and without a run id, that is ``manual__<logical date>``, as Airflow makes it.
    run_after
        Airflow 3 holds the run back until then.
    reset_dag_run
        A run that exists already is cleared, so that it runs again; one that has not ended is waited for. By
        default a run of somebody else's fails the task. It must have been made with the same conf.
    skip_when_already_exists
        A run that exists already, or another with its logical date, skips the task.
    wait_for_completion
        Succeed only when the run does. Else the task ends when the run is there.
    allowed_states, failed_states
        In which state of the run the task succeeds or fails, of ``success`` and ``failed``: others are not
        waited for. A state that is in neither fails it.
    fail_when_dag_is_paused
        The same as ``if_paused="fail"``.
    poke_interval, openlineage_inject_parent_info
        Without effect: nothing is polled for each task, and nothing is put into the conf.
    connection
        Which Airflow: the name by which Dagrelay's workers know it (`AIRFLOW_CONN_<ID>` there). It is no
        connection of this Airflow's. Default ``default``.
    result_from, wait_timeout_s, stop_run
        For `wait_for_completion`: see `TriggerRequest`. With `stop_run` the run is set to failed when this
        task is killed, cleared or marked; without it it goes on, as with Airflow's operator.
    if_paused, window, priority, give_up_after_s, conf_by
        See `TriggerRequest`.
    """

    template_fields: Sequence[str] = (
        *RelayOperator.template_fields,
        *("trigger_dag_id", "trigger_run_id", "conf", "logical_date", "run_after", "note", "connection"),
        *("result_from", "wait_for_completion", "skip_when_already_exists"),
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {"conf": "json"}
    operator_extra_links: ClassVar[Any] = (TriggeredDagLink(), FlowerLink())

    def __init__(
        self,
        *,
        trigger_dag_id: str,
        trigger_run_id: str | None = None,
        conf: dict[str, Any] | str | None = None,
        logical_date: str | datetime | None = None,
        run_after: str | datetime | None = None,
        reset_dag_run: bool = False,
        wait_for_completion: bool = False,
        poke_interval: float = 60,
        allowed_states: Sequence[str] | None = None,
        failed_states: Sequence[str] | None = None,
        skip_when_already_exists: bool = False,
        fail_when_dag_is_paused: bool = False,
        note: str | None = None,
        openlineage_inject_parent_info: bool = True,
        connection: str = "default",
        result_from: str | None = None,
        wait_timeout_s: float | None = None,
        stop_run: bool = False,
        if_paused: str | None = None,
        window: int | str | None = None,
        priority: int | None = None,
        give_up_after_s: float | None = None,
        conf_by: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.trigger_dag_id = trigger_dag_id
        self.trigger_run_id = trigger_run_id
        self.conf = conf
        self.logical_date = logical_date
        self.run_after = run_after
        self.reset_dag_run = reset_dag_run
        self.wait_for_completion = wait_for_completion
        self.poke_interval = poke_interval
        with refused_for_good():
            self.allowed_states = _states("allowed_states", allowed_states or ["success"])
            self.failed_states = _states(
                "failed_states", ["failed"] if failed_states is None else failed_states
            )
        self.skip_when_already_exists = skip_when_already_exists
        self.fail_when_dag_is_paused = fail_when_dag_is_paused
        self.note = note
        self.openlineage_inject_parent_info = openlineage_inject_parent_info
        self.connection = connection
        self.result_from = result_from
        self.wait_timeout_s = wait_timeout_s
        self.stop_run = stop_run
        self.if_paused = if_paused
        self.window = window
        self.priority = priority
        self.give_up_after_s = give_up_after_s
        self.conf_by = conf_by
        self.triggered_url: str | None = None
        with refused_for_good():
            self._check()

    def hand_over(self, client: RelayClient, request_id: str, context: Any, served: serving.Served) -> None:
        """Hand the request over, for the run that is this task instance's."""
        conf, logical_date = conf_of(self.conf), instant_of("logical_date", self.logical_date)
        if self.trigger_run_id:
            run_id, chosen = str(self.trigger_run_id), True
        elif logical_date is not None:
            run_id, chosen = f"manual__{logical_date.isoformat()}", True
        else:
            task, digests = _name(self, context), conf_digests(client.confs.keys, conf)
            ids = [child_run_id(task, self.trigger_dag_id, digest) for digest in digests]
            run_id, chosen = served.made if served.made in ids else ids[0], False
        if served.made == run_id or self.reset_dag_run or (served.before is not None and not chosen):
            if_exists = "clear"
        else:
            if_exists = "fail" if chosen else "reuse"
        if served.made and served.made != run_id:
            self.log.warning(
                "it is another run than that of an earlier try, %s: the conf differs", served.made
            )
        request = self._request(
            conf=conf, dag_run_id=run_id, logical_date=logical_date, if_exists=if_exists, wait=self._waits
        )
        client.enqueue(request, task_id=request_id, by=asked_by(context))

    def outcome(self, context: Any, client: RelayClient, request_id: str) -> Any:
        """Return the facts of the run, or its result. Raises what ended it, or that its state will not do."""
        try:
            run = ended_as(client, request_id)
        except (RunExists, RunConflict, LogicalDateTaken) as exc:
            if _truth("skip_when_already_exists", self.skip_when_already_exists):
                raise AirflowSkipException(str(exc)) from None
            raise
        except DagRunFailed:
            found = client.record(request_id)
            if not self._is_good("failed") or found is None or found.run is None:
                raise
            run = DagRun.from_message({**found.run, "state": "failed"})
        except ResultExpired:  # unless it is the result of one of its tasks, what is on record will do
            found = client.record(request_id)
            if self.result_from or found is None or found.state != "done" or found.run is None:
                raise
            run = DagRun.from_message(found.run)
        if self._waits and not self._is_good(run.state):
            with told_as_unavailable():
                serving.forget(client.redis, _name(self, context), request_id)
            where = "failed_states" if run.state in self.failed_states else "none of the allowed_states"
            raise AirflowException(
                f"run {run.dag_run_id!r} of DAG {run.dag_id!r} ended as {run.state}, which is in {where}"
            )
        self.log.info("run %s of DAG %s: %s", run.dag_run_id, run.dag_id, run.state)
        return run.result if self.result_from else run.to_message()

    def _request_for(self, context: Any, target: RelayTarget, client: RelayClient) -> str:
        """Do as before; and say in Airflow which run it is, and where it is, if it comes soon."""
        request_id = super()._request_for(context, target, client)
        found = _with_run(client, request_id)
        if found is not None:
            self.triggered_url = (found.run or {}).get("url")
            context["ti"].xcom_push(key=RUN_ID, value=found.dag_run_id)
            if self.triggered_url:
                context["ti"].xcom_push(key=TRIGGERED_URL, value=self.triggered_url)
        return request_id

    def _link(self, target: RelayTarget, request_id: str) -> None:
        super()._link(target, request_id)
        if self.triggered_url is None:  # resumed
            with suppress(BrokerUnavailable):
                found = client_for(target).record(request_id)
                self.triggered_url = ((found and found.run) or {}).get("url")

    def _defer(self, request_id: str) -> NoReturn:
        self.trigger_class = DagRunResultTrigger if self.result_from else DagRunTrigger
        super()._defer(request_id)

    def _end(self, context: Any, target: RelayTarget, client: RelayClient, request_id: str) -> Any:
        try:
            return super()._end(context, target, client, request_id)
        except DagRunFailed:
            found = client.record(request_id)
            run = (found and found.run) or {}
            if not self.stop_run or run.get("created") or run.get("cleared"):
                raise
            # It joined a run that was just being stopped, for the request before was cancelled.
            self.log.info("run %s was stopped, and runs again", run.get("dag_run_id"))
            return self.execute(context)

    def _may_end_in_triggerer(self) -> bool:
        return (not self._waits or self._is_good("success")) and super()._may_end_in_triggerer()

    @property
    def _waits(self) -> bool:
        return _truth("wait_for_completion", self.wait_for_completion)

    def _is_good(self, state: str) -> bool:
        return state in self.allowed_states and state not in self.failed_states

    def _check(self) -> None:
        """Raise InvalidRequest for what cannot work, whatever the templates turn out to be."""
        if self.reset_dag_run and self.skip_when_already_exists is True:
            raise InvalidRequest("reset_dag_run and skip_when_already_exists: give one of them")
        if self.fail_when_dag_is_paused and self.if_paused not in (None, "fail"):
            raise InvalidRequest(
                f"fail_when_dag_is_paused: contradicts if_paused={self.if_paused!r}: give one of them"
            )
        known = not has_template(self.wait_for_completion)
        waits = not known or self._waits
        if known and waits and not any(map(self._is_good, _STATES)):
            raise InvalidRequest(
                "failed_states: has each of the allowed_states, so whatever becomes of the run fails the "
                "task: take it from one of the two (failed_states=[], say)"
            )
        if not has_template(self.skip_when_already_exists):
            _truth("skip_when_already_exists", self.skip_when_already_exists)
        conf = None if has_template(self.conf) else conf_of(self.conf)
        when = None if has_template(self.logical_date) else instant_of("logical_date", self.logical_date)
        self._request(for_form=True, conf=conf, logical_date=when, wait=waits, dag_run_id=self.trigger_run_id)

    def _request(self, *, for_form: bool = False, **fields: Any) -> TriggerRequest:
        """Return the request; `for_form` without what is known later. Raises InvalidRequest in our words."""
        fields |= {
            "dag_id": self.trigger_dag_id,
            "run_after": self.run_after,
            "connection": self.connection,
            **_given_alike(self),
        }
        if self.fail_when_dag_is_paused:
            fields["if_paused"] = "fail"
        if for_form:
            fields = known_now(fields)
        fields["run_after"] = instant_of("run_after", fields.get("run_after"))
        return checked_request(fields)


class RelayFanOutOperator(RelayOperator):
    """Starts many DAG runs at once, and waits for them all. The XCom `return_value` is a list of outcomes.

    Each outcome is a dict with the fields of `producers.Outcome`, in the order of the requests. Where they
    are over 1 MB together, each has only its id, its run, its state and the error; `dagrelay_fan_out` has the
    counts. A try that follows a failure starts again what did not end well, and leaves alone what did; after
    a clear all of it runs again.

    requests
        Up to 50,000 dicts with the fields of `TriggerRequest`, or such requests. Templated.
    trigger_dag_id, confs
        Instead of them: one DAG, and a conf for each of its runs. Templated.
    wait_for_completion
        Wait for the ends of the runs (the default). Else the task ends when all of them are there.
    on_error
        ``stop``: after the first that failed nothing more is started. Default ``continue``.
    allowed_failures
        How many may fail, or be cancelled, without failing the task: a number, or a fraction as 0.05. By
        default none.
    connection, note, result_from, wait_timeout_s, stop_run
        For all requests that do not say it themselves: see `TriggerRequest`.
    if_paused, window, priority, give_up_after_s, conf_by
        The same.
    """

    template_fields: Sequence[str] = (
        *RelayOperator.template_fields,
        *("requests", "trigger_dag_id", "confs", "connection", "note", "result_from"),
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {"requests": "json", "confs": "json"}
    trigger_class = FanOutTrigger

    def __init__(
        self,
        *,
        requests: Iterable[Mapping[str, Any] | TriggerRequest] | str | None = None,
        trigger_dag_id: str | None = None,
        confs: Iterable[dict[str, Any] | None] | str | None = None,
        wait_for_completion: bool = True,
        on_error: OnError = "continue",
        allowed_failures: float = 0,
        connection: str | None = None,
        note: str | None = None,
        result_from: str | None = None,
        wait_timeout_s: float | None = None,
        stop_run: bool = False,
        if_paused: str | None = None,
        window: int | str | None = None,
        priority: int | None = None,
        give_up_after_s: float | None = None,
        conf_by: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.requests = list(requests) if isinstance(requests, Iterator) else requests
        self.trigger_dag_id = trigger_dag_id
        self.confs = list(confs) if isinstance(confs, Iterator) else confs
        self.wait_for_completion = wait_for_completion
        self.on_error = on_error
        self.allowed_failures = allowed_failures
        self.connection = connection
        self.note = note
        self.result_from = result_from
        self.wait_timeout_s = wait_timeout_s
        self.stop_run = stop_run
        self.if_paused = if_paused
        self.window = window
        self.priority = priority
        self.give_up_after_s = give_up_after_s
        self.conf_by = conf_by
        self.first_wait_s = 0.0 if wait_for_completion else CREATED_WITHIN_S
        with refused_for_good():
            self._check()

    def hand_over(self, client: RelayClient, request_id: str, context: Any, served: serving.Served) -> None:
        """Hand all requests over, each for the run that is its own."""
        before: dict[serving.RunName, serving.RunBefore] = {}
        if served.before is not None:
            with told_as_unavailable():
                before = _runs_before(client, served.before)
        requests = with_run_ids(
            *(_name(self, context), self._given(self._defaults()), before),
            cleared=served.cleared,
            keys=client.confs.keys,
        )
        fan_out(
            requests,
            on_error=self.on_error,
            wait=True if self.wait_for_completion else None,
            relay=client,
            by=asked_by(context),
            fan_out_id=request_id,
            more=[handed_on(one, before, cleared=served.cleared) for one in requests] if before else (),
        )

    def outcome(self, context: Any, client: RelayClient, request_id: str) -> Any:
        """Return the outcomes. Raises AirflowException, naming the first, where too many did not end well."""
        ended: list[Outcome] = ended_as(client, request_id)
        outcomes = [one.to_message() for one in ended]
        context["ti"].xcom_push(key=SUMMARY, value=summary_of(request_id, outcomes))
        bad = [(index, one) for index, one in enumerate(ended) if one.state != "done"]
        if len(bad) > allowed_of(self.allowed_failures, len(ended)):
            with told_as_unavailable():
                serving.forget(client.redis, _name(self, context), request_id)
            raise AirflowException(failures_of(bad, len(ended), self.allowed_failures))
        if bad:
            self.log.warning("%s", failures_of(bad, len(ended), self.allowed_failures))
        kept = shortened(outcomes)
        if kept is not outcomes:
            self.log.info("the outcomes are over %d bytes: without their runs", MAX_RESULT_BYTES)
        return kept

    def _defaults(self) -> dict[str, Any]:
        """Return what all requests have that do not say it themselves."""
        return {
            **({"dag_id": self.trigger_dag_id} if self.trigger_dag_id is not None else {}),
            "connection": self.connection or None,
            **_given_alike(self),
            "wait": self.wait_for_completion or None,
        }

    def _given(self, defaults: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each request: where it stands, and its fields. Raises InvalidRequest."""
        if self.requests is not None:
            name, several = "requests", [_fields_of(one) for one in _several("requests", self.requests)]
        else:
            name, several = "confs", [{"conf": conf} for conf in _several("confs", self.confs)]
        for index, fields in enumerate(several):
            given = {key: value for key, value in fields.items() if value is not None}
            yield f"{name}[{index}]", {**defaults, **given}

    def _check(self) -> None:
        """Raise InvalidRequest for what cannot work, whatever the templates turn out to be."""
        if (self.requests is None) == (self.confs is None):
            raise InvalidRequest("requests: give them, or trigger_dag_id and confs")
        if (self.confs is None) != (self.trigger_dag_id is None):
            raise InvalidRequest("trigger_dag_id: goes with confs, and each request names its own")
        if self.on_error not in ("continue", "stop"):
            raise InvalidRequest("on_error: give 'continue' or 'stop'")
        allowed_of(self.allowed_failures, 1)
        defaults = known_now(self._defaults())
        given = self.requests if self.requests is not None else self.confs
        if isinstance(given, list | tuple):
            for where, fields in self._given(defaults):
                known = known_now(fields)
                checked_request({**known, "conf": conf_of(known.get("conf"), f"{where}: conf")}, where)
        else:
            if not has_template(given):
                _several("requests" if self.requests is not None else "confs", given)
            checked_request({"dag_id": LATER, **defaults})


# What is asked for


def _given_alike(operator: RelayTriggerDagRunOperator | RelayFanOutOperator) -> dict[str, Any]:
    """Return the fields of a request that both operators take as their own arguments."""
    return {
        "note": operator.note or None,
        "result_from": operator.result_from or None,
        "wait_timeout_s": operator.wait_timeout_s,
        "stop_run": operator.stop_run or None,
        "if_paused": operator.if_paused,
        "window": operator.window,
        "priority": operator.priority,
        "give_up_after_s": operator.give_up_after_s,
        "conf_by": operator.conf_by,
    }


def _name(operator: RelayOperator, context: Any) -> str:
    target = operator._target or DagrelayHook(operator.relay_conn_id).target
    return name_of(context, target.airflow_name)


def child_run_id(task: str, dag_id: str, *asked: Any) -> str:
    """Return the id of the run that a task instance starts for what it asks: one name for one child."""
    told = json.dumps([task, dag_id, *asked]).encode("utf-8", "surrogatepass").decode("latin-1")
    return f"relay__{uuid.uuid5(_CHILDREN, told)}"


def conf_digests(keys: ConfKeys, conf: dict[str, Any] | None) -> list[str]:
    """Return what is the same for equal confs; where there is a key, nobody without it can try guesses.

    After it, what it was by the keys before, and without one: a key that is replaced between two tries makes
    no other run.
    """
    if not conf:
        return [""]
    if (reference := reference_in(conf)) is not None:
        return [reference]
    try:
        return keys.references_of(canonical_json(conf))
    except (TypeError, ValueError, RecursionError):
        return [""]  # no JSON, which the request is refused for


def conf_of(value: Any, name: str = "conf") -> dict[str, Any] | None:
    """Return a conf that may be text. Raises InvalidRequest."""
    if not isinstance(value, str):
        return value if value is None or isinstance(value, dict) else _no_conf(name, value)
    if not value.strip():
        return None
    try:
        found = json.loads(value)
    except ValueError:
        raise InvalidRequest(f"{name}: is text that is no JSON: in a template, end with | tojson") from None
    return found if found is None or isinstance(found, dict) else _no_conf(name, found)


def _no_conf(name: str, value: Any) -> NoReturn:
    kind = type(value).__name__
    raise InvalidRequest(f"{name}: is of type {kind}: a conf is an object (a dict), or its JSON as text")


def instant_of(name: str, value: Any) -> datetime | None:
    """Return a date and time that may be text; without a time zone it is in Airflow's own.

    Raises InvalidRequest.
    """
    if value is None or (isinstance(value, str) and value.strip() in ("", "None")):
        return None
    if not isinstance(value, str | datetime):  # NOTSET of Airflow's own operator among them
        if type(value).__name__ == "ArgNotSet":
            return None
        raise InvalidRequest(f"{name}: is of type {type(value).__name__}: give a date and time, or its text")
    try:
        found = parse_datetime(value if isinstance(value, str) else value.isoformat())
        return datetime.fromisoformat(found.isoformat())
    except (ValueError, OverflowError):
        raise InvalidRequest(f"{name}: is no date and time") from None


LATER: Final = "known_later"


def known_now(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a DAG file says already of the fields of a request; a templated DAG has a name as well."""
    known = {name: value for name, value in fields.items() if not has_template(value)}
    return {**known, "dag_id": LATER} if has_template(fields.get("dag_id")) else known


def checked_request(fields: Mapping[str, Any], where: str = "") -> TriggerRequest:
    """Return the request of the fields that are not None. Raises InvalidRequest.

    It says `where`, if it is one of many; else it is in the words of `RelayTriggerDagRunOperator`.
    """
    try:
        return TriggerRequest(**{name: value for name, value in fields.items() if value is not None})
    except InvalidRequest as exc:
        said = str(exc).replace("needs wait=True", "needs wait_for_completion=True")
        if where:
            raise InvalidRequest(f"{where}: {said}") from None
        said = re.sub(r"(^|; )(dag_id|dag_run_id)(?=:)", lambda found: found[1] + _NAMES[found[2]], said)
        raise InvalidRequest(said) from None


_NAMES: Final = {"dag_id": "trigger_dag_id", "dag_run_id": "trigger_run_id"}


def _states(name: str, given: Sequence[Any]) -> list[str]:
    if isinstance(given, str):
        raise InvalidRequest(f"{name}: give a list of states")
    states = [str(getattr(one, "value", one)) for one in given]
    for state in states:
        if state not in _STATES:
            raise InvalidRequest(
                f"{name}: has {state!r}, and it is the end of the run that is waited for: "
                "give 'success', 'failed', or both"
            )
    return states


def _truth(name: str, value: Any) -> bool:
    """Return what is true or false, as text too: that is what a template yields."""
    if isinstance(value, bool) or value is None:
        return bool(value)
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off", "none", ""):
        return False
    raise InvalidRequest(f"{name}: is neither true nor false")


def _with_run(client: RelayClient, request_id: str) -> Record | None:
    """Return what is on record of a request: as soon as it has a run or has ended, or after a time."""
    until, pause_s = time.monotonic() + CREATED_WITHIN_S, 0.01
    while True:
        found = client.record(request_id)
        if (found is not None and (found.run or found.ended)) or time.monotonic() > until:
            return found
        time.sleep(pause_s)
        pause_s = min(0.1, 1.3 * pause_s)


def _link(url: str | None) -> dict[str, Any]:
    """Return the XComs by which Airflow finds the link to the run."""
    if not url:
        return {}
    return {TRIGGERED_URL: url, **({f"_link_{TriggeredDagLink.__name__}": url} if AIRFLOW_3 else {})}


# Many


def _several(name: str, given: Any) -> list[Any]:
    """Return what may be a list, an XCom's sequence, or a list's JSON. Raises InvalidRequest."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise InvalidRequest(
                f"{name}: is text that is no JSON: in a template, end with | tojson"
            ) from None
    if isinstance(given, Mapping | str | bytes | TriggerRequest) or not isinstance(given, Iterable):
        raise InvalidRequest(f"{name}: is of type {type(given).__name__}: give a list")
    several = list(given)
    if len(several) > MAX_FAN_OUT:
        raise InvalidRequest(f"{name}: a fan-out has at most {MAX_FAN_OUT}; make several of them")
    return several


def _fields_of(given: Any) -> dict[str, Any]:
    if isinstance(given, TriggerRequest):
        return {name: getattr(given, name) for name in given.model_fields_set}
    if isinstance(given, Mapping):
        return dict(given)
    raise InvalidRequest(
        f"requests: has one of type {type(given).__name__}: give dicts with the fields of TriggerRequest"
    )


def with_run_ids(
    task: str,
    several: Iterable[tuple[str, Mapping[str, Any]]],
    before: Mapping[serving.RunName, serving.RunBefore],
    *,
    cleared: bool,
    keys: ConfKeys = ConfKeys(),  # noqa: B008 - never changed
) -> list[TriggerRequest]:
    """Return the requests of a task instance, each for its run; equal ones are runs of their own.

    `several`: where each stands, and its fields. `before`: what became of them in the try before. What ended
    well is found again, unless somebody cleared the task; the rest runs again, where the run is not somebody
    else's. Raises InvalidRequest.
    """
    seen: Counter[tuple[Any, ...]] = Counter()
    known_ids = {run_id for _, _, run_id in before}
    requests = []
    for where, given in several:
        fields = {**given, "conf": conf_of(given.get("conf"), f"{where}: conf")}
        ours = not fields.get("key") and not fields.get("dag_run_id")
        if ours:
            dag_id, date = str(fields.get("dag_id")), str(fields.get("logical_date"))
            digests = conf_digests(keys, fields["conf"])
            asked = (dag_id, fields.get("connection"), date)
            seen[*asked, digests[0]] += 1
            number = seen[*asked, digests[0]]
            ids = [child_run_id(task, *asked, digest, number) for digest in digests]
            fields["dag_run_id"] = next((one for one in ids if one in known_ids), ids[0])
        request = checked_request(fields, where)
        known = before.get(_run_of(request))
        again = cleared or known is None or not known.done
        if before and again and "if_exists" not in given and (ours or (known is not None and known.made)):
            request = request.model_copy(update={"if_exists": "clear"})
        requests.append(request)
    return requests


def _run_of(request: TriggerRequest) -> serving.RunName:
    return request.connection, request.dag_id, request.run_id_for("")


def handed_on(
    request: TriggerRequest,
    before: Mapping[serving.RunName, serving.RunBefore],
    *,
    cleared: bool,
) -> dict[str, str]:
    """Return what the record of a request is to say of the tries before it."""
    known = before.get(_run_of(request))
    return known.handed_on(cleared=cleared) if known is not None else {}


def _runs_before(client: RelayClient, fan_out_id: str) -> dict[serving.RunName, serving.RunBefore]:
    """Return what became of each run of a fan-out. Raises what redis-py raises."""
    state = FanOuts(client.redis).get(fan_out_id)
    ids = [task_id_for("fan-out", fan_out_id, str(number)) for number in range(state.total if state else 0)]
    return serving.runs_before(client.redis, ids)


def allowed_of(allowed: Any, total: int) -> int:
    """Return how many of so many may fail. Raises InvalidRequest."""
    if not isinstance(allowed, bool) and isinstance(allowed, int) and allowed >= 0:
        return allowed
    if isinstance(allowed, float) and 0 <= allowed <= 1:
        return int(allowed * total + 1e-9)  # 0.29 of 100 are 28.999999999999996
    raise InvalidRequest("allowed_failures: give a number of 0 or more, or a fraction from 0.0 to 1.0")


def summary_of(fan_out_id: str, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many ended how."""
    counts = Counter(one["state"] for one in outcomes)
    return {
        "fan_out_id": fan_out_id,
        "total": len(outcomes),
        **{state: counts[state] for state in ("done", "failed", "cancelled")},
    }


def failures_of(bad: Sequence[tuple[int, Outcome]], total: int, allowed: float) -> str:
    """Return the first failures, in one line."""
    told = [
        f"[{index}] run {one.dag_run_id} of DAG {one.dag_id} {one.state}: {one.error}: {one.reason}"[:300]
        for index, one in bad[:MOST_NAMED]
    ]
    more = f"; and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
    return f"{len(bad)} of {total} did not end well (allowed: {allowed}): {'; '.join(told)}{more}"


def shortened(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return outcomes as they may be kept: whole, or each by its ids, its state and its error alone."""
    size = 0
    for one in outcomes:
        size += len(json.dumps(one, default=str))
        if size > MAX_RESULT_BYTES:
            kept = ("id", "dag_id", "dag_run_id", "state", "error")
            return [{name: each[name] for name in kept} for each in outcomes]
    return outcomes


__all__ = ["RUN_ID", "SUMMARY", "RelayFanOutOperator", "RelayTriggerDagRunOperator"]
