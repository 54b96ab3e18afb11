"""What Airflow asks a provider for: its connection with the form for it, its operators, triggers and links.

Every process of an Airflow loads this module, so it imports nothing. Airflow 3.2 and later read the form of
the connection from here; those before ask the hook for the same (`form_widgets`, `form_behaviour`).
"""

from __future__ import annotations

from typing import Any, Final

INTEGRATION: Final = "Dagrelay"

_BEHAVIOUR: Final[dict[str, Any]] = {
    "relabeling": {"schema": "Redis database"},
    "placeholders": {"host": "redis.example.org", "port": "6379", "schema": "0"},
}
_FIELDS: Final[dict[str, dict[str, Any]]] = {
    "flower_url": {
        "label": "Flower",
        "description": "Its address, for the links from tasks",
        "schema": {"type": ["string", "null"]},
    },
    "ssl": {"label": "TLS", "schema": {"type": ["boolean", "null"], "default": False}},
    "redis_url": {
        "label": "Redis URL",
        "description": "A whole one, instead of host, port, login, password and database",
        "schema": {"type": ["string", "null"], "format": "password"},
    },
    "airflow_name": {
        "label": "Name of this Airflow",
        "description": "Where several share one Redis; its address unless given",
        "schema": {"type": ["string", "null"]},
    },
    "conf_key": {
        "label": "Key of confs",
        "description": "What confs are sealed with, as DAGRELAY_CONF_KEY",
        "schema": {"type": ["string", "null"], "format": "password"},
    },
    "conf_limit_bytes": {
        "label": "Limit of confs (bytes)",
        "description": "Larger ones go by reference, as DAGRELAY_CONF_LIMIT_BYTES",
        "schema": {"type": ["integer", "null"]},
    },
}


def get_provider_info() -> dict[str, Any]:
    """Return the provider's metadata, in the form of Airflow's provider_info.schema.json."""
    return {
        "package-name": "dagrelay",
        "name": INTEGRATION,
        "description": "Start DAG runs of this or another Airflow, and jobs elsewhere, exactly once.",
        "integrations": [{"integration-name": INTEGRATION, "tags": ["software"]}],
        "operators": [_modules("operators")],
        "sensors": [_modules("sensors")],
        "hooks": [_modules("hook")],
        "triggers": [_modules("dag_runs", "external_job")],
        "connection-types": [
            {
                "connection-type": "dagrelay",
                "hook-class-name": "producers.airflow.hook.DagrelayHook",
                "hook-name": INTEGRATION,
                "ui-field-behaviour": {"hidden-fields": [], **_BEHAVIOUR},
                "conn-fields": _FIELDS,
            }
        ],
        "extra-links": ["producers.airflow.links.FlowerLink", "producers.airflow.links.TriggeredDagLink"],
    }


def _modules(*names: str) -> dict[str, Any]:
    return {
        "integration-name": INTEGRATION,
        "python-modules": [f"producers.airflow.{name}" for name in names],
    }


def form_behaviour() -> dict[str, Any]:
    """Return what the form calls the fields that every connection has, as Airflow asks a hook."""
    return {"hidden_fields": [], **_BEHAVIOUR}


def form_widgets() -> dict[str, Any]:
    """Return the form's fields for the extras, as Airflow before 3.2 asks a hook. Needs FAB."""
    from flask_appbuilder.fieldwidgets import BS3PasswordFieldWidget, BS3TextFieldWidget
    from wtforms import BooleanField, IntegerField, PasswordField, StringField
    from wtforms.validators import Optional

    def widget(field: dict[str, Any]) -> Any:
        label, about = field["label"], field.get("description", "")
        kind = field["schema"]["type"][0]
        if kind == "boolean":
            return BooleanField(label, description=about)
        if kind == "integer":
            return IntegerField(label, [Optional()], description=about, widget=BS3TextFieldWidget())
        if field["schema"].get("format") == "password":
            return PasswordField(label, [Optional()], description=about, widget=BS3PasswordFieldWidget())
        return StringField(label, description=about, widget=BS3TextFieldWidget())

    return {name: widget(field) for name, field in _FIELDS.items()}
