"""Command line: `python -m internvl.serving page`, or `make app`.

Serves until it is stopped; Gradio lies in an environment of its own, which `make app` sets up.
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

from ...chat import DEFAULT_CHECKPOINT, check_model
from ...evaluation.commands import positive
from ...extras import MissingLibraryError


# Set by whoever starts the page for other apps; they would open folders, or share it with the world.
GRADIO_VARIABLES = ("GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_ROOT_PATH", "GRADIO_NUM_WORKERS")


def add_app_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "--model", nargs="+", metavar="MODEL",
        help="folders or Hub names: a chat model, an InternVL-C or -G, or one of each (default: the bundled ones)",
    )  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder that visitors may search")
    parser.add_argument("--index", type=Path, metavar="DIR", help="keep the embeddings of --images there")
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME", help="to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=positive, default=7860, metavar="N", help="(default: 7860)")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="longest answer (default: 256)"
    )
    parser.add_argument("--max-num", type=positive, metavar="N", help="most tiles of an image (1: no tiling)")
    parser.add_argument(
        "--max-seconds",
        type=positive,
        default=120,
        metavar="N",
        help="longest wait for an answer (default: 120)",
    )
    parser.add_argument(
        "--queue", type=positive, default=32, metavar="N", help="requests that wait at most (default: 32)"
    )


def run(options: argparse.Namespace) -> None:
    """Serves the page until the process is asked to stop."""
    for name in GRADIO_VARIABLES:
        os.environ.pop(name, None)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingLibraryError(
            "The page needs Gradio, which is not installed: `make app` makes an environment that has it.",
            name=error.name,
        ) from error
    from transformers.utils import logging

    from .layout import build, launch
    from .tasks import load_tasks

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    models = options.model or [DEFAULT_CHECKPOINT, DEFAULT_CHECKPOINT / "internvl_g"]
    if not options.model:
        check_model(DEFAULT_CHECKPOINT)
    chat_settings = {name: getattr(options, name) for name in ("max_new_tokens", "max_num", "max_seconds")}
    tasks = load_tasks(models, options.images, options.index, **chat_settings)
    with tempfile.TemporaryDirectory(prefix="internvl-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(tasks, None if options.model else DEFAULT_CHECKPOINT / "examples", options.queue)
        address = launch(page, options.host, options.port, folder)
        sys.stdout.write(f"Serving at {address} until Ctrl+C.\n")
        sys.stdout.flush()
        _wait()
        page.close()


def _wait() -> None:
    """Waits for SIGINT or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.wait(1):  # a signal is handled between waits
        pass
