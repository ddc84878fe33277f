"""The HTTP routes for programs (OpenAPI 3.1) and for people (a page without scripts, so that it works offline)."""

from __future__ import annotations

import html
from typing import Any

from mmseq.serving.errors import HTTP_STATUS
from mmseq.serving.keys import vector_keys
from mmseq.serving.policy import Contract

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string", "enum": sorted(HTTP_STATUS)},
                "message": {"type": "string"},
                "key": {"type": "string", "description": "the key at fault"},
                "retry_after_ms": {"type": "number"},
                "reason": {"type": "string", "description": "of an operator's hold"},
            },
        }
    },
}
_ARRAY = {
    "type": "object",
    "required": ["__ndarray__", "data", "dtype", "shape"],
    "properties": {
        "__ndarray__": {"const": True},
        "data": {"type": "string", "contentEncoding": "base64", "description": "C order; bytes in msgpack"},
        "dtype": {"type": "string", "examples": ["<f4", "|u1"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    },
}


def describe(contract: Contract, *, token: bool) -> dict[str, Any]:
    """The OpenAPI document of a server that serves `contract`. token: whether clients must send one."""
    from mmseq import __version__

    observation = {
        key: {"$ref": "#/components/schemas/Array"} if key.startswith("observation.") else {"type": "string"}
        for body in contract.embodiments.values()
        for key in (*contract.required(body), *vector_keys(body), "prompt", "embodiment")
    }
    predict = {
        "type": "object",
        "required": ["arrow", "observation"],
        "additionalProperties": False,
        "properties": {
            "arrow": {
                "type": "string",
                "examples": [*contract.tasks.values()][:3] or ["image, action[16] -> image@+16"],
            },
            "observation": {"type": "object", "properties": observation},
            "as": {"enum": ["array", "png", "mp4"], "description": "how images and videos come back"},
        },
    }
    reply = {
        "type": "object",
        "properties": {"prediction": {"type": "object"}, "server_timing": {"type": "object"}},
    }
    hold = {"type": "object", "properties": {"reason": {"type": "string"}}}
    one = {"type": "object", "properties": {"id": {"type": "string"}, "reason": {"type": "string"}}}
    held = {
        "type": "object",
        "properties": {
            "held": {"type": "boolean"},
            "id": {"type": "string", "description": "of the hold that this began"},
            "holds": {"type": "array", "items": one, "description": "those in force"},
            "sessions": {"type": "integer"},
        },
    }
    routes = [
        ("get", "/healthz", "Whether the process answers", None, None, False),
        ("get", "/readyz", "Whether requests should be sent here", None, None, False),
        ("get", "/metrics", "Prometheus", None, None, True),
        ("get", "/v1/contract", "Embodiments, fingerprints, tasks, horizon, chunking", None, {"type": "object"}, True),
        ("get", "/v1/status", "Sessions, requests, errors, safety gate", None, {"type": "object"}, True),
        ("post", "/v1/predict", "Any arrow", predict, reply, True),
        ("post", "/v1/hold", "Hold every robot", hold, held, True),
        ("delete", "/v1/hold", "End a hold: the only one, one with ?id=ID, or ?all=true", None, held, True),
        ("post", "/v1/reload", "Load the checkpoint again", None, {"type": "object"}, True),
    ]
    paths: dict[str, Any] = {}
    for method, path, summary, body, answer, guarded in routes:
        content = {"application/json": {"schema": answer}} if answer else {"text/plain": {}}
        operation: dict[str, Any] = {
            "summary": summary,
            "responses": {"200": {"description": "OK", "content": content}},
        }
        if method == "delete":
            where = {"in": "query", "required": False}
            operation["parameters"] = [
                {"name": "id", **where, "schema": {"type": "string"}},
                {"name": "all", **where, "schema": {"type": "boolean"}},
            ]
        if body:
            kinds = ("application/json", "application/msgpack") if path == "/v1/predict" else ("application/json",)
            operation["requestBody"] = {"content": {kind: {"schema": body} for kind in kinds}}
        if guarded:
            problem = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
            operation["responses"]["default"] = {"description": "refused", "content": problem}
            operation["security"] = [{"token": []}] if token else []
        paths.setdefault(path, {})[method] = operation
    key = {"type": "apiKey", "in": "header", "name": "Authorization", "description": "Api-Key TOKEN"}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"mmseq: {contract.name}", "version": __version__},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR, "Array": _ARRAY}, "securitySchemes": {"token": key}},
    }


def page_of(document: dict[str, Any]) -> str:
    """The document as HTML."""
    say = lambda text: html.escape(str(text))
    lines = [f"<!doctype html><meta charset=utf-8><title>{say(document['info']['title'])}</title>"]
    lines += ["<style>body{font:16px sans-serif;max-width:60em;margin:2em auto}td{padding:.2em 1em .2em 0}</style>"]
    lines += [f"<h1>{say(document['info']['title'])}</h1>", "<table>"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            locked = "token" if operation.get("security") else ""
            lines.append(
                f"<tr><td><code>{method.upper()} {say(path)}</code><td>{say(operation['summary'])}<td>{locked}"
            )
    lines += ["</table>", "<h2>POST /v1/predict</h2>", "<p>JSON, or the same as msgpack. Arrows:</p><ul>"]
    properties = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    properties = properties["properties"]
    lines += [f"<li><code>{say(arrow)}</code>" for arrow in properties["arrow"]["examples"]]
    lines += ["</ul><p>All of them are in <code>GET /v1/contract</code>; any other arrow can be asked for too."]
    lines += ["<p>Keys of an observation:</p><ul>"]
    lines += [f"<li><code>{say(key)}</code>" for key in properties["observation"]["properties"]]
    lines += ['</ul><p><a href="/openapi.json">openapi.json</a>']
    return "\n".join(lines) + "\n"
