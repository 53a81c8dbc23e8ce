"""The history of Converge on a GPU, whose ways lie apart there, as one sequence of losses."""

import torch
from torch import Tensor


def joined_ways(history: Tensor, lengths: Tensor) -> Tensor:
    """The ways of each parameter one after the other [P, ways * capacity], then the last loss.

    history: [P, ways, capacity], held at a way's last loss behind the entries it used: lengths [P, ways].
    """
    ways, capacity = history.shape[1:]
    ends = lengths.cumsum(dim=1)
    at = torch.arange(ways * capacity, device=history.device).expand(len(history), -1)
    way = (at[:, :, None] >= ends[:, None, :]).sum(dim=2).clamp_max(ways - 1)
    inside = (at - (ends - lengths).gather(1, way)).clamp_max(capacity - 1)
    return history.flatten(1).gather(1, way * capacity + inside)
