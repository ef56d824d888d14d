"""Fetching images: public hosts only, in any notation, and one deadline over all of it."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest

from internvl.image_processing_internvl import InternVLImageProcessor

from .fixtures_images import TILE, bomb, bytes_of_tiles, encoded
from .fixtures_text import make_image


WIDE = make_image(128, 32)


@pytest.fixture
def processor() -> InternVLImageProcessor:
    return InternVLImageProcessor(size={"height": TILE, "width": TILE})


# ------------------------------------------------------------------------------------------------ addresses
class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `pages`, turns `moves` to other addresses; all else is missing."""

    pages: ClassVar[dict[str, bytes]] = {}
    moves: ClassVar[dict[str, str]] = {}
    hosts: ClassVar[list[str]] = []

    def do_GET(self):
        self.hosts.append(self.headers["Host"])
        body, moved = self.pages.get(self.path), self.moves.get(self.path)
        self.send_response(302 if moved else 404 if body is None else 200)
        if moved:
            self.send_header("Location", moved)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    Handler.pages = {"/good.png": encoded(make_image(50, 30)), "/bomb.png": bomb(), "/empty.png": b""}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    home = f"http://127.0.0.1:{server.server_port}"
    Handler.moves = {
        "/moved.png": "/good.png",
        "/inwards.png": f"{home}/good.png",
        "/files.png": "ftp://images.test/",
    }
    yield home
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost,images.test")
    monkeypatch.delenv("INTERNVL_ALLOW_PRIVATE_HOSTS", raising=False)


@pytest.fixture
def private_hosts(no_proxy, monkeypatch):
    monkeypatch.setenv("INTERNVL_ALLOW_PRIVATE_HOSTS", "1")


@pytest.mark.usefixtures("private_hosts")
def test_addresses_are_fetched(processor, address):
    fetched = bytes_of_tiles(processor, f"{address}/good.png")
    np.testing.assert_array_equal(fetched, bytes_of_tiles(processor, make_image(50, 30)))


