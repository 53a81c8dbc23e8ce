"""The command line: `awd-fast merge`, `inspect`, `mergekit`, `fusion_bench`, `info` and `bench`.

Exit codes: 0 done; 2 the input cannot be merged (one sentence says why); 1 the machine failed (disk full, ...);
130 interrupted. torch is imported only after the options are understood, so that --help is quick.
"""

import functools
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, get_args

import click

from awd_fast import defaults
from awd_fast.errors import InputError
from awd_fast.objective import OPTIMIZERS, PRESETS, SGD, Groups, Penalty, Similarity
from awd_fast.recipe import DEFAULT_EXCLUDE, DTYPES, Method, Missing, Others
from awd_fast.version import __version__

Command = Callable[..., None]


def choices(allowed: Any) -> "click.Choice[str]":
    """The values of a Literal type as a choice on the command line."""
    return click.Choice(get_args(allowed))


def source_options(command: Command) -> Command:
    """Where the models are."""
    options = [
        click.option("--base", metavar="B", help="Base model: a folder, a .safetensors file or a Hub name."),
        click.option(
            "--model", "models", multiple=True, metavar="M", help="A fine-tuned model or LoRA adapter; once each."
        ),
    ]
    return functools.reduce(lambda done, option: option(done), reversed(options), command)


def recipe_options(command: Command) -> Command:
    """Every option of a merge by its own name; those left out take the defaults of `awd_fast.merge`."""
    o, s = defaults.AWD, SGD()
    options = [
        click.option("--method", type=choices(Method), help="How to merge.  [default: awd]"),
        click.option("--preset", type=click.Choice(list(PRESETS)), help="AWD as published, or by rows."),
        click.option(
            "--scale",
            type=float,
            help="Lambda, the factor of the summed vectors.  [default: for K models "
            f"min(1, {defaults.UPDATE} / sqrt(K)); of wudi 1]",
        ),
        click.option("--weight", "weights", type=float, multiple=True, help="One per model; negative forgets."),
        click.option("--groups", type=choices(Groups), help=f"What forms one vector.  [default: {o['groups']}]"),
        click.option("--similarity", type=choices(Similarity), help=f"|cos| or cos^2.  [default: {o['similarity']}]"),
        click.option("--penalty", type=choices(Penalty), help=f"R(d).  [default: {o['penalty']}]"),
        click.option("--alpha", type=float, help=f"Weight of the penalty.  [default: {o['alpha']:g}]"),
        click.option("--eps", type=float, help=f"Added to norms in cosines.  [default: {o['eps']:g}]"),
        click.option(
            "--optimizer",
            type=click.Choice(list(OPTIMIZERS)),
            help="[default: converge, unless options of another are given: sgd, or adam if sgd lacks one]",
        ),
        click.option("--lr", type=float, help=f"Step size of sgd and adam.  [default for sgd: {s.lr:g}]"),
        click.option("--momentum", type=float, help=f"Of sgd.  [default: {s.momentum:g}]"),
        click.option("--nesterov/--no-nesterov", default=None, help="Nesterov momentum of sgd."),
        click.option("--weight-decay", type=float, help=f"Of sgd and adam.  [default for sgd: {s.weight_decay:g}]"),
        click.option("--betas", type=float, nargs=2, default=None, help="Of adam.  [default: 0.9 0.999]"),
        click.option("--adam-eps", type=float, help="Of adam.  [default: 1e-08]"),
        click.option("--iterations", type=int, help=f"Of sgd and adam.  [default: {s.iterations}]"),
        click.option("--tolerance", type=float, help="Of converge.  [default: 1e-06]"),
        click.option("--max-iterations", type=int, help="Of converge.  [default: 200]"),
        click.option("--ridge", type=float, help="Of wudi: how much of Task Arithmetic is kept.  [default: 0.1]"),
        click.option("--columns", type=int, metavar="N", help="Of wudi: solved together; 0 is all.  [default: 0]"),
        click.option("--include", multiple=True, metavar="PATTERN", help="Tensors to disentangle.  [default: 2-D]"),
        click.option(
            "--exclude",
            multiple=True,
            metavar="PATTERN",
            help=f"Tensors not to disentangle; replaces the default list ({', '.join(DEFAULT_EXCLUDE[:3])}, ...); "
            "an empty pattern excludes nothing.",
        ),
        click.option("--others", type=choices(Others), help="The remaining tensors.  [default: task_arithmetic]"),
        click.option(
            "--others-scale",
            type=float,
            help="Scale of the remaining tensors.  [default: --scale; of wudi --scale / sqrt(K)]",
        ),
        click.option("--missing", type=choices(Missing), help="Tensors some models lack.  [default: error]"),
        click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the output.  [default: as the base]"),
        click.option("--backend", metavar="NAME", help="native or reference.  [default: the fastest]"),
        click.option("--device", metavar="cpu|cuda|cuda:N", help="Where to compute.  [default: cpu]"),
        click.option("--device-memory", type=float, metavar="GB", help="Of the GPU to use.  [default: a third]"),
        click.option("--memory", type=float, metavar="GB", help="For buffers on the CPU.  [default: 1.07 (1 GiB)]"),
        click.option("--json-log", metavar="FILE", help="Write progress as JSON lines; - is standard output."),
    ]
    return functools.reduce(lambda done, option: option(done), reversed(options), command)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given on the command line."""
    kept = {name: value for name, value in options.items() if value is not None and value != ()}
    if "exclude" in kept:
        kept["exclude"] = tuple(pattern for pattern in kept["exclude"] if pattern)
    return kept


def sources(config: str | None, base: str | None, models: tuple[str, ...], options: dict[str, Any]) -> Any:
    """Base, models and options, from a configuration file or the command line, whose options overrule the file's."""
    if config is not None:
        if base is not None or models:
            raise InputError("--base and --model go with no configuration file; it names the models itself")
        from awd_fast.config import load_config

        loaded = load_config(config)
        return loaded.base, loaded.models, loaded.options | given(options)
    if base is None:
        raise InputError("no base model was given; expected --base B, or a configuration file")
    if not models:
        raise InputError("no model was given; expected --model M at least once, or a configuration file")
    return base, models, given(options)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, no_args_is_help=False)
