"""The processor: prompts with images, settings of a call, retrieval and captions, saving and loading."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from internvl.configuration_internvl import InternVLChatConfig
from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.processing_internvl import InternVLProcessor

from .fixtures_processes import run_elsewhere
from .fixtures_processing import SEQ, SIDE, SQUARE, WIDE, assistant, chat, decoded, make_processor, span, user
from .fixtures_text import make_tokenizer


@pytest.fixture(scope="module")
def processor() -> InternVLProcessor:
    return make_processor()


# -------------------------------------------------------------------------------------------------------------- calls
def test_text_alone_gives_ids_and_mask(processor):
    features = processor(text="Hello", return_tensors="pt")
    assert set(features) == {"input_ids", "attention_mask"}
    assert decoded(processor, features["input_ids"][0]) == "<s>Hello"


def test_images_alone_give_tiles(processor):
    features = processor(images=[SQUARE, WIDE], return_tensors="pt")
    assert set(features) == {"pixel_values"}
    assert features["pixel_values"].shape == (5, 3, SIDE, SIDE)


@pytest.mark.parametrize("placeholder", ["<image>", "<IMG_CONTEXT>"])
def test_each_placeholder_becomes_the_span_of_its_image(processor, placeholder):
    text = f"a {placeholder} b {placeholder} c"
    features = processor(images=[WIDE, SQUARE], text=text, return_tensors="pt")
    assert decoded(processor, features["input_ids"][0]) == f"<s>a {span(4)} b {span(1)} c"
    assert features["pixel_values"].shape[0] == 5
    assert set(features) == {"input_ids", "attention_mask", "pixel_values"} == set(processor.model_input_names)


def test_images_keep_their_order(processor):
    features = processor(images=[[WIDE], [], [SQUARE, WIDE]], text=["<image>", "none", "<image><image>"])
    alone = [processor.image_processor(image)["pixel_values"] for image in (WIDE, SQUARE, WIDE)]
    assert np.array_equal(np.stack(features["pixel_values"]), np.concatenate([np.stack(tiles) for tiles in alone]))
    found = [row.count(processor.image_token_id) for row in features["input_ids"]]
    assert found == [4 * SEQ, 0, 5 * SEQ]


def test_flat_images_are_taken_in_order(processor):
    features = processor(images=[SQUARE, WIDE], text=["<image>", "<image>"])
    assert [row.count(processor.image_token_id) for row in features["input_ids"]] == [SEQ, 4 * SEQ]


def test_batches_of_arrays_and_tensors_are_images(processor):
    pixels = np.stack([np.asarray(SQUARE)] * 2)
    for images in (pixels, torch.from_numpy(pixels)):
        features = processor(images=images, text="<image><image>", return_tensors="pt")
        assert features["pixel_values"].shape[0] == 2


@pytest.mark.parametrize(
    ("text", "images", "match"),
    [
        ("<image>", None, "sample 0 has 1 and 0 image"),
        ("none", [SQUARE], "sample 0 has 0 and 1 image"),
        ("<image><IMG_CONTEXT>", [SQUARE], "sample 0 has 2 and 1 image"),
        (["<image>", "<image>"], [[SQUARE, SQUARE], []], "sample 0 has 1 and 2 image"),
        (["<image>", "none"], [[SQUARE], [SQUARE]], "sample 1 has 0 and 1 image"),
        (["<image>", "<image>"], [[SQUARE]], r"2 text\(s\) and images for 1 sample"),
        (["<image>", "<image>"], [SQUARE] * 3, r"the texts have \[1, 1\] and 3 image"),
    ],
)
def test_placeholders_that_differ_from_images_raise(processor, text, images, match):
    with pytest.raises(ValueError, match=match):
        processor(images=images, text=text)


def test_truncation_inside_an_image_raises(processor):
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        processor(images=SQUARE, text="A <image>", truncation=True, max_length=5)


@pytest.mark.parametrize("argument", ["videos", "audio"])
def test_videos_and_sound_are_refused_in_calls(processor, argument):
    with pytest.raises(ValueError, match=f"`{argument}` cannot be passed"):
        processor(text="a", **{argument: [SQUARE]})


@pytest.mark.parametrize("nothing", [[], (), [[]], {}, np.empty((0, 4))])
def test_empty_containers_are_nothing(processor, nothing):
    expected = processor(text="Hi", return_tensors="pt")
    found = processor(text="Hi", images=nothing, videos=nothing, audio=nothing, audios=nothing, return_tensors="pt")
    assert set(found) == set(expected) == {"input_ids", "attention_mask"}
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert set(processor(images=[SQUARE], text=nothing, mode="contrastive")) == {"pixel_values"}
    with pytest.raises(ValueError, match="Neither"):
        processor(images=nothing, text=nothing)
    rendered = processor.apply_chat_template([user("Hi")], tools=nothing, documents=nothing)
    assert rendered == processor.apply_chat_template([user("Hi")])


@pytest.mark.parametrize("mode", ["chat", "contrastive", "caption"])
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"nonsense": 3}, "`nonsense`"),
        ({"max_tiles": 3, "padding_sides": "left"}, "`max_tiles`, `padding_sides`"),
        ({"text_kwargs": {"nonsense": 3}}, "`text_kwargs['nonsense']`"),
        ({"images_kwargs": {"padding": True}}, "`images_kwargs['padding']`"),
        ({"common_kwargs": {"nonsense": 3}}, "`common_kwargs['nonsense']`"),
        ({"videos_kwargs": {"nonsense": 3}}, "`videos_kwargs['nonsense']`"),
    ],
)
def test_unknown_settings_of_a_call_are_named(mode, settings, named):
    processor = make_processor()
    with pytest.raises(ValueError, match=re.escape(named)):
        processor(text="Hi", mode=mode, **settings)
    with pytest.raises(ValueError, match=re.escape(named)):
        processor.apply_chat_template([user("Hi")], **settings)
    with pytest.raises(ValueError, match=re.escape(named)):
        chat(processor, [user("Hi")], processor_kwargs=settings)


def test_settings_that_a_mode_does_not_read_are_named(processor):
    with pytest.raises(ValueError, match=r"`return_offsets_mapping` is no setting of .* in mode `contrastive`"):
        processor(text="Hi", mode="contrastive", return_offsets_mapping=True)
    # As sentence-transformers calls it.
    features = processor(
        text=["Hi"],
        mode="contrastive",
        text_kwargs={"padding": True, "truncation": "longest_first"},
        images_kwargs={},
        audio_kwargs={"padding": True},
        videos_kwargs={},
        common_kwargs={"return_tensors": "pt"},
    )
    assert features["input_ids"].ndim == 2


def test_nothing_to_do_raises(processor):
    with pytest.raises(ValueError, match="Neither `images` nor `text`"):
        processor()
    with pytest.raises(ValueError, match="a string or a list of strings"):
        processor(text=[1])


def test_a_chat_processor_pads_left_with_its_own_tokenizer_too(tmp_path):
    """transformers' pipelines pad with the tokenizer; the side of the caller's is not touched."""
    given = make_tokenizer(padding_side="right")
    processor = make_processor(tokenizer=given)
    assert (processor.tokenizer.padding_side, given.padding_side) == ("left", "right")
    padded = processor.tokenizer.pad({"input_ids": [[5, 6], [7]]})["input_ids"]
    assert padded[1] == [processor.tokenizer.pad_token_id, 7]
    given.add_tokens(["<new>"])
    assert processor.tokenizer.convert_tokens_to_ids("<new>") == given.convert_tokens_to_ids("<new>")
    processor.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
    assert make_processor(tokenizer=given, mode="contrastive").tokenizer is given


def test_padding_is_on_the_left_for_every_tokenizer():
    processor = make_processor(tokenizer=make_tokenizer(padding_side="right"))
    features = processor(text=["one two three", "one"], return_tensors="pt")
    assert features["attention_mask"][1].tolist() == sorted(features["attention_mask"][1].tolist())
    assert features["attention_mask"][1, 0] == 0
    for kwargs in ({"padding_side": "right"}, {"text_kwargs": {"padding_side": "right"}}):
        assert processor(text=["one two three", "one"], return_tensors="pt", **kwargs)["attention_mask"][1, -1] == 0


def test_lists_are_not_padded(processor):
    rows = processor(text=["one two three", "one"])["input_ids"]
    assert len(rows[0]) > len(rows[1])


def test_number_of_tiles_is_returned_when_asked_for(processor):
    features = processor(images=[SQUARE, WIDE], text="<image><image>", return_num_patches=True, return_tensors="pt")
    assert features["num_patches"].tolist() == [1, 4]


@pytest.mark.parametrize(
    ("kwargs", "tiles"),
    [
        ({"max_num": 1}, [1, 1]),
        ({"use_thumbnail": False}, [1, 3]),
        ({"max_patches": 2}, [1, 3]),
        ({"images_kwargs": {"max_dynamic_patch": 1}}, [1, 1]),
        ({"max_num": [6, 1]}, [1, 1]),
        ({"min_num": [4, 1], "max_num": [4, 6], "use_thumbnail": [True, False]}, [5, 3]),
    ],
)
def test_tile_settings_reach_the_images_and_the_prompt(processor, kwargs, tiles):
    features = processor(images=[SQUARE, WIDE], text="<image> <image>", return_num_patches=True, **kwargs)
    assert features["num_patches"] == tiles
    assert features["input_ids"][0].count(processor.image_token_id) == SEQ * sum(tiles)
    sizes = [(image.height, image.width) for image in (SQUARE, WIDE)]
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes, **kwargs)
    assert counted["num_image_patches"] == tiles
    assert counted["num_image_tokens"] == [2 + SEQ * count for count in tiles]


def test_counting_without_images_gives_nothing(processor):
    counted = processor._get_num_multimodal_tokens()
    assert "num_image_tokens" not in counted
    assert processor._get_num_multimodal_tokens(image_sizes=[[10000, 10000]])["num_image_patches"] == [5]


def test_type_ids_mark_start_and_end_tokens_too(processor):
    text = ["a <image>", "b"]
    features = processor(images=[[WIDE], []], text=text, return_mm_token_type_ids=True, return_tensors="pt")
    assert features["mm_token_type_ids"].shape == features["input_ids"].shape
    assert features["mm_token_type_ids"].sum(-1).tolist() == [2 + 4 * SEQ, 0]


def test_replacement_offsets_point_at_the_spans(processor):
    features = processor(images=[WIDE], text="a <image> b", return_text_replacement_offsets=True)
    ((entry,),) = features["text_replacement_offsets"]
    assert entry["replacement"] == span(4)
    assert entry["new_span"] == (2, 2 + len(span(4)))


def test_kwargs_of_the_caller_are_not_changed(processor):
    images_kwargs, text_kwargs = {"max_num": 1}, {"padding": True}
    processor(images=WIDE, text="<image>", images_kwargs=images_kwargs, text_kwargs=text_kwargs, return_tensors="pt")
    chat(processor, [user([SQUARE], "a"), assistant("b")], return_labels=True, processor_kwargs=text_kwargs)
    assert (images_kwargs, text_kwargs) == ({"max_num": 1}, {"padding": True})


# ------------------------------------------------------------------------------------------- retrieval and captions
@pytest.mark.parametrize(
    "text", ["a cat on a street " * 20_000, "cat" * 100_000, " " * 300_000 + "a cat", "\u4e66" * 100_000]
)
def test_no_more_of_a_long_text_is_read_than_its_first_tokens_need(monkeypatch, text):
    processor = make_processor()
    prefix = processor.text_prefix
    expected = processor.tokenizer(prefix + text)["input_ids"][: processor.max_text_length - 1]
    read = []
    plain = type(processor.tokenizer).__call__
    monkeypatch.setattr(
        type(processor.tokenizer),
        "__call__",
        lambda self, text, **kwargs: read.append(max(map(len, text))) or plain(self, text, **kwargs),
    )
    ids = processor(text=[text, "a"], mode="contrastive")["input_ids"]
    assert ids[0] == [*expected, processor.tokenizer.eos_token_id]
    assert ids[1] == processor(text="a", mode="contrastive")["input_ids"][0]
    assert max(read) <= 20_000


def test_more_of_a_long_text_is_read_where_its_first_characters_give_too_few_tokens():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["x" * 100])  # of which 4,096 characters have fewer than twice `max_length`
    processor, text = make_processor(tokenizer=tokenizer), "x" * 200_000 + " a cat"
    expected = tokenizer(processor.text_prefix + text)["input_ids"][: processor.max_text_length - 1]
    assert expected.count(tokenizer.convert_tokens_to_ids("x" * 100)) > 60
    assert processor(text=text, mode="contrastive")["input_ids"] == [[*expected, tokenizer.eos_token_id]]


@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("mode", ["contrastive", "retrieval"])
def test_contrastive_text_has_prefix_end_and_fixed_length(mode, add_eos):
    processor = make_processor(tokenizer=make_tokenizer(add_eos=add_eos, padding_side="left"))
    texts = ["a cat", "summarize:a cat", "a cat</s>", "cat " * 100]
    features = processor(text=texts, mode=mode, return_tensors="pt")
    assert features["input_ids"].shape == features["attention_mask"].shape == (4, 80)
    end = processor.tokenizer.eos_token_id
    for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert (ids == end).sum() == 1
        assert ids[mask.sum() - 1] == end
        assert (ids[mask == 0] == processor.tokenizer.pad_token_id).all()
    assert [decoded(processor, features["input_ids"][row], features["attention_mask"][row]) for row in range(3)] == [
        "<s>summarize:a cat</s>"
    ] * 3
    assert features["attention_mask"][3].all()


def test_contrastive_tokens_equal_those_of_the_published_calls():
    tokenizer = make_tokenizer(add_eos=True)
    texts = ["a photo of a cat", "word " * 100]
    kwargs = {"max_length": 80, "truncation": True, "padding": "max_length", "padding_side": "right"}
    published = tokenizer(["summarize:" + text for text in texts], **kwargs)
    features = make_processor(tokenizer=tokenizer)(text=texts, mode="contrastive")
    assert features["input_ids"] == published["input_ids"]
    assert features["attention_mask"] == published["attention_mask"]


def test_contrastive_images_and_texts_need_not_match():
    processor = make_processor(tokenizer=make_tokenizer(special_tokens=()), mode="retrieval", max_text_length=12)
    features = processor(images=[SQUARE, WIDE], text=["a", "b", "c"], max_num=1, return_tensors="pt")
    assert features["input_ids"].shape == (3, 12)
    assert features["pixel_values"].shape[0] == 2
    assert "num_patches" not in features
    assert processor(images=SQUARE, max_num=1, return_tensors="pt")["pixel_values"].shape[0] == 1


def test_contrastive_settings_of_a_call():
    processor = make_processor(mode="contrastive")
    longest = processor(text=["a", "a cat on a mat"], padding=True)
    assert len(longest["input_ids"][0]) == len(longest["input_ids"][1]) < 80
    unpadded = processor(text=["a", "a cat on a mat"], padding=False)
    assert len(unpadded["input_ids"][0]) < len(unpadded["input_ids"][1])
    assert len(processor(text="a", max_length=20)["input_ids"][0]) == 20
    left = processor(text=["a"], padding_side="left")
    assert left["attention_mask"][0][0] == 0
    assert left["attention_mask"][0][-1] == 1


def test_tokenizers_without_end_or_padding_token():
    without_padding = make_processor(tokenizer=make_tokenizer(pad_token=None), mode="contrastive")
    assert without_padding(text="a")["input_ids"][0][-1] == 0
    with pytest.raises(ValueError, match="has no end token"):
        make_processor(tokenizer=make_tokenizer(eos_token=None), mode="contrastive")(text="a")


@pytest.mark.parametrize("add_eos", [False, True])
def test_caption_prompt_has_no_end_token_and_left_padding(add_eos):
    processor = make_processor(tokenizer=make_tokenizer(add_eos=add_eos))
    features = processor(images=[SQUARE, SQUARE], mode="caption", return_tensors="pt")
    assert [decoded(processor, row) for row in features["input_ids"]] == ["<s>English caption:"] * 2
    assert features["pixel_values"].shape[0] == 2
    features = processor(
        text=["English caption:", "A much longer English caption:"], mode="caption", return_tensors="pt"
    )
    assert features["attention_mask"][0, 0] == 0
    assert features["attention_mask"][:, -1].all()


def test_chat_needs_image_tokens_and_the_other_modes_do_not():
    tokenizer = make_tokenizer(special_tokens=("<img>",))
    with pytest.raises(ValueError, match=r"lacks `<IMG_CONTEXT>`, `</img>`, which mode `chat` needs"):
        make_processor(tokenizer=tokenizer)
    processor = make_processor(tokenizer=tokenizer, mode="contrastive")
    with pytest.raises(ValueError, match="lacks `<IMG_CONTEXT>`"):
        processor(text="a", mode="chat")
    with pytest.raises(ValueError, match="`mode` must be one of chat, contrastive, retrieval, caption, got `x`"):
        processor(text="a", mode="x")


# -------------------------------------------------------------------------------------------------- saving and loading
def test_pickle_keeps_the_processor(processor):
    again = pickle.loads(pickle.dumps(processor))
    assert chat(again, [user(WIDE)])["input_ids"].tolist() == chat(processor, [user(WIDE)])["input_ids"].tolist()


def test_saved_processor_reloads_equal(tmp_path):
    processor = make_processor("vicuna_v1", mode="retrieval", max_text_length=20, text_prefix="x:", caption_prompt="y")
    processor.save_pretrained(tmp_path)
    again = InternVLProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert (again.mode, again.max_text_length, again.text_prefix, again.caption_prompt) == (
        "contrastive",
        20,
        "x:",
        "y",
    )
    assert again.chat_template == processor.chat_template
    assert len(again(text="a")["input_ids"][0]) == 20


RELOAD = """
import json, shutil, sys
import numpy as np
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
first, second = sys.argv[1:]

