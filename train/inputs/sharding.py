"""A model whose weights the ranks share: FSDP2 around each decoder layer, and around the rest.

Between its uses a rank has some rows of every shared weight, about one in `world.size`; a layer is
gathered when it runs, and of what is trained the gradient's rows are summed over the ranks as soon
as they are there, in every micro-batch (FSDP2 would keep whole gradients otherwise). Forward and
backward passes are therefore collectives: every rank makes equally many.

Fully trained, all weights are shared, fp32 masters that layers compute with in the precision of the
run. Beside adapters only the frozen base is: the adapters are whole on every rank, as in replicas.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor, nn

from data.batch import IGNORED, MicroBatch
from models.layers import CausalLM
from train.optim.buffers import Sharing
from train.precision import Precision
from train.process.world import World

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

# What a rank does that has none left to do: a document without targets, whose gradient is zero.
NOTHING = MicroBatch(
    input_ids=torch.zeros(2, dtype=torch.int64),
    targets=torch.full((2,), IGNORED, dtype=torch.int64),
    lengths=(2,),
    padded_length=None,
    examples=(0,),
    target_rows=torch.zeros(0, dtype=torch.int64),
    num_tokens=0,
)


def share_weights(model: CausalLM, world: World, precision: Precision) -> None:
    """Share the weights of a model on the meta device, in place, and give each rank its rows.

    What the rows hold is not defined until `place` has filled them. Adapters, where there are any,
    are made whole.
    """
    # Here, for one process needs none of it: a third of what a run imports.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    device = precision.device
    trained = {p for p in model.parameters() if p.requires_grad}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    whole = trained if frozen else set()
    halves = any(p.dtype == torch.bfloat16 for p in trained)
    policy = MixedPrecisionPolicy(
        reduce_dtype=torch.float32 if halves else None, cast_forward_inputs=False
    )
    of_layers = policy
    if not frozen and precision.name != "fp32":
        of_layers = MixedPrecisionPolicy(
            param_dtype=precision.compute_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
    mesh = init_device_mesh(device.type, (world.size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=of_layers, ignored_params=whole)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole)
    # A step does not call the model itself; the head's weight stays gathered until backward ends.
    register_fsdp_forward_method(model, "hidden_states")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided already. Neither is recursive, and gloo can only add.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x)


def _is_shared(x: Tensor) -> TypeGuard[DTensor]:
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(x, loaded.DTensor)


def place(parameter: nn.Parameter, value: Tensor) -> None:
    """Fill a parameter from a whole tensor: all of it, or this rank's rows."""
    with torch.no_grad():
        if _is_shared(parameter):
            first, rows = own_rows(parameter)
            parameter.to_local().copy_(value[first : first + rows])
        else:
            parameter.copy_(value)


def own_rows(parameter: DTensor) -> tuple[int, int]:
    """Return the first of this rank's rows of a shared parameter, and how many they are."""
    mesh = parameter.device_mesh
    chunk = -(-parameter.shape[0] // mesh.size())
    return min(parameter.shape[0], chunk * mesh.get_local_rank()), len(parameter.to_local())


def sharing_of(model: nn.Module, world: World) -> Sharing | None:
    """Return how the ranks share what is trained; None where each has all of it."""
    named = dict(model.named_parameters())
    sources = {
        name: named[name] for name in named if named[name].requires_grad and _is_shared(named[name])
    }
    if not sources:
        return None
    return Sharing(
        reduce=world.sum_,
        rows={name: parameter.shape[0] for name, parameter in sources.items()},
        first={name: own_rows(cast("DTensor", part))[0] for name, part in sources.items()},
        sources=sources,
        local=local_rows,
    )


def local_rows(x: Tensor) -> Tensor:
    """Return this rank's rows of a shared tensor, as a view; a whole one as it is."""
    return x.to_local().detach() if _is_shared(x) else x.detach()


def reshard(model: nn.Module) -> None:
    """Give back what is gathered, so that the next use sees rows that were written since."""
    if loaded := sys.modules.get("torch.distributed.fsdp"):
        for module in model.modules():
            if isinstance(module, loaded.FSDPModule):
                cast("FSDPModule", module).reshard()


def missing(passes: int, world: World) -> int:
    """Return how many passes this rank has to add, so that all of a shared model make as many."""
    return max(world.gathered((passes,))) - passes if world.shards else 0
