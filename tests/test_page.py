"""The page of a report: every sample is on it with its image, filters and orders work in a browser, and texts of
models and data are shown, never run.
"""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from urllib.parse import unquote

import pytest
from PIL import Image

from internvl.evaluation import html_files, sample_images
from internvl.evaluation.__main__ import main
from internvl.evaluation.generated import held_out_question, image_named, scene_name
from internvl.evaluation.html_files import data_address
from internvl.evaluation.page import report_and_samples, worst, write_page
from internvl.evaluation.reports import metrics_of, write_report
from internvl.evaluation.samples import SampleLog

from .fixtures_text import make_image


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = [
    "</script><script>document.title = 'run'</script>",
    "<img src=x onerror=\"document.title = 'run'\">",
    "<!-- <script>",
    "{{ 7 * 7 }} {% raw %}",
    "&lt;b&gt; \u2028 ' \" \\",
    "دائرة حمراء\u202e abc",
]
NAMES = ("accuracy", "cider")


def report_in(folder, samples, **changes):
    """A report with its samples beside it."""
    settings = {"model": "internvl_g", "protocol": None, "data": None, **changes.pop("settings", {})}
    with SampleLog(folder / "own.samples.jsonl", settings) as log:
        for sample in samples:
            log.add(sample)
    metrics = metrics_of(samples)
    report = {"task": "dialogue", "protocol": "own", "model": "a model", "settings": settings, "metrics": metrics}
    write_report(folder / "own.json", {**report, "published": None, "samples": "own.samples.jsonl", **changes})
    return folder / "own.json"


def write(report, output, way="embed", maps=None):
    """Writes the page of a report; returns how many samples it has."""
    found, samples = report_and_samples(report)
    images = sample_images.SampleImages(found["settings"], report.parent)
    write_page(found, samples, images, output, way, maps or {})
    return len(samples)


def sample(number, **fields):
    score = float(number % 3 > 0)
    return {
        "id": f"{number:04}.png",
        "scores": {"accuracy": score, "cider": (number * 7 % 10) + 0.5},
        "kind": ("colour", "shape")[number % 2],
        "question": f"What is {number}?",
        "answer": HOSTILE[number % len(HOSTILE)],
        **fields,
    }


class Reader(HTMLParser):
    """The elements of a page with their attributes, and the texts of scripts."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts = [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts.append(data)


def read(path):
    """The elements of a page, what its script reads, and its script."""
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    data, script = reader.scripts[0], "".join(reader.scripts[1:]).strip()
    return reader.elements, json.loads(data), script


def shown_at(path, fragment, tmp_path):
    """The page as a browser shows it at a fragment: title, position, and for each card its id and whether it is
    right.
    """
    settings = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    run = subprocess.run(
        [BROWSER, *settings, f"{path.as_uri()}#{fragment}"], capture_output=True, check=True, timeout=120, text=True
    )
    title = re.search("<title>(.*?)</title>", run.stdout, re.DOTALL)[1]
    position = re.search('id="position"[^>]*>(.*?)<', run.stdout)[1]
    cards = re.findall(r'<article class="(good|bad)">.*?<h2>(.*?)</h2>', run.stdout, re.DOTALL)
    return title, position, [(name, kind == "good") for kind, name in cards], run.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two hundred samples with an image each, and their page."""
    folder = tmp_path_factory.mktemp("page")
    samples = [sample(number) for number in range(200)]
    for number in range(0, 200, 40):
        make_image(900, 500, seed=number).save(folder / f"{number:04}.png")
    report = report_in(folder, samples, model=HOSTILE[0], protocol=HOSTILE[1], settings={HOSTILE[2]: HOSTILE[0]})
    assert write(report, folder / "own.html") == 200
    return folder


