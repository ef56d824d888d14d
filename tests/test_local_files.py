"""The switch that keeps requests from naming local files: whatever is asked for, the file is not even looked at."""

import base64
import io
import json
import os
import pathlib
import sys
from collections import UserDict

import pytest
from transformers import AutoProcessor

from internvl.image_loading_internvl import LOCAL_FILES, read_image, read_image_size, read_nested_images
from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.processing_internvl import InternVLProcessor

from .fixtures_images import TILE, encoded
from .fixtures_processing import make_processor
from .fixtures_text import make_image


REFUSED = r"Image 1 of 1 .*local files are not read here"
LOOKED_AT: list[str] = []  # the paths that were opened or listed, of which one is asked for
FOLDER = "folder_that_no_request_may_see"


def note(event: str, arguments: tuple) -> None:
    if event.startswith(("open", "os.", "glob", "pathlib", "shutil")):
        LOOKED_AT.extend(str(argument) for argument in arguments if FOLDER in str(argument))


sys.addaudithook(note)


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    (tmp_path / FOLDER).mkdir()
    path = tmp_path / FOLDER / "image.png"
    path.write_bytes(encoded(make_image(9, 9)))
    return path


@pytest.fixture
def untouched(path, monkeypatch):
    """Fails if anything opens, lists or asks for the status of the file."""
    stat = os.stat

    def watched(name, *args, **kwargs):
        if not isinstance(name, int):
            note("os.stat", (os.fsdecode(name),))
        return stat(name, *args, **kwargs)

    monkeypatch.setattr(os, "stat", watched)
    LOOKED_AT.clear()
    yield
    assert LOOKED_AT == []


@pytest.fixture(params=["setting", "environment"])
def allow(request, monkeypatch) -> bool:
    """`allow_local_files`, where the switch is set by it or by the environment."""
    if request.param == "environment":
        monkeypatch.setenv(LOCAL_FILES, "0")
    return request.param == "environment"


