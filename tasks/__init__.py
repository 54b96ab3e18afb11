"""What workers run: `celery -A tasks worker`."""

from . import looks as looks
from .app import app
from .external_job import poll_external_job
from .fan_out import fan_out, fan_out_end, trigger_chunk, watch_fan_out
from .trigger import settle_outcome, trigger_dag

__all__ = [
    "app",
    "fan_out",
    "fan_out_end",
    "poll_external_job",
    "settle_outcome",
    "trigger_chunk",
    "trigger_dag",
    "watch_fan_out",
]
