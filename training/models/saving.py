"""A model in training and its files, which hold a plain `InternVLModel`: its class name, its code, its shapes.

In training the learned scalars, temperature and bias, are vectors of one element, since FSDP2 shards no parameter
without a dimension. In files they have none, as in the published checkpoint.
"""

import os
from typing import Any

import torch
from torch import nn

from ...configuration_internvl import InternVLConfig
from ...modeling_internvl import InternVLModel
from .whole_folders import written_whole


SCALARS = ("logit_scale", "logit_bias")


class SavedAsInternVLModel(InternVLModel):
    """Reads and writes the folders of an `InternVLModel`.

    Args:
        config: The configuration.
    """

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__(config)
        # `from_pretrained` builds on the meta device and compares shapes with the file: it makes vectors afterwards.
        if not self.logit_scale.is_meta:
            self._hold_scalars_as_vectors()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._hold_scalars_as_vectors()
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves an `InternVLModel`, for use without this package; arguments as in transformers. A kill leaves the
        folder with the weights that it had, or with these.
        """
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        for name in SCALARS:
            if name in state_dict:
                state_dict[name] = state_dict[name].reshape([])
        plain = InternVLModel.__new__(InternVLModel)  # no copy: FSDP2 gives the model a class that cannot be copied
        plain.__dict__ = dict(self.__dict__)  # shares the parameters, and lacks only the methods of training
        with written_whole(save_directory, is_main_process) as folder:
            plain.save_pretrained(folder, is_main_process, state_dict, **kwargs)

    def _hold_scalars_as_vectors(self) -> None:
        for name in SCALARS:
            scalar = getattr(self, name, None)
            # DeepSpeed has cut its own up by now, and takes scalars.
            if scalar is not None and not hasattr(scalar, "ds_id"):
                setattr(self, name, nn.Parameter(scalar.detach().reshape(1), scalar.requires_grad))

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """Takes the shapes of files too: this is how `Trainer` goes on from a checkpoint."""
        for name in SCALARS:
            if prefix + name in state_dict:
                state_dict[prefix + name] = state_dict[prefix + name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)
