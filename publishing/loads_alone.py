"""Loads one model of a repository as its users do, and prints what was wrong with the weights.

Run as a file by `fresh_process.py`, so that this package is not imported: `python -P loads_alone.py FOLDER SUBFOLDER`.
Code of the repository is run.
"""

import json
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def model_class(folder: str, subfolder: str) -> Any:
    """The class that loads every weight: the Auto class of the architecture, or the architecture itself."""
    config = json.loads(Path(folder, subfolder, "config.json").read_text(encoding="utf-8"))
    (architecture, *_) = config["architectures"]
    auto_map = config.get("auto_map") or {}
    autos = [name for name, reference in auto_map.items() if reference.rpartition(".")[2] == architecture]
    if autos and autos[0] != "AutoBackbone":
        return getattr(transformers, autos[0])
    if auto_map:
        module = next(iter(auto_map.values())).partition(".")[0].replace("configuration", "modeling")
        module = next((name for name in auto_map.values() if "modeling" in name), module).partition(".")[0]
        return get_class_from_dynamic_module(f"{module}.{architecture}", folder)
    return getattr(transformers, architecture)


def main(folder: str, subfolder: str) -> None:
    """Prints a line of JSON: names of tensors by what is wrong with them."""
    place: dict[str, Any] = {"subfolder": subfolder, "trust_remote_code": True}
    # On the meta device no weight is read: names and shapes are compared with the files.
    settings: dict[str, Any] = {"dtype": "auto", "device_map": "meta", "ignore_mismatched_sizes": True}
    _, found = model_class(folder, subfolder).from_pretrained(folder, **place, **settings, output_loading_info=True)
    files = {file.name for file in Path(folder, subfolder).iterdir()}
    if "processor_config.json" in files:
        transformers.AutoProcessor.from_pretrained(folder, **place)
    elif "preprocessor_config.json" in files:
        transformers.AutoImageProcessor.from_pretrained(folder, **place)
    if "tokenizer_config.json" in files:
        transformers.AutoTokenizer.from_pretrained(folder, **place)
    sys.stdout.write(json.dumps({name: sorted(map(str, names)) for name, names in found.items()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
