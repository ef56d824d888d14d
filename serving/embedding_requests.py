"""What a request to the embeddings API may hold, and the form of its answer.

The form is OpenAI's: `input` is a text or a list of texts. Here a text that begins with `data:image/` is an image, and
`image_urls` lists addresses of images. A text that is an address stays a text, and no request names a local file.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PretrainedConfig

from ..evaluation.embeddings import vector_size


IMAGE_PREFIX = "data:image/"
ENCODINGS = ("float", "base64")
FIELDS = ("input", "model", "dimensions", "encoding_format", "user", "image_urls", "normalize")


class UnknownModelError(ValueError):
    """A request names a model that is not served."""


@dataclass(frozen=True)
class EmbeddingLimits:
    """What a request may ask for; `embeddings_api` has the defaults.

    Args:
        max_inputs: Texts and images of a request.
        max_characters: Of a text. The processor cuts a text to the tokens that the model was trained with.
        max_image_urls: Addresses of a request; 0 fetches none.
        max_image_bytes: Of a file that is fetched.
        max_image_pixels: Largest width times height.
        download_seconds: From the look-up of a host to the last byte of its file.
    """

    max_inputs: int
    max_characters: int
    max_image_urls: int
    max_image_bytes: int
    max_image_pixels: int
    download_seconds: float


@dataclass(frozen=True)
class EmbeddingInput:
    """One text or image.

    Args:
        kind: "text", "data" for a `data:` address of an image, or "url".
        value: The text or address.
        name: Where in the request it is, for messages.
    """

    kind: Literal["text", "data", "url"]
    value: str
    name: str


@dataclass(frozen=True)
class EmbeddingsRequest:
    """A request that may be answered.

    Args:
        inputs: Those of `input`, then those of `image_urls`.
        model: The name under which the model is served.
        dimensions: Length to which vectors are cut; None leaves them whole.
        encoding_format: "float", or "base64" of little-endian float32.
        normalize: Whether vectors get unit length, as OpenAI's have; else they are those of `get_*_features`.
    """

    inputs: tuple[EmbeddingInput, ...]
    model: str
    dimensions: int | None = None
    encoding_format: str = "float"
    normalize: bool = True


@dataclass(frozen=True)
class RequestReader:
    """Reads the JSON value of a request.

    Args:
        model: The name under which the model is served.
        config: Of the model.
        limits: What a request may ask for.
    """

    model: str
    config: PretrainedConfig
    limits: EmbeddingLimits

    def read(self, body: Any) -> EmbeddingsRequest:
        """Returns the request.

        Raises:
            UnknownModelError: Another model is asked for.
            ValueError: Anything else that is not answered; the message is one line.
        """
        if not isinstance(body, Mapping):
            raise ValueError(f"The body must be a JSON object with `input`, got {_kind(body)}.")
        if unknown := [name for name in body if name not in FIELDS]:
            raise ValueError(f"`{unknown[0][:50]}` is no field of a request; there are {', '.join(FIELDS)}.")
        return EmbeddingsRequest(
            inputs=self._inputs(body),
            model=self._model(body.get("model")),
            dimensions=self._dimensions(body.get("dimensions")),
            encoding_format=_encoding(body.get("encoding_format")),
            normalize=_normalize(body.get("normalize")),
        )

    def _inputs(self, body: Mapping[str, Any]) -> tuple[EmbeddingInput, ...]:
        texts, urls = body.get("input"), body.get("image_urls")
        texts = [texts] if isinstance(texts, str) else [] if texts is None and urls else texts
        urls = [] if urls is None else urls
        if not isinstance(texts, list) or not isinstance(urls, list):
            raise ValueError("`input` must be a string or a list of strings, and `image_urls` a list of addresses.")
        limits = self.limits
        if not 0 < len(texts) + len(urls) <= limits.max_inputs:
            raise ValueError(
                f"A request holds 1 to {limits.max_inputs} texts and images, this one {len(texts) + len(urls)}."
            )
        if len(urls) > limits.max_image_urls:
            raise ValueError(f"`image_urls` may hold {limits.max_image_urls} addresses, got {len(urls)}.")
        found = [self._input(text, f"`input[{index}]`") for index, text in enumerate(texts)]
        return (*found, *(_address(url, f"`image_urls[{index}]`") for index, url in enumerate(urls)))

    def _input(self, text: Any, name: str) -> EmbeddingInput:
        if isinstance(text, (int, list)) and not isinstance(text, bool):
            raise ValueError(
                f"{name} holds token ids, which are those of another tokenizer: send texts (LangChain does with "
                "`check_embedding_ctx_length=False`)."
            )
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a string, got {_kind(text)}.")
        if text[: len(IMAGE_PREFIX)].lower() == IMAGE_PREFIX:
            return EmbeddingInput("data", text, name)
        if not text:
            raise ValueError(f"{name} is an empty text.")
        if len(text) > self.limits.max_characters:
            raise ValueError(f"{name} has {len(text)} characters, more than {self.limits.max_characters}.")
        if not is_unicode(text):
            raise ValueError(f"{name} is no Unicode text: it holds half of a surrogate pair.")
        return EmbeddingInput("text", text, name)

    def _model(self, name: Any) -> str:
        if name is not None and not isinstance(name, str):
            raise ValueError(f"`model` must be a string, got {_kind(name)}.")
        if name not in (None, self.model):
            raise UnknownModelError(f"There is no model {name[:100]!r} here; there is {self.model!r}.")
        return self.model

    def _dimensions(self, size: Any) -> int | None:
        if size is None or (type(size) is int and size == self.config.clip_embed_dim):
            return None
        if type(size) is not int or not 0 < size < self.config.clip_embed_dim:
            shown = size if type(size) is int and abs(size) < 10**9 else _kind(size)
            raise ValueError(
                f"`dimensions` must be a whole number from 1 to {self.config.clip_embed_dim}, got {shown}."
            )
        try:
            return vector_size(self.config, size)
        except ValueError as error:
            raise ValueError(str(error).replace("`dims`", "`dimensions`")) from None


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8, which JSON does not ensure."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    """The JSON name of the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _address(url: Any, name: str) -> EmbeddingInput:
    if not isinstance(url, str) or not url.lower().startswith(("http://", "https://")):
        raise ValueError(f"{name} must be an address that begins with http:// or https://.")
    if not is_unicode(url) or len(url) > 8192:
        raise ValueError(f"{name} is no address: it is too long, or no Unicode text.")
    return EmbeddingInput("url", url, name)


def _encoding(name: Any) -> str:
    if name is not None and name not in ENCODINGS:
        raise ValueError(f"`encoding_format` must be {' or '.join(map(repr, ENCODINGS))}.")
    return name or ENCODINGS[0]


def _normalize(value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"`normalize` must be true or false, got {_kind(value)}.")
    return value is not False


def answer(request: EmbeddingsRequest, features: np.ndarray, tokens: int) -> dict[str, Any]:
    """Returns the answer to a request.

    Args:
        request: The request.
        features: Of its inputs (inputs, E), float32.
        tokens: Of its texts, all together.
    """
    vectors = features[:, : request.dimensions]
    if request.normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": embedding}
            for index, embedding in enumerate(_encoded(vectors, request.encoding_format))
        ],
        "model": request.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encoded(vectors: np.ndarray, encoding_format: str) -> Sequence[list[float] | str]:
    if encoding_format == "base64":
        return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    return vectors.tolist()


__all__ = ["EmbeddingInput", "EmbeddingLimits", "EmbeddingsRequest", "RequestReader", "UnknownModelError", "answer"]
