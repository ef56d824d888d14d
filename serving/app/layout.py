"""The page in Gradio: a tab for each task, and what happens when something is sent.

Inputs come as a visitor's browser sent them (`preprocess=False`): Gradio's own reading of images would decode every
format that Pillow knows. The door has checked that files lie among the uploads.
"""

import html
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from PIL import Image
from starlette.middleware import Middleware

from ...chat import Conversation
from ...console import printable
from ...synthetic.captions import LANGUAGES
from .door import PageDoor
from .tasks import (
    CLASS_EXAMPLES,
    MOST_CHARACTERS,
    MOST_FILE_BYTES,
    MOST_IMAGES,
    ChatTask,
    ContrastiveTask,
    FolderSearch,
    Shown,
    Tasks,
    checked_text,
    read_upload,
    shown_small,
)


LANGUAGE_NAMES = {"en": "English", "zh": "中文", "ja": "日本語", "ar": "العربية", "it": "Italiano"}
LANGUAGE_CHOICES = [(LANGUAGE_NAMES[code], code) for code in LANGUAGES]
SECONDS_KEPT = 1800
MOST_VISITORS = 64  # whose dialogues are kept
# Each text in its own direction; wide content scrolls within.
STYLE = """
textarea, .message, .message *, .label, .caption-label, .caption {unicode-bidi: plaintext}
.message img {max-height: 220px !important}
.grid-wrap {padding-top: 32px !important}
button[aria-label="Share"] {display: none}
.gradio-container {width: 100% !important; max-width: 1280px !important; margin: auto; overflow-x: hidden}
"""
# One request at a time computes: maps switch the attention of the model that others share.
EVENT: dict[str, Any] = {
    "preprocess": False,
    "concurrency_limit": 1,
    "concurrency_id": "model",
    "api_visibility": "private",
}


@dataclass
class Visit:
    """A visitor's dialogue: what the model has of it, what the page shows, and whether the last answer is new."""

    dialogue: Conversation
    shown: list[dict[str, Any]] = field(default_factory=list)
    is_answered: bool = False


def one_line(error: ValueError) -> str:
    """Returns what is wrong as one line of HTML."""
    return html.escape(printable(str(error)))


