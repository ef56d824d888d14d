"""Prints every name that the package imports from transformers and that the transformers found first does not have.

    python tests/versions/imports.py

Exit status 1 if there is one. Reads the sources without importing them, so that one failure does not hide the next.
Imports inside `try` are left out: the code has an answer for their absence.
"""

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
NOT_SHIPPED = {"tests", "benchmarks", "build"}


def shipped_files() -> list[Path]:
    """Every Python file that a user gets: all but tests, benchmarks and hidden folders."""
    paths = (path for path in ROOT.rglob("*.py"))
    return sorted(
        p for p in paths if not any(part in NOT_SHIPPED or part[0] == "." for part in p.relative_to(ROOT).parts)
    )


def required_imports(tree: ast.AST) -> Iterator[ast.ImportFrom | ast.Import]:
    """Import statements anywhere in the file, functions included, but not under `try`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Try):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from required_imports(node)


def transformers_names(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name) for each import from transformers; name is None for `import transformers.x`."""
    for node in required_imports(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name, None) for a in node.names if a.name.split(".")[0] == "transformers")
        elif not node.level and (node.module or "").split(".")[0] == "transformers":
            yield from ((node.lineno, node.module, alias.name) for alias in node.names)


def missing_names() -> list[str]:
    """One line per name that cannot be resolved."""
    missing = []
    for path in shipped_files():
        for line, module, name in transformers_names(path):
            try:
                found = importlib.import_module(module)
                if name is not None and not hasattr(found, name):
                    importlib.import_module(f"{module}.{name}")
            except ImportError:
                missing.append(f"{path.relative_to(ROOT)}:{line}: {module}{'.' + name if name else ''}")
    return missing


if __name__ == "__main__":
    import transformers

    lines = missing_names()
    print(f"transformers {transformers.__version__}: {len(lines)} imported names are missing")
    print("\n".join(lines))
    sys.exit(bool(lines))
