# What workers and Flower run, and nothing else of this repository.
#
# The base is pinned by its version. Not by its digest: none could be looked up where this was written; add
# yours (`FROM python:3.12-slim-bookworm@sha256:…`) where builds must repeat to the byte. For lack of an engine
# the tests do not build this image: they lint it, and run what it copies with what it installs.
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# An entry in the system's files, because Celery takes a user without one for a security problem.
RUN groupadd --gid 10001 dagrelay \
  && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --shell /usr/sbin/nologin dagrelay

WORKDIR /app

# What workers and Flower need of requirements.lock, by hash; made by `make lock`.
COPY requirements-worker.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements-worker.lock

COPY celeryconfig.py flowerconfig.py ./
COPY producers/ producers/
COPY tasks/ tasks/

# A number, so that a cluster can see that it is not root. It owns nothing here: the code is read-only to it.
USER 10001:10001

# For the worker; Flower has its own in docker-compose.yml. It reads the heartbeat that the worker's event loop
# writes, and asks no Redis: 0.3 s of CPU.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 \
  CMD ["python", "-m", "producers.cli", "health", "--live"]

CMD ["celery", "-A", "tasks", "worker"]
