"""The peers' merges as rows of the study's table, and the same methods on AWD's disentangled vectors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality import peers
from benchmarks.quality.data import cache_folder
from benchmarks.quality.lab import Lab, Weights, digest
from benchmarks.quality.methods import FUSION_BENCH, MERGEKIT, Method, disentangled
from benchmarks.quality.peer_methods import METHODS

# On every seed: one setting of each family, the one that its authors name; the others on the first seed alone, because
# a merge by a peer takes from seconds to minutes.
EVERYWHERE = (
    "mergekit-ties-0.2",
    "mergekit-dare-ties-0.5",
    "mergekit-breadcrumbs-0.9",
    "fusion-bench-iso-c-layers",
    "fusion-bench-tsvm-layers",
)
FIRST_SEED = (
    "mergekit-task-arithmetic",
    "mergekit-ties-0.5",
    "mergekit-dare-linear-0.5",
    "mergekit-breadcrumbs-ties-0.9",
    "mergekit-della-0.5",
    "mergekit-della-linear-0.5",
    "mergekit-model-stock",
    "mergekit-sce",
    "mergekit-karcher",
    "mergekit-multislerp",
    "mergekit-ram",
    "mergekit-ramplus",
    "fusion-bench-ties-20",
    "fusion-bench-dare-0.8",
    "fusion-bench-magmax",
    "fusion-bench-iso-cts-layers",
    "fusion-bench-opcm",
    "fusion-bench-wudi-300",  # a quarter of an hour, for its speed beside the closed form
)
ON_VECTORS = ("mergekit-ties-0.2",)


def _folder() -> Path:
    return cache_folder() / "peer-merges"


def _read(file: Path, base: Weights) -> Weights:
    """A peer's merge with the base's names, dtypes and order."""
    found = load_file(file)
    return {name: found[name].to(tensor.dtype) for name, tensor in base.items()}


def _method(name: str, seeds: tuple[int, ...] | None, say: Callable[[str], None]) -> Method:
    peer = METHODS[name]

    def find(lab: Lab) -> peers.PeerMerge:
        folders = [model.encoder for model in lab.models]
        return peers.merged(peer, lab.base_folder, folders, _folder(), report=say)

    package, block = ("mergekit", MERGEKIT) if peer.peer == "mergekit" else ("FusionBench", FUSION_BENCH)
    return Method(
        f"{peer.title} ({package})",
        block,
        lambda lab: _read(find(lab).file, lab.base),
        scaled=peer.scale == "linear",
        seeds=seeds,
        took=lambda lab: find(lab).seconds,
    )


def _on_vectors(name: str, say: Callable[[str], None]) -> Method:
    peer = METHODS[name]

    def make(lab: Lab) -> Weights:
        folders = [_written(lab, state) for state in disentangled(lab)]
        try:
            return _read(peers.merged(peer, lab.base_folder, folders, _folder(), report=say).file, lab.base)
        finally:
            for folder in folders:
                shutil.rmtree(folder)

    return Method(f"AWD rows + {peer.title} (mergekit)", "peers on disentangled vectors", make)


def _written(lab: Lab, state: Weights) -> Path:
    """A state dict as a folder that peers can read."""
    folder = cache_folder() / "vectors" / digest(state)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(lab.base_folder / "config.json", folder)
    save_file({name: torch.clone(tensor) for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def peer_methods(say: Callable[[str], None], first_seed: int = 0) -> list[Method]:
    """All rows that peers compute."""
    peers.peers_python(say)
    rows = [_method(name, None, say) for name in EVERYWHERE]
    rows += [_method(name, (first_seed,), say) for name in FIRST_SEED]
    return rows + [_on_vectors(name, say) for name in ON_VECTORS]
