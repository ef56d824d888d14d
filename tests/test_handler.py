"""handler.py as Inference Endpoints load and call it: every task, forms of inputs, limits, hostile requests."""

import base64
import json
import shutil
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from internvl import image_loading_internvl
from internvl.synthetic.captions import CAPTION_PROMPTS

from .conftest import ROOT
from .fixtures_endpoint import load_handler
from .fixtures_images import data_address, encoded
from .fixtures_processes import run_elsewhere


STAR, WORDS = ROOT / "examples" / "star.png", ROOT / "examples" / "words.png"
QUESTION = "What colour is the star?"
LABELS = ["a green circle", "a red star", "the digit seven"]
# As the toolkit of Inference Endpoints does: the file alone, under this name, with the folder on the path.
REPLAY = """
import base64, importlib.util, json, os, sys

folder = sys.argv[1]

def load(subfolder=""):
    os.environ["INTERNVL_SUBFOLDER"] = subfolder
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder + "/handler.py")
    sys.path.insert(0, folder)
    handler = importlib.util.module_from_spec(spec)
    sys.modules["handler.EndpointHandler"] = handler
    spec.loader.exec_module(handler)
    return handler.EndpointHandler(folder)

bodies = json.load(open(sys.argv[2]))
for subfolder, requests in bodies.items():
    handler = load(subfolder)
    for body in requests:
        print("answer", json.dumps(handler(body), allow_nan=False))
assert "internvl" not in sys.modules
"""


@pytest.fixture(scope="module")
def chat():
    return load_handler(ROOT)


@pytest.fixture(scope="module")
def contrastive():
    return load_handler(ROOT, "internvl_g")


@pytest.fixture
def noted(chat, contrastive, monkeypatch):
    """What `generate` of both models was given, and whether another request had to wait."""
    seen = []

    def note(handler):
        generate = handler.model.generate

        def noting(**arguments):
            seen.append({**arguments, "is_locked": handler._lock.locked()})
            return generate(**arguments)

        monkeypatch.setattr(handler.model, "generate", noting)

    note(chat)
    note(contrastive)
    return seen


def generated(handler, messages, **settings):
    inputs = handler.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = handler.model.generate(**inputs, **{"max_new_tokens": 256, "do_sample": False, **settings})
    return handler.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# ----------------------------------------------------------------------------------------------------------- as loaded
def test_it_is_replayed_as_inference_endpoints_load_it(tmp_path):
    """From a folder as the Hub has it, without this package, by remote code."""
    folder = tmp_path / "repository"
    ignored = shutil.ignore_patterns(".*", "tests", "reproduction", "benchmarks", "docs", "build", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (tmp_path / "replay.py").write_text(REPLAY)
    image = data_address(STAR)
    bodies = {
        "": [{"inputs": {"images": [image], "text": QUESTION}, "parameters": {"max_new_tokens": 16}}],
        "internvl_g": [
            {"inputs": image, "parameters": {"candidate_labels": ", ".join(LABELS)}},
            {"inputs": ["a red star", image]},
        ],
    }
    (tmp_path / "bodies.json").write_text(json.dumps(bodies))
    lines = run_elsewhere(tmp_path / "there", tmp_path / "replay.py", folder, tmp_path / "bodies.json").splitlines()
    answer, ranked, embedded = (
        json.loads(line.removeprefix("answer ")) for line in lines if line.startswith("answer")
    )
    assert answer == [{"generated_text": "red", "finish_reason": "stop"}]
    assert ranked[0]["label"] == "a red star"
    assert [len(row) for row in embedded["embeddings"]] == [192, 192]


def test_its_requirements_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("]")[0]
    wanted = {line.strip().strip('",') for line in project.splitlines() if line.strip()}
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert {line for line in lines if line} == wanted | {"torchvision>=0.25"}


def test_a_vision_tower_is_left_to_the_pipeline():
    with pytest.raises(ValueError, match="For a vision tower delete handler"):
        load_handler(ROOT, "internvit")


# ---------------------------------------------------------------------------------------------------------------- chat
@pytest.mark.parametrize(
    "body",
    [
        {"inputs": {"image": data_address(STAR), "text": QUESTION}},
        {"inputs": {"images": [STAR.read_bytes()], "text": QUESTION}},
        {"inputs": {"images": [base64.b64encode(STAR.read_bytes()).decode()], "text": QUESTION}},
        {"inputs": Image.open(STAR), "parameters": {"text": QUESTION, "max_new_tokens": "64"}},  # an image and a query
        {"inputs": STAR.read_bytes(), "parameters": {"text": QUESTION, "task": "chat"}},
        {"inputs": {"images": [Image.open(STAR)], "text": QUESTION}},  # decoded by newer releases of the toolkit
        {
            "inputs": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": Image.open(STAR)}},
                        {"type": "text", "text": QUESTION},
                    ],
                }
            ]
        },
        {
            "inputs": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": data_address(STAR), "detail": "auto"}},
                        {"type": "text", "text": QUESTION},
                    ],
                }
            ]
        },
        {
            "inputs": {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "base64": base64.b64encode(STAR.read_bytes()).decode()},
                            {"type": "text", "text": QUESTION},
                        ],
                    }
                ]
            }
        },
    ],
    ids=["image", "bytes", "base64", "query", "raw", "decoded", "decoded part", "openai", "messages"],
)
def test_a_question_in_every_form_is_answered_as_generate_does(body, chat):
    assert chat(body) == [{"generated_text": "red", "finish_reason": "stop"}]


