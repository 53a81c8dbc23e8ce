"""AWD and WUDI as merge methods of mergekit (>=0.1.5,<0.2). To import this module registers them, however often.

    merge_method: awd      in mergekit's YAML, with `awd-fast mergekit CONFIG.yml OUT` or `mergekit.merge.run_merge`
    merge_state_dicts([base, *models], "awd", base=0)      in memory

mergekit hands tensors over one at a time, and nothing else. So that a mistake in a configuration is found before any of
them is read, and that one group may span all of them, the planner is asked as well: `MergePlanner._plan` is wrapped,
which changes nothing for other methods. docs/mergekit.md describes what users see.
"""

import copy
import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from torch import Tensor

from awd_fast.errors import InputError
from awd_fast.integrations import MERGEKIT, require
from awd_fast.integrations import mergekit_options as options
from awd_fast.integrations.mergekit_tensors import LOG, Loaded, Notes, Planned, Stored, WholeModel, label, merge_many
from awd_fast.plan import StateDict, check_include, check_machine, named, nothing_selected
from awd_fast.recipe import Recipe

require(*MERGEKIT)

import click  # noqa: E402
from mergekit import merge_methods  # noqa: E402
from mergekit.common import ImmutableMap, ModelReference, dtype_from_name  # noqa: E402
from mergekit.config import ConditionalParameter, MergeConfiguration  # noqa: E402
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor  # noqa: E402
from mergekit.merge_methods.base import (  # noqa: E402
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from mergekit.merge_methods.dtype import align_dtype, promoted_dtype  # noqa: E402
from mergekit.merge_methods.registry import register as _register  # noqa: E402
from mergekit.plan import MergePlanner  # noqa: E402
from pydantic import BeforeValidator, ValidationError  # noqa: E402

from awd_fast.integrations.mergekit_accelerate import accelerate, accelerated, restore  # noqa: E402

PLANNED = "awd_fast"
"""The parameter of a task, beside those that users give, with which a decision of the planner reaches the method."""
_GLOBAL = "groups is global, which makes one group of all tensors as the files hold them"


class Method(GroupMergeMethod):
    """`awd` or `wudi` as a merge method: theta_0 + scale * sum_i w_i (t_i - d), as `awd_fast.merge` has it.

    Tensors are floating, of any shape; the base is required. Results have the base's device and the dtype that mergekit
    gives the inputs, or its out_dtype; they carry no gradients. Options are checked as those of `awd_fast.merge`, and
    raise its InputError.
    """

    def __init__(self, name: Literal["awd", "wudi"], pretty_name: str, reference_url: str) -> None:
        def parameter(option: str, scope: ParameterScope, default: Any) -> ParameterSpec:
            kind = Annotated[Any, BeforeValidator(functools.partial(options.value_of, option))]
            return ParameterSpec(option, kind, scope, default)

        shared = [parameter(option, ParameterScope.SHARED, None) for option in options.SHARED]
        self.spec = MergeMethodSpec(
            name=name,
            parameters=(*shared, parameter(options.OF_A_MODEL, ParameterScope.NON_BASE, 1.0)),
            contract=InputContract(base=BasePolicy.REQUIRED),
            pretty_name=pretty_name,
            reference_url=reference_url,
        )

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        """Raises InputError where there is no base, or nothing beside it."""
        if base_id is None:
            raise InputError(f"merge method {self.spec.name} has no base; expected base_model (in Python, base)")
        if base_id not in input_ids:
            raise InputError(f"the base {label(base_id)} lacks the tensor {group_name!r} that models have")
        super().validate_inputs(input_ids, base_id, group_name=group_name)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        (merged,) = self._execute((group,), [parameters], BatchOptions(), input_dtypes=[promoted_dtype(group)])
        return merged

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        groups = [align_dtype(group, dtype) for group, dtype in zip(groups, input_dtypes, strict=True)]
        if not groups:
            return ()
        with torch.autocast(groups[0].entries[0].tensor.device.type, enabled=False):
            if PLANNED in parameters[0]:
                return tuple(map(_planned_group, groups, (given[PLANNED] for given in parameters)))
            return self._in_memory(groups, parameters, out_dtype)

    def _in_memory(
        self, groups: Sequence[TensorGroup], parameters: Sequence[dict[str, Any]], out_dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        """Tensors that nobody planned: those with the same options and models are merged together."""
        together: dict[tuple[Any, ...], list[int]] = {}
        names = [group.metadata.name or f"groups[{index}]" for index, group in enumerate(groups)]
        times: Counter[tuple[Any, ...]] = Counter()
        for index, (group, given) in enumerate(zip(groups, parameters, strict=True)):
            recipe, keys = self._recipe(group, given, out_dtype), tuple(e.id for e in (_base(group), *group.non_base))
            tensor = recipe, keys, names[index]
            together.setdefault((recipe, keys, times[tensor]), []).append(index)  # one merge has each name once
            times[tensor] += 1
        if len(together) > 1 and any(recipe.options.groups == "global" for recipe, _, _ in together):
            raise InputError(f"{_GLOBAL}, but {_difference(parameters)} differs between them; expected one value")
        merged: dict[int, Tensor] = {}
        for (recipe, keys, _), indices in together.items():
            base, *models = (
                StateDict(label(key), {names[index]: _tensor(groups[index], key) for index in indices}) for key in keys
            )
            found = merge_many(base, models, recipe, complete=1 < len(indices) == len(groups))
            merged |= {index: found[names[index]] for index in indices}
        return tuple(merged[index] for index in range(len(groups)))

    def _recipe(self, group: TensorGroup, given: Mapping[str, Any], out_dtype: torch.dtype | None) -> Recipe:
        base = _base(group)
        recipe = options.recipe_of(
            self.spec.name,
            given,
            given[options.OF_A_MODEL].values_for(group.non_base) if group.non_base else (),
            dtype=_name(out_dtype),
            device=str(base.tensor.device),
        )
        if isinstance(base.id, ModelReference) and _is_global(recipe):
            raise InputError(f"{_GLOBAL}; expected mergekit-yaml, or tensors in memory: only these have all")
        return recipe


def _base(group: TensorGroup) -> Any:
    if group.base is None:
        raise InputError(f"tensor {group.metadata.name!r} has no base; expected one of its inputs to be it")
    return group.base


def _tensor(group: TensorGroup, key: Hashable) -> Tensor:
    found: Tensor = next(entry.tensor for entry in group.entries if entry.id == key)
    return found


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _is_global(recipe: Recipe) -> bool:
    return recipe.method == "awd" and recipe.options.groups == "global"


def _difference(tables: Sequence[Mapping[str, Any]]) -> str:
    """The name of an option, or what else it is, that is not the same in all tables."""
    first = tables[0]
    return next((name for name in first if any(table[name] != first[name] for table in tables)), "what is merged")


def _planned_group(group: TensorGroup, planned: Planned) -> Tensor:
    base = _base(group)
    given = {entry.id: entry.tensor for entry in group.non_base}
    return planned.merge(group.metadata.name, (base.id, base.tensor), given)


# What is decided before any tensor is read.


def _tables(config: MergeConfiguration) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """The tables of parameters: how messages name them, the tables, and whether they are those of a model."""

    def sources(where: str, found: Any) -> Iterator[tuple[str, dict[str, Any], bool]]:
        for model in found.models or ():
            yield f"{where}parameters of {model.model}", model.parameters or {}, True
        for place, part in enumerate(found.slices or ()):
            yield f"{where}parameters of slices[{place}]", part.parameters or {}, False
            for source in part.sources:
                yield f"{where}parameters of {source.model}", source.parameters or {}, True

    yield "parameters", config.parameters or {}, False
    yield from sources("", config)
    for name, module in (config.modules or {}).items():
        yield f"parameters of module {name}", module.parameters or {}, False
        yield from sources(f"module {name}: ", module)


def _prepare(method: str, config: MergeConfiguration) -> None:
    """Checks the names of parameters, and writes lists as texts: mergekit would take them for gradients."""
    for where, table, of_a_model in _tables(config):
        options.check_names(method, where, table, of_a_model)
        for name in options.LISTS:
            if name in table:
                table[name] = _without_lists(table[name])


def _without_lists(setting: Any) -> Any:
    if isinstance(setting, ConditionalParameter):
        return setting.model_copy(update={"value": options.as_text(setting.value)})
    if isinstance(setting, list) and any(isinstance(part, ConditionalParameter) for part in setting):
        return [_without_lists(part) for part in setting]
    return options.as_text(setting)


def _decide(method: str, config: MergeConfiguration, tensors: list[Any], altered: str | None) -> list[Any]:
    """The planned tensors, pairs of mergekit's weight and task, with a `Planned` in each task.

    altered: in words, what makes tensors other than the files hold them.
    """
    recipes: dict[str, tuple[Recipe, tuple[ModelReference, ...]]] = {}
    notes = Notes()
    for weight, task in tensors:
        models = [model for model in task.model_order if model != task.base_model]
        weights = [task.input_parameters[model][options.OF_A_MODEL] for model in models]
        out = dtype_from_name(weight.force_dtype or config.out_dtype)
        out = out if out is not None and out.is_floating_point else None
        recipe = options.recipe_of(method, dict(task.parameters.items()), weights, dtype=_name(out))
        recipes[weight.name] = recipe, tuple(models)
    names = list(recipes)
    for recipe, keys in set(recipes.values()):
        check_machine(keys, recipe)
        check_include(names, recipe)
    if not any(named(name, recipe)[0] in (None, True) for name, (recipe, _) in recipes.items()):
        raise nothing_selected(next(iter(recipes.values()))[0])
    whole: WholeModel | None = None
    if any(_is_global(recipe) for recipe, _ in recipes.values()):
        if altered is not None:
            raise InputError(f"{_GLOBAL}, but the configuration has {altered}; expected none, or groups row or column")
        found = set(recipes.values())
        if len(found) > 1:
            tables = [_all_parameters(task) for _, task in tensors]
            raise InputError(f"{_GLOBAL}, but {_difference(tables)} differs between them; expected one value")
        recipe, keys = found.pop()
        whole = WholeModel(recipe, functools.partial(_sources, list(tensors), keys), notes)
    return [(weight, _with(task, Planned(*recipes[weight.name], notes, whole))) for weight, task in tensors]


def _warn_of_losses(config: MergeConfiguration, tensors: Sequence[Any]) -> None:
    """Logs that the base has tensors that mergekit does not take; of some architectures it leaves out whole layers."""
    stored = LoaderCache().get(config.base_model).index.tensor_paths
    planned: set[str] = set()
    for weight, _ in tensors:
        names = {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}
        if not weight.optional and names.isdisjoint(stored):
            return  # it is made of tensors with other names, so that names tell nothing
        planned |= names
    lost = [name for name in stored if name not in planned]
    if lost:
        LOG.warning(
            "%d tensors of %s are not in the output, because mergekit does not know them: %s%s",
            len(lost),
            config.base_model,
            ", ".join(lost[:3]),
            ", ..." if len(lost) > 3 else "",
        )


def _all_parameters(task: Any) -> dict[str, Any]:
    weights = {str(model): dict(given.items()) for model, given in task.input_parameters.items()}
    return {**dict(task.parameters.items()), options.OF_A_MODEL: weights}


def _with(task: Any, planned: Planned) -> Any:
    return task.model_copy(update={"parameters": ImmutableMap({**dict(task.parameters.items()), PLANNED: planned})})


def _sources(tensors: Sequence[Any], models: Sequence[ModelReference]) -> tuple[Loaded, list[Loaded]]:
    """The base and the models as mergekit's loaders give their floating tensors, by the names of the output."""
    stored: dict[ModelReference, dict[str, Stored]] = {}
    for weight, task in tensors:
        loads: list[LoadTensor] = [
            load.model_copy(update={"dtype": None, "device": None}) for load in task.gather_tensors.arguments().values()
        ]
        found = {load.model: load.execute() for load in loads}  # of safetensors files nothing but shapes is read
        there = {model: tensor for model, tensor in found.items() if tensor is not None}
        if not all(tensor.is_floating_point() for tensor in there.values()):
            continue  # which mergekit copies
        dtype = dtype_from_name(weight.force_dtype or task.gather_tensors.dtype)
        for tensor in () if dtype is not None else there.values():
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
        for load in loads:
            if load.model in there:
                entry = Stored(load.execute, dtype, tuple(there[load.model].shape))
                stored.setdefault(load.model, {})[weight.name] = entry
    base = tensors[0][1].base_model
    return Loaded(base, stored.get(base, {})), [Loaded(model, stored.get(model, {})) for model in models]


def _wrapped(plan: Callable[[MergePlanner], None]) -> Callable[[MergePlanner], None]:
    """mergekit's own planning, with what is decided before and after for our methods."""

    @functools.wraps(plan)
    def planning(self: MergePlanner) -> None:
        if not _is_ours(self._method):
            plan(self)
            return
        method, config = self._method.spec.name, self.config
        _prepare(method, config)
        parts = [config, *(config.modules or {}).values()]  # which planning writes in another way
        sliced = any(part.slices for part in parts)
        altered = "slices" if sliced else "a tokenizer" if config.tokenizer or config.tokenizer_source else None
        plan(self)
        if any(not isinstance(task.gather_tensors, GatherTensors) for _, task in self._tensors):
            altered = altered or "--unsafe-truncate-embeddings"
        self._tensors = _decide(method, config, self._tensors, altered)
        if not sliced:
            _warn_of_losses(config, self._tensors)

    planning.wraps_awd_fast = True  # type: ignore[attr-defined]
    return planning


def _is_ours(method: Any) -> bool:
    """By the module's name, since to reload it makes another class of the same methods."""
    return type(method).__module__ == __name__


def register() -> None:
    """Registers `awd` and `wudi` with mergekit, if that has not been done."""
    known = {method.spec.name: method for method in merge_methods.registered_methods()}
    for method in (
        Method("awd", "Adaptive Weight Disentanglement", "https://arxiv.org/abs/2411.18729"),
        Method("wudi", "WUDI-Merging", "https://arxiv.org/abs/2503.08099"),
    ):
        name = method.spec.name
        if name not in known:
            _register(method)
        elif not _is_ours(known[name]):
            raise InputError(f"mergekit has a merge method {name} of {type(known[name]).__module__}; expected none")
    if not hasattr(MergePlanner._plan, "wraps_awd_fast"):
        MergePlanner._plan = _wrapped(MergePlanner._plan)


FASTER = "Compute mergekit's own methods with awd_fast's operators where tensors are on the CPU."


def run(arguments: Sequence[str], left: Callable[[str], Any] = logging.warning) -> None:
    """`mergekit-yaml` with these arguments of its command line or --accelerate, and with our methods.

    left: called with a sentence where a merge that failed has left something. Raises InputError, naming the
    configuration, for what is wrong with it, and click's exceptions for the arguments.
    """
    from mergekit.scripts.run_yaml import main

    command = copy.copy(main)
    command.params = [*main.params, click.Option(["--accelerate"], is_flag=True, help=FASTER)]
    with command.make_context("awd-fast mergekit", list(arguments)) as context:
        config, out = (context.params[name] for name in ("config_file", "out_path"))
        existed, before = Path(out).exists(), accelerated()
        if context.params.pop("accelerate"):
            accelerate()
        try:
            command.invoke(context)
        except BaseException as error:
            if not existed and Path(out).exists():
                left(f"what mergekit has written is left in {out}")
            if isinstance(error, InputError):
                raise InputError(f"{config}: {error}") from None
            if isinstance(error, yaml.YAMLError):
                raise InputError(f"{config} is not a readable YAML file: {error}") from None
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"])) or "the configuration"
                raise InputError(f"{config}: {place}: {first['msg']}") from None
            raise
        finally:
            if not before:
                restore()


register()
