# Copyright 2026 The InternVL package authors
"""Fetches images from http(s) URLs, safely: clients of a server may choose the URLs.

Only hosts with public addresses are contacted, so that clients cannot reach the server's private network; redirects
are checked likewise. The connection goes to the address that was checked. One deadline covers everything from the
name look-up to the last byte of the body, including redirects. Set the environment variable
INTERNVL_ALLOW_PRIVATE_HOSTS=1 to fetch from private hosts too. If a proxy is configured, it decides which hosts are
reached.
"""

import ipaddress
import os
import socket
import string
import time
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import Thread
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import (
    AbstractHTTPHandler,
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPRedirectHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)


DOWNLOAD_SECONDS = 60
DOWNLOAD_BYTES = 2**28
PRIVATE_HOSTS = "INTERNVL_ALLOW_PRIVATE_HOSTS"

# Global unicast. All other IPv6 addresses are local, multicast, or embed an IPv4 address (mapped, compatible, NAT64).
GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
# Not public although `is_global` says so: tunnels, whose other end cannot be checked, and addresses of no single host.
NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in (
        "2001::/23",  # Teredo, benchmarks, ORCHID
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # relays of 6to4
        "168.63.129.16/32",  # Azure's host, reachable from its virtual machines
        "224.0.0.0/3",  # multicast and reserved
    )
]
# ISATAP: a tunnel to the IPv4 address in the last 32 bits, under any network's prefix. The 32 bits before it are this
# number; one of them says whether the address is unique.
ISATAP, ISATAP_MASK = 0x0000_5EFE, 0xFDFF_FFFF


def _is_public(place: str) -> bool:
    address = ipaddress.ip_address(place.partition("%")[0])
    if address.version == 6 and (address not in GLOBAL_IPV6 or int(address) >> 32 & ISATAP_MASK == ISATAP):
        return False
    return address.is_global and not any(address in network for network in NOT_PUBLIC)


def _too_slow(seconds: float) -> TimeoutError:
    return TimeoutError(f"more than {seconds:g} seconds")


class _Deadline:
    """Time limit of one download, and the connection to cut when it is over."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self.connection: socket.socket | None = None

    def left(self) -> float:
        """Returns the seconds left; raises TimeoutError if there are none."""
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise _too_slow(self.seconds)
        return seconds

    def watch(self, connection: socket.socket) -> None:
        # TLS takes over the socket's descriptor; a duplicate stays valid for cutting the connection.
        self.forget()
        self.connection = connection.dup()
        self.left()  # the time may have run out before there was a connection to cut

    def forget(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def cut(self) -> None:
        """Shuts the connection down, so that pending reads return at once."""
        connection = self.connection
        if connection is not None:
            with suppress(OSError):  # already closed
                connection.shutdown(socket.SHUT_RDWR)


def _connect(
    deadline: _Deadline, is_checked: bool, place: tuple[str, int], timeout: Any = None, source_address: Any = None
) -> socket.socket:
    """Does `socket.create_connection` within the deadline and refuses hosts with any address that is not public.

    It connects to the checked address, so that a second look-up cannot return another one.
    """
    host, port = place
    found = dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    for address in found if is_checked else ():
        if not _is_public(address):
            raise OSError(f"{host} is at {address}, which is not public; {PRIVATE_HOSTS}=1 allows private hosts")
    failure = OSError(f"{host} has no address")
    for address in found:
        try:
            connection = socket.create_connection((address, port), deadline.left(), source_address)
        except OSError as error:
            failure = error
            continue
        deadline.watch(connection)
        return connection
    raise failure


def _connection(kind: type[HTTPConnection], connect: Any, host: str, **settings: Any) -> HTTPConnection:
    connection = kind(host, **settings)
    connection._create_connection = connect  # type: ignore[attr-defined]
    return connection


class _Handler(AbstractHTTPHandler):
    """Opens URLs and redirects at public hosts only."""

    http_request = https_request = AbstractHTTPHandler.do_request_

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self.deadline = deadline

    def _open(self, kind: type[HTTPConnection], request: Request) -> HTTPResponse:
        is_proxied = request.has_proxy() or getattr(request, "_tunnel_host", None)
        is_checked = not is_proxied and os.environ.get(PRIVATE_HOSTS) != "1"
        _check_address(request.full_url, is_checked)
        request.timeout = self.deadline.left()
        return self.do_open(partial(_connection, kind, partial(_connect, self.deadline, is_checked)), request)

    def http_open(self, request: Request) -> HTTPResponse:
        """Called by urllib for http."""
        return self._open(HTTPConnection, request)

    def https_open(self, request: Request) -> HTTPResponse:
        """Called by urllib for https."""
        return self._open(HTTPSConnection, request)


def _check_address(url: str, is_checked: bool) -> None:
    """Raises a ValueError for URLs with credentials or a port of another service."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("an address with a user name or password is not fetched")
    port = parts.port  # raises for invalid ports
    if is_checked and port is not None and port < 1024 and port not in (80, 443):
        raise ValueError(f"port {port} belongs to another service than the web")