def test_several_images_and_turns_are_read_in_their_order(chat, monkeypatch):
    def messages(first, second):
        return [
            {"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": "red"},
            {
                "role": "user",
                "content": [{"type": "image", "image": second}, {"type": "text", "text": "What is written?"}],
            },
        ]

    answers = []
    for pair in ((STAR, WORDS), (WORDS, STAR)):
        (answer,) = chat({"inputs": messages(*map(data_address, pair))})
        expected = [*messages(*map(str, pair))]
        expected[1] = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
        with monkeypatch.context() as patched:
            patched.setattr(chat.processor.image_processor, "allow_local_files", True)
            assert answer["generated_text"] == generated(chat, expected)
        answers.append(answer["generated_text"])
    assert answers[0] != answers[1]


def test_settings_of_generation_take_effect(chat, noted):
    def ask(**parameters):
        inputs = {"image": data_address(WORDS), "text": "What is written?"}
        (answer,) = chat({"inputs": inputs, "parameters": parameters})
        return answer

    assert ask(max_new_tokens=1)["finish_reason"] == "length"
    assert noted[-1]["do_sample"] is False
    assert len({ask(temperature=50.0, max_new_tokens=8)["generated_text"] for _ in range(4)}) > 1
    given = {"top_p": 0.9, "top_k": 3, "num_beams": 2, "min_new_tokens": 2, "no_repeat_ngram_size": 3}
    given |= {"temperature": 0.5, "repetition_penalty": 1.5, "length_penalty": 0.5}
    ask(**given, max_new_tokens=4)
    assert {name: noted[-1].get(name) for name in given} == given
    assert noted[-1]["do_sample"] is True


def test_tiles_of_an_image_are_as_many_as_asked_for(chat, noted, monkeypatch):
    for max_num, tiles in ((1, 2), (4, 10)):
        monkeypatch.setattr(chat, "limits", replace(chat.limits, tiles=tiles))
        inputs = {"images": [square(900)] * 2, "text": "?"}
        chat({"inputs": inputs, "parameters": {"max_num": max_num, "max_new_tokens": 1}})
        assert len(noted.pop()["pixel_values"]) == tiles


def test_an_answer_ends_when_its_time_is_over(chat, monkeypatch):
    monkeypatch.setattr(chat, "limits", replace(chat.limits, seconds=0.2))
    body = {
        "inputs": {"image": data_address(STAR), "text": QUESTION},
        "parameters": {"max_new_tokens": 512, "min_new_tokens": 500},
    }
    (answer,) = chat(body)
    assert answer["finish_reason"] == "time"


