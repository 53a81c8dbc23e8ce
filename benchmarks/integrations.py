"""Merges inside mergekit and FusionBench: their own arithmetic beside ours, on a base and 8 models of 110M parameters.

    python -m benchmarks.integrations [--scale tiny|full] [--rounds 3] [--work DIR] [--csv FILE] [--only TEXT ...]

Each merge is a process of its own in the peers' environment (made on the first call: benchmarks.quality.peers), timed
after its imports: processor seconds of all threads, seconds, and the most memory the process held. The two sides of a
pair take turns. FusionBench's own TIES is run with 2 models only, since it takes 4.4 GB for each; `--own-models` has it
take more. Outputs are compared first: what differs by more than rounding is said.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks import folder_models, folder_runs, harness
from benchmarks.quality import peers

SLOW = ("ties", "dare_ties")
"""Of these mergekit's own is run once: minutes."""


@dataclass
class Side:
    """One way to merge, and what its runs took. models: how many; None for all."""

    peer: str
    method: str
    options: tuple[str, ...] = ()
    models: int | None = None
    rounds: int | None = None
    runs: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return " ".join((self.peer, self.method, *(option.lstrip("-") for option in self.options)))

    def median(self, what: str) -> float:
        return statistics.median(run[what] for run in self.runs)


def sides(own_models: int) -> list[tuple[Side, Side]]:
    """Pairs: what is compared, the peer's own first. Target factors are in `TARGETS`."""
    fast = ("--accelerate",)
    found = [
        (Side("mergekit", method, rounds=1 if method in SLOW else None), Side("mergekit", method, fast))
        for method in ("linear", "task_arithmetic", "ties", "dare_ties")
    ]
    found += [(Side("mergekit", "linear"), Side("mergekit", method)) for method in ("awd", "awd_rows")]
    found += [
        (Side("fusion_bench", "task_arithmetic"), Side("fusion_bench", "task_arithmetic", fast)),
        (Side("fusion_bench", "ties", models=own_models, rounds=1), Side("fusion_bench", "ties", fast)),
        (
            Side("fusion_bench", "ties", models=own_models, rounds=1),
            Side("fusion_bench", "ties", (*fast, "--lazy")),
        ),
    ]
    return found


TARGETS = {
    "mergekit ties accelerate": 15.0,
    "mergekit dare_ties accelerate": 8.0,
    "mergekit task_arithmetic accelerate": 2.0,
    "mergekit awd": 1.0,
    "adamerging": 2.0,
}
MOST_MEMORY = 2e9
"""Bytes that FusionBench's TIES may take on our operators."""


