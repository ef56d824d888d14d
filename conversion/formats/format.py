"""A format of checkpoints: how it is recognised, and what becomes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..readers.damages import DAMAGES, reason_of
from ..readers.source import Source
from ..repository.result import Result
from .key_tables import SAME_NAMES
from .rules import Rule


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout of weights.

    Args:
        name: How it is called in messages.
        result: What becomes of it.
        tensor_names: Tensors that must be there.
        config_keys: Keys of config.json of which one must be there; none where weights came without such a file.
        map_config: Today's configuration, as a dictionary, from the source.
        rules: Its names (left) and today's (right).
        wanted_sizes: `image_size` and `patch_size` to which the published code resizes the tower when it loads, where it does.
        lacks_image_token: Whether its vocabulary has no token for pictures, so that conversion adds one.
        resize_mode: Of a chat model's image processor, where the configuration asks for neither tiles nor padding.
    """

    name: str
    result: Result
    tensor_names: tuple[str, ...]
    config_keys: tuple[str, ...] = ()
    map_config: Callable[[Source], dict[str, Any]]
    rules: tuple[Rule, ...] = SAME_NAMES
    wanted_sizes: Callable[[Source], dict[str, int]] = lambda source: {}
    lacks_image_token: bool = False
    resize_mode: str = "squash"

    def build_config(self, settings: dict[str, Any]) -> Any:
        """Configuration of the result as an object.

        Args:
            settings: Its config.json.

        Raises:
            ValueError: If it is none.
        """
        # Deep copies, because configurations take nested dictionaries apart.
        arguments = {key: value for key, value in settings.items() if key != "model_type"}
        try:
            return self.result.config_class.from_dict(arguments)
        except DAMAGES as error:
            raise ValueError(f"config.json does not describe {self.name}: {reason_of(error)}") from error

    def matches(self, source: Source) -> bool:
        """Whether a source has this layout."""
        has_config = not self.config_keys or any(key in source.config for key in self.config_keys)
        return has_config and all(name in source.tensors for name in self.tensor_names)