@click.version_option(__version__, prog_name="awd-fast")
def cli() -> None:
    """Merges fine-tuned models by Adaptive Weight Disentanglement (AWD, arXiv 2411.18729)."""


@cli.command()
@click.argument("config", required=False, metavar="[CONFIG.yml]")
@source_options
@click.option("--out", required=True, metavar="DIR", help="The folder to write; it must not exist.")
@click.option("--overwrite", is_flag=True, help="Replace DIR if it is a model folder; discard an unfinished merge.")
@click.option("--resume", is_flag=True, help="Go on with a merge into DIR that was stopped.")
@click.option("--as-adapter", is_flag=True, help="Write the merge of LoRA adapters as one adapter.")
@click.option("--dry-run", is_flag=True, help="Say what would happen to each tensor; write nothing.")
@recipe_options
def merge(
    config: str | None,
    base: str | None,
    models: tuple[str, ...],
    out: str,
    overwrite: bool,
    resume: bool,
    as_adapter: bool,
    dry_run: bool,
    json_log: str | None,
    **options: Any,
) -> None:
    """Merges models into DIR, a folder that transformers loads.

    The models come from --base and --model, or from a YAML file with mergekit's keys. Started by torchrun, its
    processes share the work: torchrun --nproc-per-node N -m awd_fast merge ...
    """
    base, models, chosen = sources(config, base, models, options)
    from awd_fast import disk, output_folder, pipeline, ranks, staging
    from awd_fast.checkpoints import local_path
    from awd_fast.recipe import make_recipe

    if dry_run:
        recipe = make_recipe(len(models), **chosen)
        opened, others, plan = pipeline.open_and_plan(base, models, recipe, as_adapter)
        output_folder.check_output(local_path(out), overwrite, [opened, *others])
        say(pipeline.describe_plan(opened, others, plan, recipe, as_adapter))
        return
    shown: dict[str, Any] = {
        "progress": sys.stderr.isatty(),
        "json_log": json_log,
        "resume": resume,
        "as_adapter": as_adapter,
    }
    disk.keep_freed_memory()
    try:
        with ranks.joined():
            first = ranks.present().rank == 0
            report = pipeline.merge_checkpoints(base, models, out, overwrite=overwrite, **shown, **chosen)
    except BaseException as error:
        # What is wrong with the input, or with the options, says itself what to do.
        if not isinstance(error, InputError) and staging.unfinished(local_path(out)) is not None:
            HINTS.append(f"--resume goes on with what is kept in {staging.folder_for(local_path(out))}")
        raise
    if not first:
        return
    counts = ", ".join(f"{count} by {action}" for action, count in report.counts().items())
    scales = f" with {report.recipe.scales()}" if report.recipe.scales() else ""
    say(f"merged {len(models)} models into {out}{scales}: {counts}")
    conclude(report)


@cli.command()
@click.argument("config", required=False, metavar="[CONFIG.yml]")
@source_options
@click.option("--plot", metavar="FILE", help="Draw heat maps and bars to FILE (.png, .svg, .pdf).")
@click.option("--json", "json_file", metavar="FILE", help="Write the report to FILE.")
@recipe_options
def inspect(
    config: str | None,
    base: str | None,
    models: tuple[str, ...],
    plot: str | None,
    json_file: str | None,
    json_log: str | None,
    **options: Any,
) -> None:
    """Prints the similarity of the task vectors before and after AWD, per tensor and overall. Merges nothing."""
    base, models, chosen = sources(config, base, models, options)
    from awd_fast import pipeline, plots

    picture = None if plot is None else plots.check_target(plot, plots.PICTURES)
    figures = None if json_file is None else plots.check_target(json_file, (".json",))
    if picture is not None:
        plots.require_matplotlib()
    shown: dict[str, Any] = {"progress": sys.stderr.isatty(), "json_log": json_log}
    report = pipeline.inspect_checkpoints(base, models, **shown, **chosen)
    say(report.table())
    conclude(report)
    if figures is not None:
        figures.write_text(report.json_text(), encoding="utf-8")
    if picture is not None:
        plots.plot_report(report, picture)


