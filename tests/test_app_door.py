"""The door before the page: routes that it does not need, bodies that are too large, and names of files are refused
before Gradio sees them.
"""

import asyncio
import json
import os

import pytest

from internvl.serving.app import door
from internvl.serving.app.door import MOST_BODY_BYTES, PageDoor, RefusedError


class App:
    """An ASGI app that reads the whole body."""

    def __init__(self):
        self.bodies, self.scopes = [], []

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope)
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b"served"})


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "uploads"
    (folder / "abc").mkdir(parents=True)
    (folder / "abc" / "a b.png").write_bytes(b"image")
    (folder / "abc" / "link.png").symlink_to("/etc/hostname")
    return folder


def request(app, method, path, chunks=(b"",), headers=(), ends=True):
    """The status, headers and body of an answer; the client leaves after the last chunk unless the body `ends`."""
    waiting = [
        {"type": "http.request", "body": chunk, "more_body": number < len(chunks) or not ends}
        for number, chunk in enumerate(chunks, 1)
    ]
    sent = []

    async def receive():
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], dict(sent[0]["headers"]), body


def join(folder, data, **limits):
    """The status of a request that joins the queue, and whether the app saw all of it."""
    app, body = App(), json.dumps({"data": data}).encode()
    status, _, answer = request(
        PageDoor(app, folder, 100, **limits), "POST", "/gradio_api/queue/join", [body[:7], body[7:]]
    )
    assert app.bodies == ([body] if status == 200 else [])
    assert status == 200 or answer.count(b"\n") == 1
    return status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("GET", "/assets/index.js", 200),
        ("GET", "/gradio_api/queue/data", 200),
        ("GET", "/gradio_api/file=/tmp/a.png", 200),
        ("POST", "/gradio_api/cancel", 200),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/", 404),
        ("GET", "/monitoring", 404),
        ("GET", "/docs", 404),
        ("POST", "/gradio_api/run/predict", 404),
        ("POST", "/gradio_api/call/ask", 404),
        ("POST", "/gradio_api/component_server", 404),
        ("POST", "/gradio_api/vibe-edit", 404),
        ("POST", "/", 404),
        ("PUT", "/", 405),
        ("TRACE", "/", 405),
    ],
)
def test_only_routes_of_the_page_are_answered(method, path, status, uploads):
    app = App()
    chunks = [b"{}"] if method == "POST" else [b""]
    found, headers, _ = request(PageDoor(app, uploads, 100), method, path, chunks)
    assert found == status
    assert len(app.scopes) == (status == 200)
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    assert headers[b"x-content-type-options"] == b"nosniff"


def test_web_sockets_are_not_opened(uploads):
    app = App()
    asyncio.run(PageDoor(app, uploads, 100)({"type": "websocket", "path": "/"}, None, None))
    assert app.scopes == []


def test_uploaded_files_pass(uploads):
    path = f"{uploads}/abc/a b.png"
    address = f"/gradio_api/file={uploads}/abc/a%20b.png"
    for url in (None, address, f"http://127.0.0.1:7860{address}"):
        assert join(uploads, [{"text": "/etc/passwd?", "files": [{"path": path, "url": url}]}, None, 3]) == 200


@pytest.mark.parametrize("key", ["path", "url"])
@pytest.mark.parametrize(
    "named",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "http://169.254.169.254/latest",
        "https://example.org/a.png",
        "data:image/png;base64,AAAA",
        "abc/a b.png",
        "{folder}/abc/../../../../../../../../etc/passwd",
        "{folder}/abc/link.png",
        "{folder}/abc/nothing.png",
        "{folder}/abc",
        "{folder}-beside/a.png",
        "/gradio_api/file=/etc/passwd",
        "http://elsewhere/gradio_api/file=/etc/passwd",
        "/gradio_api/file={folder}/abc/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "\0",
        "",
        7,
        ["{folder}/abc/a b.png"],
        {"path": "/etc/passwd"},
    ],
)
def test_other_files_and_addresses_are_refused(key, named, uploads, tmp_path):
    (tmp_path / "uploads-beside").mkdir()
    (tmp_path / "uploads-beside" / "a.png").write_bytes(b"image")
    named = named.replace("{folder}", str(uploads)) if isinstance(named, str) else named
    for data in ([{key: named}], [[{"a": {"files": [{"orig_name": "a.png", key: named}]}}]]):
        assert join(uploads, data) == 400


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b"[" * 40 + b"]" * 40, b"null"])
def test_bodies_that_are_no_json_or_too_deep_are_refused(body, uploads):
    app = App()
    status, _, _ = request(PageDoor(app, uploads, 100), "POST", "/gradio_api/queue/join", [body])
    assert status == (200 if body in (b"", b"null") else 400)


def test_a_body_that_ends_too_soon_is_not_handed_on(uploads):
    app = App()
    join_queue = (PageDoor(app, uploads, 100), "POST", "/gradio_api/queue/join", [b'{"data": []}'])
    assert request(*join_queue, ends=False)[0] == 400
    assert app.scopes == []


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join"])
@pytest.mark.parametrize("is_declared", [True, False])
def test_large_bodies_are_refused_declared_or_not(path, is_declared, uploads):
    app = App()
    most = 100 if path.endswith("upload") else MOST_BODY_BYTES
    headers = [(b"content-length", b"%d" % (most + 1))] if is_declared else []
    chunks = [b" " * (most // 2)] * 2 + [b" "]
    assert request(PageDoor(app, uploads, 100), "POST", path, chunks, headers)[0] == 413
    assert app.bodies == []
    assert request(PageDoor(app, uploads, 100), "POST", "/gradio_api/upload", [b"a" * 100])[0] == 200


def test_uploads_of_an_hour_have_a_limit_and_older_ones_go(uploads):
    own = uploads / "abc" / "a b.png"
    os.utime(own, (0, 0))
    limited = PageDoor(App(), uploads, 100, most_kept_bytes=12, most_kept_files=5)
    upload = ("POST", "/gradio_api/upload", [b"a"])
    assert request(limited, *upload)[0] == 200
    (uploads / "new.png").write_bytes(b"1234567890123")
    assert request(limited, *upload)[0] == 503
    os.utime(uploads / "new.png", (0, 0))
    assert request(limited, *upload)[0] == 200
    assert not (uploads / "new.png").exists()
    assert own.exists()  # an example of the page
    for number in range(6):
        (uploads / f"{number}.png").write_bytes(b"")
    assert request(limited, *upload)[0] == 503


def test_errors_of_the_app_stay_its_own(uploads):
    async def failing(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RefusedError(400, "too late")

    with pytest.raises(RefusedError):
        request(PageDoor(failing, uploads, 100), "GET", "/")


def test_the_policy_lets_nothing_come_from_elsewhere():
    assert "http" not in door.POLICY
    assert "*" not in door.POLICY
