"""Where a model looked: maps over an image of what a word, a caption or an answer was read from.

The weights are those of cross-attention, of QLLaMA's queries to the patches, and in InternVL-Chat also those of the
decoder to the patches that it reads directly. A map of a text is the positive part of weight times gradient of the
text's score, summed over layers, heads and queries (https://arxiv.org/abs/2103.15679, section 3), so it shows what
spoke for the text. The score is a margin of logits, which does not vanish where the model is sure, as the gradient of
a probability does. `query_maps` shows the weights alone.

Weights are recorded in passes of eager attention; the model is left as it was. The class token has no place in the
image and is left out. Shape letters as in modeling_internvit, and R rows of texts, r of them per image.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, ProcessorMixin
from transformers.masking_utils import eager_mask

from ..hub_internvl import loaded_parameter
from ..image_processing_internvl import choose_grid
from ..layers_internvl import eager_attention_forward
from ..modeling_qllama import QLlamaCrossAttention
from ..synthetic.captions import CAPTION_PROMPTS
from ..texts_internvl import encode_batch
from .captioning import generate_captions
from .dialogue import answer_questions
from .embeddings import embed_texts, pixel_values_of
from .matching import matching_texts
from .metrics import check_finite


RECORDED = "internvl_recorded"  # name of the attention that is recorded, among those of transformers
Box = tuple[float, float, float, float]


# ----------------------------------------------------------------------------------------------------------- recording
# Weights of the cross-attention of each layer, (P, H, r M, N): the rows of an image are one long row.
_recorded: ContextVar[list[torch.Tensor] | None] = ContextVar("recorded", default=None)


def _recorded_attention(
    module: torch.nn.Module, *tensors: Any, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # Not by hooks on the layers: what QLLaMA's cross-attention returns is a rearranged copy of what it used, which has
    # no gradient.
    output, weights = eager_attention_forward(module, *tensors, **settings)
    recorded = _recorded.get()
    if recorded is not None and isinstance(module, QLlamaCrossAttention):
        recorded.append(weights)
    return output, weights


AttentionInterface.register(RECORDED, _recorded_attention)
AttentionMaskInterface.register(RECORDED, eager_mask)


@contextmanager
def recorded_attention(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Records QLLaMA's cross-attention in the passes within; a chat model's decoder can be asked for its weights.

    Yields:
        The list that each layer's weights are added to, (P, H, r M, N) for P images of r rows each.

    Raises:
        ValueError: The model has no queries and no decoder, so nothing to record.
    """
    qllama, decoder = getattr(model, "qllama", None), getattr(model, "language_model", None)
    if decoder is None and not getattr(model.config, "has_queries", False):
        raise ValueError("Maps need the queries of QLLaMA or a decoder: this checkpoint is InternVL-C alone.")
    parts = [(part, name) for part, name in ((qllama, RECORDED), (decoder, "eager")) if part is not None]
    configs = {id(m.config): (m.config, name) for part, name in parts for m in part.modules() if hasattr(m, "config")}
    before = [(config, config._attn_implementation) for config, _ in configs.values()]
    recorded: list[torch.Tensor] = []
    token = _recorded.set(recorded)
    try:
        for config, name in configs.values():
            config._attn_implementation = name
        yield recorded
    finally:
        _recorded.reset(token)
        for config, name in before:
            config._attn_implementation = name


def contributions(
    score: torch.Tensor, weights: Sequence[torch.Tensor], keep_graph: bool = False
) -> list[torch.Tensor]:
    """Weight times gradient of a score (), for weights of any shape; 0 where none leads there."""
    gradients = torch.autograd.grad(score, list(weights), retain_graph=keep_graph, allow_unused=True)
    return [
        torch.zeros_like(weight) if gradient is None else (weight * gradient).detach()
        for weight, gradient in zip(weights, gradients, strict=True)
    ]


def relevance(score: torch.Tensor, weights: Sequence[torch.Tensor], keep_graph: bool = False) -> list[torch.Tensor]:
    """The positive part of `contributions`: what spoke for the score."""
    return [part.clamp(min=0) for part in contributions(score, weights, keep_graph)]