def load(folder):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image", "image": np.zeros((64, 192, 3), dtype=np.uint8)}, {"type": "text", "text": "What?"}]
    message = {"role": "user", "content": content}
    features = processor.apply_chat_template([message], tokenize=True, return_dict=True)
    names = [type(processor).__name__, type(image_processor).__name__, type(processor).__module__]
    return processor, [*names, features["input_ids"]]

processor, result = load(first)
processor.save_pretrained(second)
for name in ("config.json", "configuration_internvl.py", "configuration_internlm2.py"):
    shutil.move(f"{first}/{name}", second)
shutil.rmtree(first)
shutil.rmtree(sys.modules[type(processor).__module__].__file__.rpartition("/")[0])
print(json.dumps([result, load(second)[1]]))
"""


def reload_elsewhere(folder: Path, second: Path) -> list[Any]:
    """Loads a saved processor, and what it saves to `second`, in a fresh process without the package."""
    return json.loads(run_elsewhere(folder.parent, "-c", RELOAD, folder, second).splitlines()[-1])


def add_config(folder: Path, root: Path) -> Path:
    """Makes a model's folder of a processor's folder: `AutoProcessor` goes by the model's configuration."""
    auto_map = {"AutoConfig": "configuration_internvl.InternVLChatConfig"}
    (folder / "config.json").write_text(
        json.dumps({"model_type": InternVLChatConfig.model_type, "auto_map": auto_map})
    )
    for name in ("configuration_internvl.py", "configuration_internlm2.py"):
        shutil.copy(root / name, folder)
    return folder


