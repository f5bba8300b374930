"""A reward service, such as `python -m comfy_tdpo.trainer serve --reward NAME` is; see protocol.py."""

from functools import partial

from torch import Tensor

from . import address_of
from .asking import Request
from .client import Client
from .protocol import HEADER, LARGEST_BODY, packed, scores_in


class Service(Client):
    """A batch is one request, so that the service computes on the same batch; only very large ones are split."""

    remedy = "start the service there, with `python -m comfy_tdpo.trainer serve`, or correct the address"

    def requests(self, images: Tensor, prompts: list[str]) -> list[Request[list[float]]]:
        size = max(1, (LARGEST_BODY - HEADER) // (images[0].numel() * images.element_size()))
        return [self._request(part, prompts[i * size : (i + 1) * size]) for i, part in enumerate(images.split(size))]

    def _request(self, images: Tensor, prompts: list[str]) -> Request[list[float]]:
        body = packed(images, prompts)
        read = partial(scores_in, body=body, count=len(images))
        return Request(address_of(self.name), body, read, {"Content-Type": "application/octet-stream"})
