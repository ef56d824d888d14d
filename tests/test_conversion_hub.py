"""SOURCE as a name on the Hub, against a stand-in of its API: what is downloaded, goes on, and is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from .fixtures_conversions import weights_of
from .fixtures_published import published
from .hub_stand_in import commit_of, hub


# One process for all calls, since the library reads its settings as it is imported. "offline" in front stands for
# HF_HUB_OFFLINE.
CALLS = """
import contextlib, io, json, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 2**16  # of the tiny files here, more than one
from internvl.conversion.__main__ import main
results = []
for arguments in json.loads(sys.argv[1]):
    constants.HF_HUB_OFFLINE = arguments[0] == "offline"
    said, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
        try:
            code = main(arguments[constants.HF_HUB_OFFLINE :])
        except SystemExit as exit:
            code = exit.code
    lines = [line for line in error.getvalue().splitlines() if line.startswith("error: ")]
    has_traceback = "Traceback" in error.getvalue()
    results.append({"code": code, "said": said.getvalue(), "error": lines, "traceback": has_traceback})
print("RESULTS" + json.dumps(results))
"""


def call(calls, cache, port):
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "hf_secret",
        "NO_PROXY": "127.0.0.1",
    }
    unset = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps([[str(part) for part in arguments] for arguments in calls])],
        env={**unset, **settings},
        cwd=cache.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULTS")), None)
    assert line is not None, done.stderr
    results = json.loads(line.removeprefix("RESULTS"))
    assert not any(result["traceback"] or len(result["error"]) > 1 for result in results), results
    return results


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """Conversions of names on the Hub, and what was asked of it; then the same offline."""
    folder = tmp_path_factory.mktemp("hub")
    main = published("intern_vit_6b", folder / "main")
    (main / "modeling_evil.py").write_text("raise SystemExit")
    (main / "training_args.bin").write_bytes(b"state")
    (main / "pytorch_model.bin").write_bytes(b"the same in another format")
    (main / "onnx").mkdir()
    (main / "onnx" / "model.safetensors").write_bytes(b"another format")
    (main / "README.md").write_text("---\nlicense: mit\n---\n")
    old = published("intern_vit_6b", folder / "old")
    tensors = {name: tensor + 1 for name, tensor in load_file(old / "model.safetensors").items()}
    save_file(tensors, old / "model.safetensors")
    only_bin = published("intern_vit_6b", folder / "bin")
    torch.save(load_file(only_bin / "model.safetensors"), only_bin / "pytorch_model.bin")
    (only_bin / "model.safetensors").unlink()
    revisions = {
        "user/vit": {"main": main, "v1": old},
        "user/pickled": {"main": only_bin},
        "user/gated": "gated",
    }
    (folder / "cache").mkdir()
    with hub(revisions, breaks={"model.safetensors": 1}) as server:
        results = call(
            [
                ["user/vit", folder / "out"],
                ["user/vit", folder / "out_v1", "--revision", "v1"],
                ["user/vit", folder / "out_commit", "--revision", commit_of("v1")],
                ["user/pickled", folder / "out_bin"],
                ["user/vit", folder / "x", "--revision", "v9"],
                ["user/gated", folder / "x"],
                ["user/nothing", folder / "x"],
                [main, folder / "x", "--revision", "v1"],
                ["offline", "user/vit", folder / "again"],
                ["offline", "user/other", folder / "x"],
                ["offline", "user/vit", folder / "x", "--revision", "v2"],
            ],
            folder / "cache",
            server.server_port,
        )
    return folder, results[:8], list(server.asked), results[8:]


def test_a_name_on_the_hub_is_downloaded_and_converted(downloaded):
    folder, results, _, _ = downloaded
    assert [result["code"] for result in results[:4]] == [0, 0, 0, 0], results[:4]
    wanted = weights_of(folder / "main" / "published_intern_vit_6b")
    for out in ("out", "out_bin"):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights_of(folder / out).items())
    assert "base_model: user/vit" in (folder / "out" / "README.md").read_text()
    assert not (folder / "x").exists()


def test_a_revision_is_taken_by_branch_tag_or_commit(downloaded):
    folder, _, _, _ = downloaded
    wanted = weights_of(folder / "old" / "published_intern_vit_6b")
    for out in ("out_v1", "out_commit"):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights_of(folder / out).items())


def test_only_what_a_conversion_reads_is_downloaded(downloaded):
    _, _, asked, _ = downloaded
    fetched = {path.rpartition("/")[2] for method, path, _, _ in asked if method == "GET" and "/resolve/" in path}
    assert fetched == {
        "config.json",
        "preprocessor_config.json",
        "README.md",
        "model.safetensors",
        "pytorch_model.bin",
    } | (fetched & {"config_without_norm_type.json"})
    pickles = [path for method, path, _, _ in asked if method == "GET" and path.endswith("pytorch_model.bin")]
    assert pickles
    assert all(path.startswith("/user/pickled/") for path in pickles)
    assert not [path for _, path, _, _ in asked if "/resolve/" in path and "onnx" in path]


def test_a_download_that_broke_off_goes_on_where_it_was(downloaded):
    _, _, asked, _ = downloaded
    ranges = [wanted for method, path, wanted, _ in asked if method == "GET" and path.endswith("model.safetensors")]
    started = [int(wanted.removeprefix("bytes=").partition("-")[0]) for wanted in ranges if wanted]
    assert any(start > 0 for start in started), ranges


def test_the_token_of_the_environment_is_sent(downloaded):
    _, _, asked, _ = downloaded
    assert {token for _, path, _, token in asked if path.startswith("/api/")} == {"Bearer hf_secret"}


def test_what_the_hub_refuses_is_said_in_one_line(downloaded):
    _, results, _, _ = downloaded
    revision, gated, nothing, local = results[4:]
    assert [result["code"] for result in results[4:]] == [2, 2, 2, 2]
    assert "no revision `v9`" in revision["error"][0]
    assert "`user/gated` is gated: accept its terms" in gated["error"][0]
    assert "There is no `user/nothing` here, and on the Hub no such repository" in nothing["error"][0]
    assert "`revision` has no effect" in local["error"][0]


def test_offline_the_cache_is_enough_and_what_it_lacks_is_said(downloaded):
    folder, _, asked, offline = downloaded
    assert not [path for _, path, _, _ in asked if "user/other" in path or "v2" in path]
    assert [result["code"] for result in offline] == [0, 2, 2], offline
    assert weights_of(folder / "again").keys() == weights_of(folder / "out").keys()
    assert "offline mode is on" in offline[1]["error"][0]
    assert "`user/vit` at `v2` is not whole" in offline[2]["error"][0]
