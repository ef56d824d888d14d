"""Chats with a checkpoint: `python -m internvl.chat [IMAGE...] [--ask TEXT] [--model DIR]`.

With `--ask` one answer is streamed to standard output; without it, a conversation goes on until an empty line. Images
are encoded only in the turn that adds them, and generated ids are kept, so that no turn tokenizes earlier answers.
"""

import argparse
import copy
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import exit_status
from .kinds import KIND_NAMES, MODEL_TYPES, check_folder, check_kind, wrong_kind


if TYPE_CHECKING:
    from .image_loading_internvl import ImageSource

DEFAULT_CHECKPOINT = Path(__file__).resolve().parent


# transformers is imported where a model is needed, so that `--help` and argument errors do not wait for it.
class Conversation:
    """A dialogue with a model that keeps its ids and key-value cache between turns.

    Args:
        model: Folder or Hub name of a chat checkpoint.
        max_new_tokens: Maximum length of an answer in tokens.
        max_num: Maximum number of tiles per image; None keeps the checkpoint's.

    Raises:
        ValueError: If it is not a chat checkpoint.
    """

    def __init__(self, model: str | Path, max_new_tokens: int = 256, max_num: int | None = None) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        check_kind(model, "chat", door="a conversation")
        self.processor = AutoProcessor.from_pretrained(model)
        self.model = AutoModelForImageTextToText.from_pretrained(model, device_map="auto").eval()
        self.max_new_tokens = max_new_tokens
        self.settings = {} if max_num is None else {"max_num": max_num}
        self.restart()

    def restart(self) -> None:
        """Forgets all messages and images."""
        self.messages: list[dict[str, Any]] = []
        self.ids: Any = None  # (L,), the dialogue so far; None if `messages` must be encoded anew
        self.cache: Any = None  # covers `ids[:-1]`

    def release(self) -> None:
        """Frees ids and cache; the next turn computes them again from the messages."""
        self.ids = self.cache = None

    def fresh(self) -> "Conversation":
        """Returns another dialogue, without messages, with the same model."""
        other = copy.copy(self)
        other.restart()
        return other

    def ask(
        self,
        question: str,
        images: "Sequence[ImageSource] | None" = None,
        stream: bool = False,
        **generation: Any,
    ) -> str:
        """Answers a question about new images, those of earlier turns, or none.

        Args:
            question: The question.
            images: Paths or URLs of new images, or images in any other form that the processor reads.
            stream: Whether to print the answer while it is generated.
            **generation: Further arguments of `generate`, such as a `streamer` or `stopping_criteria`.
        """
        from transformers import DynamicCache, TextStreamer

        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images or []]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        if self.ids is None:
            inputs = self._read_all([*self.messages, message])
            cache = DynamicCache(config=self.model.config.text_config)
        else:
            inputs, cache = self._read_on(message, list(images or []) or None), self.cache
        self.ids = None  # set again when the answer is complete; an interrupted answer invalidates the cache
        tokenizer = self.processor.tokenizer
        if stream:
            generation["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self.model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            **generation,
        )[0]
        answer = tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages += [message, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self.ids, self.cache = output, cache
        return answer

    def _read_all(self, messages: list[dict[str, Any]]) -> Any:
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=self.settings,
        )
        return inputs.to(self.model.device)

    def _read_on(self, message: dict[str, Any], images: "Sequence[ImageSource] | None") -> Any:
        """Appends the ids of the new message to those so far; only new images are encoded."""
        import torch

        mark = uuid.uuid4().hex  # stands for the last answer, to find the text after it
        messages = [*self.messages[:-1], {"role": "assistant", "content": mark}, message]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True).split(mark)[-1]
        inputs = self.processor(
            text=text, images=images, add_special_tokens=False, return_tensors="pt", **self.settings
        )
        inputs = inputs.to(self.model.device)
        new, known = inputs["input_ids"][0], self.ids
        if int(known[-1]) in self._end_token_ids():
            # The template ends the answer itself, possibly with another token. The cache does not hold the last one.
            known = known[:-1]
        inputs["input_ids"] = torch.cat([known, new])[None]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs

    def _end_token_ids(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]


def check_model(model: str | Path) -> None:
    """Checks a folder before anything is loaded from it; possible Hub names are left to transformers.

    Raises:
        ValueError: If it is not a chat checkpoint.
        OSError: If it is neither a folder nor a Hub name.
    """
    folder = os.path.expanduser(model)
    if Path(folder) == DEFAULT_CHECKPOINT and not (DEFAULT_CHECKPOINT / "config.json").is_file():
        raise FileNotFoundError(
            "The bundled checkpoint comes with a clone of the repository, not with the installed package: give "
            "`--model DIR`."
        )
    kind = MODEL_TYPES.get(str(check_folder(folder)))
    if kind not in (None, "chat"):
        raise wrong_kind(model, KIND_NAMES[kind], "chat", door="a conversation")


def check_images(images: list[str]) -> None:
    """Raises an OSError for paths that are not files; URLs are left to the processor."""
    for image in images:
        is_address = image.startswith(("http://", "https://", "data:", "file:"))
        if not is_address and not Path(image).is_file():
            what = "no file" if Path(image).exists() else "not there"
            raise FileNotFoundError(f"`{image}` is {what}: expected an image file or an http(s) address.")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m internvl.chat", description="Ask a checkpoint about images, or just ask."
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="path or http(s) address of an image")
    parser.add_argument("--ask", metavar="TEXT", help="one question; without it, a conversation")
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, metavar="DIR", help="chat checkpoint (default: the bundled)"
    )
    parser.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="longest answer")
    parser.add_argument("--max-num", type=_positive, metavar="N", help="most tiles of an image (1: no tiling)")
    return parser.parse_args(arguments)


def talk(options: argparse.Namespace) -> None:
    """Answers one question, or each line of standard input until an empty one."""
    from . import register

    register()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with torch.inference_mode():
        conversation = Conversation(options.model, options.max_new_tokens, options.max_num)
        if options.ask is not None:
            conversation.ask(options.ask, options.images, stream=True)
            return
        images: list[str] | None = options.images
        print("Ask; an empty line ends the conversation.")
        while question := input("> ").strip():
            conversation.ask(question, images, stream=True)
            images = None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = _parse_arguments(arguments)

    def converse() -> None:
        check_model(options.model)
        check_images(options.images)
        talk(options)

    try:
        return exit_status(converse)
    except (EOFError, KeyboardInterrupt):
        print()
        return 0


if __name__ == "__main__":
    sys.exit(main())
