"""Training in shards (`Recipe.shard`): each process holds its rows of every weight, and of what
goes by the weights: gradients, averages, and the optimizer's moments.

Each pass gathers the weights of one block after the other (FSDP2). Between passes a process works
on its rows as on any tensors: averages and optimizers go element by element, the norms of EDM2 row
by row. Single numbers, and buffers, are on every process.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from dnnlib import UserError
from torch_utils import distributed as dist
from torch_utils.distributed import local
from training import shard_files
from training.networks.edm2 import MPConv, force_normalize

# Losses change nothing of what networks return in place.
warnings.filterwarnings('ignore', message='FSDP2-wrapped module .* returned a view')


def blocks(module: torch.nn.Module):
    """What is gathered at a time, besides the rest of the network."""
    for child in module.children():
        if not isinstance(module, torch.nn.ModuleDict | torch.nn.ModuleList):
            yield from blocks(child)
        elif next(child.parameters(), None) is not None:
            yield child


class Shards:
    """Cuts `net`, which is the same on all processes, into shards (in place). It is called as the
    network is, in training.

    weights  this process's rows of the parameters, in their order: what the optimizer changes
    """

    def __init__(self, net: torch.nn.Module, device: torch.device):
        if device.type == 'cuda' and 'nccl' not in str(torch.distributed.get_backend_config()):
            raise UserError('cuts networks over GPUs: start one process for each', 'shard')
        self.net = net
        self._buffers = {name for name, _ in net.named_buffers()}
        # What it is as a whole, without numbers.
        numbers = {id(p): torch.nn.Parameter(p.detach().to('meta')) for p in net.parameters()}
        numbers |= {id(buffer): buffer.to('meta') for buffer in net.buffers()}
        self._frame = copy.deepcopy(net, numbers)
        self.mesh = init_device_mesh(device.type, [dist.get_world_size()])
        single = {p for p in net.parameters() if p.ndim == 0}
        for value in (*single, *net.buffers()):
            value.data = value.data.to(device)
        for p in net.parameters():                             # others are refused
            p.data = p.data.contiguous()
        for module in (*blocks(net), net):
            fully_shard(module, mesh=self.mesh, ignored_params=single)
        self.weights = [torch.nn.Parameter(local(p.detach()), requires_grad=p.requires_grad)
                        for p in net.parameters()]
        # Forward passes see the gathered weights, which are thrown away: their rows are kept
        # normalised here.
        layers = [module for module in net.modules() if isinstance(module, MPConv)]
        for layer in layers:
            layer.normalizes = False
        self._rows = [local(layer.weight.detach()) for layer in layers]

    def __call__(self, *args, **kwargs):
        for rows in self._rows:
            force_normalize(rows)
        return self.net(*args, **kwargs)

    def no_sync(self):
        """Every pass exchanges its gradients: they would have the room of all weights."""
        return contextlib.nullcontext()

    def collect_gradients(self):
        """Gives the `weights` their gradients, the mean over the processes."""
        for weight, p in zip(self.weights, self.net.parameters(), strict=True):
            weight.grad = None if p.grad is None else local(p.grad)
            p.grad = None
        single = [weight.grad for weight in self.weights
                  if weight.ndim == 0 and weight.grad is not None]
        if single:
            mean = dist.all_reduce_sum(torch.stack(single)) / dist.get_world_size()
            torch._foreach_copy_(single, list(mean))

    def norms(self, grads: list, dtype=None) -> list[torch.Tensor]:
        """torch._foreach_norm of the whole gradients, of which `grads` are the rows."""
        dtype = dtype or grads[0].dtype
        if dist.get_rank() > 0:                                # single numbers count once
            grads = [grad if grad.ndim else torch.zeros_like(grad) for grad in grads]
        squares = torch.stack(torch._foreach_norm(grads, dtype=dtype)).double().square()
        return list(dist.all_reduce_sum(squares).sqrt().to(dtype))

    def copy_of(self, net: torch.nn.Module) -> torch.nn.Module:
        """A copy in shards, which is not called, without gradients."""
        return self._like(net, lambda value, frame: value.clone())

    def gather(self, net: torch.nn.Module, device, everywhere: bool) -> torch.nn.Module:
        """See `Trainer.whole`."""
        keeps = everywhere or dist.get_rank() == 0

        def whole(value, frame):
            value = value.full_tensor() if dist.is_sharded(value) else value
            return torch.empty_like(frame, device=device).copy_(value) if keeps else frame

        return self._like(net, whole)

    def _like(self, net, function: Callable) -> torch.nn.Module:
        """A network with parameters and buffers function(that of `net`, that of the frame)."""
        copied = copy.deepcopy(self._frame)
        for module, source in zip(copied.modules(), net.modules(), strict=True):
            for name, value in source.named_parameters(recurse=False):
                value = function(value.detach(), module.get_parameter(name))
                module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
            for name, value in source.named_buffers(recurse=False):
                module.register_buffer(name, function(value, module.get_buffer(name)))
        return copied.eval()

    # --- Checkpoints ----------------------------------------------------------------------------

    def optimizer_state(self, state: dict) -> dict:
        """The optimizer's `state_dict`, with moments that are tensors in shards, as the weights
        are.
        """
        params = [p for p in self.net.parameters() if p.requires_grad]
        return state | {'state': {
            number: {name: self._shard(value, params[number].shape)
                     if torch.is_tensor(value) and value.ndim else value
                     for name, value in values.items()}
            for number, values in state['state'].items()}}

    def write(self, path: str, state: dict) -> dict:
        """See `shard_files.write`."""
        return shard_files.write(path, state)

    def empty(self, shape, dtype) -> torch.Tensor:
        """A tensor in shards, for `shard_files.read`."""
        rows = len(self._rows_of(torch.empty(shape, device='meta')))
        return self._shard(torch.empty([rows, *shape[1:]], dtype=dtype), shape)

    def split(self, state, name=None):
        """A state of whole tensors, in nested containers, as one in shards."""
        if name is None:
            return state | {key: self.split(state[key], key)
                            for key in ('net', 'ema', 'optimizer')}
        if isinstance(state, dict):
            return {key: self.split(value, key) for key, value in state.items()}
        if isinstance(state, list):
            return [self.split(value, name) for value in state]
        if not torch.is_tensor(state) or state.ndim == 0 or name in self._buffers:
            return state
        return self._shard(self._rows_of(state), state.shape)

    def _rows_of(self, tensor):
        """This process's rows of a whole tensor, as `torch.chunk` cuts it."""
        count = -(-len(tensor) // dist.get_world_size())
        return tensor[dist.get_rank() * count:][:count]

    def _shard(self, rows, shape) -> DTensor:
        return DTensor.from_local(
            rows.to(self.mesh.device_type).contiguous(), self.mesh, [Shard(0)], run_check=False,
            shape=torch.Size(shape), stride=torch.empty(shape, device='meta').stride())