def _opener(deadline: _Deadline) -> OpenerDirector:
    """Builds urllib's opener for http and https only; the default would also follow redirects to ftp."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        UnknownHandler(),
        HTTPDefaultErrorHandler(),
        HTTPRedirectHandler(),
        HTTPErrorProcessor(),
        _Handler(deadline),
    ):
        opener.add_handler(handler)
    return opener


def _in_ascii(url: str) -> str:
    """Encodes letters beyond ASCII as browsers do: by IDNA in the host, percent-encoded elsewhere."""
    if url.isascii():
        return url
    scheme, slashes, rest = url.partition("//")
    length = next((index for index, letter in enumerate(rest) if letter in "/?#"), len(rest))
    return scheme + slashes + rest[:length].encode("idna").decode() + quote(rest[length:], safe=string.punctuation)


def _fetch(url: str, deadline: _Deadline, max_bytes: int, outcome: list[Any]) -> None:
    """Appends the body or the error to `outcome`."""
    body = bytearray()
    try:
        # Some hosts reject urllib's default user agent.
        request = Request(_in_ascii(url), headers={"User-Agent": "transformers"})
        with _opener(deadline).open(request, timeout=deadline.left()) as response:
            while chunk := response.read(2**16):
                body += chunk
                if len(body) > max_bytes:
                    raise OSError(f"more than {max_bytes} bytes")
        deadline.left()  # a cut connection looks like the end of the body
        outcome.append(bytes(body))
    except (OSError, ValueError, OverflowError, HTTPException) as error:
        is_over = time.monotonic() >= deadline.end  # then the error comes from the cut connection
        outcome.append(_too_slow(deadline.seconds) if is_over else error)
    finally:
        deadline.forget()


def download(url: str, name: str, max_seconds: float | None = None, max_bytes: int | None = None) -> bytes:
    """Downloads an http(s) URL.

    Args:
        url: What is fetched.
        name: Of the image, for the message.
        max_seconds: From the name look-up to the last byte; DOWNLOAD_SECONDS by default.
        max_bytes: Of the body; DOWNLOAD_BYTES by default.

    Raises:
        ValueError: If it fails.
    """
    deadline = _Deadline(DOWNLOAD_SECONDS if max_seconds is None else max_seconds)
    outcome: list[Any] = []
    # A socket timeout ends neither a name look-up nor a read from a server that sends a byte now and then. So a thread
    # does both, and is abandoned at the deadline.
    most = DOWNLOAD_BYTES if max_bytes is None else max_bytes
    thread = Thread(target=_fetch, args=(url, deadline, most, outcome), daemon=True)
    thread.start()
    thread.join(deadline.seconds)
    if not outcome:
        deadline.cut()
        outcome.append(_too_slow(deadline.seconds))
    if isinstance(outcome[0], bytes):
        return outcome[0]
    error = outcome[0]
    raise ValueError(f"{name} cannot be fetched ({type(error).__name__}: {error}).") from error
