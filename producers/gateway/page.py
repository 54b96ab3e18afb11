"""`/docs`: what `/openapi.json` says, for people: one page without scripts, from nobody else's server."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

_STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "h2{font:600 1.05em ui-monospace,monospace;border-top:1px solid #ddd;padding-top:1em;margin-top:1.5em}"
    "code{font-family:ui-monospace,monospace}table{border-collapse:collapse}td{padding:.1em 1em .1em 0;"
    "vertical-align:top}"
)


def router() -> APIRouter:
    """Return the route."""
    routes = APIRouter()

    @routes.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        """Show what there is."""
        headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse("".join(_page(request.app.openapi())), headers=headers)

    return routes


def _page(described: dict[str, Any]) -> Iterator[str]:
    title = escape(described["info"]["title"])
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
    yield f"<h1>{title} {escape(described['info']['version'])}</h1>"
    yield f"<p>{escape(described['info'].get('summary', ''))}"
    yield " For machines: <a href=openapi.json>openapi.json</a>.</p>"
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            yield f"<h2>{method.upper()} {escape(path)}</h2>"
            yield f"<p>{escape(operation.get('description') or operation.get('summary', ''))}</p><table>"
            for one in operation.get("parameters", []):
                about = escape(one.get("description", ""))
                yield f"<tr><td><code>{escape(one['name'])}</code><td>{one['in']}<td>{about}"
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                yield f"<tr><td>body<td><code>{escape(kind)}</code><td>{_schema(content.get('schema', {}))}"
            for status, answer in operation["responses"].items():
                yield f"<tr><td><code>{status}</code><td colspan=2>{escape(answer['description'])}"
            yield "</table>"
    for name, schema in described.get("components", {}).get("schemas", {}).items():
        name, about = escape(name), escape(schema.get("description", ""))
        yield f"<h2 id={name}>{name}</h2><p>{about}</p><table>"
        for field, part in schema.get("properties", {}).items():
            needed = "needed" if field in schema.get("required", ()) else ""
            words = escape(part.get("description", ""))
            yield f"<tr><td><code>{escape(field)}</code><td>{_schema(part)}<td>{needed}<td>{words}"
        yield "</table>"


def _schema(schema: dict[str, Any]) -> str:
    """Return a schema in a few words."""
    if ref := schema.get("$ref"):
        name = escape(ref.rpartition("/")[2])
        return f"<a href=#{name}>{name}</a>"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(_schema(one) for one in schema[several])
    if "enum" in schema or "const" in schema:
        return escape(", ".join(map(str, schema.get("enum", [schema.get("const")]))))
    if schema.get("type") == "array":
        return f"list of {_schema(schema.get('items', {}))}"
    kind = schema.get("type", "any")
    return escape(" or ".join(kind) if isinstance(kind, list) else str(kind))
