"""What can go wrong, as a caller sees it.

One class for each decision that a caller takes. Each says what happened and what to do next, and
survives the trip through Redis: every argument is positional and JSON, so that `Handle.get()` raises
the very class that the worker raised.

::

    DagrelayError
    ├── ConfigurationError        a setting is missing or wrong: mend the environment
    ├── InvalidRequest            the request is wrong by its form: mend the call
    │   ├── ConnectionNotConfigured   it names an Airflow that the worker does not know
    │   ├── ServiceNotConfigured      it names a service that the worker does not know, or another host
    │   ├── NotAllowed                its sender may not ask for it: see `scopes`
    │   └── ConfGone                  its conf is a reference, and what that names is no longer kept
    ├── ConfUnreadable            a conf that is stored or sealed cannot be read: it is damaged
    │   └── ConfKeyMissing            it was sealed by a key that is not here: set DAGRELAY_CONF_KEY
    ├── BrokerUnavailable         Redis did not take it, or did not say: send again with the same key
    ├── ResultError
    │   ├── ResultNotReady        not ended within the timeout of `.get()`: ask again
    │   ├── ResultExpired         ended, and its result is no longer kept: see `dagrelay status`
    │   └── RequestUnknown        no such id was ever accepted here, or its record is gone
    ├── DeskError                 a dead letter is left as it is
    │   ├── DeadLetterUnknown     there is none with this id: it never was, or it is discarded or expired
    │   ├── AlreadyReplayed       it was replayed before: it says as what
    │   └── NotReplayable         there is no request in it that could be sent again
    ├── RequestCancelled          somebody cancelled it, or it expired before it could start
    ├── TaskFailed                it failed in a way that this release has no class for
    ├── Quarantined               no worker could read its message, or it ended each worker that had it
    ├── FanOutBroken              a part of a fan-out was lost: it can never complete
    ├── WebhookNotDelivered       a hook could not be told of an end: the dead letter of that says it again
    ├── TaskStateNotSet           an Airflow task could not be told of an end: its dead letter says it again
    ├── HookNotConfigured         a hook is to be told, and the worker does not know it
    ├── ExternalJobError
    │   ├── ServiceUnavailable    no usable answer: asked again; never the end of a request
    │   ├── SubmitRejected        the service refused to start the job, in its own words
    │   ├── SubmitUnknown         the answer to the submission was lost, and the job is not to be found
    │   ├── ExternalJobFailed     the job failed, in the service's words
    │   │   └── ExternalJobGone   the service has no such job any more
    │   ├── ExternalJobOverdue    timeout_s passed, and the job had not ended
    │   │   └── ExternalJobSilent  nothing was heard of it for longer than heartbeat_s
    │   └── ExternalJobUnreadable  the looks failed, or answered nonsense, more often than max_errors
    └── AirflowError
        ├── AirflowUnavailable    no usable answer: retried; it ends a request as GaveUp at the earliest
        ├── CredentialsRefused    the connection is wrong, not the request: the connection is held
        ├── RequestRejected       Airflow refused it for good, in its own words
        │   ├── DagNotFound       no such DAG, for longer than a redeploy takes
        │   └── DagBroken         the DAG's file has import errors, for longer than a redeploy takes
        ├── DagPaused             the DAG is paused, and the request said if_paused="fail"
        ├── RunConflict           the run id is taken by a run with another conf or logical date
        ├── RunExists             the run exists, and the request said if_exists="fail"
        ├── LogicalDateTaken      another run of the DAG has this logical date
        ├── DagRunFailed          with wait=True: the run failed
        ├── DagRunGone            with wait=True: the run was deleted before it ended
        ├── DagRunOverdue         with wait=True: wait_timeout_s passed, and the run had not ended
        ├── GaveUp                give_up_after_s passed, and no run was made
        └── OutcomeUnknown        give_up_after_s passed after an answer was lost: a run may exist
"""

from __future__ import annotations

from typing import Any


