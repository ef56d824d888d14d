"""What serving engines ask of the classes, without an engine; `make engines` runs the engines themselves."""

import re

import pytest

from . import tiny


@pytest.mark.parametrize("decoder", tiny.DECODERS)
@pytest.mark.parametrize("connector", ["patches", "queries_and_patches"])
def test_no_class_has_a_loader_leave_out_a_weight_of_the_whole_model(decoder, connector):
    """vLLM adds the head to the headless class, and drops what that class calls unexpected."""
    weights = tiny.chat_model(decoder, connector).state_dict()
    ignored = tiny.chat_base_model(decoder, connector)._keys_to_ignore_on_load_unexpected
    assert [name for name in weights for pattern in ignored if re.search(pattern, name)] == []
