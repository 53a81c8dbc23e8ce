"""What merging Llama-3.1-405B would take on many nodes: arithmetic on paper, from the rates of one node.

    python -m benchmarks.scaling [--nodes 64] [--models 8] [--read 2e9] [--write 1e9] [--merge 1e8] [--cores 64]

A rate that is not given is measured here, quickly, on one core and from the page cache: that is no node of a cluster,
and nothing printed is a measurement of one.
"""

import argparse
import heapq
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from awd_fast import bench, measure, ops

ASSUMPTIONS = """\
assumed: every node reads and writes at its rate at the same time as all others, up to --storage of all together; a
core computes as fast beside others as alone, up to --memory of the node; nothing but the K x K products goes over the
network, all-reduced in 2 ceil(log2 nodes) steps of --latency each. row: each row by itself, one pass, no reduction.
tensor: a node keeps its part of a tensor, with all models, until the products of all nodes are summed: one pass, and an
all-reduce for each tensor where it lies on several nodes. global: all products are summed before the first sum of
weights, so that what is disentangled is read twice. Embeddings, norms and the head are added up by task arithmetic. The
descent on the K x K products of tensor and global groups is not counted. "in turn": a node reads, computes, reduces and
writes one after the other; "overlapped": the longest of them hides the rest."""
GROUPS = ("row", "tensor", "global")
PROBE = 256 << 20  # bytes of the file that is written and read


@dataclass(frozen=True)
class Weight:
    """A tensor of rows and columns, and whether AWD disentangles it."""

    rows: int
    columns: int
    awd: bool = True

    @property
    def elements(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Rates:
    """Of a node: bytes a second; elements of the base a second and core with K models beside; seconds of a message.

    memory, storage: bytes a second at most, of a node's memory and of all nodes' storage together.
    """

    read: float
    write: float
    merge: float
    gram: float
    combine: float
    cores: int = 1
    memory: float = math.inf
    storage: float = math.inf
    latency: float = 20e-6
    network: float = 10e9


@dataclass(frozen=True)
class Job:
    """What is merged and by how many nodes; itemsize: bytes of an element, in and out."""

    weights: tuple[Weight, ...]
    models: int
    nodes: int
    groups: str = "row"
    itemsize: int = 2

    def bytes_read(self, weight: Weight) -> float:
        """Of a row of base and models, times the passes."""
        passes = 2 if self.groups == "global" and weight.awd else 1
        return float(weight.columns * (self.models + 1) * self.itemsize * passes)

    def bytes_written(self, weight: Weight) -> float:
        """Of a row."""
        return float(weight.columns * self.itemsize)


@dataclass(frozen=True)
class Times:
    """Seconds of a node."""

    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    reduce: float = 0.0

    def __add__(self, other: "Times") -> "Times":
        read, compute, write = self.read + other.read, self.compute + other.compute, self.write + other.write
        return Times(read, compute, write, self.reduce + other.reduce)

    def times(self, factor: float) -> "Times":
        return Times(self.read * factor, self.compute * factor, self.write * factor, self.reduce * factor)

    @property
    def in_turn(self) -> float:
        return self.read + self.compute + self.write + self.reduce

    @property
    def limit(self) -> str:
        """The stage that takes longest."""
        return max(("read", "compute", "write", "reduce"), key=lambda stage: float(getattr(self, stage)))

    @property
    def overlapped(self) -> float:
        return float(getattr(self, self.limit))


def llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int) -> tuple[Weight, ...]:
    """All tensors of an untied llama; the vectors of the norms are rows of one element."""
    kv = hidden // heads * kv_heads
    layer = [Weight(hidden, hidden)] * 2 + [Weight(kv, hidden)] * 2 + [Weight(inner, hidden)] * 2
    layer += [Weight(hidden, inner)] + [Weight(hidden, 1, awd=False)] * 2
    return (*layer * layers, Weight(hidden, 1, awd=False), *[Weight(vocab, hidden, awd=False)] * 2)


LLAMA_405B = llama(126, 16384, 53248, 128, 8, 128256)


def row_times(job: Job, rates: Rates, weight: Weight) -> Times:
    """A row of a tensor on a node, without reductions."""
    if not weight.awd:
        core = 1.0 / rates.combine
    elif job.groups == "row":
        core = 1.0 / rates.merge
    else:
        core = 1.0 / rates.gram + 1.0 / rates.combine
    read, written = job.bytes_read(weight), job.bytes_written(weight)
    compute = max(core * weight.columns / rates.cores, (read + written) / rates.memory)
    share = rates.storage / job.nodes
    return Times(read / min(rates.read, share), compute, written / min(rates.write, share))


