"""The task poll_external_job: a job on an outside service, started at most once, and followed until it ends.

Policy is on top, in `poll_external_job`; below it one function for each decision. What is asked and what the
answers mean is in `job_answers`; the looks themselves are done in batches (`looks`), and this task is there
for what comes before them and after them. A service may also tell how its job is, by a callback or over a
queue; then it need not be asked at all.

Where things are kept: the job's id, and that its submission was begun, in the request's record, written
before anything else happens; never in the message. So a message that comes again attaches to the job that is
there.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from celery.exceptions import Ignore
from celery.utils.log import get_logger

from producers.contract import (
    POLL_EXTERNAL_JOB,
    QUEUE_JOBS,
    Asked,
    Call,
    Find,
    JobOutcome,
    PollRequest,
    Publish,
    Submit,
    TriggerRequest,
    reference_for,
    shown_poll,
)
from producers.errors import (
    DagrelayError,
    ExternalJobOverdue,
    ExternalJobSilent,
    ExternalJobUnreadable,
    InvalidRequest,
    ServiceNotConfigured,
    ServiceUnavailable,
    SubmitRejected,
    SubmitUnknown,
)
from producers.stores.answers import Observed, one_line, read_wake, rules_of, short
from producers.stores.callbacks import PATH, SECRET, Callbacks
from producers.stores.envelope import item_of
from producers.stores.heard import answer_key, said
from producers.stores.records import Record, record_key

from . import job_answers, metrics, tracing
from .again import backoff_s, leave_newer, on_record, redis_now, retry
from .app import RelayRequest, RelayTask, app, backend, records, store_client, waits
from .confs import check_readable, claim_checks
from .http import HttpRequest, HttpResponse, NoAnswer
from .job_answers import End, call_of, job_id_in, look_of, no_answer, read_look
from .results import NotHandedOver
from .services import Service, service_sender
from .settings import settings
from .waiting import show, wait

log = get_logger("dagrelay.job")

TELL_SERVICE: Final = "tasks.tell_service"

FIND_EVERY_S: Final = 5.0
PLACE_WAIT_S: Final = 0.05
PLACE_CAP_S: Final = 10.0
TELL_TRIES: Final = 8
"""With growing pauses up to 20 s: about a minute."""

NOT_DONE: Final = (301, 307, 308)
"""Redirects by which a server says that it has not done what was asked; after 302 and 303 it may have."""

# Of the id of the trigger that follows a job. Never to change: a redelivered message would start another.
_THEN_NAMESPACE = uuid.UUID("0d2bb1b0-7c5b-5d3c-8f0e-5a8c8d1f6e42")


class PollTask(RelayTask):
    """poll_external_job, as the worker handles its messages."""

    abstract = True

    def shown(self, args: Any, kwargs: Any, task_id: str) -> str:
        """Return a message as Flower and logs may show it: no body, no header, no query, no conf."""
        if not isinstance(kwargs, dict):
            return ""
        try:
            return PollRequest.from_message(kwargs).shown(task_id)
        except (InvalidRequest, TypeError):
            return shown_poll(kwargs)

    def on_revoked(self, request: RelayRequest) -> None:
        """Have the service told of a request that was cancelled, or expired, where a job may exist."""
        found = records().get(request.id)
        if found is None or found.ended or not (found.job_id or found.submitting_at):
            return
        if not found.job_id and not found.submitted_at:
            request.request_dict["unsure"] = True
        try:
            told = PollRequest.from_message(with_body(tuple(request.args or ()), request.kwargs))
        except (InvalidRequest, TypeError):
            return
        tell_later(request.id, told, found.job_id)


@app.task(name=POLL_EXTERNAL_JOB, bind=True, base=PollTask)
def poll_external_job(self: Any, *before: Any, **message: Any) -> dict[str, Any]:
    """Start a job on an outside service (where the message says how), and follow it until it ends.

    Keyword arguments: a message as `producers.contract` describes it. A positional argument is the result of
    the task before it in a chain, and becomes the body of `submit`.
    """
    leave_newer(self, message)
    known = on_record(self)
    if known is not None and known.state == "done":
        return outcome_on_record(self.request.id, known)
    message = with_body(before, message)
    request = PollRequest.from_message(message)
    check_readable(self, (request.then or {}).get("conf"))
    job = take_up(self, request, message)
    try:
        if not job.started and not told_its_end(job):
            with a_place_at(job.service):
                job = started(job)
        return follow(job)
    except NoPlace as exc:
        raise retry(self, exc, 0.2 + backoff_s(self.request.retries, cap_s=PLACE_CAP_S)) from exc


@dataclass(frozen=True, slots=True)
class Job:
    """One job in the hands of its task."""

    task: Any
    request: PollRequest
    message: Mapping[str, Any]
    service: Service
    record: Record
    job_id: str | None
    callback_url: str | None = field(default=None, repr=False)

    @property
    def task_id(self) -> str:
        return self.record.task_id

    @property
    def reference(self) -> str:
        return self.request.reference_for(self.task_id)

    @property
    def deadline(self) -> float:
        """When the whole is over, by Redis' clock."""
        return (self.record.due_at or 0.0) + self.request.timeout_s

    @property
    def started(self) -> bool:
        """Whether there is nothing to be submitted, or published, any more."""
        ours = self.request.submit is not None or self.request.via == "queue"
        return not ours or self.job_id is not None or self.record.submitted_at is not None

    @property
    def can_be_asked(self) -> bool:
        """Whether looks can follow the job."""
        return self.request.asks and (self.job_id is not None or not self.request.names_job_id)


