"""The HTTP door: `dagrelay gateway`. Needs the extra `gateway` (FastAPI, uvicorn)."""
