"""What schemathesis does not know by itself: how JSON lines and CloudEvents are written."""

from __future__ import annotations

import json
from typing import Any

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def lines(_: Any, value: Any) -> bytes:
    return value.encode(errors="surrogatepass") if isinstance(value, str) else json.dumps(value).encode()


@schemathesis.serializer("application/cloudevents+json", "application/cloudevents-batch+json")
def events(_: Any, value: Any) -> bytes:
    return json.dumps(value).encode()
