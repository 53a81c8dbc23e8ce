"""AWD and WUDI as algorithms of FusionBench 0.2.33, below 0.3.

    fusion_bench method=awd_fast/awd method.scale=0.3 modelpool=...      on its command line, after installation
    AWDAlgorithm(scale=0.3).run(modelpool)                               in Python, on a model pool or a dict of modules

`awd_fast/wudi`, `awd_fast/task_arithmetic`, `awd_fast/awd_adamerging` and `awd_fast/clip_awd_adamerging` are there too.
`accelerate()` has FusionBench's own Task Arithmetic, TIES and AdaMerging compute with the compiled operators.
"""

import copy
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import awd_fast
from awd_fast.errors import InputError
from awd_fast.integrations import FUSION_BENCH, require
from awd_fast.integrations.fusion_bench_accelerate import accelerate, accelerated, restore
from awd_fast.integrations.fusion_bench_pool import PRETRAINED, Pool, opened
from awd_fast.merging import merge_states
from awd_fast.modules import Held, merge_held, place_of
from awd_fast.plan import make_plan
from awd_fast.recipe import NAMES, Recipe, make_recipe

require(*FUSION_BENCH)

from fusion_bench import BaseAlgorithm, import_object, instantiate  # noqa: E402
from fusion_bench.mixins import CLIPClassificationMixin, LightningFabricMixin, SimpleProfilerMixin  # noqa: E402
from omegaconf import DictConfig, ListConfig, OmegaConf  # noqa: E402

__all__ = [
    "AWDAdaMergingAlgorithm",
    "AWDAlgorithm",
    "CLIPAWDAdaMergingAlgorithm",
    "accelerate",
    "accelerated",
    "restore",
]

LOG = logging.getLogger("awd_fast.fusion_bench")
_NOT_LEARNED = (
    *("scale", "weights", "others_scale", "ridge", "columns", "dtype", "device", "device_memory", "memory"),
    *("lr", "betas", "adam_eps", "momentum", "nesterov", "weight_decay"),
)
"""Options of a merge that one whose coefficients are learned has not, or not for its redundant vector."""


