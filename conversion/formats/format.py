"""A format of checkpoints: how one is recognised and how it is read. Formats that can be written extend `Format`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..readers.damages import DAMAGES, reason_of
from ..readers.source import Source
from ..repository.result import Result
from .rules import SAME_NAMES, TensorRule


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format. It is recognised by keys of config.json and names of tensors, never by the name of a folder.

    Args:
        name: Its name in messages.
        result: The kind of model that it holds.
        tensor_names: Tensors that must be there.
        config_keys: Keys of config.json, one of which must be there; empty where weights came without such a file.
        map_config: Builds this package's config.json, as a dictionary, from a source.
        rules: Names of tensors in this format (left) and in this package (right).
        wanted_sizes: `image_size` and `patch_size` to which the published code resizes the tower when it loads.
        lacks_image_token: Whether its vocabulary has no image token, so that conversion adds one.
        resize_mode: Resize mode of a chat model whose configuration asks for neither tiles nor padding.
    """

    # The value of `--to` that writes it; empty where it is only read.
    to: ClassVar[str] = ""

    name: str
    result: Result
    tensor_names: tuple[str, ...]
    config_keys: tuple[str, ...] = ()
    map_config: Callable[[Source], dict[str, Any]]
    rules: tuple[TensorRule, ...] = SAME_NAMES
    wanted_sizes: Callable[[Source], dict[str, int]] = lambda source: {}
    lacks_image_token: bool = False
    resize_mode: str = "squash"

    def matches(self, source: Source) -> bool:
        """Whether a source has this format."""
        has_config = not self.config_keys or any(key in source.config for key in self.config_keys)
        return has_config and all(name in source.tensors for name in self.tensor_names)

    def build_config(self, settings: dict[str, Any]) -> Any:
        """Builds the configuration object of the result.

        Raises:
            ValueError: If the settings describe no such model.
        """
        # `from_dict` copies deeply; configurations take nested dictionaries apart.
        arguments = {key: value for key, value in settings.items() if key != "model_type"}
        try:
            return self.result.config_class.from_dict(arguments)
        except DAMAGES as error:
            raise ValueError(f"config.json does not describe {self.name}: {reason_of(error)}") from error

    def describe(self) -> str:
        """Names the format and what it is recognised by."""
        keys = f"config.json with `{'` or `'.join(self.config_keys)}`, " if self.config_keys else ""
        return f"{self.name} ({keys}tensors {', '.join(self.tensor_names)})"
