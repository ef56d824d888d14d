"""What visitors reach of a Gradio app: the routes that its page uses, requests of limited size, and no file but those
that were uploaded.

Gradio has more routes than a page needs: an API, a proxy, monitoring, an editor. It downloads addresses that a request
names as a file, and refuses paths only once a request has waited in the queue.
"""

import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MOST_BODY_BYTES = 2**20  # of what is no upload
MOST_NESTING = 32
SECONDS_KEPT = 3600
UPLOAD = "/gradio_api/upload"
ROUTES = {
    "GET": re.compile(
        "/|/config/?|/theme.css|/favicon.ico|/manifest.json|/(assets|static|svelte)/.*"
        "|/gradio_api/(info|theme.css|startup-events|upload_progress|queue/data|heartbeat/[^/]*|file=.*)"
    ),
    "POST": re.compile("/gradio_api/(queue/join|cancel|reset|upload)/?"),
}
ROUTES["HEAD"] = ROUTES["GET"]
FILE_ADDRESS = re.compile(r"(?:https?://[^/?#]+)?/gradio_api/file=(?P<path>[^?#]+)")
# Nothing comes from elsewhere, images that an answer names included. Gradio's own page has scripts and styles within.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class RefusedError(Exception):
    """A request that is not handed on.

    Args:
        status: Of the answer, from 400 on.
        reason: One line for the visitor.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class PageDoor:
    """ASGI middleware in front of a Gradio app.

    Args:
        app: The app.
        folder: Where Gradio keeps the files of visitors, and nothing else lies.
        most_upload_bytes: Of one request.
        most_kept_bytes: Of all files together; those older than an hour are removed, but for those that are there now.
        most_kept_files: The same.
    """

    def __init__(
        self,
        app: Callable[[Message, Receive, Send], Awaitable[None]],
        folder: str | Path,
        most_upload_bytes: int,
        most_kept_bytes: int = 2 * 2**30,
        most_kept_files: int = 20_000,
    ) -> None:
        self.app = app
        self.folder = os.path.realpath(folder)
        self.most_upload_bytes = most_upload_bytes
        self.most_kept_bytes = most_kept_bytes
        self.most_kept_files = most_kept_files
        self.own = set(Path(self.folder).rglob("*"))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hands a request on, or answers it with 4xx and one line."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        has_begun = False

        async def send_on(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        try:
            await self.app(scope, await self._checked(scope, receive), send_on)
        except RefusedError as refusal:
            if has_begun:
                raise
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send_on({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send_on({"type": "http.response.body", "body": f"{refusal.reason}\n".encode()})

    async def _checked(self, scope: Message, receive: Receive) -> Receive:
        """Returns what the app receives of a request, whose size is limited.

        Raises:
            RefusedError: If it is not handed on.
        """
        routes = ROUTES.get(scope["method"])
        if routes is None:
            raise RefusedError(405, f"{scope['method']} is not answered here.")
        if not routes.fullmatch(scope["path"]):
            raise RefusedError(404, "There is no such page.")
        is_upload = scope["path"].rstrip("/") == UPLOAD
        most = self.most_upload_bytes if is_upload else MOST_BODY_BYTES
        limited = _limited(receive, most, dict(scope["headers"]).get(b"content-length", b""))
        if is_upload:
            self._make_room()
            return limited
        return limited if scope["method"] != "POST" else await self._read(limited, receive)

    def _make_room(self) -> None:
        """Removes files that nobody needs any more.

        Raises:
            RefusedError: If the others are too many already.
        """
        oldest, size, count = time.time() - SECONDS_KEPT, 0, 0
        for path in set(Path(self.folder).rglob("*")) - self.own:
            try:
                status = path.stat()
                if path.is_file() and status.st_mtime < oldest:
                    path.unlink()
                elif path.is_file():
                    size, count = size + status.st_size, count + 1
            except FileNotFoundError:
                continue
        if size > self.most_kept_bytes or count > self.most_kept_files:
            raise RefusedError(503, "Too many files were uploaded in the last hour: try again later.")

    async def _read(self, limited: Receive, receive: Receive) -> Receive:
        """Reads a whole body, checks it, and returns what gives it out again."""
        body = b""
        while True:
            message = await limited()
            if message["type"] != "http.request":
                raise RefusedError(400, "The request ended too soon.")
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        try:
            self.check_files(json.loads(body or b"null"))
        except (ValueError, RecursionError):
            raise RefusedError(400, "The body is no JSON.") from None
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        return again

    def check_files(self, body: Any) -> None:
        """Raises a RefusedError if a body names a file that was not uploaded, or an address."""
        for key, value in _members(body):
            named = value
            if key == "url" and isinstance(value, str):
                found = FILE_ADDRESS.fullmatch(value)
                named = unquote(found["path"]) if found else "elsewhere"
            if key in ("path", "url") and value is not None and not self._is_uploaded(named):
                raise RefusedError(400, "Files are uploaded: paths and addresses are not read here.")

    def _is_uploaded(self, path: Any) -> bool:
        if not isinstance(path, str) or not path or "\0" in path or not os.path.isabs(path):
            return False
        real = os.path.realpath(path)
        return os.path.commonpath([real, self.folder]) == self.folder and os.path.isfile(real)


def _limited(receive: Receive, most: int, length: bytes) -> Receive:
    """Returns what receives a body of so many bytes; a RefusedError beyond."""
    refusal = RefusedError(413, f"The request is larger than the {most} bytes that are read.")
    if length.isdigit() and int(length[:20]) > most:
        raise refusal
    count = 0

    async def limited() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > most:
            raise refusal
        return message

    return limited


def _members(body: Any) -> Iterator[tuple[str, Any]]:
    """Yields every key of the objects in a JSON value, with its value."""
    waiting = [(body, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MOST_NESTING:
            raise RefusedError(400, f"The body has more than {MOST_NESTING} levels.")
        if isinstance(value, dict):
            yield from value.items()
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            waiting += [(inner, depth + 1) for inner in value]
