"""Networks of rewards leave their device while a training does without them, and nobody meets them away from it."""

import threading
import time
from contextlib import ExitStack

import pytest
import torch
from elsewhere import DEVICE, Device
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import Brightness

from comfy_tdpo.rewards import WeightedSum, embed_images, score_images
from comfy_tdpo.rewards.networks import needed, unneeded

CPU = torch.device("cpu")


class Learned(Brightness):
    """Its network leaves the images as they are."""

    def __init__(self, device):
        self.network = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)).eval().requires_grad_(False)
        self.network[0].weight.copy_(torch.eye(3)[..., None, None])
        self.network.to(device)

    def embed(self, images):
        return super().embed(self.network(images))

    def score(self, images, prompts):
        return super().score(self.network(images), prompts)


class Slow(Learned):
    """Lets other threads in before it uses its network."""

    def score(self, images, prompts):
        time.sleep(0.001)
        return super().score(images, prompts)


def places(reward):
    return {tensor.device for tensor in (*reward.network.parameters(), *reward.network.buffers())}


def test_networks_leave_when_nobody_needs_them_and_come_back_the_same():
    with Device():
        reward = Learned(DEVICE)
        images = torch.rand(2, 3, 8, 8).to(DEVICE)
        expected = score_images(reward, images, ["", ""]).tolist()
        with needed([reward]), unneeded([reward]):
            assert places(reward) == {DEVICE}, "somebody needs them"
        with unneeded([reward]), unneeded([reward]):
            assert places(reward) == {CPU}
            with needed([WeightedSum([(reward, 1.0, 1.0), (reward, 2.0, 1.0)])]):
                assert places(reward) == {DEVICE}
            assert places(reward) == {CPU}
            assert score_images(reward, images, ["", ""]).tolist() == expected
            assert places(reward) == {CPU}
        embed_images(reward, images)
        assert places(reward) == {DEVICE}, "no training does without them"


def test_networks_without_room_stay_away_whole_and_are_not_counted(monkeypatch):
    with Device():
        reward = Learned(DEVICE)
        to, moved = torch.Tensor.to, []

        def full(tensor, *args, **kwargs):
            moved.append(tensor)
            if len(moved) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return to(tensor, *args, **kwargs)

        with unneeded([reward]):
            monkeypatch.setattr(torch.Tensor, "to", full)
            with pytest.raises(torch.OutOfMemoryError), needed([reward]):
                pass
            assert len(moved) == 3 and places(reward) == {CPU}
            with needed([reward]):
                assert places(reward) == {DEVICE}
            assert places(reward) == {CPU}


def test_threads_that_need_a_network_never_meet_it_away():
    """Two do without it over and over, and four score; a network on another device than the images is an error."""
    with ExitStack() as stack:
        stack.enter_context(Device())
        reward, images = Slow(DEVICE), torch.rand(2, 3, 8, 8).to(DEVICE)
        expected, found, left = score_images(reward, images, ["", ""]).tolist(), [], []

        def do_without():
            for _ in range(30):
                with unneeded([reward]):
                    left.append(places(reward))
                    time.sleep(0.001)

        def score():
            for _ in range(15):
                found.append(score_images(reward, images, ["", ""]).tolist())

        def on_the_device(work):
            mode = Device()
            TorchDispatchMode.__enter__(mode)  # each thread has modes of its own, but what is patched is patched once
            try:
                work()
            finally:
                TorchDispatchMode.__exit__(mode, None, None, None)

        threads = [threading.Thread(target=on_the_device, args=(work,)) for work in [do_without] * 2 + [score] * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [expected] * 60
        assert {CPU} in left, "it left"
        with unneeded([reward]):
            assert places(reward) == {CPU}, "nobody is counted any more"