class DagrelayError(Exception):
    """The root of everything that Dagrelay raises on purpose."""


class ConfigurationError(DagrelayError):
    """One or more settings are missing or wrong. Names every one of them, and no secret."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__(*mistakes)
        self.mistakes = mistakes

    def __str__(self) -> str:
        return "configuration: " + "; ".join(self.mistakes)


class InvalidRequest(DagrelayError, ValueError):
    """The request is wrong by its form; nothing was sent. The text names the argument and says what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class NotAllowed(InvalidRequest):
    """The sender may not ask for this. Told to senders that are known; says nothing of what there is."""


class ConfGone(InvalidRequest):
    """A conf is a reference, and the conf itself is not kept any more.

    What is stored lives on for `DAGRELAY_CONF_TTL_S` (a setting of the workers, 30 days by default) after the
    last request with it has ended: a DAG that runs, or is cleared, later than that does not find it.
    """

    def __init__(self, reference: str) -> None:
        super().__init__(reference)
        self.reference = reference

    def __str__(self) -> str:
        return (
            f"conf: {self.reference} is no longer kept: a stored conf expires DAGRELAY_CONF_TTL_S after the "
            "last request with it has ended; send the conf itself again, and raise that where workers have it"
        )


class ConfUnreadable(DagrelayError):
    """A conf that is stored, or sealed in a message, cannot be read. `what` says which, and nothing of it."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(what, problem)
        self.what, self.problem = what, problem

    def __str__(self) -> str:
        return f"{self.what} cannot be read: {self.problem}"


class ConfKeyMissing(ConfUnreadable):
    """A conf was sealed by a key that this process does not have.

    `wanted` is the public name of that key, where it is known, `here` are those of the keys of this process.
    """

    def __init__(self, what: str, wanted: str, here: str) -> None:
        problem = f"it was sealed by {f'key {wanted}' if wanted else 'a key'} that is not here"
        super().__init__(what, f"{problem} ({f'here: {here}' if here else 'none is set'})")
        self.args = (what, wanted, here)
        self.wanted, self.here = wanted, here

    def __str__(self) -> str:
        return f"{super().__str__()}: set DAGRELAY_CONF_KEY to the keys that the sender has"


class ConnectionNotConfigured(InvalidRequest):
    """The request names an Airflow connection that the worker does not have."""

    def __init__(self, connection: str) -> None:
        super().__init__(connection)
        self.connection = connection

    def __str__(self) -> str:
        return (
            f"connection {self.connection!r} is not configured in the worker: "
            f"set AIRFLOW_CONN_{self.connection.upper()} there, or name another connection"
        )


class ServiceNotConfigured(InvalidRequest):
    """The request names a service that the worker does not have, or a URL that is not that service's."""

    def __init__(self, service: str, problem: str = "") -> None:
        super().__init__(service)
        self.args = (service, problem)
        self.service, self.problem = service, problem

    def __str__(self) -> str:
        if self.problem:
            return f"service {self.service!r}: {self.problem}"
        return (
            f"service {self.service!r} is not configured in the worker: "
            f"set DAGRELAY_SERVICE_{self.service.upper()} there, or name another service"
        )


