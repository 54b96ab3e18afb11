"""What workers run: `celery -A tasks worker`."""

from . import fan_out as fan_out
from . import looks as looks
from .app import app
from .external_job import poll_external_job
from .trigger import settle_outcome, trigger_dag

__all__ = [
    "app",
    "poll_external_job",
    "settle_outcome",
    "trigger_dag",
]
