"""What the page does with models, without the page: dialogues that are streamed, stopped and freed, classification by
typed classes, captions, search, and images that come as bytes alone.
"""

import copy
import sys
from itertools import pairwise

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from internvl.evaluation.attention_maps import answer_maps, dialogue_maps, images_in
from internvl.serving.__main__ import main
from internvl.serving.app import tasks
from internvl.serving.app.tasks import (
    ChatTask,
    ContrastiveTask,
    FolderSearch,
    images_of,
    load_tasks,
    read_upload,
    split_classes,
)


@pytest.fixture(scope="module")
def chat(root):
    return ChatTask(root, max_new_tokens=16)


@pytest.fixture(scope="module")
def contrastive(root):
    return ContrastiveTask.load(root / "internvl_g")


@pytest.fixture(scope="module")
def files(root):
    return {path.stem: path.read_bytes() for path in (root / "examples").glob("*.png")}


# ------------------------------------------------------------------------------------------------------------ dialogue
def test_answers_grow_word_by_word_and_are_those_of_a_conversation(chat, files):
    dialogue, plain = chat.begin(), chat.begin()
    turns = [("Where is the purple cross?", [files["wide_small_text"], files["handwriting"]]), ("And the star?", [])]
    for question, images in turns:
        grown = list(chat.answer(dialogue, question, images))
        assert grown[-1] == plain.ask(question, images)
    assert dialogue.messages == plain.messages
    first = list(chat.answer(chat.begin(), *turns[0]))
    assert len(set(first)) > 1
    assert all(later.startswith(earlier.strip()) for earlier, later in pairwise(first))


def test_visitors_do_not_see_each_other(chat, files):
    one, other = chat.begin(), chat.begin()
    list(chat.answer(one, "Which digit is at the top right?", [files["handwriting"]]))
    assert other.messages == []
    assert images_of(one) == [files["handwriting"]]
    assert one.model is other.model


def test_a_caller_that_stops_reading_stops_the_model(chat, files, monkeypatch):
    dialogue = chat.begin()
    monkeypatch.setattr(dialogue, "max_new_tokens", 400)
    seen, generate = [], dialogue.model.generate

    def without_end(**inputs):
        (criterion,) = inputs["stopping_criteria"]
        seen.append(criterion)
        output = generate(**inputs, min_new_tokens=400)
        seen.append(output.shape[1] - inputs["input_ids"].shape[1])
        return output

    monkeypatch.setattr(dialogue.model, "generate", without_end)
    growing = chat.answer(dialogue, "What is written?", [files["words"]])
    next(growing)
    growing.close()
    assert seen[0].event.is_set()
    assert seen[1] < 400
    assert [message["role"] for message in dialogue.messages] == ["user", "assistant"]


def test_a_failing_model_ends_the_answer_with_its_error(chat, monkeypatch):
    dialogue = chat.begin()
    monkeypatch.setattr(dialogue, "_read_all", lambda messages: (_ for _ in ()).throw(ValueError("too hot")))
    with pytest.raises(ValueError, match="too hot"):
        list(chat.answer(dialogue, "What?", []))
    assert dialogue.messages == []


def test_few_dialogues_keep_their_cache_and_the_others_answer_alike(chat, files, monkeypatch):
    monkeypatch.setattr(tasks, "CACHED_DIALOGUES", 1)
    first, second, third = chat.begin(), chat.begin(), chat.begin()
    for dialogue in (first, second):
        list(chat.answer(dialogue, "Which digit is at the top right?", [files["handwriting"]]))
    assert first.cache is None
    assert second.cache is not None
    third.ask("Which digit is at the top right?", [files["handwriting"]])
    answers = {list(chat.answer(dialogue, "And at the bottom?", []))[-1] for dialogue in (first, second)}
    assert answers == {third.ask("And at the bottom?")}
    chat.end(first)
    assert first.messages == []


