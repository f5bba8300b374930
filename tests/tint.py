"""The smallest model that takes the adapters of a U-Net: one layer, trained in milliseconds."""

import torch
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn
from toy_plugins import BlobModel

from comfy_tdpo.models.adapt import adapt
from comfy_tdpo.models.lora import UNetLora


class Tint(nn.Module, PeftAdapterMixin):
    """Predicts noise pixel by pixel, by one frozen layer on a pixel's three colours and a constant."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(4, 3, bias=False).requires_grad_(False)  # a name that adapters go to
        self.to_q.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))

    def forward(self, latents: Tensor, colours: Tensor) -> Tensor:
        inputs = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
        return latents - self.to_q(inputs.movedim(1, -1)).movedim(-1, 1)


class TintModel(BlobModel):
    """A DiffusionModel whose one layer is trained as a U-Net is."""

    def __init__(self):
        super().__init__("blobs:0")
        self.network = Tint()
        self.networks = {"tint": self.network}

    def adapt(self, settings, seed):
        return adapt(self.network, settings, lambda r, alpha: UNetLora(self.network, r, alpha, settings.targets, seed))
