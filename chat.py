"""Talk to a checkpoint: `python -m internvl.chat [IMAGE...] [--ask TEXT] [--model DIR]`.

With `--ask` one answer is streamed to standard output; without it, a conversation goes on until an empty line. Images are encoded in
the turn that brings them and never again, and what was generated is kept as ids: no turn tokenizes the answers of earlier ones.
"""

import argparse
import json
import sys
import uuid
from pathlib import Path
from typing import Any

from .kinds import MODEL_TYPES, WORDS, check_kind, wrong_kind


DEFAULT_CHECKPOINT = Path(__file__).resolve().parent


# transformers is imported where a model is needed, so that `--help` and wrong arguments do not wait for it.
class Conversation:
    """A dialogue with a model, its ids and key-value cache kept from turn to turn.

    Args:
        model: Folder or Hub name of a chat checkpoint.
        max_new_tokens: Longest answer.
        max_num: Most tiles of an image; None takes the checkpoint's.

    Raises:
        ValueError: If this is no chat checkpoint.
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
        """Forgets everything said and shown."""
        self.messages: list[dict[str, Any]] = []
        self.ids: Any = None  # (L,): all that was read and written; None where the messages were not read yet
        self.cache: Any = None  # of all of `ids` but the last

    def ask(self, question: str, images: list[str] | None = None, stream: bool = False) -> str:
        """Asks a question, about new images or those of earlier turns, or about none.

        Args:
            question: The question.
            images: Paths or addresses of new images.
            stream: Whether to print the answer while it is made.
        """
        from transformers import DynamicCache, TextStreamer

        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images or []]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        if self.ids is None:
            inputs = self._read_all([*self.messages, message])
            cache = DynamicCache(config=self.model.config.text_config)
        else:
            inputs, cache = self._read_on(message, images or None), self.cache
        self.ids = None  # until the answer is complete: an interrupted one leaves a cache that fits no ids
        tokenizer = self.processor.tokenizer
        output = self.model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
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

    def _read_on(self, message: dict[str, Any], images: list[str] | None) -> Any:
        """The ids so far and those of what the template writes behind the last answer, with the new images alone."""
        import torch

        mark = uuid.uuid4().hex  # in place of the answer
        messages = [*self.messages[:-1], {"role": "assistant", "content": mark}, message]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True).split(mark)[-1]
        inputs = self.processor(
            text=text, images=images, add_special_tokens=False, return_tensors="pt", **self.settings
        )
        inputs = inputs.to(self.model.device)
        new, known = inputs["input_ids"][0], self.ids
        if int(known[-1]) in self._end_token_ids():
            # The template ends the answer itself, maybe with another token; the cache does not hold the last one.
            known = known[:-1]
        inputs["input_ids"] = torch.cat([known, new])[None]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs

    def _end_token_ids(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]


def check_model(model: str | Path) -> None:
    """Looks at a folder without loading anything from it; names that may be on the Hub are left to transformers.

    Args:
        model: Folder or Hub name.

    Raises:
        ValueError: If it is no chat checkpoint.
        OSError: If it is no folder where it must be one.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        is_hub_name = not folder.exists() and str(model)[:1] not in "./~" and str(model).count("/") <= 1
        if not is_hub_name:
            raise FileNotFoundError(f"`{model}` is {'a file' if folder.exists() else 'not there'}: expected a folder.")
        return
    if not (folder / "config.json").is_file():
        if folder == DEFAULT_CHECKPOINT:
            raise FileNotFoundError(
                "The bundled checkpoint comes with a clone of the repository, not with the installed package: give `--model DIR`."
            )
        raise FileNotFoundError(f"`{model}` is a folder without config.json, so it holds no model.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{folder / 'config.json'}` cannot be read: {error}") from error
    kind = MODEL_TYPES.get(str(config.get("model_type"))) if isinstance(config, dict) else None
    if kind not in (None, "chat"):
        raise wrong_kind(model, WORDS[kind], "chat", door="a conversation")


def check_images(images: list[str]) -> None:
    """Looks whether paths lead to files; addresses are left to the processor.

    Args:
        images: Paths and addresses.

    Raises:
        OSError: If there is no file.
    """
    for image in images:
        is_address = image.startswith(("http://", "https://", "data:", "file:"))
        if not is_address and not Path(image).is_file():
            what = "no file" if Path(image).exists() else "not there"
            raise FileNotFoundError(f"`{image}` is {what}: expected an image file or an http(s) address.")


def positive(text: str) -> int:
    """A number of at least one, from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.chat", description="Ask a checkpoint about images, or just ask."
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="path or http(s) address of an image")
    parser.add_argument("--ask", metavar="TEXT", help="one question; without it, a conversation")
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, metavar="DIR", help="chat checkpoint (default: the bundled)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="longest answer")
    parser.add_argument("--max-num", type=positive, metavar="N", help="most tiles of an image (1: no tiling)")
    return parser.parse_args(arguments)


def talk(options: argparse.Namespace) -> None:
    """Answers one question, or every line of standard input up to an empty one."""
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
    """Runs the command line; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        check_model(options.model)
        check_images(options.images)
        talk(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
