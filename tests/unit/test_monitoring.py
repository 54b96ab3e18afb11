"""What lies in deploy/, checked by the tools made for it; and that each metric which it names is one of ours.

promtool checks the rules, runs their tests and parses the dashboard's expressions. Grafana's own schema reads
the dashboard, those of Kubernetes and of KEDA the manifests. That they work in a real Grafana and in a real
cluster stays unproven here; `tests/integration/test_metrics.py` has a real Prometheus answer the dashboard.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click import Command, Group
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from local import prometheus
from producers.cli import main
from tests import keda
from tests.parts import need
from tests.unit.test_deploy import compose

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
RULES, RULES_TEST = DEPLOY / "prometheus/alerts.yml", DEPLOY / "prometheus/alerts_test.yml"
DASHBOARD = DEPLOY / "grafana/dagrelay.json"
WORKER, SCALED = DEPLOY / "kubernetes/worker.yml", DEPLOY / "keda/scaledobject.yml"
OLDEST_KUBERNETES = "1.31"

THEIRS = {"process_cpu_seconds_total", "process_resident_memory_bytes", "up"}
"""Metrics that are not ours: prometheus_client's of the process, and Prometheus' own."""


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    """Our metrics, by every name under which Prometheus knows them."""
    os.environ.setdefault(
        "DAGRELAY_REDIS_URL", "redis://127.0.0.1:1/0"
    )  # a worker reads it as it is imported
    from tasks.metrics import METRICS

    found: dict[str, Any] = {}
    for metric in METRICS:
        found[metric.name] = metric
        if metric.kind == "histogram":
            found |= {f"{metric.name}_{part}": metric for part in ("bucket", "sum", "count")}
    return found


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = prometheus.ensure("promtool")
    need("promtool", program is not None, prometheus.HOW_TO_GET_IT)
    return subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> Iterator[tuple[str, str]]:
    """Each expression of the dashboard with its panel, its variables as Grafana would fill them in."""
    for panel in panels():
        for target in panel["targets"]:
            expr = target["expr"].replace("$__rate_interval", "1m").replace("$connection", "default|.*")
            assert "$" not in expr, expr
            yield panel["title"], expr


def expressions() -> dict[str, str]:
    """Every PromQL expression in deploy/, by where it stands."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    found |= {f"panel {title} {number}": expr for number, (title, expr) in enumerate(dashboard_expressions())}
    (trigger,) = yaml.safe_load(SCALED.read_text())["spec"]["triggers"]
    return {**found, "KEDA": trigger["metadata"]["query"]}


# Prometheus


def test_promtool_accepts_rules_and_configuration():
    for kind, path in (("rules", RULES), ("config", DEPLOY / "prometheus/prometheus.yml")):
        done = promtool("check", kind, path)
        assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_refuses_a_broken_copy(tmp_path):
    """So the check above can fail at all."""
    broken = tmp_path / "alerts.yml"
    broken.write_text(RULES.read_text().replace("max by (queue) (", "max by queue (", 1))
    assert promtool("check", "rules", broken).returncode != 0


def test_each_alert_fires_when_it_should_and_not_otherwise():
    done = promtool("test", "rules", RULES_TEST)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rule_that_is_wrong_fails_its_test(tmp_path):
    shutil.copy(RULES_TEST, tmp_path)
    text = RULES.read_text()
    assert text.count("> 60") > 1
    (tmp_path / "alerts.yml").write_text(text.replace("> 60", "> 600"))
    assert promtool("test", "rules", tmp_path / RULES_TEST.name).returncode != 0


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    tested: dict[str, set[bool]] = {}
    for test in yaml.safe_load(RULES_TEST.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            tested.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert tested == {rule["alert"]: {True, False} for rule in rules()}


def test_each_alert_says_what_it_is_and_what_to_do():
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        assert len(rule["annotations"]["summary"]) < 120, rule["alert"]
        assert len(rule["annotations"]["description"]) > 60, rule["alert"]


def test_every_expression_is_one_that_prometheus_can_read(tmp_path):
    records = [
        {"record": f"r:{number}", "expr": expr, "labels": {"place": place}}
        for number, (place, expr) in enumerate(expressions().items())
    ]
    path = tmp_path / "all.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": records}]}))
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(records) > 50


