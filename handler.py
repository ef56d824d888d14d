"""Serves the model beside it on Inference Endpoints: chat, embeddings, zero-shot classification and captions.

Inference Endpoints import this file alone, make an `EndpointHandler` of the folder, and call it with the body of each
request, `{"inputs": ..., "parameters": {...}}`. A body that is an image arrives as a PIL image in `inputs`, a query as
`parameters`. What raises a ValueError is answered with status 400 and its message.

- chat (InternVL-Chat): a question, messages, or `{"images": [...], "text": ...}`; answered by `[{"generated_text",
  "finish_reason"}]`, where the reason is stop, length or time.
- embeddings (InternVL-C, -G): a text, a list of texts and `data:image/` addresses, or `{"images": [...], "texts":
  [...]}`; answered by `{"embeddings"}`, or `{"image_embeddings", "text_embeddings"}`.
- zero-shot (InternVL-C, -G): an image or a list of images, with `candidate_labels`; answered by `[{"label",
  "score"}]`, best first, or a list of those.
- caption (InternVL-G): an image or a list of images; answered by `[{"generated_text", "finish_reason"}]`, one each.

The first task of a model is its default; `candidate_labels` stand for zero-shot.

An image is an http(s) or `data:` address, base64 text, bytes or a PIL image. It is never a path of this machine, and
addresses inside the network are not fetched. Every request has limits, see `EndpointLimits`.

Not covered: streaming, which Inference Endpoints offer for their own engines only.
"""

import os
import reprlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor


# `model_type` to tasks; the first one is the default.
TASKS = {
    "internvl_chat_model": ("chat",),
    "internvl_14b": ("embeddings", "zero-shot", "caption"),
}
MODES = ("InternVL-C", "C", "InternVL-G", "G")
ROLES = ("system", "user", "assistant")
IMAGE_KEYS = ("image", "url", "base64", "image_url")
IMAGE_PREFIX = "data:image/"
# A model in a sub-folder of the repository, such as `internvl_g`.
SUBFOLDER = "INTERNVL_SUBFOLDER"
# Name, type, smallest and largest value of the settings of `generate` that a request may choose.
GENERATION_NUMBERS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 1e-3, 100.0),
    "top_p": (float, 1e-6, 1.0),
    "top_k": (int, 1, 1000),
    "num_beams": (int, 1, 8),
    "min_new_tokens": (int, 1, 512),
    "no_repeat_ngram_size": (int, 1, 64),
    "repetition_penalty": (float, 0.1, 10.0),
    "length_penalty": (float, -10.0, 10.0),
}
SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class EndpointLimits:
    """What one request may ask for.

    Args:
        images: Images.
        image_bytes: Bytes of one image file, or characters of its base64 text or address.
        pixels: Pixels of all images together.
        tiles: Tiles of all images together.
        texts: Texts, candidate labels, or parts of messages.
        characters: Characters of all texts together.
        new_tokens: Tokens of an answer.
        seconds: For downloads and computation together. An answer ends early; all else is refused.
        batch: Images or texts that are computed at once.
    """

    images: int = 16
    image_bytes: int = 2**25
    pixels: int = 2**27
    tiles: int = 64
    texts: int = 256
    characters: int = 2**16
    new_tokens: int = 2048
    seconds: float = 60.0
    batch: int = 16


