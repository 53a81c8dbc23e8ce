"""Merging whole model folders: `awd-fast merge` beside reading and writing the same bytes, and beside mergekit.

    python -m benchmarks.folders [--case 110m|llm|lora] [--scale tiny|full] [--work DIR] [--rounds 5] [--csv FILE]

110m: base and 8 models, float32, 110 tensors each, 4 GB. llm: base and 3 models of 1.48 G elements, bfloat16, in files
of 1 GB, 12 GB. lora: the same base and 8 adapters of rank 16; the alternative writes 24 GB of full models first.
The models are made under DIR and deleted at the end, or kept for the next run by --keep. mergekit (110m only) goes into
an environment of its own. Every output is checked first; exit code 1 where one is wrong, and there is no speed of it.
The page cache is warm: all inputs are read before anything is timed.
"""

import argparse
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks import folder_checks, folder_models, folder_results, folder_runs, harness, targets
from benchmarks.folder_models import Case
from benchmarks.folder_results import Contestant, Line

ALIASES = {"bert": "110m"}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*folder_models.FULL, *ALIASES], default="110m", help="bert is 110m")
    parser.add_argument("--scale", choices=["tiny", "full"], default="full")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "awd-fast-folders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="mergekit, full models")
    parser.add_argument("--mergekit-venv", type=Path, help="made where it is missing  [default: in --work]")
    parser.add_argument("--keep", action="store_true", help="keep the models and mergekit for the next run")
    parser.add_argument("--csv", type=Path, help="[default: of this device in benchmarks/results; none for tiny]")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error("--rounds is at least 1")
    chosen.case = ALIASES.get(chosen.case, chosen.case)
    if chosen.csv is None and chosen.scale == "full":
        chosen.csv = harness.results_file(harness.RESULTS)
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Makes the models, measures, prints and cleans up; gives the exit code."""
    chosen = options(arguments)
    case = folder_models.case(chosen.case, chosen.scale)
    known = harness.facts()
    print(", ".join(f"{name} {value}" for name, value in known.items()), flush=True)
    models, scratch = chosen.work / case.name.replace(" ", "-"), chosen.work / f"run-{case.name.replace(' ', '-')}"
    made_work = not chosen.work.exists()
    chosen.work.mkdir(parents=True, exist_ok=True)
    removed = [scratch] if chosen.keep else [scratch, models]
    try:
        needed, free = space(case, models), shutil.disk_usage(chosen.work).free
        if free < needed:
            print(f"{chosen.work} has {free / 1e9:.1f} GB free; this case needs {needed / 1e9:.1f} GB")
            return 2
        venv = None
        if chosen.peers and chosen.case == "110m":
            venv = chosen.mergekit_venv or chosen.work / "mergekit-venv"
            if folder_runs.install_mergekit(venv) and not chosen.keep:
                removed.append(venv)
        found = run(case, chosen, models, scratch, venv)
    finally:
        for folder in removed:
            shutil.rmtree(folder, ignore_errors=True)
        if made_work:
            with suppress(OSError):
                chosen.work.rmdir()
    report(case, chosen, found, known)
    wrong = [line for line in found if line.wrong]
    for line in wrong:
        print(f"WRONG {'; '.join(line.key)}: {line.wrong}")
    return 1 if wrong else 0


def space(case: Case, folder: Path) -> float:
    """Bytes of disk needed beside what an earlier run left: inputs, two outputs, and models made of adapters."""
    inputs = 0 if (folder / folder_models.MADE).is_file() else 1 if case.rank else 1 + case.models
    outputs = 2 + (case.models if case.rank else 0)
    return 1.05 * (inputs + outputs) * case.model_bytes


def run(case: Case, chosen: argparse.Namespace, folder: Path, scratch: Path, venv: Path | None) -> list[Line]:
    """Makes the models and measures everything that is asked for."""
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", file=sys.stderr, flush=True)

    say(f"making the models in {folder}")
    base, models = folder_models.make(case, folder)
    return folder_results.measured(contestants(case, base, models, venv, chosen.peers), chosen.rounds, scratch, say)


def contestants(case: Case, base: Path, models: list[Path], venv: Path | None, peers: bool) -> list[Contestant]:
    """What is measured for a case, in the order of a round."""
    r, c, layout = folder_results, folder_checks, case.layout
    of_base = sorted(base.glob("*.safetensors"))
    inputs = of_base + [file for model in models for file in sorted(model.glob("*.safetensors"))]
    moved = float(sum(file.stat().st_size for file in inputs + of_base))
    read = c.from_adapters(base, models) if case.rank else c.from_folders(base, models)
    names = list(layout.shapes())

    def ours(method: str, out: Path) -> folder_runs.Run:
        return folder_runs.awd_fast(base, models, out, method, out.parent / "log.jsonl")

    def by_mergekit(method: str, out: Path) -> folder_runs.Run:
        assert venv is not None
        config = out.parent / "config.yml"
        config.write_text(folder_runs.mergekit_config(base, models, method, c.SCALE))
        return folder_runs.mergekit(venv, config, out)

    def full_models(out: Path) -> folder_runs.Run:
        return folder_runs.materialise(base, models, out.parent, out)

    def wrong_awd(out: Path) -> str | None:
        return c.wrong_folder(out, layout) or c.wrong_awd(out, read, layout)

    def wrong_sums(out: Path, sharded: bool = True) -> str | None:
        return c.wrong_folder(out, layout, sharded) or c.wrong_sums(out, read, names)

    def wrong_full_models(out: Path) -> str | None:
        made = [out.parent / f"full{index}" for index in range(case.models)]
        return c.wrong_folder(out, layout) or c.wrong_awd(out, c.from_folders(base, made), layout)

    found = [
        Contestant(r.BASELINE, lambda out: folder_runs.read_and_copy(inputs, of_base, out), moved=moved),
        Contestant(r.DISK, lambda out: folder_runs.read_and_sync(inputs, of_base, out), moved=moved),
        Contestant(r.START, lambda out: folder_runs.start_up()),
        Contestant(r.OURS, lambda out: ours("awd", out), wrong_awd, moved),
    ]
    if peers and case.rank:
        found.append(Contestant(r.FULL_MODELS, full_models, wrong_full_models, most=3))
    if venv is not None:
        found += [
            Contestant(r.PLAIN, lambda out: ours("task_arithmetic", out), wrong_sums, moved),
            Contestant(
                r.MERGEKIT, lambda out: by_mergekit("task_arithmetic", out), lambda out: wrong_sums(out, False), moved
            ),
            Contestant(
                r.TIES, lambda out: by_mergekit("ties", out), lambda out: c.wrong_folder(out, layout, False), moved, 1
            ),
        ]
    return found


def report(case: Case, chosen: argparse.Namespace, found: list[Line], known: dict[str, str]) -> None:
    """Prints the table and the verdicts, and appends to the CSV file."""
    kind = f"{case.models} {'adapters' if case.rank else 'models'}"
    print(f"\n{case.name}: base and {kind}, {case.layout.elements:,} elements, {case.layout.dtype}")
    print(folder_results.table(found))
    verdicts = folder_results.verdicts(chosen.case, found) if chosen.scale == "full" else []
    if verdicts:
        print("\n" + targets.target_table(verdicts))
    if chosen.csv is not None:
        results = [folder_results.result(line, case.layout.dtype, case.models) for line in found]
        harness.append(chosen.csv, harness.rows(results, f"folder {case.name}", known))
        print(f"\nappended to {chosen.csv}")


if __name__ == "__main__":
    sys.exit(main())
