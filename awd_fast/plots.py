"""Pictures of a report: K x K heat maps of the similarity before and after, and bars per tensor (extra `plot`)."""

from pathlib import Path
from typing import Any

from awd_fast.card import short_name
from awd_fast.checkpoints import local_path
from awd_fast.errors import InputError
from awd_fast.report import MergeReport


def require_matplotlib() -> Any:
    """matplotlib.pyplot without a display. Raises InputError that says how to install it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise InputError("pictures need matplotlib: pip install 'awd-fast[plot]'") from error
    return plt


PICTURES = (".png", ".svg", ".pdf")


def check_target(path: str | Path, endings: tuple[str, ...]) -> Path:
    """The file to write a picture or report to. Raises InputError, before any work, where that cannot be."""
    file = local_path(path)
    if file.suffix not in endings:
        raise InputError(f"{str(path)!r} is no file to write to: its name must end in {' or '.join(endings)}")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {file.absolute().parent}")
    if file.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder")
    return file


def plot_report(report: MergeReport, path: str | Path) -> None:
    """Draws the report to `path`; the ending chooses the format (.png, .svg, .pdf).

    Left and middle: mean over groups of |cos| for each pair of models, before and after. Right: the mean over pairs for
    each disentangled tensor, one line per tensor. Raises InputError where nothing was disentangled.
    """
    plt = require_matplotlib()
    overall = report.overall
    if overall is None:
        raise InputError("nothing was disentangled, so there is no similarity to draw")
    listed = [(r.step.name, r.similarity) for r in report.tensors if r.similarity is not None]
    height = max(5.0, 0.22 * len(listed) + 1.5)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(17.0, height), layout="constrained", width_ratios=(1.0, 1.0, 1.3)
    )
    before, after = overall.matrix(after=False), overall.matrix(after=True)
    top = max(float(before.max()), float(after.max()), 1e-12)
    names = [short_name(model).replace("$", r"\$") for model in report.models]
    for axes, matrix, when in ((left, before, "before"), (middle, after, "after")):
        image = axes.imshow(matrix.numpy(), vmin=0.0, vmax=top, cmap="viridis")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for i in range(len(names)):
            for j in range(len(names)):
                value = float(matrix[i, j])
                if i != j:
                    color = "black" if value > 0.6 * top else "white"
                    axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=color, fontsize=8)
        axes.set_title(f"{when}: mean |cos| = {overall.mean(after=when == 'after'):.4f}")
    figure.colorbar(image, ax=(left, middle), location="bottom", shrink=0.6, label="mean |cos| over groups")
    _bars(right, listed)
    figure.suptitle(
        f"Similarity of {len(names)} task vectors, {overall.groups} groups ({report.recipe.options.groups})"
    )
    try:
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)


def _bars(axes: Any, listed: list[tuple[str, Any]]) -> None:
    positions = range(len(listed))
    axes.barh([p - 0.2 for p in positions], [s.mean(after=False) for _, s in listed], height=0.4, label="before")
    axes.barh([p + 0.2 for p in positions], [s.mean(after=True) for _, s in listed], height=0.4, label="after")
    axes.set_yticks(positions, [name.replace("$", r"\$") for name, _ in listed], fontsize=7)
    axes.set_ylim(len(listed) - 0.5, -0.5)
    axes.set_xlabel("mean |cos| over groups and pairs")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
