"""The embeddings API as LitServe serves it, over HTTP; test_embedding_requests.py has what a request may hold."""

import asyncio
import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F

from internvl.evaluation.embeddings import ModelPlace, pixel_values_of
from internvl.serving.__main__ import _parser, main

from .conftest import ROOT
from .fixtures_images import bomb, data_address, encoded
from .fixtures_text import make_image
from .loopback import free_port, serving
from .test_image_download import address, no_proxy  # noqa: F401  (fixtures)


pytest.importorskip("litserve", reason="litserve is not installed: `pip install 'internvl[serving]'`")

import uvicorn
from fastapi import HTTPException
from litserve.utils import LitAPIStatus

from internvl.serving import embedding_engine
from internvl.serving.embedding_engine import Door, EmbeddingsSpec, PromptProtocol, WaitingLoop, build_server


TEXTS = ["a red circle", "two digits on a blue square, one above the other", "https://example.com/a.png", "圆"]
IMAGES = [make_image(40, 90, seed) for seed in range(3)]
PATHS = ["/etc/passwd", "file:///etc/passwd", "~/.ssh/id_rsa"]
WAIT = 0.3  # for a batch to fill: a request alone takes as long


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("api") / "server.log"


@pytest.fixture(scope="module")
def server(log):
    """The command, in mode G, which may fetch from this machine; `server.port` is where."""
    port = free_port()
    command = [sys.executable, "-m", "internvl.serving", "embeddings", str(ROOT), "--subfolder", "internvl_g"]
    command += f"--mode G --port {port} --max-batch-size 4 --batch-wait {WAIT} --max-body-bytes 200000".split()
    command += "--dtype float32 --max-image-pixels 10000 --download-seconds 5 --timeout 100".split()
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "INTERNVL_ALLOW_PRIVATE_HOSTS": "1"}
    env["no_proxy"] = "127.0.0.1"
    with serving(command, port, log, env, log.parent, 300) as process:
        yield Namespace(port=port, process=process)


@pytest.fixture(scope="module")
def loaded():
    return ModelPlace(str(ROOT), "internvl_g", "float32").load()


@torch.inference_mode()
def features_of(loaded, texts=(), images=(), mode="InternVL-G") -> np.ndarray:
    """Those of the model itself, each alone."""
    model, processor = loaded
    rows = []
    for text in texts:
        inputs = processor(text=[text], mode="contrastive", padding=True, return_tensors="pt")
        rows.append(model.get_text_features(inputs["input_ids"], inputs["attention_mask"]))
    rows += [model.get_image_features(pixel_values_of(model, processor, [image]), mode=mode) for image in images]
    return torch.cat(rows).float().numpy()


def post(server, body, path: str = "/v1/embeddings", method: str = "POST") -> tuple[int, dict]:
    """Status and JSON of an answer; a body of bytes is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def vectors(answer: tuple[int, dict]) -> np.ndarray:
    status, body = answer
    assert status == 200, body
    assert [one["index"] for one in body["data"]] == list(range(len(body["data"])))
    return np.array([one["embedding"] for one in body["data"]], np.float32)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the order of sums: the server may compute with another number of threads."""
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_features_are_those_of_the_model(server, loaded):
    for text in TEXTS:
        assert_close(vectors(post(server, {"input": text, "normalize": False})), features_of(loaded, [text]))
    for image in IMAGES:
        found = vectors(post(server, {"input": data_address(encoded(image)), "normalize": False}))
        assert_close(found, features_of(loaded, images=[image]))
        assert np.abs(found - features_of(loaded, images=[image], mode="InternVL-C")).max() > 0.1


def test_lists_are_answered_in_order_with_unit_vectors(server, loaded):
    """Five inputs are more than a batch."""
    asked = [TEXTS[0], data_address(encoded(IMAGES[0])), TEXTS[1], data_address(encoded(IMAGES[1])), TEXTS[3]]
    status, body = post(server, {"input": asked, "model": "internvl_g"})
    texts, images = features_of(loaded, [TEXTS[0], TEXTS[1], TEXTS[3]]), features_of(loaded, images=IMAGES[:2])
    expected = F.normalize(torch.from_numpy(np.stack([texts[0], images[0], texts[1], images[1], texts[2]])), dim=-1)
    np.testing.assert_allclose(vectors((status, body)), expected.numpy(), atol=1e-5)
    tokens = sum(map(len, loaded[1](text=asked[::2], mode="contrastive", padding=False)["input_ids"]))
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_base64_is_the_same_vector(server):
    plain = vectors(post(server, {"input": TEXTS[0]}))[0]
    _, body = post(server, {"input": TEXTS[0], "encoding_format": "base64"})
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4"), plain)