class EndpointHandler:
    """Answers requests with the model of a folder.

    Args:
        path: Folder of the repository. Set the environment variable `INTERNVL_SUBFOLDER` to serve one of its
            sub-folders.

    Raises:
        ValueError: If the folder holds another kind of model.
    """

    limits = EndpointLimits()

    def __init__(self, path: str | os.PathLike = "") -> None:
        folder = os.fspath(path) or "."
        place = {"subfolder": os.environ.get(SUBFOLDER, "")}
        # Whoever runs this file has trusted the code of the folder, of which it is part.
        config = AutoConfig.from_pretrained(folder, **place, trust_remote_code=True)
        if config.model_type not in TASKS:
            raise ValueError(
                f"This handler serves InternVL-C, InternVL-G and InternVL-Chat, not `{config.model_type}`. For a "
                "vision tower delete handler.py: the endpoint then takes the pipeline of its task."
            )
        is_chat = "chat" in TASKS[config.model_type]
        has_captions = is_chat or config.has_queries
        self.tasks = [task for task in TASKS[config.model_type] if task != "caption" or has_captions]
        self.modes = MODES if has_captions else MODES[:2]
        auto_class: Any = AutoModelForImageTextToText if is_chat else AutoModel
        # Many processors compute bfloat16 slowly.
        is_gpu = torch.cuda.is_available()
        precision = {"dtype": "auto", "device_map": "auto"} if is_gpu else {"dtype": torch.float32}
        self.model = auto_class.from_pretrained(folder, **place, **precision, trust_remote_code=True).eval()
        self.processor = AutoProcessor.from_pretrained(folder, **place, trust_remote_code=True)
        images = self.processor.image_processor
        images.allow_local_files = False
        images.max_image_pixels = min(images.max_image_pixels, self.limits.pixels)
        self._most_tokens = (config.text_config if is_chat else config.qllama_config).max_position_embeddings
        ends = (self.model if is_chat else self.model.qllama).generation_config.eos_token_id if has_captions else None
        self._end_token_ids = set(ends if isinstance(ends, list) else [ends])
        self._lock = Lock()  # a fast tokenizer must not be used by two threads

    def __call__(self, data: Mapping[str, Any]) -> Any:
        """Answers one request.

        Args:
            data: `inputs`, and optionally `parameters`: `task`, the settings of the task, and of generation.

        Raises:
            ValueError: If the request is malformed or exceeds a limit.
        """
        if not isinstance(data, Mapping) or "inputs" not in data:
            raise ValueError('A request must be `{"inputs": ..., "parameters": {...}}`.')
        _refuse(data, {"inputs", "parameters", "options"}, "A request")
        inputs, settings = data["inputs"], _Settings(data.get("parameters"))
        task = settings.choice("task", self.tasks) or self._default_task(settings)
        answer: Callable[[Any, _Settings, float], Any] = {
            "chat": self._chat,
            "embeddings": self._embed,
            "zero-shot": self._classify,
            "caption": self._describe,
        }[task]
        with self._lock, torch.inference_mode():
            return answer(inputs, settings, time.monotonic() + self.limits.seconds)

    def _default_task(self, settings: "_Settings") -> str:
        return "zero-shot" if "zero-shot" in self.tasks and "candidate_labels" in settings else self.tasks[0]

    # ---------------------------------------------------------------------------------------------------------- tasks
    def _chat(self, inputs: Any, settings: "_Settings", deadline: float) -> list[dict[str, str]]:
        messages, sources = self._messages(inputs, settings)
        generation = self._generation(settings)
        tiling = {"max_num": settings.number("max_num", int, 1, self.limits.tiles)}
        settings.close()
        tiling = {name: value for name, value in tiling.items() if value is not None}
        images = self._open(sources, deadline)
        count = self.processor.image_processor.get_number_of_image_patches
        tiles = sum(count(image.height, image.width, tiling) for image in images)
        if tiles > self.limits.tiles:
            raise ValueError(
                f"The images make {tiles} tiles, more than {self.limits.tiles}. Set `max_num`, the most for an image."
            )
        features = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={**tiling, "images": images} if images else tiling,
        ).to(self.model.device)
        prompt = features["input_ids"].shape[1]
        self._check_length(prompt, generation)
        generation["max_time"] = _seconds_left(deadline)
        return self._texts(self.model.generate(**features, **generation)[:, prompt:], generation)

    def _describe(self, inputs: Any, settings: "_Settings", deadline: float) -> list[dict[str, str]]:
        prompt = settings.text("prompt")
        generation = self._generation(settings)
        settings.close()
        self._check_texts([prompt or ""])
        images = self._open(_as_list(inputs), deadline)
        if not images:
            raise ValueError("`inputs` holds no image.")
        texts = {"text": [prompt] * len(images)} if prompt else {}
        features = self.processor(images=images, mode="caption", return_tensors="pt", **texts).to(self.model.device)
        self._check_length(self.model.config.num_query_token + features["input_ids"].shape[1], generation)
        generation["max_time"] = _seconds_left(deadline)
        return self._texts(self.model.generate(**features, **generation), generation)

    def _embed(self, inputs: Any, settings: "_Settings", deadline: float) -> dict[str, list[list[float]]]:
        mode, normalize = settings.choice("mode", self.modes), settings.flag("normalize")
        settings.close()
        given = _texts_and_images(inputs)
        self._check_texts(given["texts"])
        images = self._open(given["images"], deadline)
        rows = {
            "texts": self._features(given["texts"], self._text_features, deadline),
            "images": self._features(images, lambda part: self._image_features(part, mode), deadline),
        }
        change = partial(torch.nn.functional.normalize, dim=-1) if normalize else torch.Tensor.clone
        lists = {kind: [change(row).tolist() for row in found] for kind, found in rows.items()}
        if given["order"]:
            each = {kind: iter(part) for kind, part in lists.items()}
            return {"embeddings": [next(each[kind]) for kind in given["order"]]}
        return {f"{kind[:-1]}_embeddings": part for kind, part in lists.items() if part}

    def _classify(self, inputs: Any, settings: "_Settings", deadline: float) -> list[Any]:
        labels, template = settings.labels("candidate_labels"), settings.text("hypothesis_template") or "{}"
        mode = settings.choice("mode", self.modes)
        settings.close()
        if "{}" not in template:
            raise ValueError("`hypothesis_template` must hold `{}`, the place of the label.")
        growth = template.count("{}")  # texts are made once it is known that they are few: they could fill the memory
        self._check_size(len(labels), sum(len(template) + growth * (len(label) - 2) for label in labels))
        # Not `format`, whose fields could reach attributes.
        texts = [template.replace("{}", label) for label in labels]
        self._check_texts(texts)
        images = self._open(_as_list(inputs), deadline)
        if not images:
            raise ValueError("`inputs` holds no image.")
        rows = (
            self._features(images, lambda part: self._image_features(part, mode), deadline),
            self._features(texts, self._text_features, deadline),
        )
        image_embeds, text_embeds = (torch.nn.functional.normalize(torch.stack(part), dim=-1) for part in rows)
        logits = self.model.logit_scale.exp().float().cpu() * image_embeds @ text_embeds.T
        answers = [
            sorted(
                ({"label": label, "score": score} for label, score in zip(labels, scores, strict=True)),
                key=lambda found: -found["score"],
            )
            for scores in logits.softmax(dim=-1).tolist()
        ]
        return answers if isinstance(inputs, (list, tuple)) else answers[0]

    # ------------------------------------------------------------------------------------------------------- features
    def _features(self, items: list[Any], compute: Callable[[list[Any]], torch.Tensor], deadline: float) -> list[Any]:
        """Rows of features in fp32 on the CPU, in batches."""
        rows: list[torch.Tensor] = []
        for start in range(0, len(items), self.limits.batch):
            _seconds_left(deadline)
            rows += compute(items[start : start + self.limits.batch]).float().cpu().unbind()
        return rows

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        features = self.processor(text=texts, mode="contrastive", return_tensors="pt").to(self.model.device)
        return self.model.get_text_features(**features)

    def _image_features(self, images: list[Image.Image], mode: str | None) -> torch.Tensor:
        features = self.processor(images=images, mode="contrastive", return_tensors="pt").to(self.model.device)
        return self.model.get_image_features(features["pixel_values"], **({"mode": mode} if mode else {}))

    def _texts(self, tokens: torch.Tensor, generation: dict[str, Any]) -> list[dict[str, str]]:
        """Decodes new tokens and says why each row ended: at its end token, at the limit of tokens or of time."""
        decoded = self.processor.batch_decode(tokens, skip_special_tokens=True)
        answers = []
        for row, text in zip(tokens.tolist(), decoded, strict=True):
            is_full = len(row) >= generation["max_new_tokens"]
            reason = "stop" if self._end_token_ids & set(row) else "length" if is_full else "time"
            answers.append({"generated_text": text.strip(), "finish_reason": reason})
        return answers

    # --------------------------------------------------------------------------------------------------------- inputs
    def _generation(self, settings: "_Settings") -> dict[str, Any]:
        """Arguments of `generate`. A setting of sampling turns sampling on."""
        found = {name: settings.number(name, *bounds) for name, bounds in GENERATION_NUMBERS.items()}
        found = {name: value for name, value in found.items() if value is not None}
        do_sample = settings.flag("do_sample")
        sampling = [name for name in SAMPLING if name in found]
        if do_sample is False and sampling:
            raise ValueError(f"`{sampling[0]}` has no effect without sampling. Leave it or `do_sample` out.")
        longest = settings.number("max_new_tokens", int, 1, self.limits.new_tokens) or min(256, self.limits.new_tokens)
        if found.get("min_new_tokens", 0) > longest:
            raise ValueError(f"`min_new_tokens` exceeds the {longest} of `max_new_tokens`.")
        return {**found, "do_sample": bool(do_sample or sampling), "max_new_tokens": longest}

    def _check_length(self, prompt: int, generation: dict[str, Any]) -> None:
        answer = generation["max_new_tokens"]
        if prompt + answer > self._most_tokens:
            raise ValueError(
                f"The prompt has {prompt} tokens and the answer up to {answer}, together more than the "
                f"{self._most_tokens} of this model."
            )

    def _messages(self, inputs: Any, settings: "_Settings") -> tuple[list[dict[str, Any]], list[Any]]:
        """Checked messages in which `{"type": "image"}` stands for each image, and the images in their order."""
        if isinstance(inputs, (Image.Image, bytes)):
            inputs = {"images": [inputs], "text": settings.text("text")}
        if isinstance(inputs, str):
            inputs = {"text": inputs}
        if isinstance(inputs, Mapping) and "messages" in inputs:
            _refuse(inputs, {"messages"}, "`inputs` with `messages`")
            inputs = inputs["messages"]
        elif isinstance(inputs, Mapping):
            inputs = [_question(inputs)]
        if not isinstance(inputs, Sequence) or not inputs:
            raise ValueError(f"`inputs` must be a question, messages, or `images` and `text`, got {_shown(inputs)}.")
        sources: list[Any] = []
        messages = [_message(message, sources) for message in inputs]
        if messages[-1]["role"] != "user":
            raise ValueError(f"The last message must be the user's, got role `{messages[-1]['role']}`.")
        parts = [part for message in messages for part in message["content"]]
        self._check_texts([part.get("text", "") for part in parts])
        return messages, sources

    def _check_size(self, count: int, characters: int) -> None:
        if count > self.limits.texts:
            raise ValueError(f"The request holds {count} texts, more than {self.limits.texts}.")
        if characters > self.limits.characters:
            raise ValueError(f"The texts have {characters} characters, more than {self.limits.characters}.")

    def _check_texts(self, texts: list[str]) -> None:
        self._check_size(len(texts), sum(map(len, texts)))
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"A text holds half of a surrogate pair: {_shown(text)}.") from error

    def _open(self, sources: Sequence[Any], deadline: float) -> list[Image.Image]:
        """Fetches and decodes images, one after another."""
        if len(sources) > self.limits.images:
            raise ValueError(f"The request holds {len(sources)} images, more than {self.limits.images}.")
        images: list[Image.Image] = []
        for number, source in enumerate(sources, start=1):
            name = f"Image {number} of {len(sources)}"
            self._check_source(source, name)
            limits = {"max_seconds": _seconds_left(deadline), "max_bytes": self.limits.image_bytes}
            try:
                (image,) = self.processor.image_processor.fetch_images([source], **limits)
            except ValueError as error:  # which calls it the only one
                raise ValueError(str(error).replace("Image 1 of 1", name, 1)) from error
            images.append(image)
            pixels = sum(found.width * found.height for found in images)
            if pixels > self.limits.pixels:
                raise ValueError(f"The images have {pixels} pixels, more than {self.limits.pixels}.")
        return images

    def _check_source(self, source: Any, name: str) -> None:
        if not isinstance(source, (str, bytes, Image.Image)):
            raise ValueError(f"{name} must be an address or base64 text, got {_shown(source)}.")
        if not isinstance(source, Image.Image) and len(source) > self.limits.image_bytes:
            raise ValueError(f"{name} has {len(source)} bytes, more than {self.limits.image_bytes}.")


