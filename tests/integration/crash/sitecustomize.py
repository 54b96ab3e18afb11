"""Kill a Python process after its CRASH_AFTER-th Redis command that names CRASH_NAMING; once sent, or before.

Python imports this by itself at its start, where this folder is on PYTHONPATH.
"""

import os
import signal

AFTER = int(os.environ.get("CRASH_AFTER", "0"))
NAMING = os.environ.get("CRASH_NAMING", "").encode()

if AFTER:
    from redis.connection import AbstractConnection

    seen = 0
    send = AbstractConnection.send_packed_command

    def counted(self, command, *args, **kwargs):
        global seen
        packed = command if isinstance(command, list) else [command]
        named = any(NAMING in (part if isinstance(part, bytes) else str(part).encode()) for part in packed)
        seen += named
        if named and seen == AFTER and os.environ.get("CRASH_BEFORE"):
            os.kill(os.getpid(), signal.SIGKILL)
        answer = send(self, command, *args, **kwargs)
        if named and seen >= AFTER:
            # Give the server the time to have done it.
            __import__("time").sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    AbstractConnection.send_packed_command = counted
