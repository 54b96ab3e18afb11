"""Speaking to one Airflow: asks, and decides what an answer means.

Everything is sent once. A refused token is renewed and the request sent again, because Airflow checks it
before anything else; an unusable answer is told to the caller, who knows whether and when to try again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol, TypeVar

from producers.contract import TaskInstance, TriggerRequest
from producers.errors import AirflowUnavailable, CredentialsRefused, RequestRejected
from tasks.airflow import protocol_v1, protocol_v2
from tasks.airflow.answers import (
    MAX_LIST,
    DagRunExists,
    DagView,
    Forbidden,
    NotThisApi,
    RunList,
    RunView,
    TaskKind,
    TaskView,
    TokenRefused,
    Xcom,
    as_dag_run,
)
from tasks.airflow.auth import Authorisation, Now, Send, authorisation
from tasks.airflow.connections import AirflowConnection, ApiVersion
from tasks.airflow.single_flight import SingleFlight
from tasks.http import HttpRequest, HttpResponse, NoAnswer

__all__ = [
    "MAX_LIST",
    "AirflowClient",
    "Check",
    "DagRunExists",
    "DagView",
    "RunList",
    "RunView",
    "TaskView",
    "as_dag_run",
]

log = logging.getLogger("dagrelay.airflow")

T = TypeVar("T")


class ApiModule(Protocol):
    """What both protocol modules offer; see them for what each function does."""

    @property
    def API(self) -> ApiVersion: ...

    def ask_version(self) -> HttpRequest: ...
    def ask_health(self) -> HttpRequest: ...
    def ask_whether_accepted(self) -> HttpRequest: ...
    def create_run(self, request: TriggerRequest, run_id: str, note: str) -> HttpRequest: ...
    def get_run(self, dag_id: str, run_id: str) -> HttpRequest: ...
    def find_by_logical_date(self, dag_id: str, logical_date: datetime) -> HttpRequest: ...
    def clear_run(self, dag_id: str, run_id: str) -> HttpRequest: ...
    def set_note(self, dag_id: str, run_id: str, note: str) -> HttpRequest: ...
    def fail_run(self, dag_id: str, run_id: str) -> HttpRequest: ...
    def list_runs(
        self,
        dag_ids: Sequence[str],
        since: datetime,
        until: datetime,
        *,
        unfinished: bool = False,
        limit: int = MAX_LIST,
    ) -> HttpRequest: ...
    def get_dag(self, dag_id: str) -> HttpRequest: ...
    def unpause_dag(self, dag_id: str) -> HttpRequest: ...
    def count_unfinished(self, dag_id: str) -> HttpRequest: ...
    def get_xcom(self, dag_id: str, run_id: str, task_id: str) -> HttpRequest: ...
    def get_task(self, dag_id: str, run_id: str, task_id: str) -> HttpRequest: ...
    def list_mapped(self, dag_id: str, run_id: str, task_id: str) -> HttpRequest: ...
    def get_task_instance(self, task: TaskInstance) -> HttpRequest: ...
    def set_task_state(self, task: TaskInstance, state: str, note: str) -> HttpRequest: ...
    def read_version(self, response: HttpResponse) -> str | None: ...
    def read_created(self, response: HttpResponse, request: TriggerRequest, run_id: str) -> RunView: ...
    def read_run(self, response: HttpResponse, dag_id: str, run_id: str) -> RunView | None: ...
    def read_found(self, response: HttpResponse) -> str | None: ...
    def read_runs(self, response: HttpResponse) -> RunList: ...
    def read_dag(self, response: HttpResponse, dag_id: str) -> DagView: ...
    def read_count(self, response: HttpResponse, dag_id: str) -> int: ...
    def read_xcom(self, response: HttpResponse) -> Xcom | None: ...
    def read_task(self, response: HttpResponse) -> TaskKind: ...
    def read_is_mapped(self, response: HttpResponse) -> bool: ...
    def read_task_instance(self, response: HttpResponse, task: TaskInstance) -> TaskView | None: ...
    def read_task_set(self, response: HttpResponse) -> None: ...
    def read_accepted(self, response: HttpResponse) -> None: ...
    def read_scheduler(self, response: HttpResponse) -> str | None: ...


# In the order in which they are asked for.
_PROTOCOLS: Final[Mapping[ApiVersion, ApiModule]] = {"v2": protocol_v2, "v1": protocol_v1}


@dataclass(frozen=True, slots=True)
class Check:
    """What `dagrelay doctor` learns of a connection.

    `scheduler` is Airflow's word ("healthy", "unhealthy"; None if it never ran). `problem` says why the
    credentials are not accepted, else it is empty.
    """

    version: str
    api: ApiVersion
    scheduler: str | None
    credentials_accepted: bool
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Server:
    """What is known of the server: which API it speaks, and how requests to it are authorised."""

    version: str
    protocol: ApiModule
    authorisation: Authorisation


class AirflowClient:
    """One Airflow, as one connection of this process sees it. Safe to use from threads.

    Which API it speaks is found by asking, with the first request, and asked again when an answer says that
    it has changed. `send` sends one request and raises `NoAnswer`; `now` returns seconds since 1970.

    Every method raises `AirflowUnavailable` (no usable answer), `CredentialsRefused` and `RequestRejected`.
    """

    def __init__(self, connection: AirflowConnection, send: Send, now: Now = time.time) -> None:
        self.connection = connection
        self._send, self._now = send, now
        self._server: _Server | None = None
        self._search: SingleFlight[_Server] = SingleFlight()

    def create_dag_run(self, request: TriggerRequest, run_id: str, note: str) -> RunView:
        """Make the run, with one POST that is acted upon at most once.

        Raises `DagRunExists` when the run id or the logical date is taken, `DagNotFound`, `DagBroken`,
        `RequestRejected`. After `AirflowUnavailable` with `unsure` the run may exist, or come to exist.
        """
        return self._ask(
            lambda api: api.create_run(request, run_id, note),
            lambda api, response: api.read_created(response, request, run_id),
        )

    def get_dag_run(self, dag_id: str, run_id: str) -> RunView | None:
        """Return the run, or None if there is none (or no such DAG: Airflow does not tell them apart)."""
        return self._ask(
            lambda api: api.get_run(dag_id, run_id),
            lambda api, response: api.read_run(response, dag_id, run_id),
        )

    def find_run_by_logical_date(self, dag_id: str, logical_date: datetime) -> str | None:
        """Return the id of the run that holds this logical date, or None."""
        return self._ask(
            lambda api: api.find_by_logical_date(dag_id, logical_date),
            lambda api, response: api.read_found(response),
        )

    def clear_dag_run(self, dag_id: str, run_id: str) -> None:
        """Have all tasks of a run run again. Raises RequestRejected(404) if the run is gone."""
        self._ask(
            lambda api: api.clear_run(dag_id, run_id),
            lambda api, response: _not_gone(api.read_run(response, dag_id, run_id)),
        )

    def set_note(self, dag_id: str, run_id: str, note: str) -> None:
        """Replace the run's note, of up to 1000 characters. Raises as `clear_dag_run` does."""
        self._ask(
            lambda api: api.set_note(dag_id, run_id, note),
            lambda api, response: _not_gone(api.read_run(response, dag_id, run_id)),
        )

    def fail_dag_run(self, dag_id: str, run_id: str) -> None:
        """Set a run to failed, which ends its tasks within seconds. Raises as `clear_dag_run` does.

        A run that has ended already becomes failed too.
        """
        self._ask(
            lambda api: api.fail_run(dag_id, run_id),
            lambda api, response: _not_gone(api.read_run(response, dag_id, run_id)),
        )

    def list_dag_runs(
        self,
        dag_ids: Sequence[str],
        since: datetime,
        until: datetime,
        *,
        unfinished: bool = False,
        limit: int = MAX_LIST,
    ) -> RunList:
        """Return how the runs of these DAGs stand whose own time lies within, both ends included.

        A run's own time is its `run_after` in Airflow 3, and its logical date in Airflow 2: what a `DagRun`
        says of it. `unfinished`: only those queued or running.
        """
        return self._ask(
            lambda api: api.list_runs(dag_ids, since, until, unfinished=unfinished, limit=limit),
            lambda api, response: api.read_runs(response),
        )

    def get_dag(self, dag_id: str) -> DagView:
        """Return whether a DAG is paused, and how many of its runs may run at a time. Raises DagNotFound."""
        return self._ask(
            lambda api: api.get_dag(dag_id),
            lambda api, response: api.read_dag(response, dag_id),
        )

    def unpause_dag(self, dag_id: str) -> None:
        """Have a DAG's runs go on. Raises DagNotFound, and RequestRejected(403) where that is not allowed."""
        self._ask(
            lambda api: api.unpause_dag(dag_id),
            lambda api, response: api.read_dag(response, dag_id),
        )

    def count_unfinished_runs(self, dag_id: str) -> int:
        """Return how many runs of a DAG are queued or running, whoever made them. Raises DagNotFound."""
        return self._ask(
            lambda api: api.count_unfinished(dag_id),
            lambda api, response: api.read_count(response, dag_id),
        )

    def get_xcom(self, dag_id: str, run_id: str, task_id: str) -> Any:
        """Return what a task of a run returned, None for nothing.

        Raises RequestRejected when the run has no such task, or many instances of it.
        """
        try:
            found = self._ask(
                lambda api: api.get_xcom(dag_id, run_id, task_id),
                lambda api, response: api.read_xcom(response),
            )
        except RequestRejected as exc:
            if exc.status != 400 or self._known_server().protocol is not protocol_v1:
                raise
            found = self._ask(
                lambda api: protocol_v1.get_xcom(dag_id, run_id, task_id, as_text=True),
                lambda api, response: protocol_v1.read_xcom_text(response),
            )
        if found is not None:
            return found.value
        kind = self._ask(
            lambda api: api.get_task(dag_id, run_id, task_id),
            lambda api, response: api.read_task(response),
        )
        if kind == "mapped":
            raise RequestRejected(404, f"task {task_id!r} is mapped: it returns a value for each instance")
        if kind == "none":
            raise RequestRejected(404, f"the run has no task {task_id!r}")
        return None

    def is_mapped(self, dag_id: str, run_id: str, task_id: str) -> bool:
        """Return whether a task is mapped, by itself or with its task group; one that is not there is not."""
        return self._ask(
            lambda api: api.list_mapped(dag_id, run_id, task_id),
            lambda api, response: api.read_is_mapped(response),
        )

    def get_task_instance(self, task: TaskInstance) -> TaskView | None:
        """Return how a task of a run stands, None if there is none (or no such run, or DAG)."""
        return self._ask(
            lambda api: api.get_task_instance(task),
            lambda api, response: api.read_task_instance(response, task),
        )

    def set_task_state(self, task: TaskInstance, state: str, note: str) -> None:
        """End one task instance, in `state` (success, failed), with a note of up to 1000 characters.

        Neither what is up- nor downstream of it is set, nor another run. Airflow tries a task that was set to
        failed no more. Raises RequestRejected (404) where it is gone.
        """
        if self._known_server().protocol is protocol_v1:
            # First, as in Airflow 3: whoever is told of the state finds the note.
            self._ask(
                lambda api: protocol_v1.set_task_note(task, note),
                lambda api, response: protocol_v1.read_task_set(response),
            )
        self._ask(
            lambda api: api.set_task_state(task, state, note),
            lambda api, response: api.read_task_set(response),
        )

    def authorised(self) -> tuple[ApiModule, Mapping[str, str]]:
        """Return which API the server speaks, and the headers that authorise a request, for a batch.

        An answer that is no success is to be asked for here once more: this renews no token.
        """
        server = self._known_server()
        return server.protocol, self._headers(server)

    def version(self) -> str:
        """Return Airflow's version, such as "3.3.2"."""
        server = self._known_server()
        if server.version:
            return server.version
        found = self._version_of(server.protocol)  # api_version is given: nobody has asked yet
        if found is None:
            raise AirflowUnavailable(_pinned_wrong(server.protocol.API), None, False)
        return found

    def ask_whether_accepted(self) -> None:
        """Ask one cheap question that needs the credentials. Raises as every method does."""
        self._ask(lambda api: api.ask_whether_accepted(), lambda api, response: api.read_accepted(response))

    def check(self) -> Check:
        """Ask for the version, the scheduler's health, and whether the credentials are accepted."""
        version = self.version()
        server = self._known_server()
        try:
            self.ask_whether_accepted()
        except CredentialsRefused as exc:
            problem = exc.words
        else:
            problem = ""
        health = self._answer_to(server.protocol.ask_health())
        scheduler = server.protocol.read_scheduler(health)
        return Check(version, server.protocol.API, scheduler, not problem, problem)

    def _ask(
        self, build: Callable[[ApiModule], HttpRequest], read: Callable[[ApiModule, HttpResponse], T]
    ) -> T:
        """Send one request and read the answer; again with a new token, or in another version's words."""
        renewed = version_asked = False
        while True:
            server = self._known_server()
            request = build(server.protocol)
            headers = self._headers(server)
            try:
                response = self._send(
                    HttpRequest(
                        request.method,
                        request.path,
                        {**request.headers, **headers},
                        request.body,
                        request.timeout_s,
                    )
                )
            except NoAnswer as exc:
                raise AirflowUnavailable(exc.reason, None, exc.reached) from None
            try:
                return read(server.protocol, response)
            except TokenRefused as exc:
                if renewed or not server.authorisation.refused(headers):
                    log.warning(
                        "credentials refused connection=%s status=%d", self.connection.id, response.status
                    )
                    raise CredentialsRefused(self.connection.id, exc.words) from None
                renewed = True
                log.info("token refused, logging in again connection=%s", self.connection.id)
            except Forbidden as exc:
                raise self._meaning_of_403(server, headers, exc.words) from None
            except NotThisApi as exc:
                if version_asked or not self._speaks_another_version_now(server, sure=exc.sure):
                    raise AirflowUnavailable(exc.words, None, not exc.sure) from None
                version_asked = True

    def _headers(self, server: _Server) -> Mapping[str, str]:
        try:
            return server.authorisation.headers()
        except AirflowUnavailable:
            # Somebody without /auth/token may be an Airflow 2 by now: the next attempt asks.
            self._forget(server)
            raise

    def _answer_to(self, request: HttpRequest) -> HttpResponse:
        """Return the answer to a mere question. Raises AirflowUnavailable(unsure=False)."""
        try:
            return self._send(request)
        except NoAnswer as exc:
            raise AirflowUnavailable(exc.reason, None, False) from None

    def _meaning_of_403(self, server: _Server, headers: Mapping[str, str], words: str) -> Exception:
        """Tell wrong credentials from a missing permission by a question that most roles are allowed."""
        question = server.protocol.ask_whether_accepted()
        response = self._answer_to(HttpRequest(question.method, question.path, headers))
        try:
            server.protocol.read_accepted(response)
        except TokenRefused as exc:
            log.warning("credentials refused connection=%s status=%d", self.connection.id, response.status)
            return CredentialsRefused(self.connection.id, exc.words)
        except NotThisApi as exc:
            return AirflowUnavailable(exc.words, None, False)
        except AirflowUnavailable as exc:
            return AirflowUnavailable(exc.reason, exc.retry_after_s, False)
        return RequestRejected(403, words)

    # Which version

    def _known_server(self) -> _Server:
        """Return what is known of the server, after asking it if need be."""
        return self._server or self._search.do(self._find_server)

    def _find_server(self) -> _Server:
        """Ask which API there is. Raises AirflowUnavailable(unsure=False)."""
        known, pinned = self._server, self.connection.api_version
        if pinned is not None:
            self._server = self._server_of(pinned, "")
            return self._server
        for api in _PROTOCOLS:
            version = self._version_of(_PROTOCOLS[api])
            if version is None:
                continue
            if known is not None and api == known.protocol.API:
                return known  # with its token
            log.info("airflow found connection=%s version=%s api=%s", self.connection.id, version, api)
            self._server = self._server_of(api, version)
            return self._server
        raise AirflowUnavailable(
            "there is an HTTP server, and neither /api/v2/version nor /api/v1/version: "
            "is the address of the connection right?",
            None,
            False,
        )

    def _server_of(self, api: ApiVersion, version: str) -> _Server:
        return _Server(version, _PROTOCOLS[api], authorisation(self.connection, api, self._send, self._now))

    def _version_of(self, protocol: ApiModule) -> str | None:
        """Return the version if the server speaks this API, else None.

        Raises AirflowUnavailable(unsure=False) if the answer does not tell.
        """
        try:
            return protocol.read_version(self._answer_to(protocol.ask_version()))
        except AirflowUnavailable as exc:
            raise AirflowUnavailable(f"version: {exc.reason}", exc.retry_after_s, False) from None

    def _forget(self, server: _Server) -> None:
        if self._server is server:
            self._server = None

    def _speaks_another_version_now(self, server: _Server, *, sure: bool) -> bool:
        """Ask again after an answer that this API does not exist; tell whether it was the API that is gone.

        `sure`: Airflow itself said so. Raises AirflowUnavailable if the question stays open.
        """
        if self.connection.api_version is not None:
            if sure:
                raise AirflowUnavailable(_pinned_wrong(server.protocol.API), None, False)
            return False
        try:
            return self._search.do(self._find_server).protocol is not server.protocol
        except AirflowUnavailable as exc:
            raise AirflowUnavailable(exc.reason, exc.retry_after_s, not sure) from None


def _not_gone(view: RunView | None) -> None:
    if view is None:
        raise RequestRejected(404, "the run does not exist any more")


def _pinned_wrong(api: ApiVersion) -> str:
    return f"the connection says api_version={api}, and this Airflow does not have it: leave it out"
