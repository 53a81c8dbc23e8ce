"""The data-free merges of mergekit 0.1.5 and FusionBench 0.2.33 that can run on a BERT-like encoder, with options.

Options are the packages' own defaults (FusionBench: of its shipped configuration) unless a comment says otherwise. No
method is chosen or left out for its results; `LEFT_OUT` says what is missing and why.

What becomes of tensors that are not matrices (biases, LayerNorm): mergekit's methods, Task Arithmetic, TIES, DARE,
MagMax, Model Stock treat every tensor alike. Iso-C, Iso-CTS, TSV-M, WUDI: the mean of the task vectors, where matrices
get something of the size of their sum. OPCM: the running sum, as for matrices, but without projection; embeddings too.
SVC: whatever its base method gives. DOGE: left at the base, and so are the embeddings and the pooler.

Also seen when they ran: TSV-M leaves a matrix with fewer rows than there are models at the base (the token types').
mergekit trims and draws within each tensor, FusionBench's TIES over the whole model. mergekit's DARE and DELLA restore
the l1 norm of what they dropped from, instead of dividing by the density. SCE falls back to equal weights where the
mean squares of a tensor's task vectors add up to less than 1e-6, as in 13 of 103 tensors here. SVC's merge, at
alpha 0.1, hardly depends on the scale of its base method: it rescales every direction.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Peer = Literal["mergekit", "fusion_bench"]

Scale = Literal["linear", "none", "other"]
"""How a merge depends on the method's own scale: "linear" if it is base + scale * (merge at 1 - base), to rounding;
"none" if the method has no scale; "other" if another scale is another direction, so that it must be run for each."""


@dataclass(frozen=True)
class Method:
    """One method with its options.

    name: unique, of letters, digits, dots and hyphens. algorithm, options, rename, only_changed: see peer_worker.py;
    the options are those without the scale. scale_option: the option that is the scale, its path with dots inside
    nested options; "" if scale is "none". default_scale: what the package takes; None if scale is "none". slow: takes
    minutes for eight models of 22.7 million parameters on two idle cores.
    """

    name: str
    title: str
    peer: Peer
    algorithm: str
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: Scale = "linear"
    scale_option: str = ""
    default_scale: float | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    slow: bool = False
    only_changed: bool = False

    def __post_init__(self) -> None:
        if (self.scale == "none") != (not self.scale_option) or (self.scale == "none") != (self.default_scale is None):
            raise ValueError(f"{self.name}: a method has a scale, its option and a default, or none of the three")

    def at(self, scale: float) -> dict[str, Any]:
        """The options with the scale in them. Raises ValueError for another scale than 1 if the method has none."""
        options = copy.deepcopy(dict(self.options))
        if self.scale == "none":
            if scale != 1:
                raise ValueError(f"{self.name} has no scale")
            return options
        *path, last = self.scale_option.split(".")
        inner = options
        for part in path:
            inner = inner[part]
        inner[last] = scale
        return options


def _mergekit(name: str, title: str, algorithm: str, **options: Any) -> Method:
    """A method of mergekit's task arithmetic family: every model has weight 1, and lambda scales the whole update."""
    return Method(f"mergekit-{name}", title, "mergekit", algorithm, {"weight": 1.0, **options}, "linear", "lambda", 1.0)


def _plain(name: str, title: str, algorithm: str, **options: Any) -> Method:
    """A method of mergekit without a scale."""
    return Method(f"mergekit-{name}", title, "mergekit", algorithm, options, "none")


