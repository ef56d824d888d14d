"""What every test shares: the folder of the repository, and skips for machines that lack a device."""

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
    """The folders of all stages of the default run, at the size of `fixtures_default_run.tiny_run`; not to be written to."""
    from internvl.training.default_run import train

    from .fixtures_default_run import few_scenes_and_one_thread, tiny_run

    folder = tmp_path_factory.mktemp("default_run")
    with few_scenes_and_one_thread():
        train(tiny_run(), folder, use_bf16=False)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked `gpu` where there is none, so that `make test-all` runs anywhere."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
