"""Debian's Redis 7.0, to test against beside Valkey: fetched by apt without root, into `.local/redis7/`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from local import debs
from local.process import PartFailed
from local.valkey import Valkey

PACKAGES = ("redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libatomic1")
PROGRAM = "usr/bin/redis-server"


class Redis7(Valkey):
    """One Redis 7.0 server; all else as `Valkey`. Raises PartFailed where it cannot be had."""

    def command(self) -> tuple[list[str], dict[str, str] | None]:
        program = ensure()
        return [str(program)], debs.environment(program.parents[2])


@cache
def ensure() -> Path:
    """Return the program, fetching it at the first time. Raises PartFailed where that cannot be done."""
    root = debs.unpacked("redis7", PACKAGES, PROGRAM)
    version = debs.run("redis7", [str(root / PROGRAM), "--version"], env=debs.environment(root))
    if "v=7.0" not in version:
        raise PartFailed(f"redis7: this Debian's Redis is another one: {version.strip()}")
    return root / PROGRAM
