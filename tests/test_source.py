"""What the sources must not hold, read from their syntax trees: things that break remote loading, device maps or
trust."""

import ast
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .fixtures_processes import run_elsewhere


ROOT = Path(__file__).resolve().parents[1]
# The files that `trust_remote_code=True` loads from a folder without sub-folders.
FLAT = sorted(p for p in ROOT.glob("*_*.py") if p.name != "__init__.py")
MODELING = [path for path in FLAT if path.name.startswith("modeling_")]
FOLDERS = "conversion synthetic rows training evaluation export planning publishing reproduction serving"
SUBPACKAGES = [path for folder in FOLDERS.split() for path in sorted((ROOT / folder).rglob("*.py"))]
# The only file that may touch `pickle`; what it does with it has a test of its own.
RESTRICTED_UNPICKLER = ROOT / "conversion" / "readers" / "distributed_metadata.py"
# The only file that starts a process: Python itself, with a script of this package.
STARTER = ROOT / "publishing" / "fresh_process.py"
SHIPPED = sorted(ROOT.glob("*.py")) + SUBPACKAGES
ALLOWED_PACKAGES = {"torch", "transformers", "numpy", "PIL", "einops"} | set(sys.stdlib_module_names)
TENSOR_FACTORIES = set("arange empty eye full linspace ones rand randint randn randperm tensor zeros".split())

each_flat = pytest.mark.parametrize("path", FLAT, ids=lambda path: path.name)
each_modeling = pytest.mark.parametrize("path", MODELING, ids=lambda path: path.name)
each_shipped = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())


@cache
def all_nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def nodes(path: Path, *kinds: type) -> Iterator[ast.AST]:
    return (node for node in all_nodes(path) if isinstance(node, kinds))


def dotted(node: ast.AST) -> str:
    """`torch.load` for the node of `torch.load`; what is not a plain name becomes '?'."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def found(path: Path, selected: Iterator[ast.AST]) -> list[str]:
    return [f"{path.name}:{node.lineno}: {ast.unparse(node)[:80]}" for node in selected]


def is_true(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


def test_the_flat_files_are_found():
    names = {path.name for path in FLAT}
    assert {"configuration_internvl.py", "modeling_internvl_chat.py", "processing_internvl.py"} <= names
    assert not {"__init__.py", "chat.py", "demo.py"} & names


@each_flat
def test_relative_imports_name_one_file_of_the_same_folder(path):
    """The remote loader follows `from .name import X` only."""
    relative = [node for node in nodes(path, ast.ImportFrom) if node.level]
    wrong = [node for node in relative if node.level > 1 or not (ROOT / f"{node.module}.py").is_file()]
    assert not found(path, iter(wrong))


@each_flat
def test_the_loader_sees_exactly_the_real_relative_imports(path):
    """The loader scans the text with a regular expression, so an import line inside a docstring would count."""
    real = {node.module for node in nodes(path, ast.ImportFrom) if node.level}
    assert set(get_relative_imports(path)) == real


@each_flat
def test_flat_files_import_only_the_stated_dependencies(path):
    """And jinja2, optional in transformers too, where it is there: the loader asks for nothing below `if
    is_jinja_available():`."""
    guarded = [
        node
        for branch in nodes(path, ast.If)
        if ast.unparse(branch.test) == "is_jinja_available()"
        for node in branch.body
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "jinja2"
    ]
    lines = {node.lineno for node in guarded}
    absolute = {n.module for n in nodes(path, ast.ImportFrom) if not n.level and n.lineno not in lines}
    absolute |= {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in absolute} <= ALLOWED_PACKAGES
    assert set(get_imports(path)) <= ALLOWED_PACKAGES


@each_shipped
def test_no_underscore_name_comes_from_transformers(path):
    taken = [n for n in nodes(path, ast.ImportFrom) if not n.level and n.module.split(".")[0] == "transformers"]
    private = [n for n in taken if any(part[0] == "_" for part in [*n.module.split("."), *(a.name for a in n.names)])]
    assert not found(path, iter(private))


@each_shipped
def test_nothing_is_evaluated_unpickled_or_started(path):
    calls = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "subprocess", "marshal", "shelve"}
    bad = [node for node in nodes(path, ast.Call) if dotted(node.func) in calls]
    if path == RESTRICTED_UNPICKLER:
        modules.remove("pickle")
    if path == STARTER:
        modules.remove("subprocess")
    bad += [node for node in nodes(path, ast.Import) if modules & {alias.name.split(".")[0] for alias in node.names}]
    bad += [n for n in nodes(path, ast.ImportFrom) if not n.level and n.module.split(".")[0] in modules]
    assert not found(path, iter(bad))


def test_the_one_process_that_is_started_is_python_itself():
    calls = [call for call in nodes(STARTER, ast.Call) if dotted(call.func).startswith("subprocess.")]
    (run,) = calls
    assert ast.unparse(run.args[0]) == "command"
    assert not [keyword for keyword in run.keywords if keyword.arg == "shell"]
    (command,) = [n for n in nodes(STARTER, ast.Assign) if ast.unparse(n.targets[0]) == "command"]
    assert ast.unparse(command.value).startswith("[sys.executable, '-P', str(SCRIPT), ")


def test_the_one_unpickler_decides_itself_what_it_finds():
    """torch.distributed.checkpoint describes its files in a pickle, which torch's own restricted reader cannot
    read."""
    used = [n for n in nodes(RESTRICTED_UNPICKLER, ast.Attribute) if dotted(n).startswith("pickle.")]
    assert {dotted(node) for node in used} == {"pickle.Unpickler", "pickle.UnpicklingError"}
    classes = [c for c in nodes(RESTRICTED_UNPICKLER, ast.ClassDef) if "pickle.Unpickler" in map(dotted, c.bases)]
    assert sum(dotted(node) == "pickle.Unpickler" for node in used) == len(classes) == 1
    methods = {f.name: ast.unparse(f) for f in classes[0].body if isinstance(f, ast.FunctionDef)}
    assert "find_class" in methods
    assert "super().find_class" not in methods["find_class"]


@each_shipped
def test_trust_is_never_handed_on(path):
    """`trust_remote_code=True` inside the package would override the user's No (CVE-2026-4944). handler.py is part of
    the code of the folder that it loads."""
    calls = [call for call in nodes(path, ast.Call) if is_true(call, "trust_remote_code")]
    if path.name == "handler.py":
        calls = [call for call in calls if ast.unparse(call.args[0]) != "folder"]
    assert not found(path, iter(calls))


@each_shipped
def test_torch_load_reads_weights_only(path):
    loads = (call for call in nodes(path, ast.Call) if dotted(call.func) == "torch.load")
    assert not found(path, (call for call in loads if not is_true(call, "weights_only")))


@each_shipped
def test_pil_limits_stay_untouched(path):
    limits = {"MAX_IMAGE_PIXELS", "LOAD_TRUNCATED_IMAGES", "MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY"}
    assert not found(
        path, (n for n in nodes(path, ast.Attribute) if n.attr in limits and isinstance(n.ctx, ast.Store))
    )


@each_modeling
def test_no_model_moves_itself_to_a_device(path):
    calls = (call for call in nodes(path, ast.Call) if isinstance(call.func, ast.Attribute))
    assert not found(path, (call for call in calls if call.func.attr in {"cuda", "cpu"}))


@each_modeling
def test_tensors_made_on_the_way_name_their_device(path):
    """A bare `torch.arange` lands on the default device, which under a device map is not where the layer is."""
    at_construction = {"__init__", "_init_weights"}
    functions = (f for f in nodes(path, ast.FunctionDef) if f.name not in at_construction)
    calls = (n for f in functions for n in ast.walk(f) if isinstance(n, ast.Call))
    made = (c for c in calls if dotted(c.func).startswith("torch.") and dotted(c.func)[6:] in TENSOR_FACTORIES)
    assert not found(path, (call for call in made if "device" not in {k.arg for k in call.keywords}))


@each_modeling
def test_no_cast_follows_the_dtype_of_a_weight_of_another_module(path):
    """A 4-bit weight is stored as uint8, so `x.to(layer.weight.dtype)` destroys x."""
    chains = (n for n in nodes(path, ast.Attribute) if dotted(n).endswith(".weight.dtype"))
    assert not found(path, (n for n in chains if dotted(n) != "self.weight.dtype"))


def test_flash_attn_and_apex_are_imported_nowhere():
    names = {alias.name for path in SHIPPED for node in nodes(path, ast.Import) for alias in node.names}
    names |= {node.module for path in SHIPPED for node in nodes(path, ast.ImportFrom) if not node.level}
    assert not {name for name in names if name.split(".")[0] in {"flash_attn", "apex", "xformers", "timm"}}


def test_configuration_files_open_with_a_copyright_line():
    """One of transformers' own tests skips itself without it."""
    for path in FLAT:
        if path.name.startswith("configuration_"):
            assert path.read_text().startswith("# Copyright 2026 The InternVL package authors"), path.name


