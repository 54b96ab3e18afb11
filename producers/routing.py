"""What a CloudEvent asks for: rules in one file, tried in order; the first that takes the event decides.

TOML, or the same as JSON where the name ends in ``.json``::

    [[rules]]
    name = "orders"                            # for messages to people; left out: its number
    type = "com.example.order.*"               # a pattern as in a shell
    source = "/shops/*"                        # likewise; left out: any
    filter = "data.total > `100`"              # only events for which this is true
    dag_id = "process_order"                   # or dag_id_from = "join('_', ['process', data.kind])"
    conf = "{order: data.id, shop: source}"    # left out: the data, where that is an object, else {"data": …}
    key = "data.id"                            # left out: source and id, which name an event
    connection = "default"                     # this and all other fields of a trigger: as they are

`filter`, `dag_id_from`, `conf` and `key` are JMESPath (https://jmespath.org) over the event as one object:
its attributes, and its `data`. A sender's scope is asked afterwards: an event starts no DAG that its sender
may not start. An event that no rule takes is refused.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import jmespath
from jmespath.exceptions import JMESPathError

from .contract import MAX_KEY_LENGTH, TriggerRequest, _expression
from .errors import ConfigurationError, InvalidRequest
from .queues.message import Event, task_id_for

EXPRESSIONS: Final = ("filter", "dag_id_from", "conf", "key")
_OF_THE_EVENT: Final = ("dag_run_id", "logical_date", "run_after")
"""Fields of a trigger that one rule cannot give to all events."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. Expressions are compiled."""

    name: str
    type: str
    source: str
    dag_id: str | None
    expressions: Mapping[str, Any]
    fields: Mapping[str, Any]

    def takes(self, event: Event, whole: Mapping[str, Any]) -> bool:
        """Tell whether this rule is for the event. Raises InvalidRequest where its filter fails on it."""
        return (
            fnmatchcase(event.type, self.type)
            and fnmatchcase(event.source, self.source)
            and ("filter" not in self.expressions or self._found("filter", whole) is True)
        )

    def request(self, event: Event, whole: Mapping[str, Any]) -> TriggerRequest:
        """Return the trigger. Raises InvalidRequest, naming the rule and what of it does not fit."""
        dag_id = self.dag_id if self.dag_id is not None else self._found("dag_id_from", whole)
        if not isinstance(dag_id, str):
            raise InvalidRequest(f"rule {self.name!r}: dag_id_from yields no text for this event")
        if "conf" in self.expressions:
            conf = self._found("conf", whole)
            if not isinstance(conf, dict):
                raise InvalidRequest(f"rule {self.name!r}: conf yields no object for this event")
        else:
            conf = event.data if isinstance(event.data, dict) else {"data": event.data}
        try:
            return TriggerRequest(dag_id=dag_id, conf=conf, key=self._key(event, whole), **self.fields)
        except InvalidRequest as exc:
            raise InvalidRequest(f"rule {self.name!r}: {exc}") from None

    def _key(self, event: Event, whole: Mapping[str, Any]) -> str:
        if "key" not in self.expressions:
            return key_of(event)
        found = self._found("key", whole)
        if isinstance(found, bool) or not isinstance(found, str | int) or found == "":
            raise InvalidRequest(
                f"rule {self.name!r}: key yields neither text nor a whole number for this event"
            )
        return str(found)

    def _found(self, name: str, whole: Mapping[str, Any]) -> Any:
        try:
            return self.expressions[name].search(whole)
        except (JMESPathError, RecursionError, ValueError, TypeError, OverflowError):
            # Its own words hold values of the event.
            raise InvalidRequest(f"rule {self.name!r}: {name} does not fit this event") from None


class Rules:
    """All rules, as `Routes` of the doors."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)

    def order(self, event: Event) -> TriggerRequest:
        """Return what an event asks for. Raises InvalidRequest where no rule takes it."""
        whole = {**event.attributes, "data": event.data}
        for rule in self.rules:
            if rule.takes(event, whole):
                return rule.request(event, whole)
        raise InvalidRequest("type: no routing rule takes an event of this type and source")


def key_of(event: Event) -> str:
    """Return what names an event among all: the run that it starts is one, by whichever door it comes."""
    plain = f"{event.source} {event.id}"
    # With a space in the source, two events might read the same.
    fits = " " not in event.source and len(plain) <= MAX_KEY_LENGTH
    return plain if fits else task_id_for("event", event.source, event.id)


def load_rules(path: Path) -> Rules:
    """Return the rules of a file. Raises ConfigurationError with every mistake in it, by the rule's name."""
    try:
        text = path.read_text()
        given = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"rules: {path} cannot be read ({type(exc).__name__})") from None
    except (ValueError, RecursionError) as exc:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigurationError(f"rules: {path} is no {kind}: {exc}") from None
    return read_rules(given, str(path))


def read_rules(given: Any, where: str = "rules") -> Rules:
    """Return the rules in what a file holds. Raises ConfigurationError with every mistake at once."""
    tables = given.get("rules") if isinstance(given, dict) else None
    if not isinstance(tables, list) or set(given) != {"rules"}:
        raise ConfigurationError(f"{where}: holds tables [[rules]], and nothing else")
    mistakes: list[str] = []
    found = []
    names: set[str] = set()
    for number, table in enumerate(tables, 1):
        if not isinstance(table, dict):
            mistakes.append(f"rule {number}: is no table")
            continue
        name = table.get("name", str(number))
        shown = f"rule {name!r}"
        if not isinstance(name, str) or not name.isprintable() or name in names:
            mistakes.append(f"{shown}: name is no text of its own")
            name = str(number)
        names.add(name)
        wrong: list[str] = []
        rule = _rule(name, table, wrong)
        mistakes += [f"{shown}: {one}" for one in wrong]
        found.append(rule)
    if mistakes:
        raise ConfigurationError(*mistakes)
    return Rules(found)


def _rule(name: str, table: Mapping[str, Any], wrong: list[str]) -> Rule:
    """Return the rule in a table; what is wrong with it is added to `wrong`."""
    own = ("name", "type", "source", "dag_id", *EXPRESSIONS)
    fields = {}
    for field, value in table.items():
        if field in own:
            if field != "name" and (not isinstance(value, str) or not value):
                wrong.append(f"{field} is no text")
        elif field in _OF_THE_EVENT or field not in TriggerRequest.model_fields:
            wrong.append(f"{field!r} is no part of a rule")
        else:
            fields[field] = value
    if "type" not in table:
        wrong.append("type is missing: the pattern of the events' type, or '*'")
    if ("dag_id" in table) == ("dag_id_from" in table):
        wrong.append("give dag_id or dag_id_from")
    dag_id = table.get("dag_id")
    try:
        TriggerRequest(dag_id=dag_id if isinstance(dag_id, str) else "any", **fields)
    except InvalidRequest as exc:
        wrong.append(str(exc))
    expressions = {}
    for field in EXPRESSIONS:
        value = table.get(field)
        if isinstance(value, str) and value:
            try:
                expressions[field] = jmespath.compile(_expression(value))
            except ValueError as exc:
                wrong.append(f"{field} {exc}")
    return Rule(name, table.get("type", "*"), table.get("source", "*"), dag_id, expressions, fields)
