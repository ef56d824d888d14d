"""What the embeddings API takes, and the form of its answer."""

import base64
from dataclasses import replace

import numpy as np
import pytest

from internvl import InternVLConfig
from internvl.serving.embedding_requests import (
    EmbeddingInput,
    EmbeddingLimits,
    EmbeddingsRequest,
    RequestReader,
    UnknownModelError,
    answer,
)


LIMITS = EmbeddingLimits(
    max_inputs=3, max_characters=12, max_image_urls=1, max_image_bytes=0, max_image_pixels=0, download_seconds=0
)
READER = RequestReader("ours", InternVLConfig(clip_embed_dim=8), LIMITS)
DATA = "data:image/png;base64," + "A" * 40


def test_texts_images_and_addresses_are_told_apart():
    asked = READER.read({"input": ["https://a", DATA], "image_urls": ["HTTPS://b"], "model": "ours", "user": "me"})
    assert [(one.kind, one.value) for one in asked.inputs] == [
        ("text", "https://a"),
        ("data", DATA),
        ("url", "HTTPS://b"),
    ]
    assert asked.inputs[2].name == "`image_urls[0]`"
    assert (asked.model, asked.dimensions, asked.encoding_format, asked.normalize) == ("ours", None, "float", True)


def test_schemes_and_types_are_read_in_any_case():
    assert [one.kind for one in READER.read({"input": [DATA.replace("data:image", "DATA:Image")]}).inputs] == ["data"]


@pytest.mark.parametrize("text", ["/etc/passwd", "file:///x", " data:im", "~/.ssh"])
def test_what_looks_like_a_file_is_a_text(text):
    assert READER.read({"input": text}).inputs == (EmbeddingInput("text", text, "`input[0]`"),)


def test_addresses_alone_are_a_request():
    """OpenAI's client sends an empty list beside them."""
    for body in ({"image_urls": ["http://b"]}, {"input": [], "image_urls": ["http://b"]}):
        assert [one.kind for one in READER.read(body).inputs] == ["url"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, "got null"),
        ([{"input": "a"}], "got a list"),
        ({}, "must be a string or a list"),
        ({"input": {"url": "http://a"}}, "must be a string or a list"),
        ({"input": []}, "1 to 3 texts and images, this one 0"),
        ({"input": ["a"] * 4}, "1 to 3 texts and images, this one 4"),
        ({"input": ["a"] * 3, "image_urls": ["http://b"]}, "this one 4"),
        ({"input": "a", "image_urls": ["http://b"] * 2}, "may hold 1 addresses, got 2"),
        ({"input": "a", "image_urls": "http://b"}, "a list of addresses"),
        ({"input": [7, 8]}, r"`input\[0\]` holds token ids"),
        ({"input": [[7, 8]]}, "holds token ids"),
        ({"input": [True]}, "got a boolean"),
        ({"input": [{"path": "/etc/passwd"}]}, "got an object"),
        ({"input": ["a", None]}, r"`input\[1\]` must be a string, got null"),
        ({"input": ""}, "an empty text"),
        ({"input": "a" * 13}, "has 13 characters, more than 12"),
        ({"input": "\ud800"}, "no Unicode"),
        ({"image_urls": ["file:///etc/passwd"]}, "begins with http"),
        ({"image_urls": ["/etc/passwd"]}, "begins with http"),
        ({"image_urls": [DATA]}, "begins with http"),
        ({"image_urls": ["ftp://a"]}, "begins with http"),
        ({"image_urls": [{"path": "/etc/passwd"}]}, "begins with http"),
        ({"image_urls": ["http://" + "a" * 9000]}, "too long"),
        ({"image_urls": ["http://\udc00"]}, "no Unicode"),
        ({"input": "a", "model": 7}, "`model` must be a string, got a number"),
        ({"input": "a", "dimensions": 0}, "from 1 to 8, got 0"),
        ({"input": "a", "dimensions": 9}, "from 1 to 8, got 9"),
        ({"input": "a", "dimensions": 10**400}, "got a number"),
        ({"input": "a", "dimensions": True}, "got a boolean"),
        ({"input": "a", "dimensions": 4}, "`dimensions` 4: this checkpoint was not trained"),
        ({"input": "a", "encoding_format": "hex"}, "'float' or 'base64'"),
        ({"input": "a", "encoding_format": ["float"]}, "'float' or 'base64'"),
        ({"input": "a", "normalize": "no"}, "true or false, got a string"),
        ({"input": "a", "images": []}, "`images` is no field"),
    ],
)
def test_other_bodies_are_refused_in_one_line(body, said):
    with pytest.raises(ValueError, match=said) as refusal:
        READER.read(body)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_another_model_is_an_error_of_its_kind():
    with pytest.raises(UnknownModelError, match="no model 'theirs' here; there is 'ours'"):
        READER.read({"input": "a", "model": "theirs"})


def test_vectors_are_cut_where_the_model_was_trained_for_it():
    reader = replace(READER, config=InternVLConfig(clip_embed_dim=8, matryoshka_dims=[4]))
    assert reader.read({"input": "a", "dimensions": 4}).dimensions == 4
    with pytest.raises(ValueError, match="`dimensions` must be one of 4"):
        reader.read({"input": "a", "dimensions": 3})


def test_answers_have_the_form_of_openai():
    features = np.array([[3, 4, 12], [0, 0, 0]], dtype=np.float32)
    request = EmbeddingsRequest((), "ours", normalize=False)
    found = answer(request, features, 5)
    assert found["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert [(one["index"], one["object"], one["embedding"]) for one in found["data"]] == [
        (0, "embedding", [3, 4, 12]),
        (1, "embedding", [0, 0, 0]),
    ]
    unit = answer(replace(request, normalize=True, dimensions=2), features, 0)
    np.testing.assert_allclose([one["embedding"] for one in unit["data"]], [[0.6, 0.8], [0, 0]], rtol=1e-6)
    packed = answer(replace(request, encoding_format="base64"), features, 0)["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == [3, 4, 12]
