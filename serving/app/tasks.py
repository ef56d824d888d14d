"""What the page does with models: dialogues, classification, captions, and search in a folder. Knows no Gradio.

Images come as bytes of visitors' files, never as paths. One request at a time uses a model, see `layout`.
"""

import re
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, StoppingCriteria, TextIteratorStreamer

from ...chat import DEFAULT_CHECKPOINT, Conversation
from ...demo import draw_tiling
from ...evaluation.attention_maps import AttentionMap, caption_maps, dialogue_maps, joined
from ...evaluation.captioning import generate_captions
from ...evaluation.data.prompts import prompts_of
from ...evaluation.embeddings import ModelPlace, embed_images, modes_of
from ...evaluation.indexing import Job, embed_data
from ...evaluation.map_drawing import drawn_over
from ...evaluation.searching import Searcher, read_found_image
from ...evaluation.zero_shot import embed_classes
from ...image_loading_internvl import read_image, to_pil
from ...kinds import check_kind, kind_of
from ...synthetic.captions import LANGUAGES
from ...synthetic.scenes import SHAPES


MOST_FILE_BYTES = 8 * 2**20
MOST_IMAGE_PIXELS = 2**25
MOST_IMAGES = 8  # of a dialogue
MOST_TURNS = 20
MOST_CHARACTERS = 2000  # of a question or a query
MOST_CLASSES = 100
MOST_CLASS_CHARACTERS = 100
MOST_CAPTION_TOKENS = 64
MOST_WORD_MAPS = 8
MOST_ATTENTION_WEIGHTS = 2**28  # of all layers, which maps keep with their gradients
CACHED_DIALOGUES = 4  # of which keys and values are kept between turns
SIDE = 512  # of images that are shown, in pixels
# Of lists in all five languages.
CLASS_SEPARATORS = re.compile("[\n,;\u060c\u061b\u3001\uff0c\uff1b]")  # Arabic and full-width commas, semicolons
CLASS_EXAMPLES = {
    code: ", ".join(language.shape_names(shape)[0] for shape in SHAPES) for code, language in LANGUAGES.items()
}

Shown = tuple[Image.Image, str]  # an image and the text below it


def checked_text(text: Any, what: str, most: int = MOST_CHARACTERS) -> str:
    """Returns a text of a visitor without blanks around it.

    Raises:
        ValueError: If it is empty or too long.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} is missing: type it first.")
    if len(text) > most:
        raise ValueError(f"{what} has {len(text)} characters, more than the {most} that are read.")
    return text.strip()


def read_upload(data: bytes, name: str = "The image") -> Image.Image:
    """Decodes a visitor's file to RGB.

    Raises:
        ValueError: If it is no image that is read here, or too large.
    """
    if len(data) > MOST_FILE_BYTES:
        raise ValueError(f"{name} has {len(data)} bytes, more than the {MOST_FILE_BYTES} that are read.")
    image = read_image(data, name, MOST_IMAGE_PIXELS, allow_local_files=False)
    return to_pil(image, name, MOST_IMAGE_PIXELS, True, None)


def shown_small(image: Image.Image) -> Image.Image:
    """Returns a copy for the page, whose longer side is at most `SIDE`."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    return small


def default_dtype() -> str:
    """Returns "float32" on CPUs, most of which are slow in bfloat16, and else "auto"."""
    return "auto" if torch.accelerator.is_available() else "float32"


# ------------------------------------------------------------------------------------------------------------ dialogue
class StopWhen(StoppingCriteria):
    """Ends `generate` once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        """Returns for each row (B,) whether it is done."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


