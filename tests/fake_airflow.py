"""An Airflow that is only an HTTP server, with the faults of a real one, on demand.

It speaks enough of the API of Airflow 3 for a worker: version, token, trigger, get, list, count, clear,
note, state, what tasks returned, how task instances stand and their change, delete; of a DAG whether it is
paused. Runs are kept by (dag id, run id),
one each, as Airflow's unique constraint keeps them. A fault decides for each POST of a run what becomes of
it: see `Fault`. For tests and benchmarks; it measures nothing.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote

Fault = Literal[
    "answer",  # the run is made and the answer given
    "drop",  # the run is made, and the connection closed without an answer
    "late",  # the run is made, and the answer comes after `late_s`
    "500",  # the run is made, and the answer is 500
    "503",  # nothing is made, and the answer is 503 with Retry-After: 1
    "429",  # nothing is made, and the answer is 429 with Retry-After: 1
    "reset",  # nothing is made, and the connection is reset
    "html",  # nothing is made, and a proxy answers 502 with a page
    "403",  # of task instances: nothing is changed, as the role may not
]


class FakeAirflow:
    """A server on a free loopback port; `with FakeAirflow() as airflow:`.

    `fault(number, dag_id, run_id)` is asked for each POST of a run, numbered from 1. `runs` maps (dag id,
    run id) to the run; `posts` counts the POSTs for each. `missing` and `broken` hold DAG ids. `returned`
    maps (dag id, run id, task id) to what a task returned, or to "mapped". `lists` counts list calls,
    `gets` the GETs of each run; while `silent`, questions about runs are answered with 503. `traces` maps
    (dag id, run id) to the `traceparent` with which it was last asked for. `dags` maps DAG ids to what is
    shown of them; any other is not paused. `asked` counts the questions about each, and `unpaused` how
    often one was unpaused, which `may_unpause` allows. `tasks` maps (dag id, run id, task id, map index) to
    task instances, `mapped` has the (dag id, task id) of mapped tasks, `patches` the bodies of all changes of
    task instances, with which instance; `on_patch` is asked for a fault before each. `most_unfinished` is
    the most runs of one of `dags` that were ever queued or running together. While `stops` is not set, a
    change of a run's state waits for it, for up to a minute.
    """

    username, password, token = "admin", "adminpw", "a-token"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.forget()

    def forget(self) -> None:
        """Be as good as new: no runs, no faults."""
        self.runs: dict[tuple[str, str], dict[str, Any]] = {}
        self.posts: Counter[tuple[str, str]] = Counter()
        self.post_times: list[float] = []
        self.confs: list[Any] = []
        self.fault: Callable[[int, str, str], Fault] = lambda number, dag_id, run_id: "answer"
        self.late_s = 2.0
        self.missing: set[str] = set()
        self.broken: set[str] = set()
        self.rejecting: dict[str, tuple[int, Any]] = {}
        self.refuse_credentials = False
        self.refuse_token = False
        self.logins = 0
        self.returned: dict[tuple[str, str, str], Any] = {}
        self.lists = 0
        self.gets: Counter[tuple[str, str]] = Counter()
        self.traces: dict[tuple[str, str], str | None] = {}
        self.silent = False
        self.dags: dict[str, dict[str, Any]] = {}
        self.asked: Counter[str] = Counter()
        self.unpaused: Counter[str] = Counter()
        self.may_unpause = True
        self.most_unfinished: Counter[str] = Counter()
        self.tasks: dict[tuple[str, str, str, int], dict[str, Any]] = {}
        self.mapped: set[tuple[str, str]] = set()
        self.patches: list[tuple[tuple[str, str, str, int], dict[str, Any]]] = []
        self.on_patch: Callable[[], Fault] = lambda: "answer"
        self.cleared: Counter[tuple[str, str]] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.delay_s = 0.0
        self.stops = threading.Event()
        self.stops.set()
        self._number = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def conn_uri(self) -> str:
        return f"http://{self.username}:{self.password}@127.0.0.1:{self._port}"

    def start(self) -> FakeAirflow:
        """Listen; after a `stop`, on the same port again."""
        handler = type("Handler", (_Handler,), {"airflow": self})
        ThreadingHTTPServer.request_queue_size = 256
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Refuse connections; what was made stays."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> FakeAirflow:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def make(self, dag_id: str, run_id: str, **given: Any) -> dict[str, Any]:
        """Put a run there, as somebody else would have."""
        run = {
            "dag_id": dag_id,
            "dag_run_id": run_id,
            "state": "queued",
            "conf": {},
            "logical_date": None,
            "run_after": datetime.now(UTC).isoformat(),
            "queued_at": datetime.now(UTC).isoformat(),
            "start_date": None,
            "end_date": None,
            "note": None,
            "run_type": "manual",
            **given,
        }
        self.runs[dag_id, run_id] = run
        return run

    def make_task(
        self, dag_id: str, run_id: str, task_id: str, map_index: int = -1, **given: Any
    ) -> dict[str, Any]:
        """Put a task instance there, that runs."""
        task = {
            "dag_id": dag_id,
            "dag_run_id": run_id,
            "task_id": task_id,
            "map_index": map_index,
            "state": "running",
            "try_number": 1,
            "start_date": datetime.now(UTC).isoformat(),
            "end_date": None,
            "note": None,
            **given,
        }
        self.tasks[dag_id, run_id, task_id, map_index] = task
        return task

    def dag(self, dag_id: str) -> dict[str, Any]:
        """A DAG as it is shown."""
        return {"dag_id": dag_id, "is_paused": False, "max_active_runs": 16, **self.dags.get(dag_id, {})}

    def unfinished(self, dag_id: str) -> list[dict[str, Any]]:
        """The runs of a DAG that are queued or running, the first first."""
        runs = [run for (dag, _), run in list(self.runs.items()) if dag == dag_id]
        return [run for run in runs if run["state"] in ("queued", "running")]

    def create(self, dag_id: str, body: dict[str, Any]) -> tuple[Fault, int, Any]:
        """Handle one POST of a run; return the fault, the status and the body of the answer."""
        run_id = body["dag_run_id"]
        with self._lock:
            self._number += 1
            self.posts[dag_id, run_id] += 1
            self.post_times.append(time.time())
            self.confs.append(body.get("conf"))
            fault = self.fault(self._number, dag_id, run_id)
            if fault in ("503", "429", "reset", "html"):
                return fault, int(fault) if fault.isdecimal() else 502, {"detail": "busy"}
            if dag_id in self.missing:
                return fault, 404, {"detail": f"Dag with dag_id: '{dag_id}' not found"}
            if dag_id in self.broken:
                words = f"Dag with dag_id: '{dag_id}' has import errors and cannot be triggered"
                return fault, 400, {"detail": words}
            if dag_id in self.rejecting:
                return fault, *self.rejecting[dag_id]
            dates = {run["logical_date"] for (dag, _), run in self.runs.items() if dag == dag_id}
            date = body.get("logical_date")
            if (dag_id, run_id) in self.runs or (date is not None and date in dates):
                return fault, 409, {"detail": {"reason": "Unique constraint violation"}}
            run = self.make(
                dag_id, run_id, conf=body.get("conf") or {}, logical_date=date, note=body.get("note")
            )
            if dag_id in self.dags:  # of thousands of runs of another it would take long to count
                count = len(self.unfinished(dag_id))
                self.most_unfinished[dag_id] = max(self.most_unfinished[dag_id], count)
            return fault, 500 if fault == "500" else 200, run if fault != "500" else {"detail": "overload"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: with two, Nagle and delayed acknowledgement cost 40 ms
    airflow: FakeAirflow

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def _reply(self, status: int, body: Any, kind: str = "application/json", **headers: str) -> None:
        raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self._over()
        self.wfile.write(raw)
        self.wfile.flush()

    def _do(self) -> None:
        airflow = self.airflow
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        if len(raw) < length:  # the client was killed in the midst of it
            self.close_connection = True
            return
        body = json.loads(raw) if raw else {}
        parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        with airflow._lock:
            airflow.in_flight += 1
            airflow.most_in_flight = max(airflow.most_in_flight, airflow.in_flight)
        self._counted = True
        try:
            if airflow.delay_s:
                time.sleep(airflow.delay_s)
            self._route(self.command, parts, body)
        finally:
            self._over()

    def _over(self) -> None:
        """Count it no more: before its answer leaves, or the next one of its caller may be here first."""
        with self.airflow._lock:
            self.airflow.in_flight -= self._counted
            self._counted = False

    do_GET = do_POST = do_PATCH = do_DELETE = _do

    def _route(self, method: str, parts: list[str], body: dict[str, Any]) -> None:
        airflow = self.airflow
        match method, parts:
            case "GET", ["api", "v2", "version"]:
                self._reply(200, {"version": "3.3.2", "git_version": None})
            case "POST", ["auth", "token"]:
                self._reply(*self._log_in(body))
            case _ if airflow.refuse_token or self.headers.get("Authorization") != f"Bearer {airflow.token}":
                self._reply(401, {"detail": "Not authenticated"})
            case "GET", ["api", "v2", "dags"] if not airflow.silent:
                self._reply(200, {"dags": [], "total_entries": 0})
            case "POST", ["api", "v2", "dags", dag_id, "dagRuns"]:
                self._create(dag_id, body)
            case "GET", ["api", "v2", "dags", dag_id, "dagRuns"] if "state=" not in self.path:
                found = [run for (dag, _), run in airflow.runs.items() if dag == dag_id]
                if "logical_date" in self.path:
                    found = [run for run in found if run["logical_date"]]
                self._reply(200, {"dag_runs": found, "total_entries": len(found)})
            case _, ["api", "v2", "dags", *_] if airflow.silent:
                self._reply(503, {"detail": "busy"})
            case "GET", ["api", "v2", "dags", dag_id, "dagRuns"]:
                with airflow._lock:
                    count = len(airflow.unfinished(dag_id))
                self._reply(200, {"dag_runs": [], "total_entries": count})
            case _, ["api", "v2", "dags", dag_id]:
                self._dag(method, dag_id, body)
            case "POST", ["api", "v2", "dags", "~", "dagRuns", "list"]:
                airflow.lists += 1
                self._reply(200, self._listed(body))
            case "GET", ["api", "v2", "dags", dag_id, "dagRuns", _, "taskInstances", task_id, listed] if (
                listed.startswith("listMapped")
            ):
                if (dag_id, task_id) in airflow.mapped:
                    self._reply(200, {"task_instances": [], "total_entries": 0})
                else:
                    self._reply(404, {"detail": f"Task id {task_id} is not mapped"})
            case _, [*_, "dags", dag_id, "dagRuns", run_id, "taskInstances", task_id, index] if (
                index.removeprefix("-").isdecimal()
            ):
                self._task_instance(method, (dag_id, run_id, task_id, int(index)), body)
            case "GET", ["api", "v2", "dags", dag_id, "dagRuns", run_id, "taskInstances", task_id, *rest]:
                self._reply(*self._task(dag_id, run_id, task_id, bool(rest)))
            case _, ["api", "v2", "dags", dag_id, "dagRuns", run_id, *rest]:
                airflow.gets[dag_id, run_id] += method == "GET"
                run = airflow.runs.get((dag_id, run_id))
                if run is None:
                    words = f"The DagRun with dag_id: `{dag_id}` and run_id: `{run_id}` was not found"
                    self._reply(404, {"detail": words})
                    return
                if method == "PATCH":
                    if "state" in body:
                        airflow.stops.wait(60)
                    run |= body
                elif method == "DELETE":
                    del airflow.runs[dag_id, run_id]
                elif rest == ["clear"] and body.get("dry_run", True) is False:
                    airflow.cleared[dag_id, run_id] += 1
                    run |= {"state": "queued", "start_date": None, "end_date": None}
                self._reply(200, run)
            case _:
                self._reply(404, {"detail": "Not Found"})

    def _dag(self, method: str, dag_id: str, body: dict[str, Any]) -> None:
        """Show a DAG, or change it."""
        airflow = self.airflow
        if dag_id in airflow.missing:
            self._reply(404, {"detail": f"The Dag with ID: `{dag_id}` was not found"})
        elif method == "GET":
            airflow.asked[dag_id] += 1
            self._reply(200, airflow.dag(dag_id))
        elif not airflow.may_unpause:
            self._reply(403, {"detail": "Forbidden"})
        else:
            airflow.unpaused[dag_id] += body == {"is_paused": False}
            airflow.dags[dag_id] = airflow.dags.get(dag_id, {}) | body
            self._reply(200, airflow.dag(dag_id))

    def _listed(self, body: dict[str, Any]) -> dict[str, Any]:
        found = [
            run
            for (dag_id, _), run in list(self.airflow.runs.items())
            if dag_id in body["dag_ids"]
            and body["run_after_gte"] <= run["run_after"] <= body["run_after_lte"]
            and run["state"] in body.get("states", ("queued", "running", "success", "failed"))
        ]
        return {"dag_runs": found[::-1][: body["page_limit"]], "total_entries": len(found)}

    def _task(self, dag_id: str, run_id: str, task_id: str, xcom: bool) -> tuple[int, Any]:
        """What Airflow says of a task of a run, or of what it returned."""
        key = dag_id, run_id, task_id
        there = key in self.airflow.returned
        mapped = there and self.airflow.returned[key] == "mapped"
        if xcom:
            if there and not mapped:
                return 200, {"key": "return_value", "value": self.airflow.returned[key]}
            return 404, {"detail": "XCom entry with key: `return_value` not found"}
        if mapped:
            return 404, {"detail": "Task instance is mapped, add the map_index value to the URL"}
        if there:
            return 200, {"task_id": task_id}
        return 404, {
            "detail": f"The Task Instance with dag_id: `{dag_id}` and task_id: `{task_id}` was not found"
        }

    def _task_instance(self, method: str, key: tuple[str, str, str, int], body: dict[str, Any]) -> None:
        """Show a task instance, or set it to a state."""
        airflow = self.airflow
        task = airflow.tasks.get(key)
        fault = airflow.on_patch() if method == "PATCH" else "answer"
        if fault in ("503", "403"):
            self._reply(int(fault), {"detail": "Forbidden" if fault == "403" else "busy"})
            return
        if task is None:
            words = (
                "The Mapped Task Instance with dag_id: `{}`, run_id: `{}`, task_id: `{}`, and map_index: `{}`"
            )
            self._reply(404, {"detail": f"{words.format(*key)} was not found"})
            return
        if method == "PATCH":
            airflow.patches.append((key, body))
            if task["state"] == body["new_state"]:
                self._reply(409, {"detail": f"Task id {key[2]} is already in {body['new_state']} state"})
                return
            task |= {
                "state": body["new_state"],
                "note": body.get("note"),
                "end_date": datetime.now(UTC).isoformat(),
            }
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        self._reply(200, {"task_instances": [task], "total_entries": 1} if method == "PATCH" else task)

    def _log_in(self, body: dict[str, Any]) -> tuple[int, Any]:
        airflow = self.airflow
        airflow.logins += 1
        given = body.get("username"), body.get("password")
        if airflow.refuse_credentials or given != (airflow.username, airflow.password):
            return 401, {"detail": "Invalid credentials"}
        return 201, {"access_token": airflow.token}

    def _create(self, dag_id: str, body: dict[str, Any]) -> None:
        self.airflow.traces[dag_id, body["dag_run_id"]] = self.headers.get("traceparent")
        fault, status, answer = self.airflow.create(dag_id, body)
        if fault == "late":
            time.sleep(self.airflow.late_s)
        if fault == "reset":
            # SO_LINGER 0: close() then sends RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("drop", "reset"):
            self.close_connection = True
            self.connection.close()
            return
        if fault == "html":
            self._reply(502, "<html><title>Bad gateway</title></html>", "text/html")
            return
        headers = {"Retry_After": "1"} if fault in ("503", "429") else {}
        self._reply(status, answer, **headers)
