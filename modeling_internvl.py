"""InternVL-C and InternVL-G (paper sections 3.2 and 3.4): contrastive features, image-text matching and captioning.

InternVL-C pools InternViT; InternVL-G adds the pooled queries of QLLaMA. Text features of both come from QLLaMA as a
causal text encoder. A checkpoint of stage 1 is InternVL-C alone: its QLLaMA has no queries (`num_query_token` 0) and
is a plain LLaMA, and what belongs to the queries is absent. Contrastive texts without the prefix `summarize:` or the
end token, which the processor adds, are completed. Shape letters as in modeling_internvit.
"""

import os
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.generation import BaseStreamer
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .configuration_internvl import MODES, InternVLConfig
from .feature_cache_internvl import CachesImageFeatures
from .hub_internvl import HubModelMixin, OwnParameters, loaded_parameter
from .keywords_internvl import refuse_unknown
from .layers_internvl import InternVLAttentionPooling, InternVLPoolingAttention
from .modeling_internvit import InternVisionModel
from .modeling_qllama import QLlamaForCausalLM, QLlamaTextEncoder
from .sentence_files_internvl import write_sentence_files
from .texts_internvl import PROCESSOR_HINT, ContrastiveTexts, pad_row, pad_token_id


logger = logging.get_logger(__name__)

# Settings of a generation that would count or cut the prompt without the queries in front of it.
NOT_BEHIND_QUERIES = ("assistant_early_exit", "inputs_embeds", "position_ids", "prefill_chunk_size")


def check_mode(mode: str) -> str:
    """Returns "InternVL-C" or "InternVL-G"; the short forms "C" and "G" are understood too."""
    full = f"InternVL-{mode}" if mode in ("C", "G") else mode
    if full not in MODES:
        raise ValueError(f"`mode` must be one of {list(MODES)}, got {mode!r}.")
    return full