def test_dialogues_have_limits(chat, files, monkeypatch):
    dialogue = chat.begin()
    with pytest.raises(ValueError, match="at most 8 images"):
        list(chat.answer(dialogue, "What?", [files["star"]] * 9))
    dialogue.messages = [{"role": "user", "content": []}] * (2 * tasks.MOST_TURNS)
    with pytest.raises(ValueError, match="20 questions"):
        list(chat.answer(dialogue, "What?", []))
    dialogue = chat.begin()
    list(chat.answer(dialogue, "Which digit is at the top right?", [files["handwriting"]]))
    monkeypatch.setattr(tasks, "MOST_ATTENTION_WEIGHTS", 10)
    with pytest.raises(ValueError, match="too many to show"):
        chat.looked(dialogue)


def test_tiles_and_maps_are_drawn_of_every_image(chat, files):
    dialogue = chat.begin()
    data = [files["wide_small_text"], files["handwriting"]]
    assert [text for _, text in chat.tiles([read_upload(one) for one in data])] == ["Image 1", "Image 2"]
    assert chat.looked(dialogue) == []
    list(chat.answer(dialogue, "Which digit is at the top right?", data))
    shown = chat.looked(dialogue)
    shares = [int(text.partition(": ")[2].partition("%")[0]) for _, text in shown]
    assert 99 <= sum(shares) <= 101
    assert all(max(image.size) == tasks.SIDE or image.size == (448, 448) for image, _ in shown)
    alone = chat.begin()
    list(chat.answer(alone, "Where is the purple cross?", [files["handwriting"]]))
    assert [text for _, text in chat.looked(alone)] == ["all words", "bottom", "right"]


def test_maps_of_a_dialogue_are_those_of_a_question_where_there_is_one(root, files):
    model, processor = AutoModel.from_pretrained(root, dtype="float32").eval(), AutoProcessor.from_pretrained(root)
    image, question = read_upload(files["wide_small_text"]), "Where is the brown triangle?"
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    (expected,) = dialogue_maps(model, processor, [message], "left", max_num=2)
    (found,) = answer_maps(model, processor, image, question, "left", max_num=2)
    torch.testing.assert_close(found.values, expected[0].values)
    turns = [message, {"role": "assistant", "content": "left"}, copy.deepcopy(message)]
    turns[2]["content"][0]["image"] = read_upload(files["handwriting"])
    assert [image.size for image in images_in(turns)] == [image.size, (448, 448)]
    first, second = dialogue_maps(model, processor, turns, "bottom right")
    assert [[found.text for found in maps] for maps in (first, second)] == [["bottom", "right"]] * 2
    assert first[0].values.shape != second[0].values.shape


# ------------------------------------------------------------------------------------ classification, captions, search
@pytest.mark.parametrize(
    ("classes", "best"),
    [
        ("circle, star, square", "star"),
        ("圆形、星形，正方形", "星形"),  # noqa: RUF001
        ("دائرة، نجمة، مربع", "نجمة"),
        ("un cerchio\nuna stella\nun quadrato\nuna stella", "una stella"),
    ],
)
def test_typed_classes_are_compared(contrastive, files, classes, best):
    for mode in contrastive.modes:
        found = contrastive.classify(read_upload(files["star"]), classes, "{c}", mode)
        assert max(found, key=found.get) == best
        assert len(found) == 3
        assert sum(found.values()) == pytest.approx(1)


