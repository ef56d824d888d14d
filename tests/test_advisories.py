"""Known vulnerabilities of the dependencies: which input reaches them, and what closes each.

Source: the CVE records, the GitHub advisory database, PyPA's advisory database and Pillow's release notes, in November
2026. A vulnerability that input can reach is closed by the floor in pyproject.toml. One that the package cannot reach,
because it never calls the code, names the test that shows it. To add an advisory, add a row, then raise the floor.
"""

import ast
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from internvl.rows.videos import CODECS

from .test_source import ROOT, SHIPPED, dotted, found, nodes


class Advisory(NamedTuple):
    """A known vulnerability.

    Args:
        package: Name on PyPI.
        id: CVE, GitHub advisory, or a report if there is neither.
        fixed: The first release without it.
        hole: What is wrong.
        reached_by: The input of ours that gets there.
    """

    package: str
    id: str
    fixed: str
    hole: str
    reached_by: str


IMAGES, WEIGHTS, CONFIGS = "an image", "a checkpoint's weights", "a checkpoint's configuration"
CLOSED_BY_FLOOR = [
    Advisory("pillow", "CVE-2026-112403", "13.0.0", "JPEG decoder writes past its buffer", IMAGES),
    Advisory("pillow", "CVE-2026-112398", "13.0.0", "FPX: JPEG tiles write past the buffer", IMAGES),
    Advisory("pillow", "CVE-2026-112395", "13.0.0", "tiled TIFF is read past its buffer", IMAGES),
    Advisory("pillow", "GHSA-q45j-58j2-45rg", "13.0.0", "TIFF with short JPEG strips shows foreign memory", IMAGES),
    Advisory("pillow", "GHSA-78g4-xqwv-q3g8", "13.0.0", "bundled OpenJPEG writes past its buffer", IMAGES),
    Advisory("pillow", "CVE-2026-96639", "13.0.0", "storage of an image is used after its mode changed", IMAGES),
    Advisory("pillow", "CVE-2026-96643", "13.0.0", "EXIF headers are replaced without end", IMAGES),
    Advisory("pillow", "CVE-2026-96644", "13.0.0", "WMF and EMF are read past their buffer", IMAGES),
    Advisory("pillow", "CVE-2026-96637", "13.0.0", "SPIDER: a later frame escapes the pixel limit", IMAGES),
    Advisory("pillow", "CVE-2026-96636", "13.0.0", "MPO and DCX: a later frame escapes the pixel limit", IMAGES),
    Advisory("pillow", "CVE-2026-54058", "12.3.0", "McIdas is read past its buffer", IMAGES),
    Advisory("pillow", "CVE-2026-59199", "12.3.0", "pasting and cropping write past the image", IMAGES),
    Advisory("pillow", "CVE-2026-59203", "12.3.0", "EPS header is read without end", IMAGES),
    Advisory("pillow", "CVE-2026-59204", "12.3.0", "JPEG 2000 takes memory without limit", IMAGES),
    Advisory("pillow", "CVE-2026-40192", "12.2.0", "FITS is unpacked without limit", IMAGES),
    Advisory("pillow", "CVE-2026-42311", "12.2.0", "PSD tile extents overflow and write past the image", IMAGES),
    Advisory("pillow", "CVE-2026-25990", "12.1.1", "PSD tile extents write past the image", IMAGES),
    Advisory("torch", "CVE-2026-24747", "2.10.0", "`torch.load` with `weights_only` corrupts memory", WEIGHTS),
    Advisory("torch", "CVE-2025-32434", "2.6.0", "`torch.load` with `weights_only` runs code", WEIGHTS),
    Advisory("accelerate", "CVE-2026-69112", "1.15.0", "`weight_map` names files outside the folder", WEIGHTS),
    Advisory(
        "transformers", "CVE-2026-80047", "5.17.0", "`custom_generate` is written before consent", "a repository"
    ),
    Advisory("transformers", "CVE-2026-9856", "5.10.0", "names of chat templates write files anywhere", CONFIGS),
    Advisory("transformers", "CVE-2026-4372", "5.3.0", "`_attn_implementation_internal` runs kernels", CONFIGS),
    Advisory("transformers", "CVE-2026-5241", "5.3.0", "a nested configuration says yes to remote code", CONFIGS),
    Advisory("jinja2", "CVE-2025-27516", "3.1.6", "`|attr` leaves the sandbox", "a checkpoint's chat template"),
    Advisory("jinja2", "CVE-2024-56326", "3.1.5", "`str.format` leaves the sandbox", "a checkpoint's chat template"),
    Advisory("av", "CVE-2026-40962", "17.1.0", "FFmpeg before 8.1: encrypted MP4 writes past its buffer", "a video"),
    Advisory("datasets", "CVE-2026-57845", "5.2.0", "the pandas builder unpickles files", "a data set of the Hub"),
    Advisory("huggingface_hub", "issue 4086", "1.26.0", "`..` in a file name leaves the folder", "a repository"),
]
NEVER_REACHED = {  # by the test that says so
    "test_no_compiled_program_is_loaded": [
        Advisory("torch", "CVE-2026-4538", "2.11.0", "loading a `.pt2` runs code", WEIGHTS),
        Advisory("torch", "CVE-2025-3000", "2.13.0", "`torch.jit.script` corrupts memory", WEIGHTS),
        Advisory("onnx", "CVE-2026-34447", "1.21.0", "external data is read through links", WEIGHTS),
        Advisory("onnx", "CVE-2026-34445", "1.21.0", "external data overwrites attributes", WEIGHTS),
    ],
    "test_rows_are_read_by_our_own_readers": [
        Advisory("pyarrow", "CVE-2026-92287", "26.0.0", "Parquet names the server that has its keys", "a data row"),
    ],
    "test_no_model_is_read_by_sentencepiece": [
        Advisory("sentencepiece", "CVE-2026-1260", "0.2.1", "a crafted model writes past its buffer", "a tokenizer"),
    ],
    "test_videos_are_decoded_by_the_listed_codecs_alone": [
        Advisory("av", "CVE-2026-8461", "18.0.0", "FFmpeg before 8.1.2: MagicYUV writes past its buffer", "a video"),
    ],
    "test_no_form_is_read_and_no_file_is_served": [
        Advisory("starlette", "CVE-2026-54283", "1.3.1", "limits of forms are ignored", "a request"),
        Advisory("starlette", "CVE-2025-62727", "0.49.1", "`Range` of a file costs quadratic time", "a request"),
        Advisory("starlette", "CVE-2025-54121", "0.47.2", "a large form blocks the event loop", "a request"),
    ],
    "test_scikit_learn_reads_no_text": [
        Advisory("scikit-learn", "CVE-2024-5206", "1.5.0", "TfidfVectorizer keeps words it should drop", "a caption"),
    ],
    "test_only_the_progress_bar_of_tqdm_is_used": [
        Advisory("tqdm", "CVE-2024-34062", "4.66.3", "options of its command line run code", "a command line"),
    ],
}
# Floors that have another reason than an advisory: what was tested, and what the lowest transformers asks for.
OTHER_REASONS = {"transformers", "huggingface_hub"}


