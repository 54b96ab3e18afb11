"""Celery's own settings for the workers and Flower, each followed by its reason.

What differs from one installation to the next comes from the environment, by `tasks/settings.py`.
"""

from kombu import Exchange, Queue

from producers.contract import POLL_EXTERNAL_JOB, QUEUE_JOBS, QUEUE_LOOKS, QUEUE_TRIGGERS, TRIGGER_DAG
from tasks.settings import settings

_settings = settings()


def _verified(url: str) -> str:
    """Return a rediss:// URL that verifies the server's certificate unless it says otherwise.

    kombu's default for the broker is not to verify it, with no more than a line in the log.
    """
    if url.startswith("rediss://") and "ssl_cert_reqs" not in url:
        return url + ("&" if "?" in url else "?") + "ssl_cert_reqs=required"
    return url


broker_url = _verified(_settings.redis_url)
result_backend = "tasks.results:RecordedBackend+" + broker_url
# The record of a request and its result are one write: see tasks/results.py.

broker_transport_options = {
    # The lease of a worker process: renewed while it lives, so it may be short. What a dead worker held
    # comes back after this long, and a sixth of it more at the most.
    "visibility_timeout": _settings.visibility_timeout_s,
    "namespace": "dagrelay",  # of the transport's own keys; see tasks/redis_transport
    "fetch": _settings.fetch,  # "stock" is kombu's way to fetch and acknowledge; parking stays ours
    # For the stock fetch: kombu looks for such messages every 10 × 10 s by default.
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
    # Own names: under kombu's defaults our short timeout would run the tasks of other Celery apps in
    # the same database a second time.
    "unacked_key": "dagrelay:unacked",
    "unacked_index_key": "dagrelay:unacked_index",
    "unacked_mutex_key": "dagrelay:unacked_mutex",
    "socket_timeout": 5,  # kombu's default is to wait for ever for a Redis that does not answer
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 10,
    "client_name": "dagrelay-worker",
}
redis_socket_timeout = 5  # the same for results
redis_socket_connect_timeout = 2
redis_retry_on_timeout = True  # every write of ours may be repeated
broker_connection_retry_on_startup = True
broker_connection_max_retries = None  # a worker outlives any outage of Redis

# Each with an exchange of its own: under a shared one, one message would go to all three.
task_queues = [
    Queue(name, Exchange(name), routing_key=name) for name in (QUEUE_TRIGGERS, QUEUE_JOBS, QUEUE_LOOKS)
]
task_routes = {
    TRIGGER_DAG: QUEUE_TRIGGERS,
    POLL_EXTERNAL_JOB: QUEUE_JOBS,
    "tasks.look": QUEUE_LOOKS,
}  # by name: hosts have a `tasks` too
# What is not ours, a chord's body or a callback of a host's, goes where its signature says, else to Celery's
# own default, on which the host's workers listen; on a queue of ours it would be lost as unknown.
task_default_queue = "celery"
task_create_missing_queues = True  # (a misspelt -Q is refused by tasks/app.py)

task_acks_late = True  # a message is acknowledged when its successor is in Redis, never before
task_reject_on_worker_lost = True  # prefork: a killed child's message goes back to its queue
task_serializer = result_serializer = event_serializer = "json"
accept_content = result_accept_content = ["json"]  # nothing else is ever decoded
result_expires = _settings.result_ttl_s
# A chord's bookkeeping outlives the longest wait of its parts (90 days) and what holds them up before it.
result_chord_expires = 120 * 86_400
result_extended = False  # it would keep the raw arguments, conf and all, beside the result
task_ignore_result = False  # `.get()` and chords read them
task_send_sent_event = False  # one more event for each task, and it says nothing new
task_track_started = False

worker_pool = "threads"  # a worker waits for HTTP: a thread costs 0.1 MB for it, a process 60
# `-P processes` asks for Celery's prefork pool: `-P prefork` reads as the option's default, and this wins.
worker_concurrency = _settings.concurrency
worker_prefetch_multiplier = 1  # what one worker holds back, another could do
worker_send_task_events = True  # what Flower shows
worker_hijack_root_logger = False
worker_redirect_stdouts = False
worker_cancel_long_running_tasks_on_connection_loss = False  # it still runs; its late acknowledgement counts
worker_enable_remote_control = True  # Flower asks the workers by it

timezone = "UTC"
enable_utc = True
