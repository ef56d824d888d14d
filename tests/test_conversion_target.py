"""OUT is the old folder or the new one, complete, and nothing else changes."""

import importlib
import shutil
from pathlib import Path

import pytest

from internvl.conversion.__main__ import main
from internvl.conversion.repository import target
from internvl.conversion.repository.shards import write_shards

from .fixtures_conversions import edit_json, run, state_of


CONVERT = importlib.import_module("internvl.conversion.convert")  # not the function of that name


# ---------------------------------------------------------------------------------------------- complete or not at all
def test_an_empty_folder_is_used_and_another_replaced_only_when_asked(vit, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run(vit, out)
    shutil.rmtree(out)
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OSError, match="--overwrite"):
        run(vit, out)
    assert state_of(out).keys() == {"precious.txt"}
    run(vit, out, overwrite=True)
    assert "precious.txt" not in state_of(out)
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("place", [".", ".."])
def test_the_source_is_never_the_target(place, vit):
    before = state_of(vit)
    with pytest.raises(ValueError, match="must be a folder of its own"):
        run(vit, vit / place, overwrite=True)
    assert state_of(vit) == before


def test_a_failed_run_leaves_nothing_and_keeps_what_was_there(vit, tmp_path, monkeypatch):
    out = run(vit, tmp_path / "out")
    before = state_of(out)

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CONVERT, "write_shards", full)
    with pytest.raises(OSError, match="No space left"):
        run(vit, out, overwrite=True)
    assert state_of(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", vit.name}


def left_by_a_killed_run(folder: Path, **content: str) -> Path:
    """What lies beside `out` when the process was killed: a folder of that run, whose lock nobody holds."""
    left = folder / ".out.0123abcd.incomplete"
    left.mkdir()
    (left / "conversion.lock").touch()
    for name, text in content.items():
        (left / name).mkdir()
        (left / name / "file.txt").write_text(text)
    return left


def test_what_a_killed_run_left_is_swept_away(vit, tmp_path):
    left = left_by_a_killed_run(tmp_path, new="half")
    out = run(vit, tmp_path / "out")
    assert not left.exists()
    assert not (out / "file.txt").exists()
    left_by_a_killed_run(tmp_path)  # before it had written anything
    run(vit, out, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", vit.name}


def test_a_run_killed_while_replacing_loses_nothing(vit, tmp_path):
    """Where the system cannot exchange two folders in one step, the old one is away for a moment."""
    left_by_a_killed_run(tmp_path, new="new", old="mine")
    edit_json(vit / "preprocessor_config.json", size="broken")
    with pytest.raises(ValueError, match="size"):
        run(vit, tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"file.txt": "mine"}


@pytest.mark.parametrize("exchanges", [True, False])
def test_replacing_gives_the_new_folder_alone(exchanges, vit, tmp_path, monkeypatch):
    out = run(vit, tmp_path / "out")
    (out / "old.txt").write_text("old")
    if not exchanges:
        monkeypatch.setattr(target, "_exchange", lambda left, right: False)
    run(vit, out, overwrite=True)
    assert not (out / "old.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", vit.name}


@pytest.mark.parametrize("name", [".out.incomplete", ".out.replaced", ".out.0123abcd.incomplete", ".out.lock"])
def test_a_folder_of_the_users_own_is_left_alone_whatever_its_name(name, vit, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious.txt").write_text("mine")
    run(vit, tmp_path / "out")
    run(vit, tmp_path / "out", overwrite=True)
    assert (tmp_path / name / "precious.txt").read_text() == "mine"


def test_a_second_run_to_one_place_is_refused_and_the_first_is_whole(vit, tmp_path, capsys, monkeypatch):
    codes = []

    def meanwhile(*arguments, **settings):
        codes.append(main([str(vit), str(tmp_path / "out"), "--overwrite"]))
        return write_shards(*arguments, **settings)

    monkeypatch.setattr(CONVERT, "write_shards", meanwhile)
    out = run(vit, tmp_path / "out")
    assert codes == [2]
    assert "Another conversion is writing OUT" in capsys.readouterr().err
    monkeypatch.undo()
    assert state_of(out) == state_of(run(vit, tmp_path / "again"))


def test_what_came_to_the_place_meanwhile_is_kept(vit, tmp_path, monkeypatch):
    def meanwhile(*arguments, **settings):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious.txt").write_text("mine")
        return write_shards(*arguments, **settings)

    monkeypatch.setattr(CONVERT, "write_shards", meanwhile)
    with pytest.raises(FileExistsError, match="not empty"):
        run(vit, tmp_path / "out")
    assert state_of(tmp_path / "out").keys() == {"precious.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", vit.name}


@pytest.mark.parametrize(
    "out", [".", "..", "/", "{vit}/part", "{vit}/../{name}/part", "file", "circle", "link/part/..", "link"]
)
def test_places_that_cannot_be_replaced_are_refused_in_one_line(out, vit, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work" / "here"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    (work / "file").touch()
    (work / "circle").symlink_to("circle")
    (work / "link").symlink_to(vit)
    (vit / "part").mkdir()
    (vit / "part" / "precious.txt").write_text("mine")
    before = state_of(tmp_path)
    assert main([str(vit), out.format(vit=vit, name=vit.name), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: OUT (`")
    assert error.count("\n") == 1
    assert state_of(tmp_path) == before


def test_a_new_folder_within_the_source_is_one_of_its_own(vit, tmp_path):
    before = state_of(vit)
    out = run(vit, vit / "out")
    assert {name: digest for name, digest in state_of(vit).items() if not name.startswith("out/")} == before
    with pytest.raises(ValueError, match="is a part of the input"):
        run(vit, out, overwrite=True)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_one_and_what_it_leads_to_is_written(is_there, vit, tmp_path):
    if is_there:
        (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    run(vit, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "real", vit.name}


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(vit, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs 605\.8 kB, but the disk of .* has 1\.0 kB left"):
        run(vit, tmp_path / "out")
    assert not (tmp_path / "out").exists()
