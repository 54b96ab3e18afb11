"""What one would write without the library: a FastAPI route that pushes its body into a list of Redis."""

from __future__ import annotations

import os
import sys

import redis.asyncio
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

app = FastAPI(docs_url=None, redoc_url=None)
client = redis.asyncio.Redis.from_url(os.environ["REDIS_URL"])


@app.post("/v1/dags/{dag_id}/runs")
async def run(request: Request, dag_id: str) -> JSONResponse:
    """Take it as it comes."""
    await client.lpush("bare", await request.body())
    return JSONResponse({"dag_id": dag_id}, 202)


if __name__ == "__main__":
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        backlog=2048,
    )
