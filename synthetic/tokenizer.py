"""The bundled checkpoint's small tokenizers: byte-level BPE trained on generated text, which encode any text."""

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .captions import CAPTION_PROMPTS, LANGUAGES, PAIR_LAYOUTS, caption
from .scenes import COLOURS, LAYOUTS, PLACES, SHAPES, WORDS, questions_about, sample_scene, scene_generator


END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
VOCABULARY_SIZE = 768
MULTILINGUAL_VOCABULARY_SIZE = 1280


def question_corpus(num_scenes: int = 2000, seed: int = 0) -> Iterator[str]:
    """Yield questions, answers and captions of training scenes, and every word that the generator can write."""
    for word in (*WORDS, *COLOURS, *SHAPES, *PLACES):
        yield from [word, f" {word}"] * 50  # both forms of each word become one token
    for role in ("system", "user", "assistant"):
        yield from [f"{role}\n"] * 1000
    layouts = list(LAYOUTS.values())
    for index in range(num_scenes):
        rng = scene_generator("train", seed, index)
        scene = sample_scene(rng, layouts[index % len(layouts)], "train")
        yield caption(scene)
        for question in questions_about(scene, rng):
            yield f"{question.text}\n{question.answer}\n"


def caption_corpus(num_scenes: int = 1000, seed: int = 0) -> Iterator[str]:
    """Yield captions of training scenes in every language, in the form of contrastive and generative prompts."""
    for word in WORDS:
        yield from [f" {word}"] * 50  # one token
    layouts = list(PAIR_LAYOUTS.values())
    for index in range(num_scenes):
        rng = scene_generator("train", seed, index)
        scene = sample_scene(rng, layouts[index % len(layouts)], "train")
        yield from ["summarize:", *CAPTION_PROMPTS.values()]
        for language in LANGUAGES:
            yield caption(scene, language, rng)


def caption_tokenizer(num_scenes: int = 1000) -> PreTrainedTokenizerFast:
    """Train the tokenizer of captions in all languages, for stages 1 and 2."""
    return train_tokenizer(caption_corpus(num_scenes), MULTILINGUAL_VOCABULARY_SIZE)


def question_tokenizer(num_scenes: int = 2000) -> PreTrainedTokenizerFast:
    """Train the tokenizer of questions and answers, for stage 3."""
    return train_tokenizer(question_corpus(num_scenes))


def train_tokenizer(corpus: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """Train a fast tokenizer of `vocabulary_size` tokens, at least 262, special ones included.

    Every decimal digit is a token; padding and text end are `<|endoftext|>` and `<|im_end|>`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=END_OF_TEXT,
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