@pytest.mark.usefixtures("private_hosts")
def test_letters_beyond_ascii_are_encoded_as_browsers_do(processor, address, monkeypatch):
    Handler.pages["/b%C3%BCcher/%E5%9B%BE%201.png?a=%C3%BC&b=%20"] = Handler.pages["/good.png"]
    fetched = bytes_of_tiles(processor, f"{address}/b\u00fccher/\u56fe 1.png?a=\u00fc&b=%20")
    np.testing.assert_array_equal(fetched, bytes_of_tiles(processor, make_image(50, 30)))
    hosts: list[str] = []

    def look_up(host, *arguments, **settings):
        hosts.append(host)
        raise OSError("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for source in ("http://b\u00fccher.test:8080/a.png", "https://\u4f8b\u3048.test?\u00fc"):
        with pytest.raises(ValueError, match="no such host"):
            processor(source)
    assert hosts == ["xn--bcher-kva.test", "xn--r8jz45g.test"]


@pytest.mark.usefixtures("private_hosts")
@pytest.mark.parametrize("page", ["bomb.png", "empty.png", "missing.png"])
def test_bad_addresses_are_named(processor, address, page):
    with pytest.raises(ValueError, match=f"Image 2 of 2 .*127.0.0.1.*{page}"):
        processor([WIDE, f"{address}/{page}"])


@pytest.mark.usefixtures("private_hosts")
def test_downloads_are_limited_in_size(processor, address, monkeypatch):
    monkeypatch.setattr("internvl.image_download_internvl.DOWNLOAD_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        processor(f"{address}/good.png")


@pytest.mark.usefixtures("private_hosts")
def test_one_caller_may_limit_its_own_downloads(processor, address):
    assert processor.fetch_images([f"{address}/good.png"], max_seconds=20, max_bytes=2**20)[0].size
    with pytest.raises(ValueError, match="more than 100 bytes"):
        processor.fetch_images([f"{address}/good.png"], max_bytes=100)
    with pytest.raises(ValueError, match=r"more than 1e-06 seconds"):
        processor.fetch_images([f"{address}/good.png"], max_seconds=1e-6)


@pytest.fixture
def public_name(address, monkeypatch, no_proxy) -> str:
    """The server's address by a name that resolves to a public address, from which connections are turned to it."""
    resolve, connect = socket.getaddrinfo, socket.create_connection

    def fake_resolve(host, port, *arguments, **settings):
        return resolve("8.8.8.8" if host == "images.test" else host, port, *arguments, **settings)

    def fake_connect(place, *arguments):
        return connect(("127.0.0.1" if place[0] == "8.8.8.8" else place[0], place[1]), *arguments)

    monkeypatch.setattr(socket, "getaddrinfo", fake_resolve)
    monkeypatch.setattr(socket, "create_connection", fake_connect)
    return address.replace("127.0.0.1", "images.test")


NOT_PUBLIC = """
10.0.0.1 172.16.5.4 192.168.1.1 169.254.169.254 100.64.0.1 100.100.100.200 0.0.0.0 0.1.2.3 127.0.0.1
127.255.255.254 168.63.129.16
192.0.0.8 192.0.2.1 192.88.99.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.1.2.3 240.0.0.1 255.255.255.255
::1 :: ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1 64:ff9b::7f00:1
64:ff9b::808:808 64:ff9b:1::1
100::1 2001::1 2001:0:53aa:64c::1 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:808:808::1
2a00:1450::5efe:7f00:1 2a00:1450::200:5efe:808:808
3fff::1 5f00::1 fc00::1 fd00::1 fd00:ec2::254 fe80::1 fe80::1%1 fec0::1 ff02::1 ff0e::1
""".split()
PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001::1", "2001:4860:4860::8888"]


@pytest.fixture
def connected(monkeypatch, no_proxy) -> list[str]:
    """Addresses to which a connection would have been made."""
    places: list[str] = []

    def connect(place, *arguments):
        places.append(place[0])
        raise OSError("nobody is there")

    monkeypatch.setattr(socket, "create_connection", connect)
    return places


@pytest.mark.parametrize("place", NOT_PUBLIC)
def test_what_is_not_public_is_refused_in_an_address_and_behind_a_name(processor, connected, monkeypatch, place):
    host = f"[{place}]" if ":" in place else place
    for scheme in ("http", "https", "HTTP"):
        with pytest.raises(ValueError, match=r"Image 1 of 1 .* not public; INTERNVL_ALLOW_PRIVATE_HOSTS=1 allows"):
            processor(f"{scheme}://{host}/image.png")
    family = socket.AF_INET6 if ":" in place else socket.AF_INET
    found = [(socket.AF_INET, 1, 6, "", ("8.8.8.8", 80)), (family, 1, 6, "", (place, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **settings: found)
    with pytest.raises(ValueError, match=r"images.test is at .* which is not public"):
        processor("http://images.test/image.png")
    assert connected == []


@pytest.mark.parametrize("place", PUBLIC)
def test_public_addresses_are_asked(processor, connected, place):
    with pytest.raises(ValueError, match="nobody is there"):
        processor(f"http://{f'[{place}]' if ':' in place else place}/image.png")
    assert connected == [place]


NOTATIONS = """
2130706433 0x7f000001 0x7f.1 017700000001 0177.0.0.1 127.1 127.0.1 127.0.0.1. %31%32%37.0.0.1
\uff11\uff12\uff17.0.0.1 127\u30020.0.1
[0:0:0:0:0:0:0:1] [::ffff:7f00:1] [0:0:0:0:0:ffff:127.0.0.1] localhost LOCALHOST
""".split()


@pytest.mark.parametrize("host", NOTATIONS)
def test_no_notation_of_this_machine_is_public(processor, connected, host):
    with pytest.raises(ValueError, match="Image 1 of 1 "):
        processor(f"http://{host}/image.png")
    assert connected == []


@pytest.mark.parametrize(
    ("address_of", "message"),
    [
        ("http://user:word@8.8.8.8/a.png", "user name or password"),
        ("http://8.8.8.8@127.0.0.1/a.png", "user name or password"),
        ("http://8.8.8.8:22/a.png", "port 22 belongs to another service"),
        ("http://8.8.8.8:99999/a.png", "Port out of range"),
        ("http://8.8.8.8:x/a.png", "Port could not"),
        ("http://8.8.8.8/a b\r\nHost: c", "control characters"),
        ("http:///a.png", "no host given"),
        ("http://[::1/a.png", "Invalid IPv6"),
        ("https:", "no host given"),
        ("http://" + "a" * 70 + ".test/a.png", "idna"),
    ],
)
def test_addresses_that_no_image_has_are_refused(processor, connected, address_of, message):
    with pytest.raises(ValueError, match=f"(?s)Image 1 of 1 .* cannot be fetched .*{message}"):
        processor(address_of)
    assert connected == []


# ------------------------------------------------------------------------------------------------ one deadline
def answer_slowly(connection: socket.socket, start: bytes, drop: bytes, stop: threading.Event) -> None:
    """The start of an answer, then `drop` again and again, always before a read would time out."""
    with connection:
        connection.recv(4096)
        try:
            connection.sendall(start)
            while not stop.wait(0.05):
                connection.sendall(drop)
        except OSError:
            pass


SLOW_ANSWERS = {
    "silence": (b"", b""),
    "headers": (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
    "many headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
    "body until the end": (b"HTTP/1.0 200 OK\r\n\r\n", b"x"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "size of a chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "TLS handshake": (b"\x16\x03\x03\x40\x00", b"\2"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.fixture
def slow_server(request) -> Iterator[str]:
    start, drop = SLOW_ANSWERS[request.param]
    stop, threads = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                threads.append(threading.Thread(target=answer_slowly, args=(connection, start, drop, stop)))
                threads[-1].start()

        acceptor = threading.Thread(target=serve)
        acceptor.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        stop.set()
        for thread in (acceptor, *threads):
            thread.join()


@pytest.mark.usefixtures("private_hosts")
@pytest.mark.parametrize("slow_server", SLOW_ANSWERS, indirect=True)
def test_one_deadline_holds_for_the_whole_download(processor, slow_server, request, monkeypatch):
    """Each single read ends in time; together they would take for ever. No thread goes on afterwards."""
    monkeypatch.setattr("internvl.image_download_internvl.DOWNLOAD_SECONDS", 0.4)
    scheme = "https" if "TLS" in request.node.name else "http"
    before, start = threading.active_count(), time.monotonic()
    with pytest.raises(
        ValueError, match=r"Image 1 of 1 .* cannot be fetched \(TimeoutError: more than 0\.4 seconds\)"
    ):
        processor(f"{scheme}://{slow_server}/image.png")
    assert time.monotonic() - start < 5
    end = time.monotonic() + 5
    while threading.active_count() > before + 1 and time.monotonic() < end:  # the server's own thread for it
        time.sleep(0.02)
    assert threading.active_count() <= before + 1


@pytest.mark.usefixtures("private_hosts")
def test_looking_up_a_name_and_many_addresses_and_redirects_share_the_deadline(processor, address, monkeypatch):
    monkeypatch.setattr("internvl.image_download_internvl.DOWNLOAD_SECONDS", 0.4)
    resolve, connect, stop = socket.getaddrinfo, socket.create_connection, threading.Event()

    def slow_look_up(*arguments, **settings):
        stop.wait(30)
        return resolve(*arguments, **settings)

    def slow_connection(place, timeout, *arguments):
        time.sleep(min(timeout, 0.1))
        raise TimeoutError("timed out")

    def slow_answer(*arguments):
        time.sleep(0.1)
        return connect(*arguments)

    ring = address + "/ring.png"
    Handler.moves["/ring.png"] = "/ring.png?1"
    Handler.moves |= {f"/ring.png?{number}": f"/ring.png?{number + 1}" for number in range(1, 9)}
    many = [(socket.AF_INET, 1, 6, "", (f"8.8.8.{number}", 80)) for number in range(200)]
    for name, replacement, source in (
        ("getaddrinfo", slow_look_up, address + "/good.png"),
        ("getaddrinfo", lambda *arguments, **settings: many, "http://images.test/good.png"),
        ("create_connection", slow_answer, ring),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(socket, name, replacement)
            if source.startswith("http://images"):
                patched.setattr(socket, "create_connection", slow_connection)
            start = time.monotonic()
            with pytest.raises(ValueError, match=r"cannot be fetched \(TimeoutError: more than 0\.4 seconds"):
                processor(source)
            assert time.monotonic() - start < 5
    stop.set()


def test_public_hosts_and_their_redirects_are_fetched_but_not_inwards_nor_by_ftp(processor, public_name):
    Handler.hosts.clear()
    for page in ("good.png", "moved.png"):
        np.testing.assert_array_equal(
            bytes_of_tiles(processor, f"{public_name}/{page}"), bytes_of_tiles(processor, make_image(50, 30))
        )
    assert len(Handler.hosts) == 3
    with pytest.raises(ValueError, match=r"127\.0\.0\.1 is at 127\.0\.0\.1, which is not public"):
        processor(f"{public_name}/inwards.png")
    with pytest.raises(ValueError, match="ftp"):
        processor(f"{public_name}/files.png")
    assert len(Handler.hosts) == 5
    assert all(host.startswith("images.test") for host in Handler.hosts)


def test_a_proxy_decides_for_itself(processor, address, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", address)
    Handler.pages["http://10.0.0.1/good.png"] = Handler.pages["/good.png"]
    fetched = bytes_of_tiles(processor, "http://10.0.0.1/good.png")
    np.testing.assert_array_equal(fetched, bytes_of_tiles(processor, make_image(50, 30)))
