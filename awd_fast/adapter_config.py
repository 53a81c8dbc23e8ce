"""adapter_config.json of a LoRA adapter in PEFT's format: what it says about ranks and scales, and what is refused.

This module imports no torch.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awd_fast.documents import parse_json
from awd_fast.errors import InputError

try:
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as _parser

CONFIG = "adapter_config.json"
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What PEFT stores whole for a task, although an older configuration does not name it."""
_VARIANTS = {
    "use_dora": "DoRA, whose magnitudes are not of low rank",
    "lora_bias": "biases in its factors",
    "layer_replication": "a base whose layers are repeated",
    "trainable_token_indices": "single trained tokens",
    "target_parameters": "factors of parameters that are not the weight of a module",
    "use_qalora": "QALoRA, which pools the inputs",
    "alora_invocation_tokens": "Activated LoRA, which holds for some tokens only",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "Arrow routing between adapters",
    "kasa_config": "KaSA, which changes the base's weights",
    "monteclora_config": "MonteCLoRA, which samples its weights",
    "velora_config": "VeLoRA, which stores projections of its own",
}
"""Settings under which a task vector is not scale * B @ A alone."""
_UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""The initialisations that leave the base's weights as they are. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ do not: their
factors belong to another base unless PEFT converted them when it saved them, and then the configuration says true."""


MOST_WAYS = 2_000_000
"""In which a regular expression may match a name: Python tries them one by one, and would never end for some."""


@dataclass(frozen=True)
class AdapterConfig:
    """The parts of a configuration that a merge needs. file: its path, or what else names it, for messages.

    rank_pattern, alpha_pattern: regular expressions to values, in their order. base_model, revision, task_type,
    target_modules: as written, or None.
    """

    file: str
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    fan_in_fan_out: bool
    target_modules: tuple[str, ...] | str | None
    modules_to_save: tuple[str, ...]
    base_model: str | None
    revision: str | None
    task_type: str | None

    def rank(self, module: str) -> int:
        """The rank r of a module's factors."""
        return int(self._by_pattern("rank_pattern", module, self.r))

    def scale(self, module: str) -> float:
        """What a module's B @ A is multiplied by: alpha / r, or alpha / sqrt(r) with rank stabilisation."""
        rank = self.rank(module)
        alpha = self._by_pattern("alpha_pattern", module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _by_pattern(self, which: str, module: str, default: float) -> float:
        patterns: Mapping[str, float] = getattr(self, which)
        for pattern in patterns:
            if _ways(pattern, len(module)) > MOST_WAYS:
                raise InputError(
                    f"{self.file}: {which} has the key {pattern!r}, a regular expression that may match {module!r} in "
                    "more ways than can be tried; expected few repetitions, and none that hold another"
                )
        return by_pattern(patterns, module, default)

    def stores_whole(self, name: str) -> bool:
        """Whether a tensor belongs to a module that the adapter trained and stored whole."""
        kept = (*self.modules_to_save, *_HEADS.get(self.task_type or "", ()))
        return any(f".{module}." in f".{name}." for module in kept)


def by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches a module's name, or its last parts; as PEFT's get_pattern_key."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return patterns.get(module, default)


@functools.lru_cache(1024)
def _ways(pattern: str, length: int) -> float:
    """In how many ways a pattern could match a text of this length, at most; large numbers are cut off."""
    return _ways_of(_parser.parse(pattern), length)


def _ways_of(parsed: Any, length: int) -> float:
    ways = 1.0
    for operator, given in parsed:
        name = str(operator)
        if name == "BRANCH":
            own = sum(_ways_of(part, length) for part in given[1])
        elif name.endswith("_REPEAT"):
            least, most = given[0], min(int(given[1]), length)
            inner = _ways_of(given[2], length)
            own = (max(most - least, 0) + 1) * inner ** min(most, 40)  # 2 ** 40 is more than enough already
        else:  # a group, a look around, a choice by a group, or a character
            parts = (
                [part for part in given if hasattr(part, "getwidth")] if isinstance(given, (tuple, list)) else [given]
            )
            own = math.prod(_ways_of(part, length) for part in parts if hasattr(part, "getwidth"))
        ways = min(ways * own, 2.0 * MOST_WAYS)
    return ways


def read_config(file: Path) -> AdapterConfig:
    """Reads and checks a configuration. Raises InputError where it is missing or not readable, and as `make_config`."""
    if not file.is_file():
        raise InputError(f"{file.parent} holds no {CONFIG}; expected a folder that PEFT's save_pretrained wrote")
    try:
        given = parse_json(file.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not readable: {type(error).__name__}: {error}") from error
    if not isinstance(given, dict):
        raise InputError(f"{file} holds {type(given).__name__}; expected a mapping")
    return make_config(str(file), given)


def make_config(file: str, given: Mapping[str, Any]) -> AdapterConfig:
    """Checks the settings of a configuration; file: what messages call it. Raises InputError where it is no plain LoRA.

    given: as parsed from JSON, of which only lists, mappings, texts, numbers, booleans and None come.
    """
    _require_plain(file, given)
    r, alpha = given.get("r"), given.get("lora_alpha")
    return AdapterConfig(
        file=file,
        r=_rank(file, "r", r),
        lora_alpha=_alpha(file, "lora_alpha", alpha),
        rank_pattern={key: _rank(file, f"rank_pattern {key}", v) for key, v in _patterns(file, given, "rank_pattern")},
        alpha_pattern={
            key: _alpha(file, f"alpha_pattern {key}", v) for key, v in _patterns(file, given, "alpha_pattern")
        },
        use_rslora=_flag(file, given, "use_rslora"),
        fan_in_fan_out=_flag(file, given, "fan_in_fan_out"),
        target_modules=_targets(file, given),
        modules_to_save=_names(file, given, "modules_to_save"),
        base_model=_text(file, given, "base_model_name_or_path"),
        revision=_text(file, given, "revision"),
        task_type=_text(file, given, "task_type"),
    )


def _require_plain(file: str, given: Mapping[str, Any]) -> None:
    """Refuses what is not LoRA, and those of its variants that mean something else by the same factors."""
    if given.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type is {given.get('peft_type')!r}; expected LORA, the only kind that is read")
    for key, meaning in _VARIANTS.items():
        if given.get(key):
            raise InputError(f"{file}: {key} is set, which means {meaning}; expected plain LoRA")
    initial = given.get("init_lora_weights")
    if initial not in _UNCHANGED:
        raise InputError(
            f"{file}: init_lora_weights is {initial!r}, which changes the base's weights; expected an adapter that "
            "PEFT converted to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _rank(file: str, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise InputError(f"{file}: {name} is {value!r}; expected a whole number above 0")
    return value


def _alpha(file: str, name: str, value: object) -> float:
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{file}: {name} is {value!r}; expected a finite number")
    return number


def _patterns(file: str, given: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    value = given.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{file}: {name} is {value!r}; expected a mapping of module names to numbers")
    for pattern in value:
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{file}: {name} has the key {pattern!r}, no regular expression: {error}") from error
    return list(value.items())


def _flag(file: str, given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{file}: {name} is {value!r}; expected true or false")
    return bool(value)


def _text(file: str, given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{file}: {name} is {value!r}; expected text")
    return value


def _targets(file: str, given: Mapping[str, Any]) -> tuple[str, ...] | str | None:
    value = given.get("target_modules")
    return value if value is None or isinstance(value, str) else _names(file, given, "target_modules")


def _names(file: str, given: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = given.get(name) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InputError(f"{file}: {name} is {value!r}; expected a list of module names")
    return tuple(value)
