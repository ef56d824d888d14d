"""Talk to a checkpoint about pictures: `python -m internvl.chat IMAGE [IMAGE...] [--ask TEXT] [--model DIR]`.

With `--ask` one answer is streamed to standard output; without it, a conversation goes on until an empty line. Pictures are encoded in
the turn that brings them and never again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from . import register


DEFAULT_CHECKPOINT = Path(__file__).resolve().parent


class Conversation:
    """A dialogue with a model, its key-value cache kept from turn to turn.

    Args:
        model: Folder or Hub name of a chat checkpoint.
        max_new_tokens: Longest answer.
        max_num: Most tiles of a picture; None takes the checkpoint's.
    """

    def __init__(self, model: str | Path, max_new_tokens: int = 256, max_num: int | None = None) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor  # not before the arguments are read

        self.processor = AutoProcessor.from_pretrained(model)
        self.model = AutoModelForImageTextToText.from_pretrained(model, device_map="auto").eval()
        self.max_new_tokens = max_new_tokens
        self.max_num = max_num
        self.restart()

    def restart(self) -> None:
        """Forgets everything said and shown."""
        from transformers import DynamicCache

        self.messages: list[dict[str, Any]] = []
        self.cache = DynamicCache(config=self.model.config.text_config)

    def ask(self, question: str, images: list[str] | None = None, stream: bool = False) -> str:
        """Asks a question, about new pictures or those of earlier turns.

        Args:
            question: The question.
            images: Paths or addresses of new pictures.
            stream: Whether to print the answer while it is made.
        """
        from transformers import TextStreamer

        parts = [{"type": "image", "image": image} for image in images or []]
        self.messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        settings = {} if self.max_num is None else {"max_num": self.max_num}
        inputs = self.processor.apply_chat_template(
            self.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **settings
        ).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        tokenizer = self.processor.tokenizer
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        output = self.model.generate(
            **inputs,
            past_key_values=self.cache,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            streamer=streamer,
        )
        answer = tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return answer


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m internvl.chat", description="Ask a checkpoint about pictures.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="path or http(s) address of a picture")
    parser.add_argument("--ask", metavar="TEXT", help="one question; without it, a conversation")
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, metavar="DIR", help="chat checkpoint (default: the bundled)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer")
    parser.add_argument("--max-num", type=int, metavar="N", help="most tiles of a picture (1: no tiling)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse_arguments(arguments)
    register()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.inference_mode():
            talk(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EOFError:
        print()
    return 0


def talk(options: argparse.Namespace) -> None:
    """Answers the one question, or those that come from standard input."""
    conversation = Conversation(options.model, options.max_new_tokens, options.max_num)
    if options.ask is not None:
        conversation.ask(options.ask, options.images, stream=True)
        return
    images: list[str] | None = options.images
    print("Ask; an empty line ends the conversation.")
    while question := input("> ").strip():
        conversation.ask(question, images, stream=True)
        images = None


if __name__ == "__main__":
    sys.exit(main())
