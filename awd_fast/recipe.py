"""What a merge does, as one checked value: method, scale, weights, which tensors, and the options of AWD.

The same recipe comes from `merge(...)`, from the command line and from a YAML file, and is written into the model card.
This module imports no torch: the command line reads it to print its help.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from awd_fast import defaults
from awd_fast.errors import InputError
from awd_fast.objective import PRESETS, SGD, Adam, Converge, Objective, Options, make_optimizer, real, whole

Method = Literal["awd", "wudi", "task_arithmetic", "average"]
Others = Literal["task_arithmetic", "base"]
Missing = Literal["error", "base"]
MEMORY = 1 << 30
"""Bytes that `memory` stands for where it is not given."""
MOST_COLUMNS = 1 << 31
DTYPES = ("float32", "bfloat16", "float16", "float64")

DEFAULT_EXCLUDE = (
    "*embed*",
    "wte.*",
    "*.wte.*",
    "wpe.*",
    "*.wpe.*",
    "shared.*",
    "*relative_attention_bias*",
    "*bias",
    "*norm*",
    "*Norm*",
    "*.ln_*",
    "*pooler*",
    "*classifier*",
    "*lm_head*",
    "*_head.*",
    "head.*",
    "*.head.*",
    "heads.*",
    "*.heads.*",
    "cls.*",
    "*.cls.*",
    "score.*",
    "*.score.*",
    "*qa_outputs*",
)
"""Embeddings, biases, norms, pooler and task heads, by the names that Hugging Face models give them."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The description of a merge. The fields mean what the arguments of `awd_fast.merge` mean.

    scale: a number, also where none was given (`awd_fast.defaults.scale`). others_scale: None is the same as scale.
    """

    method: Method = "awd"
    scale: float
    weights: tuple[float, ...]
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    others: Others = "task_arithmetic"
    others_scale: float | None = None
    missing: Missing = "error"
    dtype: str | None = None
    options: Options
    ridge: float = 0.1
    columns: int = 0
    backend: str | None = None
    device: str = "cpu"
    device_memory: float | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("method", Method), ("others", Others), ("missing", Missing)):
            if getattr(self, name) not in get_args(allowed):
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(allowed))}")
        object.__setattr__(self, "scale", real("scale", self.scale))
        if self.others_scale is not None:
            object.__setattr__(self, "others_scale", real("others_scale", self.others_scale))
        object.__setattr__(self, "ridge", real("ridge", self.ridge))
        if self.ridge <= 0:
            raise InputError(f"ridge is {self.ridge:g}; expected a number above 0: without it there may be no solution")
        object.__setattr__(self, "columns", whole("columns", self.columns, MOST_COLUMNS))
        object.__setattr__(self, "weights", tuple(real("weight", weight) for weight in self.weights))
        total = sum(self.weights)
        if self.method == "average" and (total == 0 or not math.isfinite(total)):
            raise InputError(f"the weights {list(self.weights)} sum to {total:g}; an average divides by their sum")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if not isinstance(self.device, str) or not re.fullmatch("cpu|cuda(:[0-9]{1,2})?", self.device):
            raise InputError(f"device is {self.device!r}; expected cpu, cuda or cuda:N")
        for name in ("device_memory", "memory"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, real(name, getattr(self, name)))
                if getattr(self, name) <= 0:
                    raise InputError(f"{name} is {getattr(self, name):g}; expected GB above 0")

    @property
    def selects(self) -> bool:
        """Whether the method is one of selected tensors, which the remaining ones are not merged by."""
        return self.method in ("awd", "wudi")

    @property
    def plain_scale(self) -> float:
        """The scale of the tensors that are not selected."""
        return self.scale if self.others_scale is None else self.others_scale

    def scales(self) -> str:
        """The scales in words; of an average, which has none, an empty text."""
        if self.method == "average":
            return ""
        others = self.selects and self.others != "base" and self.plain_scale != self.scale
        return f"scale {self.scale:.4g}" + (f", of the other tensors {self.plain_scale:.4g}" if others else "")

    @property
    def buffers(self) -> int:
        """Bytes on the CPU for what is read ahead, computed and waits to be written."""
        return MEMORY if self.memory is None else int(self.memory * 1e9)

    def to_config(self, base: str, models: Sequence[str]) -> dict[str, Any]:
        """The recipe as a configuration with mergekit's keys, from which `awd-fast merge CONFIG.yml` does the same."""
        parameters: dict[str, Any] = {}
        if self.method != "average":
            parameters["scale"] = self.scale
        if self.method == "awd":
            optimizer = self.options.optimizer
            parameters["groups"] = self.options.groups
            parameters.update(asdict(self.options.objective))
            parameters["optimizer"] = type(optimizer).__name__.lower()
            for key, value in asdict(optimizer).items():
                name = "adam_eps" if key == "eps" else key
                parameters[name] = list(value) if isinstance(value, tuple) else value
        if self.method == "wudi":
            parameters["ridge"] = self.ridge
            parameters["columns"] = self.columns
        if self.include is not None:
            parameters["include"] = list(self.include)
        parameters["exclude"] = list(self.exclude)
        parameters["others"] = self.others
        if self.others_scale is not None and self.method != "average":
            parameters["others_scale"] = self.others_scale
        if self.missing != "error":
            parameters["missing"] = self.missing
        if self.backend is not None:
            parameters["backend"] = self.backend
        config: dict[str, Any] = {
            "merge_method": self.method,
            "base_model": base,
            "models": [
                {"model": model, "parameters": {"weight": weight}}
                for model, weight in zip(models, self.weights, strict=True)
            ],
            "parameters": parameters,
        }
        if self.dtype is not None:
            config["dtype"] = self.dtype
        return config


