"""What fits into the memory of common GPUs, counted without one.

The model is made of tensors without values, and goes through the same rehearsal as before a training, so that what is
chosen here is what MemoryBudget would choose on such a GPU. Rewards count as what their files hold, an upper bound,
and their work as none, since a decoder needs more.
"""

from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from comfy_tdpo.counts import in_tenths
from comfy_tdpo.memory.budget import (
    GIB,
    MemoryBudget,
    Need,
    better_in_main_memory,
    bytes_of_trajectories,
    need_of,
)
from comfy_tdpo.memory.counting import Held
from comfy_tdpo.memory.without_values import counted, flops_of
from comfy_tdpo.models.sizes import model_without_weights, numbers_of_texts
from comfy_tdpo.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from comfy_tdpo.optimizers import bytes_of_moments
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.rehearsal import Rehearsal
from comfy_tdpo.rewards import reward_class
from comfy_tdpo.tastes.names import is_taste

from ..assemble import DTYPES, policy_settings
from ..config import TrainConfig, override
from ..run.disk import bytes_of_checkpoint, bytes_of_snapshot

CARDS = (6, 8, 12, 16, 24, 48, 80)  # GiB
CONTEXT = GIB // 2  # of CUDA and its libraries; 0.3 to 0.6 GiB
UNITS = {"GB": 10**9, "MB": 10**6}


@dataclass(frozen=True)
class Footprint:
    """What a run needs, in bytes.

    weights: of denoiser, adapter and decoder, and of a critic's own decoder.
    rewards: of their networks, which leave the device while prompts are encoded and, unless they are back-propagated,
    during updates.
    texts: of the text encoders, which leave the device once all prompts are encoded.
    moments, trajectories: what an epoch holds besides; snapshot, checkpoint: a file of each, on the disk.
    sampling, decoding: per row; training: without gradient checkpointing and with it.
    drawing: per row, whatever an image of evaluation takes at most.
    flops: floating-point operations.
    """

    weights: int
    texts: int
    rewards: int
    moments: int
    trajectories: int
    snapshot: int
    checkpoint: int
    sampling: Need
    decoding: Need
    training: dict[bool, Need]
    drawing: Need
    flops: "Flops"

    @property
    def reserve(self) -> int:
        return self.moments + self.trajectories


class Flops(NamedTuple):
    """Floating-point operations of one row: of a step, without and with its gradient, of a decoded image, and of one
    that a critic sees, in full size."""

    step: int
    training: int
    image: int
    seen: int


def footprint(config: TrainConfig, configs: Path, absent: Container[str] = ()) -> Footprint:
    """What a run of `config` needs, whose model's networks are configured in the folder `configs`, without those
    `absent`; raises ValueError if a configuration is damaged."""
    dtype = DTYPES[config.precision]
    whole_in_float32 = config.policy.trains_all and config.policy.optimizer == "adamw"
    config = override(config, {"policy": {"gradient_checkpointing": False}})
    decoder = decoder_of(config)
    with counted() as held:
        model = model_without_weights(configs, dtype, torch.float32 if whole_in_float32 else dtype, config.model)
        policy = DiffusionPolicy(model, **policy_settings(config, torch.device("cpu")))
        weights = held.bytes - sum(weight.nbytes for weight in policy.trainable.base.values())  # on the CPU
        rehearsal = Rehearsal(policy, "", [])
        sampling, decoding = need_of(held, rehearsal.sample), need_of(held, rehearsal.decode)
        training = {False: need_of(held, rehearsal.train)}
        step, trained, image = (
            flops_of(partial(work, 1)) for work in (rehearsal.sample, rehearsal.train, rehearsal.decode)
        )
        flops = Flops(
            step, trained, image, image if decoder is None else flops_of_decoder(decoder, policy.latent_shape)
        )
        rehearsal.turn_on_checkpointing()
        training[True] = need_of(held, rehearsal.train)
        snapshot, checkpoint = bytes_of_snapshot(policy), bytes_of_checkpoint(config, policy)
        moments = bytes_of_moments(policy.count, config.policy)
        drawing = sampling
        if policy.size_of_evaluation > 1:
            with policy.drawing_for_evaluation():
                drawing = max(need_of(held, work) for work in (rehearsal.sample, rehearsal.decode))
    return Footprint(
        weights=weights + bytes_of_decoder(decoder),
        texts=numbers_of_texts(configs, absent) * dtype.itemsize,
        rewards=bytes_of_rewards(config),
        moments=moments,
        trajectories=bytes_of_trajectories(config, policy, 0 if config.needs_gradient else config.samples_per_epoch),
        snapshot=snapshot,
        checkpoint=checkpoint,
        sampling=sampling,
        decoding=decoding,
        training=training,
        drawing=drawing,
        flops=flops,
    )


