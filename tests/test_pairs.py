"""Streams of image-text pairs: each pair once over ranks and workers, exact resumption, broken samples, flat
memory."""

import copy
import io
import json
import logging
import tracemalloc
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import skip_first_batches
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info
from transformers import TrainingArguments

from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.processing_internvl import InternVLProcessor
from internvl.rows.bad_rows import BadRows, TooManyBadRowsError
from internvl.rows.shards import find_shards, read_shard
from internvl.training import stages
from internvl.training.data.filters import Filter, Funnel, MissingColumnError
from internvl.training.data.negatives import _entries_of
from internvl.training.data.pairs import PairCollator, PairStream
from internvl.training.recipes import stage2_small

from .engine_jobs import StreamTrainer
from .fixtures_pairs import png, sample, write_parquet, write_tar
from .fixtures_text import make_tokenizer


def write_corpus(folder: Path, shards: int, per_shard: int, kind: str = "tar") -> str:
    """Shards of unequal length; every caption is there once."""
    number = 0
    for shard in range(shards):
        numbers = list(range(number, number + per_shard + shard % 2))
        if kind == "tar":
            write_tar(folder / f"{shard:03d}.tar", [sample(n) for n in numbers], number)
        else:
            write_parquet(folder / f"{shard:03d}.parquet", numbers)
        number += len(numbers)
    return str(folder / f"*.{kind}")


def captions(total: int) -> list[str]:
    return [f"caption {number}" for number in range(total)]


def texts(pairs) -> list[str]:
    return [pair["text"] for pair in pairs]


# ---------------------------------------------------------------------------------------------------------- once each
@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("shards", [4, 5])  # shared out whole, and read by every rank
def test_two_ranks_with_two_workers_see_every_pair_once(tmp_path, kind, shards):
    pattern = write_corpus(tmp_path, shards, 5, kind)
    total = sum(1 for shard in find_shards(pattern) for _ in read_shard(shard))
    by_reader = Counter()
    seen = []
    for rank in range(2):
        stream = PairStream(pattern, rank=rank, world_size=2, shuffle_buffer=3, epochs=1)
        loader = DataLoader(stream, batch_size=1, num_workers=2, collate_fn=with_worker)
        for worker, pair in loader:
            by_reader[rank, worker] += 1
            seen.append(pair["text"])
    assert sorted(seen) == sorted(captions(total))
    assert len(by_reader) == 4


def with_worker(items: list) -> tuple[int, dict]:
    return get_worker_info().id, items[0]


def test_pairs_hold_what_the_shards_hold(tmp_path):
    for kind in ("tar", "parquet"):
        pattern = write_corpus(tmp_path, 1, 3, kind)
        pairs = list(PairStream(pattern, shuffle_buffer=1, epochs=1))
        assert texts(pairs) == captions(3)
        assert [pair["image"].getpixel((0, 0)) for pair in pairs] == [(number, 0, 7) for number in range(3)]
        assert [pair["shard"] for pair in pairs] == [str(tmp_path / f"000.{kind}")] * 3


def test_epochs_give_the_same_pairs_in_a_new_order(tmp_path):
    pattern = write_corpus(tmp_path, 3, 6)
    total = len(texts(PairStream(pattern, epochs=1)))
    twice = texts(PairStream(pattern, epochs=2, shuffle_buffer=4))
    assert sorted(twice[:total]) == sorted(twice[total:]) == sorted(captions(total))
    assert twice[:total] != twice[total:]
    assert twice[:total] != captions(total)


def test_a_stream_without_end_goes_on(tmp_path):
    pattern = write_corpus(tmp_path, 2, 3)
    endless = iter(PairStream(pattern))
    assert len([next(endless)["text"] for _ in range(30)]) == 30


