"""As much of the Hub's API as downloads and uploads need, on loopback. A file breaks off midway as often as asked."""

import base64
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

    def do_POST(self) -> None:
        """What `huggingface_hub` asks without Xet: make a repository, check the card, sort the files, send, commit."""
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, None, self.headers.get("Authorization")))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuses:
            return self._refuse(403, "Forbidden")
        if path == "/api/repos/create":
            made = json.loads(body)
            self.server.made.append(made)
            name = "/".join(filter(None, (made.get("organization"), made["name"])))
            return self._send(json.dumps({"url": f"http://127.0.0.1/{name}", "name": name}).encode())
        if path == "/api/validate-yaml":
            return self._send(json.dumps({"errors": [], "warnings": []}).encode())
        if "/preupload/" in path:
            modes = [
                {"path": file["path"], "uploadMode": upload_mode(file["path"]), "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self._send(json.dumps({"files": modes}).encode())
        if path.endswith("/info/lfs/objects/batch"):
            here = f"http://127.0.0.1:{self.server.server_port}/lfs/"
            objects = [
                {**wanted, "actions": {"upload": {"href": here + wanted["oid"]}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self._send(json.dumps({"transfer": "basic", "objects": objects}).encode())
        return self._commit(path, body)

    def do_PUT(self) -> None:
        """Takes the bytes of a large file."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        digest = self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != digest:
            return self._refuse(422, "OtherBytes")
        self.server.large[digest] = body
        return self._send(b"")

    def _commit(self, path: str, body: bytes) -> None:
        if "/commit/" not in path:
            return self._refuse(404, "RepoNotFound")
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.pushed[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.pushed[value["path"]] = self.server.large[value["oid"]]
        name = path.removeprefix("/api/models/").partition("/commit/")[0]
        answer = {
            "commitUrl": f"http://127.0.0.1:{self.server.server_port}/{name}/commit/feed",
            "commitOid": "feed",
            "pullRequestUrl": None,
        }
        return self._send(json.dumps(answer).encode())

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


def upload_mode(name: str) -> str:
    """By the `.gitattributes` that the Hub makes with a repository."""
    return "lfs" if name.endswith((".safetensors", ".bin", ".pt", ".pth")) else "regular"


def commit_of(branch: str) -> str:
    return hashlib.sha1(branch.encode()).hexdigest()


def etag_of(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def hub(revisions: dict[str, Any], breaks: dict[str, int] | None = None) -> Iterator[Any]:
    """A running stand-in; `asked` has all requests, `made` the repositories, `pushed` the files by name.

    Args:
        revisions: `user/name` to branches and their folders, or "gated".
        breaks: Name of a file to how often it breaks off.
    """
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.revisions, server.breaks, server.asked = revisions, dict(breaks or {}), []
    server.made, server.large, server.pushed, server.refuses = [], {}, {}, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
