"""YAML configurations with mergekit's keys: merge_method, base_model, models, parameters, dtype."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awd_fast.documents import YAML_BYTES, parse_yaml
from awd_fast.errors import InputError
from awd_fast.recipe import NAMES, make_recipe

KEYS = ("merge_method", "base_model", "models", "parameters", "dtype")
_ELSEWHERE = ("method", "weights", "dtype", "device", "device_memory", "memory")
PARAMETERS = tuple(name for name in NAMES if name not in _ELSEWHERE)
TEXTS = ("preset", "backend", "groups", "similarity", "penalty", "optimizer", "include", "exclude", "others", "missing")


@dataclass(frozen=True)
class Config:
    """A configuration file: where the models are, and the options of the merge by name."""

    base: str
    models: tuple[str, ...]
    options: dict[str, Any]


def load_config(path: str | Path) -> Config:
    """Reads and checks a configuration. Raises InputError naming the file and the key that is wrong.

    `lambda` is mergekit's word for `scale`. The base may be listed among the models, as mergekit allows; it has no task
    vector and is passed over.
    """
    try:
        with open(path, "rb") as file:
            data = parse_yaml(file.read(4 * YAML_BYTES).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable YAML file: {error}") from error
    _keys(path, "the configuration", data, KEYS)
    for key in ("base_model", "models"):
        if key not in data:
            raise InputError(f"{path} lacks the key {key}")
    if not isinstance(data["base_model"], str):
        raise InputError(f"{path}: base_model is {data['base_model']!r}; expected a path")
    if not isinstance(data["models"], list) or not data["models"]:
        raise InputError(f"{path}: models is {data['models']!r}; expected a list of models")
    entries = [_model(path, entry) for entry in data["models"]]
    entries = [(model, weight) for model, weight in entries if not _same(model, data["base_model"])]
    options = _parameters(path, data.get("parameters"))
    options["method"] = data.get("merge_method", "awd")
    options["weights"] = tuple(weight for _, weight in entries)
    if data.get("dtype") is not None:
        options["dtype"] = data["dtype"]
    try:
        make_recipe(len(entries), **options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Config(data["base_model"], tuple(model for model, _ in entries), options)


def _same(model: str, base: str) -> bool:
    """True where both name one place, as `B` and `./B` do."""
    try:
        return model == base or Path(model).resolve() == Path(base).resolve()
    except (OSError, RuntimeError, ValueError):  # no path, as is said when it is opened
        return False


def _model(path: str | Path, entry: object) -> tuple[str, float]:
    if isinstance(entry, str):
        return entry, 1.0
    _keys(path, "an entry of models", entry, ("model", "parameters"))
    assert isinstance(entry, dict)
    if not isinstance(entry.get("model"), str):
        raise InputError(f"{path}: an entry of models has no model path: {entry!r}")
    parameters = entry.get("parameters") or {}
    _keys(path, f"parameters of {entry['model']}", parameters, ("weight",))
    return entry["model"], number(parameters.get("weight", 1.0))


def _parameters(path: str | Path, parameters: object) -> dict[str, Any]:
    if parameters is None:
        return {}
    _keys(path, "parameters", parameters, (*PARAMETERS, "lambda"))
    assert isinstance(parameters, dict)
    if "lambda" in parameters and "scale" in parameters:
        raise InputError(f"{path}: parameters has both scale and lambda, which mean the same")
    return {
        ("scale" if key == "lambda" else key): value if key in TEXTS else number(value)
        for key, value in parameters.items()
    }


def number(value: Any) -> Any:
    """YAML 1.1 reads 1e-6 as text; as an option it is a number."""
    if isinstance(value, list):
        return [number(part) for part in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _keys(path: str | Path, what: str, data: object, known: tuple[str, ...]) -> None:
    if not isinstance(data, dict):
        raise InputError(f"{path}: {what} is {data!r}; expected a mapping")
    for key in data:
        if key not in known:
            raise InputError(f"{path}: {what} has the unknown key {key!r}; known are {', '.join(sorted(known))}")
