"""Training models across ranks: autograd, layers, data parallelism, and the training command.

Names are imported from their modules on first use, so that `import parallel` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.autograd import Tensor, check_gradients, no_gradient
    from parallel.configuration import TrainingConfiguration
    from parallel.data import Corpus, load
    from parallel.data_parallel import DataParallel
    from parallel.nn import GPT, GPTConfiguration, Module, Parameter
    from parallel.optim import AdamW
    from parallel.sharding import Sharding
    from parallel.train import Trainer

_MODULES = {
    "Tensor": "autograd",
    "check_gradients": "autograd",
    "no_gradient": "autograd",
    "Corpus": "data",
    "load": "data",
    "DataParallel": "data_parallel",
    "Sharding": "sharding",
    "GPT": "nn",
    "GPTConfiguration": "nn",
    "Module": "nn",
    "Parameter": "nn",
    "AdamW": "optim",
    "Trainer": "train",
    "TrainingConfiguration": "configuration",
}

__all__ = [
    "GPT",
    "AdamW",
    "Corpus",
    "DataParallel",
    "GPTConfiguration",
    "Module",
    "Parameter",
    "Sharding",
    "Tensor",
    "Trainer",
    "TrainingConfiguration",
    "check_gradients",
    "load",
    "no_gradient",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'parallel' has no attribute {name!r}")
    return getattr(import_module(f"parallel.{_MODULES[name]}"), name)
