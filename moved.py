"""Old names of modules that moved: importing one gives the module under its new name, with one warning.

`python -m internvl.OLD` runs the new one as well.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any


# Old name: new name, both without `internvl.`.
MOVED = {
    "evaluation.examples": "synthetic.examples",
    "evaluation.features": "evaluation.embeddings",
    "evaluation.plots": "reproduction.plots",
    "evaluation.results": "reproduction.report",
    "memory": "planning.memory_command",
    "planner": "planning.memory",
    "training.ablation": "reproduction.ablation",
    "training.broken_rows": "training.data.bad_rows",
    "training.captions": "synthetic.captions",
    "training.collators": "training.data.collators",
    "training.costs": "planning.costs",
    "training.default_phases": "reproduction.phases",
    "training.default_run": "reproduction.run",
    "training.default_tower": "reproduction.tower",
    "training.dialogues": "training.data.dialogues",
    "training.digits": "synthetic.digits",
    "training.funnel": "training.data.filters",
    "training.gradient_cache": "training.models.gradient_cache",
    "training.json_rows": "training.data.json_rows",
    "training.learning_curves": "training.callbacks",
    "training.muon": "training.optimizers",
    "training.objectives": "training.models.losses",
    "training.pair_rows": "training.data.pair_rows",
    "training.pairs": "training.data.pairs",
    "training.parameter_groups": "training.models.parameter_groups",
    "training.parts": "training.models.parts",
    "training.picture_files": "training.data.image_files",
    "training.pretraining": "training.models.pretraining",
    "training.saving": "training.models.saving",
    "training.scenes": "synthetic.scenes",
    "training.shards": "training.data.shards",
    "training.stage1_default": "reproduction.stage1",
    "training.stage2_default": "reproduction.stage2",
    "training.stage3_default": "reproduction.stage3",
    "training.stage_models": "training.models.build",
    "training.texts": "training.data.texts",
    "training.token_labels": "training.models.dense_supervision",
    "training.tokenizer": "synthetic.tokenizer",
    "training.training_model": "training.models.base",
    "training.validation": "training.data.validate",
    "training.whole_folders": "training.models.whole_folders",
}


class MovedModules:
    """Finds a moved module by its old name (an entry of `sys.meta_path`, asked after all others)."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of the old name, None for every other name."""
        package, _, old = name.partition(".")
        if package != __package__ or old not in MOVED:
            return None
        new = f"{package}.{MOVED[old]}"
        warnings.warn(f"{name} is now {new}.", FutureWarning, stacklevel=2)
        # What `python -m` runs takes its relative imports from the name in the spec.
        is_run = sys.argv[:1] == ["-m"] and name in sys.orig_argv
        return ModuleSpec(new if is_run else name, _Alias(new))


class _Alias(Loader):
    """Loads the module called `new`, which keeps its own name and spec."""

    def __init__(self, new: str) -> None:
        self.new = new
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec

    def get_code(self, name: str) -> CodeType | None:
        """Return the new module's code, which `python -m` runs."""
        loader: Any = importlib.util.find_spec(self.new).loader  # type: ignore[union-attr]
        return loader.get_code(self.new)


def install() -> None:
    """Make old names importable."""
    if MovedModules not in sys.meta_path:
        sys.meta_path.append(MovedModules)  # type: ignore[arg-type]


__all__ = ["MOVED", "install"]
