"""The page in headless Chromium: what a visitor types, uploads and reads, and what a hostile one is refused.

`make test-app` runs it in the environment that has Gradio.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from .loopback import free_port


pytest.importorskip("gradio", reason="`make test-app` runs it where Gradio is")
sync_api = pytest.importorskip("playwright.sync_api", reason="`make test-app` runs it where playwright is")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if BROWSER is None:
    pytest.skip("needs Chromium or Chrome", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
sync_api.expect.set_options(timeout=60_000)
SHOTS = os.environ.get("SCREENSHOTS")  # a folder, to look at them


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The command with its address and the folder that temporary files go to."""
    if "PAGE_ADDRESS" in os.environ:
        yield None, os.environ["PAGE_ADDRESS"], None
        return
    folder, port = tmp_path_factory.mktemp("page"), free_port()
    variables = {**os.environ, "TMPDIR": str(folder), "GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "True"}
    command = [sys.executable, "-m", "internvl.serving", "page", "--images", str(EXAMPLES), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    try:
        line = process.stdout.readline()
        assert re.fullmatch(rf"Serving at http://127.0.0.1:{port}/? until Ctrl\+C\.\n", line)
        yield process, f"http://127.0.0.1:{port}", folder
    finally:
        process.kill()


@pytest.fixture(scope="module")
def address(served):
    return served[1]


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def errors():
    """What the browser's console says during a visit."""
    return []


@pytest.fixture
def page(chromium, address, errors):
    """A visit, in which nothing comes from elsewhere and nothing fails unseen."""
    context = chromium.new_context(viewport=WIDE)
    context.set_default_timeout(60_000)
    page = context.new_page()
    seen = []
    page.on("response", lambda response: seen.append(response.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.get_by_role("tab", name="Chat").wait_for()
    yield page
    context.close()
    assert [url for url in seen if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


def screenshot(page, name):
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


def tab(page, name):
    """The panel of a tab, opened."""
    page.get_by_role("tab", name=name).click()
    panel = page.locator(f"#{name.lower()}")
    panel.wait_for()
    return panel


def choose(panel, *files):
    panel.locator("input[type=file]").first.set_input_files([str(file) for file in files])


def ask(page, question, *files):
    panel = tab(page, "Chat")
    if files:
        choose(panel, *files)
        panel.locator(".thumbnail-item, .thumbnail-image, .file-box img").nth(len(files) - 1).wait_for()
    box = panel.locator("textarea").first
    box.fill(question)
    box.press("Enter")
    return panel


def answer(panel, turn=0):
    found = panel.locator(".message.bot").nth(turn)
    found.wait_for()
    return found


def gallery(panel, name):
    return panel.locator(f"#{name} .grid-wrap button img")


# ------------------------------------------------------------------------------------------------------ what it shows
def test_a_dialogue_about_several_images_has_tiles_and_maps(page):
    panel = ask(page, "Where is the purple cross?", EXAMPLES / "wide_small_text.png", EXAMPLES / "handwriting.png")
    answer(panel)
    sync_api.expect(answer(panel)).to_have_text("bottom right")
    assert panel.locator(".message.user img").count() == 2
    sync_api.expect(gallery(panel, "tiles")).to_have_count(2)
    sync_api.expect(gallery(panel, "looked")).to_have_count(2)
    screenshot(page, "chat")
    ask(page, "Which digit is at the top right?")
    sync_api.expect(answer(panel, 1)).to_have_text("4")
    panel.get_by_role("button", name="New dialogue").click()
    sync_api.expect(panel.locator(".message")).to_have_count(0)
    sync_api.expect(gallery(panel, "tiles")).to_have_count(0)


def test_a_broken_file_is_named_and_the_dialogue_goes_on(page, tmp_path):
    name = "<img src=x onerror=document.title='run'>.png"
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    ask(page, "Which digit is at the top right?", EXAMPLES / "handwriting.png")
    panel = tab(page, "Chat")
    sync_api.expect(answer(panel)).to_have_text("4")
    choose(panel, tmp_path / name)
    panel.locator(".thumbnail-item").first.wait_for()
    ask(page, "What is this?")
    toast = page.locator(".toast-body")
    sync_api.expect(toast).to_contain_text("Image 1 cannot be read as an image")
    assert "BytesIO" not in toast.inner_text()
    screenshot(page, "error")
    sync_api.expect(panel.locator(".message.bot")).to_have_count(1)
    assert panel.locator("textarea").first.input_value() == "What is this?"  # it can be sent again
    assert page.title() == "InternVL"


def test_texts_are_shown_and_not_run_and_ask_nobody_else(page, errors):
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        image = f"![](http://127.0.0.1:{elsewhere.getsockname()[1]}/a.png)"
        panel = ask(page, f"<b onclick=\"document.title='run'\">Bold</b> {image} <script>alert(1)</script>")
        answer(panel)
        page.wait_for_timeout(500)
        elsewhere.settimeout(0.1)
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert page.title() == "InternVL"
    assert panel.locator(".message script, .message [onclick]").count() == 0
    assert errors
    assert all("Content Security Policy" in error for error in errors)
    errors.clear()


@pytest.mark.parametrize(("classes", "best"), [("circle, star", "star"), ("دائرة، نجمة", "نجمة"), ("円、星", "星")])
def test_typed_classes_are_compared(page, classes, best):
    panel = tab(page, "Classify")
    choose(panel, EXAMPLES / "star.png")
    panel.locator("img").first.wait_for()
    panel.get_by_label("Italiano").check()
    box = panel.locator("textarea").first
    sync_api.expect(box).to_have_value(re.compile("stella"))
    box.fill(classes)
    panel.get_by_role("button", name="Classify").click()
    sync_api.expect(panel.locator(".output-class")).to_have_text(best)
    screenshot(page, "classify")


def test_the_folder_is_searched_by_text_and_by_image(page):
    panel = tab(page, "Search")
    panel.locator("textarea").first.fill("a red star")
    panel.get_by_role("button", name="Search by text").click()
    first = panel.locator("#found .caption-label").first
    sync_api.expect(first).to_contain_text("star.png")
    choose(panel, EXAMPLES / "words.png")
    panel.locator("img").first.wait_for()
    panel.get_by_role("button", name="Search by image").click()
    sync_api.expect(first).to_have_text("1.00 words.png")
    screenshot(page, "search")


def test_captions_are_written_in_a_chosen_language(page):
    panel = tab(page, "Captions")
    choose(panel, EXAMPLES / "star.png")
    panel.locator("img").first.wait_for()
    panel.get_by_label("العربية").check()
    panel.get_by_role("button", name="Write a caption").click()
    sync_api.expect(panel.locator("textarea").first).to_have_value(re.compile("نجمة حمراء"))
    sync_api.expect(gallery(panel, "caption-looked").first).to_be_visible()
    screenshot(page, "captions")


def test_an_example_fills_the_fields(page):
    panel = tab(page, "Chat")
    panel.get_by_text("Which digit is at the top right?").click()
    sync_api.expect(panel.locator("textarea").first).to_have_value("Which digit is at the top right?")
    panel.locator("textarea").first.press("Enter")
    sync_api.expect(answer(panel)).to_have_text("4")


def test_a_narrow_screen_needs_no_scrolling_aside(page):
    page.set_viewport_size(NARROW)
    panel = ask(page, "Where is the purple cross?", EXAMPLES / "handwriting.png")
    sync_api.expect(gallery(panel, "looked")).to_have_count(3)
    for name in ("Classify", "Search", "Captions", "Chat"):
        tab(page, name)
        # The container hides what does not fit, so the width of the document says nothing.
        widths = page.locator("html, .gradio-container").evaluate_all("all => all.map(one => one.scrollWidth)")
        assert len(widths) > 1
        assert max(widths) <= NARROW["width"]
    screenshot(page, "narrow")


# ------------------------------------------------------------------------------------------------- what it does not do
def upload(address, data, count=1):
    files = [("files", ("a.png", data))] * count
    return requests.post(f"{address}/gradio_api/upload", files=files, timeout=60)


def events(address, component, *data):
    """What comes of a request that joins the queue as a browser does: the status and its line, or whether it succeeded
    and all events.
    """
    config = requests.get(f"{address}/config", timeout=60).json()
    labels = {one["id"]: one["props"].get("label") for one in config["components"]}
    (first, *_) = [one["id"] for one in config["dependencies"] if component in map(labels.get, one["inputs"])]
    body = {"data": data, "fn_index": first, "session_hash": f"own{time.monotonic_ns()}"}
    joined = requests.post(f"{address}/gradio_api/queue/join", json=body, timeout=60)
    if joined.status_code != 200:
        return joined.status_code, joined.text
    stream = requests.get(
        f"{address}/gradio_api/queue/data", params={"session_hash": body["session_hash"]}, stream=True, timeout=120
    )
    seen = ""
    for line in stream.iter_lines():
        event = json.loads(line.removeprefix(b"data: ") or b"{}")
        seen += json.dumps(event)
        if event.get("msg") == "process_completed":
            return event["success"], seen
    raise AssertionError("no answer")


def test_an_answer_is_streamed(address):
    (path,) = upload(address, (EXAMPLES / "handwriting.png").read_bytes()).json()
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    success, seen = events(address, "Question", {"text": "Where is the purple cross?", "files": [image]}, None)
    assert success
    assert seen.count('"process_generating"') > 2  # the question, then more than one part of the answer


def test_requests_with_files_of_the_machine_are_refused(address, tmp_path):
    (path,) = upload(address, (EXAMPLES / "star.png").read_bytes()).json()
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    assert events(address, "Question", {"text": "What?", "files": [image]}, None)[0] is True
    secret = tmp_path / "secret.png"
    secret.write_bytes((EXAMPLES / "words.png").read_bytes())
    for named in (str(secret), secret.as_uri(), "/etc/passwd", f"{path}/../../../../../etc/passwd", address):
        for wrong in ({**image, "path": named}, {**image, "url": named}, {"url": named}):
            status, reason = events(address, "Question", {"text": "What?", "files": [wrong]}, None)
            assert (status, reason) == (400, "Files are uploaded: paths and addresses are not read here.\n")
    for wrong in ([str(secret)], str(secret), [{"text": str(secret)}], 7):
        success, event = events(address, "Question", {"text": "What?", "files": wrong}, None)
        assert success is False or "missing" in event
        assert str(tmp_path) not in event


def test_no_file_and_no_route_beside_the_page_is_served(address):
    (path,) = upload(address, b"own").json()
    assert requests.get(f"{address}/gradio_api/file={path}", timeout=60).content == b"own"
    for named in ("/etc/passwd", str(ROOT / "README.md"), f"{path}/../../../../../../../../etc/passwd", "."):
        assert requests.get(f"{address}/gradio_api/file={named}", timeout=60).status_code in (403, 404)
    for route in ("docs", "monitoring", "gradio_api/proxy=https://example.org/", "gradio_api/runs", "login", "mcp"):
        assert requests.get(f"{address}/{route}", timeout=60).status_code == 404
    for route in ("gradio_api/call/ask", "gradio_api/run/ask", "gradio_api/component_server", "gradio_api/vibe-edit"):
        assert requests.post(f"{address}/{route}", json={}, timeout=60).status_code == 404


def test_large_and_malformed_requests_are_refused(address):
    assert upload(address, b"a" * (8 * 2**20 + 1)).status_code == 413
    assert upload(address, b"a" * (8 * 2**20), 9).status_code == 413
    joined = f"{address}/gradio_api/queue/join"
    for body, status in [(b"[" * 10**5, 400), (b"no", 400), (b'"' + b"a" * 2**20 + b'"', 413), (b"[]", 422)]:
        headers = {"content-type": "application/json"}
        assert requests.post(joined, data=body, headers=headers, timeout=60).status_code == status
    for data in ([], [None], [{"text": ["a"]}, None], [{"text": "a" * 3000, "files": []}, None]):
        success, event = events(address, "Question", *data)
        assert success is False or "missing" in event or "more than the 2000" in event
    for data in ([None, "a, b", "{c}", "InternVL-C"], [7, "a", "b", 0], ["a"] * 4, []):
        assert events(address, "Classes", *data)[0] is False


def test_the_page_ends_when_it_is_asked_to_and_leaves_no_files(served):
    process, address, folder = served
    if process is None:
        pytest.skip("the page is not this test's own")
    assert upload(address, b"own").status_code == 200
    assert list(folder.rglob("a.png"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert not list(folder.rglob("a.png"))
    with pytest.raises(requests.ConnectionError):
        requests.get(address, timeout=5)
