"""The base class of remote rewards: they have neither a gradient nor an encoder."""

import torch
from torch import Tensor

from ..answers import RewardError
from ..options import Options
from .asking import ONCE, Patience, Request, ask

SIDE = 64  # pixels of the image that is scored to see whether anybody is there


class Client:
    """A reward that asks another program; subclasses say how."""

    sources = ()
    embed_dim = None
    differentiable = False
    elsewhere = True
    remedy = ""

    def __init__(self, name: str, options: Options):
        self.name = name

    def requests(self, images: Tensor, prompts: list[str]) -> list[Request[list[float]]]:
        """The requests whose answers, one after the other, are the scores of B images (B, 3, H, W)."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        raise TypeError(f"{self.name} is another program and lends no encoder")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self._ask(images, prompts)

    def check_prompts(self, prompts: list[str]) -> None:
        """Have the first prompt scored with a grey image, so that a wrong address or a refusal shows at once."""
        try:
            self._ask(torch.full((1, 3, SIDE, SIDE), 0.5), prompts[:1], ONCE)
        except RewardError as error:
            raise ValueError(f"{error}; {self.remedy}") from error

    def _ask(self, images: Tensor, prompts: list[str], patience: Patience | None = None) -> Tensor:
        parts = ask(self.name, self.requests(images, prompts), patience)
        scores = [score for part in parts for score in part]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)
