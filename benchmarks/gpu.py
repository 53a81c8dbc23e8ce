"""Checks, then times, everything on a GPU; `python -m benchmarks.gpu_suite` runs it behind the tests.

    python -m benchmarks.gpu [--shape vit_b32_x8] [--rounds 25] [--sections cuda,triton,peers,compiled]
    python -m benchmarks.gpu --predict             what counting says, without a GPU
    python -m benchmarks.gpu --verdict FILE.json   the targets from the results of a run

Appends rows to <results>/<device>.csv and keeps everything, with what is wrong or was skipped, in <device>.json; --add
adds sections to the JSON of the same run. Exit code 1 where a check fails, and no speed of it, or where something could
not be measured that a GPU should have; 2 without a GPU.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from awd_fast import measure
from awd_fast.bench import Parameters
from awd_fast.measure import Case, Result
from awd_fast.ops import backends
from benchmarks import gpu_cases, gpu_targets, harness
from benchmarks.gpu_clock import Clock, Graphed
from benchmarks.shapes import SHAPES

SECTIONS = ("cuda", "triton", "peers", "compiled")
REHEARSED = {"cuda": "reference", "triton": "native"}
"""The backends that stand in for those of a GPU in a rehearsal on the CPU."""
NO_GPU = "There is no GPU here that torch sees, so nothing was measured; --rehearse goes through the same on the CPU."
MORE_COLUMNS = ("driver", "CUDA", "triton")
FROM_PYTHON = ", from Python"


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="vit_b32_x8")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds after which a case gets no more rounds")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="of " + ", ".join(SECTIONS))
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="the folder of CSV and JSON files")
    parser.add_argument("--add", action="store_true", help="add the sections to the JSON file")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with the backends that it has")
    parser.add_argument("--predict", action="store_true", help="print what counting says, and end")
    parser.add_argument("--verdict", type=Path, help="print the targets from a JSON file, and end")
    chosen = parser.parse_args(arguments)
    chosen.sections = chosen.sections.split(",")
    if not set(chosen.sections) <= set(SECTIONS):
        parser.error(f"--sections is {','.join(chosen.sections)}; expected some of {', '.join(SECTIONS)}")
    if chosen.rounds < 1:
        parser.error("--rounds is at least 1")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for; gives the exit code."""
    chosen = options(arguments)
    if chosen.predict:
        print(gpu_targets.prediction_table(SHAPES[chosen.shape]))
        return 0
    if chosen.verdict is not None:
        return verdict(chosen.verdict)
    if not torch.cuda.is_available() and not chosen.rehearse:
        print(NO_GPU, file=sys.stderr)
        return 2
    device = "cpu" if chosen.rehearse else "cuda"
    known = facts(device)
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    shape = SHAPES[chosen.shape]
    data = shape.parameters(device=device)
    print(f"{chosen.shape}: {shape.elements:,} elements, {shape.tasks} models, on {device}", flush=True)
    file = harness.results_file(chosen.results, known["device"])
    record = file.with_suffix(".json")
    kept: dict[str, Any] = {"facts": known, "sections": {}}
    if chosen.add and record.exists():
        kept = json.loads(record.read_text())
    for section in chosen.sections:
        found = run(section, data, device, chosen)
        harness.append(file, harness.rows(found, chosen.shape, known), (*harness.COLUMNS, *MORE_COLUMNS))
        # Written after each section: what was measured must outlive a section that fails or takes too long.
        kept["sections"][section] = [recorded(result) for result in found]
        record.write_text(json.dumps({**kept, "shape": chosen.shape, "rehearsal": chosen.rehearse}, indent=1))
        if device == "cuda":
            torch.cuda.empty_cache()
    return verdict(record)


def verdict(record: Path) -> int:
    """Prints the targets from a JSON file of results, and what is wrong or missing; 1 where something is."""
    kept = json.loads(record.read_text())
    results = [revived(entry) for entries in kept["sections"].values() for entry in entries]
    named = REHEARSED if kept["rehearsal"] else {name: name for name in REHEARSED}
    if kept["rehearsal"]:
        print("\nA REHEARSAL on the CPU, of the way and not of the speed: these are no results of a GPU.")
    print("\n" + gpu_targets.verdicts(gpu_targets.targets(results, named["cuda"], named["triton"])))
    for result in results:
        if result.wrong or result.skipped:
            word, why = ("WRONG", result.wrong) if result.wrong else ("SKIPPED", result.skipped)
            print(f"{word} {result.case.operation} ({result.case.backend}): {why}")
    missing = not kept["rehearsal"] and any(result.skipped for result in results)
    return 1 if missing or any(result.wrong for result in results) else 0