class ChatTask:
    """Dialogues with a chat model, one for each visitor.

    Args:
        model: Folder or Hub name.
        max_new_tokens: Maximum length of an answer in tokens.
        max_num: Maximum number of tiles per image; None keeps the checkpoint's.
        max_seconds: After which an answer is cut off.
    """

    def __init__(
        self, model: str | Path, max_new_tokens: int = 256, max_num: int | None = None, max_seconds: float = 120
    ) -> None:
        self.shared = Conversation(model, max_new_tokens)
        image_processor = self.shared.processor.image_processor
        image_processor.allow_local_files = False
        image_processor.max_num = max_num or image_processor.max_num
        self.max_seconds = max_seconds
        self.cached: deque[Conversation] = deque()

    def begin(self) -> Conversation:
        """Returns a dialogue for a visitor."""
        return self.shared.fresh()

    def check(self, dialogue: Conversation, images: Sequence[bytes]) -> None:
        """Raises a ValueError if a dialogue would grow too long."""
        if len(dialogue.messages) >= 2 * MOST_TURNS:
            raise ValueError(f"This dialogue has {MOST_TURNS} questions: begin a new one.")
        if len(images_of(dialogue)) + len(images) > MOST_IMAGES:
            raise ValueError(f"A dialogue has at most {MOST_IMAGES} images: begin a new one.")

    def answer(self, dialogue: Conversation, question: str, images: Sequence[bytes]) -> Iterator[str]:
        """Yields the answer while it grows; where the caller stops, so does the model.

        Raises:
            ValueError: If the dialogue grows too long, or an image cannot be used.
        """
        self.check(dialogue, images)
        stop = threading.Event()
        streamer = TextIteratorStreamer(dialogue.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def generate() -> str:
            try:
                with torch.inference_mode():
                    return dialogue.ask(
                        question,
                        images,
                        streamer=streamer,
                        stopping_criteria=[StopWhen(stop)],
                        max_time=self.max_seconds,
                    )
            finally:
                streamer.on_finalized_text("", stream_end=True)  # after a failure nothing else would end the loop

        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(generate)
            try:
                text = ""
                for piece in streamer:
                    text += piece
                    yield text
            finally:
                stop.set()
            yield answer.result()
        self._keep(dialogue)

    def _keep(self, dialogue: Conversation) -> None:
        """Keeps the cache of this dialogue, and frees those that waited longest."""
        self.cached = deque(other for other in self.cached if other is not dialogue)
        self.cached.append(dialogue)
        while len(self.cached) > CACHED_DIALOGUES:
            self.cached.popleft().release()

    def end(self, dialogue: Conversation) -> None:
        """Forgets a dialogue."""
        self.cached = deque(other for other in self.cached if other is not dialogue)
        dialogue.restart()

    def tiles(self, images: Sequence[Image.Image]) -> list[Shown]:
        """Draws how images are cut into tiles; none where the model does not cut them."""
        processor = self.shared.processor.image_processor
        if processor.resize_mode != "tiles":
            return []
        return [(draw_tiling(image, "", processor), f"Image {number}") for number, image in enumerate(images, 1)]

    def looked(self, dialogue: Conversation) -> list[Shown]:
        """Draws where the model looked for its last answer, over every image, and for its words where there is one.

        Raises:
            ValueError: If the dialogue is too long for it.
        """
        images = [read_upload(data) for data in images_of(dialogue)]
        if not images or not dialogue.messages:
            return []
        *messages, last = _with_images(dialogue.messages, images)
        self._check_length(dialogue)
        model, processor = dialogue.model, dialogue.processor
        maps = dialogue_maps(model, processor, messages, last["content"][0]["text"])
        if not any(maps):
            return []
        whole = [joined(of_image) for of_image in maps]
        total = sum(float(found.values.sum()) for found in whole) or 1.0
        shown = [
            _drawn(image, found, f"Image {number}: {float(found.values.sum()) / total:.0%}")
            for number, (image, found) in enumerate(zip(images, whole, strict=True), 1)
        ]
        if len(images) > 1 or len(maps[0]) == 1:
            return shown if len(images) > 1 else [_drawn(images[0], whole[0], whole[0].text)]
        words = [_drawn(images[0], found, found.text) for found in maps[0][:MOST_WORD_MAPS]]
        return [_drawn(images[0], whole[0], "all words"), *words]

    def _check_length(self, dialogue: Conversation) -> None:
        config = dialogue.model.config.text_config
        (ids,) = dialogue.processor.apply_chat_template(dialogue.messages, tokenize=True)
        if len(ids) ** 2 * config.num_attention_heads * config.num_hidden_layers > MOST_ATTENTION_WEIGHTS:
            raise ValueError(f"The dialogue has {len(ids)} tokens, too many to show where this model looked.")


def images_of(dialogue: Conversation) -> list[bytes]:
    """Returns the images of a dialogue in the order in which they came."""
    return [part["image"] for message in dialogue.messages for part in message["content"] if part["type"] == "image"]


def _with_images(messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    rest = iter(images)
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": next(rest)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _drawn(image: Image.Image, found: AttentionMap, text: str) -> Shown:
    return shown_small(drawn_over(image, found)), text


# ------------------------------------------------------------------------------- classification, captions and search
@dataclass(frozen=True)
class ContrastiveTask:
    """Classification by typed classes with an InternVL-C or -G, and captions with an InternVL-G.

    Args:
        place: Of the model.
        model: The model.
        processor: Its processor.
    """

    place: ModelPlace
    model: Any
    processor: Any

    @classmethod
    def load(cls, model: str | Path) -> "ContrastiveTask":
        """Loads a model from a folder or the Hub."""
        dtype = default_dtype()
        loaded = AutoModel.from_pretrained(model, dtype=dtype, device_map="auto").eval()
        return cls(ModelPlace(str(model), dtype=dtype), loaded, AutoProcessor.from_pretrained(model))

    @property
    def modes(self) -> tuple[str, ...]:
        """InternVL-C, and InternVL-G if the model has queries."""
        return modes_of(self.model)

    def classify(self, image: Image.Image, classes: str, template: str, mode: str) -> dict[str, float]:
        """Compares an image with typed classes.

        Args:
            image: The image.
            classes: Names in any language, one a line or separated by commas.
            template: The prompt of each, in which `{c}` stands for the name.
            mode: One of `modes`.

        Returns:
            The probability of each class among them.

        Raises:
            ValueError: For too few or too many classes, a template without `{c}`, or an unknown mode.
        """
        if mode not in self.modes:
            raise ValueError(f"The mode must be one of {', '.join(self.modes)}.")
        prompts = prompts_of(names := split_classes(classes), [checked_text(template, "The prompt", 200)])
        found = embed_images(self.model, self.processor, [image], mode) @ self._embedded(prompts).T
        logits = self.model.logit_scale.detach().float().exp().cpu() * found[0]
        return dict(zip(names, logits.softmax(dim=0).tolist(), strict=True))

    def _embedded(self, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
        return embed_classes(self.model, self.processor, prompts)

    def caption(self, image: Image.Image, language: str) -> tuple[str, list[Shown]]:
        """Writes a caption, and draws where the model looked for it and for each of its words.

        Raises:
            ValueError: For an unknown language, or a model without queries.
        """
        if language not in LANGUAGES:
            raise ValueError(f"The language must be one of {', '.join(LANGUAGES)}.")
        (text,) = generate_captions(self.model, self.processor, [image], language, max_new_tokens=MOST_CAPTION_TOKENS)
        maps = caption_maps(self.model, self.processor, image, text, language) if text else []
        if not maps:
            return text, []
        words = [_drawn(image, found, found.text) for found in maps[:MOST_WORD_MAPS]]
        return text, [_drawn(image, joined(maps), "all words"), *words]


def split_classes(classes: Any) -> list[str]:
    """Splits typed classes, without repetitions.

    Raises:
        ValueError: If there are fewer than two, too many, or one is too long.
    """
    typed = checked_text(classes, "The list of classes", MOST_CLASSES * MOST_CLASS_CHARACTERS)
    names = list(dict.fromkeys(name.strip() for name in CLASS_SEPARATORS.split(typed) if name.strip()))
    if not 2 <= len(names) <= MOST_CLASSES:
        raise ValueError(
            f"There must be from 2 to {MOST_CLASSES} classes, separated by commas; here are {len(names)}."
        )
    if longest := [name for name in names if len(name) > MOST_CLASS_CHARACTERS]:
        raise ValueError(f"A class has {len(longest[0])} characters, more than {MOST_CLASS_CHARACTERS}.")
    return names


class FolderSearch:
    """Search in a folder of images that was named when the page was started.

    Args:
        task: With the model.
        folder: Of the images.
        index: Folder of the embeddings, which are made there if they are missing; None makes them anew.

    Raises:
        ValueError: If there are no images in it.
    """

    def __init__(self, task: ContrastiveTask, folder: str | Path, index: str | Path | None = None) -> None:
        self.folder = Path(folder).resolve()
        if not self.folder.is_dir():
            raise ValueError(f"`{folder}` is no folder of images.")
        self._own = None if index else tempfile.TemporaryDirectory(prefix="internvl-index-")
        job = Job(
            data=(str(self.folder),),
            output=str(index or self._own.name),
            mode=task.modes[-1],
            sides=("image",),
            max_bad_rate=1.0,
        )
        embeddings = embed_data(task.model, task.processor, job, task.place)
        self.size = embeddings.count()["images"]
        if not self.size:
            raise ValueError(f"`{folder}` holds no image that can be read.")
        self.searcher = Searcher(embeddings, task.model, task.processor)

    def by_text(self, text: Any, top: int = 12) -> list[Shown]:
        """Returns the nearest images with their scores, the best first."""
        return self._shown(self.searcher.by_text(checked_text(text, "The text"), top=top))

    def by_image(self, image: Image.Image, top: int = 12) -> list[Shown]:
        """Returns the nearest images with their scores, the best first."""
        return self._shown(self.searcher.by_image(image, top=top))

    def _shown(self, hits: Sequence[Any]) -> list[Shown]:
        shown = []
        for hit in hits:
            try:
                image = read_found_image(hit)
            except ValueError:  # removed or changed since
                continue
            name = Path(hit.path).resolve().relative_to(self.folder).as_posix()
            shown.append(
                (shown_small(to_pil(image, name, MOST_IMAGE_PIXELS * 8, True, None)), f"{hit.score:.2f} {name}")
            )
        return shown


# ------------------------------------------------------------------------------------------------------------- loading
@dataclass(frozen=True)
class Tasks:
    """What a page offers; None for what its models cannot do.

    Args:
        names: Of the models.
        chat: Dialogue.
        contrastive: Classification, and captions if its modes hold InternVL-G.
        search: Search in a folder.
    """

    names: tuple[str, ...]
    chat: ChatTask | None = None
    contrastive: ContrastiveTask | None = None
    search: FolderSearch | None = None

    @property
    def captions(self) -> ContrastiveTask | None:
        """The model that writes captions."""
        return self.contrastive if self.contrastive and "InternVL-G" in self.contrastive.modes else None


def load_tasks(
    models: Sequence[str | Path],
    images: str | Path | None = None,
    index: str | Path | None = None,
    **chat_settings: Any,
) -> Tasks:
    """Loads the models of a page.

    Args:
        models: Folders or Hub names: at most one chat model and one InternVL-C or -G.
        images: A folder that visitors search.
        index: Where its embeddings are kept.
        **chat_settings: Of `ChatTask`.

    Raises:
        OSError: If there is no such model.
        ValueError: If a model is of another kind, two are of the same, or a search has no model.
    """
    by_kind: dict[str, str | Path] = {}
    for model in models:
        config = check_kind(model, "chat", "InternVL-C", "InternVL-G", door="the page")
        kind = "chat" if kind_of(config) == "chat" else "contrastive"
        if kind in by_kind:
            raise ValueError(f"`{by_kind[kind]}` and `{model}` are models of one kind: give one of them.")
        by_kind[kind] = model
    if images is not None and "contrastive" not in by_kind:
        raise ValueError("Search in a folder of images needs an InternVL-C or InternVL-G beside the chat model.")
    chat = ChatTask(by_kind["chat"], **chat_settings) if "chat" in by_kind else None
    contrastive = ContrastiveTask.load(by_kind["contrastive"]) if "contrastive" in by_kind else None
    search = FolderSearch(contrastive, images, index) if contrastive and images is not None else None
    return Tasks(tuple(map(_name_of, models)), chat, contrastive, search)


def _name_of(model: str | Path) -> str:
    if Path(model) == DEFAULT_CHECKPOINT:
        return "bundled checkpoint"
    return Path(model).resolve().name if Path(model).is_dir() else str(model)