def patterns(name: str, value: object) -> tuple[str, ...] | None:
    """One shell pattern or several as a tuple; None stays None."""
    if value is None:
        return None
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Iterable):
        several = tuple(value)
        if all(isinstance(pattern, str) for pattern in several):
            return several
    raise InputError(f"{name} is {value!r}; expected a shell pattern or a list of them")


_OBJECTIVE = tuple(f.name for f in fields(Objective))
_STEPS = (
    "lr",
    "betas",
    "adam_eps",
    "momentum",
    "nesterov",
    "weight_decay",
    "iterations",
    "tolerance",
    "max_iterations",
)
_WUDI = ("ridge", "columns")
_DIRECT = (
    *("method", "scale", "others", "others_scale", "missing", "dtype", "backend", "device", "device_memory", "memory"),
    *_WUDI,
)
NAMES = ("preset", *_DIRECT, "weights", "include", "exclude", "groups", *_OBJECTIVE, "optimizer", *_STEPS)


def make_recipe(count: int, **given: Any) -> Recipe:
    """The recipe of a merge of `count` models from loose options; None, or leaving one out, means its default.

    The options are the fields of Recipe, Options and Objective by name; `optimizer` is "sgd", "adam", "converge" or one
    of `awd_fast.SGD`, `Adam`, `Converge`, with its own options by their names (`lr`, ...; Adam's eps as `adam_eps`).
    `preset`, "paper" or "rows", gives the options that are not given otherwise. Without `optimizer`, the options of one
    mean the first of converge, sgd and adam that has them. `awd_fast.defaults` has the other defaults.
    Raises InputError for an unknown option, a value out of range or a wrong number of weights.
    """
    for name in given:
        if name not in NAMES:
            raise InputError(f"unknown option {name!r}; known are {', '.join(sorted(NAMES))}")
    options = {name: value for name, value in given.items() if value is not None}
    if "preset" in options:
        preset = options.pop("preset")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InputError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}")
        options = PRESETS[preset] | options
    options = defaults.AWD | options
    steps = {name: options.pop(name) for name in _STEPS if name in options}
    optimizer = options.pop("optimizer") if "optimizer" in options else defaults.optimizer_with(steps)
    if "adam_eps" in steps:
        steps["eps"] = steps.pop("adam_eps")
    if isinstance(optimizer, (SGD, Adam, Converge)):
        steps = asdict(optimizer) | steps
        optimizer = type(optimizer).__name__.lower()
    optimizer = make_optimizer(optimizer, **steps)
    objective = Objective(**{name: options.pop(name) for name in _OBJECTIVE})
    chosen = Options(groups=options.pop("groups"), objective=objective, optimizer=optimizer)
    weights = _weights(count, options.pop("weights", None))
    method = options.get("method", "awd")
    options["scale"] = real("scale", options.get("scale", defaults.scale(method, weights)))
    options.setdefault("others_scale", defaults.others_scale(method, options["scale"], weights))
    include = patterns("include", options.pop("include", None))
    exclude = patterns("exclude", options.pop("exclude", DEFAULT_EXCLUDE)) or ()
    options["dtype"] = None if "dtype" not in options else str(options["dtype"]).removeprefix("torch.")
    options["device"] = str(options.get("device", "cpu"))  # a torch.device too
    return Recipe(
        weights=weights,
        include=include,
        exclude=exclude,
        options=chosen,
        **options,
    )


def _weights(count: int, weights: object) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    listed = weights.tolist() if hasattr(weights, "tolist") else weights  # of a tensor or array
    if not isinstance(listed, Iterable) or isinstance(listed, str):
        raise InputError(f"weights is {weights!r}; expected one number for each of the {count} models")
    several = tuple(listed)
    if len(several) != count:
        raise InputError(f"{len(several)} weights were given for {count} models; expected one for each")
    return tuple(real("weight", weight) for weight in several)
