"""Asks a server that speaks the OpenAI API: `python over_http.py BASE_URL MODEL JOB.json OUT.json`, in an environment
with `openai`.

JOB.json holds `questions` (images, text), `new_tokens`, and an image as `readable`; OUT.json gets for every way of
`WAYS` the answers, each with its `text` and, of servers that give them (vLLM), its `tokens`. Images go as data URIs.
Before all that, images are sent that no server may read; `refused` has the status of each answer.
"""

import base64
import json
import struct
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import APIStatusError, OpenAI


IN_PARALLEL = 8
# For bytes that make no character, which models with random weights say; at the end of a stream they are left out.
INCOMPLETE = "\ufffd"


def message(question: dict[str, Any]) -> dict[str, Any]:
    uris = [
        "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode() for path in question["images"]
    ]
    images = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    return {"role": "user", "content": [*images, {"type": "text", "text": question["text"]}]}


def whole(client: OpenAI, request: dict[str, Any]) -> dict[str, Any]:
    choice = client.chat.completions.create(**request).choices[0]
    return {"text": choice.message.content.rstrip(INCOMPLETE), "tokens": getattr(choice, "token_ids", None)}


def streamed(client: OpenAI, request: dict[str, Any]) -> dict[str, Any]:
    parts = [part.choices[0] for part in client.chat.completions.create(**request, stream=True) if part.choices]
    tokens = [token for part in parts for token in getattr(part, "token_ids", None) or []]
    text = "".join(part.delta.content or "" for part in parts)
    return {"text": text.rstrip(INCOMPLETE), "tokens": tokens or None}


def hostile(path: str) -> dict[str, str]:
    """Addresses of images by what they are; `path` is a readable image on the server's machine."""
    png = Path(path).read_bytes()
    huge = png[:16] + struct.pack(">II", 60000, 60000) + png[24:29]
    huge += struct.pack(">I", zlib.crc32(huge[12:29])) + png[33:]
    data = {"text": b"no image", "nothing": b"", "half a file": png[: len(png) // 2], "60000 x 60000 pixels": huge}
    uris = {name: "data:image/png;base64," + base64.b64encode(content).decode() for name, content in data.items()}
    return {"a path": path, "a file address": Path(path).as_uri(), "no base64": "data:image/png;base64,!!!!", **uris}


def statuses(client: OpenAI, model: str, path: str) -> dict[str, int]:
    """200 for what was answered."""
    found = {}
    for name, url in hostile(path).items():
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
        try:
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], max_tokens=4)
            found[name] = 200
        except APIStatusError as error:
            found[name] = error.status_code
    return found


def one_by_one(way: Callable) -> Callable:
    return lambda client, requests: [way(client, request) for request in requests]


def in_parallel(client: OpenAI, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Never fewer at once than `IN_PARALLEL`: few questions are asked again and again."""
    asked = requests * -(-IN_PARALLEL // len(requests))
    with ThreadPoolExecutor(IN_PARALLEL) as threads:
        return list(threads.map(lambda request: whole(client, request), asked))


WAYS = {"whole": one_by_one(whole), "streamed": one_by_one(streamed), "in parallel": in_parallel}


def main(base_url: str, model: str, job: dict[str, Any]) -> dict[str, Any]:
    # A connection each: after an error servers close theirs, and a client that keeps it asks in vain.
    close = {"Connection": "close"}
    client = OpenAI(base_url=base_url, api_key="none", timeout=600, max_retries=0, default_headers=close)
    more = {"extra_body": {"return_token_ids": True}} if job.get("asks_for_tokens") else {}
    requests = [
        {"model": model, "messages": [message(question)], "temperature": 0, "max_tokens": job["new_tokens"], **more}
        for question in job["questions"]
    ]
    refused = statuses(client, model, job["readable"])
    return {"refused": refused, **{way: ask(client, requests) for way, ask in WAYS.items()}}


if __name__ == "__main__":
    url, name, job_file, out_file = sys.argv[1:]
    Path(out_file).write_text(json.dumps(main(url, name, json.loads(Path(job_file).read_text()))))
