"""What the KL is measured against: the base model, or the policy as it was when the reference was last reset."""

from contextlib import AbstractContextManager

from torch import Tensor

from .models import Trainable
from .swapping import copied, swapped


class Reference:
    """The frozen base model until `reset`; from then on, a frozen copy of the trained weights.

    weights: the copy by parameter name, float32 on their device or, if all weights are trained, as they are on the CPU;
        empty before the first reset.
    """

    def __init__(self, trainable: Trainable):
        self.trainable = trainable
        self.weights: dict[str, Tensor] = {}

    @property
    def costly(self) -> bool:
        """Whether entering `swapped_in` copies all weights of the network."""
        return bool(self.trainable.base)

    def reset(self) -> None:
        """Make the policy, as it is now, the reference."""
        if self.costly:
            state = self.trainable.state()
            self.weights = {name: weight.to("cpu", copy=True) for name, weight in state.items()}
        else:
            self.weights = copied(self.trainable.parameters)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Restore `weights`, empty if the reference had never been reset."""
        devices = {name: parameter.device for name, parameter in self.trainable.parameters.items()}
        self.weights = {name: weight.to("cpu" if self.costly else devices[name]) for name, weight in weights.items()}

    def swapped_in(self) -> AbstractContextManager[None]:
        """Inside the block, the network is the reference; afterwards, the trained weights are back, to the last bit.

        Call the network with gradients disabled, since the parameters that hold the copy are those that are trained.
        (They keep requires_grad: torch chooses kernels by it, and the KL would not be exactly 0 right after a reset.)
        """
        if not self.weights:
            return self.trainable.reference()
        return swapped(self.trainable.parameters, self.weights, in_place=self.trainable.sharded)
