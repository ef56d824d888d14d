"""The embeddings API as LitServe runs it.

Processes that speak HTTP read requests and images, and put one item for each text or image into a queue; processes
that hold the model (workers) take as many items as there are, up to a batch. So the items of several requests share a
batch, and an item that cannot be read fails its own request alone.

LitServe (as of 0.2.19) is given what it lacks: its OpenAI specification refuses lists together with batches, its loop
asks an empty queue a thousand times a second, SIGTERM ends its first process alone, and a request whose worker died
would wait for ever.
"""

import argparse
import asyncio
import gc
import json
import os
import signal
import threading
import time
import uuid
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import litserve
import numpy as np
import torch
from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse
from litserve.loops.simple_loops import BatchedLoop
from litserve.specs.openai_embedding import OpenAIEmbeddingSpec
from litserve.utils import LitAPIStatus, LoopResponseType, ResponseBufferItem
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from transformers import ProcessorMixin
from transformers.utils.logging import disable_progress_bar
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..console import printable
from ..evaluation.embeddings import ModelPlace
from ..image_download_internvl import download
from ..image_loading_internvl import LOCAL_FILES, read_image
from .embedding_requests import EmbeddingInput, RequestReader, UnknownModelError, answer


BATCHES_AHEAD = 4  # that a process may have in the queue: an image in it takes megabytes
READERS = 4  # threads that decode images, in each process that speaks HTTP
FETCHERS = 8  # threads that fetch images
LONGEST_MESSAGE = 500
CHECK_SECONDS = 1.0  # between looks at whether the worker that took an item is there
IDLE_SECONDS = 10.0  # of a connection without a request, once or twice this


@dataclass(frozen=True)
class Door:
    """A model and how it is asked.

    Args:
        place: Where the model lies.
        mode: "InternVL-C" or "InternVL-G".
        reader: Of requests.
        processor: That of the model.
    """

    place: ModelPlace
    mode: str
    reader: RequestReader
    processor: ProcessorMixin


