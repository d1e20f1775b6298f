"""After a hushed step of all, rank 0 takes more of them while the others wait: they would not end if anything were communicated."""

import os
import sys

import numpy as np
import torch.distributed as dist

from bench.training.contestants import join
from parallel.configuration import TrainingConfiguration
from parallel.data import Corpus

name, store = sys.argv[1:]
text = np.frombuffer(b"the quick brown fox jumps over the lazy dog; " * 40, np.uint8)
contestant = join(name, store)
learner = contestant.build(
    TrainingConfiguration(layers=4, hidden=16, heads=2, seq=12, batch=8, steps=100, warmup=2), Corpus(text, text, 1)
)
first, _ = learner.step()
learner.hush(True)
learner.step()
contestant.barrier()
if dist.get_rank() == 0:
    learner.step()
    learner.step()
contestant.barrier()
learner.hush(False)
last, _ = learner.step()
assert last is None or last < first + 0.5, (first, last)
dist.destroy_process_group()
os._exit(0)  # a thread of Gloo's that is still there would sometimes abort an orderly end
