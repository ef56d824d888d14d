"""Image-text pairs at web scale: shards or files of rows in (see `shards`), images and captions out (see `streams`).

Not covered: captions in several columns.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from ...image_loading_internvl import DEFAULT_BACKGROUND, Background, read_image, to_pil
from ...image_processing_internvl import InternVLImageProcessor
from ...processing_internvl import InternVLProcessor
from ...renaming_internvl import renamed_arguments
from ...rows.json_rows import Row
from ...rows.pair_rows import IMAGE_COLUMNS, TEXT_COLUMNS, add_size, captions_in, image_source, metadata_of
from ...rows.shards import place_of_row
from .augmentation import sample_random
from .filters import Funnel, MissingColumnError
from .stream_batches import stream_loader
from .streams import RowStream


@renamed_arguments(broken_rows="bad_rows")
class PairStream(RowStream):
    """Pairs {"image": image, "text": caption, "key": name, "shard": file, "epoch": number}, each once per epoch over
    all processes.

    Args:
        shards: Files, see `find_shards`.
        images: Folder of the images that rows name by a path; None takes the folder of each file.
        funnel: Leaves out rows by their metadata, before their images are decoded.
        image_column: Column of the images, instead of the first of `pair_rows.IMAGE_COLUMNS` that there is.
        text_column: Column of the captions, instead of the first of `pair_rows.TEXT_COLUMNS`.
        max_image_pixels: Larger images count as broken.
        background_color: What transparent images are read over, as the processor of the model does.
        **settings: Of `RowStream`: `rank`, `world_size`, `seed`, `shuffle_buffer`, `epochs`, `bad_rows`.

    Raises:
        OSError: If there are no such files.
        ValueError: As in `RowStream`. While reading: if a rule of the funnel lacks its column.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        images: str | Path | None = None,
        funnel: Funnel | None = None,
        image_column: str | None = None,
        text_column: str | None = None,
        max_image_pixels: int = InternVLImageProcessor.max_image_pixels,
        background_color: Background = DEFAULT_BACKGROUND,
        **settings: Any,
    ) -> None:
        super().__init__(shards, **settings)
        self.images = images
        self.funnel = funnel
        self.image_columns = IMAGE_COLUMNS if image_column is None else (image_column,)
        self.text_columns = TEXT_COLUMNS if text_column is None else (text_column,)
        self.max_image_pixels = max_image_pixels
        self.background_color = background_color

    def from_the_beginning(self) -> Self:
        """The same stream as it was made, with counts of its own."""
        stream = super().from_the_beginning()
        stream.funnel = None if self.funnel is None else Funnel(self.funnel.stage, self.funnel.rules)
        return stream

    def _sample(self, row: Row) -> dict[str, Any] | None:
        try:
            pair = self.read_pair(row)
        except MissingColumnError:  # of all rows, not of this one
            raise
        except ValueError as error:
            self.bad_rows.count(place_of_row(row), error)
            return None
        self.bad_rows.count()
        return pair

    def read_pair(self, row: Row) -> dict[str, Any] | None:
        """Reads the pair of a raw row; None where the funnel removes it.

        Raises:
            ValueError: If the row is broken.
        """
        row = metadata_of(row)
        image = image_source(row, self.image_columns, self.images)
        name = {"key": row["__key__"], "shard": row["__shard__"], "epoch": self._position.epoch}
        captions = captions_in(row, self.text_columns)  # of several, each epoch draws one
        place = sample_random("caption", self.seed, name).randrange(len(captions)) if len(captions) > 1 else 0
        row["caption"] = captions[place]
        if self.funnel is not None:
            add_size(row, image)
            if not self.funnel.keeps(row):
                return None
        image = self._decode(image)
        return {"image": image, "text": row["caption"], **name}

    def _decode(self, image: Any) -> Image.Image:
        image = read_image(image, "The image", self.max_image_pixels)
        return to_pil(image, "The image", self.max_image_pixels, True, None, self.background_color)


# Makes the training image of a pair.
Augment = Callable[[Mapping[str, Any]], Image.Image]


class ImageCollator:
    """What collators of pairs have in common: the training images.

    Args:
        processor: Of the model.
        augment: Makes the training image of a pair; None takes its image as it is.
        **settings: Of the image processor, `size` for instance.
    """

    def __init__(self, processor: InternVLProcessor, augment: Augment | None = None, **settings: Any) -> None:
        self.processor = processor
        self.augment = augment
        self.settings = settings
        image_processor = processor.image_processor
        given = {**settings, **settings.get("images_kwargs", {})}
        of_images = {name: given[name] for name in given.keys() & image_processor.valid_kwargs.__annotations__.keys()}
        self._size = image_processor.get_fixed_size(of_images)
        self._resample = of_images.get("resample", image_processor.resample)
        self._max_pixels = of_images.get("max_image_pixels", image_processor.max_image_pixels)

    def prepare(self, pair: dict[str, Any]) -> dict[str, Any]:
        """Augments the image of a pair, and resizes it where images become one tile of one size.

        `StreamBatches` calls it for each pair as soon as it was read, while the pixels are in the cache of the CPU; a
        batch then holds no large images. Pairs that are not prepared give the same pixel values.
        """
        image = self.training_image(pair)
        # The processor leaves an image that has its size already as it is.
        if self._size is not None and self._is_decoded(image):
            image = image.resize(self._size, self._resample)
        kept = {name: value for name, value in pair.items() if name != "stored"}
        return {**kept, "image": image, "is_prepared": True}

    def _is_decoded(self, image: Any) -> bool:
        """Whether the processor would change nothing about an image but its size, nor refuse it."""
        return (
            isinstance(image, Image.Image)
            and image.mode == "RGB"
            and "transparency" not in image.info
            and getattr(image, "fp", None) is None  # of a file that is not read yet
            and image.width * image.height <= self._max_pixels
        )

    def training_image(self, pair: Mapping[str, Any]) -> Any:
        """The image of a pair, augmented if it is not prepared."""
        return pair["image"] if self.augment is None or pair.get("is_prepared") else self.augment(pair)


class PairCollator(ImageCollator):
    """Pairs to model inputs.

    Args:
        processor: Of the model.
        mode: "contrastive" or "caption", see `InternVLProcessor`.
        augment: Makes the training image of a pair; None takes its image as it is.
        **settings: Settings of its calls.
    """

    def __init__(
        self,
        processor: InternVLProcessor,
        mode: str = "contrastive",
        augment: Augment | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(processor, augment, **settings)
        self.mode = mode

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Prepares a batch.

        Args:
            pairs: B of them.

        Returns:
            `pixel_values` (T, 3, H, W), `input_ids` and `attention_mask` (B, L).
        """
        images = [self.training_image(pair) for pair in pairs]
        texts = [pair["text"] for pair in pairs]
        settings = {"mode": self.mode, "return_tensors": "pt", **self.settings}
        return dict(self.processor(images=images, text=texts, **settings))


__all__ = ["PairCollator", "PairStream", "stream_loader"]