# The authors' densities: TIES 0.2; DARE drops up to 0.9, most often 0.8 or 0.5; DELLA about 0.3 to 0.5; Breadcrumbs
# keeps about 0.1 to 0.15 where mergekit's guide takes 0.9; SCE selects 0.1 where mergekit takes all.
MERGEKIT = (
    _plain("linear", "Linear (average)", "linear", weight=1.0),
    _mergekit("task-arithmetic", "Task Arithmetic", "task_arithmetic"),
    _mergekit("ties-0.2", "TIES, density 0.2", "ties", density=0.2),
    _mergekit("ties-0.5", "TIES, density 0.5", "ties", density=0.5),
    _mergekit("ties-sum-0.2", "TIES, density 0.2, not normalised", "ties", density=0.2, normalize=False),
    _mergekit("dare-linear-0.2", "DARE, density 0.2", "dare_linear", density=0.2),
    _mergekit("dare-linear-0.5", "DARE, density 0.5", "dare_linear", density=0.5),
    _mergekit("dare-ties-0.2", "DARE TIES, density 0.2", "dare_ties", density=0.2),
    _mergekit("dare-ties-0.5", "DARE TIES, density 0.5", "dare_ties", density=0.5),
    _mergekit("breadcrumbs-0.9", "Breadcrumbs, density 0.9", "breadcrumbs", density=0.9, gamma=0.01),
    _mergekit("breadcrumbs-0.15", "Breadcrumbs, density 0.15", "breadcrumbs", density=0.15, gamma=0.01),
    _mergekit("breadcrumbs-ties-0.9", "Breadcrumbs TIES, density 0.9", "breadcrumbs_ties", density=0.9, gamma=0.01),
    _mergekit("breadcrumbs-ties-0.15", "Breadcrumbs TIES, density 0.15", "breadcrumbs_ties", density=0.15, gamma=0.01),
    _mergekit("della-0.3", "DELLA, density 0.3", "della", density=0.3, epsilon=0.15),
    _mergekit("della-0.5", "DELLA, density 0.5", "della", density=0.5, epsilon=0.15),
    _mergekit("della-linear-0.3", "DELLA linear, density 0.3", "della_linear", density=0.3, epsilon=0.15),
    _mergekit("della-linear-0.5", "DELLA linear, density 0.5", "della_linear", density=0.5, epsilon=0.15),
    _plain("model-stock", "Model Stock", "model_stock"),
    _plain("model-stock-filter", "Model Stock, filter-wise", "model_stock", filter_wise=True),
    _plain("sce", "SCE", "sce"),
    _plain("sce-0.1", "SCE, top 0.1", "sce", select_topk=0.1),
    _plain("karcher", "Karcher mean", "karcher"),
    # It stops at a tensor that no model changed, such as the pooler's.
    Method(
        "mergekit-multislerp",
        "Multi-SLERP",
        "mergekit",
        "multislerp",
        {"weight": 1.0},
        "none",
        only_changed=True,
    ),
    _plain("ram", "RAM", "ram"),
    _plain("ramplus", "RAM+ (tensor-local)", "ramplus_tl"),
)

# Lookup tables rather than maps between features: a second setting averages them instead of treating them as matrices.
EMBEDDINGS = [
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
]
# A pooler that no fine-tuning touched has task vectors of zero, by whose length WUDI divides. Of 30,522 embeddings WUDI
# would make a matrix with as many rows and columns, 3.7 GB for each model. Its paper treats linear layers alone.
WUDI_EXCLUDED = [*EMBEDDINGS, "pooler.dense.weight"]


def _bench(
    name: str,
    title: str,
    algorithm: str,
    scale_option: str,
    default_scale: float | None,
    options: Mapping[str, Any] | None = None,
    scale: Scale = "linear",
    rename: Mapping[str, str] | None = None,
    slow: bool = False,
) -> Method:
    """A method of FusionBench, by the path of its class below fusion_bench.method."""
    path = f"fusion_bench.method.{algorithm}"
    return Method(
        f"fusion-bench-{name}",
        title,
        "fusion_bench",
        path,
        options or {},
        scale,
        scale_option,
        default_scale,
        rename or {},
        slow,
    )


def _ties(threshold: int, function: str) -> dict[str, Any]:
    return {"threshold": threshold, "remove_keys": [], "merge_func": function}


def _dare(dropped: float) -> dict[str, Any]:
    return {"sparsity_ratio": dropped, "only_on_linear_weights": False, "rescale": True}


