"""Checks, then times, everything on one shape: tables, rows for benchmarks/results/<device>.csv, and a picture.

    python -m benchmarks.cpu [--shape minilm_x8] [--threads 2] [--rounds 15] [--sections operators,dtypes]

Exit code 1 where a check fails; what is wrong is printed, and no speed of it.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from awd_fast import measure
from awd_fast.measure import Result
from awd_fast.ops import backends
from benchmarks import cases, harness, peak_memory, plot, targets
from benchmarks.shapes import SHAPES

SECTIONS = ("operators", "dtypes", "tasks", "memory")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="minilm_x8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds after which a case gets no more rounds")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="of " + ", ".join(SECTIONS))
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="the folder of CSV files and pictures")
    parser.add_argument("--no-plot", action="store_true")
    chosen = parser.parse_args()
    chosen.sections = chosen.sections.split(",")
    if not set(chosen.sections) <= set(SECTIONS):
        parser.error(f"--sections is {','.join(chosen.sections)}; expected some of {', '.join(SECTIONS)}")
    if chosen.rounds < 1 or chosen.threads < 1:
        parser.error("--rounds and --threads are at least 1")
    return chosen


def main() -> int:
    """Runs the sections; gives the exit code."""
    chosen = options()
    torch.set_num_threads(chosen.threads)
    known = harness.facts()
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    shape = SHAPES[chosen.shape]
    print(f"{chosen.shape}: {shape.elements:,} elements, {shape.tasks} models")
    reason = backends.unavailable(cases.NATIVE)
    if reason is not None:
        print(f"no native operators: {reason}")
    done: dict[str, Sequence[Result]] = dict.fromkeys(SECTIONS, ())
    for section in chosen.sections:
        if section != "memory" and (section == "operators" or reason is None):
            done[section] = run(section, chosen)
            harness.append(harness.results_file(chosen.results), harness.rows(done[section], chosen.shape, known))
    if done["dtypes"]:
        print("\nelements a second, relative to float32\n" + targets.dtype_table(done["dtypes"]))
    if done["tasks"]:
        print("\ntime by K (for an element of a model, relative to K = 2)\n" + targets.task_table(done["tasks"]))
    memory = peak_memory.ratio(chosen.shape, chosen.threads) if "memory" in chosen.sections else math.nan
    print("\n" + targets.target_table(targets.targets(done["operators"], done["dtypes"], memory)))
    if done["operators"] and not chosen.no_plot:
        picture = harness.results_file(chosen.results).with_suffix(".svg")
        plot.draw(harness.rows(done["operators"], chosen.shape, known), picture)
        print(f"\ndrew {picture}")
    wrong = [result for results in done.values() for result in results if result.wrong]
    for result in wrong:
        print(f"WRONG {result.case.operation} ({result.case.backend}, {result.case.dtype}): {result.wrong}")
    return 1 if wrong else 0


def run(section: str, chosen: argparse.Namespace) -> list[Result]:
    """Measures a section and prints its table. What is not timed is in the table with the reason."""
    shape = SHAPES[chosen.shape]
    match section:
        case "operators":
            found = cases.operators(shape.parameters())
        case "dtypes":
            found = cases.dtypes(shape)
        case _:
            found = cases.tasks(shape)
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", file=sys.stderr, flush=True)

    results = measure.measure(found, chosen.rounds, chosen.budget, say)
    results += [
        cases.three_hundred(result) for result in results if result.case.operation == "adam_step" and result.seconds
    ]
    print(f"\n{section}\n{measure.table(results)}\n{measure.summary(results)}", flush=True)
    return results


if __name__ == "__main__":
    harness.keep_freed_memory("benchmarks.cpu")
    sys.exit(main())