class BrokerUnavailable(DagrelayError):
    """Redis did not take the request, or did not say whether it did.

    Whether it was accepted is then unknown: send it again with the same `key`, and there is still one run.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"Redis is unavailable: {self.reason}; send again with the same key, and there is still one run"
        )


class ResultError(DagrelayError):
    """The outcome cannot be told. This says nothing about the request itself."""


class ResultNotReady(ResultError, TimeoutError):
    """The request has not ended within the timeout. It goes on; ask again."""

    def __init__(self, task_id: str, state: str) -> None:
        super().__init__(task_id, state)
        self.task_id, self.state = task_id, state

    def __str__(self) -> str:
        return f"task {self.task_id} has not ended yet (state: {self.state}); it goes on, ask again"


class ResultExpired(ResultError):
    """The request ended, and its result is no longer kept; the record still tells how it ended."""

    def __init__(self, task_id: str, end: str, reason: str = "") -> None:
        super().__init__(task_id, end, reason)
        self.task_id, self.end, self.reason = task_id, end, reason

    def __str__(self) -> str:
        because = f" ({self.reason})" if self.reason else ""
        return f"the result of task {self.task_id} is no longer kept; it ended as {self.end}{because}"


class RequestUnknown(ResultError):
    """No request with this id is on record: never accepted here, or ended too long ago."""

    def __init__(self, task_id: str) -> None:
        super().__init__(task_id)
        self.task_id = task_id

    def __str__(self) -> str:
        return (
            f"no request with the id {self.task_id} is on record: it was never accepted by this Redis, "
            "or it ended longer ago than records are kept"
        )


class RequestCancelled(DagrelayError):
    """The request was cancelled (revoked), or expired before a worker could start it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"cancelled: {self.reason}"


class TaskFailed(DagrelayError):
    """The worker failed in a way that this release of the library has no class for."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(kind, words)
        self.kind, self.words = kind, words

    def __str__(self) -> str:
        return f"{self.kind}: {self.words}"


class Quarantined(DagrelayError):
    """No worker could read the request's message, or it ended each worker that had it: it was put aside."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"its message was put aside: {self.reason}"


class DeskError(DagrelayError):
    """A dead letter is left as it is."""


class DeadLetterUnknown(DeskError):
    """There is no dead letter with this id: there never was, or it was discarded, or it has expired."""

    def __init__(self, letter_id: str) -> None:
        super().__init__(letter_id)
        self.letter_id = letter_id

    def __str__(self) -> str:
        return f"there is no dead letter {self.letter_id}"


class AlreadyReplayed(DeskError):
    """The dead letter was replayed before. `replayed_as` is the task id of the request that came of it."""

    def __init__(self, letter_id: str, replayed_as: str) -> None:
        super().__init__(letter_id, replayed_as)
        self.letter_id, self.replayed_as = letter_id, replayed_as

    def __str__(self) -> str:
        return f"dead letter {self.letter_id} was replayed already, as {self.replayed_as}; nothing was done"


class NotReplayable(DeskError):
    """There is no request in the dead letter that could be sent again."""

    def __init__(self, letter_id: str, reason: str) -> None:
        super().__init__(letter_id, reason)
        self.letter_id, self.reason = letter_id, reason

    def __str__(self) -> str:
        return f"dead letter {self.letter_id} cannot be replayed: {self.reason}"


class FanOutBroken(DagrelayError):
    """A part of a fan-out was lost from Redis, or its bookkeeping was: it can never complete by itself."""

    def __init__(self, fan_out_id: str, missing: int, reason: str) -> None:
        super().__init__(fan_out_id, missing, reason)
        self.fan_out_id, self.missing, self.reason = fan_out_id, missing, reason

    def __str__(self) -> str:
        return (
            f"fan-out {self.fan_out_id} can never complete ({self.reason}): {self.missing} of its requests "
            "have no outcome; send those again with the same keys"
        )


class WebhookNotDelivered(DagrelayError):
    """A hook could not be told how a request ended. The request itself is not concerned."""

    def __init__(self, hook: str, attempts: int, reason: str) -> None:
        super().__init__(hook, attempts, reason)
        self.hook, self.attempts, self.reason = hook, attempts, reason

    def __str__(self) -> str:
        times = "time" if self.attempts == 1 else "times"
        return f"hook {self.hook!r} could not be told, tried {self.attempts} {times}: {self.reason}"


class TaskStateNotSet(DagrelayError):
    """An Airflow task could not be told how its job ended. The request itself is not concerned."""

    def __init__(self, task: str, state: str, reason: str) -> None:
        super().__init__(task, state, reason)
        self.task, self.state, self.reason = task, state, reason

    def __str__(self) -> str:
        return f"{self.task} was not set to {self.state}: {self.reason}"