def rows_allowed(config: TrainConfig) -> tuple[int, int, int]:
    """Samples of an update, and the most samples and images at once."""
    return config.samples_per_update, config.micro_batch or config.samples_per_update, config.decode_batch


def bytes_of_rewards(config: TrainConfig) -> int:
    """What the files of all rewards hold, each once, in the rewards' precision."""
    names = dict.fromkeys([*config.trained_on, *config.measured, *config.guards, *config.further_rewards])
    sources = {source for name in names if not is_taste(name) for source in reward_class(name).sources}
    itemsize = DTYPES[config.reward_precision].itemsize
    return sum(_bytes(source.size) * 8 * itemsize // source.bits for source in sources)


def _bytes(size: str) -> int:
    number, unit = size.split()
    return int(float(number) * UNITS[unit])


def decoder_of(config: TrainConfig) -> TinyDecoder | None:
    """The decoder in addition to the model's own."""
    file = config.further_decoder
    return None if file is None else load_tiny_decoder(file, DTYPES[config.precision])


def bytes_of_decoder(decoder: TinyDecoder | None) -> int:
    """Its size; it is smaller than the model's own, so that its work is no peak."""
    return sum(weight.nbytes for weight in decoder.network.parameters()) if decoder else 0


def flops_of_decoder(decoder: TinyDecoder, latent_shape: tuple[int, int, int]) -> int:
    """What it takes to decode a latent, (C, H, W)."""
    with torch.no_grad():
        return flops_of(lambda: decoder(torch.zeros(1, *latent_shape)))


def choice(found: Footprint, config: TrainConfig, card: int) -> str:
    """What fits a GPU of `card` GiB: samples and images at once, with a * for gradient checkpointing, or "no"."""
    free = card * GIB - CONTEXT - found.weights - found.rewards
    elsewhere = better_in_main_memory(found.trajectories, free)
    reserve = found.moments if elsewhere else found.reserve
    budget = MemoryBudget(Held(), *rows_allowed(config), reserve, together=config.rows_together)
    room = budget.room(free)
    freed = 0 if config.needs_gradient else found.rewards
    if found.texts > free + found.rewards or not found.drawing.rows(room):
        return "no"
    for checkpointing in (True,) if config.policy.gradient_checkpointing else (False, True):
        needs = [found.sampling, found.training[checkpointing].less(freed)]
        if all(need.rows(room) >= config.rows_together for need in needs) and found.decoding.rows(room):
            rows, images, _ = budget.choose(room, needs, found.decoding, checkpointing)
            return f"{rows}{'*' * checkpointing} / {images}"
    return "no"


def described(found: Footprint) -> str:
    """One line of what a run needs, in GiB."""
    parts = [found.weights, found.texts, found.rewards, found.reserve]
    parts += [*(found.training[on].first for on in (False, True)), found.decoding.first]
    weights, texts, rewards, reserve, plain, recomputed, image = (in_tenths(part / GIB) for part in parts)
    return (
        f"weights {weights}, text encoders until prompts are encoded {texts}, rewards at most {rewards}, optimizer and "
        f"trajectories {reserve}; one sample in training {plain}, or {recomputed} with gradient checkpointing; one "
        f"image decoded {image}"
    )


def fits(found: Footprint, config: TrainConfig) -> list[str]:
    """Lines for the terminal: what a run of `config` needs, and what of it fits common GPUs."""
    cells = ", ".join(f"{card} GiB: {choice(found, config, card)}" for card in CARDS)
    return [
        f"memory, counted without a GPU, in GiB: {described(found)}",
        f"samples at once / images decoded at once, by GPU (* with gradient checkpointing): {cells}",
    ]