# --------------------------------------------------------------------------------------------------- InternVL-C and -G
@pytest.mark.parametrize("mode", [None, "InternVL-C", "InternVL-G"])
@torch.inference_mode()
def test_embeddings_are_the_features_of_the_model(mode, contrastive):
    processor, model = contrastive.processor, contrastive.model
    settings = {"mode": mode} if mode else {}
    images = processor(images=[Image.open(STAR), Image.open(WORDS)], mode="contrastive", return_tensors="pt")
    texts = processor(text=LABELS, mode="contrastive", return_tensors="pt")
    body = {"inputs": {"images": [data_address(STAR), data_address(WORDS)], "texts": LABELS}, "parameters": settings}
    answer = contrastive(body)
    assert answer["image_embeddings"] == model.get_image_features(images["pixel_values"], **settings).tolist()
    assert answer["text_embeddings"] == model.get_text_features(**texts).tolist()
    normalized = contrastive({"inputs": LABELS[:1], "parameters": {"normalize": True}})["embeddings"][0]
    assert sum(value**2 for value in normalized) == pytest.approx(1, abs=1e-5)


def test_a_list_keeps_its_order_and_a_text_that_is_an_address_stays_a_text(contrastive, monkeypatch):
    monkeypatch.setattr(contrastive, "limits", replace(contrastive.limits, batch=2))  # fewer than the texts
    monkeypatch.setattr(image_loading_internvl, "download", pytest.fail)
    texts = ["https://example.org/star.png", "a red star", str(STAR)]
    mixed = contrastive({"inputs": [texts[0], data_address(STAR), *texts[1:]]})["embeddings"]
    assert [mixed[0], *mixed[2:]] == contrastive({"inputs": {"texts": texts}})["text_embeddings"]
    assert [mixed[1]] == contrastive({"inputs": {"images": [data_address(STAR)]}})["image_embeddings"]


@torch.inference_mode()
def test_classification_gives_the_scores_of_the_model(contrastive):
    processor = contrastive.processor
    inputs = processor(
        images=[Image.open(STAR), Image.open(WORDS)],
        text=[f"{label} on white" for label in LABELS],
        mode="contrastive",
        return_tensors="pt",
    )
    wanted = contrastive.model(**inputs, mode="InternVL-G").logits_per_image.softmax(-1).tolist()
    parameters = {"candidate_labels": LABELS, "hypothesis_template": "{} on white", "mode": "InternVL-G"}
    found = contrastive({"inputs": [data_address(STAR), data_address(WORDS)], "parameters": parameters})
    for ranked, scores in zip(found, wanted, strict=True):
        assert [row["score"] for row in ranked] == sorted((row["score"] for row in ranked), reverse=True)
        assert {row["label"]: row["score"] for row in ranked} == pytest.approx(
            dict(zip(LABELS, scores, strict=True)), abs=1e-5
        )


def test_captions_are_those_of_the_model(contrastive, noted):
    found = contrastive({"inputs": [data_address(STAR), WORDS.read_bytes()], "parameters": {"task": "caption"}})
    assert found[0] == {"generated_text": "a red star at the left", "finish_reason": "stop"}
    inputs = contrastive.processor(images=[Image.open(WORDS)], mode="caption", return_tensors="pt")
    tokens = contrastive.model.generate(**inputs, max_new_tokens=256)
    assert found[1]["generated_text"] == contrastive.processor.decode(tokens[0], skip_special_tokens=True).strip()
    parameters = {"task": "caption", "prompt": CAPTION_PROMPTS["zh"]}
    (chinese,) = contrastive({"inputs": data_address(STAR), "parameters": parameters})
    assert 0 < noted[-1]["max_time"] < contrastive.limits.seconds
    assert "星" in chinese["generated_text"]