class HookNotConfigured(DagrelayError):
    """A request names a hook to be told of its end that the worker does not have."""

    def __init__(self, hook: str) -> None:
        super().__init__(hook)
        self.hook = hook

    def __str__(self) -> str:
        return (
            f"hook {self.hook!r} is not configured in the worker: "
            f"set DAGRELAY_HOOK_{self.hook.upper()} there, and replay its dead letter"
        )


class ExternalJobError(DagrelayError):
    """An outside service, or the way to it, is the cause."""


class ServiceUnavailable(ExternalJobError):
    """The service did not answer, or asked us to come back later, or answered nonsense. Asked again.

    `unsure` is true when the request may have reached it: what was asked for may have been done. `counts` is
    false for what is no error of the service's: 429.
    """

    def __init__(
        self, reason: str, retry_after_s: float | None = None, unsure: bool = True, counts: bool = True
    ) -> None:
        super().__init__(reason, retry_after_s, unsure, counts)
        self.reason, self.retry_after_s, self.unsure, self.counts = reason, retry_after_s, unsure, counts

    def __str__(self) -> str:
        return f"the service is unavailable: {self.reason}"


class SubmitRejected(ExternalJobError):
    """The service refused to start the job. `words` are its own, at most 200 bytes, secrets masked.

    `status` is that of its answer; 0 for a queue that there is not, or that may not be written to.
    """

    def __init__(self, service: str, status: int, words: str) -> None:
        super().__init__(service, status, words)
        self.service, self.status, self.words = service, status, words

    def __str__(self) -> str:
        status = f" ({self.status})" if self.status else ""
        return f"service {self.service!r} refused to start the job{status}: {self.words}"


class SubmitUnknown(ExternalJobError):
    """The answer to the submission was lost, and a second job is not to be started: it may exist or not."""

    def __init__(self, service: str, reference: str, reason: str) -> None:
        super().__init__(service, reference, reason)
        self.service, self.reference, self.reason = service, reference, reason

    def __str__(self) -> str:
        return (
            f"whether service {self.service!r} has started the job is unknown (our reference: "
            f"{self.reference}): {self.reason}; look there before sending it again"
        )


class ExternalJobFailed(ExternalJobError):
    """The job ended in one of the failure states. `words` are the service's own, as `reason` found them."""

    def __init__(self, service: str, job_id: str | None, state: str, words: str = "") -> None:
        super().__init__(service, job_id, state, words)
        self.service, self.job_id, self.state, self.words = service, job_id, state, words

    def __str__(self) -> str:
        because = f": {self.words}" if self.words else ""
        return f"job {self.job_id!r} of service {self.service!r} ended as {self.state!r}{because}"


class ExternalJobGone(ExternalJobFailed):
    """The service has no such job any more: how it ended cannot be known."""

    def __str__(self) -> str:
        return f"job {self.job_id!r} of service {self.service!r} is gone ({self.state}): {self.words}"


class ExternalJobOverdue(ExternalJobError):
    """`timeout_s` passed and the job had not ended; `state` is the last that was seen."""

    def __init__(self, service: str, job_id: str | None, after_s: float, state: str = "") -> None:
        super().__init__(service, job_id, after_s, state)
        self.service, self.job_id, self.after_s, self.state = service, job_id, after_s, state

    def __str__(self) -> str:
        last = f" (last state: {self.state!r})" if self.state else " (no state was ever seen)"
        return (
            f"job {self.job_id!r} of service {self.service!r} had not ended after {self.after_s:.0f} s{last}"
        )


class ExternalJobSilent(ExternalJobOverdue):
    """Nothing was heard of the job for `heartbeat_s`, and nobody can be asked; `state` is the last."""

    def __str__(self) -> str:
        last = f" (last state: {self.state!r})" if self.state else ""
        return (
            f"nothing was heard of job {self.job_id!r} of service {self.service!r} "
            f"for {self.after_s:.0f} s{last}"
        )