def test_images_are_fetched_from_a_field_of_their_own(server, address, loaded):  # noqa: F811
    url = f"{address}/good.png"
    found = vectors(post(server, {"input": [url], "image_urls": [url], "normalize": False}))
    text, image = features_of(loaded, [url])[0], features_of(loaded, images=[make_image(50, 30)])[0]
    np.testing.assert_allclose(found, [text, image], atol=1e-3)
    for missing in ("/none.png", "/bomb.png", "/empty.png", "/files.png"):
        status, body = post(server, {"image_urls": [f"{address}{missing}"]})
        assert status == 400
        assert "`image_urls[0]`" in body["error"]["message"]


def test_private_hosts_are_refused_without_telling_why(address, no_proxy):  # noqa: F811
    limits = Namespace(download_seconds=5, max_image_bytes=100)
    spec = EmbeddingsSpec(Namespace(reader=Namespace(limits=limits)), timeout=5, max_batch_size=1, max_body_bytes=100)
    with pytest.raises(ValueError, match=r"image_urls\[0\] cannot be fetched: no public host") as refusal:
        spec._fetch(Namespace(value=f"{address}/good.png", name="image_urls[0]"))
    assert "127.0.0.1" not in str(refusal.value)


def test_paths_are_texts_and_never_files(server, loaded):
    found = vectors(post(server, {"input": PATHS, "normalize": False}))
    np.testing.assert_allclose(found, features_of(loaded, PATHS), atol=1e-3)
    for path in PATHS:
        assert post(server, {"image_urls": [path]})[0] == 400


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, b"", "no JSON"),
        (400, b"\xff\xfe", "no JSON"),
        (400, b"[" * 100_000, "no JSON"),
        (400, b'{"input": NaN}', "no JSON"),
        (400, b'{"input": "a", "dimensions": 1' + b"0" * 10_000 + b"}", "no JSON"),
        (400, b'{"input": "\\ud800"}', "no Unicode"),
        (400, b'{"\\ud800\\n": 1}', "no field"),
        (413, b'{"input": "' + b"a" * 300_000 + b'"}', "too large"),
        (404, {"input": "a", "model": "gpt-4"}, "no model 'gpt-4'"),
        (400, {"input": [1, 2]}, "token ids"),
        (400, {"input": "data:image/png;base64,####"}, "damaged base64"),
        (400, {"input": data_address(b"text")}, "input[0]"),
        (400, {"input": data_address(bomb())}, "pixels"),
        (400, {"input": data_address(encoded(make_image(101, 100)))}, "pixels"),
        (400, {"input": "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>"}, "input[0]"),
        (400, {"input": ["a", "data:image/png,"]}, "`input[1]`"),
        (400, {"input": "a", "dimensions": 4}, "dimensions"),
    ],
)
def test_hostile_requests_are_refused_in_one_line(server, status, body, said):
    check_refusal(post(server, body), status, said)


def check_refusal(answer, status: int, said: str) -> None:
    found, body = answer
    assert found == status, body
    assert said in body["error"]["message"]
    assert "\n" not in body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_other_addresses_and_methods_are_refused_in_the_same_form(server):
    for path in ("/v2/embeddings", "/predict"):  # the second is LitServe's own, which reads forms
        check_refusal(post(server, {}, path), 404, "Not Found")
    check_refusal(post(server, {}, method="PUT"), 405, "Method Not Allowed")


def test_headers_without_an_end_are_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: " + b"a" * 2**17)
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


def test_a_connection_without_a_request_is_closed_and_one_at_work_is_not(monkeypatch):
    """Also after an answer, where the head of a next request begins and does not end."""
    monkeypatch.setattr(embedding_engine, "IDLE_SECONDS", 0.2)

    async def app(scope, receive, send):
        await asyncio.sleep(1)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def talk(port: int, *parts: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for part in parts:
            writer.write(part)
            await asyncio.sleep(1.1)
        found = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return found

    async def run() -> list[bytes]:
        config = uvicorn.Config(app, port=free_port(), http=PromptProtocol, lifespan="off", timeout_keep_alive=60)
        one = uvicorn.Server(config)
        served = asyncio.create_task(one.serve())
        while not one.started:
            await asyncio.sleep(0.02)
        head = b"GET / HTTP/1.1\r\nHost: a\r\n"
        found = [await talk(config.port, *parts) for parts in ([], [head], [head + b"\r\n", head])]
        one.should_exit = True
        await served
        return found

    silent, begun, answered = asyncio.run(run())
    assert silent == begun == b""
    assert answered.startswith(b"HTTP/1.1 200 OK")
    assert answered.endswith(b"ok")


def test_an_input_that_cannot_be_read_fails_its_own_request_alone(server):
    """All three are in one batch."""
    bodies = [{"input": TEXTS[0]}, {"input": "data:image/png;base64,####"}, {"input": TEXTS[1]}]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda body: post(server, body)[0], bodies))
    assert found == [200, 400, 200]


def test_answers_are_not_mixed_up(server, loaded):
    texts = [f"number {index}, {'and again ' * (index % 5)}" for index in range(24)]
    expected = features_of(loaded, texts)
    with ThreadPoolExecutor(12) as pool:
        found = np.concatenate(
            list(pool.map(lambda text: vectors(post(server, {"input": text, "normalize": False})), texts))
        )
    np.testing.assert_allclose(found, expected, atol=1e-3)
    distances = np.linalg.norm(found[:, None] - expected, axis=-1)
    assert distances.argmin(axis=1).tolist() == list(range(24))


