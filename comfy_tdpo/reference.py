"""What the KL is measured against: the base model, or the policy as it was when the reference was last reset."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from .models import Trainable


class Reference:
    """The frozen base model until `reset`; from then on, a frozen float32 copy of the trained weights.

    weights: the copy by parameter name; empty before the first reset.
    """

    def __init__(self, trainable: Trainable):
        self.trainable = trainable
        self.weights: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Make the policy, as it is now, the reference."""
        parameters = self.trainable.parameters
        # float() and detach() return the parameter's own memory where they have nothing to do, so clone
        self.weights = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block, the network is the reference; afterwards, the trained weights are back, to the last bit.

        Call the network with gradients disabled, since the parameters that hold the copy are those that are trained.
        (They keep requires_grad: torch chooses kernels by it, and the KL would not be exactly 0 right after a reset.)
        """
        if not self.weights:
            with self.trainable.reference():
                yield
            return
        parameters = self.trainable.parameters
        live = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.weights[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = live[name]
