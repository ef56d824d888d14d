"""As much of the Hub's API as a download needs, on loopback. One file breaks off in the middle as often as asked."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    """Answers for the repositories in `server.revisions`: by name, branch or commit to folder."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        known = self.server.revisions.get(name)
        if known is None:
            return self._refuse(404, "RepoNotFound")
        if known == "gated":
            return self._refuse(403, "GatedRepo")
        kind, revision = parts[4:6] if is_api else parts[2:4]
        found = next((pair for pair in known.items() if revision in (pair[0], commit_of(pair[0]))), None)
        if found is None:
            return self._refuse(404, "RevisionNotFound")
        branch, folder = found
        if not is_api:
            return self._send_file(folder / "/".join(parts[4:]), branch)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [file.relative_to(folder).as_posix() for file in files]
        if kind == "tree":
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": etag_of(file)}
                for name, file in zip(names, files, strict=True)
            ]
            return self._send(json.dumps(entries).encode())
        siblings = [{"rfilename": name} for name in names]
        return self._send(json.dumps({"id": name, "sha": commit_of(branch), "siblings": siblings}).encode())

    def _send_file(self, file: Path, branch: str) -> None:
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        data = file.read_bytes()
        headers = {"X-Repo-Commit": commit_of(branch), "ETag": f'"{etag_of(file)}"', "Accept-Ranges": "bytes"}
        start = 0
        if (wanted := self.headers.get("Range")) is not None:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        breaks = self.command == "GET" and self.server.breaks.get(file.name, 0) > 0
        if breaks:
            self.server.breaks[file.name] -= 1
        return self._send(data[start:], 206 if start else 200, headers, breaks)

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"{}", status, {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, data: bytes, status: int = 200, headers: dict | None = None, breaks: bool = False) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if breaks else data)
        if breaks:
            self.close_connection = True


def commit_of(branch: str) -> str:
    return hashlib.sha1(branch.encode()).hexdigest()


def etag_of(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def hub(revisions: dict[str, Any], breaks: dict[str, int] | None = None) -> Iterator[Any]:
    """A running stand-in; `asked` has all requests.

    Args:
        revisions: `user/name` to branches and their folders, or "gated".
        breaks: Name of a file to how often it breaks off.
    """
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.revisions, server.breaks, server.asked = revisions, dict(breaks or {}), []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
