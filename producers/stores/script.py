"""Lua scripts as clients send them: by their hash, and whole only where Redis does not have them yet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from redis.exceptions import NoScriptError

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline


class Script:
    """A Lua script, sent by its hash, and whole only where Redis does not have it yet."""

    def __init__(self, lua: str) -> None:
        self.lua = lua
        self.sha = hashlib.sha1(lua.encode(), usedforsecurity=False).hexdigest()

    def run(self, client: Redis, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run it in one round trip. Raises what redis-py raises."""
        try:
            return client.execute_command("EVALSHA", self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return client.execute_command("EVAL", self.lua, len(keys), *keys, *args)

    def queue(self, pipe: Pipeline, keys: Sequence[str], args: Sequence[Any]) -> None:
        """Put it into a pipeline; the script must have been loaded before (`SCRIPT LOAD`)."""
        pipe.execute_command("EVALSHA", self.sha, len(keys), *keys, *args)