class _Settings:
    """The parameters of a request; each is taken once, and what is left is refused."""

    def __init__(self, given: Any) -> None:
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"`parameters` must be an object of settings, got {_shown(given)}.")
        self.left = {name: value for name, value in (given or {}).items() if value is not None}
        self.known: set[Any] = set()

    def _take(self, name: str) -> Any:
        self.known.add(name)
        return self.left.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def text(self, name: str) -> str | None:
        """Takes a text, None if it is not given."""
        value = self._take(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"`{name}` must be a text, got {_shown(value)}.")
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        """Takes one of several texts."""
        value = self.text(name)
        if value is not None and value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)} for this model, got {_shown(value)}.")
        return value

    def flag(self, name: str) -> bool | None:
        """Takes a boolean."""
        value = self._take(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"`{name}` must be true or false, got {_shown(value)}.")
        return value

    def number(self, name: str, kind: type, least: float, most: float) -> Any:
        """Takes a number. A query of an address has numbers as text."""
        value = self._take(name)
        if value is None:
            return None
        try:
            number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
        except (ValueError, OverflowError):
            number = None
        if number is None or not least <= number <= most or (kind is int and number != int(number)):
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"`{name}` must be {what} from {least} to {most}, got {_shown(value)}.")
        return kind(number)

    def labels(self, name: str) -> list[str]:
        """Takes a list of texts, or one text with commas, as the page of a model sends it."""
        value = self._take(name)
        found = value.split(",") if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(label, str) and label.strip() for label in found):
            raise ValueError(f"`{name}` must be a list of texts, got {_shown(value)}.")
        if not found:
            raise ValueError(f"`{name}` is empty.")
        return [label.strip() for label in found]

    def close(self) -> None:
        """Raises a ValueError if anything is left."""
        _refuse(self.left, self.known, "`parameters` of this task")


