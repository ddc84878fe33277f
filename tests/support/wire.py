"""Plain clients of a server under test: nothing of ours but the codec."""

import json
import os
import socket
import struct

import httpx
import numpy as np
from websockets.sync.client import connect

from mmseq.serving import codec
from mmseq.serving.net.websocket import _header

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)


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


def frame(data, *, opcode=2, fin=True, masked=True, first=0):
    """A client's frame. first: bits that are set in its first byte besides."""
    mask = os.urandom(4) if masked else b""
    n = len(data)
    length = bytes([n]) if n < 126 else b"\x7e" + struct.pack("!H", n) if n < 65536 else b"\x7f" + struct.pack("!Q", n)
    if masked:
        data = bytes(np.frombuffer(data, np.uint8) ^ np.resize(np.frombuffer(mask, np.uint8), n)) if n else b""
    return (
        bytes([(0x80 if fin else 0) | opcode | first, length[0] | (0x80 if masked else 0)]) + length[1:] + mask + data
    )


class Raw:
    """A websocket by hand, so that every byte is ours."""

    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", server.port))
        self.socket.settimeout(10)
        self.socket.sendall(UPGRADE + b"\r\n")
        self.data = b""
        while b"\r\n\r\n" not in self.data:
            self.data += self.socket.recv(65536)
        self.data = self.data.partition(b"\r\n\r\n")[2]
        self.receive()  # the contract

    def receive(self):
        """(opcode, payload) of the next frame; (8, b"") when the connection has ended."""
        while True:
            header = _header(self.data, 0)
            if header is not None and len(self.data) >= sum(header):
                size, length = header
                found = self.data[0] & 15, self.data[size : size + length]
                self.data = self.data[size + length :]
                return found
            more = self.socket.recv(65536)
            if not more:
                return 8, b""
            self.data += more