@cli.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
    short_help="Merges by mergekit, to which awd and wudi are added.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="CONFIG.yml OUT [mergekit-yaml's options]")
def mergekit(arguments: tuple[str, ...]) -> None:
    """Merges by mergekit-yaml, whose arguments these are, with the merge methods awd and wudi (docs/mergekit.md)."""
    from awd_fast.integrations import mergekit as integration

    integration.run(arguments, HINTS.append)


@cli.command(
    "fusion_bench",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
    short_help="FusionBench, its Task Arithmetic, TIES and AdaMerging accelerated.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[fusion_bench's arguments]")
def fusion_bench(arguments: tuple[str, ...]) -> None:
    """Runs fusion_bench, whose arguments these are, with its merges computed by awd_fast (docs/fusion_bench.md)."""
    from awd_fast.integrations import fusion_bench as integration

    integration.run(arguments)


@cli.command()
def info() -> None:
    """Prints the version, the backends and why one is missing, and what this machine has."""
    import platform

    import torch

    from awd_fast.ops import backends

    click.echo(f"awd-fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for name, reason in backends.available().items():
        click.echo(f"backend {name}: {'ready' if reason is None else reason}")
    for line in backends.machine():
        click.echo(line)


@cli.command()
@click.option("--rows", default=1536, show_default=True, help="Of each tensor.")
@click.option("--columns", default=384, show_default=True, help="Of each tensor.")
@click.option("--tensors", default=16, show_default=True, help="How many; together larger than the caches.")
@click.option("--models", default=8, show_default=True, help="K, at least 2.")
@click.option("--rounds", default=7, show_default=True, help="Runs of each operator; the median counts.")
@click.option("--threads", type=click.IntRange(1), help="[default: as torch decides]")
def bench(rows: int, columns: int, tensors: int, models: int, rounds: int, threads: int | None) -> None:
    """Times this machine: each operator, checked first, against the reference and the memory.

    Descents are on |cos|, with the 300 steps of --preset rows and to convergence.
    Exit code 1 where an operator gives a wrong result; its speed is then not reported.
    """
    import torch

    from awd_fast import bench, measure

    if threads is not None:
        torch.set_num_threads(threads)
    click.echo(f"{measure.device()}, instruction set {measure.instruction_set()}, {torch.get_num_threads()} threads")
    results = bench.compare(rows, columns, tensors, models, rounds, lambda line: click.echo(line, err=True))
    say(f"{measure.table(results)}\n{measure.summary(results)}")
    if any(result.wrong for result in results):
        raise click.ClickException("an operator gave a wrong result")


def conclude(report: Any) -> None:
    """Prints the figures of a `MergeReport` as a whole, and its warning."""
    if report.summary() is not None:
        say(report.summary())
    if report.note() is not None:
        say(report.note())
    for warning in (report.warning(), report.fallback()):
        if warning is not None:
            say(f"awd-fast: warning: {warning}", error=True)


def say(text: str, error: bool = False) -> None:
    """Prints text that may hold file names which no encoding can show."""
    click.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"), err=error)


class Stopped(BaseException):
    """A signal asked the process to end; as an exception it lets a half-written output be cleaned up."""


HINTS: list[str] = []
"""What the user can do after the error that ends the process."""
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def main() -> NoReturn:
    """The entry point: runs a command and turns what goes wrong into one sentence and an exit code."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        for name in SIGNALS:  # later signals must not disturb the cleaning up
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        raise Stopped

    for name in SIGNALS:
        # One that is ignored stays ignored: that is how nohup and a shell's background jobs ask for it.
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), stop)
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except BaseException as error:
        # A library between the signal and here may have turned Stopped into an error of its own.
        if received:
            word = "interrupted" if received[0] == signal.SIGINT else "terminated"
            _fail(word if HINTS else f"{word}; no half-written output is left", 128 + received[0])
        _explain(error)


def _explain(error: BaseException) -> NoReturn:
    """One sentence and an exit code for the errors that a user can do something about; others are raised again."""
    match error:
        case click.ClickException():
            _fail(error.format_message(), error.exit_code)
        case InputError():
            _fail(str(error), 2)
        case OSError() | MemoryError():
            _fail(str(error) or type(error).__name__, 1)
        case RuntimeError() if "alloc" in str(error):  # torch's word for too little memory
            _fail(f"out of memory: {error}", 1)
    raise error


def _fail(message: str, code: int) -> NoReturn:
    say(f"awd-fast: {' '.join('; '.join([message, *HINTS]).split())}", error=True)
    sys.exit(code)
