"""The base over several processes: each holds 1/N of every tensor, and gathers a decoder block when it computes it.

FSDP2, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html. Only the frozen base is sharded: adapters
are injected afterwards, so FSDP never hears of them. Every process must call `trunk` equally often, backward included.
"""

from math import ceil

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lora import ops
from lora.errors import BadInput
from lora.heap import give_back
from lora.network.decoder import Model
from lora.pretrained.folder import ModelFiles
from lora.pretrained.load import empty_model


def load_sharded(base: ModelFiles, dtype: torch.dtype = torch.float32, device="cpu") -> Model:
    """As `pretrained.load_model`, but this process reads and keeps only its rows of every tensor.

    The most memory at once is base / N, the head, and one block with what its gathering needs: two to four times its
    size. `head` and `head_weight` are whole from `trunk` until the backward pass. Raises BadInput as `load_model`, on
    all processes alike; and where there is one process only.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise BadInput("wrong --fsdp in the command line: one process has nobody to share with. Start with torchrun")
    # on a CPU gathered blocks come and go: a base of 220 MB on two processes took 820 MB each without this, 180 with it
    give_back(128 * 1024)
    model = shard(empty_model(base).to(dtype).requires_grad_(False).eval(), device)
    _fill(model, base)
    with torch.no_grad():  # once before any `inference_mode`: what it allocates there could not be trained with later
        model.trunk(torch.zeros(1, dtype=torch.long, device=device))
    model.reshard()
    return model


def shard(model: Model, device) -> Model:
    """Cut every tensor of a model on `meta` along its first dimension; values on `device` are not set yet."""
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    if not model.config.tie_word_embeddings:  # a tied one is the head
        fully_shard(model.model.embed_tokens, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the rest: head and last norm, which stay gathered until the backward pass
    register_fsdp_forward_method(model, "trunk")
    return model.to_empty(device=device)


@torch.no_grad()
def _fill(model: Model, base: ModelFiles) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for name, buffer in model.named_buffers():  # which every process has whole
        buffer.copy_(base.read(name))
    parameters = dict(model.named_parameters())
    broken = torch.zeros(len(parameters), device=model.device)  # by name, so that all processes raise the same error
    for i, (name, parameter) in enumerate(parameters.items()):
        mine = parameter.to_local()  # (rows / N, ...), the last ranks' perhaps fewer or none
        start = rank * ceil(len(parameter) / size)
        if len(mine):
            mine.copy_(base.read_rows(name, start, start + len(mine), mine.dtype))
            broken[i] = not ops.is_finite(mine)
    dist.all_reduce(broken)
    names = [name for name, count in zip(parameters, broken.tolist(), strict=True) if count]
    if names:
        why = "values that are not finite. Download it again"
        raise BadInput(*(f"wrong tensor in {base.name}:{name}: {why}" for name in names))
