"""The layout is a promise too: who may import whom, what is shipped, and what must never be written down.

`producers` lives inside somebody else's service, which has its own `tasks`, its own `celeryconfig` and no
wish for the worker's dependencies. `docs/design.md`, section 2, has the rule; this keeps it.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts import need

ROOT = Path(__file__).resolve().parents[2]
OURS = {"producers", "tasks", "celeryconfig", "flowerconfig", "local", "benchmarks", "tests"}
HTTP_LIBRARIES = ("requests", "urllib3", "httpx", "aiohttp", "http.client", "urllib.request")
# The queues: the way to services that are one (`tasks/asking_queues.py`).
WORKER_MAY_USE = ("producers.contract", "producers.errors", "producers.stores", "producers.queues")

# Split, so that this file does not hold what it forbids.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("yarnpkg", "com"),
        ("deb", "debian", "org"),
        ("security", "debian", "org"),
        ("archive", "ubuntu", "com"),
        ("docker", "io"),
        ("docker", "com"),
        ("ghcr", "io"),
        ("quay", "io"),
        ("gcr", "io"),
        ("mcr", "microsoft", "com"),
        ("anaconda", "org"),
    )
]
USE_IT = re.compile(r"callers|\w+_dags")
# A folder of the machine this was written on, at the beginning of a path.
MACHINE_PATH = re.compile(r"(?<![\w.*-])/(?:work|root)/")


def python_files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no Python files below {folders}: the test would prove nothing"
    return found


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports by its full name, with the line; relative imports are resolved.

    `from a import b` counts as `a.b`: b may be a module. import_module("a") counts as well.
    """
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def said(path: Path, line: int, module: str) -> str:
    return f"{path.relative_to(ROOT)}:{line} imports {module}"


def tracked() -> list[Path]:
    """The files that git keeps and that are here."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    need("git's list of files", listed.returncode == 0, "run the tests in a clone, with git")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def tracked_text() -> Iterator[tuple[Path, str]]:
    for path in tracked():
        try:
            yield path, path.read_text()
        except UnicodeDecodeError:
            continue  # an image


def test_producers_import_neither_the_worker_nor_airflow():
    forbidden = OURS - {"producers"}
    wrong = []
    for path in python_files("producers"):
        inside_airflow = path.is_relative_to(ROOT / "producers/airflow")
        for line, module in imports(path):
            if within(module, *forbidden) or (within(module, "airflow") and not inside_airflow):
                wrong.append(said(path, line, module))
    assert not wrong


def test_producers_import_themselves_relatively():
    """The host may have vendored the package under another name."""
    wrong = []
    for path in python_files("producers"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            wrong += [said(path, node.lineno, name) for name in names if within(name, "producers")]
    assert not wrong


def test_the_worker_uses_only_contract_errors_stores_and_queues_of_producers():
    wrong = [
        said(path, line, module)
        for path in python_files("tasks")
        for line, module in imports(path)
        if within(module, "producers") and not within(module, *WORKER_MAY_USE)
    ]
    assert not wrong


def test_only_producers_airflow_imports_airflow():
    """The worker speaks to Airflow over HTTP; in one environment with it Celery's pins would clash."""
    wrong = [
        said(path, line, module)
        for path in [*python_files("tasks", "local"), *ROOT.glob("*.py")]
        for line, module in imports(path)
        if within(module, "airflow")
    ]
    assert not wrong


def test_the_transport_knows_nothing_of_ours():
    folder = ROOT / "tasks/redis_transport"
    if not folder.exists():
        return  # it comes later; the rule waits for it here
    wrong = [
        said(path, line, module)
        for path in python_files("tasks/redis_transport")
        for line, module in imports(path)
        if within(module, *OURS) and not within(module, "tasks.redis_transport")
    ]
    assert not wrong


def test_http_leaves_the_worker_from_one_place_for_single_calls_and_one_for_many():
    wrong = [
        said(path, line, module)
        for path in python_files("tasks")
        if path not in (ROOT / "tasks/http.py", ROOT / "tasks/http_many.py")
        for line, module in imports(path)
        if within(module, *HTTP_LIBRARIES)
    ]
    assert not wrong


def test_system_tests_know_the_product_from_outside_alone():
    """They speak to what runs; only the services that they play (`callers/`), and their DAGs that run in an
    Airflow which has our provider (`*_dags/`), import the library."""
    wrong = [
        said(path, line, module)
        for path in ROOT.glob("tests/system/**/*.py")
        for line, module in imports(path)
        if within(module, "tasks", "celeryconfig", "flowerconfig")
        or (
            within(module, "producers") and not USE_IT.match(path.relative_to(ROOT / "tests/system").parts[0])
        )
    ]
    assert not wrong


def test_importing_producers_loads_neither_the_worker_nor_a_web_framework():
    code = "import sys; from producers import trigger_dag; print(*{m.partition('.')[0] for m in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert "producers" in loaded  # else this looked at nothing
    heavy = {"requests", "urllib3", "httpx", "aiohttp", "tornado", "flower", "flask", "django", "fastapi"}
    heavy |= {"starlette", "airflow"}
    assert not loaded & (heavy | OURS - {"producers"})


def test_locks_pin_everything_by_hash_and_name_no_address():
    locks = [path for path in tracked() if path.suffix == ".lock"]
    assert ROOT / "requirements.lock" in locks
    wrong = []
    for path in locks:
        text = path.read_text()
        for number, line in enumerate(text.splitlines(), 1):
            if "://" in line or re.match(r"\s*(--(?!hash)|-[a-z]\b)", line):
                wrong.append(f"{path.name}:{number} {line.strip()}")
        requirements = [line.strip() for line in re.sub(r"\\\n", " ", text).splitlines()]
        wrong += [
            f"{path.name}: {requirement[:60]} is not pinned by hash"
            for requirement in requirements
            if requirement
            and not requirement.startswith("#")
            and not ("==" in requirement and "--hash=sha256:" in requirement)
        ]
    assert not wrong


def test_the_lock_of_the_browser_pins_by_hash_and_names_no_address():
    text = (ROOT / "tests/browser/package-lock.json").read_text()
    assert "://" not in text
    packages = json.loads(text)["packages"]
    assert len(packages) > 1
    assert not [name for name, package in packages.items() if name and "integrity" not in package]


def test_no_file_names_a_registry_or_a_path_of_somebodys_machine():
    hosts = re.compile("|".join(re.escape(host) for host in REGISTRY_HOSTS), re.IGNORECASE)
    wrong = [
        f"{path.relative_to(ROOT)}:{number} {found.group()}"
        for path, text in tracked_text()
        for number, line in enumerate(text.splitlines(), 1)
        for found in (hosts.search(line), MACHINE_PATH.search(line))
        if found
    ]
    assert not wrong


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built by the locked hatchling: no isolation, so no network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_producers_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert not [name for name in names if not re.match(r"(producers|dagrelay-[\w.]+\.dist-info)/", name)]
    assert "producers/py.typed" in names
    ours = {
        path.relative_to(ROOT).as_posix() for path in tracked() if path.is_relative_to(ROOT / "producers")
    }
    assert not ours - set(names)  # also what is no Python: Lua scripts, py.typed
    always = [line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) if "extra ==" not in line]
    assert not [line for line in always if re.match(r"requests|flower|apache-airflow", line)]


def test_the_wheel_works_where_nothing_else_of_ours_is(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import producers, producers.errors, producers.contract; print(producers.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(tmp_path)
