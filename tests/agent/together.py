"""One of several training processes of a test: `torchrun -m tests.agent.together BASE FOLDER`.

FOLDER holds `set.pt`, images and labels. Left there are each process's `averages-<rank>.pt`, and the weights after one
step: in `usual`, and in `other-<rank>` with other images in the share of that process alone.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch
from torch import distributed

from agent.train import Job, TrainSettings, average, epoch_batches, fit
from datavector.model import BaseModel

SETTINGS = TrainSettings(epochs=1, batch_size=24, device="cpu", processes=3)


def averages(rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of tensors that differ by process, one of them not contiguous; then of some that are infinite in the last one."""
    mean = [torch.full((2, 3), float(rank)), (rank * torch.arange(4.0)).reshape(2, 2).T]
    not_finite = [torch.full((3,), torch.inf if rank == 2 else 1.0), torch.ones(2)]
    average(mean)
    average(not_finite)
    return mean, not_finite


def main() -> None:
    base, folder = BaseModel.load(Path(sys.argv[1])), Path(sys.argv[2])
    images, labels = torch.load(folder / "set.pt", weights_only=True)
    (batch,) = epoch_batches(len(labels), SETTINGS, 0)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.save(averages(rank), folder / f"averages-{rank}.pt")
    others = {f"other-{other}": batch[other::world] for other in range(world)}
    for name, changed in {"usual": [], **others}.items():
        altered = images.clone()
        altered[changed] = 255 - altered[changed]
        job = Job(base, altered, labels, images[:0], labels[:0], SETTINGS, folder / name)
        fit(job, name, torch.device("cpu"), lambda _: None, threading.Event(), rank, world)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
