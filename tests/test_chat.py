"""`python -m internvl.chat`: conversations that keep their ids, and a command line that says at once what is wrong."""

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from PIL import Image

from internvl import chat, demo
from internvl.chat import Conversation


@pytest.fixture(scope="module")
def bundled(root) -> Conversation:
    return Conversation(root, max_new_tokens=16)


@pytest.fixture
def conversation(bundled, monkeypatch) -> Conversation:
    bundled.restart()
    monkeypatch.setattr(bundled, "max_new_tokens", 16)
    return bundled


def spy(conversation: Conversation, monkeypatch, last_id: int | None = None) -> list[dict]:
    """Records the inputs of each turn. `last_id` replaces the last id of an answer, which no cache holds yet."""
    calls: list[dict] = []
    generate = conversation.model.generate

    def generate_and_record(**inputs):
        calls.append(inputs)
        output = generate(**inputs)
        if last_id is not None:
            output[0, -1] = last_id
        return output

    monkeypatch.setattr(conversation.model, "generate", generate_and_record)
    return calls


TURNS = [
    ("Hi there.", []),
    ("Which digit is at the top right?", ["handwriting.png"]),
    ("And at the top left?", []),
    ("What colour are the stars?", ["star.png", "star.png"]),
]


def test_every_turn_answers_as_the_whole_dialogue_asked_afresh(conversation, root):
    answers = [conversation.ask(text, [str(root / "examples" / file) for file in files]) for text, files in TURNS]
    assert answers[1] == "4"
    ids, messages = conversation.ids, conversation.messages
    for turn, answer in enumerate(answers):
        conversation.restart()
        conversation.messages = messages[: 2 * turn]
        text, files = TURNS[turn]
        assert conversation.ask(text, [str(root / "examples" / file) for file in files]) == answer
    assert torch.equal(conversation.ids, ids)


def test_images_are_given_to_the_model_in_their_own_turn_alone(conversation, root, monkeypatch):
    calls = spy(conversation, monkeypatch)
    for text, files in TURNS:
        conversation.ask(text, [str(root / "examples" / file) for file in files])
    assert ["pixel_values" in call for call in calls] == [False, True, False, True]
    for before, after in pairwise(calls):
        length = before["input_ids"].shape[1]
        assert torch.equal(after["input_ids"][:, :length], before["input_ids"])


def test_a_character_that_was_cut_keeps_its_ids(conversation, monkeypatch):
    """Its bytes make no text: tokenizing the answer anew would give other ids than those in the cache."""
    tokenizer = conversation.processor.tokenizer
    first_byte = tokenizer("\u66f8", add_special_tokens=False)["input_ids"][0]
    assert tokenizer.decode([first_byte]) == "\ufffd"
    assert tokenizer("\ufffd", add_special_tokens=False)["input_ids"] != [first_byte]
    conversation.max_new_tokens = 1
    calls = spy(conversation, monkeypatch, first_byte)
    assert conversation.ask("Write.") == "\ufffd"
    conversation.ask("Go on.")
    tail = "<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    expected = [*calls[0]["input_ids"][0].tolist(), first_byte, *tokenizer(tail)["input_ids"]]
    assert calls[1]["input_ids"][0].tolist() == expected


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_the_end_of_an_answer_is_there_once_whichever_it_was(conversation, monkeypatch, end):
    calls = spy(conversation, monkeypatch, conversation.processor.tokenizer.convert_tokens_to_ids(end))
    conversation.max_new_tokens = 1
    conversation.ask("Hi.")
    conversation.ask("Hi.")
    text = conversation.processor.decode(calls[1]["input_ids"][0])
    turn = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    assert text == turn + "<|im_end|>\n" + turn


def test_an_interrupted_answer_leaves_a_conversation_that_goes_on(conversation):
    conversation.ask("Hi.")
    before = list(conversation.messages)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = conversation.model.language_model.register_forward_hook(interrupt)  # when the cache is filled
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("What?")
    hook.remove()
    assert conversation.messages == before
    answer = conversation.ask("What?")
    conversation.restart()
    conversation.messages = before
    assert conversation.ask("What?") == answer


# -------------------------------------------------------------------------------------------------- the command line
def test_a_conversation_needs_no_image(bundled, monkeypatch, capsys):
    bundled.restart()
    monkeypatch.setattr(chat, "Conversation", lambda *_: bundled)
    lines = iter(["Hi.", "And now?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert chat.main([]) == 0
    assert len(bundled.messages) == 4
    bundled.restart()
    assert chat.main(["--ask", "Hi."]) == 0
    assert capsys.readouterr().out.strip()


def model_folder(folder, model_type: str | None):
    folder.mkdir()
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("internvl_14b", "InternVL-C or InternVL-G"),
        ("intern_vit_6b", "vision tower"),
        ("qllama", "QLLaMA"),
        ("internvl_chat", "python -m internvl.conversion"),
        (None, "holds no model"),
    ],
)
def test_a_folder_that_cannot_chat_is_named_in_one_line(tmp_path, monkeypatch, capsys, model_type, named):
    monkeypatch.setattr(chat, "talk", None)  # not reached
    folder = model_folder(tmp_path / "model", model_type)
    assert chat.main(["--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert str(folder) in error
    assert named in error
    assert error.count("\n") == 1


def test_the_sub_folders_of_the_bundled_checkpoint_are_named(root, capsys):
    for name, named in (("internvl_g", "InternVL-C|InternVL-G"), ("internvit", "vision tower")):
        assert chat.main(["--model", str(root / name)]) == 2
        assert re.search(named, capsys.readouterr().err)
        with pytest.raises(ValueError, match=named):
            Conversation(root / name)


@pytest.mark.parametrize("name", ["missing.png", "missing/missing.png"])
def test_paths_that_lead_nowhere_are_named(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(chat, "talk", None)
    monkeypatch.chdir(tmp_path)
    for arguments in ([name], ["--model", f"./{name}"], ["--model", str(tmp_path / name)]):
        assert chat.main(arguments) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["missing.png"], ["--model", "./missing"], ["--model", "internvit"]], ids=" ".join
)
def test_what_is_seen_without_a_model_does_not_wait_for_torch(root, arguments):
    command = [sys.executable, "-X", "importtime", "-m", "internvl.chat", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.endswith((" torch", " transformers"))]


# ------------------------------------------------------------------------------------------------- the demonstration
def test_the_demonstration_answers_and_draws_the_tiles(bundled, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "Conversation", lambda *_, **settings: bundled)
    questions = json.loads((root / "examples" / "questions.json").read_text(encoding="utf-8"))[:2]
    (tmp_path / "questions.json").write_text(json.dumps([questions[0], {**questions[1], "answer": "no such answer"}]))
    for row in questions:
        shutil.copy(root / "examples" / row["file"], tmp_path)
    with pytest.warns(FutureWarning, match="`--pictures` is now called `--images`"):
        demo.main(["--pictures", str(tmp_path), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert f"{questions[0]['question']}\n    {questions[0]['answer']}\n" in printed
    assert "(correct: no such answer)" in printed
    assert "1 of 2 answers correct." in printed
    assert Image.open(tmp_path / "out" / "tiles.png").height > demo.PANEL


def test_a_folder_without_questions_ends_the_demonstration_with_its_name(bundled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "Conversation", lambda *_, **settings: bundled)
    assert demo.main(["--images", str(tmp_path)]) == 2
    assert "questions.json" in capsys.readouterr().err
