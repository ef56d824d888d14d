"""Renamed arguments, attributes and module names: the old one still works and warns whoever wrote it, once."""

import argparse
import inspect
import sys
import warnings
from dataclasses import dataclass, replace
from types import ModuleType

import pytest

from internvl.renaming_internvl import (
    RenamedOption,
    renamed_arguments,
    renamed_attribute,
    renamed_names,
    with_new_names,
)


@renamed_arguments(rates="learning_rates", pictures="images")
def call(learning_rates, *, images=()):
    return learning_rates, images


@renamed_arguments(rates="learning_rates")
@dataclass(frozen=True)
class Recipe:
    learning_rates: tuple = (1,)
    steps: int = 2


class Model:
    pictures = renamed_attribute("images")

    def __init__(self):
        self.images = 1


@pytest.fixture
def module():
    module = ModuleType("a_module")
    module.generate_captions = len
    module.__getattr__ = renamed_names(vars(module), describe="generate_captions")
    return module


def warned(work, old, new):
    """What `work` gives; it warns once, of these names and of this file."""
    with pytest.warns(FutureWarning, match=f"`{old}` is now called `{new}`") as record:
        result = work()
    assert [warning.filename for warning in record] == [__file__]
    return result


def test_a_function_takes_the_old_name():
    assert warned(lambda: call(rates=3), "rates", "learning_rates") == call(3) == (3, ())
    assert warned(lambda: call(3, pictures=[4]), "pictures", "images") == (3, [4])
    assert list(inspect.signature(call).parameters) == ["learning_rates", "images"]


def test_both_names_at_once_are_refused():
    with pytest.raises(TypeError, match=r"both `rates` and `learning_rates`.*Give `learning_rates` only"):
        call(learning_rates=1, rates=2)


def test_a_dataclass_takes_and_has_the_old_name():
    recipe = warned(lambda: Recipe(rates=(5,)), "rates", "learning_rates")
    assert recipe == Recipe((5,))
    assert warned(lambda: recipe.rates, "rates", "learning_rates") == (5,)


def test_replace_takes_the_old_name_of_a_field():
    with pytest.warns(FutureWarning, match="`Recipe`: `rates` is now called `learning_rates`"):
        assert replace(Recipe((5,), steps=7), rates=(6,)) == Recipe((6,), steps=7)


def test_an_attribute_is_read_and_set_under_its_old_name():
    model = Model()
    assert warned(lambda: model.pictures, "pictures", "images") == 1
    warned(lambda: setattr(model, "pictures", 2), "pictures", "images")
    assert model.images == 2
    assert vars(model) == {"images": 2}


def test_a_module_has_its_old_names(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "a_module", module)
    assert warned(lambda: module.describe, "describe", "generate_captions") is len

    def take():
        from a_module import describe

        return describe

    with pytest.warns(FutureWarning, match="`describe` is now called `generate_captions`"):
        assert take() is len
    with pytest.raises(AttributeError, match="module 'a_module' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_keys_of_a_configuration_are_renamed():
    def read():
        return (lambda **keys: with_new_names(keys, {"decay": "cooldown_fraction"}, "`config.json`"))(
            decay=0.2, steps=1
        )

    assert warned(read, "decay", "cooldown_fraction") == {"cooldown_fraction": 0.2, "steps": 1}


def test_an_option_is_read_under_its_old_name():
    parser = argparse.ArgumentParser(prog="tool")
    parser.add_argument("--max-tiles", default=1, type=int)
    parser.add_argument("--tiles", dest="max_tiles", action=RenamedOption, type=int, help=argparse.SUPPRESS)
    assert parser.parse_args([]).max_tiles == 1
    with pytest.warns(FutureWarning, match="`tool`: `--tiles` is now called `--max-tiles`"):
        assert parser.parse_args(["--tiles", "3"]).max_tiles == 3
    assert "--tiles" not in parser.format_help()


def test_new_names_and_lists_of_attributes_warn_of_nothing(module):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(learning_rates=1) == (1, ())
        assert replace(Recipe(), steps=3).learning_rates == (1,)
        assert module.generate_captions is len
        inspect.getmembers(Model)
        inspect.getmembers(Recipe)
