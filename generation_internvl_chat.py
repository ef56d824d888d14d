"""Generation of InternVL-Chat with images.

Images are encoded once, before the search, and reach the steps that read their placeholders. Drafts of assisted
decoding and caches of earlier turns are accounted for.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationMixin, LogitsProcessor, LogitsProcessorList

from .image_placement_internvl import NO_IMAGE_TOKEN, mismatch_message, place_in_order


# Arguments of the published `generate`, by position.
PUBLISHED_ORDER = ("pixel_values", "input_ids", "attention_mask", "visual_features", "generation_config")
# Arguments that `generate` adds for its steps.
SEARCH_STATE = ("prompt_length", "assistant_image_embeds", "is_assisted")
# The mixin calls methods of `GenerationMixin`: type checkers see a subclass, at run time it stands before it.
_Generation: Any = GenerationMixin if TYPE_CHECKING else object


@dataclass(frozen=True)
class Tiles:
    """The images of a call to `generate`, as in its arguments."""

    pixel_values: torch.Tensor | None
    image_flags: torch.Tensor | None
    num_patches: torch.Tensor | None
    visual_features: torch.Tensor | None

    def __len__(self) -> int:
        given: Any = self.pixel_values if self.visual_features is None else self.visual_features
        return len(given)

    def only(self, is_kept: list[bool]) -> "Tiles":
        """The marked tiles."""
        given: Any = self.pixel_values if self.visual_features is None else self.visual_features
        kept = given[torch.tensor(is_kept, device=given.device)]
        is_pixels = self.visual_features is None
        return Tiles(kept if is_pixels else None, self.image_flags, None, None if is_pixels else kept)


class ImageTokenBlocker(LogitsProcessor):
    """Keeps generation from emitting the image placeholder, which a later turn would take for an image.

    Greedy search only takes the best token, so there only rows whose best token is the placeholder are changed; all
    other scores stay those of the model.
    """

    def __init__(self, image_token_id: int, is_greedy: bool) -> None:
        self.image_token_id = image_token_id
        self.is_greedy = is_greedy

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        blocked = torch.zeros_like(scores, dtype=torch.bool)
        best = scores.argmax(dim=-1) == self.image_token_id
        blocked[:, self.image_token_id] = best if self.is_greedy else True
        return scores.masked_fill(blocked, -float("inf"))


class ImageGenerationMixin(_Generation):
    """`generate` with images; list it before the model and `GenerationMixin`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        *published: Any,
        pixel_values: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        num_patches: torch.Tensor | None = None,
        visual_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers: the prompt followed by the new tokens, or the new tokens alone after `inputs_embeds`.

        Images are encoded once, before the search, for any number of beams or samples. With `past_key_values` of
        earlier turns, images whose placeholders the cache covers are not encoded again; `pixel_values` may hold the
        tiles of all turns or only the new ones. Drafts of assisted decoding (an assistant model, prompt lookup, custom
        generators) never hold an image; an assistant that is an InternVL-Chat too sees the images through its tower.

        The published positional call `generate(pixel_values, input_ids, attention_mask, visual_features)` is
        understood too.

        Args:
            inputs: (B, L), also as `input_ids`.
            generation_config: A `GenerationConfig`.
            *published: The rest of a published positional call.
            pixel_values: As in `forward`.
            image_flags: As in `forward`.
            num_patches: As in `forward`.
            visual_features: (tiles, num_image_token, D), what `extract_feature` gives, in place of `pixel_values`.
            **kwargs: As for `generate` of transformers; `inputs_embeds` (B, L, D) may hold embedded placeholders.

        Raises:
            ValueError: Placeholders and features differ in number, or the arguments do not go together.
        """
        if published or isinstance(generation_config, torch.Tensor) or _is_pixels(inputs):
            named = dict(zip(PUBLISHED_ORDER, (inputs, generation_config, *published), strict=False))
            given = {"pixel_values": pixel_values, "visual_features": visual_features, **kwargs}
            return self.generate(image_flags=image_flags, num_patches=num_patches, **_merged(given, named))
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        settings = generation_config or self.generation_config
        chosen = {
            key: kwargs.get(key, getattr(settings, key, None))
            for key in ("do_sample", "num_beams", "prefill_chunk_size")
        }
        self._check_search(inputs, kwargs, settings)
        if pixel_values is not None or visual_features is not None:
            if chosen["prefill_chunk_size"]:
                raise ValueError("`prefill_chunk_size` would cut images apart; leave it out with images.")
            tiles = Tiles(pixel_values, image_flags, num_patches, visual_features)
            kwargs |= self._with_images(inputs, tiles, kwargs)
        if self.img_context_token_id is not None:
            is_greedy = not chosen["do_sample"] and (chosen["num_beams"] or 1) == 1
            blocker = ImageTokenBlocker(self.img_context_token_id, is_greedy)
            kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or []), blocker])
            kwargs["prompt_length"] = None if inputs is None else inputs.shape[1]
        return super().generate(inputs, generation_config, **kwargs)

    def _check_search(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any], settings: Any) -> None:
        """Refuses searches in which transformers would fail with an unrelated error."""
        drafts = {
            name: value
            for name in ("assistant_early_exit", "assistant_model", "prompt_lookup_num_tokens")
            if (value := kwargs.get(name, getattr(settings, name, None))) is not None
        }
        if "assistant_early_exit" in drafts:
            raise ValueError(
                "`assistant_early_exit` needs a model that is nothing but a decoder: draft by `assistant_model` or "
                "`prompt_lookup_num_tokens` instead."
            )
        assistant = drafts.get("assistant_model")
        if assistant is not None and not hasattr(assistant, "generation_config"):
            raise ValueError(
                f"The `assistant_model` must generate text from ids, {type(assistant).__name__} does not."
            )
        # Without ids, prompt lookup finds its drafts in the new tokens alone.
        is_read_by_drafts = input_ids is not None or "assistant_model" in drafts
        if drafts and kwargs.get("inputs_embeds") is not None and is_read_by_drafts:
            raise ValueError(
                f"`{next(iter(drafts))}` drafts from ids: pass the prompt as `input_ids`, without `inputs_embeds`."
            )
        negative = kwargs.get("negative_prompt_ids")
        if negative is not None and bool((negative == self.img_context_token_id).any()):
            raise ValueError(
                "`negative_prompt_ids` is read as text, without the images: leave their placeholders out of it."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        image_embeds: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_length: int | None = None,
        assistant_image_embeds: torch.Tensor | None = None,
        is_assisted: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Passes the images on in the steps that may hold placeholders: all but those of one new token.

        Behind the prompt a placeholder can only be part of a draft, copied from the prompt. It is never accepted,
        whichever token stands there, so another token replaces it.
        """
        cache = kwargs.get("past_key_values")
        reads_all = is_assisted and kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is None
        if reads_all and cache is not None and (seen := int(cache.get_seq_length())):
            # The first step of assisted decoding would read again what a cache of earlier turns holds.
            kwargs["next_sequence_length"] = input_ids.shape[1] - seen
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        ids = model_inputs.get("input_ids")
        if ids is None or ids.shape[1] == 1:
            return model_inputs
        model_inputs["image_embeds"] = image_embeds
        if prompt_length is not None and input_ids.shape[1] > prompt_length:
            image_token = self.img_context_token_id
            positions = torch.arange(input_ids.shape[1], device=ids.device)[-ids.shape[1] :]
            is_draft = (ids == image_token) & (positions >= prompt_length)
            model_inputs["input_ids"] = ids.masked_fill(is_draft, 0 if image_token else 1)
        return model_inputs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As in transformers, which inspects `prepare_inputs_for_generation`; PEFT replaces that by another."""
        super()._validate_model_kwargs({name: v for name, v in model_kwargs.items() if name not in SEARCH_STATE})

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; an assistant gets its features of the images, none if it is a mere language model."""
        model_kwargs["is_assisted"] = True  # for the search, which goes on with this dictionary
        seen = model_kwargs.get("assistant_image_embeds")
        ours = ("image_embeds", *SEARCH_STATE)
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in ours}
        if seen is not None:
            model_kwargs["image_embeds"] = seen
        return super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)

    def _with_images(self, input_ids: torch.Tensor | None, tiles: "Tiles", kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the search that hold the images: embeddings with images placed, or features of each row."""
        inputs_embeds = kwargs.get("inputs_embeds")
        if inputs_embeds is not None:
            is_image = self._image_positions(input_ids, None if input_ids is not None else inputs_embeds)
            features = self._features_of(tiles)
            found_here = int(is_image.sum())
            placed = place_in_order(inputs_embeds, is_image, found_here, features, self.num_image_token)
            return {"inputs_embeds": placed}
        if input_ids is None:
            raise ValueError(
                "`generate` with images needs `input_ids` or `inputs_embeds` that hold their placeholders."
            )
        cache, assistant = kwargs.get("past_key_values"), kwargs.get("assistant_model")
        found: dict[str, Any] = {"image_embeds": self._image_embeds_of_new_tiles(input_ids, tiles, cache)}
        if isinstance(assistant, ImageGenerationMixin) and tiles.pixel_values is not None:
            if assistant.num_image_token != self.num_image_token:
                raise ValueError(
                    f"The `assistant_model` takes {assistant.num_image_token} positions for a tile, this model "
                    f"{self.num_image_token}: take an assistant that reads the same prompts, or a mere language model."
                )
            pixels = replace(tiles, visual_features=None)
            found["assistant_image_embeds"] = assistant._image_embeds_of_new_tiles(input_ids, pixels, None)
        return found

    def _features_of(self, tiles: "Tiles") -> torch.Tensor | None:
        if tiles.visual_features is not None:
            return tiles.visual_features
        return self._encode_tiles(tiles.pixel_values, tiles.image_flags, tiles.num_patches)

    def _image_embeds_of_new_tiles(
        self, input_ids: torch.Tensor, tiles: "Tiles", past_key_values: Cache | None
    ) -> torch.Tensor | None:
        """Features of the tiles that the cache does not cover: (B, most new placeholders of a row, D), zero-padded.

        The placeholders of each row are counted on the host, once and before any work is queued.
        """
        if self.img_context_token_id is None:
            raise ValueError(NO_IMAGE_TOKEN)
        is_image = input_ids == self.img_context_token_id
        cached_length = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        counts = torch.stack([is_image.sum(dim=1), is_image[:, :cached_length].sum(dim=1)])
        found, cached = counts.tolist()
        if cached_length:
            all_tiles, old = ([count // self.num_image_token for count in row] for row in (found, cached))
            if sum(all_tiles) == len(tiles):
                tiles = tiles.only(
                    [i >= known for all_, known in zip(all_tiles, old, strict=True) for i in range(all_)]
                )
        new = [all_ - known for all_, known in zip(found, cached, strict=True)]
        features = self._features_of(tiles) if len(tiles) else None
        num_features = 0 if features is None else features.shape[:-1].numel()
        if sum(new) != num_features:
            raise ValueError(mismatch_message(new, num_features, self.num_image_token))
        if features is None:
            return None
        return pad_sequence(features.flatten(0, 1).split(new), batch_first=True)


def _is_pixels(inputs: torch.Tensor | None) -> bool:
    return isinstance(inputs, torch.Tensor) and inputs.is_floating_point()


def _merged(given: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments given by name and by position, as one."""
    named = {name: value for name, value in named.items() if value is not None}
    if twice := sorted(name for name in named if given.get(name) is not None):
        raise ValueError(f"`generate` got {', '.join(f'`{name}`' for name in twice)} by position and by name.")
    return {**given, **named}
