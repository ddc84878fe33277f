"""The routes of a server, one port: openpi's websocket on any path, and HTTP.

==================  ============================================================================
`WS /`              metadata first, then one reply per observation; an error is a text frame
`GET /healthz`      200 `OK`, without a token and while the model is busy
`GET /v1/contract`  what is served: embodiments, fingerprints, tasks, horizon, checkpoint
`GET /v1/status`    requests, errors by code, counts of the safety gate
`POST /v1/predict`  any arrow, msgpack or JSON by content type
==================  ============================================================================
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from typing import Any

from mmseq.errors import require
from mmseq.serving import codec
from mmseq.serving.errors import RequestError
from mmseq.serving.service import Service

MSGPACK = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")


def authorize(headers: Any, token: str | None) -> None:
    """Raises: RequestError `unauthorized`, or `forbidden_origin` for a web page that reaches for an open server."""
    if token is None:
        # A browser sends Origin, a robot does not: without a token any page could drive the robot.
        if headers.get("origin") is not None:
            raise RequestError("forbidden_origin", "web pages are refused", fix="set a token on the server")
        return
    given = headers.get("authorization") or ""
    if not hmac.compare_digest(given.encode(), f"Api-Key {token}".encode()):
        raise RequestError("unauthorized", "the token is missing or wrong", fix="send Authorization: Api-Key TOKEN")


def build_app(service: Service, *, token: str | None, limits: codec.Limits) -> Any:
    """The ASGI application. Raises: DependencyError without the `serve` extra."""
    fastapi = require("fastapi", "serve")
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.websockets import WebSocket, WebSocketDisconnect

    app = fastapi.FastAPI(title="mmseq", docs_url=None, redoc_url=None, openapi_url=None)
    metadata = codec.pack(service.contract.to_dict())

    def error_response(error: Exception) -> Response:
        refusal = service.refused(error)
        return Response(refusal.to_json(), refusal.status, media_type="application/json")

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("OK\n")

    async def contract(request: Request) -> Response:
        try:
            authorize(request.headers, token)
            return Response(codec.to_json(service.contract.to_dict()), media_type="application/json")
        except RequestError as error:
            return error_response(error)

    async def status(request: Request) -> Response:
        try:
            authorize(request.headers, token)
            return Response(codec.to_json(service.status()), media_type="application/json")
        except RequestError as error:
            return error_response(error)

    def encode_reply(encode: Callable[[Any], bytes], reply: dict[str, Any]) -> bytes:
        try:
            return encode(reply)
        except RequestError as error:
            raise RequestError("policy_failed", f"the policy's result cannot be sent: {error}") from error

    async def body_of(request: Request) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limits.max_message_bytes:
                raise RequestError("too_large", f"the body is over the limit of {limits.max_message_bytes} bytes")
            parts.append(part)
        return b"".join(parts)

    async def predict(request: Request) -> Response:
        try:
            authorize(request.headers, token)
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind not in (*MSGPACK, "application/json"):
                raise RequestError(
                    "unsupported", f"content type {kind[:60]!r}", fix=f"send application/json or {MSGPACK[0]}"
                )
            decode, encode = (codec.unpack, codec.pack) if kind in MSGPACK else (codec.from_json, codec.to_json)
            body = codec.message(decode(await body_of(request), limits))
            return Response(encode_reply(encode, await service.predict(body)), media_type=kind)
        except Exception as error:
            return error_response(error)

    async def websocket(socket: WebSocket) -> None:
        try:
            authorize(socket.headers, token)
        except RequestError as error:
            await socket.send_denial_response(error_response(error))
            return
        await socket.accept()
        try:
            await socket.send_bytes(metadata)
            previous_ms: float | None = None
            while True:
                frame = await socket.receive()
                if frame["type"] == "websocket.disconnect":
                    return
                begun = time.perf_counter()
                try:
                    if frame.get("bytes") is None:
                        raise codec.malformed("a text frame", fix="send binary frames")
                    observation = codec.message(codec.unpack(frame["bytes"], limits))
                    reply = await service.infer(observation)
                    if previous_ms is not None:
                        reply["server_timing"]["prev_total_ms"] = previous_ms
                    await socket.send_bytes(encode_reply(codec.pack, reply))
                except WebSocketDisconnect:
                    return
                except Exception as error:
                    refusal = service.refused(error)
                    await socket.send_text(refusal.to_json())
                    if refusal.closes:
                        code = 1012 if refusal.code == "stopping" else 1011
                        await socket.close(code, f"{refusal.code}: see the frame before")
                        return
                previous_ms = 1000 * (time.perf_counter() - begun)
        except WebSocketDisconnect:
            return

    app.add_route("/healthz", healthz, methods=["GET"])
    app.add_route("/v1/contract", contract, methods=["GET"])
    app.add_route("/v1/status", status, methods=["GET"])
    app.add_route("/v1/predict", predict, methods=["POST"])
    app.router.add_websocket_route("/{path:path}", websocket)
    return app