class Named:
    """A path of its own kind."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def names_of(path: pathlib.Path) -> list:
    """Every way to name a local file."""
    address = path.as_uri()
    return [
        *(path, str(path), Named(path), os.path.relpath(path), f"{path.parent}/../{FOLDER}/{path.name}", f" {path}"),
        *(address, address.upper().replace(str(path).upper(), str(path)), f"file://localhost{path}", f"file:{path}"),
        *(address.replace("image", "%69mage"), f"FiLe://{path}", f"file://127.0.0.1{path}", f"file://evil.test{path}"),
        *({"path": str(path)}, {"path": path}, {"bytes": None, "path": address}, UserDict({"path": str(path)})),
        *(f"~/../{path}", "/dev/zero", "/proc/self/environ", "no/such/file.png", f"{path}\0.png"),
    ]


def test_every_name_is_refused_by_every_function(path, allow, untouched):
    processor = InternVLImageProcessor(size=TILE, allow_local_files=allow)
    readers = [
        processor,
        processor.fetch_images,
        lambda source: read_image(source, "Image 1 of 1 (it)", 10**6, allow),
        lambda source: read_image_size(source, "Image 1 of 1 (it)", 10**6, allow),
        lambda source: read_nested_images([[source]], 10**6, allow),
    ]
    for source in names_of(path):
        for read in readers:
            with pytest.raises(ValueError, match=REFUSED):
                read(source)


def test_other_kinds_of_input_are_still_read(path, allow):
    processor = InternVLImageProcessor(size=TILE, allow_local_files=allow)
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    sources = (data, io.BytesIO(data), text, f"data:image/png;base64,{text}", {"bytes": data, "path": str(path)})
    assert processor(list(sources))["num_patches"] == [1] * len(sources)


def test_a_file_is_read_where_nothing_forbids_it(path, monkeypatch):
    """Otherwise the tests above would pass with a loader that reads nothing."""
    for value in (None, "", "1"):
        monkeypatch.delenv(LOCAL_FILES, raising=False) if value is None else monkeypatch.setenv(LOCAL_FILES, value)
        LOOKED_AT.clear()
        assert InternVLImageProcessor(size=TILE)([path, str(path), path.as_uri()])["num_patches"] == [1, 1, 1]
        assert LOOKED_AT
    for value in ("0", "false", "no", "2"):
        monkeypatch.setenv(LOCAL_FILES, value)
        with pytest.raises(ValueError, match=REFUSED):
            InternVLImageProcessor(size=TILE)(path)


def test_a_call_can_close_the_processor_and_not_open_it(path, untouched):
    closed = InternVLImageProcessor(size=TILE, allow_local_files=False)
    with pytest.raises(ValueError, match=REFUSED):
        closed(path, allow_local_files=True)
    with pytest.raises(ValueError, match=REFUSED):
        InternVLImageProcessor(size=TILE)(path, allow_local_files=False)


def parts_of(path: pathlib.Path) -> list[dict]:
    """Parts of a message that name a local file."""
    name = str(path)
    images = [{"type": "image", key: name} for key in ("image", "url", "path", "base64", "image_url")]
    return [
        *images,
        {"type": "image", "image": path},
        {"type": "image", "image": {"path": name}},
        {"type": "image", "url": path.as_uri()},
        {"type": "image_url", "image_url": {"url": name}},
        {"type": "image_url", "image_url": path.as_uri()},
        {"type": "image_url", "url": name},
        {"type": "video", "video": [name]},
        {"type": "video", "video": [{"path": name}]},
    ]


@pytest.mark.parametrize("settings", [{}, {"allow_local_files": True}, {"images_kwargs": {"allow_local_files": True}}])
def test_messages_name_no_file(path, allow, untouched, settings):
    processor = make_processor()
    processor.image_processor.allow_local_files = allow
    for part in parts_of(path):
        dialogue = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        for conversation in (dialogue, [dialogue]):
            with pytest.raises(ValueError, match="local files are not read here"):
                processor.apply_chat_template(
                    conversation, tokenize=True, return_dict=True, processor_kwargs=dict(settings)
                )
    for images in (str(path), [[path]], [{"path": str(path)}], path.as_uri()):
        with pytest.raises(ValueError, match=REFUSED):
            processor(images=images, text="<image>", **settings)
        with pytest.raises(ValueError, match=REFUSED):
            processor(images=images, mode="caption", **settings)
        beside = [{"role": "user", "content": [{"type": "image"}]}]
        with pytest.raises(ValueError, match=REFUSED):
            processor.apply_chat_template(
                beside, tokenize=True, processor_kwargs={"images": images, **settings}, return_dict=True
            )


def test_videos_and_audio_by_name_are_refused_even_if_a_template_names_them(path, untouched):
    processor = make_processor()
    template = "{% for message in messages %}{{ message['content'] }} audio video {% endfor %}"
    for part in (
        {"type": "audio", "path": str(path)},
        {"type": "audio", "audio": str(path)},
        {"type": "audio", "url": path.as_uri()},
        {"type": "video", "path": str(path)},
        {"type": "video", "video": path.as_uri()},
        {"type": "video", "url": str(path)},
    ):
        with pytest.raises(ValueError, match=r"unknown type, 'audio'|must hold its frames"):
            processor.apply_chat_template(
                [{"role": "user", "content": [part]}], chat_template=template, tokenize=True, return_dict=True
            )


def test_the_switch_is_given_on_loading_and_saved(tmp_path):
    make_processor().save_pretrained(tmp_path)
    for processor in (
        InternVLProcessor.from_pretrained(tmp_path, allow_local_files=False),
        AutoProcessor.from_pretrained(tmp_path, allow_local_files=False, trust_remote_code=True),
    ):
        assert processor.image_processor.allow_local_files is False
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["image_processor"]["allow_local_files"] is False
    assert InternVLProcessor.from_pretrained(tmp_path).image_processor.allow_local_files is False