# Names


def test_each_metric_that_is_named_exists(metrics):
    name = re.compile(r"\b((?:dagrelay|process)_[a-z_]+|up)(?=\{|\b)")
    for place, expr in expressions().items():
        bare = re.sub(r'"[^"]*"', '""', expr)
        named = set(name.findall(bare))
        assert named, place
        assert not named - metrics.keys() - THEIRS, place
    texts = [path for path in DEPLOY.rglob("*") if path.suffix in (".yml", ".json")]
    told = {one for path in texts for one in re.findall(r"\bdagrelay_[a-z_]+", path.read_text())}
    assert len(told) > 30
    assert not told - metrics.keys()


def test_each_label_that_is_asked_for_exists(metrics):
    for place, expr in expressions().items():
        named = re.findall(r"(dagrelay_\w+)(?:\{([^}]*)\})?", expr)
        known = {label for metric, _ in named for label in metrics[metric].labels} | {"le"}
        for metric, selector in named:
            labels = set(re.findall(r"(\w+)\s*[=!]~?", re.sub(r'"[^"]*"', '""', selector)))
            assert labels <= set(metrics[metric].labels), f"{place}: {metric}"
        grouped = {
            one.strip() for part in re.findall(r"\b(?:by|on) \(([^)]*)\)", expr) for one in part.split(",")
        }
        assert grouped <= known, place


def test_what_all_workers_tell_alike_is_never_summed_over_them(metrics):
    for place, expr in expressions().items():
        shared = {name for name in re.findall(r"dagrelay_\w+", expr) if metrics[name].shared}
        for name in shared:
            before = expr[: expr.index(name)]
            innermost = re.findall(r"(\w+)(?: by \([^)]*\))? ?\((?:delta\()?$", before)
            assert innermost in (["max"], ["absent"]), f"{place}: {name} in {innermost}"


def test_every_metric_is_shown_somewhere(metrics):
    shown = " ".join(expr for _, expr in dashboard_expressions())
    missing = {metric.name for metric in metrics.values() if metric.name not in shown}
    assert not missing


# Grafana


def lost(given: Any, read: Any, path: str = "") -> Iterator[str]:
    """What of a dashboard Grafana's schema does not know, or reads as something else."""
    if isinstance(given, dict) and isinstance(read, dict):
        for name, value in given.items():
            if name in read:
                yield from lost(value, read[name], f"{path}.{name}")
            else:
                yield f"{path}.{name}"
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for number, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif given != read:
        yield f"{path}: {given!r} is read as {read!r}"


def through_the_schema(given: dict[str, Any]) -> list[str]:
    register_default_plugins()
    read = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(given)))
    return list(lost(given, read))


def test_grafanas_schema_knows_everything_in_the_dashboard():
    assert through_the_schema(dashboard()) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda panel: panel.update(heading="typo"),
        lambda panel: panel["options"].update(legendMode="none"),
        lambda panel: panel["fieldConfig"]["defaults"].update(units="s"),
        lambda panel: panel["targets"][0].update(expression="up"),
    ],
)
def test_grafanas_schema_knows_nothing_else(spoil):
    """So the check above can fail at all."""
    broken = dashboard()
    spoil(next(panel for panel in broken["panels"] if panel["type"] == "timeseries"))
    assert through_the_schema(broken)


