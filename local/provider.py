"""Our wheel beside an installed Airflow: what `pip install dagrelay` adds to it, in folders for PYTHONPATH.

    with provider_for(Environment("3")) as provider:
        env["PYTHONPATH"] = provider.pythonpath

The wheel is built from the tree, once for each content of `producers/`; what it needs beyond Airflow comes
from the lock beside this file, once. Airflow's own environment is left as it is: it finds entry points on
PYTHONPATH too. About 3 s the first time, 1 s for another tree, 0.1 s when nothing has changed.

Our own environment holds no Airflow. Code that imports it is tested by a script in Airflow's environment:
tests/system/callers/in_airflow.py, as tests/system/test_provider.py runs it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from local.process import ROOT, STATE, Process, Progress, quiet, run_to_end

if TYPE_CHECKING:
    from local.airflow import Environment, Version

LAYERS = STATE / "provider"
WHEEL_OF = ("producers", "pyproject.toml", "README.md", "LICENSE")
INSTALL_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Provider:
    """Our wheel and what it needs, each in a folder. They stay as long as it is not closed."""

    folders: tuple[Path, ...]
    _held: tuple[IO[str], ...]

    @property
    def pythonpath(self) -> str:
        """The value for PYTHONPATH of every component of that Airflow."""
        return os.pathsep.join(map(str, self.folders))

    def close(self) -> None:
        """Let others remove the folders, once the tree has changed."""
        for file in self._held:
            file.close()


@contextmanager
def provider_for(environment: Environment, progress: Progress = quiet) -> Iterator[Provider]:
    """Have our wheel for this Airflow, made from the tree as it is now, until the block ends."""
    provider = ensure_provider(environment, progress)
    try:
        yield provider
    finally:
        provider.close()


def ensure_provider(environment: Environment, progress: Progress = quiet) -> Provider:
    """Build and install what is not there yet. Many processes may ask at once: one does it, the others wait.

    Airflow itself must be installed (`environment.ensure()`). Raises PartFailed with the installer's words.
    """
    LAYERS.mkdir(parents=True, exist_ok=True)
    lock = lock_file(environment.version)
    needs = f"{environment.folder.name}-{_digest(lock.read_bytes(), sys.version.encode())}"
    with (
        (LAYERS / "lock").open("a") as alone,
        tempfile.TemporaryDirectory(dir=LAYERS, prefix=".new-") as scratch,
    ):
        fcntl.flock(alone, fcntl.LOCK_EX)
        tree = Path(scratch, "tree")
        copy_tree(tree)  # what is built is what was hashed, whoever edits meanwhile
        wheel = f"wheel-{tree_digest(tree)}"

        def install_needs(target: Path) -> None:
            progress(f"installing what our wheel needs beside Airflow {environment.release} (once)")
            _install(environment, target, "--require-hashes", "--compile-bytecode", "-r", str(lock))

        def install_wheel(target: Path) -> None:
            progress("building our wheel")
            built = build_wheel(tree, Path(scratch, "built"))
            _install(environment, target, str(built))

        made = [_layer(wheel, install_wheel), _layer(needs, install_needs)]
        _remove_unused(keep=made)
        return Provider(tuple(made), tuple(_hold(layer) for layer in made))


def lock_file(version: Version) -> Path:
    """The lock of what our wheel needs and this Airflow does not bring."""
    return Path(__file__).with_name(f"provider{version}.lock")


def copy_tree(target: Path) -> None:
    """Copy what the wheel is built from."""
    target.mkdir()
    for name in WHEEL_OF:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)


def tree_digest(tree: Path) -> str:
    """Name the content of the package and of pyproject.toml."""
    files = [tree / "pyproject.toml", *sorted((tree / "producers").rglob("*"))]
    parts = [part for file in files if file.is_file() for part in (str(file.relative_to(tree)), file)]
    return _digest(*(part.encode() if isinstance(part, str) else part.read_bytes() for part in parts))


def build_wheel(tree: Path, target: Path) -> Path:
    """Build the wheel of a copy of the tree by the locked hatchling: no isolation, so no network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    process = Process(command, log=LAYERS / "log", cwd=tree, name="hatchling")
    run_to_end(process, timeout_s=INSTALL_TIMEOUT_S, what="build our wheel")
    (wheel,) = target.glob("*.whl")
    return wheel


def _install(environment: Environment, target: Path, *what: str) -> None:
    uv = [sys.executable, "-m", "uv", "--no-progress", "pip", "install", "--no-deps"]
    process = Process(
        [*uv, "--python", str(environment.python), "--target", str(target), *what],
        log=LAYERS / "log",
        env=environment.installer_env(),
        cwd=LAYERS,
        name="uv",
    )
    run_to_end(process, timeout_s=INSTALL_TIMEOUT_S, what="install our wheel beside Airflow")


def _layer(name: str, install: Callable[[Path], None]) -> Path:
    """Return the folder of this name, made whole or not at all."""
    layer = LAYERS / name
    if not layer.exists():
        new = LAYERS / f"{name}.new"
        shutil.rmtree(new, ignore_errors=True)  # of one that was cut short
        install(new)
        new.rename(layer)
    return layer


def _hold(layer: Path) -> IO[str]:
    """Mark a folder as used, until the file is closed. Only under the lock of all."""
    file = layer.with_name(f"{layer.name}.used").open("a")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _remove_unused(keep: list[Path]) -> None:
    """Remove the wheels of other trees that no running Airflow uses. Only under the lock of all."""
    for used in LAYERS.glob("wheel-*.used"):
        layer = used.with_suffix("")
        if layer in keep:
            continue
        with used.open("a") as file, suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(layer, ignore_errors=True)
            used.unlink()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


# The locks


def write_lock(version: Version) -> None:
    """Resolve what `pip install dagrelay` adds to this Airflow, and write it down with hashes."""
    theirs = Path(__file__).with_name(f"airflow{version}.lock").read_text()
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch, "constraints.txt")
        pins.write_text("\n".join(re.findall(r"^[\w.-]+==[^\s;]+", theirs, re.MULTILINE)))
        found = Path(scratch, "found.txt")
        if lock_file(version).exists():
            shutil.copy(lock_file(version), found)  # versions are kept where they still do
        command = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            "-q",
            "--universal",
            "--python-version",
            "3.11",
        ]
        command += ["--generate-hashes", "--no-header", "--no-annotate", "-c", str(pins), "pyproject.toml"]
        process = Process(
            [*command, "-o", str(found)], log=Path(scratch, "log"), env=dict(os.environ), cwd=ROOT
        )
        run_to_end(process, timeout_s=INSTALL_TIMEOUT_S, what=f"resolve our wheel beside Airflow {version}")
        have = names_in(theirs)
        mine = [entry for entry in re.split(r"(?m)^(?=\S)", found.read_text()) if names_in(entry) - have]
        lock_file(version).write_text("".join(mine))


def names_in(lock: str) -> set[str]:
    """Which packages a lock pins."""
    return set(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE))


def main() -> None:
    """`python -m local.provider`: write both locks anew, as `make lock` does."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    for version in ("2", "3"):
        write_lock(version)


if __name__ == "__main__":
    main()
