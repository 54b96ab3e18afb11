"""Debian's Prometheus, for the tests of what lies in `deploy/`: fetched by apt without root.

The server, to scrape a real worker and to answer the dashboard's questions, and promtool, which checks rules
and runs their tests.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

from local import debs
from local.process import PartFailed

HOW_TO_GET_IT = "install prometheus, or apt-get and dpkg: then it is fetched into .local"


@cache
def ensure(program: str) -> Path | None:
    """Return `promtool` or `prometheus`: the machine's, else Debian's, fetched at the first time; or None."""
    if found := shutil.which(program):
        return Path(found)
    try:
        return debs.unpacked("prometheus", ("prometheus",), "usr/bin/promtool") / "usr/bin" / program
    except PartFailed as exc:
        print(exc)
        return None