def with_body(before: tuple[Any, ...], message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with what came by position as the body of `submit`. Raises InvalidRequest."""
    merged = dict(message)
    if len(before) > 1:
        raise InvalidRequest("at most the body of submit may be given by position")
    if before and before[0] is not None:
        submit = merged.get("submit")
        if not isinstance(submit, Mapping) or submit.get("body") is not None:
            raise InvalidRequest(
                "submit: the result of the task before becomes its body: give a submit without one"
            )
        merged["submit"] = {**submit, "body": before[0]}
    return merged


def take_up(task: Any, request: PollRequest, message: Mapping[str, Any]) -> Job:
    """Check what only a worker can, begin or read the record, and register the wake keys and the callback.

    Raises ServiceNotConfigured, InvalidRequest.
    """
    service = settings().services.get(request.service)
    if service is None:
        raise ServiceNotConfigured(request.service)
    check(request, service)
    task_id = task.request.id
    record = records().get(task_id)
    if record is None or record.reference is None:  # it came past our door
        about = {"service": service.id, "reference": request.reference_for(task_id)}
        if request.job_id is not None:
            about["job_id"] = request.job_id
        if not waits().learn(task_id, **about):
            raise Ignore
        record = records().get(task_id) or Record(task_id)
    job = Job(task, request, message, service, record, record.job_id or request.job_id)
    keys = list(request.wake_keys)
    if request.via == "queue":
        keys.append(answer_key(service.id, job.reference))
    if keys:
        waits().register(task_id, keys, max(0.0, job.deadline - redis_now()))
    if request.calls_back and not job.started:
        job = replace(job, callback_url=expected_callback(job))
    return job


def expected_callback(job: Job) -> str:
    """Return the job's callback URL, which is known to every gateway from now on.

    Raises ServiceNotConfigured where this worker has none to give.
    """
    ours = settings()
    if ours.callback_url is None or not ours.callback_secrets:
        raise ServiceNotConfigured(
            job.service.id,
            "the request holds {callback_url}, and the worker has none to give: set DAGRELAY_CALLBACK_URL "
            f"and {SECRET} there",
        )
    token = ours.callback_secrets.token(job.task_id, job.deadline)
    Callbacks(store_client()).expect(token, job.task_id, job.deadline, job.message)
    return f"{ours.callback_url}{PATH}{token}"


def check(request: PollRequest, service: Service) -> None:
    """Raise for what is not within the service, or asks it too often."""
    if (service.queue is not None) != (request.via == "queue"):
        what, via = ("an HTTP service", "http") if service.queue is None else ("a queue", "queue")
        raise ServiceNotConfigured(service.id, f"it is {what} in the worker: give via={via!r}")
    if service.queue is not None:
        return
    for name in ("interval_s", "heartbeat_s"):
        pause_s = getattr(request, name)
        if request.asks and pause_s is not None and pause_s < service.min_interval_s:
            raise InvalidRequest(
                f"{name}: is {pause_s:g}, below the {service.min_interval_s:g} s "
                f"that service {service.id!r} allows"
            )
    if request.url is not None:
        service.check_url(request.url)
    for call in (request, request.submit, request.find, request.on_cancel):
        if call is not None and not isinstance(call, Publish) and call.path is not None:
            service.check_path(call.path)


# To start the job


def told_its_end(job: Job) -> bool:
    """Tell whether the end of the job was told already, though no attempt knows that it was started."""
    if job.record.submitting_at is None:
        return False
    found = [meaning(job, one) for one in waits().observations(job.task_id, job.task.request.retries)]
    return any(one is not None and one.ends for one in found)


def started(job: Job) -> Job:
    """Submit or publish the job; return it as it is then. Raises as `submitted` and `published` do."""
    if job.request.submit is not None:
        return replace(job, job_id=submitted(job, job.request.submit))
    return published(job)


def published(job: Job) -> Job:
    """Publish the message that starts the job, with the same ids on every attempt.

    Raises Retry, SubmitRejected, SubmitUnknown, ExternalJobOverdue. With `submit_once` there is one
    attempt, and its answer tells whether it arrived.
    """
    first = begin_submission(job)
    if job.request.submit_once and not first:
        hear_of_it(job, "an earlier attempt may have published it")
        return job
    try:
        publish(job.service, job.request.message, job.reference, job.reference, job.callback_url)
    except ServiceUnavailable as exc:
        if exc.unsure and job.request.submit_once:
            hear_of_it(job, exc.reason)
            return job
        raise submit_again(job, exc, unsure=exc.unsure or not first) from exc
    except SubmitRejected as exc:
        if first:
            raise
        raise SubmitUnknown(job.service.id, job.reference, f"before, it may have been: {exc.words}") from exc
    if not waits().learn(job.task_id, f"was published as {job.reference}", submitted_at="now"):
        raise Ignore
    log.info("job published task_id=%s service=%s", job.task_id, job.service.id)
    return replace(job, record=replace(job.record, submitted_at=redis_now()))


def publish(
    service: Service, message: Any, reference: str, message_id: str, callback_url: str | None = None
) -> None:
    """Publish one message to a service that is a queue. Raises ServiceUnavailable, SubmitRejected."""
    from .asking_queues import queue_sender  # here: most workers have no such service

    fills = {"reference": reference}
    if callback_url is not None:
        fills["callback_url"] = callback_url
    told = job_answers.with_filled(message, fills)
    queue_sender(service).send(told, correlation_id=reference, message_id=message_id)


def hear_of_it(job: Job, why: str) -> None:
    """Note that only the service itself can tell whether the job was started."""
    if not job.record.unsure:
        words = short(f"whether it was started is unknown: {why}")
        if not waits().learn(job.task_id, words, unsure="1"):
            raise Ignore
        log.info("job unsure task_id=%s service=%s: %s", job.task_id, job.service.id, short(why))


def submitted(job: Job, submit: Submit) -> str | None:
    """Start the job, or find the one that an earlier attempt has started; return its id, kept on record.

    None where it is not known, and the service calls back. Raises Retry where this is still to be found
    out; SubmitRejected, SubmitUnknown, ExternalJobUnreadable, ExternalJobOverdue. Where the service does
    not honour our key (`submit_once`) nothing is sent twice: only a request that certainly did not reach it
    is sent again.
    """
    first = begin_submission(job)
    if job.request.submit_once and not first:
        return after_loss(job, "the answer to it was lost")
    try:
        job_id = send_submission(job, submit, unsure=not first or job.record.unsure)
    except ServiceUnavailable as exc:
        if exc.unsure and job.request.submit_once:
            return after_loss(job, exc.reason)
        if first and not exc.unsure:
            waits().learn(job.task_id, submitting_at="")  # as if it had not been sent
        raise submit_again(job, exc, unsure=exc.unsure or not first) from exc
    return attach(job, job_id)


def begin_submission(job: Job) -> bool:
    """Note that the submission is begun, before it is; tell whether no other attempt has."""
    now = f"{redis_now():.6f}"
    return bool(store_client().hsetnx(record_key(job.task_id), "submitting_at", now))


def send_submission(job: Job, submit: Submit, *, unsure: bool) -> str | None:
    """Submit, once; return the job's id. `unsure`: an earlier attempt may have started it.

    None where the answer has no id and none is needed, as the service calls back.
    Raises ServiceUnavailable, SubmitRejected, SubmitUnknown, ExternalJobUnreadable.
    """
    request = call_of(
        job.service,
        submit,
        task_id=job.task_id,
        idempotency_key=job.reference,
        callback_url=job.callback_url,
    )
    response = send(job, request)
    status = response.status
    if 200 <= status < 300:
        try:
            found = job_id_in(submit.job_id, response)
            problem = "is missing"
        except ValueError as exc:
            found, problem = None, str(exc)
        if found is not None or (job.request.calls_back and not job.request.names_job_id):
            return found
        answer = job_answers.shown_answer(job.service, response)
        words = f"{problem}, in an answer of {status}: {answer}"
        if not job.request.submit_once and job.record.attempts >= job.request.max_errors:
            raise ExternalJobUnreadable(job.service.id, None, "job_id", words)
        raise ServiceUnavailable(f"job_id: {words}")
    observed = job_answers.unavailable(job.service, response)
    refused = (400 <= status < 500 and status not in (408, 425, 429)) or status in NOT_DONE
    if status == 409 and unsure:  # our own earlier attempt, which is still being worked on
        refused = False
    if refused and unsure:
        raise SubmitUnknown(job.service.id, job.reference, f"after an answer was lost, {observed.words}")
    if refused:
        raise SubmitRejected(job.service.id, status, words_of_refusal(job.service, response, observed))
    raise ServiceUnavailable(observed.words, observed.retry_after_s, status != 429, observed.counts)


def words_of_refusal(service: Service, response: HttpResponse, observed: Observed) -> str:
    """Return the service's own words, and ours where it has none, or where they would not be understood."""
    if response.status in (401, 403) or response.status < 400:
        return observed.words
    return job_answers.shown_answer(service, response) or "it does not say why"


def submit_again(job: Job, exc: ServiceUnavailable, *, unsure: bool) -> Exception:
    """Return the exception to raise after an attempt that yielded no id: a retry, or the end."""
    so_far = records().attempt_failed(job.task_id, str(exc), unsure=unsure)
    wait_s = backoff_s(job.task.request.retries, exc.retry_after_s, settings().retry_cap_s)
    if so_far.age_s + wait_s < job.request.timeout_s:
        return retry(job.task, exc, wait_s)
    if so_far.unsure:
        tell_later(job.task_id, job.request, None)
        return SubmitUnknown(job.service.id, job.reference, f"the time was over: {exc.reason}")
    return ExternalJobOverdue(job.service.id, None, job.request.timeout_s)


def after_loss(job: Job, why: str) -> str | None:
    """Find the job that was started, or not, by a submission that must not be sent again; return its id.

    None where the service calls back, and alone can tell. Raises as `found_again` does.
    """
    if job.request.find is None and job.request.calls_back:
        hear_of_it(job, why)
        return None
    return attach(job, found_again(job, why))


def found_again(job: Job, why: str) -> str:
    """Return the id of the job that a lost submission has started, as the service knows it by our reference.

    Raises Retry while it may still appear, SubmitUnknown when it does not.
    """
    find = job.request.find
    if find is None:
        raise SubmitUnknown(job.service.id, job.reference, why)
    try:
        job_id = look_up(job.service, find, job.task_id)
    except ServiceUnavailable as exc:
        raise submit_again(job, exc, unsure=True) from exc
    if job_id is not None:
        return job_id
    began = (records().get(job.task_id) or job.record).submitting_at or 0.0
    if redis_now() - began >= settings().find_for_s:
        raise SubmitUnknown(job.service.id, job.reference, f"{why}, and no such job was found")
    not_yet = ServiceUnavailable(f"{why}, and the job is not found yet")
    records().attempt_failed(job.task_id, str(not_yet), unsure=True)
    raise retry(job.task, not_yet, min(FIND_EVERY_S, 0.5 + backoff_s(job.task.request.retries)))


def look_up(service: Service, find: Find, task_id: str, gone: tuple[int, ...] = (404, 410)) -> str | None:
    """Return the id of the job with our reference, None where there is none. Raises ServiceUnavailable."""
    response = send_to(service, call_of(service, find, task_id=task_id))
    if response.status in gone:
        return None
    if not 200 <= response.status < 300:
        observed = job_answers.unavailable(service, response)
        raise ServiceUnavailable(f"find: {observed.words}", observed.retry_after_s, True, observed.counts)
    try:
        return job_id_in(find.job_id, response)
    except ValueError as exc:
        raise ServiceUnavailable(f"find: {exc}: {job_answers.shown_answer(service, response)}") from None


def attach(job: Job, job_id: str | None) -> str | None:
    """Keep the id of a job that was started, before anything else happens; return it."""
    words = "was submitted" if job_id is None else f"is job {job_id}"[:200]
    if not waits().learn(job.task_id, words, job_id=job_id or "", submitted_at="now"):
        found = records().get(job.task_id)
        if found is not None and found.state == "cancelled":  # by another copy of the message, meanwhile
            tell_later(job.task_id, job.request, job_id)
        raise Ignore
    log.info("job started task_id=%s service=%s job_id=%s", job.task_id, job.service.id, job_id)
    return job_id


class NoPlace(ServiceUnavailable):
    """So many calls of this process wait for the service that another one waits in Redis instead."""


_places: dict[str, threading.BoundedSemaphore] = {}


@contextmanager
def a_place_at(service: Service) -> Iterator[None]:
    """Hold one of the places that calls to a service may take: a quarter of the worker's threads.

    So a frozen service leaves threads for all others. Raises NoPlace at once where there is none: before
    anything is noted or sent.
    """
    places = _places.get(service.id)
    if places is None:
        size = max(1, settings().concurrency // 4)
        places = _places.setdefault(service.id, threading.BoundedSemaphore(size))
    if not places.acquire(timeout=PLACE_WAIT_S):
        raise NoPlace(f"service {service.id!r} has as many calls waiting as one worker may have")
    try:
        yield
    finally:
        places.release()


def send(job: Job, request: HttpRequest) -> HttpResponse:
    """Send once. Raises ServiceUnavailable."""
    return send_to(job.service, request)


def send_to(service: Service, request: HttpRequest) -> HttpResponse:
    """Send once. Raises ServiceUnavailable, which says whether it may have reached the service."""
    try:
        return metrics.call_service(service.id, service_sender(service).send, request)
    except NoAnswer as exc:
        raise ServiceUnavailable(exc.reason, None, exc.reached) from exc


# To follow it


def follow(job: Job) -> dict[str, Any]:
    """Read what was observed and end, or wait on. Raises Ignore (it waits), and the errors of a job's end."""
    observations = waits().observations(job.task_id, job.task.request.retries)
    look_now, last, words, heard = False, None, "", False
    for observation in observations:
        found = meaning(job, observation)
        if found is None or found.is_error:
            look_now = True  # told to look, or what came says nothing
            words = f"{found.field}: {found.words}" if found is not None else words
        elif found.ends:
            return end(job, End.of(found))
        else:
            last = found
        heard = heard or said(observation)[0]
    now = redis_now()
    overdue = now >= job.deadline
    if job.can_be_asked and (look_now or overdue):
        with a_place_at(job.service):
            found = look_once(job)
        if found.ends:
            return end(job, End.of(found))
        last = last if found.is_error else found
    silent_at = None if job.can_be_asked else silent_from(job, now if heard else None)
    silent = silent_at is not None and now >= silent_at
    if overdue or silent:
        tell_later(job.task_id, job.request, job.job_id)
        raise told_too_late(job, last.state if last else job.record.seen or "", silent=not overdue)
    raise wait_on(job, last, read=len(observations), heard=heard, words=words, silent_at=silent_at)


def silent_from(job: Job, heard_at: float | None) -> float | None:
    """Return when the job is silent for too long; None where it may be. `heard_at`: it was, just now."""
    if job.request.heartbeat_s is None:
        return None
    if heard_at is None:  # asked anew: a callback may have come since the record was read
        told = store_client().hget(record_key(job.task_id), "heard_at")
        heard_at = float(told) if told else job.record.submitted_at or job.record.submitting_at or redis_now()
    return heard_at + job.request.heartbeat_s


def told_too_late(job: Job, state: str, *, silent: bool) -> DagrelayError:
    """Return the error of a job whose end was not told in time."""
    if not job.started:
        why = "it was not heard of since" if silent else "the time was over, and it was not heard of"
        return SubmitUnknown(job.service.id, job.reference, why)
    if silent:
        return ExternalJobSilent(job.service.id, job.job_id, job.request.heartbeat_s or 0.0, state)
    return ExternalJobOverdue(job.service.id, job.job_id, job.request.timeout_s, state)


def meaning(job: Job, observation: Any) -> Observed | None:
    """Return what an observation says of the job; None for one that says to look."""
    if observation is None:
        return None
    seen = End.from_json(observation)
    if seen is not None:
        return Observed(seen.end, seen.state, "", seen.result, seen.words, seen.field)
    return read_wake(rules_of(job.message), said(observation)[1], job.service.masked)


def look_once(job: Job) -> Observed:
    """Ask the service about the job, here and now."""
    look = look_of(
        job.message, job.service, job.task_id, job_id=job.job_id, reference=None, seen=job.record.seen
    )
    try:
        send = service_sender(job.service).send
        return read_look(look, metrics.call_service(job.service.id, send, look.request))
    except NoAnswer as exc:
        return no_answer(exc.reason)


def wait_on(
    job: Job,
    last: Observed | None,
    *,
    read: int,
    heard: bool = False,
    words: str = "",
    silent_at: float | None = None,
) -> Exception:
    """Park the task until there is something to read, or the deadline; return the exception to raise.

    `words`: what was wrong with what was heard, where the service cannot be asked instead.
    """
    now, since = redis_now(), job.record.waiting_since
    found = {"service": job.service.id}
    if heard:
        found["heard_at"] = f"{now:.6f}"
    if words and not job.can_be_asked:
        found["reason"] = short(words)
    if last is not None and heard and last.state != job.record.seen:
        waits().learn(job.task_id, f"told: is {last.state}")  # who asked hears of it too
    if last is not None:
        found |= {"seen": last.state, "progress": last.progress, "errors": "0"}
    state = last.state if last else job.record.seen or ""
    parked = wait(
        job.task,
        until=job.deadline if silent_at is None else min(job.deadline, silent_at),
        what=f"job {(job.job_id or 'without an id')[:40]} of service {job.service.id[:20]}",
        read=read,
        look=f"service:{job.service.id}" if job.can_be_asked else "",
        look_in_s=rules_of(job.message).pause_s(now - since if since else 0.0),
        found=found,
    )
    show(job.task, state, last.progress if last else job.record.progress or "")
    return parked


# Its end


def end(job: Job, seen: End) -> dict[str, Any]:
    """Return the outcome of a job that is done, with the trigger that follows accepted; else raise."""
    error = seen.error(job.service.id, job.job_id)
    if error is not None:
        raise error
    outcome = JobOutcome(job.service.id, job.job_id, seen.state, seen.result)
    if job.request.then is not None:
        outcome = replace(outcome, then=trigger_then(job, outcome))
    return outcome.to_message()


def trigger_then(job: Job, outcome: JobOutcome) -> str:
    """Accept the trigger of the DAG run that follows, once however often this is done; return its id."""
    then = dict(job.request.then or {})
    about = {name: value for name, value in outcome.to_message().items() if name != "then"}
    conf = claim_checks().real(then.get("conf"))
    try:
        request = TriggerRequest(**{**then, "conf": {**conf, "job": about}})
    except InvalidRequest as exc:
        raise ExternalJobUnreadable(job.service.id, job.job_id, "then", short(f"the run's {exc}")) from None
    then_id = str(uuid.uuid5(_THEN_NAMESPACE, job.task_id))
    asked = Asked.from_message(job.message.get("asked"), otherwise_at=0.0)
    by = one_line(asked.by)
    asked = Asked(at=redis_now(), by=by)
    item = item_of(request, task_id=then_id, asked=asked, trace=tracing.current(), confs=settings().confs)
    records().accept(item)
    return then_id


def outcome_on_record(task_id: str, record: Record) -> dict[str, Any]:
    """Return what a request that is done ended in; without its result where that is no longer kept."""
    meta = backend().get_task_meta(task_id)
    result = meta.get("result")
    if meta.get("status") == "SUCCESS" and isinstance(result, dict):
        return result
    return JobOutcome(record.service or "", record.job_id, record.seen or "").to_message()


# To tell the service


def tell_later(task_id: str, request: PollRequest, job_id: str | None) -> None:
    """Publish the task that makes the `on_cancel` request, if there is one to make. Raises NotHandedOver."""
    call, find = request.on_cancel, request.find
    if call is None:
        return
    try:
        tell_service.apply_async(
            kwargs={
                "task_id": task_id,
                "service": request.service,
                "call": call.model_dump(mode="json", exclude_unset=True),
                "find": find.model_dump(mode="json", exclude_unset=True) if find else None,
                "job_id": job_id,
            },
            queue=QUEUE_JOBS,
        )
    except Exception as exc:
        raise NotHandedOver(f"the cancel of the job of {task_id} could not be published: {exc}") from exc


class TellTask(RelayTask):
    """tell_service is a worker's own affair: no record, no result."""

    abstract = True
    recorded = False

    def shown(self, args: Any, kwargs: Any, task_id: str) -> str:
        """Return which job is meant; nothing of the call."""
        return ", ".join(f"{name}={kwargs.get(name)!r}" for name in ("task_id", "service", "job_id"))


@app.task(name=TELL_SERVICE, bind=True, base=TellTask, ignore_result=True)
def tell_service(
    self: Any,
    *,
    task_id: str,
    service: str,
    call: dict[str, Any],
    find: dict[str, Any] | None = None,
    job_id: str | None = None,
) -> None:
    """Tell a service that its job is not wanted any more; tried a few times."""
    known = settings().services.get(service)
    if known is None:
        return
    try:
        with a_place_at(known):
            wanted = Publish(**call) if "message" in call else Call(**call)
            told = tell(known, wanted, Find(**find) if find else None, task_id, job_id)
    except ServiceUnavailable as exc:
        if self.request.retries + 1 < TELL_TRIES:
            wait_s = backoff_s(self.request.retries, exc.retry_after_s, settings().retry_cap_s)
            raise self.retry(countdown=max(0.2, wait_s)) from exc
        told = f"given up: {exc.reason}"
    except DagrelayError as exc:
        told = f"cannot be told: {exc}"
    log.info("cancel told task_id=%s service=%s job_id=%s: %s", task_id, service, job_id, told)


def tell(service: Service, call: Call | Publish, find: Find | None, task_id: str, job_id: str | None) -> str:
    """Make the `on_cancel` request, or publish its message; return what became of it.

    Raises ServiceUnavailable, SubmitRejected, InvalidRequest.
    """
    if isinstance(call, Publish):
        reference = reference_for(task_id)
        publish(service, call.message, reference, f"{reference}.cancel")
        return "it was published"
    if job_id is None and find is not None:
        job_id = look_up(service, find, task_id)
        if job_id is None:
            raise ServiceUnavailable("the job is not found")
    response = send_to(service, call_of(service, call, task_id=task_id, job_id=job_id))
    if response.status == 429 or response.status >= 500:
        observed = job_answers.unavailable(service, response)
        raise ServiceUnavailable(observed.words, observed.retry_after_s, True, observed.counts)
    return f"it answered {response.status}"
