"""Normalised rewards: those of the images, for the returns, and of the predicted clean images, for the critic.

A reward is normalised by the recent rewards of its prompt, by the other images of its prompt in the epoch, or by all of
the epoch's, and then lowered by the guards' penalty.

Shapes: B samples of all processes, N of this one, K denoising steps, S scores of each step.
"""

import logging
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..rewards import RewardModel, score_images
from ..rollout import Trajectories, draw_images
from . import Metrics, groups
from .advantages import RewardMoments, Standard, standard_of
from .context import Context
from .guards import GuardPenalty, Level, Scores

logger = logging.getLogger(__name__)

LEVEL_EPOCHS = 4  # epochs whose images the guards' levels may take


class NormalisedRewards:
    """The moments of the rewards and the guards' penalty, as the settings choose them."""

    def __init__(self, context: Context):
        self.context, self.config = context, context.config
        config = self.config
        self.moments = RewardMoments(config.moments.buffer_size, config.moments.min_count)
        self.guards = GuardPenalty(
            config.guard_penalty, config.guard_credit, config.guard_adaptation, config.guard_slack
        )
        self._in_groups = config.moments.baseline == "group"
        self._standard: Standard | None = None

    @property
    def guarded(self) -> bool:
        """Whether the guards' scores count."""
        return bool(self.context.guards and self.config.guard_penalty)

    @property
    def models(self) -> list[RewardModel]:
        """The rewards whose scores count, in the order in which `of_steps` expects them."""
        return [self.context.reward, *(self.context.guards.values() if self.guarded else ())]

    def start(self, prompts: list[str], guards: Scores) -> None:
        """Before an epoch's rewards are normalised: set the guards' levels, if they are not known yet."""
        if self.guarded and not self.guards.levels:
            self.guards.start(self._levels(prompts, guards))

    def of_images(self, prompts: list[str], rewards: Tensor, guards: Scores) -> Tensor:
        """An epoch's rewards, (B,), normalised, less the guards' penalty without its mean; once per epoch."""
        size = self.config.samples_per_prompt
        if self._in_groups:
            self._standard = groups.standard(rewards, size, self.config.moments.group_std)
        elif self.config.moments.baseline == "epoch":
            self._standard = standard_of(rewards)
        else:
            self._standard = self.moments.add(prompts, rewards)
        normalised = self._standard(rewards)
        if self.guarded:
            lost = self.guards(prompts, guards).sum(-1)
            centred = groups.leave_one_out(lost, size) if self._in_groups else lost - lost.mean()
            normalised = normalised - centred.float().to(normalised.device)
        return normalised

    def of_steps(self, batch: Trajectories) -> Tensor:
        """What the training reward and the guards make of each step, as if it were the image, (N, K, S): the
        normalised reward, then the penalty of each guard."""
        assert batch.step_scores is not None and self._standard is not None
        rewards, *guards = batch.step_scores.unbind(-1)
        normalised = Standard(*map(self.context.own, self._standard))(rewards)[..., None]
        if not self.guarded:
            return normalised
        named = dict(zip(self.context.guards, guards, strict=True))
        lost = self.guards(batch.prompts, named).float()
        return torch.cat([normalised, lost.to(normalised.device)], dim=-1)

    def _levels(self, prompts: list[str], guards: Scores) -> dict[str, Level]:
        """The guards' levels, from images of every prompt that the model draws for this before it is trained.

        Every process draws them all. Where that would be more than LEVEL_EPOCHS epochs of images, there are fewer of
        each prompt; with less than two, the levels are those of the first epoch's scores.
        """
        drawn, wanted = list(dict.fromkeys(self.context.all_prompts)), self.config.guard_images
        count = min(wanted, LEVEL_EPOCHS * self.config.samples_per_epoch // len(drawn))
        if wanted and count < 2:
            logger.warning(
                "%d prompts are too many for guard_images %d: with %d samples per epoch, %d images are drawn at most; "
                "the first epoch's scores set the guards' levels instead",
                *(len(drawn), wanted, self.config.samples_per_epoch, LEVEL_EPOCHS * self.config.samples_per_epoch),
            )
        if count < 2:
            return {name: Level.of_epoch(prompts, scores) for name, scores in guards.items()}
        logger.info("drawing %d images for the guards' levels, %d of each prompt", count * len(drawn), count)
        parts = list(self._scores_of([(prompt, i) for prompt in drawn for i in range(count)]))
        scores = {name: torch.cat([part[name] for part in parts]).unflatten(0, (-1, count)) for name in guards}
        return {name: Level.of_prompts(drawn, found) for name, found in scores.items()}

    def _scores_of(self, rows: list[tuple[str, int]]) -> Iterator[Scores]:
        """The guards' scores of an image for each prompt and number, a few at a time."""
        context, size = self.context, self.context.micro_batch
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            context.begin("drawing for guards", begin, len(part), len(rows))
            prompts, seeds = [prompt for prompt, _ in part], [(self.config.seed, "guards", *row) for row in part]
            images = draw_images(context.decoder, prompts, seeds, size, context.check, context.tell)
            yield {name: score_images(guard, images, prompts) for name, guard in context.guards.items()}

    def finish(self, batch: Trajectories) -> Metrics:
        """Adapt the guards' weights after an epoch; returns the mean weight of its samples."""
        if not self.guards.levels:
            return {}
        prompts = self.context.prompts(self.context.epoch + 1)
        metrics = {
            f"guard/{name}/penalty": fmean(weights.of(prompt) for prompt in prompts)
            for name, weights in self.guards.weights.items()
        }
        if self.config.guard_adaptation:  # otherwise there is no need to gather the scores again
            gather = self.context.gather
            self.guards.adapt(prompts, {name: gather(found) for name, found in batch.guard_rewards.items()})
        return metrics

    def state(self) -> dict[str, Any]:
        return {"moments": self.moments.state_dict(), "guards": self.guards.state()}

    def load_state(self, plain: dict[str, Any]) -> None:
        self.moments.load_state_dict(plain["moments"])
        if "guards" in plain:  # older versions have none
            self.guards.load(plain["guards"])