# ------------------------------------------------------------------------------------------------------------- hostile
def test_what_a_request_cannot_hold_is_answered_with_what_it_can(chat, contrastive):
    with pytest.raises(ValueError, match=r"cannot hold 'max_tokens'; it can hold .*max_new_tokens.*temperature"):
        chat({"inputs": QUESTION, "parameters": {"max_tokens": 5}})
    with pytest.raises(ValueError, match="cannot hold 'image', 'text'; it can hold images, texts"):
        contrastive({"inputs": {"image": data_address(STAR), "text": "a red star"}})


def file_names() -> list:
    star = str(STAR)
    parts = [{"type": "image", key: star} for key in ("image", "url", "base64", "path", "image_url")]
    parts += [
        {"type": "image_url", "image_url": {"url": f"file://{star}"}},
        {"type": "image", "image": {"path": star}},
    ]
    parts += [{"type": "video", "path": star}, {"type": "video", "video": [star]}, {"type": "file", "file": star}]
    messages = [{"inputs": [{"role": "user", "content": [part]}]} for part in parts]
    images = [star, STAR, f"file://{star}", f"FILE:{star}", {"path": star}, {"url": star}, [star], "examples/star.png"]
    return messages + [{"inputs": {"images": [image], "text": QUESTION}} for image in images]


@pytest.mark.parametrize("body", file_names(), ids=range(len(file_names())))
def test_a_request_cannot_name_a_file(body, chat, monkeypatch):
    monkeypatch.setattr(image_loading_internvl, "_open_file", pytest.fail)
    with pytest.raises(ValueError, match=r"local files are not read|must|cannot hold"):
        chat(body)


@pytest.mark.parametrize("task", ["embeddings", "zero-shot", "caption"])
@pytest.mark.parametrize("image", [str(STAR), STAR, f"file://{STAR}", {"path": str(STAR)}, [[str(STAR)]], 5, None])
def test_no_task_reads_a_file(image, task, contrastive, monkeypatch):
    monkeypatch.setattr(image_loading_internvl, "_open_file", pytest.fail)
    labels = {"candidate_labels": LABELS} if task == "zero-shot" else {}
    with pytest.raises(ValueError, match=r"local files are not read|must|neither"):
        contrastive(
            {
                "inputs": {"images": [image]} if task == "embeddings" else image,
                "parameters": {"task": task, **labels},
            }
        )


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1/star.png", "http://169.254.169.254/latest", "ftp://a.org/b.png"]
)
def test_addresses_inside_the_network_are_not_fetched(address, chat):
    with pytest.raises(ValueError, match=r"Image 2 of 2 .*(not public|is a `ftp` address)"):
        chat({"inputs": {"images": [data_address(STAR), address], "text": QUESTION}})


def test_a_download_has_the_time_that_is_left_and_the_bytes_of_an_image(contrastive, monkeypatch):
    seen = []

    def download(url, name, max_seconds, max_bytes):
        seen.append((max_seconds, max_bytes))
        time.sleep(0.05)
        return STAR.read_bytes()

    monkeypatch.setattr(sys.modules[type(contrastive.processor.image_processor).__module__], "download", download)
    monkeypatch.setattr(contrastive, "limits", replace(contrastive.limits, image_bytes=12_345, seconds=50))
    found = contrastive({"inputs": {"images": ["https://example.org/a.png", "https://example.org/b.png"]}})
    assert found == contrastive({"inputs": {"images": [data_address(STAR)] * 2}})
    (first, most), (second, also) = seen
    assert 40 < second < first - 0.05 < first < 50
    assert most == also == 12_345


def square(side: int) -> str:
    return data_address(encoded(Image.new("RGB", (side, side))))


