"""Tokenizers of results: the ids of the published slow ones, and what is refused."""

from types import SimpleNamespace

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoProcessor, AutoTokenizer
from transformers.convert_slow_tokenizer import LlamaConverter, generate_merges

from internvl.conversion.repository.sentencepiece_model import tokenizer_from_sentencepiece

from .fixtures_conversions import assert_rejected, edit_json, json_of, run
from .fixtures_published import (
    INTERNLM2_TOKENS,
    LLAMA_TOKENS,
    published,
    published_14b,
    published_chat,
    random_lines,
    sentencepiece_model,
    slow_ids,
    write_sentencepiece_tokenizer,
)
from .fixtures_text import make_tokenizer


TEXTS = (
    "What is shown in the image? 1234 caf\u00e9 \u4e2d\u6587",
    " two  spaces\n\n",
    "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nHow many?<|im_end|><|im_start|>assistant\n",
)


@pytest.mark.parametrize(
    ("special", "num_unused", "settings"),
    [
        (LLAMA_TOKENS, 0, {}),
        (INTERNLM2_TOKENS, 4, {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["t.T", None]}}),
    ],
    ids=["llama", "internlm2"],
)
def test_a_sentencepiece_tokenizer_keeps_the_ids_of_the_published_slow_one(special, num_unused, settings, tmp_path):
    case = "chat_internlm2_v2" if num_unused else "chat_llama_v1"
    source = published(case, tmp_path)
    write_sentencepiece_tokenizer(source, special, num_unused, pad_token="</s>", **settings)
    out = run(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False, use_fast=False)
    for text in TEXTS:
        assert tokenizer(text).input_ids == slow_ids(source, text)
    assert json_of(out)["image_token_id"] == 332
    assert tokenizer.convert_tokens_to_ids(list(special.values())) == list(special)
    assert tokenizer.pad_token == "</s>"


class PiecesAlone:
    """transformers reads a tokenizer.model through protobuf; here sentencepiece itself lists the pieces for it."""

    def __init__(self, vocab_file: str):
        pass

    def extract(self, vocab_scores):
        return None, generate_merges({piece: index for index, (piece, _) in enumerate(vocab_scores)}, None)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_model_gives_the_tokenizer_of_transformers_own_converter(legacy, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    model = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pieces = [
        SimpleNamespace(
            piece=model.id_to_piece(index), score=model.get_score(index), type=3 if model.is_control(index) else 1
        )
        for index in range(model.get_piece_size())
    ]
    converter = LlamaConverter.__new__(LlamaConverter)
    converter.original_tokenizer = SimpleNamespace(
        legacy=legacy, vocab_file="", convert_ids_to_tokens=model.id_to_piece
    )
    converter.SpmExtractor = PiecesAlone
    converter.proto = SimpleNamespace(
        pieces=pieces,
        trainer_spec=SimpleNamespace(model_type=2, unk_piece="<unk>"),
        normalizer_spec=SimpleNamespace(precompiled_charsmap=b""),
    )
    wanted = converter.converted()
    found = tokenizer_from_sentencepiece(tmp_path / "tokenizer.model", {}, legacy)
    assert found.get_vocab() == wanted.get_vocab()
    for text in (*TEXTS, *random_lines(["<s>", "</s>"], 1000)):
        ids = found.encode(text, add_special_tokens=False).ids
        assert ids == wanted.encode(text, add_special_tokens=False).ids, text
        assert found.decode(ids) == wanted.decode(ids), text


def test_the_result_needs_neither_sentencepiece_nor_protobuf(tmp_path):
    source = published("chat_llama_v1", tmp_path)
    write_sentencepiece_tokenizer(source, LLAMA_TOKENS)
    out = run(source, tmp_path / "out")
    (out / "tokenizer.model").unlink()
    assert AutoTokenizer.from_pretrained(out)("a").input_ids[0] == 1


def test_the_begin_token_of_14b_stays_when_the_end_token_is_asked_for(tmp_path):
    source = published_14b(tmp_path)
    out = run(source, tmp_path / "out")
    text = "summarize:a photo of a cat"
    tokenizer = AutoTokenizer.from_pretrained(out, use_fast=False, add_eos_token=True)
    assert tokenizer(text).input_ids == [*slow_ids(source, text), 2]
    tokenizer.add_eos_token = False
    assert tokenizer(text).input_ids == slow_ids(source, text)


def test_a_tokenizer_may_come_from_another_folder(tmp_path):
    make_tokenizer(add_bos=False, eos_token="<|endoftext|>").save_pretrained(tmp_path / "tokenizer")
    out = run(published("chat_qwen2_v2", tmp_path), tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    processor = AutoProcessor.from_pretrained(out)
    assert processor.image_token_id == json_of(out)["image_token_id"] == 349
    assert processor.chat_template == (out / "chat_template.jinja").read_text()


def test_the_tokenizers_own_chat_template_gives_way_to_that_of_the_checkpoint(tmp_path):
    source = published_chat(tmp_path)
    edit_json(source / "tokenizer_config.json", chat_template="{{ 'another one' }}")
    out = run(source, tmp_path / "out")
    assert "another one" not in (out / "tokenizer_config.json").read_text()
    assert AutoTokenizer.from_pretrained(out).chat_template == (out / "chat_template.jinja").read_text()


MARKS = ("<img>", "</img>", "<IMG_CONTEXT>")


@pytest.mark.parametrize(
    ("tokens", "image_token_id", "message"),
    [
        (("<img>",), None, "lacks `</img>`, `<IMG_CONTEXT>`"),
        ((*MARKS, *(f"<extra{index}>" for index in range(300))), None, r"ids up to \d+, the model has .* 528 tokens"),
        (MARKS, 7, r"`image_token_id` is 7, the tokenizer has \d+"),
        (None, 528, "must lie in the vocabulary of 528 tokens, got 528"),
    ],
    ids=["no-image-tokens", "too-large", "another-image-token", "outside"],
)
def test_tokens_that_are_not_those_of_the_model_are_refused(tokens, image_token_id, message, tmp_path):
    source = published("chat_qwen2_v2", tmp_path)
    if tokens:
        make_tokenizer(special_tokens=tokens).save_pretrained(source)
    assert_rejected(source, tmp_path, message, image_token_id=image_token_id)


def test_a_tokenizer_that_is_only_remote_code_is_refused(tmp_path):
    source = published("chat_qwen2_v2", tmp_path)
    (source / "vocab.json").write_text("{}")
    edit_json(
        source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}, tokenizer_class="OwnTokenizer"
    )
    assert_rejected(source, tmp_path, r"is remote code .`OwnTokenizer`., which is not run")


def test_a_folder_named_as_tokenizer_must_hold_one(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(OSError, match="has no tokenizer"):
        run(published("chat_qwen2_v2", tmp_path), tmp_path / "out", tokenizer=tmp_path / "none")