def floors() -> dict[str, Version]:
    """The lowest release of each package that pyproject.toml allows; those for tests only are left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [line for name in extras.keys() - {"test", "dev"} for line in extras[name]]
    lowest = {}
    for requirement in map(Requirement, lines):
        if requirement.name == "internvl":
            continue
        (version,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
        lowest[requirement.name.lower()] = version
    return lowest


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {r.name.lower().replace("_", "-"): Version(next(iter(r.specifier)).version) for r in requirements}


def identity(advisory: Advisory) -> str:
    return f"{advisory.package} {advisory.id}"


@pytest.mark.parametrize("advisory", CLOSED_BY_FLOOR, ids=identity)
def test_the_floor_shuts_out_every_release_with_the_hole(advisory):
    assert floors()[advisory.package] >= Version(advisory.fixed), advisory


@pytest.mark.parametrize("advisory", [*CLOSED_BY_FLOOR, *chain(*NEVER_REACHED.values())], ids=identity)
def test_what_is_pinned_has_no_known_hole(advisory):
    assert pins()[advisory.package.replace("_", "-")] >= Version(advisory.fixed), advisory


@pytest.mark.parametrize("package", sorted({a.package for a in CLOSED_BY_FLOOR} - OTHER_REASONS))
def test_no_floor_is_higher_than_its_advisories_ask(package):
    assert floors()[package] == max(Version(a.fixed) for a in CLOSED_BY_FLOOR if a.package == package)


@pytest.mark.parametrize("name", NEVER_REACHED)
def test_the_test_of_a_hole_that_is_never_reached_is_here(name):
    assert name in globals()


def shipped_names() -> Iterator[tuple[Path, str, ast.AST]]:
    """Every dotted name that a shipped file imports or uses."""
    for path in SHIPPED:
        for node in nodes(path, ast.Attribute, ast.Import, ast.ImportFrom):
            if isinstance(node, ast.Attribute):
                yield path, dotted(node), node
            elif isinstance(node, ast.Import):
                yield from ((path, alias.name, node) for alias in node.names)
            elif not node.level:
                yield from ((path, f"{node.module}.{alias.name}", node) for alias in node.names)


def uses_of(*beginnings: str) -> list[str]:
    return [
        line for path, name, node in shipped_names() if name.startswith(beginnings) for line in found(path, [node])
    ]


def test_no_compiled_program_is_loaded():
    assert not uses_of("torch.package", "torch._inductor", "torch._export", "torch.hub", "onnx.load")
    asked = {line.rpartition(" ")[2] for line in uses_of("torch.jit")}
    assert asked <= {"torch.jit", "torch.jit.is_tracing"}
    written = {line.rpartition(" ")[2] for line in uses_of("torch.export")}
    assert written <= {"torch.export", "torch.export.export", "torch.export.save", "Dim"}


def test_rows_are_read_by_our_own_readers():
    """Builders of `datasets` read sources of dialogues alone, and Parquet is read without encryption keys.

    Rows that are in memory are handed to MTEB as its data sets.
    """
    doors = uses_of("datasets.load_dataset", "datasets.load_from_disk", "datasets.Dataset.from_", "datasets.builder")
    in_memory = set(uses_of("datasets.Dataset.from_dict"))
    assert {line.partition(":")[0] for line in in_memory} == {"mteb.py"}
    assert {line.partition(":")[0] for line in set(doors) - in_memory} == {"row_tables.py"}
    assert not uses_of("pandas", "pyarrow.parquet.encryption", "pyarrow.parquet_encryption")
    calls = [node for path in SHIPPED for node in nodes(path, ast.Call)]
    assert not [c for c in calls if {k.arg for k in c.keywords} & {"decryption_properties", "decryption_config"}]


def test_no_model_is_read_by_sentencepiece():
    """A tokenizer.model is read by `sentencepiece_model.py` alone."""
    assert not uses_of("sentencepiece.", "sentencepiece_")


def test_scikit_learn_reads_no_text():
    assert not uses_of("sklearn.feature_extraction")


def test_videos_are_decoded_by_the_listed_codecs_alone():
    """A hostile video of another one is refused in test_videos.py."""
    assert {line.partition(":")[0] for line in uses_of("av.open")} == {"videos.py"}
    assert "h264" in CODECS.split(",")
    assert "magicyuv" not in CODECS.split(",")


def test_no_form_is_read_and_no_file_is_served():
    """The embeddings API reads JSON; that LitServe's own endpoint is not there is tested with it."""
    assert uses_of("request.body")
    assert not uses_of("request.form", "starlette.staticfiles", "fastapi.staticfiles")
    assert not [name for _, name, _ in shipped_names() if name.endswith((".FileResponse", ".StaticFiles"))]


def test_only_the_progress_bar_of_tqdm_is_used():
    assert uses_of("tqdm.tqdm")
    assert not uses_of("tqdm.cli", "tqdm.main")


def test_the_names_are_found():
    """Otherwise the tests above would pass for any sources."""
    assert {"tqdm.tqdm", "torch.load", "datasets.distributed.split_dataset_by_node"} <= {
        n for _, n, _ in shipped_names()
    }
    assert uses_of("torch.load")


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_and_keep_no_credentials(path):
    lines = path.read_text().splitlines()
    uses = [line.split("uses:")[1].strip() for line in lines if "uses:" in line]
    assert uses
    for action in uses:
        commit, _, version = action.partition("@")[2].partition(" # v")
        assert len(commit) == 40, action
        assert int(commit, 16), action
        assert Version(version), action
    checkouts = sum("actions/checkout@" in line for line in lines)
    assert sum("persist-credentials: false" in line for line in lines) == checkouts
    assert "permissions:\n  contents: read\n" in path.read_text()


def test_the_policy_names_this_table_and_how_to_report():
    policy = (ROOT / "SECURITY.md").read_text()
    assert "tests/test_advisories.py" in policy
    assert "Report" in policy
