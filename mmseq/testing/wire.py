"""Plain clients of a server under test: nothing of ours but the codec."""

import json

import httpx
from websockets.sync.client import connect

from mmseq.serving import codec


def dial(server, token=None, **headers):
    """A websocket without anything in between."""
    if token:
        headers["Authorization"] = f"Api-Key {token}"
    return connect(
        f"ws://127.0.0.1:{server.port}", compression=None, max_size=None, proxy=None, additional_headers=headers
    )


def ask(socket, observation):
    """The reply to an observation (a map, bytes or text), or the error's fields."""
    socket.send(observation if isinstance(observation, bytes | str) else codec.pack(observation))
    reply = socket.recv(timeout=10)
    return codec.unpack(reply) if isinstance(reply, bytes) else json.loads(reply)["error"]


def http(server, method, path, **arguments):
    with httpx.Client(trust_env=False) as client:
        return client.request(method, f"http://127.0.0.1:{server.port}{path}", **arguments)