def once(side: Side, python: str, base: Path, models: list[Path], out: Path) -> None:
    """Runs a side and keeps its figures; its output stays in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    own = models[: side.models]
    command = [python, "-m", "benchmarks.integration_worker", side.peer, side.method, str(base), str(out)]
    found = folder_runs.run([*command, *map(str, own), *side.options])
    side.runs.append(json.loads(found.printed.strip().splitlines()[-1]) | {"peak": found.peak, "anon": found.anonymous})


def differing(one: Path, other: Path, base: Path) -> str:
    """How two outputs differ, in words: the share of elements that differ by more than rounding of the update."""
    apart = count = 0
    file = "model.safetensors"
    with safe_open(one / file, "pt") as a, safe_open(other / file, "pt") as b, safe_open(base / file, "pt") as c:
        for name in c.keys():  # noqa: SIM118  no mapping
            update = (b.get_tensor(name) - c.get_tensor(name)).abs().max()
            apart += int(((a.get_tensor(name) - b.get_tensor(name)).abs() > 1e-4 * update).sum())
            count += a.get_tensor(name).numel()
    return f"{apart / count:.2%} of the elements differ"


def measure_pair(
    pair: tuple[Side, Side], rounds: int, python: str, base: Path, models: list[Path], scratch: Path
) -> None:
    for number in range(rounds):
        for index, side in enumerate(pair):
            if number < (side.rounds or rounds):
                once(side, python, base, models, scratch / str(index))


def line(pair: tuple[Side, Side], said: str) -> str:
    own, fast = pair
    ratio = own.median("cpu") / fast.median("cpu")
    count = "" if own.models is None else f" ({own.models} models)"
    target = TARGETS.get(fast.name)
    asked = "" if target is None else f", asked {target:g}: {'reached' if ratio >= target else 'MISSED'}"
    memory = [f"{side.median('peak') / 1e9:.2f} GB ({side.median('anon') / 1e9:.2f} of its own)" for side in pair]
    if own.models is not None:
        within = "under" if fast.median("peak") < MOST_MEMORY else "OVER"
        asked += f"; {within} {MOST_MEMORY / 1e9:g} GB"
    return (
        f"{own.name}{count}: {own.median('cpu'):.2f} s of processor time, {own.median('wall'):.2f} s, {memory[0]}\n"
        f"    {fast.name}: {fast.median('cpu'):.2f} s, {fast.median('wall'):.2f} s, {memory[1]}: {ratio:.1f} x{asked}; "
        f"{said}"
    )


def adamerging(python: str, tasks: int, rounds: int) -> tuple[dict[str, Any], str]:
    """The figures of a step, and what is said of them."""
    command = [python, "-m", "benchmarks.integration_worker", "adamerging", str(tasks), str(rounds)]
    found = json.loads(folder_runs.run(command).printed.strip().splitlines()[-1])
    least = {way: statistics.median(step["cpu"] for step in found[way]) for way in ("own", "accelerated")}
    wall = {way: statistics.median(step["wall"] for step in found[way]) for way in ("own", "accelerated")}
    ratio, target = least["own"] / least["accelerated"], TARGETS["adamerging"]
    verdict = "reached" if ratio >= target else "MISSED"
    return least, (
        f"AdaMerging, arithmetic of a step, CLIP ViT-B/32 ({found['parameters'] / 1e6:.0f}M), {tasks} tasks: "
        f"{least['own']:.2f} s of processor time, {wall['own']:.2f} s; accelerated {least['accelerated']:.2f} s, "
        f"{wall['accelerated']:.2f} s: {ratio:.1f} x, asked {target:g}: {verdict}; gradients differ by "
        f"{found['gradients differ by']:.1e} of their norm"
    )


def row(side: Side, models: int) -> dict[str, str]:
    note = f"processor seconds after imports; peak {side.median('peak') / 1e9:.2f} GB"
    return values(side.name, side.median("cpu"), side.models or models, len(side.runs), note)


def values(what: str, seconds: float, models: int, rounds: int, note: str) -> dict[str, str]:
    found = {"operation": what, "median_s": f"{seconds:.4g}", "dtype": "float32", "K": str(models)}
    return found | {"rounds": str(rounds), "note": note}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["tiny", "full"], default="full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--own-models", type=int, default=2, help="of FusionBench's own TIES")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "awd-fast-integrations")
    parser.add_argument("--csv", type=Path, help="[default: of this device in benchmarks/results; none for tiny]")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names, such as ties or adamerging")
    chosen = parser.parse_args(arguments)
    python = str(peers.peers_python())
    case = folder_models.case("110m", chosen.scale)
    base, models = folder_models.make(case, chosen.work / case.name.replace(" ", "-"))
    known, rows = harness.facts(), []
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    print(
        f"base and {len(models)} models of {case.layout.elements / 1e6:.1f}M elements, {case.layout.dtype}", flush=True
    )
    scratch = chosen.work / "outputs"
    for pair in sides(min(chosen.own_models, len(models))):
        if not any(part in f"{pair[0].name} {pair[1].name}" for part in chosen.only):
            continue
        measure_pair(pair, chosen.rounds, python, base, models, scratch)
        alike = pair[0].method == pair[1].method and pair[0].models is None
        print(line(pair, differing(scratch / "1", scratch / "0", base) if alike else "not compared"), flush=True)
        rows += [row(side, len(models)) for side in pair]
    if any(part in "adamerging" for part in chosen.only):
        tasks = 8 if chosen.scale == "full" else 2
        found, said = adamerging(python, tasks, chosen.rounds)
        print(said, flush=True)
        rows += [
            values(f"adamerging step {way}", seconds, tasks, chosen.rounds, "processor seconds")
            for way, seconds in found.items()
        ]
    shutil.rmtree(scratch, ignore_errors=True)
    file = chosen.csv or (harness.results_file(harness.RESULTS) if chosen.scale == "full" else None)
    if file is not None:
        shape = f"integrations {case.name}"
        harness.append(file, [{**known, "threads": str(torch.get_num_threads()), "shape": shape, **r} for r in rows])
        print(f"appended to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