class ExternalJobUnreadable(ExternalJobError):
    """What the service answers cannot be used. `field` names the part: state, result, job_id, or answer."""

    def __init__(self, service: str, job_id: str | None, field: str, words: str) -> None:
        super().__init__(service, job_id, field, words)
        self.service, self.job_id, self.field, self.words = service, job_id, field, words

    def __str__(self) -> str:
        return f"job {self.job_id!r} of service {self.service!r}: {self.field}: {self.words}"


class AirflowError(DagrelayError):
    """Airflow, or the way to it, is the cause."""


class AirflowUnavailable(AirflowError):
    """Airflow did not answer, or asked us to come back later (429, 5xx), or somebody else answered. Retried.

    `unsure` is true when the request may have reached Airflow: then a run may exist, or come to exist.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None, unsure: bool = True) -> None:
        super().__init__(reason, retry_after_s, unsure)
        self.reason, self.retry_after_s, self.unsure = reason, retry_after_s, unsure

    def __str__(self) -> str:
        return f"Airflow unavailable: {self.reason}"


class CredentialsRefused(AirflowError):
    """Airflow refuses the connection's user, password or token. The connection is held; requests wait."""

    def __init__(self, connection: str, words: str) -> None:
        super().__init__(connection, words)
        self.connection, self.words = connection, words

    def __str__(self) -> str:
        return f"Airflow refuses the credentials of connection {self.connection!r}: {self.words}"


class RequestRejected(AirflowError):
    """Airflow refused the request for good. `words` are Airflow's own, without what they echo of the conf."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(status, words)
        self.status, self.words = status, words

    def __str__(self) -> str:
        return f"Airflow rejected the request ({self.status}): {self.words}"


class DagNotFound(RequestRejected):
    """Airflow does not know the DAG, for longer than a redeploy takes."""

    def __init__(self, dag_id: str, words: str) -> None:
        super().__init__(404, words)
        self.args = (dag_id, words)
        self.dag_id = dag_id

    def __str__(self) -> str:
        return f"Airflow has no DAG {self.dag_id!r}: {self.words}"


class DagBroken(RequestRejected):
    """The DAG's file has import errors, for longer than a redeploy takes."""

    def __init__(self, dag_id: str, words: str) -> None:
        super().__init__(400, words)
        self.args = (dag_id, words)
        self.dag_id = dag_id

    def __str__(self) -> str:
        return f"the file of DAG {self.dag_id!r} cannot be imported by Airflow: {self.words}"


class DagPaused(AirflowError):
    """The DAG is paused, and the request said if_paused="fail". No run was made."""

    def __init__(self, dag_id: str) -> None:
        super().__init__(dag_id)
        self.dag_id = dag_id

    def __str__(self) -> str:
        return (
            f"DAG {self.dag_id!r} is paused, and no run was made: unpause it, or send if_paused='hold', "
            "'unpause' or 'trigger'"
        )


class RunConflict(AirflowError):
    """The run id is taken by a run that differs: the same key was used for two different requests."""

    def __init__(self, dag_id: str, dag_run_id: str, difference: str) -> None:
        super().__init__(dag_id, dag_run_id, difference)
        self.dag_id, self.dag_run_id, self.difference = dag_id, dag_run_id, difference

    def __str__(self) -> str:
        return (
            f"run {self.dag_run_id!r} of DAG {self.dag_id!r} exists with {self.difference}: "
            "use another key (or dag_run_id) for a different request"
        )


class RunExists(AirflowError):
    """The run exists already, and the request said if_exists="fail"."""

    def __init__(self, dag_id: str, dag_run_id: str, state: str) -> None:
        super().__init__(dag_id, dag_run_id, state)
        self.dag_id, self.dag_run_id, self.state = dag_id, dag_run_id, state

    def __str__(self) -> str:
        return f"run {self.dag_run_id!r} of DAG {self.dag_id!r} exists already (state: {self.state})"


