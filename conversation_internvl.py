"""Conversation templates of the published checkpoints as data, and the prompts and chat templates built from them.

A frozen record per template holds the strings around the system message, the questions and the answers.
`ConversationTemplate.render` builds the prompt of a dialogue of plain strings, and `ConversationTemplate.to_jinja` the
chat template that transformers, TRL and serving engines run. The functions below build the prompts of the published
`chat()` and `batch_chat()` helpers.

The templates come from two code bases that use the same names for different strings. Names of the chat code base are
kept; a clashing name of the LLaVA code base is written `llava/<name>`.

User text cannot insert image tokens: `escape_image_tokens` adds a space after the bracket (`<IMG_CONTEXT>` becomes
`< IMG_CONTEXT>`), so that the text stays readable but holds neither placeholders nor special tokens.

Not covered: tool calls, and special tokens of the language model (such as an end token) inside user text.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


IMAGE_PLACEHOLDER = "<image>"  # marks the place of an image in the questions of published user code
IMAGE_START_TOKEN = "<img>"
IMAGE_END_TOKEN = "</img>"
IMAGE_CONTEXT_TOKEN = "<IMG_CONTEXT>"

_IMAGE_TOKENS = re.compile(r"<(?=(?:/?img|IMG_CONTEXT|image|video)>)")
_IMAGE_TOKENS_BUT_PLACEHOLDER = re.compile(r"<(?=(?:/?img|IMG_CONTEXT|video)>)")

_JINJA = """\
{%- for message in messages -%}
{%- set body -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- elif message['content'] is not none -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- elif part['type'] in ['image', 'image_url'] -%}
{{- @image@ -}}
{%- else -%}
{{- raise_exception('Unknown content part `' ~ part['type'] ~ '`: expected `text` or `image`. For a video, pass its '
  ~ 'frames to `processor.apply_chat_template`, which turns them into images.') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endset -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- @default_opening@ -}}
{%- endif -%}
{%- if message['role'] == 'system' -%}
{%- if not loop.first -%}
{{- raise_exception('A system message must be the first message, not message ' ~ loop.index0 ~ '.') -}}
{%- endif -%}
@system@
{%- elif message['role'] == 'user' -%}
{{- @user_prefix@ ~ body ~ @user_suffix@ -}}
{%- elif message['role'] == 'assistant' -%}
{{- @generation_prompt@ -}}
{% generation %}{{- @answer_prefix@ ~ body ~ @stop@ -}}{% endgeneration %}
{{- @after_stop@ -}}
{%- else -%}
{{- raise_exception('Unknown role `' ~ message['role'] ~ '` of message ' ~ loop.index0 ~ \
': expected `system`, `user` or '
  ~ '`assistant`.') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- @generation_prompt@ -}}
{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class ConversationTemplate:
    """Strings of a conversation template. A dialogue consists of a system block, examples, and question-answer turns.

    Args:
        name: Name of the template, also the value of `template` in a chat configuration.
        user_prefix: Written before a question.
        user_suffix: Written after a question.
        generation_prompt: Written before an answer; a prompt to be answered ends with it.
        stop: Ends an answer; the model is trained to write it.
        default_system_message: System message of a dialogue without one.
        system_prefix: Written before the system message.
        system_suffix: Written after the system message.
        answer_prefix: Written by the model between the generation prompt and its answer (a space or nothing).
        after_stop: Written after `stop`, between turns; not trained.
        examples: (question, answer) pairs that follow every system message.
        extra_stops: Further strings that end generation if the tokenizer has them as special tokens.
        omit_empty_system: Omit the system block for an empty system message instead of writing an empty one.
    """

    name: str
    user_prefix: str
    user_suffix: str
    generation_prompt: str
    stop: str
    default_system_message: str = ""
    system_prefix: str = ""
    system_suffix: str = ""
    answer_prefix: str = ""
    after_stop: str = ""
    examples: tuple[tuple[str, str], ...] = ()
    extra_stops: tuple[str, ...] = ()
    omit_empty_system: bool = False

    @property
    def sep(self) -> str:
        """End of a turn, under its published name; streaming snippets strip it from the text."""
        return self.stop + self.after_stop

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end generation, `stop` first."""
        return (self.stop, *self.extra_stops)

    def end_token_ids(self, tokenizer: Any) -> list[int]:
        """Returns `eos_token_id` for a generation configuration: stop strings that are tokens, and the end token.

        The ids are unique, that of `stop` first; the list is empty if the tokenizer knows none (as for `###`).
        """
        special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
        ids = [tokenizer.convert_tokens_to_ids(stop) for stop in self.stop_strings if stop in special]
        ids.append(tokenizer.eos_token_id)
        return list(dict.fromkeys(index for index in ids if index is not None))

    def cut_answer(self, decoded: str) -> str:
        """Cuts decoded new tokens at the first stop string and strips spaces."""
        return decoded.split(self.stop.strip())[0].strip()

    def render(
        self,
        messages: Sequence[dict[str, str]],
        system_message: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Builds the prompt of a dialogue of plain strings without escaping anything.

        Args:
            messages: Dicts with `role` (`system` first only, `user`, `assistant`) and `content` (a string).
            system_message: System message, if `messages` has none; None selects the default.
            add_generation_prompt: Whether to end with the generation prompt.

        Raises:
            ValueError: If a role or content is invalid, or the system message is given twice or not first.
        """
        turns = list(messages)
        if turns and turns[0].get("role") == "system":
            if system_message is not None:
                raise ValueError("The system message was given twice: in `messages` and as `system_message`.")
            system_message = _text_of(turns.pop(0))
        prompt = self._opening(self.default_system_message if system_message is None else system_message)
        prompt += "".join(self._turn(message) for message in turns)
        return prompt + self.generation_prompt if add_generation_prompt else prompt

    def to_jinja(self) -> str:
        """Builds the chat template for transformers, which renders plain strings like `render`.

        A content may also be a list of parts: text parts are copied, image parts become `<IMG_CONTEXT>` and a line
        break. Generation markers enclose what the model is trained to write (answer and stop string).
        """
        system = "{{- @system_prefix@ ~ body ~ @after_system@ -}}"
        if self.omit_empty_system:
            system = "{%- if body -%}\n" + system + "\n{%- endif -%}"
        strings = {
            **vars(self),
            "image": IMAGE_CONTEXT_TOKEN + "\n",
            "default_opening": self._opening(self.default_system_message),
            "after_system": self.system_suffix + self._examples(),
        }
        text = _JINJA.replace("@system@", system)
        # Jinja reads JSON's escapes.
        return re.sub("@([a-z_]+)@", lambda slot: json.dumps(strings[slot[1]], ensure_ascii=False), text)

    def _opening(self, system_message: str) -> str:
        if not system_message and self.omit_empty_system:
            return ""
        return self.system_prefix + system_message + self.system_suffix + self._examples()

    def _examples(self) -> str:
        return "".join(self._question(question) + self._answer(answer) for question, answer in self.examples)

    def _turn(self, message: dict[str, str]) -> str:
        role = message.get("role")
        if role == "user":
            return self._question(_text_of(message))
        if role == "assistant":
            return self._answer(_text_of(message))
        if role == "system":
            raise ValueError("A system message must be the first message.")
        raise ValueError(f"Unknown role `{role}`: expected `system`, `user` or `assistant`.")

    def _question(self, text: str) -> str:
        return self.user_prefix + text + self.user_suffix

    def _answer(self, text: str) -> str:
        return self.generation_prompt + self.answer_prefix + text + self.stop + self.after_stop


def _text_of(message: dict[str, str]) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ValueError(
            f"`content` of a `{message.get('role')}` message must be a string, got {type(content).__name__}. Messages "
            "with images go through the processor's `apply_chat_template`."
        )
    return content


# The assistant introduces itself as InternVL, made by the Shanghai AI Laboratory with SenseTime: as published.
_INTRODUCTION = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"  # noqa: RUF001
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
# As published for the 2.5 series, made by the laboratory with Tsinghua University and others.
_INTRODUCTION_2_5 = (
    "你是书生·万象，英文名是InternVL，"  # noqa: RUF001
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
_INTERNLM = "You are an AI assistant whose name is InternLM (书生·浦语)."
_POLITE = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
# The published one-shot example of the `default` template.
_RENEWABLE = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n",
)

_CHATML = ConversationTemplate(
    name="Hermes-2",
    default_system_message=_INTRODUCTION,
    system_prefix="<|im_start|>system\n",
    system_suffix="<|im_end|>",
    user_prefix="<|im_start|>user\n",
    user_suffix="<|im_end|>",
    generation_prompt="<|im_start|>assistant\n",
    stop="<|im_end|>",
    extra_stops=("<|endoftext|>", "</s>"),
)
_PHI3 = ConversationTemplate(
    name="phi3-chat",
    default_system_message=_INTRODUCTION,
    system_prefix="<|system|>\n",
    system_suffix="<|end|>",
    user_prefix="<|user|>\n",
    user_suffix="<|end|>",
    generation_prompt="<|assistant|>\n",
    stop="<|end|>",
    extra_stops=("<|endoftext|>", "</s>"),
)
_ZH = ConversationTemplate(
    name="internvl_zh",
    system_suffix=" ",
    user_prefix="<human>: ",
    user_suffix=" ",
    generation_prompt="<bot>:",
    answer_prefix=" ",
    stop="</s>",
)
_VICUNA = ConversationTemplate(
    name="vicuna_v1",
    default_system_message=_POLITE.format("user"),
    system_suffix=" ",
    user_prefix="USER: ",
    user_suffix=" ",
    generation_prompt="ASSISTANT:",
    answer_prefix=" ",
    stop="</s>",
)
_ONE_SHOT = ConversationTemplate(
    name="default",
    default_system_message=_POLITE.format("human"),
    system_suffix="###",
    user_prefix="Human: ",
    user_suffix="###",
    generation_prompt="Assistant:",
    answer_prefix=" ",
    stop="###",
    examples=(_RENEWABLE,),
)
_CHATML_2_5 = replace(
    _CHATML,
    name="internvl2_5",
    default_system_message=_INTRODUCTION_2_5,
    system_suffix="<|im_end|>\n",
    user_suffix="<|im_end|>\n",
    after_stop="\n",
)


def _llava(template: ConversationTemplate, name: str, default_system_message: str) -> ConversationTemplate:
    """Derives a template of the LLaVA code base, where only the default system message has the system prefix."""
    default = template.system_prefix + default_system_message
    return replace(template, name=f"llava/{name}", system_prefix="", default_system_message=default)


_TEMPLATES = {
    template.name: template
    for template in (
        # The chat code base. The comments list checkpoints that name the template in their configuration.
        _ZH,  # InternVL-Chat-V1-1
        _CHATML,  # InternVL-Chat-V1-2 and others over Nous-Hermes-2-Yi
        replace(_CHATML, name="internlm2-chat"),  # V1-5 and 2.0 over InternLM2
        _PHI3,  # 2.0 over Phi-3
        _CHATML_2_5,  # 2.5 and later
        # The LLaVA code base.
        _ONE_SHOT,
        replace(_VICUNA, name="v1"),
        _VICUNA,
        replace(_VICUNA, name="llava_v1", default_system_message=_POLITE.format("human")),
        _llava(_ZH, "internvl_zh", ""),
        _llava(_CHATML, "Hermes-2", "Answer the questions."),
        _llava(_CHATML, "internlm2-chat", _INTERNLM),
        _llava(_PHI3, "phi3-chat", "You are an AI assistant whose name is Phi-3."),
        # Specific to this package: internvl2_5 without a system block unless a message asks for one.
        replace(_CHATML_2_5, name="internvl", default_system_message="", omit_empty_system=True),
    )
}


_LLAVA_ONLY = ("default", "v1", "vicuna_v1", "llava_v1")  # unambiguous names, which `llava/<name>` finds too


def list_conversation_templates() -> list[str]:
    """Lists the names that `get_conversation_template` accepts."""
    return list(_TEMPLATES)


def get_conversation_template(name: str) -> ConversationTemplate:
    """Returns a conversation template by name; `llava/<name>` works for every template of the LLaVA code base.

    Raises:
        ValueError: If the name is unknown, or is `plain`, which joins images and captions without a dialogue.
    """
    base_name = name.removeprefix("llava/")
    if base_name == "plain":
        raise ValueError(
            "`plain` is no conversation template: it joins an image and its caption without roles, for pre-training. "
            "Build that text directly, or choose one of: " + ", ".join(_TEMPLATES) + "."
        )
    template = _TEMPLATES.get(name) or (_TEMPLATES.get(base_name) if base_name in _LLAVA_ONLY else None)
    if template is None:
        raise ValueError(f"Unknown conversation template `{name}`: expected one of {', '.join(_TEMPLATES)}.")
    return template


def escape_image_tokens(text: str, keep_placeholder: bool = False) -> str:
    """Escapes literal image tokens in user text with a space after the bracket: `<img>` becomes `< img>`.

    With `keep_placeholder`, `<image>` is left unchanged: in questions of `chat()` it marks the place of an image.
    """
    pattern = _IMAGE_TOKENS_BUT_PLACEHOLDER if keep_placeholder else _IMAGE_TOKENS
    return pattern.sub("< ", text)


def image_span(num_patches: int, num_image_token: int, use_image_start_end: bool = True) -> str:
    """Returns the text of one image: `num_image_token` context tokens per tile between a start and an end token.

    Args:
        num_patches: Number of tiles of the image.
        num_image_token: Number of image tokens per tile.
        use_image_start_end: Whether to add the start and end token. False in the LLaVA code base.
    """
    tokens = IMAGE_CONTEXT_TOKEN * (num_image_token * num_patches)
    return IMAGE_START_TOKEN + tokens + IMAGE_END_TOKEN if use_image_start_end else tokens


def with_image_placeholder(question: str, history: Sequence[tuple[str, str]] | None, has_images: bool) -> str:
    """Puts `<image>` and a line break before the first question of a dialogue with images, as `chat()` does.

    Args:
        question: The question; returned unchanged if it contains `<image>`.
        history: Earlier (question, answer) pairs, or None.
        has_images: Whether the dialogue has images.
    """
    if history or not has_images or IMAGE_PLACEHOLDER in question:
        return question
    return f"{IMAGE_PLACEHOLDER}\n{question}"


def build_query(
    template: ConversationTemplate,
    question: str,
    history: Sequence[tuple[str, str]] | None,
    num_patches_list: Sequence[int] | None,
    num_image_token: int,
    system_message: str | None = None,
    use_image_start_end: bool = True,
) -> str:
    """Builds the prompt of the published `chat()` and, for one sample, of `batch_chat()`.

    Args:
        template: The conversation template.
        question: The new question, to which `with_image_placeholder` is applied.
        history: Earlier (question, answer) pairs; not changed.
        num_patches_list: Number of tiles of each image of the whole dialogue, in order.
        num_image_token: Number of image tokens per tile.
        system_message: System message; None selects the template's default.
        use_image_start_end: As for `image_span`.

    Returns:
        The prompt, with every `<image>` of a question replaced by the span of its image.

    Raises:
        ValueError: If the numbers of `<image>` and of images differ.
    """
    num_patches_list = list(num_patches_list or [])
    pairs = list(history or [])
    questions = [asked for asked, _ in pairs] + [with_image_placeholder(question, pairs, bool(num_patches_list))]
    found = sum(asked.count(IMAGE_PLACEHOLDER) for asked in questions)
    if found != len(num_patches_list):
        raise ValueError(
            f"The dialogue has {found} `{IMAGE_PLACEHOLDER}` placeholder(s) but {len(num_patches_list)} image(s) "
            f"were given (tiles: {num_patches_list}). Write one `{IMAGE_PLACEHOLDER}` per image, and pass "
            "`num_patches_list` with the tiles of each."
        )
    spans = iter([image_span(tiles, num_image_token, use_image_start_end) for tiles in num_patches_list])
    messages = []
    for asked, answer in zip(questions, [*(answer for _, answer in pairs), None], strict=True):
        messages.append({"role": "user", "content": _place_images(asked, spans)})
        if answer is not None:
            messages.append({"role": "assistant", "content": escape_image_tokens(answer)})
    if system_message is not None:
        system_message = escape_image_tokens(system_message)
    return template.render(messages, system_message=system_message)


def _place_images(question: str, spans: Any) -> str:
    pieces = escape_image_tokens(question, keep_placeholder=True).split(IMAGE_PLACEHOLDER)
    return pieces[0] + "".join(next(spans) + piece for piece in pieces[1:])


__all__ = [
    "ConversationTemplate",
    "build_query",
    "escape_image_tokens",
    "get_conversation_template",
    "image_span",
    "list_conversation_templates",
    "with_image_placeholder",
]
