"""Engines that others made, with the shipped configurations: DDP, FSDP2 and ZeRO-3 train as one process does, and runs resume exactly.

Really `accelerate launch`, two processes on the CPU. One step of the data gives the second process a batch without pictures.
"""

from importlib.util import find_spec

import pytest
import torch

from . import engine_jobs
from .engine_jobs import CONNECTORS, STAGES, STEPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    engine_jobs.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    return engine_jobs.parity(folder)


@pytest.fixture(scope="module")
def ddp(folder):
    engine_jobs.launch("ddp", "killed", folder, dies=True)
    return engine_jobs.launch("ddp", "parity_and_resumed", folder)


def assert_as_one_process(found: dict, expected: dict, is_first: bool = True) -> None:
    assert len(found["losses"]) == STEPS
    for step, loss in expected["losses"].items():
        assert found["losses"][step] == pytest.approx(loss, rel=1e-4)
    if not is_first:
        return
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_ddp_trains_as_one_process(connector, ddp, one_process):
    for rank in ddp:
        assert rank["parity"][connector]["wrapper"] == "DistributedDataParallel"
        assert_as_one_process(rank["parity"][connector], one_process[connector])


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_ddp_run_resumes_exactly(stage, ddp):
    for rank in ddp:
        assert_same_run(rank[stage])


def assert_same_run(found: dict) -> None:
    assert len(found["whole"]["losses"]) == STEPS
    assert found["resumed"]["losses"] == found["whole"]["losses"]
    for name, value in found["whole"]["weights"].items():
        assert torch.equal(found["resumed"]["weights"][name], value), name


@pytest.fixture(scope="module")
def fsdp2(folder):
    return engine_jobs.launch("fsdp2", "parity", folder)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_fsdp2_trains_as_one_process(connector, fsdp2, one_process):
    for number, rank in enumerate(fsdp2):
        assert rank[connector]["wrapper"].startswith("FSDP")
        assert_as_one_process(rank[connector], one_process[connector], is_first=number == 0)


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is an optional engine: `pip install deepspeed`")
    folder = tmp_path_factory.mktemp("zero3")
    engine_jobs.write_data(folder)
    return engine_jobs.launch("zero3", "parity", folder, DS_ACCELERATOR="cpu")


@pytest.mark.slow  # DeepSpeed compiles its CPU operators in the first run
@pytest.mark.parametrize("connector", CONNECTORS)
def test_zero3_trains_as_one_process(connector, zero3, one_process):
    for number, rank in enumerate(zero3):
        assert rank[connector]["wrapper"] == "DeepSpeedEngine"
        assert_as_one_process(rank[connector], one_process[connector], is_first=number == 0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    engine_jobs.write_data(folder)
    engine_jobs.launch(None, "killed", folder, dies=True)
    # Bits depend on the number of threads, so this runs as the killed process did.
    return engine_jobs.launch(None, "resumed", folder)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_exactly(stage, alone):
    assert_same_run(alone[stage])
