"""`prepare`: from raw generated pairs to those of stages 1 and 2, and a stage trained on them."""

import json

import pytest

from internvl.rows.shards import read_shards
from internvl.synthetic.captions import PAIR_LAYOUTS, caption
from internvl.synthetic.scenes import draw_scene, sample_scene, scene_generator
from internvl.synthetic.textures import as_jpeg, as_png
from internvl.training.__main__ import main
from internvl.training.data.filters import FILTERS, with_optional
from internvl.training.data.preparing import check_first_rows

from .fixtures_pairs import sample, write_tar
from .test_source import ROOT


PAIRS = 24
MODEL = str(ROOT / "internvl_g")


def scene(number):
    return sample_scene(scene_generator("train", 5, number), PAIR_LAYOUTS["mixed"], "train")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Pairs, some with the caption of another scene, boilerplate, an unsafe score, a copy or an evaluation image."""
    folder = tmp_path_factory.mktemp("raw")
    scores = {"watermark": 0.1, "unsafe": 0.0, "aesthetic": 5.0}
    samples = []

    def add(number, text=None, image=None, **changes):
        image = as_png(draw_scene(scene(number))) if image is None else image
        text = caption(scene(number)) if text is None else text
        samples.append(sample(number, png=image, txt=text.encode(), json=json.dumps({**scores, **changes}).encode()))

    for number in range(PAIRS):
        add(number)
    for number in range(4):
        add(100 + number, text=caption(scene(200 + number)))  # wrong captions
        add(110 + number, text="Click here to read more about it")
        add(120 + number, unsafe=0.99)
        add(number, image=as_jpeg(draw_scene(scene(number)), 60))  # copies
        add(130 + number)  # of the evaluation set
    write_tar(folder / "a.tar", samples[:20])
    write_tar(folder / "b.tar", samples[20:])
    (folder / "evaluation").mkdir()
    for number in range(4):
        image = draw_scene(scene(130 + number))
        (folder / "evaluation" / f"{number}.jpg").write_bytes(as_jpeg(image, 80))
    return folder


def captions_in(folder):
    return [row["txt"].decode() for row in read_shards(sorted(str(file) for file in (folder / "pairs").iterdir()))]


def test_one_command_prepares_the_pairs_of_both_stages_and_a_stage_trains_on_them(raw, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output, plot = tmp_path / "out", tmp_path / "cuts.png"
    command = ["prepare", str(raw / "a.tar"), str(raw / "b.tar"), "--model", MODEL, "--output", str(output)]
    command += ["--against", str(raw / "evaluation"), "--plot", str(plot), "--batch-size", "16"]
    assert main(command) == 0
    first, second = captions_in(output / "stage1"), captions_in(output / "stage2")
    good = {caption(scene(number)) for number in range(PAIRS)}
    assert good <= set(first)
    assert len(first) == len(set(first))  # no copies
    removed = {caption(scene(number)) for start in (120, 130) for number in range(start, start + 4)}
    assert not removed & set(first)
    assert not [text for text in second if "Click here" in text]
    assert len(good & set(second)) >= PAIRS - 2  # but long ones
    cuts = json.loads((output / "cuts.json").read_text())
    assert [cut["pairs"] for cut in cuts] == sorted((cut["pairs"] for cut in cuts), reverse=True)
    assert cuts[0]["pairs"] == PAIRS + 20
    assert cuts[-1]["pairs"] == len(second) < cuts[2]["pairs"] == len(first)
    assert plot.stat().st_size > 5000
    said = capsys.readouterr().out
    assert "the paper 17.08%" in said
    assert main(command) == 0  # all is there
    assert capsys.readouterr().out == said
    shards = sorted(str(file) for file in (output / "stage1" / "pairs").iterdir())
    stage = ["stage1", "--data", *shards, "--tokenizer", MODEL, "--output", str(tmp_path / "model")]
    assert main([*stage, "--steps", "1", "--batch-size", "8", "--workers", "0"]) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()


WITHOUT = ["--without", "watermark", "--without", "unsafe", "--without", "aesthetic"]


def test_what_later_steps_lack_is_said_before_any_pair_is_scored(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(as_png(draw_scene(scene(1))))
        (tmp_path / name / "own.csv").write_text("image,caption\n1.png,a red star\n")
    one, two = (str(tmp_path / name / "own.csv") for name in ("one", "two"))
    command = ["prepare", "--model", MODEL, "--output", str(tmp_path / "out")]
    assert main([*command, one]) == 2
    assert "`--without watermark --without unsafe --without aesthetic`" in capsys.readouterr().err
    assert main([*command, *WITHOUT, one, two]) == 2
    assert "lie in 2 folders: name the folder below which all images lie by `--images`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_named_by_a_path_are_found_below_the_folder_of_the_data(tmp_path):
    (tmp_path / "1.png").write_bytes(as_png(draw_scene(scene(1))))
    (tmp_path / "own.csv").write_text("image,caption\n1.png,a red star\n")
    rules = with_optional(FILTERS, WITHOUT[1::2])
    own = str(tmp_path / "own.csv")
    assert check_first_rows([own], rules) == str(tmp_path)
    assert check_first_rows([own], rules, str(tmp_path)) == str(tmp_path)
    write_tar(tmp_path / "a.tar", [sample(1, png=(tmp_path / "1.png").read_bytes(), txt=b"a red star")])
    assert check_first_rows([str(tmp_path / "a.tar")], rules) is None
