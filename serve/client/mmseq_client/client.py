"""The connection to a server: metadata, contract check, one reply per observation, reconnection."""

from __future__ import annotations

import hashlib
import http.client
import inspect
import json
import logging
import time
from typing import Any

import numpy as np
import websockets.exceptions
import websockets.sync.client

from mmseq_client import codec

log = logging.getLogger("mmseq_client")


class ClientError(Exception):
    """The server cannot be reached, or the connection broke."""


class ContractError(ClientError):
    """Robot and server do not mean the same thing by their numbers."""


class RefusedError(ClientError):
    """The server refused a request. code: a short word, as `missing_key`; key: the key at fault, if one is."""

    def __init__(self, code: str, message: str, key: str | None = None):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.key = key

    def __reduce__(self):
        return type(self), (self.code, self.message, self.key)


def fingerprint(embodiment: dict[str, Any]) -> str:
    """16 hexadecimal digits of a robot's contract, the same that the server computes."""
    text = json.dumps(embodiment, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def healthz(host: str = "127.0.0.1", port: int = 8000, timeout_s: float = 2.0) -> bool:
    """Whether a server answers there."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _differences(mine: Any, theirs: Any, prefix: str = "") -> list[str]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = sorted(set(mine) | set(theirs))
        return [line for key in keys for line in _differences(mine.get(key), theirs.get(key), prefix + key + ".")]
    return [] if mine == theirs else [f"{prefix[:-1]}: {mine} here, {theirs} on the server"]


class Client:
    """One robot's connection.

    connect_timeout_s: how long to try, with growing pauses, on connecting and after the connection broke.
    timeout_s: the longest wait for one reply. reconnect: after a break, connect again, make sure that the
    server still serves the same thing, and send the observation a second time.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        connect_timeout_s: float = 60.0,
        timeout_s: float = 60.0,
        reconnect: bool = True,
    ):
        self.host, self.port, self._token = host, port, token
        self._connect_timeout_s, self._timeout_s, self._reconnect = connect_timeout_s, timeout_s, reconnect
        self._contract: dict[str, Any] | None = None
        self._socket: Any = None
        self.metadata: dict[str, Any] = {}
        self._connect()

    def _connect(self) -> None:
        options: dict[str, Any] = {}
        if "proxy" in inspect.signature(websockets.sync.client.connect).parameters:
            options["proxy"] = None  # a robot talks to its server directly
        if self._token:
            options["additional_headers"] = {"Authorization": f"Api-Key {self._token}"}
        host = f"[{self.host}]" if ":" in self.host else self.host
        deadline, pause = time.monotonic() + self._connect_timeout_s, 0.05
        while True:
            try:
                self._socket = websockets.sync.client.connect(
                    f"ws://{host}:{self.port}/",
                    compression=None,
                    max_size=None,
                    open_timeout=max(0.1, min(10.0, deadline - time.monotonic())),
                    **options,
                )
                first = self._socket.recv(timeout=self._timeout_s)
                break
            except websockets.exceptions.InvalidStatus as error:
                body = getattr(error.response, "body", None) or b""
                raise self._refusal(body.decode("utf-8", "replace"), error.response.status_code) from error
            except (OSError, EOFError, TimeoutError, websockets.exceptions.WebSocketException) as error:
                if time.monotonic() + pause >= deadline:
                    raise ClientError(
                        f"no server at {self.host}:{self.port} within {self._connect_timeout_s:.0f} s: {error}"
                    ) from error
                log.info("waiting for the server at %s:%d", self.host, self.port)
                time.sleep(pause)
                pause = min(2.0, 2 * pause)
        metadata = self._unpack(first)
        if self.metadata and self._identity(metadata) != self._identity(self.metadata):
            self.close()
            raise ContractError("the server came back with another policy: {}".format(metadata.get("name")))
        self.metadata = metadata

    @staticmethod
    def _identity(metadata: dict[str, Any]) -> Any:
        return [metadata.get(key) for key in ("fingerprint", "fingerprints", "horizon", "tasks")]

    @staticmethod
    def _refusal(text: str, status: int | None = None) -> RefusedError:
        try:
            error = json.loads(text)["error"]
            return RefusedError(error["code"], error["message"], error.get("key"))
        except (ValueError, KeyError, TypeError):
            return RefusedError(f"http_{status}" if status else "error", text[:2000])

    def _unpack(self, frame: Any) -> dict[str, Any]:
        if isinstance(frame, str):
            raise self._refusal(frame)
        try:
            return codec.unpack(frame)
        except ValueError as error:
            raise ClientError(f"the server sent something else than a reply: {error}") from error

    @property
    def horizon(self) -> int:
        """Control steps of a chunk."""
        return int(self.metadata["horizon"])

    def check_contract(self, embodiment: dict[str, Any]) -> None:
        """Compare the robot's contract with the server's, and have it checked with every observation from now on.

        Raises: ContractError that names each field that differs.
        """
        served = self.metadata.get("embodiments") or {}
        name = embodiment.get("name")
        if name not in served:
            raise ContractError("embodiment {!r} is not served; there is {}".format(name, ", ".join(sorted(served))))
        lines = _differences(embodiment, served[name])
        if lines:
            raise ContractError("embodiment {!r} differs: {}".format(name, "; ".join(lines)))
        self._contract = {"embodiment": name, "embodiment_fingerprint": fingerprint(served[name])}

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The reply to an observation: `actions` float32 (horizon, axes), `policy_timing`, `server_timing` in ms.

        Raises: RefusedError when the server refuses it (the connection stays), ClientError when there is no reply.
        """
        if self._contract:
            observation = dict(self._contract, **observation)
        data = codec.pack(observation)
        if self._socket is None:
            self._connect()
        for attempt in (0, 1):
            try:
                self._socket.send(data)
                return self._unpack(self._socket.recv(timeout=self._timeout_s))
            except TimeoutError as error:
                self.close()  # a late reply must not be taken for the next one
                raise ClientError(f"no reply within {self._timeout_s:.1f} s") from error
            except (OSError, EOFError, websockets.exceptions.ConnectionClosed) as error:
                self.close()
                if attempt or not self._reconnect:
                    raise ClientError(f"the connection to {self.host}:{self.port} broke: {error}") from error
                log.warning("the connection broke (%s); connecting again", error)
                self._connect()
        raise AssertionError("unreachable")

    def healthz(self) -> bool:
        """Whether the server answers."""
        return healthz(self.host, self.port)

    def close(self) -> None:
        """End the connection; the next `infer` opens it again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def example_observation(embodiment: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """A valid random observation of a contract, to try a server without a robot."""
    random = np.random.RandomState(seed)
    observation: dict[str, Any] = {"prompt": "do the task", "embodiment": embodiment["name"]}
    for camera in embodiment.get("cameras") or []:
        shape = (camera["height"], camera["width"], 3)
        observation["observation.images." + camera["name"]] = random.randint(0, 256, shape).astype(np.uint8)
    proprio = embodiment.get("proprio")
    if proprio:
        observation["observation.state"] = random.uniform(proprio["low"], proprio["high"]).astype(np.float32)
    return observation