def margins(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits of the targets over the best other's: (B, L, V), (B, L) -> (B, L)."""
    index = targets[..., None]
    others = logits.scatter(-1, index, torch.finfo(logits.dtype).min).amax(dim=-1)
    return logits.gather(-1, index)[..., 0] - others


# ---------------------------------------------------------------------------------------------------------------- maps
@dataclass(frozen=True)
class AttentionMap:
    """A map over a part of an image.

    Args:
        text: What it is the map of.
        values: (height, width), at least 0, a value per patch.
        box: Left, top, right, bottom in pixels of what the model saw of the image; it may reach beyond the image.
    """

    text: str
    values: torch.Tensor
    box: Box

    def highest(self) -> tuple[float, float]:
        """The centre (x, y), in pixels of the image, of the patch with the highest value.

        Raises:
            ValueError: If a value is not finite.
        """
        check_finite(self.values, "A value of a map")
        height, width = self.values.shape
        row, column = divmod(int(self.values.argmax()), width)
        left, top, right, bottom = self.box
        return left + (right - left) * (column + 0.5) / width, top + (bottom - top) * (row + 0.5) / height

    def over(self, size: tuple[int, int]) -> torch.Tensor:
        """Values (height, width) for the pixels of an image of `size` (width, height), between 0 and 1; 0 outside."""
        left, top, right, bottom = (round(edge) for edge in self.box)
        shape = (max(1, bottom - top), max(1, right - left))
        smooth = F.interpolate(self.values[None, None].float(), size=shape, mode="bilinear", align_corners=False)[0, 0]
        smooth = smooth.clamp(min=0) / smooth.max().clamp(min=torch.finfo(torch.float32).tiny)
        over = torch.zeros(size[1], size[0])
        x, y, x_end, y_end = max(0, left), max(0, top), min(size[0], right), min(size[1], bottom)
        over[y:y_end, x:x_end] = smooth[y - top : y_end - top, x - left : x_end - left]
        return over


def joined(maps: Sequence[AttentionMap]) -> AttentionMap:
    """The map of a whole text from those of its words."""
    values = torch.stack([found.values for found in maps]).sum(dim=0)
    return AttentionMap(" ".join(found.text for found in maps), values, maps[0].box)


def seen_box(size: tuple[int, int], image_processor: Any) -> Box:
    """What an image processor shows of an image of `size` (width, height): left, top, right, bottom in its pixels."""
    width, height = size
    mode = image_processor.resize_mode
    if mode not in ("crop", "pad"):
        return 0.0, 0.0, float(width), float(height)
    side: float = max(size)
    if mode == "crop":
        edge = image_processor.size.shortest_edge if image_processor.do_resize else min(size)
        side = image_processor.crop_size.height * min(size) / edge
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _grid(pixel_values: torch.Tensor, model: PreTrainedModel) -> tuple[int, int]:
    patch_size = model.config.vision_config.patch_size
    return pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size


def _over_patches(weights: Sequence[torch.Tensor], num_queries: int, grid: tuple[int, int]) -> torch.Tensor:
    """Weights (P, H, r M, N) of layers -> (P r, M, height, width): their sum over layers and heads, per query."""
    total = torch.stack([weight.float().sum(dim=1).cpu() for weight in weights]).sum(dim=0)
    return rearrange(total[..., 1:], "p (r m) (h w) -> (p r) m h w", m=num_queries, h=grid[0])


def query_maps(model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image) -> list[AttentionMap]:
    """What each query of QLLaMA reads in an image, as one tile: its weights, averaged over layers and heads."""
    pixels = pixel_values_of(model, processor, [image])
    with torch.no_grad(), recorded_attention(model) as recorded:
        get_features = getattr(model, "get_query_features", None) or model.get_image_features
        get_features(pixels)
    if not recorded:
        raise ValueError("Query maps need the queries of QLLaMA, which this checkpoint does not have.")
    grid, box = _grid(pixels, model), seen_box(image.size, processor.image_processor)
    maps = _over_patches(recorded, model.query_tokens.shape[1], grid)[0]
    maps = maps / (len(recorded) * recorded[0].shape[1])
    return [AttentionMap(f"query {number}", values, box) for number, values in enumerate(maps)]


# ---------------------------------------------------------------------------------------------- InternVL-G, of texts
def _caption_scores(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pixels: torch.Tensor,
    texts: Sequence[str],
    prompts: Sequence[str],
) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Margins (R, L - 1) of the tokens of texts behind the prompt, where they are those of the texts, and the ids."""
    whole = [f"{prompt} {text}" for prompt, text in zip(prompts, texts, strict=True)]
    starts, rows = (
        encode_batch(processor.tokenizer, rows, False, padding=False)["input_ids"] for rows in (prompts, whole)
    )
    begin = [_common_length(start, row) for start, row in zip(starts, rows, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=pixels.device)
    is_text = torch.tensor(
        [[first <= place < len(row) for place in range(1, width)] for first, row in zip(begin, rows, strict=True)],
        device=pixels.device,
    )
    tokens = model.vision_model(pixels, return_dict=True).last_hidden_state
    outputs = model.qllama(
        input_ids=ids,
        query_embeds=loaded_parameter(model, "query_tokens").expand(len(rows), -1, -1),
        vision_hidden_states=tokens,
        use_cache=False,
        return_dict=True,
    )
    # Texts are causal, so padding behind them changes nothing.
    found = margins(outputs.logits[:, :-1].float(), ids[:, 1:])
    return found, is_text, [row[first:] for first, row in zip(begin, rows, strict=True)]


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


def _caption_score(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pixels: torch.Tensor,
    texts: Sequence[str],
    prompts: Sequence[str],
) -> torch.Tensor:
    found, is_text, _ = _caption_scores(model, processor, pixels, texts, prompts)
    return (found * is_text).sum(dim=1)


def _matching_score(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pixels: torch.Tensor,
    texts: Sequence[str],
    prompts: Sequence[str],
) -> torch.Tensor:
    ids, mask = (part.to(pixels.device) for part in matching_texts(processor, texts))
    logits = model.get_matching_logits(pixels, ids, mask)
    return logits[:, 1] - logits[:, 0]


def _similarity_score(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pixels: torch.Tensor,
    texts: Sequence[str],
    prompts: Sequence[str],
) -> torch.Tensor:
    image = F.normalize(model.get_image_features(pixels, mode="InternVL-G").float(), dim=-1)
    return (embed_texts(model, processor, texts).clone().to(image.device) @ image.T)[:, 0]


Score = Callable[[PreTrainedModel, ProcessorMixin, torch.Tensor, Sequence[str], Sequence[str]], torch.Tensor]
# What is asked of a model about a text: to write it, whether it matches, how similar it is.
SCORES: dict[str, Score] = {
    "caption": _caption_score,
    "matching": _matching_score,
    "similarity": _similarity_score,
}


def text_maps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    texts: Sequence[str],
    score: str = "caption",
    language: str | Sequence[str] = "en",
) -> list[AttentionMap]:
    """What an InternVL-G reads in an image, as one tile, for each of several texts.

    Args:
        model: With queries.
        processor: Its processor.
        image: The image.
        texts: Captions, or the names of things.
        score: One of `SCORES`.
        language: Of all texts, or of each; its prompt of `CAPTION_PROMPTS` stands before captions.

    Raises:
        ValueError: No queries, or an unknown score.
    """
    if score not in SCORES:
        raise ValueError(f"`score` must be one of {list(SCORES)}, got {score!r}.")
    _check_is_internvl_g(model)
    languages = [language] * len(texts) if isinstance(language, str) else language
    pixels = pixel_values_of(model, processor, [image]).requires_grad_()
    num_queries, grid = model.query_tokens.shape[1], _grid(pixels, model)
    with torch.enable_grad(), recorded_attention(model) as recorded:
        scores = SCORES[score](model, processor, pixels, texts, [CAPTION_PROMPTS[one] for one in languages])
    if recorded[0].shape[2] == len(texts) * num_queries:  # a row for each text, which others do not reach
        values = _over_patches(relevance(scores.sum(), recorded), num_queries, grid).sum(dim=1)
    else:
        last = len(texts) - 1
        parts = [relevance(one, recorded, keep_graph=i < last) for i, one in enumerate(scores)]
        values = torch.cat([_over_patches(part, num_queries, grid).sum(dim=1) for part in parts])
    box = seen_box(image.size, processor.image_processor)
    return [AttentionMap(text, of_text, box) for text, of_text in zip(texts, values, strict=True)]


def caption_maps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    text: str | None = None,
    language: str = "en",
) -> list[AttentionMap]:
    """What InternVL-G read in an image, as one tile, for each word of a caption.

    Args:
        model: With queries.
        processor: Its processor.
        image: The image.
        text: The caption; None generates it.
        language: Whose prompt of `CAPTION_PROMPTS` stands before it.
    """
    _check_is_internvl_g(model)
    if text is None:
        (text,) = generate_captions(model, processor, [image], language)
    pixels = pixel_values_of(model, processor, [image]).requires_grad_()
    with torch.enable_grad(), recorded_attention(model) as recorded:
        found, is_text, (ids,) = _caption_scores(model, processor, pixels, [text], [CAPTION_PROMPTS[language]])
        of_tokens = found[0][is_text[0]]
    maps = []
    for word, places in words_of_tokens(processor.tokenizer, ids):
        weights = relevance(of_tokens[places].sum(), recorded, keep_graph=True)
        values = _over_patches(weights, model.query_tokens.shape[1], _grid(pixels, model))[0].sum(dim=0)
        maps.append(AttentionMap(word, values, seen_box(image.size, processor.image_processor)))
    return maps


def matching_maps(
    model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image, text: str
) -> list[AttentionMap]:
    """What InternVL-G read in an image, as one tile, to see whether each word of a text matches.

    The matching head reads the queries, not words. So a word's map is what it adds: the contributions to the score of
    the text over those to the score of the text without the word, whose tokens are masked.
    """
    _check_is_internvl_g(model)
    pixels = pixel_values_of(model, processor, [image]).requires_grad_()
    ids, mask = (part.to(pixels.device) for part in matching_texts(processor, [text]))
    words = words_of_tokens(processor.tokenizer, ids[0].tolist())
    masks = mask.repeat(len(words) + 1, 1)
    for row, (_, places) in enumerate(words, start=1):
        masks[row, places] = 0
    with torch.enable_grad(), recorded_attention(model) as recorded:
        logits = model.get_matching_logits(pixels, ids.expand(len(masks), -1), masks)
        parts = contributions((logits[:, 1] - logits[:, 0]).sum(), recorded)
    of_texts = _over_patches(parts, model.query_tokens.shape[1], _grid(pixels, model)).sum(dim=1)
    box = seen_box(image.size, processor.image_processor)
    added = (of_texts[:1] - of_texts[1:]).clamp(min=0)
    return [AttentionMap(word, values, box) for (word, _), values in zip(words, added, strict=True)]


def _check_is_internvl_g(model: PreTrainedModel) -> None:
    if not hasattr(model, "get_matching_logits") or not model.config.has_queries:
        raise ValueError("Maps of texts need an InternVL-G, a model with queries; of a chat model use `answer_maps`.")


def words_of_tokens(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Groups tokens to words: a word begins at a blank, and where there are none, as in Chinese, at every token.

    Returns:
        Each word and the places of its tokens. Special tokens belong to none.
    """
    words: list[tuple[str, list[int]]] = []
    before, waiting = "", []
    for place in range(len(ids)):
        text = tokenizer.decode(list(ids[: place + 1]), skip_special_tokens=True)
        waiting.append(place)
        if text.endswith("\ufffd"):  # the first bytes of a character
            continue
        piece, before, places, waiting = text[len(before) :], text, waiting, []
        if not piece.strip():
            continue
        if words and piece[0] not in " \n" and not text[: -len(piece)].endswith((" ", "\n")) and _has_blanks(piece):
            word, earlier = words.pop()
            piece, places = word + piece, [*earlier, *places]
        words.append((piece.strip(), places))
    return words


def _has_blanks(piece: str) -> bool:
    """Whether the script of a piece sets blanks between words; Chinese and Japanese do not."""
    return not any("\u3041" <= sign <= "\u9fff" for sign in piece)


# ------------------------------------------------------------------------------------------------------- InternVL-Chat
def answer_maps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    question: str,
    answer: str | None = None,
    **image_settings: Any,
) -> list[AttentionMap]:
    """What a chat model read in an image for each word of its answer to a question.

    Args:
        model: A chat model of any connector.
        processor: Its processor.
        image: The image; maps of its tiles are put together, and the thumbnail's is added.
        question: The question.
        answer: The answer; None generates it.
        **image_settings: For the image processor, such as `max_num`.
    """
    if answer is None:
        (answer,) = answer_questions(model, processor, [(image, question)], **image_settings)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    (maps,) = dialogue_maps(model, processor, [{"role": "user", "content": content}], answer, **image_settings)
    return maps