def test_models_and_health_are_told(server):
    assert [one["id"] for one in post(server, b"", "/v1/models", "GET")[1]["data"]] == ["internvl_g"]


@pytest.mark.slow
def test_what_a_killed_worker_took_is_answered_at_once_and_another_goes_on(server):
    """The request waits for its batch when the worker ends."""
    others = psutil.Process(server.process.pid).children()
    (worker,) = [one for one in others if "spawn_main" in " ".join(one.cmdline())]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, server, {"input": TEXTS[0]})
        time.sleep(WAIT / 2)
        worker.kill()
        begun = time.monotonic()
        check_refusal(asked.result(), 503, "ended")
    assert time.monotonic() - begun < 20  # of the 100 seconds of a request
    assert vectors(post(server, {"input": TEXTS[0]})).shape == (1, 192)


def test_stopping_answers_what_was_begun(server, log):
    """Last, as it ends the server. The request waits for its batch when the signal comes."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, server, {"input": TEXTS[0]})
        time.sleep(WAIT / 2)
        os.killpg(server.process.pid, signal.SIGTERM)
        assert vectors(asked.result()).shape == (1, 192)
    assert server.process.wait(60) == 0
    assert "Traceback" not in log.read_text()


def test_a_worker_takes_what_is_there_and_drops_what_waited_too_long():
    loop, queue, sent = WaitingLoop(), Queue(), []
    transport = Namespace(send=lambda message, consumer_id: sent.append((consumer_id, *message)))
    api = Namespace(max_batch_size=3, batch_timeout=0.0, request_timeout=10)
    now = time.monotonic()
    for index in range(5):
        queue.put((0, index, now - 11 * (index == 1), f"item {index}"))
    assert loop.get_batch_requests(api, queue, transport) == ([(0, 0, "item 0"), (0, 2, "item 2")], [(0, 1)])
    assert loop.get_batch_requests(api, queue, transport) == ([(0, 3, "item 3"), (0, 4, "item 4")], [])
    assert loop.get_batch_requests(api, queue, transport) == ([], [])
    assert [(queue_id, uid, answer[3]) for queue_id, uid, answer in sent] == [
        (0, uid, os.getpid()) for uid in range(5)
    ]


def test_nobody_waits_for_a_process_that_ended(monkeypatch):
    monkeypatch.setattr(embedding_engine, "CHECK_SECONDS", 0.01)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    spec = EmbeddingsSpec(None, timeout=5, max_batch_size=1, max_body_bytes=100)
    spec.response_buffer, spec.response_queue_id, spec.request_queue = {}, 0, Queue()

    async def ask(process: int):
        asked = asyncio.create_task(spec._ask("a text"))
        await asyncio.sleep(0.05)
        (waiting,) = spec.response_buffer.values()
        waiting.worker_id = process
        await asyncio.sleep(0.05)
        waiting.response = "features", LitAPIStatus.OK
        waiting.event.set()
        return await asked

    assert asyncio.run(ask(os.getpid())) == "features"
    with pytest.raises(HTTPException, match="503: The process that computed the answer ended"):
        asyncio.run(ask(ended.pid))
    assert not spec.response_buffer


@pytest.mark.parametrize(("flags", "forwards"), [([], [2, 1]), (["--image-cache-bytes", "1000000"], [2])])
def test_an_image_that_comes_again_costs_no_forward_where_a_cache_is_asked_for(flags, forwards, monkeypatch):
    monkeypatch.setattr(embedding_engine.os, "setpgrp", lambda: None)  # of this process, which is no worker
    monkeypatch.setattr(embedding_engine, "end_with", lambda parent: None)
    options = _parser(["embeddings"]).parse_args(["embeddings", str(ROOT), "--device", "cpu", *flags])
    door = Door(ModelPlace(str(ROOT), "internvl_g", "float32"), "InternVL-G", None, None)
    api = build_server(door, options).lit_api
    api.setup("cpu")
    seen = []
    api.model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    one, other = (pixel_values_of(api.model, api.processor, [image])[0].numpy() for image in IMAGES[:2])
    (first, _), _, _ = api.predict([one, "a text", other])
    (again, _), _ = api.predict([one, "a text"])
    assert seen == forwards
    np.testing.assert_allclose(again, first, atol=0 if flags else 1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([str(ROOT)], "an embeddings API needs an InternVL-C"),
        ([str(ROOT)], f"Below it there is `{ROOT / 'internvl_g'}`."),
        ([str(ROOT / "nowhere")], "is not there"),
        ([str(ROOT), "--subfolder", "internvit"], "an InternViT vision tower"),
    ],
)
def test_other_models_are_refused_before_anything_is_started(arguments, said, capsys):
    assert main(["embeddings", *arguments]) == 2
    assert said in capsys.readouterr().err
