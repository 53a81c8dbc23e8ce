"""LoRA adapters in memory, as those on disk: the same checks, the same names, the same merge."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from awd_fast.adapter_config import make_config
from awd_fast.adapters import StoredAdapter
from awd_fast.plan import StateDict


class HeldAdapter(StoredAdapter):
    """An adapter whose tensors lie in memory, on any device, under the names that PEFT would save them by.

    label: what messages call it. config: what PEFT would write as adapter_config.json, parsed. scales: by module, what
    B @ A is multiplied by where that is not what the configuration says, because somebody set it. Nothing is copied, so
    the tensors must not change meanwhile. Raises InputError as `StoredAdapter`, and where a tensor is not dense or has
    no values.
    """

    def __init__(
        self, label: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], scales: Mapping[str, float]
    ) -> None:
        super().__init__(label, label, make_config(label, config), _Held(label, tensors))
        for name, module in self.modules.items():
            self.modules[name] = replace(module, scale=scales.get(name, module.scale))


class _Held:
    """Tensors of memory as `awd_fast.adapters.Store`."""

    def __init__(self, label: str, tensors: Mapping[str, Tensor]) -> None:
        self._state = StateDict(label, tensors)
        self.tensors = self._state.tensors

    def read(self, name: str, begin: int, room: Tensor) -> None:
        room.view(-1).copy_(self._state.elements(name, begin, begin + room.numel(), None))
