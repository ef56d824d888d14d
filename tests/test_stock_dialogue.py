"""Chat repositories, bundled and converted, where others do the work: transformers' pipelines and bare tokenizers,
TRL's batches.
"""

import copy

import pytest
import torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer, pipeline

import internvl
from internvl.conversion.convert import convert
from internvl.conversion.repository.tokenizer import copy_tokenizer

from . import engine_jobs
from .fixtures_published import (
    INTERNLM2_TOKENS,
    LLAMA_TOKENS,
    published_14b,
    published_chat,
    random_lines,
    slow_ids,
    write_sentencepiece_tokenizer,
)
from .fixtures_text import make_image


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    return convert(published_chat(folder), folder / "chat", show_progress=False)


def dialogue(question: str, *images) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def answers(results: list) -> list[str]:
    return [(row[0] if isinstance(row, list) else row)["generated_text"] for row in results]


@pytest.mark.parametrize("repository", ["bundled", "converted"])
def test_the_stock_pipeline_answers_in_batches_as_one_by_one(root, converted, repository):
    pipe = pipeline("image-text-to-text", model=str(root if repository == "bundled" else converted))
    settings = {"max_new_tokens": 8, "return_full_text": False}
    digits, star = str(root / "examples" / "handwriting.png"), str(root / "examples" / "star.png")
    with_images = [
        dialogue("Which digit is at the top right?", digits),
        dialogue("What colour is the star?", star),
        dialogue("Two at once: what colour is the star of the second one?", make_image(96, 32), star),
    ]
    without = [dialogue("Hi."), dialogue("What colour is the star, when there is nothing to be seen at all?")]
    for chats in (with_images, without):
        one_by_one = [answers(pipe(text=[chat], **settings))[0] for chat in chats]
        assert len(set(one_by_one)) > 1 or chats is without
        for size in (2, len(chats)):
            assert answers(pipe(text=chats, batch_size=size, **settings)) == one_by_one
    with pytest.raises(ValueError, match=r"different keys.*pixel_values"):  # transformers' own; by name
        pipe(text=[*with_images, *without], batch_size=5, **settings)
    if repository == "bundled":
        assert answers(pipe(text=with_images[:2], batch_size=2, **settings)) == ["4", "red"]


def test_bare_tokenizers_pad_chats_left_and_pairs_right(root, converted, tmp_path):
    for folder in (root, converted):
        assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
        AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / folder.name)
        assert AutoTokenizer.from_pretrained(tmp_path / folder.name).padding_side == "left"
    native = convert(converted, tmp_path / "native", to="native", show_progress=False)
    assert AutoTokenizer.from_pretrained(native).padding_side == "left"
    pairs = convert(published_14b(tmp_path), tmp_path / "pairs", show_progress=False)
    for folder in (pairs, root / "internvl_g"):
        assert AutoTokenizer.from_pretrained(folder).padding_side == "right"
        assert AutoProcessor.from_pretrained(folder).tokenizer.padding_side == "right"


def test_sub_folders_load_by_their_path_with_the_package_imported(root):
    pairs = AutoModel.from_pretrained(root / "internvl_g")
    assert isinstance(pairs, internvl.InternVLModel)
    assert AutoProcessor.from_pretrained(root / "internvl_g").mode == "contrastive"
    assert isinstance(AutoModel.from_pretrained(root / "internvit"), internvl.InternVisionModel)
    pipe = pipeline("zero-shot-image-classification", model=str(root / "internvl_g"))
    found = pipe(str(root / "examples" / "star.png"), candidate_labels=["a green circle", "a red star"])
    assert found[0]["label"] == "a red star"
    features = pipeline("image-feature-extraction", model=str(root / "internvit"))
    assert len(features(str(root / "examples" / "star.png"))[0]) > 1


# ------------------------------------------------------------------------------------------------------- TRL's batches
@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """Images of one tile, of four, both, and none."""
    small, wide = make_image(56, 56), make_image(168, 56, seed=1)
    asked = {"role": "user", "content": "What is shown in the image?"}
    answers = ("A red bus.", "Two people and a dog.", "No.", "Nothing.")
    return [
        {"images": images, "messages": [asked, {"role": "assistant", "content": answer}]}
        for images, answer in zip(([small], [wide], [small, wide], []), answers, strict=True)
    ]


def test_trl_with_assistant_only_loss_learns_answers_and_no_placeholder(rows):
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    processor = engine_jobs.make_processor()
    batch = sft.DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)(copy.deepcopy(rows))
    messages = []
    for row in rows:
        parts = [{"type": "image", "image": image} for image in row["images"]]
        question = {"role": "user", "content": [*parts, {"type": "text", "text": row["messages"][0]["content"]}]}
        messages.append([question, row["messages"][1]])
    expected = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_labels=True,
        padding=True,
        add_special_tokens=False,
    )
    assert torch.equal(batch["labels"], expected["labels"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert not (batch["labels"] == processor.image_token_id).any()
    assert (batch["input_ids"] == processor.image_token_id).any()


def test_trl_learns_completions_and_no_placeholder_of_the_prompt(rows):
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    processor = engine_jobs.make_processor()
    pairs = [
        {"images": row["images"], "prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows
    ]
    batch = sft.DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(copy.deepcopy(pairs))
    for row, labels in zip(rows, batch["labels"], strict=True):
        assert row["messages"][1]["content"] in processor.decode(labels[labels != -100])
    assert not (batch["labels"] == processor.image_token_id).any()


# ------------------------------------------------------------------------------ converted sentencepiece tokenizers
@pytest.mark.parametrize(
    ("special", "num_unused", "settings"),
    [(LLAMA_TOKENS, 0, {}), (INTERNLM2_TOKENS, 4, {"tokenizer_class": "InternLM2Tokenizer"})],
    ids=["llama", "internlm2"],
)
def test_ten_thousand_lines_have_the_ids_of_the_slow_tokenizer(special, num_unused, settings, tmp_path):
    write_sentencepiece_tokenizer(tmp_path, special, num_unused, **settings)
    (tmp_path / "out").mkdir()
    tokenizer = copy_tokenizer(tmp_path, tmp_path / "out", internvl.InternVLChatConfig())
    lines = random_lines(list(special.values()), 10_000)
    found = tokenizer(lines)["input_ids"]
    wrong = [line for line, ids in zip(lines, found, strict=True) if ids != slow_ids(tmp_path, line)]
    assert not wrong, f"{len(wrong)} lines differ, the first is {wrong[0]!r}"
