"""The connection to a server: metadata, contract check, one reply per observation, reconnection."""

from __future__ import annotations

import http.client
import inspect
import json
import logging
import random
import socket
import ssl
import struct
import sys
import threading
import time
from typing import Any

import websockets.exceptions
import websockets.sync.client

from mmseq_client import codec
from mmseq_client.contract import fingerprint, require_metadata, require_served
from mmseq_client.errors import ClientError, ContractError, RefusedError

log = logging.getLogger("mmseq_client")

_MAX_REPLY_BYTES = 64 << 20
_SEND_TIMEOUT_S = 2  # that a part of a message may wait for a server that does not read
_CLOSE_TIMEOUT_S = 0.5  # a frozen server must not hold up what comes after it


def healthz(host: str = "127.0.0.1", port: int = 8000, timeout_s: float = 2.0, ca_file: str | None = None) -> bool:
    """Whether a server answers there."""
    if ca_file:
        context = ssl.create_default_context(cafile=ca_file)
        connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Client:
    """One robot's connection.

    connect_timeout_s: how long to try, with growing pauses, on connecting and after the connection broke.
    timeout_s: the longest wait for one reply. reconnect: after a break, connect again, make sure that the
    server still serves the same thing, and send the observation a second time. ca_file: certificates (PEM) that
    the server's is signed by; with it the connection is TLS.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        connect_timeout_s: float = 60.0,
        timeout_s: float = 60.0,
        reconnect: bool = True,
        ca_file: str | None = None,
    ):
        if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
            raise ClientError("the token holds spaces or line breaks; strip what was read from its file")
        self.host, self.port, self._token, self._ca_file = host, port, token, ca_file
        self._busy = threading.Lock()
        self._connect_timeout_s, self._timeout_s, self._reconnect = connect_timeout_s, timeout_s, reconnect
        self._embodiment: dict[str, Any] | None = None
        self._contract: dict[str, Any] = {}
        self._socket: Any = None
        self.metadata: dict[str, Any] = {}
        self.connect()

    def connect(self, timeout_s: float | None = None) -> None:
        """Connect unless connected, trying for `timeout_s` (0: once), and compare what is served with before.

        Raises: ClientError when there is no server, RefusedError for a wrong token, ContractError when the server
        came back with another policy or another contract of the robot.
        """
        if self._socket is not None:
            return
        timeout_s = self._connect_timeout_s if timeout_s is None else timeout_s
        deadline, pause = time.monotonic() + timeout_s, 0.05
        while True:
            try:
                self._socket = self._open(max(0.5, min(10.0, deadline - time.monotonic())))
                metadata = require_metadata(self._unpack(self._socket.recv(timeout=min(10.0, self._timeout_s))))
                break
            except websockets.exceptions.InvalidStatus as error:
                body = getattr(error.response, "body", None) or b""
                raise _refusal(body.decode("utf-8", "replace"), error.response.status_code) from error
            except ClientError:
                self.close()
                raise
            except (OSError, EOFError, TimeoutError, websockets.exceptions.WebSocketException) as error:
                self.close()
                if time.monotonic() + pause >= deadline:
                    raise ClientError(
                        f"no server at {self.host}:{self.port} within {timeout_s:.0f} s: {error}"
                    ) from error
                log.info("waiting for the server at %s:%d", self.host, self.port)
                time.sleep(pause * random.uniform(0.5, 1.0))  # robots do not come back all at once
                pause = min(2.0, 2 * pause)
        try:
            if self.metadata and _identity(metadata) != _identity(self.metadata):
                raise ContractError("the server came back with another policy: {}".format(metadata.get("name")))
            if self._embodiment is not None:
                require_served(self._embodiment, metadata)
        except ContractError:
            self.close()
            raise
        self.metadata = metadata

    def _open(self, timeout_s: float) -> Any:
        options: dict[str, Any] = {}
        if "proxy" in inspect.signature(websockets.sync.client.connect).parameters:
            options["proxy"] = None  # a robot talks to its server directly
        if self._token:
            options["additional_headers"] = {"Authorization": f"Api-Key {self._token}"}
        if self._ca_file:
            options["ssl"] = ssl.create_default_context(cafile=self._ca_file)
        host = f"[{self.host}]" if ":" in self.host else self.host
        opened = websockets.sync.client.connect(
            f"{'wss' if self._ca_file else 'ws'}://{host}:{self.port}/",
            compression=None,
            max_size=_MAX_REPLY_BYTES,
            open_timeout=timeout_s,
            close_timeout=_CLOSE_TIMEOUT_S,
            **options,
        )
        # a server that stops reading must not block the sender for ever; other systems have no such option
        if sys.platform == "linux":
            opened.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT_S, 0))
        return opened

    def _unpack(self, frame: Any) -> dict[str, Any]:
        if isinstance(frame, str):
            raise _refusal(frame)
        try:
            message = codec.unpack(frame)
        except ValueError as error:
            raise ClientError(f"the server sent something else than a reply: {error}") from error
        if not isinstance(message, dict):
            raise ClientError(f"the server sent something else than a reply: {type(message).__name__}")
        return message

    @property
    def horizon(self) -> int:
        """Control steps of a chunk."""
        return int(self.metadata["horizon"])

    def check_contract(self, embodiment: dict[str, Any]) -> dict[str, Any]:
        """Compare the robot's contract with the server's now and after each reconnection, and have the server
        check its fingerprint with every observation. Returns: the server's copy.

        Raises: ContractError that names each field that differs.
        """
        served = require_served(embodiment, self.metadata)
        if self._embodiment is not None and self._embodiment.get("name") != embodiment.get("name"):
            raise ContractError(
                "this client is bound to robot {!r}; use a Client for each robot".format(self._embodiment.get("name"))
            )
        self._embodiment = embodiment
        self._contract = {"embodiment": served["name"], "embodiment_fingerprint": fingerprint(served)}
        return served

    def infer(
        self, observation: dict[str, Any], timeout_s: float | None = None, reconnect: bool | None = None
    ) -> dict[str, Any]:
        """The reply to an observation: `actions` float32 (horizon, axes), `policy_timing`, `server_timing` in ms.

        timeout_s, reconnect: for this request, instead of the client's.
        Raises: RefusedError when the server refuses it (the connection stays), ClientError when there is no reply.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        reconnect = self._reconnect if reconnect is None else reconnect
        if not self._busy.acquire(blocking=False):
            raise ClientError("another request of this client is under way; use a Client for each loop")
        try:
            return self._infer(observation, timeout_s, reconnect)
        finally:
            self._busy.release()

    def _infer(self, observation: dict[str, Any], timeout_s: float, reconnect: bool) -> dict[str, Any]:
        data = codec.pack(dict(self._contract, **observation))
        self.connect()
        for attempt in (0, 1):
            try:
                self._socket.send(data)
                return self._receive(observation.get("sent_at"), time.monotonic() + timeout_s)
            except TimeoutError as error:
                self.close()  # a late reply must not be taken for the next one
                raise ClientError(f"no reply within {timeout_s:.1f} s") from error
            except (OSError, EOFError, websockets.exceptions.ConnectionClosed) as error:
                self.close()
                if attempt or not reconnect:
                    raise ClientError(f"the connection to {self.host}:{self.port} broke: {error}") from error
                log.warning("the connection broke (%s); connecting again", error)
                self.connect()
            except RefusedError:
                raise
            except ClientError:
                self.close()  # after garbage nothing says where the next reply begins
                raise
        raise AssertionError("unreachable")

    def _receive(self, sent_at: float | None, deadline: float) -> dict[str, Any]:
        while True:
            reply = self._unpack(self._socket.recv(timeout=max(0.0, deadline - time.monotonic())))
            echoed = reply.get("sent_at", sent_at)
            if sent_at is None or (type(echoed) in (int, float) and echoed == sent_at):
                return reply
            log.warning("a reply to another observation was dropped")

    def healthz(self) -> bool:
        """Whether the server answers."""
        return healthz(self.host, self.port, ca_file=self._ca_file)

    def close(self) -> None:
        """End the connection; the next `infer` opens it again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _identity(metadata: dict[str, Any]) -> Any:
    return [metadata.get(key) for key in ("fingerprint", "fingerprints", "horizon", "tasks")]


def _refusal(text: str, status: int | None = None) -> RefusedError:
    try:
        error = json.loads(text)["error"]
        wait_ms = error.get("retry_after_ms")
        wait_ms = float(wait_ms) if isinstance(wait_ms, (int, float)) and 0 <= wait_ms < 1e9 else None
        return RefusedError(str(error["code"]), str(error["message"]), error.get("key"), wait_ms)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return RefusedError(f"http_{status}" if status else "error", text[:2000])
