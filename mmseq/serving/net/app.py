"""The routes of a server, one port: openpi's websocket protocol on any path, and HTTP.

=========================  =================================================================================
`WS /`                     metadata first, then one reply per observation; an error is a text frame
`GET /healthz`             200 `OK`, without a token and while the model is busy
`GET /readyz`              200, or 503 and why: warming up, stopping, the model hangs; without a token
`GET /metrics`             Prometheus
`GET /v1/contract`         what is served: embodiments, fingerprints, tasks, horizon, checkpoint
`GET /v1/status`           sessions, requests, errors by code, counts of the safety gate
`POST /v1/predict`         any arrow, msgpack or JSON by content type; images as arrays, PNG and MP4
`POST /v1/hold`            an operator's hold on every robot, `DELETE /v1/hold?id=...` ends it
`POST /v1/reload`          the checkpoint once more from its place; sessions stay
`GET /docs`                this, as a page; `GET /openapi.json`
=========================  =================================================================================
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from mmseq_client.repeats import Repeats

from mmseq.errors import MMSeqError, require
from mmseq.serving import codec
from mmseq.serving.errors import RequestError
from mmseq.serving.holds import NO_REASON, reason_of
from mmseq.serving.metrics import Metrics
from mmseq.serving.net import media
from mmseq.serving.service import Service

log = logging.getLogger("mmseq.serving")

LARGE_BODY = 1 << 20
BODY_S = 60.0  # within which a body has to come
BODIES = 4  # bodies of the largest size that may be under way together
UNCOUNTED = 1 << 16  # bytes of a body that need no room among them: what an operator sends
MSGPACK = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")

Handler = Callable[[Any], Awaitable[Any]]


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


def peer_of(connection: Any) -> str:
    return f"{connection.client.host}:{connection.client.port}" if connection.client else ""


_STRANGERS = ("Invalid HTTP request received.", "Unsupported upgrade request.")  # can make uvicorn say these
_told = Repeats()


def _is_news(record: logging.LogRecord) -> bool:
    """uvicorn takes a refused websocket for a mistake of ours; the log has the reason already. What any stranger can
    make it say is said now and then."""
    if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
        return False  # an answer that its peer did not read until the server stopped
    message = record.getMessage()
    if message in _STRANGERS:
        return _told.is_news(message, time.monotonic())
    return "without completing handshake" not in message


async def unless_gone[Result](request: Any, answer: Coroutine[Any, Any, Result]) -> Result:
    """What `answer` gives, which is cancelled once nobody waits for it. The body has been read before.

    Raises: ClientDisconnect.
    """
    from starlette.requests import ClientDisconnect

    answering = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(request.receive())  # after the body, that is all that comes
    try:
        await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        answering.cancel()
        gone.cancel()


def build_app(
    service: Service,
    *,
    token: str | None,
    limits: codec.Limits,
    stuck_s: float = 30.0,
    max_connections: int = 256,
    reload: Callable[[], Future[None]] | None = None,
) -> Any:
    """The ASGI application. reload: begins to load what is served once more; done when that is served.

    Raises: DependencyError without the `serve` extra.
    """
    fastapi = require("fastapi", "serve")
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

    from mmseq.serving.net.openapi import describe, page_of

    app = fastapi.FastAPI(title="mmseq", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(service, stuck_s=stuck_s)
    logging.getLogger("uvicorn.error").addFilter(_is_news)

    def error_response(error: Exception) -> Response:
        refusal = service.refused(error)
        headers = {}
        if refusal.retry_after_ms is not None:
            headers["Retry-After"] = str(max(1, round(refusal.retry_after_ms / 1000)))
        return Response(refusal.to_json(), refusal.status, headers, "application/json")

    def admit(connection: Any) -> None:
        try:
            authorize(connection.headers, token)
        except RequestError as error:
            service.turned_away(peer_of(connection), error)
            raise

    def guarded(handler: Handler) -> Handler:
        async def guard(request: Request) -> Response:
            try:
                admit(request)
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=499)  # which nobody reads
            except asyncio.CancelledError:  # by the end of `grace_s`
                return error_response(RequestError("stopping", "the server stops before the answer is ready"))
            except Exception as error:
                return error_response(error)

        return guard

    def as_json(body: Any) -> Response:
        return Response(codec.to_json(body), media_type="application/json")

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("OK\n")

    async def readyz(request: Request) -> Response:
        why = service.not_ready(stuck_s)
        return PlainTextResponse("OK\n") if why is None else PlainTextResponse(why + "\n", 503)

    async def scrape(request: Request) -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    async def contract(request: Request) -> Response:
        return as_json(service.contract.to_dict())

    async def status(request: Request) -> Response:
        return as_json(service.status())

    async def openapi(request: Request) -> Response:
        return as_json(describe(service.contract, token=token is not None))

    async def page(request: Request) -> Response:
        return Response(page_of(describe(service.contract, token=token is not None)), media_type="text/html")

    async def hold(request: Request) -> Response:
        id, said = request.query_params.get("id") or None, {}
        if request.method == "DELETE":
            every = request.query_params.get("all", "false")
            if set(request.query_params) - {"id", "all"} or every not in ("true", "false"):
                raise RequestError("malformed", "a hold is ended with ?id=ID or ?all=true")
            service.release(id, every=every == "true")
        else:
            id = service.hold(NO_REASON)  # at once: whatever the body is, and when it comes
            try:
                reason = reason_of(await body_of(request))
            except RequestError:
                reason = NO_REASON
            if reason != NO_REASON and id in service.holds.reasons:  # not ended meanwhile
                service.hold(reason, id)
            said = {"id": id, "reason": reason}
        if service.holds.problem is not None:
            said["warning"] = f"{service.holds.problem}: after a restart it is not as it is now"
        held, sessions = service.held is not None, len(service.sessions)
        return as_json({"held": held, **said, "holds": service.holds.listed(), "sessions": sessions})

    async def reload_now(request: Request) -> Response:
        if reload is None:
            raise RequestError("unsupported", "this server has nothing to load again", fix="start it with a checkpoint")
        try:
            await asyncio.wrap_future(reload())
        except MMSeqError as error:
            log.warning("nothing was reloaded: %s", error)
            raise error if isinstance(error, RequestError) else RequestError("refused", str(error)) from error
        return as_json({"reloads": service.reloads, "sessions": len(service.sessions)})

    def encode_reply(encode: Callable[[Any], bytes], reply: dict[str, Any]) -> bytes:
        try:
            return encode(reply)
        except RequestError as error:
            raise RequestError("policy_failed", f"the policy's result cannot be sent: {error}") from error

    under_way = 0  # bytes of all bodies that come just now

    async def body_of(request: Request) -> bytearray:
        nonlocal under_way
        body, counted = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    size = len(body) + len(part)
                    if size > limits.max_message_bytes:
                        raise RequestError(
                            "too_large", f"the body is over the limit of {limits.max_message_bytes} bytes"
                        )
                    if size > UNCOUNTED:
                        if under_way + size - counted > BODIES * limits.max_message_bytes:
                            raise RequestError("busy", "too many large bodies are under way", retry_after_ms=1000)
                        under_way, counted = under_way + size - counted, size
                    body += part
        except TimeoutError as error:
            raise RequestError(
                "incomplete", f"{len(body)} bytes of the body came in {BODY_S:.0f} s, and not the rest"
            ) from error
        except asyncio.CancelledError as error:
            raise RequestError("stopping", "the server stops before the body has come") from error
        finally:
            under_way -= counted
        return body

    async def predict(request: Request) -> Response:
        holds = service.holds.begun
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in (*MSGPACK, "application/json"):
            raise RequestError(
                "unsupported", f"content type {kind[:60]!r}", fix=f"send application/json or {MSGPACK[0]}"
            )
        decode, encode = (codec.unpack, codec.pack) if kind in MSGPACK else (codec.from_json, codec.to_json)
        data = await body_of(request)
        large = len(data) > LARGE_BODY  # takes longer than the loop may be away
        body = codec.message(await asyncio.to_thread(decode, data, limits) if large else decode(data, limits))
        form = body.pop("as", "array")
        if form not in media.KINDS:
            raise RequestError("malformed", f"'as' is {form!r:.40}, expected one of {', '.join(media.KINDS)}", key="as")
        reply, rate_hz = await unless_gone(request, service.predict(body))
        accepted = request.headers.get("accept", "").partition(",")[0].partition(";")[0].strip().lower()
        in_thread = asyncio.to_thread  # a video takes longer than the loop may be away
        if accepted in ("image/png", "video/mp4"):
            data = await in_thread(media.only_file, reply["prediction"], accepted, rate_hz)
            service.unless_held(holds)
            return Response(data, media_type=accepted)
        if form != "array":
            text = kind not in MSGPACK
            reply["prediction"] = await in_thread(media.as_files, reply["prediction"], form, rate_hz, text=text)
            service.unless_held(holds)
        return Response(encode_reply(encode, reply), media_type=kind)

    async def websocket(socket: WebSocket) -> None:
        try:
            admit(socket)
            if len(service.sessions) >= max_connections:
                raise RequestError(
                    "busy",
                    f"{len(service.sessions)} robots are connected, as many as may be",
                    fix="close what is not used, or raise max_connections",
                    retry_after_ms=1000,
                )
        except RequestError as error:
            await socket.send_denial_response(error_response(error))
            return
        session = service.open(peer_of(socket))
        session.hang_up = socket.close
        connection = socket.scope.get("mmseq.connection")
        if connection is not None:
            connection.on_lost = lambda: service.close(session)
        try:
            await socket.accept()
            await socket.send_bytes(codec.pack(service.contract.to_dict()))
            previous_ms: float | None = None
            while True:
                frame = await socket.receive()
                if frame["type"] == "websocket.disconnect":
                    return
                begun = time.perf_counter()
                try:
                    await asyncio.sleep(0)  # of many messages that came at once, one in a turn of the loop
                    if frame.get("bytes") is None:
                        raise codec.malformed("a text frame", fix="send binary frames")
                    observation = codec.message(codec.unpack(frame["bytes"], limits))
                    del frame  # half a megabyte that would live until the next one
                    reply = await service.infer(observation, session)
                    if previous_ms is not None:
                        reply["server_timing"]["prev_total_ms"] = previous_ms
                    await socket.send_bytes(encode_reply(codec.pack, reply))
                except WebSocketDisconnect:
                    return
                except Exception as error:
                    if socket.application_state is WebSocketState.DISCONNECTED:  # hung up meanwhile
                        return
                    refusal = service.refused(error)
                    await socket.send_text(refusal.to_json())
                    if refusal.closes:
                        code = 1012 if refusal.code == "stopping" else 1011
                        await socket.close(code, f"{refusal.code}: see the frame before")
                        return
                previous_ms = 1000 * (time.perf_counter() - begun)
        except WebSocketDisconnect:
            return
        except asyncio.CancelledError:
            if session.number in service.sessions:
                raise  # not by `close`, which cancels what nobody waits for
        finally:
            service.close(session)

    async def not_found(request: Request, _: Exception) -> Response:
        return error_response(RequestError("not_found", f"there is no {request.url.path[:200]!r}", fix="see /docs"))

    async def not_allowed(request: Request, error: Any) -> Response:
        allowed = (error.headers or {}).get("Allow")
        return error_response(
            RequestError("not_allowed", f"{request.url.path[:200]} is not for this", fix=f"use {allowed}")
        )

    app.add_exception_handler(404, not_found)
    app.add_exception_handler(405, not_allowed)
    app.add_route("/healthz", healthz, methods=["GET"])
    app.add_route("/readyz", readyz, methods=["GET"])
    for path, handler, methods in (
        ("/metrics", scrape, ["GET"]),
        ("/docs", page, ["GET"]),
        ("/openapi.json", openapi, ["GET"]),
        ("/v1/contract", contract, ["GET"]),
        ("/v1/status", status, ["GET"]),
        ("/v1/predict", predict, ["POST"]),
        ("/v1/hold", hold, ["POST", "DELETE"]),
        ("/v1/reload", reload_now, ["POST"]),
    ):
        app.add_route(path, guarded(handler), methods=methods)
    app.router.add_websocket_route("/{path:path}", websocket)
    return app
