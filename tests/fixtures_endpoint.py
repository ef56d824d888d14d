"""handler.py, loaded as Inference Endpoints load it."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

import internvl

from .conftest import ROOT


def load_handler(folder: Path, subfolder: str = "") -> Any:
    """The endpoint of a folder, by the classes of this package."""
    internvl.register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_SUBFOLDER", subfolder)
        spec = importlib.util.spec_from_file_location("handler.EndpointHandler", ROOT / "handler.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "handler.EndpointHandler", module)
        spec.loader.exec_module(module)
        return module.EndpointHandler(str(folder))