class _Configured(SimpleProfilerMixin, BaseAlgorithm):
    """An algorithm whose options are attributes, as FusionBench writes them into its configurations."""

    OPTIONS: tuple[str, ...] = ()

    def __init__(self, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        for name in options:
            if name not in self.OPTIONS and not name.startswith("_"):
                known = ", ".join(sorted((*self.OPTIONS, *own)))
                raise InputError(f"{type(self).__name__} has no option {name!r}; it has {known}")
        super().__init__(**{name: value for name, value in options.items() if name.startswith("_")})
        self._config_mapping: Any = copy.copy(BaseAlgorithm._config_mapping)  # FusionBench adds to that of the class
        given = {name: options.get(name) for name in self.OPTIONS} | dict(own)
        for name, value in given.items():
            self.register_parameter_to_config(name, name, _plain(value))

    def options(self, weighed: Sequence[str] | None = None) -> dict[str, Any]:
        """What was given of the options of the merge. weighed: the models' names, where weights may be by name."""
        found = {name: getattr(self, name) for name in self.OPTIONS}
        found = {name: value for name, value in found.items() if value is not None}
        weights = found.get("weights")
        if isinstance(weights, Mapping):
            names = list(weighed or ())
            for name in weights:
                if name not in names:
                    raise InputError(f"weights has the model {name!r}; expected models of the pool, {', '.join(names)}")
            found["weights"] = tuple(weights.get(name, 1.0) for name in names)
        return found


class AWDAlgorithm(_Configured):
    """`awd_fast.merge_models` of a model pool: AWD (arXiv 2411.18729), or another of its methods.

    inplace: whether a pretrained model that was given as a module becomes the merge, instead of a copy of it; it does
        so once everything is computed. Those that the pool loads always do.
    progress: show a progress bar. device: where to compute, as in `merge_models`.
    options: those of `awd_fast.merge` by name, those of optimisers too (`optimizer="sgd", lr=0.01, iterations=300`;
        Adam's eps as `adam_eps`), and `preset`, "paper" or "rows". None is an option's default. weights: a list in the
        order of the pool, or a mapping of names, others 1.

    Models of a pool that only reads safetensors files are read from these, piece by piece, and never whole in memory.
    Raises InputError in one sentence for options that are not there or do not fit.
    """

    OPTIONS = NAMES

    def __init__(self, *, inplace: bool = True, progress: bool = True, **options: Any) -> None:
        super().__init__({"inplace": inplace, "progress": progress}, options)

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        """Merges the models of a pool, or of a dict of modules by name, into their pretrained one, "_pretrained_".

        Returns that module: itself, or a copy, as `inplace` says; of a pool with lazy loading, a new one. Parameters
        are merged, where the model has the mark `_fusion_bench_target_modules` those below these modules alone; buffers
        are the pretrained model's. Raises InputError as `awd_fast.merge_models`.
        """
        with self.profile("load model"):
            pool = opened(modelpool)
        recipe = make_recipe(len(pool.names), **({"device": place_of(pool.base)} | self.options(pool.names)))
        merged = self._merged_files(pool, recipe) if pool.lazy else self._merged_modules(pool, recipe)
        self.print_profile_summary()
        return merged

    def _merged_files(self, pool: Pool, recipe: Recipe) -> nn.Module:
        source = pool.source()
        with self.profile("load model"):
            sources = [pool.model(name) for name in pool.names]
        with self.profile("merge weights"):
            merged = merge_states(source, sources, recipe, make_plan(source, sources, recipe), self.progress)
        return pool.finished(merged, inplace=True)

    def _merged_modules(self, pool: Pool, recipe: Recipe) -> nn.Module:
        base, only = Held(PRETRAINED, pool.base), _targets(pool.base)
        wanted = {name for name in base.named(base.ties) if only(name)}
        with self.profile("load model"):
            loaded = {name: pool.model(name, wanted) for name in pool.names}
        models = [Held(name, model) if isinstance(model, nn.Module) else model for name, model in loaded.items()]
        with self.profile("merge weights"):
            inplace = self.inplace or not pool.instances
            return merge_held(base, models, recipe, inplace=inplace, only=only, progress=self.progress)


class AWDAdaMergingAlgorithm(LightningFabricMixin, _Configured):
    """`awd_fast.adamerge` of a model pool: coefficients (arXiv 2310.02575) of t_i - d by the entropy of predictions.

    batches: of each model by name, unlabelled batches, an iterable each; by default the pool's test datasets, in a
        shuffled DataLoader of `batch_size` and `num_workers` each.
    logits: (model, batch, name of the task) -> [n, C], or where it can be imported from; default as in `adamerge`.
    max_steps, lr, init_values, clamp_weights, per: `steps`, `lr`, `initial`, `bounds=(0, 1)` and `per` of `adamerge`.
    save_merging_weights: a file for the coefficients (`torch.save`): [K], or [K, N] with the names of the N tensors.
    inplace: as in `AWDAlgorithm`. options: those of the redundant vector, as there; method="task_arithmetic" is
        AdaMerging without one.
    """

    OPTIONS = tuple(name for name in NAMES if name not in _NOT_LEARNED)

    def __init__(
        self,
        *,
        batches: Mapping[str, Iterable[Any]] | None = None,
        logits: Callable[[nn.Module, Any, str], Tensor] | str | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        max_steps: int = 1000,
        lr: float = 1e-3,
        init_values: Any = 0.3,
        clamp_weights: bool = False,
        per: str = "tensor",
        save_merging_weights: str | None = None,
        inplace: bool = True,
        **options: Any,
    ) -> None:
        self.batches, self.logits = batches, logits
        own = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "max_steps": max_steps,
            "lr": lr,
            "init_values": init_values,
            "clamp_weights": clamp_weights,
            "per": per,
            "save_merging_weights": save_merging_weights,
            "inplace": inplace,
        }
        super().__init__(own, options)

    def run(self, modelpool: Any) -> nn.Module:
        """Learns the coefficients on the pool's data, and gives the pretrained module with the merged weights.

        The module is on the device of FusionBench's fabric, in the mode that the pool loads it in. Raises InputError as
        `awd_fast.adamerge`.
        """
        with self.profile("load model"):
            pool = opened(modelpool)
            if pool.lazy:
                raise InputError("the model pool loads lazily; AdaMerging needs modules: enable_lazy_loading=false")
            loaded = {name: pool.pool.load_model(name) for name in pool.names}
        for name, model in loaded.items():
            if model is pool.base:
                raise InputError(f"{name} is the base itself, so it has no task vector; leave it out")
        models = [model.state_dict() for model in loaded.values()]
        self.modelpool = pool.pool
        initial, file = self._initial(), self._weights_file()  # what is wrong with them is said before the first step
        streams, logits = self.data(pool)
        inplace = self.inplace or not pool.instances
        base = pool.base.state_dict()
        model = (pool.base if inplace else copy.deepcopy(pool.base)).to(self.fabric.device)
        recipe = self._redundant(len(models))
        with self.profile("test-time adaptation"):
            found = awd_fast.adamerge(
                model,
                base,
                models,
                streams,
                logits=logits,
                per=self.per,
                initial=initial,
                steps=self.max_steps,
                lr=self.lr,
                bounds=(0.0, 1.0) if self.clamp_weights else None,
                on_step=self._log,
                **recipe,
            )
        if file is not None:
            torch.save({"coefficients": found.coefficients, "names": list(found.names)}, file)
            LOG.info("saved the merging weights to %s", file)
        self.print_profile_summary()
        return model

    def data(self, pool: Pool) -> tuple[list[Iterable[Any]], Any]:
        """The streams of `adamerge`, one for each model of the pool, and its `logits`."""
        if self.batches is None:
            streams: list[Iterable[Any]] = [self._loader(name) for name in pool.names]
        else:
            for name in pool.names:
                if name not in self.batches:
                    raise InputError(f"batches has none of {name!r}; expected those of {', '.join(pool.names)}")
            streams = [self.batches[name] for name in pool.names]
        asked = self.logits
        if isinstance(asked, DictConfig):
            asked = instantiate(asked)
        if isinstance(asked, str):
            asked = import_object(asked)
        if asked is None:
            return streams, None
        return streams, lambda model, batch, index: asked(model, batch, pool.names[index])

    def _loader(self, name: str) -> Iterable[Any]:
        if not self.modelpool.has_test_dataset:
            raise InputError("the model pool has no test datasets, and no batches are given; expected one of these")
        dataset = self.modelpool.load_test_dataset(name)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=self.batch_size, shuffle=True, num_workers=self.num_workers
        )
        return self.fabric.setup_dataloaders(loader)

    def _redundant(self, count: int) -> dict[str, Any]:
        """The arguments of `adamerge` that say what d is."""
        recipe = make_recipe(count, **self.options())
        options = recipe.options
        return {
            "method": recipe.method,
            "include": recipe.include,
            "exclude": recipe.exclude,
            "others": recipe.others,
            "missing": recipe.missing,
            "groups": options.groups,
            "optimizer": options.optimizer,
            "backend": recipe.backend,
            **vars(options.objective),
        }

    def _initial(self) -> Any:
        given = self.init_values
        if not isinstance(given, str):
            return given
        try:
            return torch.load(given, weights_only=True)["coefficients"]
        except (OSError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise InputError(
                f"init_values is {given!r}; expected numbers, or a file that save_merging_weights wrote ({error})"
            ) from error

    def _log(self, step: int, entropy: float, coefficients: Tensor) -> None:
        self.fabric.log_dict(
            {
                "train/loss": entropy,
                "train/weight_max": float(coefficients.max()),
                "train/weight_min": float(coefficients.min()),
                "train/weight_mean": float(coefficients.mean()),
            },
            step=step,
        )

    def _weights_file(self) -> Path | None:
        """Where this process saves the coefficients, in a folder that is there now."""
        if not self.save_merging_weights or not self.fabric.is_global_zero:
            return None
        path = Path(self.save_merging_weights)
        if not os.path.isabs(path) and self.log_dir is not None and not str(path).startswith("."):
            path = Path(self.log_dir) / path  # as FusionBench does
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"save_merging_weights is {str(path)!r}, which cannot be written: {error}") from error
        return path


