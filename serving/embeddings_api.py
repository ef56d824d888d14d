"""`python -m internvl.serving embeddings MODEL`: an embeddings API in the form of OpenAI's, by LitServe."""

import argparse
import os
from dataclasses import fields
from pathlib import PurePath

from ..evaluation.commands import DTYPES, positive
from ..extras import extra


HOSTS = ("127.0.0.1", "0.0.0.0", "::")  # those that LitServe takes
MODES = ("C", "G", "InternVL-C", "InternVL-G")


def _port(text: str) -> int:
    value = int(text)
    if not 1024 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not from 1024 to 65535")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 10**6:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def add_embeddings_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of an InternVL-C or -G")
    parser.add_argument("--subfolder", default="", help="where in the folder the model lies")
    parser.add_argument("--name", help="under which it is served (default: that of the folder)")
    parser.add_argument("--mode", choices=MODES, help="of images (default: the configuration's)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they are saved)")
    parser.add_argument("--host", choices=HOSTS, default=HOSTS[0], help=f"(default: {HOSTS[0]}, this machine alone)")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="(default: 8000)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    numbers = {
        "workers": (1, "copies of the model for each device, a process each"),
        "max-batch-size": (32, "texts and images that a worker takes at once"),
        "max-body-bytes": (32 * 2**20, "of a request"),
        "max-connections": (256, "at a time; more are answered by 503"),
        "max-inputs": (256, "texts and images of a request"),
        "max-characters": (32_768, "of a text"),
        "max-image-bytes": (20 * 2**20, "of an image that is fetched"),
        "max-image-pixels": (64_000_000, "of an image"),
    }
    counts = {
        "max-image-urls": (16, "addresses of a request; 0 fetches none"),
        "image-cache-bytes": (0, "of features of images that a worker keeps for when they come again; 0 keeps none"),
    }
    seconds = {
        "timeout": (60, "until a request is answered by 504"),
        "batch-wait": (0.005, "for a batch to fill"),
        "download-seconds": (10, "for an image to be fetched"),
    }
    for kind, metavar, table in ((positive, "N", numbers), (_count, "N", counts), (_seconds, "SECONDS", seconds)):
        for name, (default, summary) in table.items():
            shown = f"{summary} (default: {default})"
            parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=shown)
    levels = ("critical", "error", "warning", "info", "debug")
    parser.add_argument("--log-level", choices=levels, default="warning", help="(default: warning)")


def run(options: argparse.Namespace) -> None:
    """Serves until it is stopped.

    Raises:
        OSError: If there is no such model.
        ValueError: If it is of another kind, or has no queries for mode G.
    """
    from transformers import AutoProcessor

    from ..evaluation.embeddings import ModelPlace
    from ..kinds import check_kind
    from ..modeling_internvl import check_mode
    from .embedding_requests import EmbeddingLimits, RequestReader

    config = check_kind(
        options.model, "InternVL-C", "InternVL-G", door="an embeddings API", subfolder=options.subfolder
    )
    mode = check_mode(options.mode or config.default_mode)
    if mode == "InternVL-G" and not config.has_queries:
        raise ValueError(f"{options.model} is InternVL-C alone: its model has no queries, which mode G reads.")
    with extra("serving"):
        from .embedding_engine import Door, serve
    limits = EmbeddingLimits(**{one.name: getattr(options, one.name) for one in fields(EmbeddingLimits)})
    name = options.name or PurePath(os.path.abspath(options.model), options.subfolder).name
    place = ModelPlace(options.model, options.subfolder, options.dtype)
    processor = AutoProcessor.from_pretrained(options.model, subfolder=options.subfolder)
    serve(Door(place, mode, RequestReader(name, config, limits), processor), options)
