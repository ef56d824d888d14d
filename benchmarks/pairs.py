"""Image-text pairs from shards to batches of tensors, against webdataset and torchvision, on one core.

Both read the same tar shards of JPEG files of mixed sizes with captions, shuffle them, and give batches of pixel
values and token ids: images as one square, as contrastive training has them. Neither has workers, of which both would
have as many. Which pairs come in a batch differs, so the tensors of each pair must be equal.
"""

import importlib.util
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoProcessor, TrainingArguments

from internvl.rows.shards import read_shards
from internvl.synthetic.textures import as_jpeg
from internvl.training.data.pair_files import pair_writer
from internvl.training.data.pairs import PairCollator, PairStream
from internvl.training.data.stream_batches import stream_loader

from .harness import Calls, Options, Row, interleave, one_core, row_of
from .images import SIZES, draw_images


BUNDLED = Path(__file__).parents[1] / "internvl_g"
PEERS = ("webdataset", "torchvision")
# Of stored images and, in pixels, of what the model gets: as web data sets keep them, and larger ones.
SIZES_BY_NAME = {
    "of 240 to 340 px, as 224 px": (((256, 256), (320, 240), (256, 340), (300, 256)), 224),
    "of mixed sizes, as 224 px": (SIZES, 224),
    "of mixed sizes, as 448 px": (SIZES, 448),
}
SHARDS, PAIRS_OF_SHARD = 2, 64
BATCH_SIZE = 32
SHUFFLE_BUFFER = 64
MAX_LENGTH = 80
TOLERANCE = 1e-6  # of pixel values: torchvision divides by 255 in its own order


def write_pairs(folder: Path, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Tar shards of JPEG files and captions; the same few images come in each."""
    files = [as_jpeg(image, 90) for image in draw_images(sizes)]
    for shard in range(SHARDS):
        with pair_writer(folder / f"{shard:06d}.tar") as write:
            for number in range(PAIRS_OF_SHARD):
                caption = f"photo {shard * PAIRS_OF_SHARD + number} of a red bus in a narrow street"
                write([{"__key__": f"{number:06d}", "jpg": files[number % len(files)], "txt": caption.encode()}])
    return sorted(map(str, folder.iterdir()))


def our_batches(shards: list[str], processor: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of the loader that `python -m internvl.training stage1` makes, for one epoch."""
    stream = PairStream(shards, shuffle_buffer=SHUFFLE_BUFFER, epochs=1)
    collator = PairCollator(processor, resize_mode="squash", max_length=MAX_LENGTH)
    arguments = TrainingArguments(per_device_train_batch_size=BATCH_SIZE, dataloader_num_workers=0, report_to="none")
    for batch in stream_loader(stream, collator, arguments):
        yield {name: batch[name] for name in ("pixel_values", "input_ids")}


def their_batches(shards: list[str], processor: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of a webdataset pipeline with torchvision's transforms and the same tokenizer, for one epoch."""
    import webdataset
    from torchvision import transforms

    images = processor.image_processor
    transform = transforms.Compose(
        [
            transforms.Resize((images.size["height"], images.size["width"]), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(images.image_mean, images.image_std),
        ]
    )

    def collate(pairs: list[tuple[torch.Tensor, str]]) -> dict[str, torch.Tensor]:
        pixels, texts = zip(*pairs, strict=True)
        tokens = processor(text=list(texts), mode="contrastive", max_length=MAX_LENGTH, return_tensors="pt")
        return {"pixel_values": torch.stack(pixels), "input_ids": tokens["input_ids"]}

    data = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    data = data.shuffle(SHUFFLE_BUFFER).decode("pil").to_tuple("jpg", "txt").map_tuple(transform, lambda text: text)
    yield from DataLoader(data, BATCH_SIZE, collate_fn=collate)


def decode_and_resize(shards: list[str], side: int) -> None:
    """What no loader can leave out that gives these bytes."""
    for row in read_shards(shards):
        Image.open(BytesIO(row["jpg"])).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def read_all(batches: Callable[[], Iterator[dict[str, torch.Tensor]]]) -> None:
    """Every batch, and no longer kept than a training would."""
    deque(batches(), maxlen=0)


def by_text(batches: Iterator[dict[str, torch.Tensor]]) -> dict[tuple[int, ...], torch.Tensor]:
    """Pixel values by the tokens of the caption."""
    found = {}
    for batch in batches:
        for ids, pixels in zip(batch["input_ids"].tolist(), batch["pixel_values"], strict=True):
            found[tuple(ids)] = pixels
    return found


def require_same_pairs(ours: dict[tuple[int, ...], torch.Tensor], theirs: dict[tuple[int, ...], torch.Tensor]) -> None:
    """There is nothing to compare in loaders that give different pairs."""
    if len(ours) != SHARDS * PAIRS_OF_SHARD or ours.keys() != theirs.keys():
        raise SystemExit("The two loaders give different captions: nothing to compare.")
    difference = max((ours[text] - theirs[text]).abs().max().item() for text in ours)
    if difference > TOLERANCE:
        raise SystemExit(f"The pixel values of the two loaders differ by {difference}: nothing to compare.")


def rows(options: Options) -> Iterator[Row]:
    """A row for each mix of images. The work is always the CPU's."""
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if missing:
        yield Row("pairs to tensors against webdataset", skipped=f"pip install {' '.join(missing)}")
        return
    options = Options("cpu", options.at_most(7).rounds)
    for name, (sizes, side) in SIZES_BY_NAME.items():
        with TemporaryDirectory() as folder, one_core():
            shards, processor = write_pairs(Path(folder), sizes), AutoProcessor.from_pretrained(BUNDLED)
            processor.image_processor.size = {"height": side, "width": side}
            ours, theirs = partial(our_batches, shards, processor), partial(their_batches, shards, processor)
            require_same_pairs(by_text(ours()), by_text(theirs()))
            calls: Calls = {
                "ours": partial(read_all, ours),
                "peer": partial(read_all, theirs),
                "Pillow": partial(decode_and_resize, shards, side),
            }
            seconds = interleave(calls, options, warmups=1)
            title = f"{SHARDS * PAIRS_OF_SHARD} pairs to tensors, images {name}, one core, against webdataset"
            yield row_of(title, seconds, target=1.2)
            yield row_of(f"{title}: Pillow's decoding and resizing alone, which both need", seconds, "Pillow")