def test_saved_files_do_not_name_a_class_that_transformers_has(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer_config.json"):
        assert "processor_class" not in json.loads((tmp_path / name).read_text("utf-8"))
    processor.tokenizer.save_pretrained(tmp_path)
    assert "processor_class" not in json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))


def test_installed_package_is_used_whether_remote_code_is_trusted_or_not(processor, tmp_path, root):
    processor.save_pretrained(tmp_path)
    add_config(tmp_path, root)
    for trust_remote_code in (None, False, True):
        again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=trust_remote_code)
        assert type(again) is InternVLProcessor
        assert type(again.image_processor) is InternVLImageProcessor


def test_saved_folder_works_after_a_move_and_a_second_save(processor, tmp_path, root):
    processor.save_pretrained(tmp_path / "first")
    config = json.loads((tmp_path / "first" / "processor_config.json").read_text())
    assert config["auto_map"] == {"AutoProcessor": "processing_internvl.InternVLProcessor"}
    assert config["image_processor"]["auto_map"]["AutoImageProcessor"].endswith(".InternVLImageProcessor")
    shutil.move(tmp_path / "first", tmp_path / "moved")
    ids = chat(processor, [user(Image.new("RGB", (192, 64)), "What?")])["input_ids"].tolist()
    results = reload_elsewhere(add_config(tmp_path / "moved", root), tmp_path / "second")
    for folder, (*names, module, found) in zip(("moved", "second"), results, strict=True):
        assert names == ["InternVLProcessor", "InternVLImageProcessor"]
        assert module.startswith(f"transformers_modules.{folder}.")
        assert found == ids
    assert not (tmp_path / "moved").exists()


@pytest.mark.parametrize(
    "text", ["a\ud800", ["fine", "\udfff"], 5, [5], ["a", None], {"text": 5}, b"bytes", [b"bytes"]], ids=repr
)
@pytest.mark.parametrize("mode", ["chat", "contrastive", "caption"])
def test_what_is_no_text_is_named_before_a_tokenizer_sees_it(processor, text, mode):
    with pytest.raises(
        ValueError, match=r"half of a surrogate pair at character|must be a string or a list of strings"
    ):
        processor(text=text, mode=mode)