def dialogue_maps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    messages: Sequence[dict[str, Any]],
    answer: str,
    **image_settings: Any,
) -> list[list[AttentionMap]]:
    """What a chat model read in every image of a dialogue for each word of an answer.

    Args:
        model: A chat model of any connector.
        processor: Its processor.
        messages: The dialogue up to the question; its images are PIL images.
        answer: The answer.
        **image_settings: For the image processor, such as `max_num`.

    Returns:
        For each image, in the order in which they stand, a map of each word. The values of one word can be compared
        between the images.
    """
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    processor_kwargs = {"return_num_patches": True, **image_settings}
    inputs = processor.apply_chat_template(list(messages), **settings, processor_kwargs=processor_kwargs)
    prompt = inputs["input_ids"].to(model.device)
    ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    images = images_in(messages)
    if not ids or not images:
        return [[] for _ in images]
    tokens = torch.cat([prompt, prompt.new_tensor([ids])], dim=1)
    pixels = inputs["pixel_values"].to(model.device).requires_grad_()
    with torch.enable_grad(), recorded_attention(model) as recorded:
        outputs = model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=pixels,
            output_attentions=True,
            use_cache=False,
        )
    of_tokens = margins(outputs.logits[:, prompt.shape[1] - 1 : -1].float(), tokens[:, prompt.shape[1] :])[0]
    is_image = tokens[0] == model.img_context_token_id
    counts = [int(count) for count in inputs["num_patches"]]
    places = [
        (tile_grid(processor.image_processor, image.size, count, **image_settings), image.size)
        for image, count in zip(images, counts, strict=True)
    ]
    depth = len(recorded)
    maps: list[list[AttentionMap]] = [[] for _ in images]
    for word, of_word in words_of_tokens(processor.tokenizer, ids):
        found = relevance(of_tokens[of_word].sum(), [*recorded, *outputs.attentions], keep_graph=True)
        tiles = _tiles(model, _grid(pixels, model), found[:depth], found[depth:], is_image).split(counts)
        for row, of_image, (grid, size) in zip(maps, tiles, places, strict=True):
            box = seen_box(size, processor.image_processor)
            row.append(AttentionMap(word, put_together(of_image, grid), box))
    return maps


