"""What a server asks of the machine before it serves: an address, file descriptors, a certificate."""

from __future__ import annotations

import errno
import ipaddress
import resource
import socket
import ssl

from mmseq.errors import ServeError

FILES = 65_536  # descriptors that a server asks for


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def raise_file_limit() -> None:
    """Let this process hold as many connections as it may: the soft limit is 1,024 on most systems."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: ServeError that names host and port and the way out."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServeError(f"cannot serve on host {host!r}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServeError(
                f"port {port} on {host} is in use", fix="stop the process that holds it, or choose another port"
            ) from error
        if error.errno == errno.EACCES:
            raise ServeError(f"port {port} needs privileges", fix="choose a port from 1024 on") from error
        raise ServeError(f"cannot serve on {host}:{port}: {error.strerror}") from error
    return listener


def check_tls(cert: str, key: str) -> None:
    """Raises: ServeError for files that are no certificate and its key, or a key that asks for a passphrase."""

    def encrypted() -> str:
        raise ServeError(
            f"tls_key {key} is encrypted, and nobody is there to type its passphrase",
            fix="give a key without one, readable by the server alone: openssl pkey -in KEY -out PLAIN",
        )

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, encrypted)
    except (OSError, ssl.SSLError) as error:
        raise ServeError(
            f"cannot use tls_cert {cert} with tls_key {key}: {error}", fix="give a PEM certificate and its private key"
        ) from error
