"""A line of the log says what a field is and what is text, whatever the values hold."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from celery.app import trace as celery_trace
from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import consumer as celery_consumer
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError

from producers.errors import AirflowUnavailable, DagNotFound
from producers.stores.envelope import Trace
from producers.stores.records import Ended
from tasks import logs, tracing

SECRET = "kanarienvogel-7f3a"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Log:
    """What a process would write: the lines of loggers of its own."""

    def __init__(self, form: logs.Format, **options: Any) -> None:
        self.stream = io.StringIO()
        self._handler = logging.StreamHandler(self.stream)
        self._handler.setFormatter(logs.Json() if form == "json" else logs.Logfmt(**options))

    def __call__(self, name: str = "dagrelay.test") -> logging.Logger:
        logger = logging.Logger(name, logging.DEBUG)  # of nobody's tree
        logger.addHandler(self._handler)
        return logger

    def line(self) -> str:
        """The one line that was written since the last time."""
        text = self.stream.getvalue()
        self.stream.seek(0)
        self.stream.truncate()
        assert text.endswith("\n")
        assert "\n" not in text[:-1]
        return text[:-1]

    def fields(self) -> dict[str, Any]:
        return json.loads(self.line())


def fail(exc: Exception, cause: Exception | None = None) -> NoReturn:
    if cause is not None:
        raise exc from cause
    raise exc


@pytest.fixture
def json_log() -> Log:
    return Log("json")


@pytest.fixture
def logfmt() -> Log:
    return Log("logfmt")


def test_key_value_is_the_line_that_it_was(logfmt):
    logfmt("dagrelay.trigger").info("run %s task_id=%s key=%s attempt=%d", "started", "t-1", "k/1", 2)

    date, time, *rest = logfmt.line().split(" ")
    datetime.strptime(f"{date} {time}", "%Y-%m-%d %H:%M:%S,%f")
    assert " ".join(rest) == "INFO dagrelay.trigger run started task_id=t-1 key=k/1 attempt=2"


@pytest.mark.parametrize(
    ("value", "as_logfmt"),
    [
        ("k/1", "k/1"),
        ("größe", "größe"),
        ("", '""'),
        ("a b", '"a b"'),
        ("a=b", '"a=b"'),
        ('say "no"', '"say \\"no\\""'),
        ("back\\slash", "back\\slash"),
        ("back\\slash and space", '"back\\\\slash and space"'),
        ("two\nlines\tand\r", '"two\\nlines\\tand\\r"'),
        ("\x1b[31mred\x7f", '"\\u001b[31mred\\u007f"'),
        ("\u2028\u00a0", '"\\u2028\\u00a0"'),
        ("\udc80", '"\\udc80"'),
        (1.5, "1.5"),
        (True, "true"),
    ],
)
def test_a_value_is_quoted_where_a_reader_could_not_tell(logfmt, json_log, value, as_logfmt):
    for log in (logfmt, json_log):
        log().info("seen key=%s after=%s", value, 1)

    assert logfmt.line().endswith(f"seen key={as_logfmt} after=1")
    found = json_log.fields()
    assert found["key"] == value
    assert found["after"] == 1


@given(st.text(), st.text())
def test_any_value_comes_back_as_it_was_from_one_line(value, reason):
    logfmt, json_log = Log("logfmt"), Log("json")
    for log in (logfmt, json_log):
        log().info("seen key=%s n=%d: %s", value, 7, reason)

    _, _, pair = logfmt.line().partition(" seen key=")
    text, rest = read_value(pair)
    assert text == value
    assert rest.startswith(" n=7 reason=")
    assert read_value(rest.removeprefix(" n=7 reason=")) == (reason, "")
    found = json_log.fields()
    assert (found["key"], found["n"], found["reason"]) == (value, 7, reason)
    assert found["message"] == "seen"


def read_value(text: str) -> tuple[str, str]:
    """Read one value as a parser of logfmt does; return it and the rest."""
    if not text.startswith('"'):
        value, space, rest = text.partition(" ")
        return value, space + rest
    value, end = json.JSONDecoder().raw_decode(text)
    return value, text[end:]


def test_a_record_in_json_has_its_time_in_utc_its_level_its_logger_and_its_fields(json_log):
    before = datetime.now(UTC)
    json_log("dagrelay.task").warning(
        "waits task_id=%s for_s=%.1f: %s", "t-1", 2.345, AirflowUnavailable("503")
    )

    found = json_log.fields()
    time = found.pop("time")
    assert time.endswith("Z")
    assert abs((datetime.fromisoformat(time) - before).total_seconds()) < 60
    assert found == {
        "level": "WARNING",
        "logger": "dagrelay.task",
        "message": "waits",
        "task_id": "t-1",
        "for_s": 2.3,
        "reason": "Airflow unavailable: 503",
    }


def test_what_is_none_is_left_out_and_numbers_stay_numbers(json_log, logfmt):
    for log in (json_log, logfmt):
        log().info("seen key=%s count=%s share=%s", None, 3, float("nan"))
        found = log.line()
        assert "key" not in found
    assert found.endswith("seen count=3 share=nan")
    json_log().info("seen key=%s count=%s share=%s done=%s", None, 3, float("nan"), False)
    assert {"count": 3, "share": "nan", "done": False}.items() <= json_log.fields().items()


def test_a_field_does_not_take_the_place_of_what_every_record_has(json_log):
    json_log().info("seen level=%s time=%s", "high", 5)

    found = json_log.fields()
    assert (found["level"], found["level_"], found["time_"]) == ("INFO", "high", 5)


def test_fields_that_no_template_names(json_log):
    logs.told("connection opened", connection="eu", seconds=1.5, nothing=None, logger=json_log())

    found = json_log.fields()
    assert (found["message"], found["connection"], found["seconds"]) == ("connection opened", "eu", 1.5)
    assert "nothing" not in found


@pytest.mark.parametrize(
    "template", ["100%", "%d of %s", "%(name)s", "%s %s key=%s", "key=%q", "50%% key=%s"]
)
def test_a_template_that_does_not_fit_is_a_line_all_the_same(json_log, template):
    json_log().info(template, "a")

    assert json_log.fields()["level"] == "INFO"


def test_lines_of_other_libraries_are_lines_too(json_log):
    json_log("celery.worker").info("%s ready.\n key=%s", "w1@here", "no field")

    assert json_log.fields()["message"] == "w1@here ready.\n key=no field"


def test_a_traceback_stays_in_one_record(json_log, logfmt):
    for log in (json_log, logfmt):
        try:
            fail(DagNotFound("sales", "gone"))
        except DagNotFound:
            log("celery.x").exception("it failed")

    found = json_log.fields()
    assert found["message"] == "it failed"
    assert found["traceback"].splitlines()[0] == "Traceback (most recent call last):"
    assert 'fail(DagNotFound("sales", "gone"))' in found["traceback"]
    assert found["traceback"].endswith(f"DagNotFound: {DagNotFound('sales', 'gone')}")
    assert 'it failed traceback="Traceback (most recent call last):\\n  File' in logfmt.line()


def test_on_a_terminal_a_traceback_stands_below():
    log = Log("logfmt", below=True)
    try:
        fail(DagNotFound("sales", "gone"))
    except DagNotFound:
        log("celery.x").exception("it failed")

    first, second, *_ = log.stream.getvalue().splitlines()
    assert first.endswith("it failed")
    assert second == "Traceback (most recent call last):"


def raise_with_values() -> None:
    try:
        fail(ValueError(SECRET))
    except ValueError as exc:
        try:
            fail(KeyError(SECRET), exc)
        except KeyError:
            fail(RuntimeError(f"no {SECRET}"))


def test_the_words_of_somebodys_exception_are_in_no_traceback(json_log):
    try:
        raise_with_values()
    except RuntimeError as exc:
        json_log("celery.worker").exception("it failed")
        json_log().warning("it failed: %s", exc)
        text = json_log.stream.getvalue()

    assert SECRET not in text
    first, second = [json.loads(line) for line in text.splitlines()]
    assert [line for line in first["traceback"].splitlines() if re.fullmatch(r"\w+Error", line)] == [
        *("ValueError", "KeyError", "RuntimeError")
    ]
    assert "fail(KeyError(SECRET), exc)" in first["traceback"]  # the line of code
    assert second["reason"] == "RuntimeError"


@pytest.mark.parametrize(
    ("exc", "words"),
    [
        (DagNotFound("sales", "gone"), str(DagNotFound("sales", "gone"))),
        (RedisConnectionError("Error 111"), "ConnectionError: Error 111"),
        (ConnectionRefusedError(111, "refused"), "ConnectionRefusedError: [Errno 111] refused"),
        (ValueError(SECRET), "ValueError"),
        (UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, "x"), "UnicodeDecodeError"),
    ],
)
def test_an_exception_speaks_where_we_know_what_it_says(exc, words):
    assert logs.words_of(exc) == words


class Odd(AirflowUnavailable):
    def __str__(self) -> str:
        raise ValueError(SECRET)


def test_an_exception_that_cannot_be_told_is_told_by_its_class():
    assert logs.words_of(Odd("x")) == "Odd"


BODY = f"{{'conf': {{'password': '{SECRET}'}}}}"
HEADERS = {"id": "t-9", "task": "tasks.trigger_dags", "kwargsrepr": BODY}


@pytest.mark.parametrize(
    ("template", "args", "fields"),
    [
        (
            celery_consumer.UNKNOWN_TASK_ERROR,
            (KeyError(SECRET), BODY, HEADERS, {"routing_key": "triggers"}),
            {"task": "tasks.trigger_dags", "task_id": "t-9", "queue": "triggers"},
        ),
        (celery_consumer.INVALID_TASK_ERROR, (ValueError(SECRET), BODY), {"error": "ValueError"}),
        (celery_consumer.UNKNOWN_FORMAT, (BODY,), {}),
        (
            celery_consumer.MESSAGE_DECODE_ERROR,
            (ValueError(SECRET), "json", "utf-8", HEADERS, BODY),
            {"error": "ValueError"},
        ),
        (
            celery_trace.LOG_FAILURE.strip(),
            (
                {
                    "name": "tasks.trigger_dag",
                    "id": "t-9",
                    "exc": f"ValueError({SECRET!r})",
                    "description": "raised unexpected",
                    "args": SECRET,
                },
            ),
            {"task": "tasks.trigger_dag", "task_id": "t-9"},
        ),
    ],
)
def test_celery_logs_no_message_and_no_value(json_log, logfmt, template, args, fields):
    for log in (json_log, logfmt):
        try:
            fail(ValueError(SECRET))
        except ValueError:
            log("celery.worker.consumer").exception(template, *args)

    line = json_log.line()
    assert SECRET not in line
    assert SECRET not in logfmt.line()
    found = json.loads(line)
    assert fields.items() <= found.items()


def test_what_a_new_celery_says_otherwise_is_no_leak_either(json_log):
    json_log("celery.worker.consumer").error(celery_consumer.UNKNOWN_TASK_ERROR, BODY)

    assert SECRET not in json_log.line()


def test_a_record_is_shorter_than_what_collectors_cut(json_log):
    try:
        fail(DagNotFound("x" * 30_000, "gone"))
    except DagNotFound:
        json_log().exception("seen key=%s words %s", "x" * 30_000, "x" * 30_000)

    assert len(json_log.line()) < 16_000


def test_the_trace_of_the_running_task_is_in_its_lines(json_log):
    token = tracing._current.set(Trace(PARENT))
    try:
        json_log().info("seen")
        json_log("celery.worker").info("seen")
        text = json_log.stream.getvalue()
    finally:
        tracing._current.reset(token)

    assert [json.loads(line)["trace_id"] for line in text.splitlines()] == [PARENT[3:35]] * 2


ENDED = Ended("tasks.trigger_dag", "sales", "relay__k", "eu", "k", "", "", "2", "1.250")
FAILED = {"exc_type": "DagNotFound", "exc_message": ["sales", "gone"], "exc_module": "producers.errors"}


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch, json_log: Log) -> Callable[..., dict[str, Any]]:
    def told(*args: Any, **options: Any) -> dict[str, Any]:
        logs.outcome(*args, **options)
        found = json_log.fields()
        found.pop("time")
        return found

    logger = json_log("dagrelay.outcome")
    monkeypatch.setattr(logs.told, "__kwdefaults__", {"logger": logger})
    return told


def test_an_outcome_has_its_request_and_how_it_ended(outcomes):
    run = {"dag_id": "sales", "dag_run_id": "relay__k", "created": True, "state": "queued"}
    assert outcomes("t-1", "done", ENDED, run) == {
        "level": "INFO",
        "logger": "dagrelay.outcome",
        "message": "request done",
        "task_id": "t-1",
        "dag_id": "sales",
        "run_id": "relay__k",
        "connection": "eu",
        "key": "k",
        "outcome": "started",
        "state": "queued",
        "attempts": 2,
        "age_s": 1.25,
    }


@pytest.mark.parametrize(
    ("result", "options", "outcome"),
    [
        ({"created": False, "cleared": False}, {}, "exists"),
        ({"created": False, "cleared": True}, {}, "cleared"),
        ({"created": True}, {"correct": True}, "corrected"),
        (None, {}, "exists"),
    ],
)
def test_the_outcome_of_a_trigger_is_what_metrics_count(outcomes, result, options, outcome):
    assert outcomes("t-1", "done", ENDED, result, **options)["outcome"] == outcome


def test_a_failure_has_its_class_and_its_words(outcomes):
    found = outcomes("t-1", "failed", ENDED, FAILED)

    assert found["level"] == "WARNING"
    assert (found["message"], found["outcome"], found["error"]) == ("request failed", "failed", "DagNotFound")
    assert found["reason"] == str(DagNotFound("sales", "gone"))


def test_a_failure_that_nobody_foresaw_has_no_words(outcomes):
    unforeseen = {"exc_type": "ValueError", "exc_message": [SECRET], "exc_module": "builtins"}
    found = outcomes("t-1", "failed", ENDED, unforeseen)

    assert (found["level"], found["error"]) == ("ERROR", "ValueError")
    assert SECRET not in json.dumps(found)


def test_a_job_has_its_service_and_its_id(outcomes):
    job = Ended("tasks.poll_external_job", "", "", "", "", "train", "job-7", "1", "")
    found = outcomes("t-1", "done", job, {"service": "train", "state": "succeeded", "result": SECRET})

    assert (found["service"], found["job_id"], found["outcome"]) == ("train", "job-7", "done")
    assert not {"dag_id", "age_s", "key"} & found.keys()
    assert SECRET not in json.dumps(found)


@pytest.mark.parametrize("form", ["logfmt", "json"])
def test_what_ended_in_bulk_is_a_line_each_with_its_own_trace(whole_process, form):
    logs.set_up(logging.INFO, form, whole_process)
    logs.outcomes(
        {"task_id": f"t.{n}", "key": None, "outcome": "started", "trace_id": n and PARENT[3:35]}
        for n in range(3)
    )
    whole_process.flush()

    first, *lines = whole_process.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    if form == "json":
        assert (
            json.loads(lines[1]).items()
            >= {
                "logger": "dagrelay.outcome",
                "message": "request done",
                "task_id": "t.2",
                "outcome": "started",
                "trace_id": PARENT[3:35],
            }.items()
        )
    else:
        assert lines[1].endswith(
            f"INFO dagrelay.outcome request done task_id=t.2 outcome=started trace_id={PARENT[3:35]}"
        )
    assert "t.0" in first


def test_nothing_is_written_in_bulk_where_nobody_wants_it(whole_process):
    logs.set_up(logging.WARNING, "json", whole_process)
    logs.outcomes({"task_id": f"t.{n}"} for n in range(3))
    whole_process.flush()

    assert whole_process.buffer.getvalue() == b""  # type: ignore[attr-defined]


def test_a_workers_own_task_is_no_outcome(json_log, monkeypatch):
    monkeypatch.setattr(logs.told, "__kwdefaults__", {"logger": json_log()})
    logs.outcome("t-1.0", "done", ENDED._replace(task="tasks.trigger_chunk"), None)

    assert json_log.stream.getvalue() == ""


@pytest.fixture
def whole_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.TextIOWrapper]:
    """A stream to which this process logs, as a worker does; all is as it was afterwards."""
    root = logging.getLogger()
    kept = root.handlers[:], root.level, sys.excepthook, threading.excepthook, warnings.formatwarning
    monkeypatch.setattr(warnings, "filters", warnings.filters[:])
    levels = {name: logging.getLogger(name).level for name in ("celery.worker.strategy", "celery.app.trace")}
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr("celery.apps.worker.safe_say", print)
    root.handlers = []
    try:
        yield io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    finally:
        root.handlers, level, sys.excepthook, threading.excepthook, warnings.formatwarning = kept
        root.setLevel(level)
        logging.captureWarnings(False)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def test_all_that_a_process_says_is_json(whole_process):
    logs.set_up(logging.INFO, "json", whole_process)
    logs.set_up(logging.INFO, "json", whole_process)  # as in a child of a pool
    logging.getLogger("dagrelay.x").info("größe key=%s", "\udc80\u20ac")
    logging.getLogger("celery.app.trace").info("succeeded")  # said by the outcome
    warnings.warn("be warned", UserWarning, stacklevel=1)
    warnings.warn("of Celery's, at each lost connection", CPendingDeprecationWarning, stacklevel=1)
    thread = threading.Thread(target=raise_with_values, name="t1")
    thread.start()
    thread.join()
    sys.excepthook(RuntimeError, RuntimeError(SECRET), None)
    whole_process.flush()

    written = whole_process.buffer.getvalue().decode()  # type: ignore[attr-defined]
    found = [json.loads(line) for line in written.splitlines()]
    assert SECRET not in written
    assert [one["message"] for one in found[:1]] == ["größe"]
    assert found[0]["key"] == "\udc80\u20ac"
    assert "UserWarning: be warned" in found[1]["message"]
    assert [one["message"] for one in found[2:]] == ["not caught in thread t1", "not caught"]


def test_what_celery_says_in_a_signal_handler_is_a_record(capfd):
    logs._say("\nworker: Warm shutdown (MainProcess)\n", SimpleNamespace())

    found = json.loads(capfd.readouterr().err)
    assert found["message"] == "worker: Warm shutdown (MainProcess)"
    assert found["time"].endswith("Z")