@pytest.mark.parametrize(
    ("limits", "inputs", "parameters", "message"),
    [
        ({"images": 1}, {"images": [square(8)] * 2, "text": "?"}, {}, "2 images, more than 1"),
        ({"image_bytes": 50}, {"images": [square(8)], "text": "?"}, {}, "bytes, more than 50"),
        ({"pixels": 100}, {"images": [square(8)] * 2, "text": "?"}, {}, "128 pixels, more than 100"),
        ({"tiles": 6}, {"images": [square(900)] * 2, "text": "?"}, {}, "10 tiles, more than 6"),
        ({"texts": 1}, {"images": [square(8)], "text": "?"}, {}, "2 texts, more than 1"),
        ({"characters": 9}, "0123456789", {}, "10 characters, more than 9"),
        ({"new_tokens": 7}, "?", {"max_new_tokens": 8}, "from 1 to 7"),
        ({}, "?", {"temperature": float("nan")}, "`temperature` must be a number from"),
        ({"new_tokens": 9000}, "?", {"max_new_tokens": 5000}, "more than the 4096 of this model"),
    ],
)
def test_limits_hold(limits, inputs, parameters, message, chat, monkeypatch):
    monkeypatch.setattr(chat, "limits", replace(chat.limits, **limits))
    with pytest.raises(ValueError, match=message):
        chat({"inputs": inputs, "parameters": parameters})


def test_what_is_just_within_the_limits_is_answered(chat, noted, monkeypatch):
    limits = {"images": 2, "image_bytes": len(square(8)), "pixels": 128, "tiles": 2, "texts": 3, "characters": 1}
    monkeypatch.setattr(chat, "limits", replace(chat.limits, **limits, new_tokens=2))
    chat({"inputs": {"images": [square(8)] * 2, "text": "?"}})
    assert noted[-1]["max_new_tokens"] == 2
    assert noted[-1]["is_locked"]


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ("0123456789", {}, "10 characters, more than 9"),
        (square(8), {"candidate_labels": ["01234", "56789"]}, "10 characters, more than 9"),
        (square(8), {"task": "caption", "prompt": "0123456789"}, "10 characters, more than 9"),
        ([], {"candidate_labels": ["a"]}, "no image"),
        ([], {"task": "caption"}, "no image"),
    ],
)
def test_limits_hold_in_every_task(inputs, parameters, message, contrastive, monkeypatch):
    monkeypatch.setattr(contrastive, "limits", replace(contrastive.limits, characters=9))
    with pytest.raises(ValueError, match=message):
        contrastive({"inputs": inputs, "parameters": parameters})


def test_an_image_of_too_many_pixels_is_not_decoded(contrastive, monkeypatch):
    monkeypatch.setattr(type(contrastive), "limits", replace(contrastive.limits, pixels=100))
    monkeypatch.setenv("INTERNVL_SUBFOLDER", "internvl_g")
    handler = type(contrastive)(ROOT)
    monkeypatch.setattr(Image.Image, "convert", pytest.fail)
    with pytest.raises(ValueError, match="Image 1 of 1"):
        handler({"inputs": square(11)})


@pytest.mark.parametrize("inputs", ["a red star", square(8)])
def test_what_exceeds_its_time_is_refused(inputs, contrastive, monkeypatch):
    monkeypatch.setattr(contrastive, "limits", replace(contrastive.limits, seconds=0.0))
    monkeypatch.setattr(contrastive.processor.image_processor, "fetch_images", pytest.fail)
    with pytest.raises(ValueError, match="took longer than it may"):
        contrastive({"inputs": inputs})


def hostile_to_chat() -> list:
    user = {"role": "user", "content": "?"}
    inputs = [None, 5, [], {}, [[]], [5], [{}], [{"role": "tool", "content": "?"}], [{"role": [], "content": "?"}]]
    inputs += [[{**user, "content": content}] for content in ([], None, 5, [5], ["?"], [{}], [{"type": "text"}])]
    inputs += [[{**user, "tools": []}], [user, {"role": "assistant", "content": "?"}], "\ud800", {"text": 5}]
    inputs += [{"images": 5, "text": "?"}, {"images": [{}], "text": "?"}, {"images": ["data:image/png;base64,AAAA"]}]
    inputs += [{"images": ["data:image/png;base64,iVBORw0KGgo="], "text": "?"}, {"messages": [user], "text": "?"}]
    inputs += [{"images": ["A" * 5000], "text": "?"}, {"images": [""], "text": "?"}, {"images": [b""], "text": "?"}]
    inputs += [[{**user, "content": [{"type": "image"}]}], [{**user, "content": [{"type": "image", "image": []}]}]]
    parameters: list = [5, [], {"task": "embeddings"}, {"task": 5}, {"temperature": 0}, {"temperature": float("nan")}]
    parameters += [{"top_p": 1.5}, {"max_new_tokens": 0}, {"max_new_tokens": 1e400}, {"max_new_tokens": 1.5}]
    parameters += [{"max_new_tokens": True}, {"num_beams": 10**9}, {"do_sample": 1}, {"do_sample": False, "top_k": 5}]
    parameters += [{"streamer": 1}, {"custom_generate": "/tmp"}, {"trust_remote_code": True}, {"max_num": 10**6}]
    parameters += [{"min_new_tokens": 9, "max_new_tokens": 8}, {"chat_template": "{{ 1 }}"}, {"x\ny" * 99: 1}]
    bodies = [{"inputs": given} for given in inputs] + [{"inputs": "?", "parameters": given} for given in parameters]
    return [*bodies, {}, [], None, {"inputs": "?", "images": []}, {"messages": [user]}]


