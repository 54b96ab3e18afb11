"""What a sender may ask for: which DAGs, which Airflows, which services, which hooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from .contract import PollRequest, TriggerRequest
from .errors import NotAllowed

ALL: Final = ("*",)


@dataclass(frozen=True, slots=True)
class Scope:
    """Patterns as in a shell (`sales_*`), compared case-sensitively; all but those of DAGs in lower case.

    Without `services` no jobs are allowed, without `hooks` no `on_end`: both act on other people's systems.
    """

    dags: tuple[str, ...] = ALL
    connections: tuple[str, ...] = ("default",)
    services: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()

    def check(self, request: TriggerRequest | PollRequest) -> None:
        """Raise NotAllowed for what is not in it; what a job's `then` triggers counts, and the DAG whose
        task it ends.

        The text says what the sender asked for, and nothing of what there is.
        """
        if isinstance(request, PollRequest):
            if not _within(request.service, self.services):
                raise NotAllowed(f"service: {request.service!r} is not among those that you may use")
            if request.then is not None:
                self._check_trigger(request.then, "then.")
            if request.task_instance is not None:  # a task that is set to success has its DAG go on
                task = request.task_instance
                about = {"dag_id": task.dag_id, "connection": task.connection}
                self._check_trigger(about, "task_instance.")
        else:
            self._check_trigger({"dag_id": request.dag_id, "connection": request.connection}, "")
        self._check_hooks(request.on_end, "")

    def _check_trigger(self, fields: Mapping[str, Any], where: str) -> None:
        dag_id = str(fields.get("dag_id"))
        if not _within(dag_id, self.dags):
            raise NotAllowed(f"{where}dag_id: {dag_id!r} is not among those that you may start")
        connection = str(fields.get("connection", "default")).lower()
        if not _within(connection, self.connections):
            raise NotAllowed(f"{where}connection: {connection!r} is not among those that you may use")
        self._check_hooks(fields.get("on_end") or (), where)

    def _check_hooks(self, hooks: Iterable[str], where: str) -> None:
        for hook in hooks:
            if not _within(hook.lower(), self.hooks):
                raise NotAllowed(f"{where}on_end: {hook!r} is not among those that you may have told")


EVERYTHING: Final = Scope(ALL, ALL, ALL, ALL)


def _within(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