def test_seeds_and_epochs_decide_the_order(tmp_path):
    pattern = write_corpus(tmp_path, 3, 6)
    first, again, other = (texts(PairStream(pattern, seed=seed, epochs=1)) for seed in (0, 0, 1))
    assert first == again != other
    stream = PairStream(pattern, epochs=1)
    stream.set_epoch(1)
    assert texts(stream) == texts(PairStream(pattern, epochs=2))[len(first) :]


def test_more_workers_than_shards_end_without_a_fault(tmp_path):
    loader = DataLoader(PairStream(write_corpus(tmp_path, 1, 3)), batch_size=None, num_workers=2)
    assert [pair["text"] for pair, _ in zip(loader, range(5), strict=False)][:3]


# -------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    ("kind", "world_size", "shards"), [("tar", 1, 3), ("parquet", 1, 3), ("tar", 2, 3), ("tar", 2, 4)]
)
def test_a_resumed_stream_gives_the_remaining_pairs(tmp_path, kind, world_size, shards):
    pattern = write_corpus(tmp_path, shards, 5, kind)

    def stream() -> PairStream:
        return PairStream(pattern, rank=world_size - 1, world_size=world_size, shuffle_buffer=4, epochs=2, seed=3)

    whole = texts(stream())
    for stop in range(len(whole) + 1):
        first = stream()
        pairs = iter(first)
        begun = [next(pairs)["text"] for _ in range(stop)]
        state = json.loads(json.dumps(first.state_dict()))
        second = stream()
        second.load_state_dict(state)
        assert begun + texts(second) == whole, f"stopped after {stop}"
        assert second.bad_rows.seen == len(whole)


def test_workers_resume_where_they_stopped(tmp_path):
    pattern = write_corpus(tmp_path, 4, 5)

    def stream() -> PairStream:
        return PairStream(pattern, shuffle_buffer=4, epochs=1)

    whole = [item["text"] for _, _, item in DataLoader(stream(), 1, num_workers=2, collate_fn=with_state)]
    states, begun = {}, []
    for index, (worker, state, item) in enumerate(DataLoader(stream(), 1, num_workers=2, collate_fn=with_state)):
        begun.append(item["text"])
        states[worker] = state
        if index == 9:
            break

    def resume(worker: int) -> None:
        get_worker_info().dataset.load_state_dict(states[worker])

    rest = DataLoader(stream(), 1, num_workers=2, collate_fn=with_state, worker_init_fn=resume)
    assert begun + [item["text"] for _, _, item in rest] == whole