# -------------------------------------------------------------------------------------------------- parts of a request
def _shown(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _refuse(names: Iterable[Any], known: Collection[str], what: str) -> None:
    unknown = sorted(reprlib.repr(name) for name in names if name not in known)
    if unknown:
        raise ValueError(f"{what} cannot hold {', '.join(unknown[:5])}; it can hold {', '.join(sorted(known))}.")


def _seconds_left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise ValueError("The request took longer than it may: ask for less at once.")
    return seconds


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _question(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A message of the user from images and a text."""
    _refuse(inputs, {"image", "images", "text"}, "`inputs` with `text`")
    images = inputs.get("images", [])
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"`images` must be a list, got {_shown(images)}.")
    images = [*images, *([inputs["image"]] if "image" in inputs else [])]
    text = inputs.get("text")
    if not isinstance(text, str):
        raise ValueError(f"`text`, the question about the images, must be a text, got {_shown(text)}.")
    return {
        "role": "user",
        "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}],
    }


def _message(message: Any, sources: list[Any]) -> dict[str, Any]:
    """A checked copy of a message; its images are appended to `sources`."""
    if not isinstance(message, Mapping):
        raise ValueError(f"A message must be an object with `role` and `content`, got {_shown(message)}.")
    _refuse(message, {"role", "content"}, "A message")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"The `role` of a message must be one of {', '.join(ROLES)}, got {_shown(role)}.")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ValueError(f"The `content` of a message must be a text or a list of parts, got {_shown(content)}.")
    return {"role": role, "content": [_part(part, sources) for part in parts]}


def _part(part: Any, sources: list[Any]) -> dict[str, str]:
    """A checked copy of a part of a message, without its image, which is appended to `sources`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        _refuse(part, {"type", "text"}, "A text of a message")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"The `text` of a message must be a text, got {_shown(part.get('text'))}.")
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        raise ValueError(f"A part of a message must have the `type` text, image or image_url, got {_shown(part)}.")
    given = [name for name in IMAGE_KEYS if part.get(name) is not None]
    _refuse(part, {"type", *IMAGE_KEYS}, "An image of a message")
    if len(given) != 1:
        raise ValueError(f"An image of a message must have one of {', '.join(IMAGE_KEYS)}, got {_shown(part)}.")
    source = part[given[0]]
    if given[0] == "image_url" and isinstance(source, Mapping):
        _refuse(source, {"url", "detail"}, "An `image_url`")
        source = source.get("url")
    sources.append(source)
    return {"type": "image"}


def _texts_and_images(inputs: Any) -> dict[str, list[Any]]:
    """Texts and images to embed, and under "order" the kind of each item if the two are mixed."""
    if isinstance(inputs, Mapping):
        _refuse(inputs, {"texts", "images"}, "`inputs` of embeddings")
        found = {name: _as_list(inputs.get(name) or []) for name in ("texts", "images")} | {"order": []}
    else:
        items = _as_list(inputs)
        order = ["images" if _is_image(item) else "texts" for item in items]
        pairs = list(zip(items, order, strict=True))
        found = {name: [item for item, kind in pairs if kind == name] for name in ("texts", "images")}
        found["order"] = order
    if wrong := [text for text in found["texts"] if not isinstance(text, str)]:
        raise ValueError(f"What is embedded must be a text or an image, got {_shown(wrong[0])}.")
    if not found["texts"] and not found["images"]:
        raise ValueError("`inputs` holds neither a text nor an image.")
    return found


def _is_image(item: Any) -> bool:
    """Whether an item of a plain list is an image: a text that is an address stays a text."""
    return isinstance(item, (Image.Image, bytes)) or (
        isinstance(item, str) and item[: len(IMAGE_PREFIX)].lower() == IMAGE_PREFIX
    )
