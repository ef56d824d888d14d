"""What every test shares: the folder of the repository, the cores of the machine, and skips for machines that lack a
device.
"""

import os
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository, which is also the default checkpoint."""
    return ROOT


@pytest.fixture(scope="session")
def finished_default_run(tmp_path_factory) -> Path:
    """The folders of all stages of the bundled run, at the size of `fixtures_bundled_run.tiny_run`; not to be written
    to.
    """
    from internvl.reproduction.run import train_all_stages

    from .fixtures_bundled_run import few_scenes_and_one_thread, tiny_run

    folder = tmp_path_factory.mktemp("default_run")
    with few_scenes_and_one_thread():
        train_all_stages(tiny_run(), folder)
    return folder


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
