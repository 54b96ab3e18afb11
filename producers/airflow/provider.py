"""What Airflow asks a provider for: its connection with the form for it, its operators, triggers and links.

Every process of an Airflow loads this module, so it imports nothing. Airflow 3.2 and later take the form from
here; Airflow 2 and 3.0 ask the hook's methods.
"""

from __future__ import annotations

from typing import Any, Final

INTEGRATION: Final = "Dagrelay"


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
        "triggers": [_modules("triggers")],
        "connection-types": [
            {
                "connection-type": "dagrelay",
                "hook-class-name": "producers.airflow.hook.DagrelayHook",
                "hook-name": INTEGRATION,
                "ui-field-behaviour": {
                    "hidden-fields": [],
                    "relabeling": {"schema": "Redis database"},
                    "placeholders": {"host": "redis.example.org", "port": "6379", "schema": "0"},
                },
                "conn-fields": {
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
                        "description": "Where several share one Redis; default: its address",
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
                },
            }
        ],
        "extra-links": ["producers.airflow.links.FlowerLink", "producers.airflow.links.TriggeredDagLink"],
    }


def _modules(name: str) -> dict[str, Any]:
    return {"integration-name": INTEGRATION, "python-modules": [f"producers.airflow.{name}"]}
