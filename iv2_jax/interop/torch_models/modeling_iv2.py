"""The exported model as a Hugging Face model: `AutoModel.from_pretrained(folder, ...)`.

The network is `model.net`, in plain PyTorch; calling the model calls the network. Weights keep the
original's names, the prefix `net.` is put before them on loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .video import from_config  # the file of the exported family; its others follow


class Iv2Config(PretrainedConfig):
    """Holds `kind` and `model`, from which the network is built.

    Args:
        kind: such as `encoder` or `student`.
        model: the network's sizes and options.
        named: what every config of the library has.
    """

    model_type = "iv2_jax"

    def __init__(
        self, kind: str = "encoder", model: Mapping[str, Any] | None = None, **named: Any
    ) -> None:
        self.kind = kind
        self.model = dict(model or {})
        super().__init__(**named)


class Iv2Model(PreTrainedModel):
    """The network under the library's loading and saving."""

    config_class = Iv2Config
    base_model_prefix = "net"  # files have the network's own names, without `net.`

    def __init__(self, config: Iv2Config) -> None:
        super().__init__(config)
        # The library builds models without memory; tables that are no weights need theirs.
        with torch.device("cpu"):
            self.net = from_config({"kind": config.kind, "model": config.model})

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Calls the network."""
        return self.net(*inputs, **named)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leaves weights as the network's constructor made them; they are meant to be loaded."""

    @staticmethod
    def _fix_state_dict_key_on_load(key: str) -> tuple[str, bool]:
        """Leaves names alone; the library would rename `weight_g` of weight normalisation."""
        return key, False