def reduction(job: Job, rates: Rates, count: int) -> float:
    """Seconds of `count` all-reduces of K x K float64, one after the other."""
    steps = 2 * math.ceil(math.log2(job.nodes))
    return count * steps * (rates.latency + 8.0 * job.models**2 / rates.network)


def by_tensors(job: Job, rates: Rates) -> list[Times]:
    """Each node's times where it takes whole tensors: the longest first, each to the node that has least so far."""
    costs = sorted((row_times(job, rates, w).times(w.rows) for w in job.weights), key=lambda t: -t.in_turn)
    loads = [(0.0, node) for node in range(job.nodes)]
    nodes = [Times()] * job.nodes
    for cost in costs:
        load, node = heapq.heappop(loads)
        nodes[node] += cost
        heapq.heappush(loads, (load + cost.in_turn, node))
    reduced = Times(reduce=reduction(job, rates, 1 if job.groups == "global" else 0))
    return [node + reduced for node in nodes]


def by_rows(job: Job, rates: Rates) -> list[Times]:
    """Each node's times where it takes as many rows of every tensor as the others, give or take one."""
    kinds = {weight: job.weights.count(weight) for weight in set(job.weights)}
    matrices = sum(weight.awd for weight in job.weights)
    count = {"row": 0, "tensor": matrices, "global": 1}[job.groups]
    nodes = []
    for node in range(job.nodes):
        total = Times(reduce=reduction(job, rates, count))
        for weight, times in kinds.items():
            part = weight.rows * (node + 1) // job.nodes - weight.rows * node // job.nodes
            total += row_times(job, rates, weight).times(part * times)
        nodes.append(total)
    return nodes


ASSIGNMENTS: dict[str, Callable[[Job, Rates], list[Times]]] = {"whole tensors": by_tensors, "row blocks": by_rows}


def mean(nodes: Sequence[Times]) -> Times:
    """Of all nodes."""
    return sum(nodes, Times()).times(1.0 / len(nodes))


def slowest(nodes: Sequence[Times]) -> Times:
    """The node that takes longest in turn."""
    return max(nodes, key=lambda node: node.in_turn)


def stages(job: Job, rates: Rates) -> str:
    """Where the time goes with row blocks: bytes and elements, of a node and in total."""
    node = mean(by_rows(job, rates))
    read = sum(job.bytes_read(w) * w.rows for w in job.weights)
    written = sum(job.bytes_written(w) * w.rows for w in job.weights)
    elements = sum(w.elements for w in job.weights)
    rows: list[tuple[str, ...]] = [("stage", "a node", "in total", "s a node", "node hours in total")]
    for stage, amount, unit in (
        ("read", read / 1e9, "GB"),
        ("compute", elements / 1e9, "G elements"),
        ("write", written / 1e9, "GB"),
        ("reduce", math.nan, ""),
    ):
        seconds = float(getattr(node, stage))
        sizes = ("", "") if math.isnan(amount) else (f"{amount / job.nodes:.4g} {unit}", f"{amount:.5g} {unit}")
        rows.append((stage, *sizes, f"{seconds:.3g}", f"{seconds * job.nodes / 3600:.3g}"))
    return measure.align(rows)


def comparison(weights: tuple[Weight, ...], models: int, nodes: int, rates: Rates) -> str:
    """Every kind of group with both assignments: the slowest node, against the mean, and what limits it."""
    rows = [["groups", "a node takes", "read s", "compute s", "write s", "reduce s", "in turn s", "over the mean"]]
    rows[0] += ["overlapped s", "limited by", "largest part GB"]
    for groups in GROUPS:
        job = Job(weights, models, nodes, groups)
        for name, assign in ASSIGNMENTS.items():
            found = assign(job, rates)
            worst = slowest(found)
            seconds = (f"{value:.3g}" for value in (worst.read, worst.compute, worst.write, worst.reduce))
            over = f"{worst.in_turn / mean(found).in_turn:.3f}"
            rows.append([groups, name, *seconds, f"{worst.in_turn:.4g}", over, f"{worst.overlapped:.4g}", worst.limit])
            rows[-1].append(f"{largest_part(job, name == 'row blocks') / 1e9:.2g}")
    return measure.align(rows)