def with_state(items: list) -> tuple[int, dict, dict]:
    worker = get_worker_info()
    return worker.id, worker.dataset.state_dict(), items[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_loaders_resume_exactly(tmp_path, workers):
    stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")
    pattern = write_corpus(tmp_path, 4, 5)

    def loader():
        stream = PairStream(pattern, shuffle_buffer=4, epochs=1)
        return stateful_dataloader.StatefulDataLoader(stream, batch_size=2, num_workers=workers, collate_fn=texts)

    whole = list(loader())
    for stop in (1, 5, len(whole) - 1):
        first = loader()
        batches = iter(first)
        begun = [next(batches) for _ in range(stop)]
        second = loader()
        second.load_state_dict(first.state_dict())
        assert begun + list(second) == whole


def test_a_position_of_other_readers_is_refused(tmp_path):
    pattern = write_corpus(tmp_path, 2, 3)
    state = PairStream(pattern, rank=0, world_size=2).state_dict()
    with pytest.raises(ValueError, match="as many processes and workers"):
        PairStream(pattern, rank=1, world_size=2).load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------- broken
BROKEN = {
    "truncated image": {"png": png(1, 64)[:60]},
    "no image": {"png": None},
    "no caption": {"txt": None},
    "empty caption": {"txt": b" \n"},
    "caption in another encoding": {"txt": b"\xff\xfe"},
    "broken metadata": {"json": b"{"},
    "metadata that is a list": {"json": b"[]"},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_samples_are_left_out_and_counted(tmp_path, fault):
    samples = [sample(0), sample(1, **BROKEN[fault]), sample(2)]
    stream = PairStream(str(write_tar(tmp_path / "a.tar", samples)), shuffle_buffer=1, epochs=1)
    assert texts(stream) == ["caption 0", "caption 2"]
    assert (stream.bad_rows.seen, stream.bad_rows.broken) == (3, 1)
    assert sum(stream.bad_rows.reasons.values()) == 1


def test_a_shard_that_ends_too_early_does_not_hide_the_next(tmp_path, caplog):
    whole = write_tar(tmp_path / "a.tar", [sample(number) for number in range(3)])
    whole.write_bytes(whole.read_bytes()[:5000])
    write_tar(tmp_path / "b.tar", [sample(number) for number in range(10, 13)])
    (tmp_path / "c.tar").write_bytes(b"not a tar file at all" * 40)
    stream = PairStream(str(tmp_path / "*.tar"), shuffle_buffer=1, epochs=1)
    with caplog.at_level(logging.WARNING):
        found = texts(stream)
    assert found[-3:] == ["caption 10", "caption 11", "caption 12"]
    assert stream.bad_rows.broken == 2
    assert stream.bad_rows.reasons == {"The shard is damaged": 2}


def test_too_many_broken_samples_end_the_run_and_say_why(tmp_path):
    samples = [sample(number, **({"txt": b""} if number % 5 == 0 else {})) for number in range(50)]
    path = str(write_tar(tmp_path / "a.tar", samples))
    allowed = PairStream(path, epochs=1, bad_rows=BadRows(max_rate=0.2, grace=50))
    assert len(list(allowed)) == 40
    with pytest.raises(
        TooManyBadRowsError, match=r"(?s)6 of 26 rows are broken.*10%.*6 x The caption is empty.*a.tar"
    ):
        list(PairStream(path, epochs=1, shuffle_buffer=1, bad_rows=BadRows(max_rate=0.1, grace=50)))


def test_one_broken_sample_among_the_first_does_not_end_the_run():
    rows = BadRows(max_rate=0.01, grace=1000)
    rows.count("here", "a fault")
    for _ in range(9):
        rows.count("here", "a fault")
    with pytest.raises(TooManyBadRowsError, match="11 of 11"):
        rows.count("here", "a fault")


# ------------------------------------------------------------------------------------------------------------- funnel
def test_the_funnel_leaves_pairs_out_before_their_images_are_decoded(tmp_path):
    samples = [sample(number, **({"png": b"broken"} if number < 10 else {})) for number in range(20)]
    funnel = Funnel(1, [Filter("similarity", ">=", 0.1, 1, "test")])
    stream = PairStream(str(write_tar(tmp_path / "a.tar", samples)), epochs=1, shuffle_buffer=1, funnel=funnel)
    assert texts(stream) == [f"caption {number}" for number in range(10, 20)]
    assert stream.bad_rows.broken == 0
    assert funnel.report()["rules"][0]["removed"] == 10


def test_sizes_come_from_the_image_where_the_metadata_lacks_them(tmp_path):
    samples = [sample(number, png=png(number, side), json=None) for number, side in enumerate((8, 16, 32))]
    funnel = Funnel(1, [Filter("shorter_side", ">=", 10, 1, "test")])
    stream = PairStream(str(write_tar(tmp_path / "a.tar", samples)), epochs=1, shuffle_buffer=1, funnel=funnel)
    assert texts(stream) == ["caption 1", "caption 2"]


def test_a_missing_column_ends_the_run_at_once(tmp_path):
    path = str(write_tar(tmp_path / "a.tar", [sample(0)]))
    with pytest.raises(MissingColumnError, match=r"watermark <= 0.5"):
        list(PairStream(path, funnel=Funnel(1, [Filter("watermark", "<=", 0.5, 1, "test")])))


def test_a_funnel_that_lets_nothing_through_is_an_error(tmp_path):
    path = str(write_tar(tmp_path / "a.tar", [sample(0)]))
    with pytest.raises(ValueError, match="None of 1 samples is left"):
        list(PairStream(path, funnel=Funnel(1, [Filter("similarity", ">=", 9, 1, "test")])))


# ----------------------------------------------------------------------------------------------------------- settings
def test_shards_are_streamed_from_a_server(tmp_path):
    pytest.importorskip("aiohttp")
    write_corpus(tmp_path, 2, 3)
    write_corpus(tmp_path, 2, 3, "parquet")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for kind in ("tar", "parquet"):
            shards = [f"http://127.0.0.1:{server.server_port}/{shard:03d}.{kind}?download=1" for shard in range(2)]
            assert texts(PairStream(shards, shuffle_buffer=1, epochs=1)) == captions(7)
        server.shutdown()


def test_impossible_settings_are_refused(tmp_path):
    path = str(write_tar(tmp_path / "a.tar", [sample(0)]))
    with pytest.raises(OSError, match="there is no file"):
        PairStream(str(tmp_path / "*.parquet"))
    with pytest.raises(ValueError, match=r"must end in \.tar"):
        PairStream(str(write_tar(tmp_path / "a.zip", [])))
    with pytest.raises(ValueError, match="`rank` must be in 0"):
        PairStream(path, rank=2, world_size=2)
    with pytest.raises(ValueError, match="`shuffle_buffer` and `epochs`"):
        PairStream(path, shuffle_buffer=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        BadRows(max_rate=2)


# ----------------------------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def processor() -> InternVLProcessor:
    image_processor = InternVLImageProcessor(size={"height": 28, "width": 28}, resize_mode="squash")
    return InternVLProcessor(image_processor, make_tokenizer(), mode="contrastive", max_text_length=24)


def test_the_collator_makes_model_inputs(tmp_path, processor):
    pairs = list(PairStream(write_corpus(tmp_path, 1, 3), epochs=1, shuffle_buffer=1))
    batch = PairCollator(processor)(pairs)
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 24)
    assert processor.tokenizer.decode(batch["input_ids"][1]).startswith("<s>summarize:caption 1</s>")


def test_transparent_images_are_read_over_the_background_of_the_model(tmp_path):
    """The stream and the processor agree, so that training sees what inference sees."""
    buffer = io.BytesIO()
    Image.new("RGBA", (28, 28), (9, 9, 9, 0)).save(buffer, "PNG")
    path = str(write_tar(tmp_path / "a.tar", [{**sample(0), "png": buffer.getvalue()}]))
    for colour, value in (("white", (255, 255, 255)), ([1, 2, 3], (1, 2, 3))):
        (pair,) = PairStream(path, epochs=1, background_color=colour)
        assert pair["image"].getpixel((0, 0)) == value


def test_a_stage_hands_its_background_to_the_stream(tmp_path, processor):
    arguments = SimpleNamespace(process_index=0, world_size=1)
    own = copy.deepcopy(processor)
    own.image_processor.background_color = "red"
    shards = [write_corpus(tmp_path, 1, 1)]
    recipe, run = stage2_small(), stages.Run(tmp_path)
    stream, _ = stages._pair_data(recipe, shards, run, own, lambda **_: None)(0, recipe.phases[0], arguments)
    assert stream.background_color == "red"


class Recorder(torch.nn.Module):
    """A model that remembers its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[list[int]] = []

    def forward(self, input_ids, attention_mask=None, pixel_values=None):
        self.seen.append(input_ids.flatten().tolist())
        return {"loss": self.weight.sum() * pixel_values.mean()}


@pytest.mark.parametrize("workers", [0, 2])
def test_trainer_takes_the_stream_and_resumes_in_its_midst(tmp_path, processor, workers):
    pattern = write_corpus(tmp_path, 4, 4)

    def train(folder: str, resume: bool) -> list[list[int]]:
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=6, per_device_train_batch_size=2, save_steps=3, report_to="none",
            use_cpu=True, remove_unused_columns=False, dataloader_num_workers=workers, disable_tqdm=True,
        )  # fmt: skip
        model = Recorder()
        stream = PairStream(pattern, rank=arguments.process_index, world_size=arguments.world_size, shuffle_buffer=4)
        trainer = StreamTrainer(model, arguments, data_collator=PairCollator(processor), train_dataset=stream)
        trainer.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-3") if resume else None)
        return model.seen

    whole = train("a", resume=False)
    assert len({tuple(batch) for batch in whole}) == 6
    assert train("b", resume=True) == whole[3:]


def test_loaders_skip_batches_exactly(tmp_path, processor):
    stream = PairStream(write_corpus(tmp_path, 2, 4), shuffle_buffer=4, epochs=1)
    loader = DataLoader(stream, batch_size=2, collate_fn=texts)
    whole = list(loader)
    stream.set_epoch(0)
    assert list(skip_first_batches(loader, 2)) == whole[2:]


# ------------------------------------------------------------------------------------------------------------- memory
def write_shard(path: Path, rows: int) -> str:
    images = [png(number, 32) for number in range(50)]
    if path.suffix == ".parquet":
        return str(write_parquet(path, list(range(rows))))
    return str(write_tar(path, [sample(number, png=images[number % 50]) for number in range(rows)]))


def memory_growth(shards: list[str], with_python: bool = True) -> tuple[float, float]:
    """MiB that the process and Python hold more, at worst, than after the first thousand pairs."""
    process = psutil.Process()
    held = []
    if with_python:
        tracemalloc.start()
    try:
        for number, _ in enumerate(PairStream(shards, epochs=1, shuffle_buffer=100), start=1):
            if number % 500 == 0:
                held.append((process.memory_info().rss, tracemalloc.get_traced_memory()[0]))
    finally:
        tracemalloc.stop()
    assert number == 5000 * len(shards)
    resident, traced = zip(*held[1:], strict=True)
    return (max(resident) - resident[0]) / 2**20, (max(traced) - traced[0]) / 2**20


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path, kind):
    shards = [write_shard(tmp_path / f"{number}.{kind}", 5000) for number in range(2)]
    resident, traced = memory_growth(shards)
    assert traced < 1
    assert resident < 16


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_memory_does_not_grow_with_a_million_rows(tmp_path, kind):
    """One file read again and again: what is kept grows with the rows, not with the files on disk."""
    resident, _ = memory_growth([write_shard(tmp_path / f"a.{kind}", 5000)] * 200, with_python=False)
    assert resident < 32


def test_of_several_captions_every_epoch_draws_one_and_the_same_one_again(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    several = ["first", " second ", "third"]
    rows = [{"image": "a.png", "caption": several}, {"image": "a.png", "caption": "only"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    drawn = texts(PairStream(str(path), epochs=20, shuffle_buffer=1))
    assert set(drawn) == {"first", "second", "third", "only"}
    assert drawn.count("only") == 20
    assert texts(PairStream(str(path), epochs=20, shuffle_buffer=1)) == drawn
    assert texts(PairStream(str(path), epochs=20, shuffle_buffer=1, seed=1)) != drawn
    stream = PairStream(str(path), epochs=1)
    found = [caption for _, _, _, _, caption in _entries_of(stream, stream.shards[0], 0)]
    assert found == ["first", "second", "third", "only"]  # none of them may be a negative of its own image


@pytest.mark.parametrize(("several", "reason"), [([], "is empty"), (["a", 3], "is no text"), (["a", " "], "is empty")])
def test_lists_without_captions_are_broken_rows(several, reason, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"image": "a.png", "caption": several}))
    with pytest.raises(ValueError, match=f"1 x The caption {reason}"):
        list(PairStream(str(path), epochs=1))


def test_what_ends_a_run_names_the_limit_that_a_user_sets():
    with pytest.raises(TooManyBadRowsError, match="data, or raise `--max-bad-rate`"):
        BadRows(max_rate=0, limit="`--max-bad-rate`").count("here", "a fault")
