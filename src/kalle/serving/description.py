"""The OpenAPI description as a page that needs nothing else: no script, no other host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; color: #1a1a1a; background: #fff }
h2 { border-top: 1px solid #ccc; padding-top: 1rem; overflow-wrap: anywhere } code { background: #f2f2f2; padding: 0 .2em }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } code { background: #2a2a2a } a { color: #8ab4f8 } }
"""
LIMITS = {
    "minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below",
    "minLength": "length at least", "maxLength": "length at most",
}  # fmt: skip
"""Keys of JSON Schema, and what they say."""
METHODS = ("get", "post", "put", "patch", "delete")


def description_page(schema: Mapping[str, Any]) -> str:
    """``schema``, an OpenAPI 3 description, as HTML: every operation with its fields, their defaults and its answers."""
    title = escape(f"{schema['info']['title']} {schema['info']['version']}")
    body = [f"<h1>{title}</h1>", f"<p>{escape(schema['info'].get('description', ''))}</p>"]
    body.append('<p>The same for programs: <a href="openapi.json">openapi.json</a></p>')
    for path, operations in schema["paths"].items():
        for method in METHODS:
            if method in operations:
                body += _operation(schema, f"{method.upper()} {path}", operations[method])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{"".join(body)}</body></html>'


def _operation(schema: Mapping[str, Any], heading: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{escape(heading)}</code></h2><p>{escape(operation.get('description', operation.get('summary', '')))}</p>"
    rows = [(each["name"], each["schema"], each.get("required", False)) for each in operation.get("parameters", ())]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<p>Body: <code>{escape(kind)}</code></p>"
        body = _resolved(schema, content["schema"])
        rows += [(name, field, name in body.get("required", ())) for name, field in body.get("properties", {}).items()]
    if rows:
        yield "<table><tr><th>field</th><th>type</th><th>default</th><th></th></tr>"
        for name, field, required in rows:
            default = "needed" if required else "" if field.get("default") is None else f"<code>{escape(str(field['default']))}</code>"
            told = escape(field.get("description", ""))
            yield f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(schema, field))}</td><td>{default}</td><td>{told}</td></tr>"
        yield "</table>"
    answers = ", ".join(f"<code>{status}</code> {escape(answer['description'])}" for status, answer in operation["responses"].items())
    yield f"<p>Answers: {answers}</p>"


def _resolved(schema: Mapping[str, Any], value: Mapping[str, Any]) -> Mapping[str, Any]:
    """``value``, or the part of ``schema`` that it refers to."""
    if "$ref" not in value:
        return value
    found: Any = schema
    for part in value["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return found


def _kind(schema: Mapping[str, Any], field: Mapping[str, Any]) -> str:
    """The type of a field in words: its choices, its limits, or the types that it may have."""
    field = _resolved(schema, field)
    if "anyOf" in field:
        return " or ".join(kind for each in field["anyOf"] if (kind := _kind(schema, each)) != "null")
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    limits = [f"{words} {field[key]}" for key, words in LIMITS.items() if key in field]
    name = "file" if field.get("contentMediaType") or field.get("format") == "binary" else str(field.get("type", "any"))
    return ", ".join([name, *limits])
