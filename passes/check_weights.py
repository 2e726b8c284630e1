"""Weights that no program can be made with."""

import torch
from torch.distributed.tensor import DTensor

from seqpar.errors import UnsupportedError


def check_weights(model: torch.nn.Module) -> None:
    """Refuse weights that are divided over ranks (FSDP, tensor parallelism), as every rank computes with all of them, and those that no tracer sees.

    Raises:
        UnsupportedError: names the parameter or the module.
    """
    for name, weight in model.named_parameters():
        if isinstance(weight, DTensor):
            raise UnsupportedError(
                f"{name} of {type(model).__name__} is a DTensor {tuple(weight.placements)}: its weights are divided over ranks already (fully_shard, parallelize_module, …), and seqpar "
                "divides the sequence, with whole weights on every rank. Give it the model with whole weights; offload or quantise what does not fit one device"
            )
    for name, module in model.named_modules():
        if any(isinstance(value, torch.ScriptObject) for value in vars(module).values()):
            raise UnsupportedError(
                f"{name} ({type(module).__module__}.{type(module).__qualname__}) of {type(model).__name__} is an object of TorchScript, which cannot be traced. Give the model the module "
                "itself in place of a scripted one; quantise into tensors (torchao's `quantize_`, bitsandbytes, …) in place of torch.ao's packed layers"
            )
