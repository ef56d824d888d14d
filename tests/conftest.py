"""What every test shares: the folder of the repository, the cores of the machine, and skips for machines that lack a
device.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers.utils import logging


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository, which is also the default checkpoint."""
    return ROOT


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills, once for all workers of pytest-xdist; not to be written to."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(shared / f"{name}.lock"):
        if not (shared / name).exists():
            unfinished = tmp_path_factory.mktemp(f"unfinished_{name}")
            make(unfinished)
            unfinished.rename(shared / name)
    return shared / name


@pytest.fixture(scope="session")
def finished_default_run(tmp_path_factory) -> Path:
    """The folders of all stages of the bundled run, at the size of `fixtures_bundled_run.tiny_run`."""
    from internvl.reproduction.run import train_all_stages

    from .fixtures_bundled_run import few_scenes_and_one_thread, tiny_run

    with few_scenes_and_one_thread():
        return made_once(tmp_path_factory, "default_run", lambda folder: train_all_stages(tiny_run(), folder))


@pytest.fixture(scope="session")
def on_two(tmp_path_factory) -> list[dict]:
    """What each job of `two_processes.JOBS` found on either rank."""
    from . import two_processes

    folder = made_once(tmp_path_factory, "on_two", lambda folder: two_processes.run("every_job", folder))
    return two_processes.results(folder)


@pytest.fixture(autouse=True)
def _what_a_command_silences_speaks_again() -> Iterator[None]:
    """A command turns off what transformers says for its whole process, which other tests share."""
    verbosity, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    if has_progress_bar:
        logging.enable_progress_bar()


@pytest.fixture
def vit(tmp_path) -> Path:
    """A published InternViT, which the test may change."""
    from .fixtures_published import published

    return published("intern_vit_6b", tmp_path)


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist share the cores, which torch would otherwise take in each of them and in the processes
    they start.
    """
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if num_workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_workers)))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked `gpu` where there is none, so that `make test-all` runs anywhere."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
