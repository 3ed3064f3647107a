"""Stopping on request: a signal asks, and all ranks leave after the same step."""

import torch
import torch.distributed as dist


def agreed(asked: bool) -> bool:
    """Whether any rank has been asked to stop. Collective.

    Signals arrive on one rank, or on several at different steps, so that the ranks agree on them
    after each step.
    """
    # On the CPU, so that no GPU has to be waited for.
    flag = torch.tensor(int(asked))
    if dist.get_world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