# ------------------------------------------------------------------------------------------------------------- workers
class EmbeddingsAPI(litserve.LitAPI):
    """Computes features in a worker.

    Args:
        place: Where the model lies.
        mode: "InternVL-C" or "InternVL-G".
        threads: Of torch on a CPU.
        image_cache_bytes: Of features of images that are kept; 0 keeps none.
        settings: Of LitServe.
    """

    def __init__(self, place: ModelPlace, mode: str, threads: int, image_cache_bytes: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.place = place
        self.mode = mode
        self.threads = threads
        self.image_cache_bytes = image_cache_bytes
        self.first = os.getpid()

    def setup(self, device: str) -> None:
        """Loads the model."""
        os.setpgrp()  # the first process ends workers after the answers: a signal to its group is not for them
        end_with(self.first)
        torch.set_num_threads(self.threads)
        disable_progress_bar()
        self.model, self.processor = self.place.load(device)
        self.model.image_feature_cache_bytes = self.image_cache_bytes

    def decode_request(self, request: Any) -> Any:
        """Returns an item as it is: a text or pixel values."""
        return request

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Returns the items as they are: LitServe would stack what begins with an array, though texts may follow."""
        return inputs

    def encode_response(self, output: Any) -> Any:
        """Returns the features and the number of tokens of an item as they are."""
        return output

    @torch.inference_mode()
    def predict(self, items: list[str | np.ndarray]) -> list[tuple[np.ndarray, int]]:
        """Returns features (E,) and number of tokens of each item, which is a text or pixel values (3, H, W)."""
        found: list[Any] = [None] * len(items)
        images = [index for index, item in enumerate(items) if not isinstance(item, str)]
        texts = [index for index, item in enumerate(items) if isinstance(item, str)]
        if images:
            pixels = torch.from_numpy(np.stack([items[index] for index in images]))
            features = self.model.get_image_features(pixels.to(self.model.device), mode=self.mode)
            for index, row in zip(images, features.float().cpu().numpy(), strict=True):
                found[index] = row, 0
        if texts:
            rows = [items[index] for index in texts]
            inputs = self.processor(text=rows, mode="contrastive", padding=True, return_tensors="pt")
            inputs = inputs.to(self.model.device)
            features = self.model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
            counts = inputs["attention_mask"].sum(dim=1).tolist()
            for index, row, count in zip(texts, features.float().cpu().numpy(), counts, strict=True):
                found[index] = row, count
        return found


class WaitingLoop(BatchedLoop):
    """Waits for an item, then takes what comes within `batch_timeout`, and what is there already."""

    def get_batch_requests(self, lit_api: litserve.LitAPI, request_queue: Any, transport: Any) -> tuple[list, list]:
        """Returns items to answer and items that waited for too long."""
        items = [self._take(request_queue, transport, 1.0)]
        end = time.monotonic() + lit_api.batch_timeout
        while items[-1] is not None and len(items) < lit_api.max_batch_size:
            items.append(self._take(request_queue, transport, max(end - time.monotonic(), 0)))
        earliest = time.monotonic() - lit_api.request_timeout
        taken = [item for item in items if item is not None]
        in_time = [(queue_id, uid, item) for queue_id, uid, since, item in taken if since >= earliest]
        return in_time, [(queue_id, uid) for queue_id, uid, since, _ in taken if since < earliest]

    def _take(self, request_queue: Any, transport: Any, seconds: float) -> Any:
        """Takes an item if there is one, and says which process did, as nobody else can answer it now."""
        item = self.get_request(request_queue, timeout=seconds)
        if item is not None:
            queue_id, uid, *_ = item
            taken = (None, LitAPIStatus.START, LoopResponseType.REGULAR, os.getpid())
            transport.send((uid, taken), consumer_id=queue_id)
        return item


# ---------------------------------------------------------------------------------------------------------------- HTTP
class EmbeddingsSpec(OpenAIEmbeddingSpec):
    """Reads requests and gathers what workers answer.

    Args:
        door: The model and how it is asked.
        timeout: Seconds after which a request is given up.
        max_batch_size: Of a worker.
        max_body_bytes: Of a request; LitServe counts only what has come.
    """

    def __init__(self, door: Door, timeout: float, max_batch_size: int, max_body_bytes: int) -> None:
        super().__init__()
        self.door = door
        self.timeout = timeout
        self.batch_size = max_batch_size
        self.max_body_bytes = max_body_bytes

    # Threads and locks belong to a process that speaks HTTP, and are made when it needs them first.
    @cached_property
    def places(self) -> asyncio.Semaphore:
        """Of items in the queue."""
        return asyncio.Semaphore(BATCHES_AHEAD * self.batch_size)

    @cached_property
    def readers(self) -> Executor:
        """Threads that decode images and fill the queue."""
        return ThreadPoolExecutor(READERS, "reader")

    @cached_property
    def fetchers(self) -> Executor:
        """Threads that fetch images."""
        return ThreadPoolExecutor(FETCHERS, "fetcher")

    async def embeddings_endpoint(self, request: Request) -> Response:
        """Answers one request."""
        try:
            asked = self.door.reader.read(_json(await self._body(request)))
            async with asyncio.timeout(self.timeout):
                found = await _all([self._embed(item) for item in asked.inputs])
        except UnknownModelError as error:
            raise HTTPException(404, str(error)) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except TimeoutError:
            raise HTTPException(504, f"There was no answer within {self.timeout:g} seconds.") from None
        features = np.stack([row for row, _ in found])
        return JSONResponse(answer(asked, features, sum(tokens for _, tokens in found)))

    async def _body(self, request: Request) -> bytes:
        """Returns the body of a request, which must come in time."""
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_body_bytes:
            raise HTTPException(413, f"The body is too large: it may have {self.max_body_bytes} bytes.")
        try:
            async with asyncio.timeout(self.timeout):
                return await request.body()
        except TimeoutError:
            raise HTTPException(408, f"The body did not come within {self.timeout:g} seconds.") from None
        except ClientDisconnect:
            raise HTTPException(400, "The body ended early.") from None

    async def models(self) -> dict[str, Any]:
        """Answers what is served."""
        entry = {"id": self.door.reader.model, "object": "model", "created": 0, "owned_by": "internvl"}
        return {"object": "list", "data": [entry]}

    async def _embed(self, given: EmbeddingInput) -> tuple[np.ndarray, int]:
        """Returns the features (E,) and number of tokens of a text or image."""
        loop = asyncio.get_running_loop()
        content: str | bytes = given.value
        if given.kind == "url":
            content = await loop.run_in_executor(self.fetchers, self._fetch, given)
        async with self.places:
            item: Any = content
            if given.kind != "text":
                item = await loop.run_in_executor(self.readers, self._pixels, content, given.name)
            return await self._ask(item)

    async def _ask(self, item: Any) -> tuple[np.ndarray, int]:
        """Puts an item into the queue and waits for a worker's answer."""
        uid, waiting = str(uuid.uuid4()), ResponseBufferItem(event=asyncio.Event())
        self.response_buffer[uid] = waiting
        entry = (self.response_queue_id, uid, time.monotonic(), item)
        try:
            await asyncio.get_running_loop().run_in_executor(self.readers, self.request_queue.put, entry)
            while not await _is_set(waiting.event, CHECK_SECONDS):
                # The process that took it; one that ended is reaped, and another started, by LitServe within seconds.
                if waiting.worker_id is not None and not _is_running(waiting.worker_id):
                    raise HTTPException(503, "The process that computed the answer ended. Ask again.")
        finally:
            del self.response_buffer[uid]
        found, status = waiting.response
        if status != LitAPIStatus.OK:
            raise found if isinstance(found, HTTPException) else HTTPException(500, "The model could not answer.")
        return found

    def _fetch(self, given: EmbeddingInput) -> bytes:
        limits = self.door.reader.limits
        try:
            return download(given.value, given.name, limits.download_seconds, limits.max_image_bytes)
        except ValueError as error:  # whose reason would tell a client about this network
            raise ValueError(
                f"{given.name} cannot be fetched: no public host gives a file of at most {limits.max_image_bytes} "
                f"bytes there within {limits.download_seconds:g} seconds."
            ) from error

    def _pixels(self, content: str | bytes, name: str) -> np.ndarray:
        """Returns the pixel values (3, H, W) of a file or of its `data:` address."""
        most = self.door.reader.limits.max_image_pixels
        image = read_image(content, name, most, allow_local_files=False)
        inputs = self.door.processor(images=[image], mode="contrastive", max_num=1, return_tensors="pt")
        return inputs["pixel_values"][0].numpy()


class PromptProtocol(H11Protocol):
    """Closes connections whose next request does not come: each of them takes a place from others.

    h11 refuses headers beyond 64 KiB; uvicorn's other parser of HTTP keeps them whatever their size.
    """

    def connection_made(self, transport: Any) -> None:
        """Begins to watch."""
        super().connection_made(transport)
        self._watch(self)

    def _watch(self, before: Any) -> None:
        """Closes the connection if it waits for a request now and did, after the same one, at the last look."""
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting and before is self.cycle:
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(IDLE_SECONDS, self._watch, self.cycle if is_waiting else self)


def _json(body: bytes) -> Any:
    """Returns the JSON value of a body."""
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The body is no JSON: {printable(str(error))[:200]}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


async def _all(asked: list[Any]) -> list[Any]:
    """Awaits all; where one fails, the others are given up."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _is_set(event: asyncio.Event, seconds: float) -> bool:
    """Whether an event is set within some seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


async def as_openai_error(request: Request, error: Exception) -> Response:
    """An error in the form that OpenAI's clients read, on one line."""
    status = error.status_code if isinstance(error, AnyHTTPException) else 500
    text = str(error.detail) if isinstance(error, AnyHTTPException) else "An error inside the server."
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"message": printable(text)[:LONGEST_MESSAGE], "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status, headers=getattr(error, "headers", None))


# ----------------------------------------------------------------------------------------------------------- processes
def end_with(parent: int) -> None:
    """Ends this process when its parent does, which a kill gives no time to end it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with the parent").start()


def _stop_on_signals() -> None:
    """Makes SIGTERM stop the first process as Ctrl+C does. Processes that it forks leave both signals to it."""
    first = os.getpid()

    def stop(*_: Any) -> None:
        if os.getpid() == first:
            raise KeyboardInterrupt

    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, stop)
    os.register_at_fork(after_in_child=lambda: end_with(first))


def build_server(door: Door, options: argparse.Namespace) -> litserve.LitServer:
    """Returns LitServe's server of the embeddings API; see the command for the options."""
    spec = EmbeddingsSpec(door, options.timeout, options.max_batch_size, options.max_body_bytes)
    api = EmbeddingsAPI(
        door.place,
        door.mode,
        max(1, torch.get_num_threads() // options.workers),
        options.image_cache_bytes,
        max_batch_size=options.max_batch_size,
        batch_timeout=options.batch_wait,
        loop=WaitingLoop(),
        spec=spec,
    )
    server = litserve.LitServer(
        api,
        accelerator=options.device,
        workers_per_device=options.workers,
        timeout=options.timeout,
        max_payload_size=options.max_body_bytes,
        disable_openapi_url=True,
        restart_workers=True,
    )
    server.uvicorn_graceful_timeout = options.timeout  # LitServe's 30 s would cut off what may take as long
    server.app.add_api_route("/v1/models", spec.models, methods=["GET"])
    for kind in (AnyHTTPException, Exception):
        server.app.add_exception_handler(kind, as_openai_error)
    return server


def serve(door: Door, options: argparse.Namespace) -> None:
    """Serves until it is stopped; requests that were begun are answered."""
    os.environ[LOCAL_FILES] = "0"  # in every process
    server = build_server(door, options)
    _stop_on_signals()
    gc.freeze()  # processes that are forked share what is not collected, and the first one ends without searching it
    try:
        server.run(
            host=options.host,
            port=options.port,
            log_level=options.log_level,
            generate_client_file=False,
            limit_concurrency=options.max_connections,
            http=PromptProtocol,
            ws="none",
        )
    except RuntimeError as error:  # a worker could not start, and has logged why
        for worker in server.inference_workers:
            worker.kill()
        raise ValueError(str(error)) from error