def contrastive_loss(logits_per_image: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of a square matrix of scaled similarities (B, B) whose diagonal holds the pairs."""
    target = torch.arange(logits_per_image.shape[0], device=logits_per_image.device)
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_image.T, target)) / 2


def last_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B,): where each row's last real token is, whichever side is padded."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * attention_mask).argmax(dim=1)


def last_token_states(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, L, D), (B, L) -> (B, D): the state of each row's last real token."""
    last = last_positions(attention_mask)
    return hidden_states[torch.arange(last.shape[0], device=last.device), last]


class CaptionStreamer(BaseStreamer):
    """Passes on what a generation streams, without the placeholders in front of the prompt."""

    def __init__(self, streamer: BaseStreamer, num_queries: int) -> None:
        self.streamer = streamer
        self.num_queries = num_queries

    def put(self, value: torch.Tensor) -> None:
        value, self.num_queries = value[..., self.num_queries :], 0
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


@dataclass
class InternVLOutput(ModelOutput):
    """Output of InternVL-C and -G for images and texts.

    Args:
        loss: Contrastive loss over the batch, with `return_loss=True`.
        logits_per_image: (B_image, B_text) scaled cosine similarities.
        logits_per_text: Its transpose.
        image_embeds: (B_image, E), unit length.
        text_embeds: (B_text, E), unit length.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None


class InternVLPreTrainedModel(HubModelMixin, PreTrainedModel):
    """What the InternVL-C/G classes share."""

    config: InternVLConfig
    config_class = InternVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    _no_split_modules = ["InternVLAttentionPooling"]
    # Learned and used by the sigmoid loss of stage 1 only.
    _keys_to_ignore_on_load_unexpected = [r"^logit_bias$"]
    _modules_kept_unquantized = (
        "vision_model",
        "clip_projector",
        "clip_projector2",
        "itm_head",
        "qllama.lm_head",
    )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InternVLPoolingAttention):
            module.init_biases()
        elif isinstance(module, InternVLModel):
            if module.query_tokens is not None:
                init.normal_(module.query_tokens, std=self.config.initializer_range)
            init.normal_(module.text_projection, std=module.text_projection.shape[0] ** -0.5)
            init.constant_(module.logit_scale, 2.6592600369327783)  # log(1 / 0.07), as CLIP


class InternVLModel(CachesImageFeatures, InternVLPreTrainedModel):
    """InternViT and QLLaMA with the contrastive, matching and language heads ("InternVL-14B").

    Without queries it is InternVL-C alone; its parts have the names they have in the full model, which starts from
    them.

    Contrastive texts begin with `summarize:` and end in the end token. Ids without them, as stock pipelines give, are
    completed with the tokenizer beside the weights, and are then those of the processor; without a tokenizer they are
    taken as they are, with one warning. `completes_texts` may be set to False on a model to take all ids as they are.
    """

    completes_texts: bool = True
    _text_part = "qllama"

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__(config)
        width, text_width = config.vision_config.hidden_size, config.qllama_config.hidden_size
        num_heads, joint_width = config.attn_pool_num_heads, config.clip_embed_dim
        self.vision_model = InternVisionModel(config.vision_config)
        qllama_class = QLlamaForCausalLM if config.has_queries else QLlamaTextEncoder
        self.qllama: Any = qllama_class(config.qllama_config)
        self.query_tokens: Any = None
        self.clip_projector2: Any = None
        self.itm_head: Any = None
        self.text_projection = nn.Parameter(torch.empty(text_width, joint_width))
        self.logit_scale = nn.Parameter(torch.empty([]))
        self.clip_projector = InternVLAttentionPooling(config, width, num_heads, joint_width)
        if config.has_queries:
            self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_token, text_width))
            self.clip_projector2 = InternVLAttentionPooling(config, text_width, num_heads, joint_width)
            self.itm_head = nn.Linear(text_width, 2)
        self.post_init()
        self.own_parameters = OwnParameters(self)

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers; sentence-transformers loads the folder too."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_sentence_files(save_directory)

    def get_decoder(self) -> nn.Module:
        """QLLaMA without its head."""
        return self.qllama.model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.qllama.model = decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.qllama.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.qllama.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.qllama.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.qllama.lm_head = new_embeddings

    @can_return_tuple
    def _forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        mode: str,
        return_loss: bool,
        **kwargs: Unpack[TransformersKwargs],
    ) -> InternVLOutput:
        image_embeds = F.normalize(self.get_image_features(pixel_values, mode=mode, **kwargs), dim=-1)
        text_embeds = F.normalize(self.get_text_features(input_ids, attention_mask, **kwargs), dim=-1)
        logits_per_image = self.logit_scale.exp() * image_embeds @ text_embeds.to(image_embeds.device).T
        return InternVLOutput(
            loss=contrastive_loss(logits_per_image) if return_loss else None,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        mode: str | None = None,
        return_loss: bool = False,
        image: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        num_patches: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> InternVLOutput | tuple:
        """Similarities of images and texts.

        Args:
            input_ids: (B_text, L) texts, as in `get_text_features`.
            pixel_values: (B_image, 3, height, width).
            attention_mask: (B_text, L), as in `get_text_features`.
            mode: "InternVL-C" or "InternVL-G"; None takes `config.default_mode`.
            return_loss: Whether to compute the contrastive loss of a batch of pairs.
            image: The published name of `pixel_values`. A call with it returns the plain pair
                `(logits_per_image, logits_per_text)`, as published snippets unpack it.
            text: The published name of `input_ids`, likewise.
            num_patches: Accepted and unused, so that the whole output of the processor can be passed.
            **kwargs: `return_dict`; the rest that transformers hands to every model is accepted and unused.

        Returns:
            `InternVLOutput`.

        Raises:
            ValueError: Images or texts missing, an unknown keyword or `mode`, or `return_loss` with unequal numbers.
        """
        is_published_call = image is not None or text is not None
        pixel_values = image if pixel_values is None else pixel_values
        input_ids = text if input_ids is None else input_ids
        refuse_unknown(kwargs, "`InternVLModel.forward`")
        if pixel_values is None or input_ids is None:
            raise ValueError(
                "`forward` compares images with texts and needs both `pixel_values` and `input_ids`; for one of them "
                "use `get_image_features` or `get_text_features`."
            )
        if return_loss and len(pixel_values) != len(input_ids):
            raise ValueError(f"`return_loss` needs pairs, got {len(pixel_values)} images and {len(input_ids)} texts.")
        if is_published_call:
            kwargs["return_dict"] = True
        mode = check_mode(self.config.default_mode if mode is None else mode)
        outputs = self._forward(input_ids, pixel_values, attention_mask, mode, return_loss, **kwargs)
        return (outputs.logits_per_image, outputs.logits_per_text) if is_published_call else outputs

    def get_image_features(
        self, pixel_values: torch.Tensor, mode: str | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """Image embeddings (B, E), not normalised.

        InternVL-G's is the sum of two unit vectors (pooled queries and pooled InternViT), as published.

        Args:
            pixel_values: (B, 3, height, width).
            mode: "InternVL-C" or "InternVL-G"; None takes `config.default_mode`.
            **kwargs: Accepted and unused: what transformers hands to every model.

        Raises:
            ValueError: An unknown keyword or `mode`, or no queries for "InternVL-G".
        """
        refuse_unknown(kwargs, "`get_image_features`", ("num_patches",))
        mode = check_mode(self.config.default_mode if mode is None else mode)
        if mode == "InternVL-G":
            self._check_has_queries('`mode` "InternVL-G"')
        return self._cached_features(pixel_values, partial(self._image_features, mode=mode), mode)

    def _image_features(self, pixel_values: torch.Tensor, mode: str) -> torch.Tensor:
        tokens = self.vision_model(pixel_values, return_dict=True).last_hidden_state
        pooled = self.clip_projector(tokens)
        if mode == "InternVL-C":
            return pooled
        queries = self.get_query_features(vision_hidden_states=tokens)
        pooled_queries = self.clip_projector2(queries).to(pooled.device)
        return F.normalize(pooled_queries, dim=-1) + F.normalize(pooled, dim=-1)

    def get_query_features(
        self, pixel_values: torch.Tensor | None = None, vision_hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states (B, M, D) of QLLaMA's queries for images, given as pixels or as InternViT tokens."""
        self._check_has_queries("`get_query_features`")
        if vision_hidden_states is None:
            vision_hidden_states = self.vision_model(pixel_values, return_dict=True).last_hidden_state
        query_embeds = loaded_parameter(self, "query_tokens").expand(vision_hidden_states.shape[0], -1, -1)
        outputs = self.qllama.model(
            query_embeds=query_embeds,
            vision_hidden_states=vision_hidden_states,
            use_cache=False,
            return_dict=True,
        )
        return outputs.last_hidden_state

    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Text embeddings (B, E), not normalised: the hidden state at the last real token, projected.

        Args:
            input_ids: (B, L), with the prefix `summarize:` and the end token, as the processor gives them in mode
                "contrastive"; rows that lack either are completed to that.
            attention_mask: (B, L), 1 = attend, padding on either side. When absent, tokens equal to `pad_token_id` of
                the QLLaMA configuration are padding.

        Raises:
            ValueError: A row without a single real token, or an unknown keyword.
        """
        refuse_unknown(kwargs, "`get_text_features`")
        input_ids, attention_mask = self._completed_texts(input_ids, self._over_text(input_ids, attention_mask))
        outputs = self.qllama.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True
        )
        states = last_token_states(outputs.last_hidden_state, attention_mask)
        return states @ loaded_parameter(self, "text_projection").to(states.device)

    def get_matching_logits(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores (B, 2) of images and texts, the mean of the head over the queries: column 1 that they match, 0 that
        not.

        Args:
            pixel_values: (P, 3, height, width).
            input_ids: (B, L), as many texts for each image as for any other: the first B / P belong to the first.
            attention_mask: (B, L), derived from `pad_token_id` when absent.

        Raises:
            ValueError: B is no multiple of P, or a row without a single real token.
        """
        self._check_has_queries("`get_matching_logits`")
        attention_mask = self._text_mask(input_ids, attention_mask)
        tokens = self.vision_model(pixel_values, return_dict=True).last_hidden_state
        query_embeds = loaded_parameter(self, "query_tokens").expand(input_ids.shape[0], -1, -1)
        outputs = self.qllama.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            query_embeds=query_embeds,
            vision_hidden_states=tokens,
            attention_mode="matching",
            use_cache=False,
            return_dict=True,
        )
        return self.itm_head(outputs.last_hidden_state[:, : query_embeds.shape[1]]).mean(dim=1)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Captions: the tokens after the prompt.

        Args:
            pixel_values: (B, 3, height, width).
            input_ids: (B, L) prompts such as `English caption:`, padded on the left, or (1, L), one for all; without
                it a caption starts from `<s>`.
            attention_mask: Of the prompts.
            generate_kwargs: As for `generate` of transformers. `max_length` and `min_length` count prompt and caption,
                not the queries, and a `streamer` gets no queries.

        Returns:
            (B, new tokens), without the prompt; with `return_dict_in_generate=True` the output object, likewise cut.

        Raises:
            ValueError: No queries, no images, neither one prompt nor one per image, or a setting that does not fit.
        """
        self._check_has_queries("`generate`")
        if pixel_values is None:
            raise ValueError("`generate` describes images and needs `pixel_values`.")
        tokens = self.vision_model(pixel_values, return_dict=True).last_hidden_state
        if input_ids is None:
            input_ids = torch.full((len(tokens), 1), self.qllama.config.bos_token_id or 0, device=tokens.device)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if len(input_ids) not in (1, len(tokens)):
            raise ValueError(
                f"Give one prompt, or one for each image: got {len(input_ids)} prompts for {len(tokens)} images."
            )
        input_ids, attention_mask = (x.expand(len(tokens), -1) for x in (input_ids, attention_mask))
        query_embeds = loaded_parameter(self, "query_tokens").expand(len(tokens), -1, -1)
        placeholders = input_ids.new_zeros(len(tokens), query_embeds.shape[1])
        prompt = torch.cat([placeholders, input_ids], dim=1)
        outputs = self.qllama.generate(
            input_ids=prompt,
            attention_mask=torch.cat([torch.ones_like(placeholders), attention_mask], dim=1),
            query_embeds=query_embeds,
            vision_hidden_states=tokens,
            **self._behind_queries(generate_kwargs),
        )
        if isinstance(outputs, torch.Tensor):
            return outputs[:, prompt.shape[1] :]
        outputs.sequences = outputs.sequences[:, prompt.shape[1] :]
        return outputs

    def _behind_queries(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a generation whose prompt begins with a placeholder per query, which lengths must include."""
        settings, defaults = dict(settings), settings.get("generation_config") or self.qllama.generation_config
        given = {**defaults.to_dict(), **settings}
        if unfit := [name for name in NOT_BEHIND_QUERIES if given.get(name) is not None]:
            raise ValueError(
                f"`generate` of captions takes no `{unfit[0]}`: the queries stand in front of the prompt and are "
                "read with it."
            )
        self._check_assistant(given.get("assistant_model"))
        for name, in_new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if given.get(name) and given.get(in_new_tokens) is None:
                settings[name] = given[name] + self.config.num_query_token
        if settings.get("streamer") is not None:
            settings["streamer"] = CaptionStreamer(settings["streamer"], self.config.num_query_token)
        return settings

    def _check_assistant(self, assistant: Any) -> None:
        """Raises a ValueError unless it reads the queries and the image of these captions as `qllama` does."""
        if assistant is None:
            return
        own, other = self.qllama.config, getattr(assistant, "config", None)
        sizes = ("hidden_size", "vision_hidden_size")
        if not hasattr(assistant, "generation_config") or any(
            getattr(other, size, None) != getattr(own, size) for size in sizes
        ):
            raise ValueError(
                f"The `assistant_model` of captions must read queries and images: give the `qllama` of an InternVL "
                f"model of the same sizes, got {type(assistant).__name__}."
            )

    def encode_image(self, image: torch.Tensor, mode: str | None = None) -> torch.Tensor:
        """Published name of `get_image_features`."""
        return self.get_image_features(image, mode=mode)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Published name of `get_text_features`."""
        return self.get_text_features(text)

    def _check_has_queries(self, name: str) -> None:
        if not self.config.has_queries:
            raise ValueError(
                f"{name} needs the queries of QLLaMA, but this checkpoint is InternVL-C alone (stage 1, "
                '`num_query_token` 0). Use mode "InternVL-C" and `get_text_features`, or load a checkpoint of '
                "InternVL-G (stage 2)."
            )

    def _over_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if attention_mask is None:
            return (input_ids != self.config.qllama_config.pad_token_id).long()
        return attention_mask

    def _text_mask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        attention_mask = self._over_text(input_ids, attention_mask)
        _check_texts(bool(attention_mask.any(dim=1).all()))
        return attention_mask

    @cached_property
    def contrastive_texts(self) -> ContrastiveTexts | None:
        """Completes texts with the tokenizer beside the weights; None without a tokenizer."""
        return ContrastiveTexts.from_folder(config=self.config, **self._source) if self._source else None

    def _completed_texts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask with all texts completed. The host reads values of the device once.

        An exported program takes all ids as they are: it has no tokenizer.
        """
        if torch.compiler.is_exporting():
            return input_ids, attention_mask
        is_complete = self._are_complete(input_ids, attention_mask)
        have_tokens, are_complete = torch.stack([attention_mask.any(dim=1), is_complete]).all(dim=1).tolist()
        _check_texts(have_tokens)
        if are_complete:
            return input_ids, attention_mask
        texts = self.contrastive_texts
        if texts is None:
            logger.warning_once(
                "Texts do not end in the end token, at which their features are read, and there is no tokenizer "
                f"beside the weights to complete them, so they are taken as they are. {PROCESSOR_HINT} "
                "`model.completes_texts = False` says that this is wanted."
            )
            return input_ids, attention_mask
        given = [ids[mask].tolist() for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]
        rows = [row if known else texts.completed(row) for row, known in zip(given, is_complete.tolist(), strict=True)]
        if rows == given:
            return input_ids, attention_mask
        # As wide as the processor pads them, so that features are equal to the last bit.
        width = max(texts.max_length, *map(len, rows))
        padded = [pad_row(row, width, pad_token_id(texts.tokenizer)) for row in rows]
        masks = [pad_row([1] * len(row), width, 0) for row in rows]
        return input_ids.new_tensor(padded), attention_mask.new_tensor(masks)

    def _are_complete(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Which rows (B,) begin with the prefix (checked with a tokenizer only) and end in the end token."""
        texts = self.contrastive_texts if self.completes_texts else None
        end_ids: Any = self.config.qllama_config.eos_token_id if texts is None else texts.end_id
        prefix_ids = [] if texts is None else texts.prefix_ids
        rows = torch.arange(len(input_ids), device=input_ids.device)
        is_complete = torch.ones_like(rows, dtype=torch.bool)
        if not self.completes_texts or end_ids is None:
            return is_complete
        last = input_ids[rows, last_positions(attention_mask)]
        is_complete = torch.stack([last == end for end in ([end_ids] if isinstance(end_ids, int) else end_ids)]).any(
            dim=0
        )
        first = attention_mask.int().argmax(dim=1)
        for offset, index in enumerate(prefix_ids):
            position = (first + offset).clamp(max=input_ids.shape[1] - 1)
            is_complete &= input_ids[rows, position] == index
        return is_complete


def _check_texts(have_tokens: bool) -> None:
    if not have_tokens:
        raise ValueError("Every text needs at least one real token, but a row is all padding.")


__all__ = ["InternVLModel", "InternVLOutput", "InternVLPreTrainedModel"]