def images_in(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """The images of a dialogue in the order in which they stand."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


def _tiles(
    model: PreTrainedModel,
    grid: tuple[int, int],
    cross: Sequence[torch.Tensor],
    decoder: Sequence[torch.Tensor],
    is_image: torch.Tensor,
) -> torch.Tensor:
    """Maps (tiles, height, width) from the relevance of the queries' weights and of the decoder's (1, H, L, L)."""
    num_queries = 0 if model.query_tokens is None else model.query_tokens.shape[1]
    behind = torch.arange(len(is_image), device=is_image.device) > is_image.nonzero().max()
    rows = [weight[0].float().sum(dim=0)[behind.to(weight.device)].sum(dim=0).cpu() for weight in decoder]
    read = torch.stack(rows).sum(dim=0)[is_image.cpu()]
    patches = read.unflatten(0, (-1, model.num_image_token))[:, num_queries:]
    maps = patches.new_zeros(len(patches), *grid)
    if patches.shape[1]:
        fold = round(1 / model.config.downsample_ratio)
        order = "(h w)" if model.config.ps_version == "v2" else "(w h)"  # as `pixel_shuffle` lays them out
        side = grid[0] // fold
        maps += repeat(patches, f"t {order} -> t (h a) (w b)", h=side, a=fold, b=fold) / fold**2
    if cross:
        maps += reduce(_over_patches(cross, num_queries, grid), "t m h w -> t h w", "sum")
    return maps


def tile_grid(image_processor: Any, size: tuple[int, int], num_tiles: int, **image_settings: Any) -> tuple[int, int]:
    """Columns and rows of the tiles of an image of `size` (width, height)."""
    if num_tiles == 1:
        return 1, 1
    fewest, most = (image_settings.get(name, getattr(image_processor, name)) for name in ("min_num", "max_num"))
    columns, rows = choose_grid(*size, fewest, most, image_processor.size.height)
    if num_tiles - columns * rows not in (0, 1):
        raise ValueError(f"{num_tiles} tiles are no grid of {columns} x {rows}: set them by `min_num` and `max_num`.")
    return columns, rows


def put_together(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Maps (tiles, height, width), row by row, to one of the image; the map of a thumbnail behind them is added.

    Every patch of the thumbnail lies over several of the tiles, and its value is divided among them.
    """
    columns, rows = grid
    whole = rearrange(maps[: columns * rows], "(r c) h w -> (r h) (c w)", r=rows)
    if len(maps) > columns * rows:
        thumbnail = F.interpolate(maps[-1][None, None], size=whole.shape, mode="bilinear", align_corners=False)
        whole = whole + thumbnail[0, 0] / (columns * rows)
    return whole
