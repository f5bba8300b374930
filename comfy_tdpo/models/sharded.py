"""Full fine-tuning where each process holds a part of every weight, of its gradient and of the optimizer's moments.

torch's fully sharded data parallelism (arXiv 2304.11277) gathers the weights of one block of the network at a time, for
its forward pass and again for its backward pass, and averages gradients over the processes. So all processes call the
network together and equally often; they meet before each call, where one that stops can say so.

Shapes: P processes. Each holds its own of P chunks of a weight's rows, as torch.chunk cuts them; the last may be empty.
"""

from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ..blocks import blocks_of
from ..processes import Processes
from ..torch_release import check_release
from .full import AllWeights


class ShardedWeights(AllWeights):
    """A Trainable: all weights of a network, shared out over `processes`.

    parameters, base: this process's rows of each weight. The parameters have the memory of what torch gathers.

    Args:
        whole: of the same network, which lies on the CPU; it must not be used any more.

    Raises:
        ValueError: this release of torch cannot do it.
    """

    sharded = True

    def __init__(self, whole: AllWeights, processes: Processes):
        self.network, self.dtype, self.processes = whole.network, whole.dtype, processes
        self.base = {name: processes.own_rows(weight).clone() for name, weight in whole.base.items()}
        whole.parameters.clear()  # torch frees the whole weights, block by block, once nothing refers to them
        _shard(self.network, processes)
        self.parameters = {}
        for name, gathered in self.network.named_parameters():
            self.parameters[name] = nn.Parameter(gathered.detach().to_local())
            gathered.register_post_accumulate_grad_hook(partial(_hand_over, self.parameters[name]))
        self.network.register_forward_pre_hook(lambda *_: processes.meet(), prepend=True)

    def load_exported(self, weights: dict[str, Tensor], strength: float = 1.0) -> None:
        raise NotImplementedError("files are loaded into whole models")

    def export(self, path: Path, metadata: dict[str, str]) -> None:
        """As of a whole model; called by all processes, of which the first writes."""
        self.processes.meet()
        weights = {
            name: self.processes.collect(self.parameters[name].detach()) if name in self.parameters else weight
            for name, weight in self.network.state_dict().items()
        }
        if not self.processes.rank:
            self._write(path, weights, metadata)


def _shard(network: nn.Module, processes: Processes) -> None:
    check_release("policy.shard")  # before 2.9, rows move to other memory later on
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.count,))
    blocks = blocks_of(network)
    kinds = getattr(network, "_no_split_modules", None) or []  # diffusers', such as the layers in a stage of a U-Net
    gathered = [module for module in network.modules() if module in blocks or type(module).__name__ in kinds]
    for module in [*reversed(gathered), network]:  # inner ones first
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _hand_over(own: nn.Parameter, gathered: nn.Parameter) -> None:
    """Add the gradient of this process's rows, which torch has averaged, to that of `own`."""
    gradient = gathered.grad.to_local()
    own.grad = gradient if own.grad is None else own.grad + gradient
    gathered.grad = None