def test_the_dashboard_can_be_imported_anywhere():
    found = dashboard()
    assert "id" not in found
    assert found["uid"] == "dagrelay"
    variables = {one["name"]: one for one in found["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    sources = re.findall(r'"uid": "([^"]*)"', DASHBOARD.read_text())
    assert set(sources) - {"dagrelay"} == {"${datasource}"}
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels():
        assert panel["description"], panel["title"]
    places: set[tuple[int, int]] = set()
    for panel in found["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not cells & places, f"{panel['title']} lies over another panel"
        places |= cells


# Kubernetes and KEDA


def manifests() -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(WORKER.read_text()) if one]


def worker_pod() -> dict[str, Any]:
    found: dict[str, Any] = manifests()[0]["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, kubernetes_validate.latest_version()])
def test_kubernetes_schema_accepts_the_manifests(version):
    for manifest in manifests():
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pod: pod["containers"][0].update(readinessProb={}),
        lambda pod: pod["containers"][0]["livenessProbe"].update(periodSeconds="30"),
        lambda pod: pod["containers"][0].pop("name"),
    ],
)
def test_kubernetes_schema_refuses_a_broken_one(spoil):
    broken = copy.deepcopy(manifests()[0])
    spoil(broken["spec"]["template"]["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, OLDEST_KUBERNETES, strict=True)


def test_a_worker_in_kubernetes_is_hardened_and_gets_its_secrets_from_one():
    pod = worker_pod()
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["enableServiceLinks"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    env = {one["name"]: one for one in container["env"]}
    assert env["DAGRELAY_REDIS_URL"]["valueFrom"]["secretKeyRef"]["name"] == "dagrelay"
    assert env["AIRFLOW_CONN_DEFAULT_FILE"]["value"].startswith("/run/secrets/")
    assert env["DAGRELAY_METRICS_PORT"]["value"] == str(container["ports"][0]["containerPort"])


def test_probes_are_commands_that_there_are():
    """Those of Kubernetes and of the image; what they answer is tested in integration."""
    (container,) = worker_pod()["containers"]
    commands = {name: container[name]["exec"]["command"] for name in container if name.endswith("Probe")}
    assert set(commands) == {"livenessProbe", "readinessProbe", "startupProbe"}
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
    (check,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", text, re.M)
    commands["image"] = json.loads(check)
    assert isinstance(main, Group)
    for place, (python, option, module, name, *options) in commands.items():
        assert (python, option, module) == ("python", "-m", "producers.cli"), place
        command: Command = main.commands[name]
        known = {one for parameter in command.params for one in parameter.opts}
        assert set(options) <= known, place
        assert options == (["--ready"] if place == "readinessProbe" else ["--live"]), place


def test_kedas_schema_accepts_the_scaled_object():
    need("KEDA's schema", keda.fetched(), keda.HOW_TO_GET_IT)
    manifest = yaml.safe_load(SCALED.read_text())
    assert keda.problem(manifest) == ""
    assert manifest["spec"]["scaleTargetRef"]["name"] == manifests()[0]["metadata"]["name"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec.update(minReplicaCount="1"),
        lambda spec: spec.update(minReplicas=1),
        lambda spec: spec.pop("scaleTargetRef"),
        lambda spec: spec["triggers"][0]["metadata"].update(threshold=10),
    ],
)
def test_kedas_schema_refuses_a_broken_one(spoil):
    need("KEDA's schema", keda.fetched(), keda.HOW_TO_GET_IT)
    broken = yaml.safe_load(SCALED.read_text())
    spoil(broken["spec"])
    assert keda.problem(broken)


def test_the_lock_of_kedas_schema_pins_by_hash_and_names_no_address():
    text = (ROOT / "tests/keda/package-lock.json").read_text()
    assert "://" not in text
    found = json.loads(text)["packages"]
    assert len(found) > 1
    assert not [name for name, package in found.items() if name and "integrity" not in package]


# Compose


def test_monitoring_is_a_profile_of_its_own_hardened_and_on_loopback(tmp_path):
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    plain = compose(tmp_path, "config", "--format", "json")
    assert plain.returncode == 0, plain.stderr
    assert set(json.loads(plain.stdout)["services"]) == {"redis", "worker", "flower"}

    done = compose(tmp_path, "--profile", "monitoring", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert services["worker"]["environment"]["DAGRELAY_METRICS_PORT"] == "9464"
    assert set(services["prometheus"]["networks"]) == {"monitoring"}  # the one without Redis in it
    assert "monitoring" in services["worker"]["networks"]
    for name in ("prometheus", "grafana"):
        service = services[name]
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["healthcheck"]["test"], name
        for mount in service["volumes"]:
            if mount["type"] == "bind":
                source = ROOT / Path(mount["source"]).relative_to(tmp_path)
                assert source.exists(), mount["source"]
                assert mount["read_only"], mount["source"]
    assert not services["prometheus"].get("ports")
    assert services["grafana"]["ports"][0]["host_ip"] == "127.0.0.1"


def test_prometheus_in_compose_asks_the_port_that_the_workers_serve(tmp_path):
    configuration = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (job,) = configuration["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert (job["job_name"], found["names"], found["port"]) == ("dagrelay", ["worker"], 9464)