def largest_part(job: Job, blocks: bool) -> float:
    """Bytes of the largest part of a tensor that a node takes, with its models and the result."""
    parts = (math.ceil(w.rows / job.nodes) * w.columns if blocks else w.elements for w in job.weights)
    return float(max(parts) * (job.models + 2) * job.itemsize)


def best_rate(run: Callable[[], object], amount: float, times: int = 3) -> float:
    """`amount` a second in the fastest of some runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return amount / min(seconds)


def compute_rates(models: int, columns: int, rows: int) -> dict[str, float]:
    """merge, gram and combine on one core here: elements of the base a second, bfloat16."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = bench.synthetic([(rows, columns)], 1, models).to(torch.bfloat16)
        base, others = data.pairs()[0]
        weights = torch.full((models,), 0.3, dtype=torch.float64)
        descent, amount = bench.DESCENTS["sgd300"], float(base.numel())
        return {
            "merge": best_rate(lambda: ops.merge_rows(base, others, weights, bench.OBJECTIVE, descent), amount),
            "gram": best_rate(lambda: ops.gram(base, others, "tensor"), amount),
            "combine": best_rate(lambda: ops.combine(base, others, weights[None], "tensor"), amount),
        }
    finally:
        torch.set_num_threads(threads)


def file_rates(work: Path, size: int = PROBE) -> dict[str, float]:
    """read, from the page cache, and write, to the disk, in bytes a second."""
    with tempfile.NamedTemporaryFile(dir=work) as file:
        block = os.urandom(1 << 20) * max(1, size >> 20)
        buffer = bytearray(len(block))

        def write() -> None:
            file.seek(0)
            file.write(block)
            file.flush()
            os.fsync(file.fileno())

        def read() -> None:
            with open(file.name, "rb", buffering=0) as again:
                again.readinto(buffer)

        return {"write": best_rate(write, float(len(block))), "read": best_rate(read, float(len(block)))}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--models", type=int, default=8, help="K")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="of a node  [default: as here]")
    for name, text in (
        ("read", "bytes/s of a node"),
        ("write", "bytes/s of a node"),
        ("merge", "merge_rows: elements/s of a core"),
        ("gram", "gram of tensors: elements/s of a core"),
        ("combine", "combine: elements/s of a core"),
    ):
        parser.add_argument(f"--{name}", type=float, help=f"{text}  [default: measured here]")
    parser.add_argument("--memory", type=float, default=math.inf, help="bytes/s of a node's memory at most")
    parser.add_argument("--storage", type=float, default=math.inf, help="bytes/s of all nodes' storage at most")
    parser.add_argument("--latency", type=float, default=Rates.latency, help="seconds of a message")
    parser.add_argument("--network", type=float, default=Rates.network, help="bytes/s of a message")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where a file is tried")
    chosen = parser.parse_args(arguments)
    if min(chosen.nodes, chosen.models, chosen.cores) < 1:
        parser.error("--nodes, --models and --cores are at least 1")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Prints rates, assumptions and times."""
    chosen = options(arguments)
    named = ("read", "write", "merge", "gram", "combine")
    given = {name: getattr(chosen, name) for name in named if getattr(chosen, name) is not None}
    measured: dict[str, float] = {}
    if not {"read", "write"} <= set(given):
        measured |= file_rates(chosen.work)
    if not {"merge", "gram", "combine"} <= set(given):
        measured |= compute_rates(chosen.models, columns=16384, rows=256)
    limits = {name: getattr(chosen, name) for name in ("cores", "memory", "storage", "latency", "network")}
    rates = Rates(**(measured | given), **limits)
    for name in named:
        unit = "bytes/s of a node" if name in ("read", "write") else "elements/s of a core"
        origin = "given" if name in given else f"measured here: {measure.device()}"
        print(f"{name:8} {getattr(rates, name):.3g} {unit} ({origin})")
    print(", ".join(f"{name} {value:g}" for name, value in limits.items()) + f"\n\n{ASSUMPTIONS}\n")
    elements = sum(weight.elements for weight in LLAMA_405B)
    print(f"Llama-3.1-405B: {len(LLAMA_405B)} tensors, {elements:,} elements, {2 * elements / 1e9:.1f} GB in bfloat16")
    print(f"base and {chosen.models} models on {chosen.nodes} nodes\n\nrow groups, row blocks, the mean node:")
    print(stages(Job(LLAMA_405B, chosen.models, chosen.nodes), rates))
    print("\nthe slowest node:\n" + comparison(LLAMA_405B, chosen.models, chosen.nodes, rates))
    return 0


if __name__ == "__main__":
    sys.exit(main())