def _calibrated(
    name: str,
    title: str,
    alpha: float,
    algorithm: str,
    default: float | None,
    options: Mapping[str, Any] | None = None,
    slow: bool = False,
) -> Method:
    """Singular Value Calibration of another method's merge, which changes with the scale of that merge."""
    base = {"_target_": f"fusion_bench.method.{algorithm}", **(options or {})}
    path = "singular_value_calibration.SingularValueCalibrationWithBaseMethod"
    option = "base_method.alpha" if algorithm == "TaskSingularVectorMerging" else "base_method.scaling_factor"
    given = {"alpha": alpha, "accelerator": None, "base_method": base}
    title = f"SVC of {title}"
    if default is None:
        return _bench(f"svc-{name}", title, path, "", None, given, "none", slow=slow)
    return _bench(f"svc-{name}", title, path, option, default, given, "other", slow=slow)


_SEQUENTIAL = {"shuffle_order": False, "save_on_every_step": False, "evaluate_on_every_step": False}
_LEFT: dict[str, Any] = {"exclude_keys": None}
_MATRICES: dict[str, Any] = {"exclude_keys": EMBEDDINGS}
_WUDI = {"iter_num": 300, "exclude_keys": WUDI_EXCLUDED}

FUSION_BENCH = (
    _bench("average", "Average", "SimpleAverageAlgorithm", "", None, scale="none"),
    _bench("task-arithmetic", "Task Arithmetic", "TaskArithmeticAlgorithm", "scaling_factor", 0.3),
    _bench("ties-20", "TIES, top 20 %, sum", "TiesMergingAlgorithm", "scaling_factor", 0.3, _ties(20, "sum")),
    _bench("ties-50", "TIES, top 50 %, sum", "TiesMergingAlgorithm", "scaling_factor", 0.3, _ties(50, "sum")),
    _bench(
        "ties-mean-20",
        "TIES, top 20 %, mean",
        "TiesMergingAlgorithm",
        "scaling_factor",
        0.3,
        _ties(20, "mean"),
    ),
    _bench("dare-0.5", "DARE, drop 0.5", "DareTaskArithmetic", "scaling_factor", 0.3, _dare(0.5)),
    _bench("dare-0.8", "DARE, drop 0.8", "DareTaskArithmetic", "scaling_factor", 0.3, _dare(0.8)),
    _bench(
        "dare-ties-0.5",
        "DARE TIES, drop 0.5",
        "DareTiesMerging",
        "scaling_factor",
        0.5,
        {**_dare(0.5), **_ties(20, "sum")},
    ),
    _bench(
        "dare-ties-0.8",
        "DARE TIES, drop 0.8",
        "DareTiesMerging",
        "scaling_factor",
        0.5,
        {**_dare(0.8), **_ties(20, "sum")},
    ),
    _bench("magmax", "MagMax", "MagMaxAlgorithm", "scaling_factor", 0.5),
    _bench("model-stock", "Model Stock (mean angle)", "ModelStock", "", None, scale="none"),
    _bench("iso-c", "Iso-C", "ISO_C_Merge", "scaling_factor", 1.0, _LEFT),
    _bench("iso-c-layers", "Iso-C, embeddings averaged", "ISO_C_Merge", "scaling_factor", 1.0, _MATRICES),
    _bench(
        "iso-cts", "Iso-CTS", "ISO_CTS_Merge", "scaling_factor", 1.0, {"common_space_fraction": 0.8, **_LEFT}, slow=True
    ),
    _bench(
        "iso-cts-layers",
        "Iso-CTS, embeddings averaged",
        "ISO_CTS_Merge",
        "scaling_factor",
        1.0,
        {"common_space_fraction": 0.8, **_MATRICES},
    ),
    _bench("tsvm", "TSV-M", "TaskSingularVectorMerging", "alpha", 1.0, _LEFT),
    _bench("tsvm-layers", "TSV-M, embeddings averaged", "TaskSingularVectorMerging", "alpha", 1.0, _MATRICES),
    # The authors' 300 iterations; FusionBench's configuration says 400.
    _bench(
        "wudi-300",
        "WUDI, 300 iterations",
        "WUDIMerging",
        "",
        None,
        _WUDI,
        scale="none",
        slow=True,
    ),
    # It takes every name with "encoder" and "weight" but not "layer_norm" for a matrix; BERT writes LayerNorm.
    _bench(
        "doge-ta",
        "DOGE TA",
        "DOGE_TA_Algorithm",
        "lamda",
        0.07,
        {"subspace": 6, "K": 30},
        scale="other",
        rename={"LayerNorm": "layer_norm"},
        slow=True,
    ),
    # Sequential: the order of the models matters, and is the given one instead of a shuffled one.
    _bench(
        "opcm",
        "OPCM",
        "opcm.opcm_general.OPCM",
        "",
        None,
        {"alpha": 0.5, **_SEQUENTIAL},
        scale="none",
    ),
    _calibrated("average", "Average", 0.1, "SimpleAverageAlgorithm", None),
    _calibrated("task-arithmetic", "Task Arithmetic", 0.1, "TaskArithmeticAlgorithm", 0.3),
    _calibrated("ties-20", "TIES, top 20 %, sum", 0.1, "TiesMergingAlgorithm", 0.3, _ties(20, "sum")),
    _calibrated("dare-0.5", "DARE, drop 0.5", 0.1, "DareTaskArithmetic", 0.3, _dare(0.5)),
    _calibrated("iso-c", "Iso-C", 0.1, "ISO_C_Merge", 1.5, _LEFT),
    _calibrated("iso-cts", "Iso-CTS", 0.2, "ISO_CTS_Merge", 1.5, {"common_space_fraction": 0.8, **_LEFT}, slow=True),
    _calibrated("tsvm", "TSV-M", 1.0, "TaskSingularVectorMerging", 1.0, _LEFT),
    _calibrated("wudi-300", "WUDI, 300 iterations", 1.0, "WUDIMerging", None, _WUDI, slow=True),
)

