"""Training a model that one GPU cannot hold: each GPU keeps a part of every weight, gradient and optimizer
state.

PyTorch's FSDP2 gathers the weights of a block while the block runs, and no longer. A module is shared out
while it trains. Before and after training, every GPU holds the whole module, so other code knows of no parts.
"""
import copy

import torch
import torch.nn as nn

from support import world

DTensor = ()                         # for isinstance: one process shares no tensor
if world.SIZE > 1:                   # these imports take a second
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, distribute_tensor

ROOM = 0.8                           # share of a GPU's memory for weights, gradients and Adam
TOKENS = 2 ** 13                     # tokens that go through a shared module at once, at most


def is_shared(module):
    return isinstance(next(module.parameters()), DTensor)


def too_large(params):
    """Whether training needs more than ROOM of a GPU in any process. Gradients and Adam's two states need 12
    bytes per parameter, beside everything that the GPU already holds."""
    device = params[0].device
    if world.SIZE == 1 or device.type != "cuda":
        return False
    need = torch.cuda.memory_allocated(device) + 12 * sum(p.numel() for p in params)
    return world.any_of(need > ROOM * torch.cuda.get_device_properties(device).total_memory)


def share(module, groups):
    """Share out a module over the GPUs if the module is too large to train on each. `groups` are lists of the
    parameters that train. Returns the lists of parameters to train instead, and a function that makes the
    module whole again. If the module is shared out, empties the lists of `groups` to free their memory.
    ValueError if the module is too large, but only some parameters train."""
    params = [p for group in groups for p in group]
    if not too_large(params):
        return groups, lambda: None
    if len(params) < len(list(module.parameters())):
        raise ValueError(f"weights, gradients and optimizer state exceed {ROOM:.0%} of a GPU's memory; give "
                         "more --groups or a smaller --teacher")
    print(f"{sum(p.numel() for p in params):,} parameters train in {world.SIZE} parts, one on each GPU")
    names = {id(p): name for name, p in module.named_parameters()}
    named_groups = [[names[id(p)] for p in group] for group in groups]
    for group in groups:
        group.clear()                                              # frees the whole weights
    params.clear()
    empty = without_weights(module)
    mesh = init_device_mesh(next(module.parameters()).device.type, (world.SIZE,))
    root = None if isinstance(module, nn.ModuleList) else copy.copy(module)     # FSDP takes an object once
    # The root's weights stay gathered. Tied embeddings are among them, because the head needs them.
    units = [*module.blocks, *([] if module.config.tied else [module.wte]), root] if root else module
    for unit in units:
        fully_shard(unit, mesh=mesh)
        sum_gradients(unit)
    if root:
        register_fsdp_forward_method(root, "hidden")
        module.hidden = root.hidden
    shared = dict(module.named_parameters())

    def make_whole():
        weights = {name: w.full_tensor() if isinstance(w, DTensor) else w
                   for name, w in module.state_dict().items()}
        empty.load_state_dict(weights, assign=True)
        module.__dict__ = empty.__dict__
        module.requires_grad_(False)
    return [[shared[name] for name in group] for group in named_groups], make_whole


def sum_gradients(unit):
    """Let FSDP sum gradients over the GPUs. By default FSDP takes the mean."""
    divide_by = getattr(unit, "set_gradient_divide_factor", None) or unit.set_reduce_scatter_divide_factor
    divide_by(1.0)
    if hasattr(unit, "set_force_sum_reduction_for_comms"):          # gloo has no other reduction
        unit.set_force_sum_reduction_for_comms(True)


def without_weights(module):
    """A copy of a module whose parameters are on the device "meta", with the same config."""
    known = {id(p): nn.Parameter(p.detach().to("meta")) for p in module.parameters()}
    known |= {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    return copy.deepcopy(module, known)


# ---- checkpoints: the same files, whether shared out or not ------------------------------------------------


def whole(value):
    """A value of a checkpoint. A shared tensor becomes whole in process 0, and None in other processes."""
    if isinstance(value, DTensor):
        value = value.detach().full_tensor()
        return None if world.RANK else value.cpu()                 # only process 0 writes
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def like(tensor, param):
    """A tensor of a checkpoint, shared out as a parameter is."""
    if not isinstance(param, DTensor) or tensor.dim() == 0:
        return tensor
    return distribute_tensor(tensor.to(param.device), param.device_mesh, param.placements)


def load(module, optimizer, saved):
    """Load the weights of a checkpoint, and the state of the optimizer if it has one."""
    params = dict(module.named_parameters())
    module.load_state_dict({name: like(w, params[name]) for name, w in saved["module"].items()}, strict=False)
    if "optimizer" in saved:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, state in saved["optimizer"]["state"].items():
            for name in state:
                state[name] = like(state[name], params[i])
        optimizer.load_state_dict(saved["optimizer"])