def test_the_page_holds_every_sample_and_its_own_script_alone(folder):
    elements, data, script = read(folder / "own.html")
    assert data["metrics"] == list(NAMES)
    for number, found in enumerate(data["samples"]):
        expected = sample(number)
        assert found["id"] == expected["id"]
        assert found["scores"] == expected["scores"]
        assert list(found["fields"].items()) == [(name, expected[name]) for name in ("kind", "question", "answer")]
    assert [attributes for tag, attributes in elements if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {},
    ]
    own = (html_files.TEMPLATES / "page.js").read_text(encoding="utf-8")
    assert script == own.strip()
    assert not [tag for tag, _ in elements if tag in ("iframe", "object", "base", "form", "link", "img")]
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    (policy,) = (attributes["content"] for tag, attributes in elements if attributes.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert f"'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'" in policy


def test_the_page_needs_nothing_from_elsewhere(folder):
    text = (folder / "own.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?://|@import|url\(", text)


def test_figures_are_those_of_the_card(folder, tmp_path):
    samples = [sample(number) for number in range(6)]
    write(report_in(tmp_path, samples, published={"accuracy": 99.9}), tmp_path / "own.html")
    text = (tmp_path / "own.html").read_text(encoding="utf-8")
    cells = [re.sub("<.*?>", "|", line) for line in text.splitlines() if line.startswith("<tr><td>accuracy")]
    assert re.fullmatch(r"\|+accuracy\|+66\.7\|+[\d.]+ to [\d.]+\|+6\|+99\.9\|+differs\|+", cells[0])
    assert ">paper<" not in (folder / "own.html").read_text(encoding="utf-8")  # it has none


def test_images_are_in_the_page_once_and_small(folder):
    _, data, _ = read(folder / "own.html")
    assert len(data["images"]) == 5
    with_image = [found for found in data["samples"] if found["image"] is not None]
    assert [found["id"] for found in with_image] == [f"{number:04}.png" for number in range(0, 200, 40)]
    for address in data["images"]:
        kind, content = address.removeprefix("data:image/").split(";base64,")
        image = Image.open(BytesIO(base64.b64decode(content)))
        assert image.format.lower() == kind
        assert max(image.size) == html_files.THUMBNAIL_SIDE


def test_small_copies_look_like_the_image():
    plain = Image.new("RGB", (20, 10), (200, 30, 30))
    assert data_address(plain).startswith("data:image/png;base64,")
    assert data_address(make_image(300, 300)).startswith("data:image/jpeg;base64,")


def test_images_may_be_links_and_may_be_left_out(tmp_path):
    (tmp_path / "out").mkdir()
    name = "a b#1 \"'<javascript:x>.png"
    make_image().save(tmp_path / name)
    report = report_in(tmp_path, [sample(1, image=name), sample(2, image="../nowhere.png")])
    write(report, tmp_path / "out" / "own.html", "link")
    _, data, _ = read(tmp_path / "out" / "own.html")
    assert [unquote(address) for address in data["images"]] == [f"../{name}"]
    assert not set("\"'<>#: ") & set(data["images"][0])
    write(report, tmp_path / "own.html", "none")
    assert read(tmp_path / "own.html")[1]["images"] == []


def test_images_of_generated_scenes_are_drawn_again(tmp_path):
    names = ["generated/0/5", "generated/1/6/one_tile", scene_name("tiles", 0, 1)]
    samples = [sample(0, id=names[0]), sample(1, id=names[1], cluster="generated/1/6"), sample(2, image=names[2])]
    write(report_in(tmp_path, samples), tmp_path / "own.html")
    _, data, _ = read(tmp_path / "own.html")
    images = [held_out_question(5).image, held_out_question(6, 1).image, image_named(names[2])]
    assert [data["images"][found["image"]] for found in data["samples"]] == [data_address(image) for image in images]
    assert image_named("generated/tiles/0/1").size != (448, 448)
    for other in ("generated/0", "generated/0/x", "generated/other/0/1", "a.png"):
        assert image_named(other) is None


def test_what_is_no_image_is_left_out(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    hostile = ["text.png", "\0", "a" * 5000, "", ".", "/"]
    samples = [sample(number, image=name) for number, name in enumerate(hostile)]
    write(report_in(tmp_path, [*samples, sample(9, image=["a"])]), tmp_path / "own.html")
    assert all(found["image"] is None for found in read(tmp_path / "own.html")[1]["samples"])


def test_a_report_alone_causes_no_download(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample_images, "open_data", lambda protocol, data, limit: asked.append(data))
    monkeypatch.setattr(sample_images, "find_protocol", lambda *names: names)
    settings = {"data": "https://example.org/a.tar", "protocol": "own"}
    sample_images.SampleImages(settings, tmp_path).read("a.png")
    assert asked == []
    with pytest.raises(AttributeError):
        sample_images.SampleImages(settings, tmp_path, "https://example.org/b.tar").read("a.png")
    assert asked == ["https://example.org/b.tar"]


def test_reports_without_samples_are_refused(tmp_path):
    report = report_in(tmp_path, [sample(1)])
    (tmp_path / "own.samples.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="has no samples beside it"):
        write(report, tmp_path / "own.html")
    assert not (tmp_path / "own.html").exists()


def test_texts_that_are_no_utf_8_are_shown_all_the_same(tmp_path):
    report = report_in(tmp_path, [sample(1)])
    file = tmp_path / "own.samples.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace('"colour"', r'"\ud800"').replace('"shape"', r'"\ud800"'))
    report.write_text(report.read_text(encoding="utf-8").replace('"a model"', r'"a \ud800"'))
    write(report, tmp_path / "own.html")
    assert read(tmp_path / "own.html")[1]["samples"][0]["fields"]["kind"] == "\ud800"


def test_the_command_draws_where_a_model_looked_for_its_worst_answers(root, tmp_path, capsys):
    asked = {f"generated/0/{number}": held_out_question(number).question for number in (0, 7, 14)}
    samples = [
        {"id": name, "scores": {"accuracy": score}, "question": question.text, "answer": question.answer}
        for (name, question), score in zip(asked.items(), (1.0, 0.0, 0.0), strict=True)
    ]
    report = report_in(tmp_path, samples)
    assert main(["page", str(report), "--look", str(root), "--look-limit", "1"]) == 0
    assert capsys.readouterr().out == f"3 samples: {tmp_path / 'own.html'}\n"
    _, data, _ = read(tmp_path / "own.html")
    assert [found["map"] is not None for found in data["samples"]] == [False, True, False]
    assert data["samples"][1]["map"] not in data["images"]
    assert main(["page", str(report), "--look", str(root / "internvit")]) == 2
    assert "InternVL-G" in capsys.readouterr().err
    assert main(["page", str(tmp_path / "no.json")]) == 2


def test_the_worst_are_those_of_the_metric_that_the_page_opens_with():
    samples = [{"id": str(number), "scores": {"b": score, "a": -score}} for number, score in enumerate((3, 1, 2))]
    assert [one["id"] for one in worst(samples, 2)] == ["1", "2"]
    assert worst([], 2) == []


# -------------------------------------------------------------------------------------------------------- in a browser
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize(
    ("fragment", "chosen", "order"),
    [
        ("", lambda one: True, lambda one: one["scores"]["accuracy"]),
        ("show=low", lambda one: one["scores"]["accuracy"] == 0, lambda one: 0),
        ("metric=cider&order=best", lambda one: True, lambda one: -one["scores"]["cider"]),
        ("metric=cider&order=file&page=2", lambda one: True, lambda one: 0),
        ("field:kind=shape&show=high&search=wHat%20is%201", None, lambda one: 0),
        ("metric=__proto__&order=x&page=-5&show=no&field:kind=none", lambda one: False, None),
    ],
)
def test_samples_are_filtered_and_the_worst_come_first(fragment, chosen, order, folder, tmp_path):
    samples = [sample(number) for number in range(200)]
    if chosen is None:
        chosen = lambda one: one["kind"] == "shape" and one["scores"]["accuracy"] and "is 1" in one["question"]  # noqa: E731
    expected = sorted(filter(chosen, samples), key=order)
    title, position, cards, _ = shown_at(folder / "own.html", fragment, tmp_path)
    first = 48 if "page=2" in fragment else 0
    assert [name for name, _ in cards] == [one["id"] for one in expected[first : first + 48]]
    assert position.startswith(f"{len(expected)} of 200 samples, page {1 + first // 48} of ")
    if "cider" not in fragment:
        assert all(is_good == bool(int(name[:4]) % 3) for name, is_good in cards)
    assert title.startswith("&lt;img")  # a text that ran would have changed it


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_hostile_texts_are_shown_and_not_run(folder, tmp_path):
    title, _, cards, text = shown_at(folder / "own.html", "search=%3Cimg", tmp_path)
    assert len(cards) > 10
    assert text.count('<dd dir="auto">&lt;img src=x onerror=') == len(cards)
    assert title.startswith("&lt;img")
    assert '<img src="x"' not in text