LEFT_OUT: dict[str, str] = {
    "mergekit slerp, nuslerp, nearswap, arcee_fusion": "for two models, or one model and its base, not for more",
    "mergekit passthrough": "copies the tensors of one model",
    "mergekit-yaml": (
        "the command stops at BERT in 0.1.5 (a tuple is added to a list); its mergekit-pytorch is used instead"
    ),
    "fusion_bench AdaMerging, Gossip, Frank-Wolfe, Concrete, Trust Region, Surgery, AdaSVD, DAWE": (
        "they learn or measure on images or texts of the tasks"
    ),
    "fusion_bench Fisher, RegMean, RegMean++": "they need the tasks' data for Fisher information or inner products",
    "fusion_bench TALL masks, EMR, BitDelta, RanDeS": (
        "they keep a mask or residual per task and must be told the task of a text; the result is not one model"
    ),
    "fusion_bench Consensus TA, KnOTS": "0.2.33 has helper functions only, no algorithm that runs",
    "PCB, breadcrumbs, DELLA in fusion_bench": "0.2.33 does not have them",
    "fusion_bench WE-MoE, PWE-MoE, Rank-One MoE, SMILE, Mixtral, depth upscaling": "the result is another architecture",
    "fusion_bench ensembles": "they run all models and merge none",
    "fusion_bench weighted_average, ExPO, dare.simple_average": (
        "with equal weights they are Average, Average at a scale, and DARE at scale 1/K"
    ),
    "fusion_bench slerp, linear_interpolation, singular projection, model recombination": (
        "for two models or one, or with several models as result"
    ),
    "fusion_bench ...ForLlama, ...ForCausalLM, ...ForCLIP, OPCM's continual TIES and average": (
        "the same methods for other architectures"
    ),
    "fusion_bench pruning, SparseLo, expert pruning": "they prune one model",
    "fusion_bench DOP": (
        "200 steps for each matrix and each model after the first; a step took 1.5 to 1.8 s on two cores in use, which "
        "makes some 22 hours for eight models"
    ),
}

METHODS: dict[str, Method] = {method.name: method for method in (*MERGEKIT, *FUSION_BENCH)}
