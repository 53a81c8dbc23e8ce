"""The processes that carry out one merge together, on one machine or many, by torch.distributed.

They share the blocks, and nothing else but sums of small float64 tensors that are 0 in all processes but one: such a
sum has the same bits in whatever order it is made. A process that fails, or vanishes, ends all others, with its reason.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, distributed

from awd_fast.blocks import Block
from awd_fast.errors import InputError
from awd_fast.plan import Step

BEAT = 1.0
"""Seconds between two signs of life of a process."""
SILENCE = 20.0
"""Seconds without one after which a process counts as gone: less than it takes anybody to wonder."""
FAILED = "failed"
GOES_ON = "; --resume goes on"


class PeerLost(OSError):
    """Another process did not come to where all meet: why, it said itself, or cannot say any more."""


class Ranks:
    """One process on its own, the first of one."""

    rank, count = 0, 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the CPU that each has. Raises PeerLost where one is gone."""
        return tensor

    def wait(self) -> None:
        """Waits until all processes have come here."""

    def device(self, name: str) -> str:
        """The device of this process: with "cuda" each takes one of its machine's, in turn."""
        count = torch.cuda.device_count() if name == "cuda" and self.count > 1 else 0
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % count}" if count else name

    def share(self, blocks: Sequence[Block], indivisible: Callable[[Step], bool]) -> list[Block]:
        """The blocks of this process: neighbours, about as many elements as every other's."""
        total = sum(block.count for block in blocks)
        mine: list[Block] = []
        before = 0
        for step, same in groupby(blocks, lambda block: block.step):
            own = list(same)
            for piece in [own] if indivisible(step) else [[block] for block in own]:
                size = sum(block.count for block in piece)
                middle = (2 * before + size) * self.count // max(2 * total, 1)
                if min(middle, self.count - 1) == self.rank:
                    mine += piece
                before += size
        return mine


class Processes(Ranks):
    """The processes of torch.distributed's default group."""

    def __init__(self) -> None:
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        on_gpu = distributed.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def sum(self, tensor: Tensor) -> Tensor:
        moved = tensor.to(self._device, copy=True)
        try:
            distributed.all_reduce(moved)
        except RuntimeError as error:
            raise PeerLost(f"another process is gone: {error}") from error
        return moved.cpu()

    def wait(self) -> None:
        self.sum(torch.zeros(1))


def present() -> Ranks:
    """The processes that take part: those of torch.distributed where it is initialised, else this one alone."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return Processes()
    return Ranks()


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that torchrun, or whoever sets its environment variables, has started; alone, does nothing.

    Ends all of them where one fails: with an exception, which the others are told, or without a sign of life.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or not distributed.is_available():
        yield
        return
    try:
        store, rank, count = next(distributed.rendezvous("env://"))
        # Whoever waits for another's work may wait for hours: that nobody waits for the dead is what `_Watch` is for.
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(days=7))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes of torch.distributed could not meet: {error}") from error
    watch = _Watch(store, rank, count)
    try:
        yield
        Processes().wait()
        watch.stop()
    except PeerLost as error:
        watch.explain(error)
        raise
    except BaseException as error:
        watch.tell(error)
        raise
    with suppress(PeerLost):
        Processes().wait()  # nobody leaves, and takes the store along, while another may still look
    distributed.destroy_process_group()


class _Watch:
    """A thread that says that this process lives, and looks whether the next one does and whether any has failed."""

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self._store, self._rank, self._next = store, rank, (rank + 1) % count
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="awd-fast-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Looks no longer."""
        self._stopped.set()
        self._thread.join()

    def explain(self, error: PeerLost) -> None:
        """Ends this process as soon as it is known why another one is gone; or tells what is known, if that is all."""
        self._thread.join(SILENCE + 10 * BEAT)
        self.tell(error)

    def tell(self, error: BaseException) -> None:
        """Tells the other processes why this one ends."""
        self.stop()
        word = " ".join(str(error).split()) or type(error).__name__
        try:
            if not self._store.check([FAILED]):
                advice = "" if isinstance(error, InputError) else GOES_ON  # wrong input would only come again
                self._store.set(FAILED, f"process {self._rank} failed: {word}{advice}")
        except RuntimeError:
            return  # they notice anyway
        self._linger()

    def _run(self) -> None:
        beats, seen, silent = 0, b"", 0.0
        while not self._stopped.wait(BEAT):
            beats, silent = beats + 1, silent + BEAT
            try:
                self._store.set(f"beat/{self._rank}", str(beats))
                if self._store.check([FAILED]):
                    self._end(self._store.get(FAILED).decode())
                theirs = f"beat/{self._next}"
                now = self._store.get(theirs) if self._store.check([theirs]) else b""
                if now != seen:
                    seen, silent = now, 0.0
                elif silent > SILENCE:
                    gone = f"process {self._next} has given no sign of life for {SILENCE:.0f} s: was it killed?"
                    gone += GOES_ON
                    self._store.set(FAILED, gone)
                    self._end(gone)
            except RuntimeError:
                self._end("the process that the others meet at is gone: was it, or its machine, stopped?" + GOES_ON)

    def _end(self, why: str) -> None:
        """Ends this process at once, whatever it waits for: what is written is noted, so nothing is lost."""
        if self._stopped.is_set():
            return
        print(f"awd-fast: stopped, because {why}", file=sys.stderr, flush=True)
        self._linger()
        os._exit(1)

    def _linger(self) -> None:
        """The first process, with which the store may go, stays until the others have looked there once more."""
        if self._rank == 0:
            time.sleep(3 * BEAT)
