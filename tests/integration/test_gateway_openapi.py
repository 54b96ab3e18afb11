"""The gateway does what its own description says: fuzzed from it by schemathesis.

By default a few requests for each operation; `GATEWAY_FUZZ=1000` for as many.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from local.process import clean_env
from local.valkey import Valkey
from tests.integration.gateway import GatewayProcess
from tests.worker import ROOT

pytestmark = pytest.mark.integration

EXAMPLES = int(os.environ.get("GATEWAY_FUZZ", "15"))
SCHEMATHESIS = ROOT / ".venv" / "bin" / "schemathesis"

# Left out: `positive_data_acceptance`. JSON Schema cannot say what a JMESPath expression is, nor that a job
# has a path or a URL; such a body is refused (422), and the description says that it may be.
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_schema_conformance", "response_headers_conformance", "negative_data_rejection"),
    *("missing_required_header", "unsupported_method", "ignored_auth"),
)


def test_it_does_what_its_description_says(tmp_path):
    with Valkey() as valkey, GatewayProcess(valkey.url, tmp_path) as gateway:
        done = subprocess.run(
            [
                *(SCHEMATHESIS, "run", f"http://127.0.0.1:{gateway.port}/openapi.json"),
                *("--checks", ",".join(CHECKS), "--max-examples", str(EXAMPLES)),
                *("--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color"),
                *("--header", f"Authorization: Bearer {gateway.token}", "--request-timeout", "20"),
                *("--exclude-path", "/v1/tasks/{task_id}/events"),
            ],
            cwd=tmp_path,
            env=clean_env(
                SCHEMATHESIS_HOOKS="tests.integration.gateway_hooks", PYTHONPATH=str(ROOT), PYTHONHASHSEED="0"
            ),
            capture_output=True,
            text=True,
            timeout=3600 if EXAMPLES > 100 else 280,
        )
        assert done.returncode == 0, done.stdout[:200] + done.stdout[-9000:] + done.stderr[-2000:]
        assert "a request failed" not in gateway.text()


def test_the_description_is_valid_and_names_every_route(tmp_path):
    from jsonschema import Draft202012Validator

    code = (
        "import json; from producers.client import RelayClient; from producers.gateway.app import create_app;"
        "from producers.gateway.base import Gateway; from producers.gateway.settings import GatewaySettings;"
        "from producers.settings import ProducerSettings as P; p = P('redis://127.0.0.1:1/0', 'x');"
        "print(json.dumps(create_app(Gateway(RelayClient(p), GatewaySettings(p))).openapi()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    described = json.loads(done.stdout)
    for schema in described["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    paths = described["paths"]
    for path, method in (
        ("/v1/dags/{dag_id}/runs", "post"),
        ("/v1/jobs", "post"),
        ("/v1/fan-out", "post"),
        ("/v1/events", "post"),
        ("/v1/tasks/{task_id}", "get"),
        ("/v1/tasks/{task_id}", "delete"),
        ("/v1/tasks/{task_id}/events", "get"),
    ):
        operation = paths[path][method]
        assert operation["security"] == [{"key": []}]
        assert {"401", "403", "429", "503"} <= set(operation["responses"])
    assert Path(ROOT, "producers/gateway/schemas.py").exists()
