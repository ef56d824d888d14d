"""SOURCE as a name on the Hub, against a stand-in of its API: what is downloaded, goes on, and is refused."""

import io
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants
from safetensors.torch import load_file

from internvl.conversion.__main__ import main

from .fixtures_conversions import assert_same, edited_weights, weights_of
from .fixtures_published import published
from .hub_stand_in import commit_of, hub


@contextmanager
def hub_at(address: str, cache: Path):
    """The settings that the library reads from the environment as it is imported."""
    settings = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
        "DOWNLOAD_CHUNK_SIZE": 2**16,  # of the tiny files here, more than one
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", "hf_secret")
        patch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # the next one looks at the environment again
        yield patch
    close_session()


def call(*arguments) -> tuple[int, str]:
    """Exit code and the one line of an error of the command."""
    error = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(error):
        code = main([str(argument) for argument in arguments])
    lines = [line for line in error.getvalue().splitlines() if line.startswith("error: ")]
    assert len(lines) == (code == 2)
    return code, "".join(lines)


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """Conversions of names on the Hub, and what was asked of it; then the same offline."""
    folder = tmp_path_factory.mktemp("hub")
    newest = published("intern_vit_6b", folder / "main")
    (newest / "modeling_evil.py").write_text("raise SystemExit")
    (newest / "training_args.bin").write_bytes(b"state")
    (newest / "pytorch_model.bin").write_bytes(b"the same in another format")
    (newest / "onnx").mkdir()
    (newest / "onnx" / "model.safetensors").write_bytes(b"another format")
    (newest / "README.md").write_text("---\nlicense: mit\n---\n")
    old = published("intern_vit_6b", folder / "old")
    with edited_weights(old) as tensors:
        tensors |= {name: tensor + 1 for name, tensor in tensors.items()}
    only_bin = published("intern_vit_6b", folder / "bin")
    torch.save(load_file(only_bin / "model.safetensors"), only_bin / "pytorch_model.bin")
    (only_bin / "model.safetensors").unlink()
    revisions = {
        "user/vit": {"main": newest, "v1": old},
        "user/pickled": {"main": only_bin},
        "user/gated": "gated",
    }
    with (
        hub(revisions, breaks={"model.safetensors": 1}) as server,
        hub_at(f"http://127.0.0.1:{server.server_port}", folder / "cache") as settings,
    ):
        results = [
            call("user/vit", folder / "out"),
            call("user/vit", folder / "out_v1", "--revision", "v1"),
            call("user/vit", folder / "out_commit", "--revision", commit_of("v1")),
            call("user/pickled", folder / "out_bin"),
            call("user/vit", folder / "x", "--revision", "v9"),
            call("user/gated", folder / "x"),
            call("user/nothing", folder / "x"),
            call(newest, folder / "x", "--revision", "v1"),
        ]
        settings.setattr(constants, "HF_HUB_OFFLINE", True)
        offline = [
            call("user/vit", folder / "again"),
            call("user/other", folder / "x"),
            call("user/vit", folder / "x", "--revision", "v2"),
        ]
    return folder, results, list(server.asked), offline


def test_a_name_on_the_hub_is_downloaded_and_converted(downloaded):
    folder, results, _, _ = downloaded
    assert [code for code, _ in results[:4]] == [0, 0, 0, 0], results[:4]
    wanted = weights_of(folder / "main" / "published_intern_vit_6b")
    for out in ("out", "out_bin"):
        assert_same(weights_of(folder / out), wanted)
    assert "base_model: user/vit" in (folder / "out" / "README.md").read_text()
    assert not (folder / "x").exists()


def test_a_revision_is_taken_by_branch_tag_or_commit(downloaded):
    folder, _, _, _ = downloaded
    wanted = weights_of(folder / "old" / "published_intern_vit_6b")
    for out in ("out_v1", "out_commit"):
        assert_same(weights_of(folder / out), wanted)


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
    assert {code for code, _ in results[4:]} == {2}
    assert "no revision `v9`" in revision[1]
    assert "`user/gated` is gated: accept its terms" in gated[1]
    assert "There is no `user/nothing` here, and on the Hub no such repository" in nothing[1]
    assert "`revision` has no effect" in local[1]


def test_offline_the_cache_is_enough_and_what_it_lacks_is_said(downloaded):
    folder, _, asked, offline = downloaded
    assert not [path for _, path, _, _ in asked if "user/other" in path or "v2" in path]
    assert [code for code, _ in offline] == [0, 2, 2], offline
    assert weights_of(folder / "again").keys() == weights_of(folder / "out").keys()
    assert "offline mode is on" in offline[1][1]
    assert "`user/vit` at `v2` is not whole" in offline[2][1]