@contextmanager
def told() -> Iterator[None]:
    """Shows what is wrong with an input as one line on the page."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(one_line(error), print_exception=False) from error


def uploaded(file: Any, name: str = "The image") -> bytes:
    """Returns the bytes of an uploaded file, as the door let it pass.

    Raises:
        ValueError: If there is none.
    """
    path = file.get("path") if isinstance(file, dict) else None
    if not isinstance(path, str):
        raise ValueError(f"{name} is missing: choose a file first.")
    with open(path, "rb") as handle:
        return handle.read(MOST_FILE_BYTES + 1)


def read_file(file: Any) -> Image.Image:
    """Decodes an uploaded image."""
    return read_upload(uploaded(file))


def gallery(label: str, **settings: Any) -> gr.Gallery:
    """Returns a gallery of what is shown, which nothing can be added to."""
    return gr.Gallery(
        label=label, interactive=False, height="auto", object_fit="contain", buttons=["fullscreen"], **settings
    )


def image_input(label: str = "Image") -> gr.Image:
    """Returns a field for an image."""
    return gr.Image(label=label, sources=["upload", "clipboard"], type="filepath", image_mode=None, height=280)


def add_examples(examples: Sequence[Any], component: gr.Image | gr.MultimodalTextbox) -> None:
    """Adds examples that fill a component: paths of images, or messages with them.

    `gr.Examples` would not send the choice through the queue, but by a route that the door closes.
    """
    if not examples:
        return
    choice = gr.Dataset(
        components=[component], samples=[[example] for example in examples], type="index", label="Examples"
    )

    def copy_of(path: str) -> str:  # among the uploads; those of earlier visits may have been removed
        return save_pil_to_cache(Image.open(path), component.GRADIO_CACHE, format="png")

    def fill(index: Any) -> Any:
        if type(index) is not int or not 0 <= index < len(examples):
            return gr.skip()
        example = examples[index]
        return (
            {**example, "files": list(map(copy_of, example["files"]))}
            if isinstance(example, dict)
            else copy_of(example)
        )

    choice.click(fill, choice, component, preprocess=False, show_progress="hidden", api_visibility="private")


# ---------------------------------------------------------------------------------------------------------------- chat
def chat_tab(task: ChatTask, examples: list[dict[str, Any]]) -> None:
    """Adds dialogue, with the tiles of its images and where the model looked beside it."""

    def forget(known: Visit | None) -> None:
        if known:
            task.end(known.dialogue)

    visit = gr.State(None, time_to_live=SECONDS_KEPT, delete_callback=forget)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            board = gr.Chatbot(
                label="Dialogue", height=460, latex_delimiters=[], allow_tags=False, buttons=["copy"],
                feedback_options=None, allow_file_downloads=False,
            )  # fmt: skip
            box = gr.MultimodalTextbox(
                label="Question", show_label=False, file_count="multiple", file_types=["image"], sources=["upload"],
                placeholder=f"Ask; up to {MOST_IMAGES} images", max_plain_text_length=MOST_CHARACTERS,
            )  # fmt: skip
            with gr.Row():
                with_maps = gr.Checkbox(True, label="Show where it looked", min_width=160)
                stop = gr.Button("Stop", min_width=80)
                new = gr.Button("New dialogue", min_width=120)
        with gr.Column(scale=2, min_width=320):
            tiles = gallery("Tiles", elem_id="tiles", columns=2)
            looked = gallery("Where it looked", elem_id="looked", columns=3)
    add_examples(examples, box)

    def ask(message: Any, known: Visit | None) -> Iterator[tuple[Any, ...]]:
        visit = known or Visit(task.begin())
        visit.is_answered = False
        try:
            yield from _answered(task, message, visit, board.GRADIO_CACHE)
            visit.is_answered = True
        except ValueError as error:  # a `gr.Error` would cover the dialogue
            gr.Warning(one_line(error), title="Error")
            yield visit, visit.shown, gr.skip(), gr.skip()

    def look(visit: Visit | None, is_wanted: Any) -> Any:
        if not visit or not visit.is_answered or is_wanted is not True:
            return gr.skip()
        with told():
            return task.looked(visit.dialogue)

    def begin(known: Visit | None) -> tuple[Any, ...]:
        forget(known)
        return None, [], [], []

    outputs = [visit, board, box, tiles]
    asked = box.submit(ask, [box, visit], outputs, show_progress="hidden", **EVENT)
    asked.success(look, [visit, with_maps], looked, **EVENT)
    stop.click(None, cancels=[asked], api_visibility="private")
    for event in (new.click, board.clear):
        event(begin, visit, [visit, board, tiles, looked], cancels=[asked], api_visibility="private")


def _answered(task: ChatTask, message: Any, visit: Visit, cache: str) -> Iterator[tuple[Any, ...]]:
    """Yields the visit, the dialogue, the emptied field and the tiles while an answer grows."""
    message = message if isinstance(message, dict) else {}
    question = checked_text(message.get("text"), "The question")
    files = message.get("files") or []
    names = [f"Image {number}" for number in range(1, len(files) + 1)]
    task.check(visit.dialogue, files)
    data = [uploaded(file, name) for file, name in zip(files, names, strict=True)]
    images = [read_upload(one, name) for one, name in zip(data, names, strict=True)]
    small = [save_pil_to_cache(shown_small(image), cache, format="webp") for image in images]
    sent = [{"role": "user", "content": {"path": path}} for path in small]
    before, answer = visit.shown, {"role": "assistant", "content": ""}
    visit.shown = [*before, *sent, {"role": "user", "content": question}]
    yield visit, visit.shown, None, task.tiles(images) if images else gr.skip()
    visit.shown = [*visit.shown, answer]
    try:
        for answer["content"] in task.answer(visit.dialogue, question, data):
            yield visit, visit.shown, gr.skip(), gr.skip()
    except ValueError:
        visit.shown = before
        raise


# --------------------------------------------------------------------------------- classification, search and captions
def classification_tab(task: ContrastiveTask, examples: list[str]) -> None:
    """Adds classification by typed classes."""
    with gr.Row():
        with gr.Column(min_width=320):
            image = image_input()
            language = gr.Radio(LANGUAGE_CHOICES, value="en", label="Examples of classes in")
            classes = gr.Textbox(
                CLASS_EXAMPLES["en"], lines=3, label="Classes", info="In any language, separated by commas."
            )
            template = gr.Textbox("{c}", label="Prompt", info="{c} stands for the class: a photo of a {c}.")
            mode = gr.Radio(list(task.modes), value=task.modes[-1], label="Mode", visible=len(task.modes) > 1)
            run = gr.Button("Classify", variant="primary")
            add_examples(examples, image)
        with gr.Column(min_width=320):
            found = gr.Label(label="Probability among these classes", num_top_classes=10)

    def classify(*given: Any) -> dict[str, float]:
        with told():
            return task.classify(read_file(given[0]), *given[1:])

    def fill(code: Any) -> str:
        return CLASS_EXAMPLES.get(code, "") if isinstance(code, str) else ""

    language.change(fill, language, classes, preprocess=False, api_visibility="private")
    inputs = [image, classes, template, mode]
    for event in (run.click, classes.submit):
        event(classify, inputs, found, **EVENT)


def search_tab(search: FolderSearch) -> None:
    """Adds search in the folder that was named at the start."""
    gr.Markdown(f"{search.size} images, by a text or by an image.")
    with gr.Row():
        with gr.Column(min_width=320):
            text = gr.Textbox(label="Text", placeholder="What is looked for, in any language")
            by_text = gr.Button("Search by text", variant="primary")
            image = image_input("Or an image")
            by_image = gr.Button("Search by image", variant="primary")
        with gr.Column(scale=2, min_width=320):
            found = gallery("Found, the nearest first", elem_id="found", columns=3)

    def search_text(typed: Any) -> list[Shown]:
        with told():
            return search.by_text(typed)

    def search_image(file: Any) -> list[Shown]:
        with told():
            return search.by_image(read_file(file))

    for event in (by_text.click, text.submit):
        event(search_text, text, found, **EVENT)
    by_image.click(search_image, image, found, **EVENT)


def caption_tab(task: ContrastiveTask, examples: list[str]) -> None:
    """Adds captions in five languages."""
    with gr.Row():
        with gr.Column(min_width=320):
            image = image_input()
            language = gr.Radio(LANGUAGE_CHOICES, value="en", label="Language")
            run = gr.Button("Write a caption", variant="primary")
            add_examples(examples, image)
        with gr.Column(scale=2, min_width=320):
            text = gr.Textbox(label="Caption", interactive=False, lines=2)
            looked = gallery("Where it looked", elem_id="caption-looked", columns=3)

    def write(file: Any, code: Any) -> tuple[str, list[Shown]]:
        with told():
            return task.caption(read_file(file), code)

    run.click(write, [image, language], [text, looked], **EVENT)


# ------------------------------------------------------------------------------------------------------------ the page
def example_questions(images: Path) -> list[dict[str, Any]]:
    """Returns a message for each image of a folder with `questions.json`, the first question about it."""
    rows = json.loads((images / "questions.json").read_text(encoding="utf-8"))
    first = {row["file"]: row["question"] for row in reversed(rows)}
    return [{"text": question, "files": [str(images / file)]} for file, question in first.items()]


def build(tasks: Tasks, examples: Path | None = None, queue_size: int = 32) -> gr.Blocks:
    """Returns the page.

    Args:
        tasks: What it offers.
        examples: Folder of images with `questions.json` to begin with.
        queue_size: How many requests wait at most; others are refused.
    """
    questions = example_questions(examples) if examples else []
    files = [file for question in questions for file in question["files"]]
    tabs: list[tuple[str, Callable[[], None]]] = []
    if tasks.chat:
        tabs.append(("Chat", partial(chat_tab, tasks.chat, questions)))
    if tasks.contrastive:
        tabs.append(("Classify", partial(classification_tab, tasks.contrastive, files)))
    if tasks.search:
        tabs.append(("Search", partial(search_tab, tasks.search)))
    if tasks.captions:
        tabs.append(("Captions", partial(caption_tab, tasks.captions, files)))
    with gr.Blocks(title="InternVL", analytics_enabled=False) as page:
        gr.Markdown(f"# InternVL\n{html.escape(printable(', '.join(tasks.names)))}")
        for name, add in tabs:
            with gr.Tab(name, elem_id=name.lower()):
                add()
    return page.queue(max_size=queue_size)


def launch(page: gr.Blocks, host: str, port: int, folder: str) -> str:
    """Starts serving in threads of its own; returns the address.

    Args:
        page: From `build`.
        host: Name or address that is listened at.
        port: That is listened at.
        folder: An empty one for the files of visitors; `GRADIO_TEMP_DIR` names it.

    Raises:
        OSError: If the port is taken.
    """
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from elsewhere
    door = Middleware(PageDoor, folder=folder, most_upload_bytes=MOST_IMAGES * MOST_FILE_BYTES + 2**20)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=MOST_FILE_BYTES,
        state_session_capacity=MOST_VISITORS,
        theme=gr.themes.Default(**fonts),
        css=STYLE,
        app_kwargs={"middleware": [door], "docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    return address
