"""Where a run may write: what is in a folder already stays, and is told in one line."""

from pathlib import Path

import pytest

from internvl.kinds import check_weights
from internvl.training import trainer
from internvl.training.checkpoints import recorded
from internvl.training.models.whole_folders import recovered
from internvl.training.output_folder import check_output, cleared_on_failure
from internvl.training.recipes import stage1_small
from internvl.training.stages import Run


RECORD = '{"recipe": {}}'
LOG = "training_log.json"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("names", ['["VICTIM"]', '["../victim"]', '[".."]', "5", "[1]", '[""]', "nonsense"])
def test_a_list_of_names_leads_out_of_no_folder(names, tmp_path):
    victim = write(tmp_path, {"victim/file": "kept"}) / "victim"
    ready = write(tmp_path / "out", {".ready/.names.json": names.replace("VICTIM", str(victim))}) / ".ready"
    (ready / "victim").mkdir()
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="not a list of plain file names"):
        recovered(tmp_path / "out")
    assert files_of(tmp_path) == before


FOREIGN = {
    "a file": {"notes.txt": ""},
    "weights": {"model-00001-of-00002.safetensors": "", "pytorch_model.bin": ""},
    "code in trainer": {"trainer/my_code.py": ""},
    "a finished write of another tool": {".ready/.names.json": "[]"},
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_something_else_is_refused_and_stays(name, resume, tmp_path):
    before = files_of(write(tmp_path / "out", FOREIGN[name]))
    with pytest.raises(ValueError, match="is not empty and holds no run of training, but "):
        trainer.finished_model(stage1_small(), Run(tmp_path / "out", resume=resume))
    assert files_of(tmp_path / "out") == before


def test_a_finished_run_is_not_begun_again_by_mistake(tmp_path):
    before = files_of(write(tmp_path, {LOG: RECORD, "trainer/all/checkpoint-2/x": "", "adapter/y": ""}))
    with pytest.raises(ValueError, match="holds a finished run: take another folder, or delete it"):
        trainer.finished_model(stage1_small(), Run(tmp_path))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("output", ["model", "link", "model/..", "."])
def test_the_output_is_and_holds_nothing_that_is_read(output, tmp_path, monkeypatch):
    write(tmp_path, {"model/config.json": "{}", f"model/{LOG}": RECORD, LOG: RECORD, "data.jsonl": ""})
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="take another folder"):
        check_output(Path(output), ["org/name", None, "model"])
    if output == ".":
        with pytest.raises(ValueError, match=r"holds data\.jsonl, which the run reads"):
            check_output(Path(output), ["data.jsonl"])


def test_a_folder_in_that_of_the_model_is_written_to(tmp_path, monkeypatch):
    write(tmp_path, {"config.json": "{}", "out/stopped/trainer/run.json": RECORD})
    write(tmp_path, {"out/begun/trainer/.run.json.123": ""})  # a kill as the record was written
    (tmp_path / "out/begun/trainer/all").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("new", "stopped", "begun"):
        check_output(Path("out", name), ["."])


@pytest.mark.parametrize("own", [{}, {"trainer/run.json": RECORD, "trainer/my_code.py": ""}])
def test_a_failed_start_takes_away_what_a_run_wrote_alone(own, tmp_path):
    output = tmp_path / "out"
    write(output, own)

    def start() -> None:
        with cleared_on_failure(output, ["all"], is_writer=True):
            write(output, {"trainer/all/samples.jsonl": "", "trainer/run.json": RECORD})
            raise OSError("failed")

    with pytest.raises(OSError, match="failed"):
        start()
    assert (files_of(output) if output.exists() else {}).keys() == own.keys() - {"trainer/run.json"}
    assert output.exists() == bool(own)


@pytest.mark.parametrize("file", [LOG, "trainer/run.json"])
@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"recipe": 5}', '{"recipe": {"phases": [1]}}', "{", '{"recipe": {}, "settings": 1}']
)
def test_a_broken_record_is_told_by_its_name(text, file, tmp_path):
    write(tmp_path, {file: text})
    with pytest.raises(ValueError, match=file):
        recorded(tmp_path)


def test_weights_that_are_cut_off_are_told_by_their_name(tmp_path):
    write(tmp_path, {"model.safetensors": "\0" * 4})
    with pytest.raises(ValueError, match=r"model\.safetensors ends too early"):
        check_output(tmp_path / "out", [tmp_path])
    check_weights("org/name")