def facts(device: str) -> dict[str, str]:
    """What a row says about where and with what it was measured."""
    known = {**harness.facts(), "driver": "", "CUDA": str(torch.version.cuda or ""), "triton": triton_version()}
    if device != "cuda":
        # So that no file of a rehearsal has the name of one with results.
        return known | {"device": f"rehearsal on {known['device']}"}
    properties = torch.cuda.get_device_properties(0)
    architecture = f"sm_{properties.major}{properties.minor}"
    return known | {"device": properties.name, "instruction set": architecture, "driver": driver()}


def triton_version() -> str:
    """Of the installed triton, or an empty text."""
    import importlib.metadata

    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def driver() -> str:
    """The version of NVIDIA's driver, or "unknown"."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or ["unknown"])[0] if done.returncode == 0 else "unknown"


def run(section: str, data: Parameters, device: str, chosen: argparse.Namespace) -> list[Result]:
    """Measures a section and prints its table. What is not timed is in the table with the reason."""
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", file=sys.stderr, flush=True)

    def measured(cases: Sequence[Case], ahead: bool) -> list[Result]:
        with torch.no_grad() if section in REHEARSED else torch.enable_grad():
            return measure.measure(cases, chosen.rounds, chosen.budget, say, Clock(device, ahead))

    ceiling = gpu_cases.copy(device, 1 << 20 if chosen.rehearse else gpu_cases.COPIED)
    if section == "peers":
        found = [gpu_cases.row_peer(data, "autograd"), gpu_cases.global_peer(data, "autograd")]
        results = measured([ceiling, *found], ahead=True)
    elif section == "compiled":
        results = measured([ceiling, gpu_cases.global_peer(data, "compiled")], ahead=True)
    else:
        backend = REHEARSED[section] if chosen.rehearse else section
        results = backend_results(data, backend, ceiling, measured)
    print(f"\n{section}\n{measure.table(results)}\n{measure.summary(results)}", flush=True)
    return results


def backend_results(data: Parameters, backend: str, ceiling: Case, measured: Any) -> list[Result]:
    """Every operator: the work of the device alone, and again from Python with what the launches cost."""
    reason = backends.unavailable(backend) if backend in backends.PREFERENCE else "this version has no such backend"
    if reason is not None:
        missing = Case(operation="every operator", backend=backend, run=lambda: None, check=lambda: None)
        return [Result(missing, skipped=reason)]
    cases = gpu_cases.operators(data, backend)
    graphs = [Graphed(case, backend in gpu_cases.GRAPHED) for case in cases]
    results = measured([ceiling, *(graphed.case for graphed in graphs)], True)
    for index, graphed in enumerate(graphs, start=1):
        results[index] = replace(results[index], case=replace(results[index].case, note=graphed.note))
    right = [case for case, result in zip(cases, results[1:], strict=True) if result.seconds]
    again = [replace(case, check=lambda: None, backend=backend + FROM_PYTHON, most_rounds=5) for case in right]
    one = gpu_cases.iteration(results, backend, data)
    return [*results, *([one] if one else []), *measured(again, False)]


def recorded(result: Result) -> dict[str, Any]:
    """A result as JSON; `revived` is the way back, as far as tables and targets need it."""
    case = result.case
    names = ("operation", "backend", "dtype", "tasks", "moved", "repeats", "peer", "note")
    told = {"seconds": list(result.seconds), "wrong": result.wrong, "skipped": result.skipped}
    return {**{name: getattr(case, name) for name in names}, **told}


def revived(entry: dict[str, Any]) -> Result:
    """The result of which `recorded` made this."""
    fields = {name: value for name, value in entry.items() if name not in ("seconds", "wrong", "skipped")}
    case = Case(run=lambda: None, check=lambda: None, **fields)
    return Result(case, tuple(entry["seconds"]), wrong=entry["wrong"], skipped=entry["skipped"])


if __name__ == "__main__":
    sys.exit(main())
