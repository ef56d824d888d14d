"""Checkpoints as training leaves them: DeepSpeed ZeRO, torch.distributed.checkpoint (FSDP), and Trainer's folders.

DeepSpeed is needed nowhere: the goldens were written by it, other sizes by `zero_writer`.
"""

import json
import pickle
import shutil
import subprocess
import sys
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from transformers import AutoModel

from internvl.conversion.readers.opening import open_source
from internvl.conversion.readers.tensors import TensorReader

from .fixtures_conversions import BoobyTrap, assert_same, json_of, run, weights_of
from .fixtures_published import GOLDEN, published_chat
from .tiny import vision_model
from .zero_writer import write_zero


ZERO_CASES = ("deepspeed_zero2", "deepspeed_zero3")
WRITER = Path(__file__).with_name("distributed_writer.py")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensors_of(source: Path) -> dict[str, torch.Tensor]:
    """All that a source holds, read."""
    tensors = open_source(source).tensors
    reader = TensorReader()
    loaded = {name: tensor.load(reader).clone() for name, tensor in tensors.items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in loaded.items()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }
    return loaded


def random(*shapes: tuple[int, ...], prefix: str = "layer", seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{prefix}.{index}": torch.randn(shape, generator=generator) for index, shape in enumerate(shapes)}


# --------------------------------------------------------------------------------------------------- DeepSpeed goldens
@pytest.fixture(scope="module", params=ZERO_CASES)
def zero_case(request, tmp_path_factory):
    """A golden and what becomes of it."""
    out = tmp_path_factory.mktemp("zero") / "out"
    return GOLDEN / request.param, run(GOLDEN / request.param, out)


def test_a_zero_golden_gives_exactly_the_weights_that_deepspeed_consolidates(zero_case):
    case, out = zero_case
    assert_same(weights_of(out), load_file(case / "expected_fp32.safetensors"))


def test_a_zero_golden_computes_what_was_recorded(zero_case):
    case, out = zero_case
    recorded = load_file(case / "io.safetensors")
    # The frozen part is larger, but loading in its type would lose what was trained.
    model = AutoModel.from_pretrained(out).eval()
    with torch.no_grad():
        outputs = model(recorded["in.pixel_values"], output_hidden_states=True)
    wanted = {name.removeprefix("out."): tensor for name, tensor in recorded.items() if name.startswith("out.")}
    assert wanted
    for name, tensor in wanted.items():
        kind, _, index = name.partition(".")
        found = outputs[kind][int(index)] if index else outputs[kind]
        torch.testing.assert_close(found, tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["latest", "global_step3", "optimizer", "model"])
@pytest.mark.parametrize("case", ZERO_CASES)
def test_any_part_of_a_zero_checkpoint_stands_for_all_of_it(case, place):
    step = GOLDEN / case / "global_step3"
    files = {"optimizer": "*rank_1*_optim_states.pt", "model": "*_model_states.pt"}
    source = next(step.glob(files[place])) if place in files else GOLDEN / case / place
    assert open_source(source).config == json_of(GOLDEN / case)
    assert_same(tensors_of(source), load_file(GOLDEN / case / "expected_fp32.safetensors"))


def test_the_state_of_the_training_is_named_as_left_out(zero_case):
    _, out = zero_case
    left_out = json_of(out, "conversion.json")["left_out"]
    assert left_out == {"state of the training in global_step3": "no weights of the model"}


def test_deepspeed_is_not_imported(zero_case):
    assert not [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]


# ------------------------------------------------------------------------------------ DeepSpeed, other sizes and kinds
GROUPS = [
    random((5, 3), (7,), (1,), (2, 3, 3)),
    random((4,), (3,), (1, 1), prefix="norm", seed=1),
    random((1,), prefix="scale", seed=2),
]
TRAINED = {name: tensor for group in GROUPS for name, tensor in group.items()}
FROZEN = random((3, 5), (1,), prefix="frozen", seed=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_of_any_stage_and_world_size(stage, processes, dtype, tmp_path):
    write_zero(tmp_path, GROUPS, stage, processes, dtype, frozen=FROZEN)
    wanted = {**TRAINED, **{name: tensor.to(dtype) for name, tensor in FROZEN.items()}}
    assert_same(tensors_of(tmp_path), wanted)


@pytest.mark.parametrize(("gap", "strip"), [(0, False), (3, True), (3, False)])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_padding_is_no_part_of_a_weight(processes, gap, strip, tmp_path):
    write_zero(tmp_path, GROUPS, 2, processes, gap=gap, strip=strip)
    assert_same(tensors_of(tmp_path), TRAINED)


@pytest.mark.parametrize("flat_groups", [1, 2, 5])
def test_parts_of_stage_3_may_lie_in_several_flat_tensors(flat_groups, tmp_path):
    write_zero(tmp_path, GROUPS, 3, 2, flat_groups=flat_groups)
    assert_same(tensors_of(tmp_path), TRAINED)


@pytest.mark.parametrize("stage", [2, 3])
def test_shared_parameters_and_buffers_are_there(stage, tmp_path):
    buffers = {"norm.running_mean": torch.rand(4).bfloat16().float(), "norm.num_batches_tracked": torch.tensor(3)}
    write_zero(tmp_path, GROUPS, stage, 2, buffers=buffers, shared={"lm_head.weight": "layer.0"})
    assert_same(tensors_of(tmp_path), {**TRAINED, **buffers, "lm_head.weight": TRAINED["layer.0"]})


def test_without_optimizer_states_the_copies_of_the_training_are_taken_and_it_is_said(tmp_path):
    place = write_zero(tmp_path, GROUPS, 2, 2)
    for file in place.glob("*_optim_states.pt"):
        file.unlink()
    assert_same(tensors_of(tmp_path), {name: tensor.bfloat16() for name, tensor in TRAINED.items()})
    assert open_source(tmp_path).left_out["float32 weights of global_step7"] == "no *_optim_states.pt holds them"


def test_a_checkpoint_folder_of_the_trainer_with_parts_of_deepspeed(tmp_path):
    model = vision_model()
    checkpoint = tmp_path / "checkpoint-7"
    place = write_zero(checkpoint, [dict(model.state_dict())], 3, 2)
    model.config.save_pretrained(checkpoint)
    (checkpoint / "latest").unlink()
    for source in (checkpoint, place, tmp_path):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert_same(weights_of(run(source, tmp_path / "out")), model.state_dict())


def test_a_chat_model_comes_back_with_its_tokenizer(tmp_path):
    source = published_chat(tmp_path)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    write_zero(source, [tensors], 2, 2)
    out = run(source, tmp_path / "out")
    assert_same(weights_of(out), tensors)
    assert (out / "processor_config.json").is_file()


@pytest.mark.parametrize("stage", [2, 3])
def test_moments_of_the_optimizer_are_not_read(stage, tmp_path, monkeypatch):
    """Only the stretches that a tensor needs are touched: each is cut out of memory-mapped tensors."""
    maps = []
    load = torch.load

    def watched(*arguments, **settings):
        maps.append(settings["mmap"])
        return load(*arguments, **settings)

    write_zero(tmp_path, GROUPS, stage, 2)
    monkeypatch.setattr(torch, "load", watched)
    tensors_of(tmp_path)
    assert maps
    assert all(maps)


# -------------------------------------------------------------------------------------------------- DeepSpeed, refused
def optimizer_file(place: Path, rank: int) -> Path:
    return next(place.glob(f"*rank_{rank}_*_optim_states.pt"))


def assert_refused(source: Path, kind: type[Exception], pattern: str) -> None:
    with pytest.raises(kind, match=pattern):
        open_source(source)


@pytest.mark.parametrize(("stage", "ranks"), [(1, [1]), (2, [1]), (3, [1]), (3, [0, 1, 2])])
def test_missing_ranks_are_named(stage, ranks, tmp_path):
    place = write_zero(tmp_path, GROUPS, stage, 3)
    for rank in ranks:
        optimizer_file(place, rank).unlink()
    lacking = ", ".join(map(str, ranks))
    assert_refused(tmp_path, OSError, rf"written by 3 processes, and lacks the \*_optim_states.pt of rank {lacking}\.")


def test_a_missing_model_file_is_named(tmp_path):
    place = write_zero(tmp_path, GROUPS, 3, 2, frozen=FROZEN)
    (place / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    assert_refused(tmp_path, OSError, r"lacks the \*_model_states.pt of rank 1")
    (place / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    assert_refused(tmp_path, OSError, "lacks the model states of rank 0")


def test_files_of_a_larger_run_are_named(tmp_path):
    place = write_zero(tmp_path / "a", GROUPS, 2, 2)
    other = write_zero(tmp_path / "b", GROUPS, 2, 3)
    shutil.copy(optimizer_file(other, 0), place / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt")
    assert_refused(
        tmp_path / "a", ValueError, "do not belong together: .*number of processes.* rank 0: 2; .*rank 2: 3"
    )
    shutil.copy(optimizer_file(place, 0), place / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt")
    assert_refused(tmp_path / "a", ValueError, "files of another run: bf16_zero_pp_rank_2")


def test_a_file_of_another_world_size_is_an_error(tmp_path):
    place = write_zero(tmp_path / "a", GROUPS, 3, 2)
    shutil.copy(optimizer_file(write_zero(tmp_path / "b", GROUPS, 3, 4), 1), place)
    assert_refused(tmp_path / "a", ValueError, "number of processes.* rank 0: 2; rank 1: 4")


SHORTER = [{name: tensor[..., :1] for name, tensor in group.items()} for group in GROUPS]


@pytest.mark.parametrize(
    ("stage", "groups", "pattern"),
    [
        (2, SHORTER, "fewer numbers than|do not belong together"),
        (3, SHORTER, "fewer numbers than|do not belong together"),
        (2, GROUPS[:2], "3 optimizer groups in the model states, 2, 2 in the optimizer states"),
    ],
    ids=["shorter-2", "shorter-3", "fewer-groups"],
)
def test_optimizer_states_of_another_model_are_an_error(stage, groups, pattern, tmp_path):
    place = write_zero(tmp_path / "a", GROUPS, stage, 2)
    for file in write_zero(tmp_path / "b", groups, stage, 2).glob("*_optim_states.pt"):
        shutil.copy(file, place)
    assert_refused(tmp_path / "a", ValueError, pattern)


@pytest.mark.parametrize("which", ["optimizer", "model"])
def test_a_truncated_file_is_named(which, tmp_path):
    place = write_zero(tmp_path, GROUPS, 2, 2)
    file = optimizer_file(place, 1) if which == "optimizer" else place / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert_refused(tmp_path, OSError, f"{file.name}` is no complete PyTorch file")


@pytest.mark.parametrize(
    "name",
    ["mp_rank_01_model_states.pt", "layer_00-model_00-model_states.pt", "expp_rank_0_mp_rank_00_optim_states.pt"],
)
def test_other_kinds_of_parallel_training_are_refused(name, tmp_path):
    place = write_zero(tmp_path, GROUPS, 2, 1)
    shutil.copy(place / "mp_rank_00_model_states.pt", place / name)
    assert_refused(tmp_path, ValueError, f"tensor, pipeline or expert parallel.*{name}")


@pytest.mark.parametrize("tag", ["../other", "/etc", "..", "a/b", "a\\b", ""])
def test_latest_cannot_point_outside(tag, tmp_path):
    write_zero(tmp_path / "other", GROUPS, 2, 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text(tag)
    assert_refused(tmp_path / "run", ValueError, "points outside its folder")


def test_latest_names_a_folder_that_is_there_or_one_of_several_must_be_named(tmp_path):
    for step in (7, 14):
        write_zero(tmp_path, GROUPS, 2, 1, tag=f"global_step{step}")
    (tmp_path / "latest").write_text("global_step8")
    assert_refused(tmp_path, OSError, "names `global_step8`, which")
    (tmp_path / "latest").unlink()
    assert_refused(tmp_path, ValueError, "holds several checkpoints: global_step14, global_step7. Give one")
    assert_same(tensors_of(tmp_path / "global_step14"), TRAINED)


def test_a_booby_trapped_optimizer_state_is_refused_by_name_and_not_run(tmp_path):
    write_zero(tmp_path, GROUPS, 2, 1, extra={"clip_grad": BoobyTrap(tmp_path / "sprung")})
    assert_refused(tmp_path, ValueError, r"optim_states.pt` was refused: .*\((posix|nt)\.mkdir\)")
    assert not (tmp_path / "sprung").exists()


class Unknown:
    """Of no class that a checkpoint needs."""


def test_classes_that_no_checkpoint_needs_are_refused_by_name(tmp_path):
    write_zero(tmp_path, GROUPS, 2, 1, extra={"clip_grad": Unknown()})
    assert_refused(tmp_path, ValueError, rf"was refused: .*\({__name__}\.Unknown\)")


# ---------------------------------------------------------------------------------------- torch.distributed.checkpoint
class Blocks(torch.Tensor):
    """A tensor that saves itself in blocks, as one that is cut along two dimensions on four devices."""

    def blocks(self) -> list[ChunkStorageMetadata]:
        rows, columns = ([(0, size - size // 3), (size - size // 3, size // 3)] for size in self.shape)
        return [
            ChunkStorageMetadata(torch.Size([top, left]), torch.Size([height, width]))
            for (top, height), (left, width) in product(rows, columns)
        ]

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.as_subclass(torch.Tensor))
        return [
            WriteItem(
                index=MetadataIndex(fqn, block.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(block, properties, self.size()),
            )
            for block in self.blocks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self.blocks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        block = next(block for block in self.blocks() if block.offsets == index.offset)
        places = tuple(slice(start, start + size) for start, size in zip(block.offsets, block.sizes, strict=True))
        return self.as_subclass(torch.Tensor)[places].clone()


def save(content: dict, folder: Path, **settings) -> Path:
    """A checkpoint of one process."""
    dcp.save(content, storage_writer=dcp.FileSystemWriter(folder, **settings), no_dist=True)
    return folder


MOMENTS = {"state": {"layer.0": {"exp_avg": torch.ones(5, 3)}}, "param_groups": [{"lr": 0.1}]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model's weights, and checkpoints of it that two processes wrote."""
    folder = tmp_path_factory.mktemp("distributed")
    model = vision_model()
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    done = subprocess.run([sys.executable, str(WRITER), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for kind in ("fsdp", "dimensions"):
        model.config.save_pretrained(folder / kind / "checkpoint-7")
    return folder


@pytest.mark.parametrize("kind", ["fsdp", "dimensions"])
def test_shards_of_two_processes_make_the_model(kind, written, tmp_path):
    source = written / kind / "checkpoint-7"
    assert len(list(source.rglob("*.distcp"))) == (4 if kind == "fsdp" else 2)
    assert_same(weights_of(run(source, tmp_path / "out")), load_file(written / "model.safetensors"))


@pytest.mark.parametrize(
    "place", ["pytorch_model_fsdp_0", "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__1_0.distcp"]
)
def test_any_part_of_a_distributed_checkpoint_stands_for_all_of_it(place, written):
    source = written / "fsdp" / "checkpoint-7" / place
    assert open_source(source).config["hidden_size"] == 32
    assert_same(tensors_of(source), load_file(written / "model.safetensors"))


@pytest.mark.parametrize("wrapper", [(), ("model",), ("state_dict",), ("app", "model")])
def test_wrapping_keys_are_taken_off(wrapper, tmp_path):
    content = dict(TRAINED)
    for key in reversed(wrapper):
        content = {key: content}
    assert_same(tensors_of(save(content, tmp_path)), TRAINED)


def test_what_only_looks_like_a_wrapper_stays(tmp_path):
    """The decoder of the LLaVA code base keeps its parameters under `model.`."""
    tensors = {f"model.{name}": tensor for name, tensor in TRAINED.items()}
    assert_same(tensors_of(save(tensors, tmp_path / "plain")), tensors)
    assert_same(tensors_of(save({"model": tensors}, tmp_path / "wrapped")), tensors)


def test_the_optimizer_is_named_as_left_out(tmp_path):
    source = save({"model": TRAINED, "optimizer": MOMENTS, "step": 3}, tmp_path / "saved")
    assert_same(tensors_of(source), TRAINED)
    assert open_source(source).left_out == {
        "optimizer in saved": "no weights of the model",
        "step in saved": "no weights of the model",
    }


def test_what_is_no_tensor_in_the_model_is_named(tmp_path):
    source = save({"model": {**TRAINED, "layer._extra_state": {"a": 1}}}, tmp_path / "saved")
    assert_same(tensors_of(source), TRAINED)
    assert "layer._extra_state.a in saved" in open_source(source).left_out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_types_and_scalars_are_kept(dtype, tmp_path):
    tensors = {"scalar": torch.tensor(3).to(dtype), "matrix": torch.ones(2, 3).to(dtype)}
    assert_same(tensors_of(save(tensors, tmp_path)), tensors)


def test_blocks_along_two_dimensions_are_joined(tmp_path):
    tensor = torch.arange(35.0).reshape(5, 7)
    source = save({"model": {"matrix": tensor.as_subclass(Blocks)}}, tmp_path)
    metadata = pickle.loads((source / ".metadata").read_bytes())
    assert len(metadata.state_dict_metadata["model.matrix"].chunks) == 4
    assert_same(tensors_of(source), {"matrix": tensor})


def test_several_files_of_one_process_are_read(tmp_path):
    source = save({"model": TRAINED}, tmp_path, single_file_per_rank=False)
    assert len(open_source(source).files) == len(TRAINED)
    assert_same(tensors_of(source), TRAINED)


def test_the_full_state_of_fsdp_is_read(tmp_path):
    torch.save(TRAINED, tmp_path / "pytorch_model_fsdp.bin")
    torch.save(MOMENTS, tmp_path / "optimizer.bin")
    assert_same(tensors_of(tmp_path), TRAINED)


# ------------------------------------------------------------------------------- torch.distributed.checkpoint, refused
@contextmanager
def changed_metadata(folder: Path, protocol: int | None = None):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    yield metadata
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))


@pytest.fixture
def saved(tmp_path):
    return save({"model": TRAINED}, tmp_path / "saved")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_booby_trapped_description_is_refused_by_name_and_not_run(protocol, saved, tmp_path):
    with changed_metadata(saved, protocol) as metadata:
        metadata.planner_data = BoobyTrap(tmp_path / "sprung")
    assert_refused(saved, ValueError, r"\.metadata` was refused: .*`(posix|nt)\.mkdir`")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "name", ["builtins\neval", "torch\nload", "os\nsystem", "torch.distributed.checkpoint.metadata\npickle"]
)
def test_only_the_classes_of_a_description_are_known(name, saved):
    (saved / ".metadata").write_bytes(b"c" + name.encode() + b"\n(Vx\ntR.")
    assert_refused(saved, ValueError, rf"was refused: .*`{name.splitlines()[0]}\.{name.splitlines()[1]}`")


def test_a_booby_trapped_shard_is_refused_by_name_and_not_run(saved, tmp_path):
    trapped = tmp_path / "trapped.pt"
    torch.save(BoobyTrap(tmp_path / "sprung"), trapped)
    file = saved / "__0_0.distcp"
    start = file.stat().st_size
    file.write_bytes(file.read_bytes() + trapped.read_bytes())

    with changed_metadata(saved) as metadata:
        info = next(info for index, info in metadata.storage_data.items() if index.fqn == "model.layer.0")
        info.offset, info.length = start, trapped.stat().st_size
    with pytest.raises(ValueError, match=r"__0_0.distcp` was refused: .*\((posix|nt)\.mkdir\)"):
        tensors_of(saved)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "path", ["../saved/__0_0.distcp", "/etc/x.distcp", "sub/__0_0.distcp", "..\\x.distcp", "passwords"]
)
def test_a_description_cannot_point_outside(path, saved):
    with changed_metadata(saved) as metadata:
        next(iter(metadata.storage_data.values())).relative_path = path
    assert_refused(saved, ValueError, "points outside its folder")


def test_a_file_of_a_rank_that_is_truncated_or_missing_is_named(saved):
    file = saved / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(saved, OSError, "files that are not complete: __0_0.distcp")
    file.unlink()
    assert_refused(saved, OSError, "lacks files of ranks: __0_0.distcp")


def test_a_missing_description_is_an_error(saved):
    (saved / ".metadata").unlink()
    assert_refused(saved, OSError, r"lacks `.metadata`: it was not written to its end")
    assert_refused(saved / "__0_0.distcp", OSError, r"lacks `.metadata`")


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle", "half"])
def test_a_damaged_description_is_an_error(content, saved):
    whole = (saved / ".metadata").read_bytes()
    (saved / ".metadata").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert_refused(saved, OSError, r"\.metadata` is no complete description")


def test_something_else_under_that_name_is_refused(saved):
    (saved / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    assert_refused(saved, ValueError, "must describe a checkpoint of torch.distributed.checkpoint, got a dict")


@pytest.mark.parametrize("change", ["hole", "overlap", "beyond"])
def test_chunks_must_fill_a_tensor_exactly(change, tmp_path):
    source = save({"model": {"matrix": torch.zeros(5, 7).as_subclass(Blocks)}}, tmp_path)

    with changed_metadata(source) as metadata:
        entry = metadata.state_dict_metadata["model.matrix"]
        if change == "hole":
            entry.chunks.pop()
        elif change == "overlap":
            entry.chunks[-1] = entry.chunks[0]
        else:
            entry.size = torch.Size([35, 1])
    assert_refused(source, ValueError, "must describe all of `model.matrix`")


def test_a_shard_of_another_shape_is_an_error(saved):
    with changed_metadata(saved) as metadata:
        infos = {index.fqn: info for index, info in metadata.storage_data.items()}
        vars(infos["model.layer.0"]).update(vars(infos["model.layer.1"]))
    with pytest.raises(ValueError, match=r"must hold \(5, 3\) torch.float32 for `model.layer.0`, got \(7,\)"):
        tensors_of(saved)


def test_a_folder_with_the_optimizer_alone_is_refused(tmp_path):
    assert_refused(save({"optimizer": MOMENTS}, tmp_path), ValueError, "holds no model, only optimizer")


def test_one_of_several_models_must_be_named(tmp_path):
    for index in range(2):
        save({"model": TRAINED}, tmp_path / f"pytorch_model_fsdp_{index}")
    assert_refused(tmp_path, ValueError, "several models: pytorch_model_fsdp_0, pytorch_model_fsdp_1. Give one")


def test_compressed_shards_are_refused(saved):
    with changed_metadata(saved) as metadata:
        next(iter(metadata.storage_data.values())).transform_descriptors = ["stream.zstd"]
    assert_refused(saved, ValueError, "stream.zstd.*is not read")


# --------------------------------------------------------------------------------------------------- Trainer's folders
STATES = ("optimizer.pt", "rng_state.pth", "rng_state_1.pth", "scaler.pt", "scheduler.pt", "training_args.bin")


def write_checkpoint(folder: Path, trap: Path | None = None, **settings) -> dict[str, torch.Tensor]:
    """A `checkpoint-N` as Trainer leaves it; what is no weights would spring a trap."""
    model = vision_model()
    model.save_pretrained(folder, **settings)
    for name in STATES:
        torch.save(BoobyTrap(trap or folder / "sprung"), folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    return dict(model.state_dict())


@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "20kB"}], ids=["single", "sharded"])
def test_of_a_checkpoint_of_the_trainer_only_the_weights_count(settings, tmp_path):
    tensors = write_checkpoint(tmp_path / "checkpoint-7", tmp_path / "sprung", **settings)
    out = run(tmp_path / "checkpoint-7", tmp_path / "out")
    assert_same(weights_of(out), tensors)
    assert not (tmp_path / "sprung").exists()
    assert json_of(out, "conversion.json")["left_out"].keys() == set(STATES)


def test_weights_in_a_loose_file_are_found_beside_the_state_of_the_training(tmp_path):
    tensors = write_checkpoint(tmp_path, tmp_path / "sprung")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "weights.pth")
    assert_same(tensors_of(tmp_path), tensors)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("other", ["zero", "checkpoints"])
def test_weights_come_before_parts_of_a_training_and_checkpoints_beside_them(other, tmp_path):
    tensors = write_checkpoint(tmp_path)
    if other == "zero":
        write_zero(tmp_path, GROUPS, 2, 1)
    else:
        for step in (7, 14):
            (tmp_path / f"checkpoint-{step}").mkdir()
    assert_same(tensors_of(tmp_path), tensors)


def test_the_only_checkpoint_of_an_output_folder_is_taken_and_one_of_several_must_be_named(tmp_path):
    tensors = write_checkpoint(tmp_path / "checkpoint-7")
    (tmp_path / "runs").mkdir()
    assert_same(tensors_of(tmp_path), tensors)
    for step in (70, 14):
        shutil.copytree(tmp_path / "checkpoint-7", tmp_path / f"checkpoint-{step}")
    torch.save({}, tmp_path / "training_args.bin")
    assert_refused(tmp_path, ValueError, "several checkpoints: checkpoint-7, checkpoint-14, checkpoint-70. Give one")
