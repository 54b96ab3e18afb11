"""What workers run: `celery -A tasks worker`."""

from . import beat as beat
from . import desk as desk
from . import fan_out as fan_out
from . import looks as looks
from . import task_state as task_state
from . import webhooks as webhooks
from .app import app
from .external_job import poll_external_job
from .settings import settings
from .trigger import settle_outcome, trigger_dag

if settings().metrics_ports:
    from . import metrics_page as metrics_page

__all__ = [
    "app",
    "poll_external_job",
    "settle_outcome",
    "trigger_dag",
]
