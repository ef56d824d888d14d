"""Contrastive texts that did not pass the processor: completed or refused; complete ones keep their ids."""

from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, pipeline

from internvl import modeling_internvl
from internvl.conversion.convert import convert
from internvl.modeling_internvl import InternVLModel
from internvl.processing_internvl import InternVLProcessor
from internvl.texts_internvl import ContrastiveTexts

from . import tiny
from .fixtures_processes import run_elsewhere
from .fixtures_published import published_14b
from .fixtures_text import make_image, make_tokenizer


ROOT = Path(__file__).resolve().parents[1]
LABELS = ["a cat", "a red bus on a street, and two people", "answer", ": two", "1", "straße"]
TEMPLATE = "This is a photo of {}."


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """InternVL-14B with a LLaMA tokenizer, converted."""
    folder = tmp_path_factory.mktemp("texts")
    return convert(published_14b(folder), folder / "14b", show_progress=False)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A C/G folder whose tokenizer joins `:` with what follows, and puts a begin and an end token around a text."""
    folder = tmp_path_factory.mktemp("byte_level")
    tiny.internvl_model().save_pretrained(folder)
    tokenizer = make_tokenizer(add_eos=True)
    tokenizer.add_tokens([":cat"])
    processor = InternVLProcessor(
        AutoImageProcessor.from_pretrained(ROOT / "internvit"), tokenizer, mode="contrastive"
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seen(converted):
    """The converted model, its processor, and the ids that reach QLLaMA in each call."""
    model, ids = InternVLModel.from_pretrained(converted).eval(), []
    model.qllama.model.register_forward_pre_hook(
        lambda _, args, kwargs: ids.append((kwargs["input_ids"], kwargs["attention_mask"])), with_kwargs=True
    )
    return model, AutoProcessor.from_pretrained(converted), ids


def row_of(ids: torch.Tensor, mask: torch.Tensor, number: int = 0) -> list[int]:
    return ids[number][mask[number].bool()].tolist()


@pytest.mark.parametrize("folder", ["bundled", "converted"])
@pytest.mark.parametrize("template", [TEMPLATE, "{}", "summarize:{}"])
@torch.no_grad()
def test_the_stock_zero_shot_pipeline_gives_the_processors_figures(folder, template, converted):
    folder = ROOT / "internvl_g" if folder == "bundled" else converted
    stock = pipeline("zero-shot-image-classification", model=str(folder), dtype=torch.float32)
    image = make_image()
    found = {entry["label"]: entry["score"] for entry in stock(image, LABELS, hypothesis_template=template)}
    texts = [template.format(label) for label in LABELS]
    inputs = AutoProcessor.from_pretrained(folder)(image, texts, mode="contrastive", return_tensors="pt")
    expected = stock.model(**inputs).logits_per_image[0].softmax(dim=-1)
    assert [found[label] for label in LABELS] == expected.tolist()
    assert len(set(found.values())) == len(LABELS)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [True, "max_length"])
@torch.no_grad()
def test_ids_of_the_bare_tokenizer_become_those_of_the_processor(seen, converted, side, padding):
    model, processor, ids = seen
    tokenizer = AutoTokenizer.from_pretrained(converted, padding_side=side)
    tokenizer.pad_token_id = 0
    for add_special_tokens in (True, False):
        bare = tokenizer(
            LABELS, padding=padding, max_length=40, return_tensors="pt", add_special_tokens=add_special_tokens
        )
        model.get_text_features(**bare)
        expected = processor(text=LABELS, mode="contrastive", return_tensors="pt")
        assert torch.equal(ids[-1][0], expected["input_ids"])
        assert torch.equal(ids[-1][1], expected["attention_mask"])


@pytest.mark.parametrize(
    "text", ["  two  spaces ", "   ", "a\n", "a cat </s>", "  \n a </s>", "日本語", "<s> x", "a" * 500]
)
def test_texts_that_a_decoder_does_not_spell_exactly_are_completed_too(seen, text):
    model, processor, _ = seen
    bare = processor.tokenizer(text)["input_ids"]
    expected = processor(text=text, mode="contrastive", padding=False)["input_ids"][0]
    assert model.contrastive_texts.completed(bare) == expected


@torch.no_grad()
def test_a_prefix_that_the_tokenizer_joins_with_the_text_is_not_put_on_as_ids(byte_level):
    model = InternVLModel.from_pretrained(byte_level)
    texts = model.contrastive_texts
    processor = AutoProcessor.from_pretrained(byte_level)
    for text, is_joined in (("cat", True), ("dog", False)):
        expected = processor(text=text, mode="contrastive", padding=False)["input_ids"][0]
        assert (expected[: len(texts.prefix_ids)] != texts.prefix_ids) == is_joined
        for start in ("", "summarize:"):
            assert texts.completed(texts.tokenizer(start + text).input_ids) == expected


def test_what_is_complete_keeps_its_ids(seen, converted):
    model, _, ids = seen
    tokenizer = AutoTokenizer.from_pretrained(converted, use_fast=False, add_eos_token=True)
    tokenizer.pad_token_id = 0
    texts = ["summarize:" + label for label in LABELS]
    published = tokenizer(texts, max_length=80, truncation=True, padding="max_length", return_tensors="pt").input_ids
    model.encode_text(published)
    assert ids[-1][0] is published
    long = tokenizer(
        ["summarize:" + "a red bus " * 60], max_length=120, truncation=True, return_tensors="pt"
    ).input_ids
    model.encode_text(long)
    assert ids[-1][0] is long
    no_source = tiny.internvl_model()
    assert torch.equal(no_source.encode_text(tiny.summary_ids()), no_source.get_text_features(tiny.summary_ids()))


@torch.no_grad()
def test_only_the_rows_that_lack_something_change(seen):
    model, processor, ids = seen
    inputs = processor(text=LABELS, mode="contrastive", return_tensors="pt")
    rows = [row_of(inputs["input_ids"], inputs["attention_mask"], number) for number in range(len(LABELS))]
    rows[1] = rows[1][:-1]  # without the end token
    prefix = len(model.contrastive_texts.prefix_ids)
    rows[2] = [*processor.tokenizer(LABELS[2]).input_ids, 2]  # without the prefix
    assert rows[0][:prefix] == model.contrastive_texts.prefix_ids
    model.get_text_features(**tiny.pad([torch.tensor(row) for row in rows]))
    assert torch.equal(ids[-1][0], inputs["input_ids"])


@torch.no_grad()
def test_texts_that_cannot_be_completed_are_refused_by_name(seen, byte_level):
    model, _, _ = seen
    with pytest.raises(ValueError, match=r"cannot be completed.*mode=\"contrastive\""):
        model.get_text_features(torch.tensor([[1, 200, 250, 131, 77]]))
    with pytest.raises(ValueError, match="a row is all padding"):
        model.get_text_features(torch.zeros(1, 4).long())


@torch.no_grad()
def test_a_model_without_a_tokenizer_takes_texts_as_they_are_and_says_so(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_internvl.logger, "warning_once", said.append)
    model, ids = tiny.internvl_model(), tiny.text_ids()
    found = model.get_text_features(ids)
    assert len(said) == 1
    assert 'mode="contrastive"' in said[0]
    model.completes_texts = False
    assert torch.equal(model.get_text_features(ids), found)
    assert len(said) == 1


@torch.no_grad()
def test_ids_that_spell_no_text_stay_where_the_user_closed_them(seen):
    """As published calls of other tokenizers do."""
    model, _, ids = seen
    given = torch.tensor([[1, 200, 250, 131, 77, 2]])
    model.encode_text(given)
    assert ids[-1][0] is given


@torch.no_grad()
def test_captions_and_matching_keep_their_ids(seen):
    model, processor, ids = seen
    inputs = processor(make_image(), ["a cat"], mode="caption", return_tensors="pt")
    model.get_matching_logits(**inputs)
    assert ids[-1][0] is inputs["input_ids"]
    model.generate(**inputs, max_new_tokens=1)
    assert ids[-1][0].tolist() == inputs["input_ids"].tolist()


def test_complete_texts_cost_one_look_at_the_device(seen, monkeypatch):
    model, processor, _ = seen
    inputs = processor(text=LABELS, mode="contrastive", return_tensors="pt")
    looks, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: looks.append(tensor) or tolist(tensor))
    for name in ("__bool__", "__int__", "item"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, plain=plain: looks.append(t) or plain(t))
    monkeypatch.setattr(ContrastiveTexts, "completed", None)
    model._completed_texts(inputs["input_ids"], inputs["attention_mask"])
    assert len(looks) == 1


ELSEWHERE = """
import sys
sys.modules["internvl"] = None  # the installed package must not help: an attempt to import it fails
import torch
from PIL import Image
from transformers import AutoProcessor, pipeline
folder, labels = sys.argv[1], sys.argv[2:]
stock = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True, dtype=torch.float32)
assert type(stock.model).__module__.startswith("transformers_modules.")
image = Image.new("RGB", (64, 64), "red")
found = {entry["label"]: entry["score"] for entry in stock(image, labels, hypothesis_template="{}")}
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(image, labels, mode="contrastive", return_tensors="pt")
with torch.no_grad():
    assert [found[label] for label in labels] == stock.model(**inputs).logits_per_image[0].softmax(-1).tolist()
"""


def test_the_stock_pipeline_completes_texts_without_the_package(converted, tmp_path):
    run_elsewhere(tmp_path, "-c", ELSEWHERE, converted, *LABELS)
