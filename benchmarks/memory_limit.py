"""The memory limit by itself: STREAM's triad for each number of threads, over arrays of several sizes.

    python -m benchmarks.memory_limit [--threads 2] [--rounds 15]

Sizes within the caches show what is not the memory; the limit that the operators are compared with is the last row's.
"""

import argparse

import torch

from awd_fast import measure
from benchmarks import harness

MEGABYTES = (4, 16, 64, 256, 1024)  # of the three arrays together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="the most")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{measure.device()}, instruction set {measure.instruction_set()}")
    rows = [("threads", "MB", "variant", "GB/s (12 bytes an element)", "with write-allocate (16 bytes)")]
    for threads in range(1, arguments.threads + 1):
        torch.set_num_threads(threads)
        for megabytes in MEGABYTES:
            for result in measure.measure(measure.triad_cases(megabytes * 1_000_000 // 12), arguments.rounds):
                allocating = "" if result.case.backend != measure.PLAIN else f"{result.gigabytes * 4 / 3:.1f}"
                rate = result.wrong or f"{result.gigabytes:.1f}"
                rows.append((str(threads), str(megabytes), result.case.backend, rate, allocating))
    print(measure.align(rows))


if __name__ == "__main__":
    harness.keep_freed_memory("benchmarks.memory_limit")
    main()
