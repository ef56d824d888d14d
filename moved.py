"""Old names of modules: importing one gives the module under its new name, with one warning.

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


# Modules that kept their name, by old and new folder.
_KEPT_NAMES = {
    ("conversion", "conversion.formats"): "content edits key_tables rules",
    ("conversion.layouts", "conversion.formats"): "image_token llama_decoder native_tables raw_towers recognition",
    ("conversion.output", "conversion.formats"): "native_files published_files",
    ("conversion.output", "conversion.repository"): "publish records sentencepiece_model shards",
    ("conversion.sources", "conversion.formats"): "llava_parts raw_files",
    ("conversion.sources", "conversion.readers"): (
        "adapters checkpoint_files distributed_checkpoints distributed_metadata training_folders zero_checkpoints "
        "zero_files"
    ),
    ("training", "planning"): "cluster costs",
    ("training", "synthetic"): "captions digits scenes tokenizer",
    ("training", "rows"): "json_rows pair_rows shards texts",
    ("training", "training.data"): "collators dialogues pairs",
    ("training.data", "rows"): "bad_rows image_files json_rows pair_rows row_tables shards texts videos",
    ("training", "training.models"): "gradient_cache parameter_groups parts pretraining saving whole_folders",
}
# Old name: new name, both without `internvl.`.
MOVED = {
    **{f"{old}.{name}": f"{new}.{name}" for (old, new), names in _KEPT_NAMES.items() for name in names.split()},
    "conversion.layouts": "conversion.formats",
    "conversion.layouts.hub_layouts": "conversion.formats.hub_settings",
    "conversion.layouts.llava_layouts": "conversion.formats.llava_formats",
    "conversion.layouts.native_layout": "conversion.formats.native_settings",
    "conversion.layouts.raw_layouts": "conversion.formats.raw_formats",
    "conversion.output": "conversion.repository",
    "conversion.output.forms": "conversion.formats.own_format",
    "conversion.output.model_card": "conversion.repository.card",
    "conversion.output.published_layout": "conversion.formats.published_settings",
    "conversion.output.repository": "conversion.repository.processor",
    "conversion.output.tokenizer_files": "conversion.repository.tokenizer",
    "conversion.sources": "conversion.readers",
    "conversion.sources.source": "conversion.readers.opening",
    "conversion.tensors": "conversion.readers.tensors",
    "evaluation.examples": "synthetic.examples",
    "evaluation.features": "evaluation.embeddings",
    "evaluation.plots": "reproduction.plots",
    "evaluation.results": "reproduction.report",
    "memory": "planning.memory",
    "planner": "planning.memory",
    "training.ablation": "reproduction.ablation",
    "training.broken_rows": "rows.bad_rows",
    "training.default_phases": "training.data.generated",
    "training.default_run": "reproduction.run",
    "training.default_tower": "training.models.vision_start",
    "training.funnel": "training.data.filters",
    "training.learning_curves": "training.callbacks",
    "training.muon": "training.optimizers",
    "training.objectives": "training.models.losses",
    "training.picture_files": "rows.image_files",
    "training.stage1_default": "training.recipes.bundled",
    "training.stage2_default": "training.recipes.bundled",
    "training.stage3_default": "training.recipes.bundled",
    "training.stage_models": "training.models.build",
    "training.token_labels": "training.models.dense_supervision",
    "training.training_model": "training.models.base",
    "training.validation": "training.data.validate",
    "visibility_qllama": "attention_masks_qllama",
}


# Old commands, `python -m internvl.OLD`: package, command and options of the new one.
DOORS: dict[str, tuple[str, ...]] = {
    "evaluation.captioning": ("evaluation", "captioning"),
    "evaluation.dialogue": ("evaluation", "dialogue"),
    "evaluation.linear_probe": ("evaluation", "linear_probe"),
    "evaluation.results": ("reproduction", "report"),
    "evaluation.retrieval": ("evaluation", "retrieval"),
    "evaluation.zero_shot": ("evaluation", "zero_shot"),
    "memory": ("planning", "memory"),
    "training.ablation": ("reproduction", "ablation"),
    "training.default_run": ("reproduction", "run"),
    "training.stage1_default": ("training", "stage1", "--scale", "bundled"),
    "training.stage2_default": ("training", "stage2", "--scale", "bundled"),
    "training.stage3_default": ("training", "stage3", "--scale", "bundled"),
}
# Old names of packages; their modules warn.
PACKAGES = ("conversion.layouts", "conversion.output", "conversion.sources")


class MovedModules:
    """Finds a moved module by its old name.

    An entry of `sys.meta_path` that is asked before all others: in a package that is known under two names, these
    would load a module a second time.
    """

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of the old name, None for every other name."""
        package, _, old = name.partition(".")
        if package != __package__:
            return None
        is_run = sys.argv[:1] == ["-m"] and name in sys.orig_argv
        if is_run and old in DOORS:
            folder, *command = DOORS[old]
            warnings.warn(f"{name} is now {package}.{folder} {' '.join(command)}.", FutureWarning, stacklevel=2)
            sys.argv[1:1] = command
            new = f"{package}.{folder}.__main__"
            return ModuleSpec(new, _Alias(new))
        if old not in MOVED:
            return None
        new = f"{package}.{MOVED[old]}"
        if old not in PACKAGES:
            warnings.warn(f"{name} is now {new}.", FutureWarning, stacklevel=2)
        # What `python -m` runs takes its relative imports from the name in the spec.
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
        loader: Any = importlib.util.find_spec(self.new).loader
        return loader.get_code(self.new)


def install() -> None:
    """Make old names importable."""
    if MovedModules not in sys.meta_path:
        sys.meta_path.insert(0, MovedModules)


__all__ = ["DOORS", "MOVED", "PACKAGES", "install"]
