"""What ``test_launch.py`` starts on each process: one run with the project's loop, saved by the first process."""

import sys

import torch

import peftlib
from peftlib import tasks

if __name__ == "__main__":
    method, folder = sys.argv[1:]
    torch.set_num_threads(1)
    backbone = peftlib.backbones.load("tiny-bert", dropout=0.0)
    adapted = peftlib.attach(backbone.model, method)
    peftlib.fit(
        adapted,
        tasks.load("smoke"),
        tokenizer=backbone.tokenizer,
        steps=4,
        batch_size=4,
        learning_rate=1e-3,
        evaluate_on=None,
        progress=False,
    )
    parameters = torch.cat([p.detach().flatten() for p in adapted.trainable().values()])
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world > 1:
        every = [torch.empty_like(parameters) for _ in range(world)]
        torch.distributed.all_gather(every, parameters)
        assert all(torch.equal(other, parameters) for other in every), "the processes disagree"
    if world == 1 or torch.distributed.get_rank() == 0:
        adapted.save(folder)
        print(f"processes: {world}")
    if world > 1:
        torch.distributed.destroy_process_group()
