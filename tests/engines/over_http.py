"""Asks a server that speaks the OpenAI API: `python over_http.py BASE_URL MODEL JOB.json OUT.json`, in an environment
with `openai`.

JOB.json holds `questions` (images, text) and `new_tokens`; OUT.json gets `whole` and `streamed`, the texts of the
answers. Images go as data URIs.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI


def message(question: dict[str, Any]) -> dict[str, Any]:
    uris = [
        "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode() for path in question["images"]
    ]
    images = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    return {"role": "user", "content": [*images, {"type": "text", "text": question["text"]}]}


def main(base_url: str, model: str, job: dict[str, Any]) -> dict[str, list[str]]:
    client = OpenAI(base_url=base_url, api_key="none", timeout=600, max_retries=0)
    found: dict[str, list[str]] = {"whole": [], "streamed": []}
    for question in job["questions"]:
        request = {
            "model": model, "messages": [message(question)], "temperature": 0, "max_tokens": job["new_tokens"],
        }  # fmt: skip
        found["whole"].append(client.chat.completions.create(**request).choices[0].message.content)
        parts = client.chat.completions.create(**request, stream=True)
        found["streamed"].append("".join(part.choices[0].delta.content or "" for part in parts if part.choices))
    return found


if __name__ == "__main__":
    url, name, job_file, out_file = sys.argv[1:]
    Path(out_file).write_text(json.dumps(main(url, name, json.loads(Path(job_file).read_text()))))