class CLIPAWDAdaMergingAlgorithm(CLIPClassificationMixin, AWDAdaMergingAlgorithm):
    """`AWDAdaMergingAlgorithm` of FusionBench's CLIP vision pools, on their test images with its zero-shot heads."""

    def data(self, pool: Pool) -> tuple[list[Iterable[Any]], Any]:
        self.setup_zero_shot_classification_head()
        streams = [
            self.get_shuffled_test_loader_iter(name, batch_size=self.batch_size, num_workers=self.num_workers)
            for name in pool.names
        ]
        return streams, lambda model, batch, index: self.compute_logits(model, batch[0], pool.names[index])


def run(arguments: Sequence[str]) -> None:
    """`fusion_bench` with these arguments of its command line, accelerated. Ends the process where FusionBench does."""
    from fusion_bench.scripts.cli import _hydra_main

    given, before = sys.argv, accelerated()
    sys.argv = ["fusion_bench", *arguments]
    accelerate()
    try:
        _hydra_main()
    finally:
        sys.argv = given
        if not before:
            restore()


def _plain(value: Any) -> Any:
    """Lists and mappings of a configuration as Python's own."""
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, (DictConfig, ListConfig)) else value


def _targets(module: nn.Module) -> Callable[[str], bool]:
    """Whether a parameter is one of those that FusionBench merges of a module: all, or those below marked modules."""
    marked = getattr(module, "_fusion_bench_target_modules", None)
    if marked is None:
        return lambda name: True
    starts = tuple(f"{target}." for target in ([marked] if isinstance(marked, str) else marked))
    return lambda name: name.startswith(starts)
