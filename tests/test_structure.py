"""The architecture, read from the sources: folders stand above what they import, a public name means one thing, files
and functions stay short."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"tests", "examples", "build"}
SOURCES = {
    path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
    if not any(part.startswith(".") or part in OUTSIDE for part in path.relative_to(ROOT).parts)
}
# What starts a command, and what gives the rows of a topic of the benchmarks, has the same name everywhere.
ENTRY_POINTS = {"main", "run", "rows"}

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.as_posix())


def imported_files(path: Path) -> Iterator[Path]:
    """The files of the package that a file imports, in functions too."""
    for node in ast.walk(SOURCES[path]):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for target in (base, *(base / alias.name for alias in node.names)):
            files = (target.parent / f"{target.name}.py", target / "__init__.py")
            yield from (file for file in files if file in SOURCES)


def room(path: Path) -> str:
    """A folder, or a file of the root."""
    return path.parent.as_posix() if len(path.parts) > 1 else path.stem


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def graph_of(name_of) -> dict[str, set[str]]:
    graph = defaultdict(set)
    for path in SOURCES:
        graph[name_of(path)] |= {name_of(target) for target in imported_files(path)} - {name_of(path)}
    return graph


def test_the_graph_of_folders_is_read():
    """Else it would have no circles either."""
    assert "synthetic" in graph_of(room)["evaluation"]
    assert "conversion" not in graph_of(room)["synthetic"]
    assert len(cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == 4


@pytest.mark.parametrize("name_of", [room, Path.as_posix], ids=["folders", "files"])
def test_imports_run_in_no_circle(name_of):
    assert not cycle_in(graph_of(name_of))


def test_nothing_imports_the_reproduction_of_the_bundled_models():
    assert not [name for name, targets in graph_of(room).items() if "reproduction" in targets]


def test_generated_scenes_know_nothing_of_the_models():
    assert graph_of(room)["synthetic"] <= {"extras"}


def test_a_public_name_is_defined_once():
    places = defaultdict(list)
    for path, tree in SOURCES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places[node.name].append(path.as_posix())
    assert not {name: files for name, files in places.items() if len(files) > 1 and name not in ENTRY_POINTS}


@each_source
def test_files_and_functions_stay_short(path):
    assert (ROOT / path).read_text(encoding="utf-8").count("\n") <= 620
    functions = [n for n in ast.walk(SOURCES[path]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = [(function.end_lineno - function.lineno + 1, function.name) for function in functions]
    assert max(lines, default=(0, ""))[0] <= 60, max(lines)


def test_test_files_stay_short():
    lines = {path.name: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "tests").rglob("*.py")}
    assert not {name: number for name, number in lines.items() if number > 800}