def test_probabilities_are_those_of_the_models_logits(contrastive, files):
    texts, image = ["a circle", "a star"], read_upload(files["star"])
    inputs = contrastive.processor(images=image, text=texts, padding=True, max_num=1, return_tensors="pt")
    with torch.no_grad():
        logits = contrastive.model(**inputs, mode="InternVL-G").logits_per_image[0]
    found = contrastive.classify(image, "circle, star", "a {c}", "InternVL-G")
    assert list(found.values()) == pytest.approx(logits.softmax(dim=0).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("star", "{c}", "InternVL-C"), "from 2 to 100"),
        ((", ".join(map(str, range(101))), "{c}", "InternVL-C"), "here are 101"),
        (("a" * 101 + ", b", "{c}", "InternVL-C"), "101 characters"),
        (("", "{c}", "InternVL-C"), "missing"),
        ((["a", "b"], "{c}", "InternVL-C"), "missing"),
        (("a, b", "a photo", "InternVL-C"), "hold"),
        (("a, b", {"c": 1}, "InternVL-C"), "missing"),
        (("a, b", "{c}", "InternVL-X"), "mode must be"),
        (("a, b", "{c}", ["InternVL-C"]), "mode must be"),
    ],
)
def test_what_cannot_be_compared_is_refused(contrastive, files, given, message):
    with pytest.raises(ValueError, match=message):
        contrastive.classify(read_upload(files["star"]), *given)
    assert split_classes("b, a; b") == ["b", "a"]


def test_captions_come_with_maps_of_their_words(contrastive, files):
    text, shown = contrastive.caption(read_upload(files["star"]), "en")
    assert "red star" in text
    assert [word for _, word in shown] == ["all words", *text.split()]
    with pytest.raises(ValueError, match="language must be"):
        contrastive.caption(read_upload(files["star"]), "xx")


def test_a_folder_is_searched_by_texts_and_images(contrastive, root, files, tmp_path):
    pytest.importorskip("faiss")
    for name in ("star", "handwriting", "words"):
        (tmp_path / "images" / "of" / name).mkdir(parents=True)
        (tmp_path / "images" / "of" / name / "it.png").write_bytes(files[name])
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    search = FolderSearch(contrastive, tmp_path / "images", tmp_path / "index")
    assert search.size == 3
    assert search.by_text("a red star")[0][1].endswith(" of/star/it.png")  # no path of the machine
    score, name = search.by_image(read_upload(files["words"]))[0][1].split()
    assert (float(score), name) == (pytest.approx(1, abs=0.01), "of/words/it.png")
    (tmp_path / "images" / "of" / "star" / "it.png").unlink()
    assert len(search.by_text("a red star")) == 2
    with pytest.raises(ValueError, match="missing"):
        search.by_text(7)
    with pytest.raises(ValueError, match="no folder"):
        FolderSearch(contrastive, tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------- uploads, the models
def test_only_bytes_of_images_are_read(files, tmp_path, monkeypatch):
    assert read_upload(files["star"]).mode == "RGB"
    (tmp_path / "own.png").write_bytes(files["star"])
    for text in (str(tmp_path / "own.png"), (tmp_path / "own.png").as_uri(), "http://127.0.0.1/a.png"):
        with pytest.raises(ValueError, match=r"cannot be read|no image|is text"):
            read_upload(text.encode())
    monkeypatch.setattr(tasks, "MOST_FILE_BYTES", 10)
    with pytest.raises(ValueError, match="more than the 10"):
        read_upload(files["star"])
    monkeypatch.setattr(tasks, "MOST_FILE_BYTES", 2**20)
    monkeypatch.setattr(tasks, "MOST_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="pixels"):
        read_upload(files["star"])


def test_models_of_a_page_are_one_of_each_kind(root, tmp_path):
    for models, images, message in [
        ([root, root], None, "models of one kind"),
        ([root / "internvit"], None, "the page needs"),
        ([root], tmp_path, "needs an InternVL-C"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_tasks(models, images)
    found = load_tasks([root / "internvl_g"])
    assert found.names == ("internvl_g",)
    assert found.chat is None
    assert found.search is None
    assert found.captions is found.contrastive


def test_the_command_says_what_it_lacks(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["page"]) == 2
    assert "make app" in capsys.readouterr().err


def test_shown_images_are_small():
    assert tasks.shown_small(Image.new("RGB", (2000, 100))).size == (512, 26)