class LogicalDateTaken(AirflowError):
    """Another run of the DAG has the requested logical date; Airflow allows one run for each."""

    def __init__(self, dag_id: str, logical_date: str, taken_by: str = "") -> None:
        super().__init__(dag_id, logical_date, taken_by)
        self.dag_id, self.logical_date, self.taken_by = dag_id, logical_date, taken_by

    def __str__(self) -> str:
        by = f" by run {self.taken_by!r}" if self.taken_by else ""
        return (
            f"logical date {self.logical_date} of DAG {self.dag_id!r} is taken{by}: "
            "name another date, or none"
        )


class DagRunFailed(AirflowError):
    """With wait=True: the run failed. `url` leads to it in Airflow's user interface."""

    def __init__(self, dag_id: str, dag_run_id: str, url: str | None = None) -> None:
        super().__init__(dag_id, dag_run_id, url)
        self.dag_id, self.dag_run_id, self.url = dag_id, dag_run_id, url

    def __str__(self) -> str:
        where = f": {self.url}" if self.url else ""
        return f"run {self.dag_run_id!r} of DAG {self.dag_id!r} failed{where}"


class DagRunGone(AirflowError):
    """With wait=True: the run was deleted in Airflow before its end was seen."""

    def __init__(self, dag_id: str, dag_run_id: str) -> None:
        super().__init__(dag_id, dag_run_id)
        self.dag_id, self.dag_run_id = dag_id, dag_run_id

    def __str__(self) -> str:
        return f"run {self.dag_run_id!r} of DAG {self.dag_id!r} does not exist any more: somebody deleted it"


class DagRunOverdue(AirflowError):
    """With wait=True: `wait_timeout_s` passed. The run exists and goes on, unless `stopped`."""

    def __init__(
        self, dag_id: str, dag_run_id: str, after_s: float, url: str | None = None, stopped: bool = False
    ) -> None:
        super().__init__(dag_id, dag_run_id, after_s, url, stopped)
        self.dag_id, self.dag_run_id, self.after_s = dag_id, dag_run_id, after_s
        self.url, self.stopped = url, stopped

    def __str__(self) -> str:
        then = "it was set to failed" if self.stopped else "it goes on"
        where = f": {self.url}" if self.url else ""
        return (
            f"run {self.dag_run_id!r} of DAG {self.dag_id!r} had not ended after {self.after_s:.0f} s; "
            f"{then}{where}"
        )


class GaveUp(AirflowError):
    """`give_up_after_s` passed, and no run was made: no attempt has come to make one."""

    def __init__(self, after_s: float, reason: str) -> None:
        super().__init__(after_s, reason)
        self.after_s, self.reason = after_s, reason

    def __str__(self) -> str:
        return f"gave up after {self.after_s:.0f} s, no run was made: {self.reason}"


class OutcomeUnknown(AirflowError):
    """`give_up_after_s` passed after an answer was lost: the run was not there, and may still come to be.

    It is looked up for 15 minutes more; if it is found, the record and the result are corrected.
    """

    def __init__(self, dag_id: str, dag_run_id: str, reason: str) -> None:
        super().__init__(dag_id, dag_run_id, reason)
        self.dag_id, self.dag_run_id, self.reason = dag_id, dag_run_id, reason

    def __str__(self) -> str:
        return (
            f"whether run {self.dag_run_id!r} of DAG {self.dag_id!r} exists is unknown: {self.reason}; "
            "send again with the same key, and there is still one run"
        )


def error_from(kind: str, arguments: list[Any]) -> DagrelayError:
    """Return the error that a worker raised, from its class name and its arguments as Redis keeps them.

    What this release does not know becomes `TaskFailed`. Raises nothing: a result that cannot be read
    must not hide that the request failed.
    """
    known = globals().get(kind)
    if isinstance(known, type) and issubclass(known, DagrelayError):
        try:
            made = known(*arguments)
            str(made)
        except Exception:  # noqa: BLE001, S110 - another release's arguments: its words still reach the caller
            pass
        else:
            return made
    return TaskFailed(kind, ", ".join(str(argument) for argument in arguments))