def test_model_types_are_none_of_transformers_own():
    """A taken `model_type` silently builds transformers' class where remote code is not trusted."""
    statements = [n for p in FLAT if p.name.startswith("configuration_") for n in nodes(p, ast.Assign)]
    ours = {
        n.value.value for n in statements if dotted(n.targets[0]) == "model_type" and isinstance(n.value, ast.Constant)
    }
    assert {"intern_vit_6b", "internvl_14b", "internvl_chat_model"} <= ours
    assert not ours & set(CONFIG_MAPPING_NAMES)


WATCH_IMPORTS = """
import importlib, json, os, sys
import einops, numpy, PIL.Image, torch, transformers
from transformers import GenerationMixin, PreTrainedModel  # their own lazy imports are not ours to judge
seen = []
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def watch(event, args):
    if event == "open":
        mode, flags = args[1], args[2]
        if any(c in (mode or "") for c in "wax+") or (mode is None and flags & WRITING):
            seen.append(f"{event} {args[0]}")
    elif event.startswith(("socket.connect", "socket.getaddrinfo", "subprocess.", "os.system", "os.mkdir", "os.rename",
                           "os.remove", "os.putenv", "os.exec", "os.fork", "os.posix_spawn")):
        seen.append(f"{event} {args}")
sys.addaudithook(watch)
seen_by = {}
for name in sys.argv[1:]:
    for loaded in [module for module in sys.modules if module.startswith("copied_model.")]:
        del sys.modules[loaded]  # each is the first of its package to be imported
    seen.clear()
    importlib.import_module(f"copied_model.{name}")
    seen_by[name] = list(seen)
print(json.dumps(seen_by))
"""


@pytest.fixture(scope="module")
def seen_by(tmp_path_factory):
    """What importing each file did; the folder is a package of another name, as for the remote loader, without our
    `__init__`."""
    folder = tmp_path_factory.mktemp("imports")
    package = folder / "copied_model"
    package.mkdir()
    (package / "__init__.py").touch()
    for path in FLAT:
        (package / path.name).write_bytes(path.read_bytes())
    names = [path.stem for path in FLAT]
    printed = run_elsewhere(folder, "-B", "-c", WATCH_IMPORTS, *names, PYTHONPATH=str(folder))
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("name", [path.stem for path in FLAT])
def test_importing_writes_connects_and_starts_nothing(name, seen_by):
    assert seen_by[name] == []
