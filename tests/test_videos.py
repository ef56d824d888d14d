"""Videos in dialogues: the middle frames of equal intervals, in the published form; no file does harm."""

import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from internvl.rows import videos
from internvl.rows.bad_rows import UnusableRowError
from internvl.rows.videos import frames_of_video, middle_frames, read_frames
from internvl.training.__main__ import main
from internvl.training.data.dialogue_rows import read_dialogue
from internvl.training.data.dialogues import DialogueCollator, DialogueDataset, DialogueEncoder

from . import engine_jobs
from .fixtures_dialogues import llava
from .test_dialogues import SEQ, make_processor


STEP = 8  # of brightness between two frames


def write_video(path, count: int, codec: str = "libx264", size=(64, 48), kind: str | None = None, first=0) -> Path:
    """A video whose frames become brighter."""
    with av.open(path, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(first, first + count):
            pixels = np.full((size[1], size[0], 3), STEP * number % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(frames) -> list[int]:
    return [round(frame.getpixel((9, 9))[0] / STEP) for frame in frames]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", 30)
    write_video(folder / "b.webm", 9, "libvpx")
    return folder


@pytest.fixture
def encoder(folder) -> DialogueEncoder:
    return DialogueEncoder(make_processor(), images=folder, video_frames=(4, 4))


# ------------------------------------------------------------------------------------------------------------- frames
def published_middle_frames(total: int, count: int) -> list[int]:
    """As in the published fine-tuning code, without the last frame repeated where there are too few."""
    intervals = np.linspace(start=0, stop=total, num=min(count, total) + 1).astype(int)
    ranges = [(start, intervals[index + 1] - 1) for index, start in enumerate(intervals[:-1])]
    return [(first + last) // 2 for first, last in ranges]


def test_the_middle_frames_are_the_published_ones():
    for total in (1, 2, 7, 8, 9, 30, 299, 1000, 4321):
        for count in (1, 8, 13, 32):
            assert middle_frames(total, count) == published_middle_frames(total, count)


@pytest.mark.parametrize(
    ("ending", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mjpeg"), ("ts", "libx264")]
)
def test_frames_are_read_from_files_and_bytes(tmp_path, ending, codec):
    path = write_video(tmp_path / f"a.{ending}", 30, codec)
    expected = middle_frames(30, 8)
    assert numbers(read_frames(str(path), "A video", 8)) == expected
    assert numbers(read_frames(path.read_bytes(), "A video", 8)) == expected
    assert numbers(read_frames(str(path), "A video", 99)) == list(range(30))


def test_frames_are_turned_upright(tmp_path):
    """As of a telephone that was held upright: the header turns the stored image clockwise."""
    path = tmp_path / "a.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:, 32:] = 200  # dark on the left
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    one, plain = 1 << 16, struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    of_track = content.index(plain, content.index(b"tkhd"))
    content = content[:of_track] + turned + content[of_track + len(plain) :]
    (frame,) = read_frames(content, "A video", 8)
    assert frame.size == (48, 64)
    assert frame.getpixel((24, 8))[0] < 50
    assert frame.getpixel((24, 56))[0] > 150


def test_the_number_of_frames_belongs_to_the_video(folder, tmp_path):
    counts = []
    for number in range(10):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes((folder / "a.mp4").read_bytes())
        given = {len(frames_of_video(str(path), (2, 9))) for _ in range(2)}
        assert len(given) == 1
        counts += given
    assert 2 <= min(counts) < max(counts) <= 9
    assert len(set(counts)) > 3


# ---------------------------------------------------------------------------------------------------------------- rows
def forms(folder: Path) -> dict[str, dict]:
    """A dialogue about a video and an image in every form."""
    question = "What happens?"
    content = [
        {"type": "video", "video": "a.mp4"},
        {"type": "image", "image": "frame.png"},
        {"type": "text", "text": question},
    ]
    answer = {"role": "assistant", "content": "It gets brighter."}
    marked = f"<video>\n<image>\n{question}"
    return {
        "llava": llava(marked, answer["content"], video="a.mp4", image="frame.png"),
        "lists": llava(marked, answer["content"], videos=[{"path": "a.mp4"}], images=["frame.png"]),
        "bytes": {"query": marked, "response": answer["content"], "image": "frame.png",
                  "video": {"bytes": (folder / "a.mp4").read_bytes(), "path": None}},
        "parts": {"messages": [{"role": "user", "content": content}, answer]},
        "addresses of parts": {"messages": [{"role": "user", "content": [
            {"type": "video_url", "video_url": {"url": str(folder / "a.mp4")}}, *content[1:]]}, answer]},
    }  # fmt: skip


def test_every_form_gives_the_same_tensors_in_the_published_order(folder, encoder):
    frames = read_frames(str(folder / "a.mp4"), "A video", 4)
    frames[0].resize((168, 56)).save(folder / "frame.png")  # 3 tiles and a thumbnail
    rows = forms(folder)
    expected = encoder(rows["llava"])
    assert len(expected["pixel_values"]) == 4 + 4
    tokenizer = encoder.processor.tokenizer
    decoded = tokenizer.decode(expected["input_ids"]).replace("<IMG_CONTEXT>", "")
    lines = [f"Frame{number}: <img></img>\n" for number in range(1, 5)]
    assert "".join(lines) + "<img></img>\nWhat happens?" in decoded
    learned = expected["input_ids"][expected["labels"] != -100]
    assert tokenizer.decode(learned).startswith("It gets brighter.")
    for name, row in rows.items():
        encoded = encoder(row)
        assert all(torch.equal(encoded[key], value) for key, value in expected.items()), name


def test_a_video_without_a_place_comes_first_and_frames_may_be_given(folder, encoder):
    read_frames(str(folder / "a.mp4"), "A video", 1)[0].save(folder / "frame.png")
    placed = encoder(llava("<video>\nWhat?", "A.", video="a.mp4"))
    assert torch.equal(encoder(llava("What?", "A.", video="a.mp4"))["input_ids"], placed["input_ids"])
    given = encoder(llava("<video>\nWhat?", "A.", videos=[["frame.png"] * 4]))
    assert torch.equal(given["input_ids"], placed["input_ids"])
    with pytest.raises(UnusableRowError, match="outside of"):
        encoder(llava("<video>\nWhat?", "A.", videos=[["../frame.png"]]))


def test_images_beside_a_video_keep_their_tiles(folder):
    image = read_frames(str(folder / "a.mp4"), "A video", 1)[0].resize((168, 56))
    row = llava("<video>\n<image>\nWhat?", "A.", video="a.mp4", image=[image])
    for max_num, tiles in ((1, 1), (6, 4)):
        encoder = DialogueEncoder(
            make_processor(), images=folder, video_frames=(4, 4), max_num=max_num, use_thumbnail=max_num > 1
        )
        encoded = encoder(row)
        assert len(encoded["pixel_values"]) == 4 + tiles
        messages = read_dialogue(row, folder)
        assert (4 + tiles) * SEQ <= encoder.length_of(messages) < len(encoded["input_ids"])


def test_frames_leave_room_for_the_text(folder):
    row = llava("<video>\nWhat?", "A.", video="a.mp4")
    counts = []
    for max_length in (100, 160, 220, None):
        encoded = DialogueEncoder(make_processor(), max_length, "drop", folder, video_frames=(2, 30))(row)
        counts.append(len(encoded["pixel_values"]))
        assert max_length is None or len(encoded["input_ids"]) <= max_length
    assert counts[0] < counts[1] < counts[2] <= counts[3]
    with pytest.raises(ValueError, match="`video_frames` must be"):
        DialogueEncoder(make_processor(), video_frames=(3, 2))


def test_videos_images_and_texts_are_one_batch(folder, encoder, tmp_path, capsys):
    rows = [llava("<video>\nWhat?", "A.", video="a.mp4"), llava("Hello", "Hi."), llava("What?", "B.", video="b.webm")]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = DialogueDataset(path, encoder)
    batch = DialogueCollator(encoder)([dataset[index] for index in range(3)])
    assert batch["pixel_values"].shape == (8, 3, 56, 56)
    image_tokens = torch.isin(batch["input_ids"], torch.tensor(encoder.processor.image_token_ids))
    assert image_tokens.sum(dim=1).tolist() == [4 * (SEQ + 2), 0, 4 * (SEQ + 2)]
    assert main(["validate", str(path)]) == 0
    assert "3 rows in 1 file, none bad." in capsys.readouterr().out


def test_a_model_learns_from_videos(folder, tmp_path):
    """The same question has another answer for each of two videos."""
    engine_jobs.write_data(tmp_path)
    connector = engine_jobs.CONNECTORS[0]
    engine_jobs.make_processor(connector).save_pretrained(tmp_path / connector)
    for name, first in (("dark", 0), ("light", 26)):
        write_video(tmp_path / f"{name}.mp4", 4, first=first)
    rows = [llava("<video>\nHow is it?", name, video=f"{name}.mp4") for name in ("dark", "light")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--bf16 False --gradient-checkpointing False --batch-size 2 --steps 24 --workers 0"
    data = ["--model", str(tmp_path / connector), "--data", str(tmp_path / "rows.jsonl"), "--video-frames", "2"]
    assert main(["finetune", *data, "--output", str(tmp_path / "out"), *words.split(), "--learning-rate", "1e-2"]) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    for name in ("dark", "light"):
        video = {"type": "video", "video": read_frames(str(tmp_path / f"{name}.mp4"), "A video", 2)}
        messages = [{"role": "user", "content": [video, {"type": "text", "text": "How is it?"}]}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        found = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        text = processor.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.startswith(name)


# ------------------------------------------------------------------------------------------------------------- hostile
def grown_video(folder: Path) -> bytes:
    """A stream whose frames become larger than its header says."""
    parts = []
    for side in (64, 640):
        part = io.BytesIO()
        write_video(part, 5, size=(side, side), kind="h264")
        parts.append(part.getvalue())
    grown = io.BytesIO()
    with av.open(io.BytesIO(b"".join(parts)), format="h264") as source, av.open(grown, "w", format="mpegts") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packet.pts = packet.dts = 3600 * number
            packet.stream = stream
            target.mux(packet)
    return grown.getvalue()


def playlist(folder: Path) -> bytes:
    """What reads another file where it is allowed to."""
    write_video(folder / "secret.ts", 5)
    address = (folder / "secret.ts").as_uri()
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{address}\n#EXT-X-ENDLIST\n".encode()


def encoded(name: str, count: int, codec: str = "libx264", side: int = 64):
    return lambda folder: write_video(folder / name, count, codec, (side, side)).read_bytes()


HOSTILE = {
    "grown": (grown_video, "Invalid data"),
    "playlist": (playlist, "Invalid data"),
    "list of files": (lambda folder: b"ffconcat version 1.0\nfile a.mp4\n", "none of the formats"),
    "an image": (lambda folder: b"\x89PNG\r\n\x1a\n" + bytes(99), "none of the formats"),
    "noise": (lambda folder: bytes(range(256)) * 40, "Invalid data"),
    "nothing": (lambda folder: b"", "cannot be read as a video"),
    "truncated": (lambda folder: (folder / "a.mp4").read_bytes()[:900], "it holds no video"),
    "cut in the middle": (lambda folder: encoded("c.avi", 30, "mjpeg")(folder)[:9000], "Invalid data"),
    "sound alone": (lambda folder: b"OggS" + bytes(99), "cannot be read as a video"),
    "frames too large": (encoded("d.mp4", 2, side=640), "more than 90000 pixels"),
    "too long": (encoded("e.mp4", 200), "more than 500000 pixels"),
    "too long, without a count": (encoded("e.webm", 200, "libvpx"), "more than 500000 pixels"),
    "too much to keep": (encoded("f.mp4", 30, side=96), "more than 30000 pixels"),
    "an unusual codec": (encoded("g.mkv", 3, "ffv1"), "codec is ffv1"),
    "a codec with a known hole": (encoded("h.avi", 3, "magicyuv"), "codec is magicyuv"),
    "a large file": (lambda folder: (folder / "a.mp4").read_bytes() * 100, "at most 100000 are read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_video_is_a_bad_row(name, tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(videos, "MAX_FRAME_PIXELS", 300 * 300)
    monkeypatch.setattr(videos, "MAX_DECODED_PIXELS", 500_000)
    monkeypatch.setattr(videos, "MAX_KEPT_PIXELS", 30_000)
    monkeypatch.setattr(videos, "MAX_FILE_BYTES", 100_000)
    make, reason = HOSTILE[name]
    write_video(tmp_path / "a.mp4", 8)
    (tmp_path / "hostile.mp4").write_bytes(make(tmp_path))
    rows = [llava("<video>", "a", video=video) for video in ("a.mp4", "hostile.mp4")]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    assert main(["validate", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, lines
    assert "hostile.mp4` cannot be read as a video: " in lines[0]
    assert reason in lines[0]
    with pytest.raises(UnusableRowError, match="hostile"):
        DialogueEncoder(make_processor(), video_frames=(8, 8))(rows[1], tmp_path)


@pytest.mark.parametrize("source", ["../a.mp4", "/etc/passwd", "link.mp4"])
def test_videos_lie_below_the_folder(source, tmp_path, folder):
    (tmp_path / "data").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"a")
    (tmp_path / "data" / "link.mp4").symlink_to(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"lies outside of .* may only name videos below"):
        read_dialogue(llava("<video>", "a", video=source), tmp_path / "data")


def test_without_pyav_a_run_ends_with_the_command_that_installs_it(tmp_path, folder):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(llava("a", "b", video="a.mp4")) + "\n")
    (tmp_path / "a.mp4").write_bytes((folder / "a.mp4").read_bytes())
    script = (
        "import sys; sys.modules['av'] = None\n"
        f"from internvl.training.__main__ import main; sys.exit(main(['validate', {str(path)!r}]))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert run.stderr.endswith("error: This needs av, which is not installed: `pip install 'internvl[video]'`.\n")
