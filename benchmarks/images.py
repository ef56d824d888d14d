"""Images to tensors: the image processor against the published path, which is Pillow, one tile after the other, and
PyTorch.

Both take the same images and must give the same bytes. Nothing can be faster than resizing alone in as many threads:
its share of our time is a row of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from internvl.image_processing_internvl import InternVLImageProcessor, choose_grid
from internvl.synthetic.textures import as_jpeg

from .harness import Options, Row, speed_row


SIDE = 448
MAX_TILES = 12
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
# Photographs of web data sets and of cameras, screenshots, banners and icons; 1 to 13 tiles each, 292 in all.
SIZES = (
    (640, 480),
    (480, 640),
    (640, 427),
    (500, 375),
    (375, 500),
    (1024, 768),
    (1280, 720),
    (1920, 1080),
    (800, 1200),
    (512, 512),
    (1600, 1200),
    (336, 448),
    (1000, 300),
    (300, 900),
    (224, 224),
    (2048, 1536),
) * 2


def draw_images(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """RGB images of soft shapes with a little noise, which are about as large in JPEG as photographs."""
    generator = np.random.default_rng(0)
    images = []
    for width, height in sizes:
        shapes = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
        noise = generator.normal(0, 4, (height, width, 3))
        images.append(Image.fromarray((np.asarray(shapes) + noise).clip(0, 255).astype(np.uint8)))
    return images


def published_tiles(image: Image.Image) -> list[Image.Image]:
    """The whole image on its grid, cut into tiles row by row; then the thumbnail, if there is more than one."""
    columns, rows = choose_grid(*image.size, 1, MAX_TILES, SIDE)
    canvas = image.resize((columns * SIDE, rows * SIDE))
    corners = [(x * SIDE, y * SIDE) for y in range(rows) for x in range(columns)]
    tiles = [canvas.crop((left, top, left + SIDE, top + SIDE)) for left, top in corners]
    return [*tiles, image.resize((SIDE, SIDE))] if len(tiles) > 1 else tiles


def published_pixels(tile: Image.Image) -> torch.Tensor:
    """torchvision's `Resize`, `ToTensor` and `Normalize` of a tile, step by step as there."""
    tile = tile.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(tile, np.uint8, copy=True)).view(SIDE, SIDE, 3)
    pixels = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)  # (3, H, W)
    return pixels.clone().sub_(MEAN).div_(STD)


def published(images: Sequence[Image.Image | bytes]) -> torch.Tensor:
    """The published path for several images, (T, 3, H, W)."""
    batches = []
    for image in images:
        image = Image.open(BytesIO(image)).convert("RGB") if isinstance(image, bytes) else image
        batches.append(torch.stack([published_pixels(tile) for tile in published_tiles(image)]))
    return torch.cat(batches)


def ours(processor: InternVLImageProcessor, images: Sequence[Image.Image | bytes]) -> torch.Tensor:
    """The image processor's (T, 3, H, W)."""
    return processor(list(images), return_tensors="pt")["pixel_values"]


def resize_alone(image: Image.Image) -> int:
    """Pillow's part for one image; the number of its tiles."""
    columns, rows = choose_grid(*image.size, 1, MAX_TILES, SIDE)
    image.resize((columns * SIDE, rows * SIDE))
    if columns * rows == 1:
        return 1
    image.resize((SIDE, SIDE))
    return columns * rows + 1


def resize_all(images: Sequence[Image.Image], threads: int) -> int:
    """`resize_alone` of all images; the number of tiles."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(resize_alone, images))


def with_threads(count: int, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The call with PyTorch at a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def rows(options: Options) -> Iterator[Row]:
    """Decoded images, files, one thread, one image, and the share of resizing. The work is always the CPU's."""
    options = Options("cpu", options.rounds)
    processor = InternVLImageProcessor(max_num=MAX_TILES)
    images, threads = draw_images(SIZES), torch.get_num_threads()
    files = [as_jpeg(image, 90) for image in images]
    for name, sources, target in (
        (f"{len(images)} decoded images of mixed sizes to tensors, against the published path", images, 2.0),
        (f"{len(files)} JPEG files of mixed sizes to tensors, against the published path", files, 2.0),
        ("one decoded image of 1600 x 1200 to tensors, against the published path", [images[10]], None),
    ):
        call, peer = partial(ours, processor, sources), partial(published, sources)
        tiles = check_equal(call(), peer())
        yield speed_row(name, call, peer, options, target, warmups=1, tiles=tiles, threads=threads)
    yield speed_row(
        f"{len(images)} decoded images to tensors, one thread, against the published path in one thread",
        partial(with_threads, 1, partial(ours, processor, images)),
        partial(with_threads, 1, partial(published, images)),
        options,
        warmups=1,
    )
    yield speed_row(
        f"{len(images)} decoded images to tensors, against resizing them alone in as many threads (1 is the floor)",
        partial(ours, processor, images),
        partial(resize_all, images, threads),
        options,
        warmups=1,
        threads=threads,
    )


def check_equal(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Number of tiles, if both are the same bytes."""
    if not torch.equal(found.view(torch.int32), expected.view(torch.int32)):
        raise SystemExit("The two paths give different bytes: nothing to compare.")
    return len(found)
