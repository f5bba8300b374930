"""What the KL is measured against: the base model, or the policy as it was when the reference was last reset."""

from contextlib import AbstractContextManager

from torch import Tensor

from .models import Trainable
from .swapping import copied, swapped


class Reference:
    """The frozen base model until `reset`; from then on, a frozen float32 copy of the trained weights.

    weights: the copy by parameter name; empty before the first reset.
    """

    def __init__(self, trainable: Trainable):
        self.trainable = trainable
        self.weights: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Make the policy, as it is now, the reference."""
        self.weights = copied(self.trainable.parameters)

    def swapped_in(self) -> AbstractContextManager[None]:
        """Inside the block, the network is the reference; afterwards, the trained weights are back, to the last bit.

        Call the network with gradients disabled, since the parameters that hold the copy are those that are trained.
        (They keep requires_grad: torch chooses kernels by it, and the KL would not be exactly 0 right after a reset.)
        """
        return swapped(self.trainable.parameters, self.weights) if self.weights else self.trainable.reference()