@pytest.mark.parametrize("body", hostile_to_chat(), ids=range(len(hostile_to_chat())))
def test_a_malformed_request_is_refused_in_one_line(body, chat):
    with pytest.raises(ValueError, match=r"\A.{5,2000}\Z"):
        chat(body)
    assert not chat._lock.locked()


def hostile_to_contrastive() -> list:
    inputs = [None, 5, [], {}, [5], [None], {"texts": [5]}, {"texts": {"a": 1}}, {"images": [5]}, {"text": "?"}, [[]]]
    inputs += ["data:image/png;base64,AAAA", "data:image/svg+xml,<svg/>", {"texts": [], "images": []}, "\ud800"]
    image = square(8)
    labels: list = [None, 5, [], [5], "", ",,", [""], {"a": 1}, "\ud800"]
    parameters = [{"task": "zero-shot", "candidate_labels": given} for given in labels]
    parameters += [
        {"candidate_labels": ["a"], "hypothesis_template": "none"},
        {"task": "chat"},
        {"mode": "InternVL-X"},
    ]
    parameters += [{"mode": 5}, {"normalize": "yes"}, {"task": "caption", "num_beams": 0}, {"candidate_label": ["a"]}]
    parameters += [{"task": "caption", "max_new_tokens": 2000}, {"task": "caption", "prompt": "x" * 70_000}]
    bodies = [{"inputs": given} for given in inputs]
    return bodies + [{"inputs": image, "parameters": given} for given in parameters]


@pytest.mark.parametrize("body", hostile_to_contrastive(), ids=range(len(hostile_to_contrastive())))
def test_a_malformed_request_to_a_contrastive_model_is_refused_in_one_line(body, contrastive):
    with pytest.raises(ValueError, match=r"\A.{5,2000}\Z"):
        contrastive(body)
    assert not contrastive._lock.locked()


def test_templates_that_would_outgrow_the_memory_are_refused_before_texts_are_made_of_them(contrastive):
    """Of 2 MB, a request would make texts of 500 GB."""
    parameters = {"candidate_labels": ["x" * 10**6], "hypothesis_template": "{}" * 500_000}
    with pytest.raises(ValueError, match="The texts have 500000000000 characters, more than 65536"):
        contrastive({"inputs": square(8), "parameters": parameters})


def test_a_mode_is_checked_where_only_texts_are_given_too(contrastive):
    with pytest.raises(ValueError, match="`mode` must be one of InternVL-C, C, InternVL-G, G for this model"):
        contrastive({"inputs": "a red star", "parameters": {"mode": "InternVL-X"}})
    assert contrastive({"inputs": "a red star", "parameters": {"mode": "G"}})


def test_an_image_in_a_plain_list_is_known_by_its_address_in_any_case(contrastive):
    image = square(8)
    found = contrastive({"inputs": [image.replace("data:image", "DATA:Image"), image]})["embeddings"]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match=r"Image 1 of 1 .*half of a surrogate pair"):
        contrastive({"inputs": "data:image/png;base64,\ud800"})
