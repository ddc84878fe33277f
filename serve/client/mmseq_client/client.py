"""The connection to a server: metadata, contract check, one reply per observation, reconnection."""

from __future__ import annotations

import contextlib
import http.client
import inspect
import ipaddress
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
from mmseq_client.errors import ClientError, ContractError, RefusedError, require_seconds

log = logging.getLogger("mmseq_client")

_MAX_REPLY_BYTES = 64 << 20
_SEND_TIMEOUT_S = 2  # that a part of a message may wait for a server that does not read
_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST")
_FIRST_TRY_S, _LONGEST_TRY_S = 0.5, 8.0
_CLOSING = ("stopping", "policy_failed", "internal")  # with which a server ends the connection
_CLOSE_TIMEOUT_S = 0.5  # a frozen server must not hold up what comes after it


def healthz(host: str = "127.0.0.1", port: int = 8000, timeout_s: float = 2.0, ca_file: str | None = None) -> bool:
    """Whether a server answers there."""
    if ca_file:
        connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=_trusting(ca_file))
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class _TLSSocket(ssl.SSLSocket):
    """websockets waits for its reading thread on closing, and only a shutdown wakes that from an SSL read."""

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.shutdown(socket.SHUT_RDWR)
        super().close()


def _trusting(ca_file: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # not there, a folder, or not PEM
        raise ClientError(
            f"ca_file {ca_file!r} cannot be read: {error}; give the certificates (PEM) that the server's is signed by"
        ) from error
    context.sslsocket_class = _TLSSocket
    return context


class Client:
    """One robot's connection.

    connect_timeout_s: how long to try, with growing pauses, on connecting and after the connection broke; what
    waiting cannot cure (a wrong token, certificate or ca_file, TLS on one side only) is raised at once.
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
        _require_address(host, port)
        require_seconds("connect_timeout_s", connect_timeout_s)
        require_seconds("timeout_s", timeout_s)
        self.host, self.port, self._token, self._ca_file = host.strip("[]"), port, token, ca_file
        self._tls = _trusting(ca_file) if ca_file else None
        self._try_s = _FIRST_TRY_S  # that one opening handshake may take when a control loop connects again
        self._opening: socket.socket | None = None  # the same connection, to end its opening handshake from `close`
        self._closes = 0  # calls of `close`: what was begun before one must not stay open after it
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
        deadline, pause, closes = time.monotonic() + timeout_s, 0.05, self._closes
        while True:
            try_s = max(_FIRST_TRY_S, min(10.0, deadline - time.monotonic())) if timeout_s else self._try_s
            try:
                began = time.monotonic()
                opened = self._socket = self._open(try_s)
                self._require_open(closes)
                self._try_s = max(_FIRST_TRY_S, min(self._try_s, 4 * (time.monotonic() - began)))
                metadata = require_metadata(self._unpack(opened.recv(timeout=min(10.0, self._timeout_s))))
                break
            except websockets.exceptions.InvalidStatus as error:
                body = getattr(error.response, "body", None) or b""
                refusal = _refusal(body.decode("utf-8", "replace"), error.response.status_code)
                wait_s = max(pause, 0.001 * (refusal.retry_after_ms or 0.0))
                if refusal.code != "busy" or time.monotonic() + wait_s >= deadline:
                    raise refusal from error
                time.sleep(wait_s)  # all places are taken, perhaps by this robot's own connection from before
                pause = min(2.0, 2 * pause)
            except ClientError:
                self._drop()
                raise
            except (OSError, EOFError, TimeoutError, websockets.exceptions.WebSocketException) as error:
                self._drop()
                self._require_open(closes)
                if isinstance(error, TimeoutError):
                    self._try_s = min(_LONGEST_TRY_S, 2 * self._try_s)  # a slow link, or a server that is silent
                hopeless = self._hopeless(error)
                if hopeless is not None:
                    raise ClientError(f"{self.host}:{self.port} {hopeless}") from error
                if time.monotonic() + pause >= deadline:
                    raise ClientError(
                        f"no server at {self.host}:{self.port} within {timeout_s or try_s:.3g} s: {error}"
                    ) from error
                if pause == 0.05:  # once
                    log.warning("waiting for the server at %s:%d: %s", self.host, self.port, error)
                time.sleep(pause * random.uniform(0.5, 1.0))  # robots do not come back all at once
                pause = min(2.0, 2 * pause)
        try:
            if self.metadata and _identity(metadata) != _identity(self.metadata):
                raise ContractError("the server came back with another policy: {}".format(metadata.get("name")))
            if self._embodiment is not None:
                require_served(self._embodiment, metadata)
        except ContractError:
            self._drop()
            raise
        self.metadata = metadata

    def _require_open(self, closes: int) -> None:
        if closes != self._closes:
            raise ClientError("it was closed while it connected")

    def _hopeless(self, error: BaseException) -> str | None:
        """What is wrong with a server that no waiting will cure; None when it may be well later."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"has a certificate that ca_file {self._ca_file!r} does not vouch for: {error.verify_message}"
        if isinstance(error, ssl.SSLError) and error.reason in _NOT_TLS:
            return f"does not speak TLS: leave ca_file ({self._ca_file!r}) out"
        refused = isinstance(error, (ConnectionRefusedError, socket.gaierror, TimeoutError))
        if self._tls is None and not self.metadata and not refused:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # only to ask: nothing is sent over it
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            address = (self.host, self.port)
            with contextlib.suppress(OSError), socket.create_connection(address, 0.5) as raw, context.wrap_socket(raw):
                return "speaks TLS: give ca_file, the certificates (PEM) that its own is signed by"
        return None

    def _open(self, timeout_s: float) -> Any:
        options: dict[str, Any] = {}
        known = inspect.signature(websockets.sync.client.connect).parameters
        if "proxy" in known:
            options["proxy"] = None  # a robot talks to its server directly
        if "legacy" in known:
            options["legacy"] = True  # a connection, not what will connect
        if self._token:
            options["additional_headers"] = {"Authorization": f"Api-Key {self._token}"}
        if self._tls is not None:
            options["ssl" if "ssl" in known else "ssl_context"] = self._tls
        host = f"[{self.host}]" if ":" in self.host else self.host
        connection = socket.create_connection((self.host, self.port), timeout_s)
        connection.settimeout(None)
        with connection.dup() as self._opening:
            opened = websockets.sync.client.connect(
                f"{'ws' if self._tls is None else 'wss'}://{host}:{self.port}/",
                sock=connection,
                compression=None,
                max_size=_MAX_REPLY_BYTES,
                open_timeout=timeout_s,
                close_timeout=_CLOSE_TIMEOUT_S,
                **options,
            )
        self._opening = None
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
        Raises: RefusedError when the server refuses it, ClientError when there is no reply.
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
        data = _packed(dict(self._contract, **observation))
        self.connect()
        for attempt in (0, 1):
            opened = self._socket
            try:
                if opened is None:
                    raise ClientError("it was closed")
                opened.send(data)
                return self._receive(opened, observation.get("sent_at"), time.monotonic() + timeout_s)
            except TimeoutError as error:
                self._drop()  # a late reply must not be taken for the next one
                raise ClientError(f"no reply within {timeout_s:.1f} s") from error
            except (OSError, EOFError, websockets.exceptions.ConnectionClosed) as error:
                self._drop()
                reason = getattr(getattr(error, "rcvd", None), "reason", "")
                if reason.startswith("held"):
                    raise RefusedError("held", f"the server has stopped meanwhile: {reason}", closed=True) from error
                if attempt or not reconnect:
                    raise ClientError(f"the connection to {self.host}:{self.port} broke: {error}") from error
                log.warning("the connection broke (%s); connecting again", error)
                self.connect()
            except RefusedError:
                raise
            except ClientError:
                self._drop()  # after garbage nothing says where the next reply begins
                raise
        raise AssertionError("unreachable")

    def _receive(self, opened: Any, sent_at: float | None, deadline: float) -> dict[str, Any]:
        while True:
            reply = self._unpack(opened.recv(timeout=max(0.0, deadline - time.monotonic())))
            echoed = reply.get("sent_at", sent_at)
            if sent_at is None or (type(echoed) in (int, float) and echoed == sent_at):
                return reply
            log.warning("a reply to another observation was dropped")

    def healthz(self) -> bool:
        """Whether the server answers."""
        return healthz(self.host, self.port, ca_file=self._ca_file)

    def close(self) -> None:
        """End the connection, also one that another thread is opening; the next `infer` opens it again."""
        self._closes += 1
        opening = self._opening
        if opening is not None:
            with contextlib.suppress(OSError):  # it has just been opened, or has failed
                opening.shutdown(socket.SHUT_RDWR)
        self._drop()

    def _drop(self) -> None:
        opened, self._socket = self._socket, None
        if opened is not None:
            opened.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _require_address(host: str, port: int) -> None:
    """Raises: ClientError for what is no host or no port, such as a URL."""
    name, good = host.strip("[]"), isinstance(port, int) and 0 < port < 65536
    if ":" in name:
        try:
            ipaddress.IPv6Address(name.partition("%")[0])
        except ValueError:
            good = False
    if not good or not name or "/" in name:
        raise ClientError(
            f"host is {host!r}, port {port!r}; give the host alone and the port as a number, with ca_file for TLS"
        )


def _packed(observation: dict[str, Any]) -> bytes:
    """Raises: RefusedError that names the key that cannot be sent."""
    try:
        return codec.pack(observation)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        for key, value in observation.items():
            try:
                codec.pack({key: value})
            except (TypeError, ValueError, OverflowError, RecursionError) as own:
                raise RefusedError("wrong_type", f"{key!r}: {own}", key=str(key)) from error
        raise


def _identity(metadata: dict[str, Any]) -> Any:
    return [metadata.get(key) for key in ("fingerprint", "fingerprints", "horizon", "tasks")]


def _refusal(text: str, status: int | None = None) -> RefusedError:
    try:
        error = json.loads(text)["error"]
        wait_ms = error.get("retry_after_ms")
        wait_ms = float(wait_ms) if isinstance(wait_ms, (int, float)) and 0 <= wait_ms < 1e9 else None
        code = str(error["code"])
        return RefusedError(code, str(error["message"]), error.get("key"), wait_ms, closed=code in _CLOSING)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return RefusedError(f"http_{status}" if status else "error", text[:2000])
