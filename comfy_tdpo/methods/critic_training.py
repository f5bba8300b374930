"""The temporal critic in a run: what it reads, its predictions and its updates.

Shapes: N samples of an epoch in this process, T denoising steps, of which the critic reads the first K, M (sample,
step) pairs of one gradient update, E width of what it sees of a step, P width of a prompt's summary, D width of the
critic's input, S scores of each step.
"""

import logging
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..optimizers import adamw, load_optimizer_tensors, optimizer_tensors
from ..randomness import generator_at
from ..reading import Reading
from ..rewards import RewardModel, embed_images, encoder_name, load_reward
from ..rollout import Trajectories
from ..swapping import brought
from . import Metrics, TensorGroup, objectives
from .context import Context
from .critic import TemporalCritic
from .decoder import load_decoder
from .encoder import encoder_of
from .step_regression import StepRegression
from .window import steps_read

logger = logging.getLogger(__name__)

# What is kept of an epoch: (N, K, E), (N, P), (N, K, S) and (N, K). S is 0 for a critic that reads no scores.
HISTORY = ("image_embeds", "summaries", "scores", "returns")
THIRDS = ("first", "middle", "last")


class CriticTraining:
    """R_phi of arXiv 2402.08552 (Eq. 7) and its training: by Eq. 9-10, or by regression on the latest epochs.

    steps: K, all of T if the critic is trained by Eq. 9-10; otherwise the steps up to and including the one after the
    last trained step, since lambda compares each prediction with the next. For later steps, the return itself takes the
    place of a prediction.
    encoder: the reward whose image encoder the critic uses, None if it reads latents; decoder: its own decoder, None if
    it uses the model's; network, optimizer: the critic itself.
    history: HISTORY of the latest epochs, of all processes, oldest first; empty if the critic is trained by Eq. 9-10.
    regression: what the scores alone predict, a linear function for each step; the network adds to it. None until it
    has been fitted, and for a critic that reads no scores.
    """

    def __init__(self, context: Context):
        self.context, self.config, self.policy = context, context.config.critic, context.policy
        self.steps = steps_read(self.config, context.config.policy, self.policy.process.stochastic)
        self.encoder = None if self.config.reads == "latent" else self._encoder()
        self.decoder = load_decoder(self.config, self.policy)
        self.network = TemporalCritic(
            self._width(),
            self.config.activation,
            generator_at(context.config.seed, "critic"),
            self.config.architecture,
            steps=len(self.policy.process) * self.config.step,
        ).to(self.policy.device)
        self.optimizer = adamw(list(self.network.parameters()), self.config)
        self.history: list[TensorGroup] = []
        self.regression: StepRegression | None = None

    def _encoder(self) -> RewardModel:
        """The reward whose encoder the critic uses; the log names it, as a warning if it was chosen in place of the
        training reward's."""
        context, config, name = self.context, self.context.config, encoder_of(self.context.config)
        if context.reward.embed_dim and not self.config.encoder:
            logger.info("the critic uses the image encoder of %s", encoder_name(context.reward))
            return context.reward
        model = context.guards.get(name) or load_reward(
            name, self.policy.device, config.reward_precision, config.reward_weights
        )
        if model.embed_dim is None:
            raise ValueError(
                f"reward {name!r} has no image encoder for the critic; set critic.encoder to a reward that has one, or "
                "choose an algorithm without a critic (ddpo-2, ddpo-100)"
            )
        if self.config.encoder:
            logger.info("the critic uses the image encoder of %s", name)
        else:
            told = "reward %r has no image encoder, so the critic uses that of %r; critic.encoder chooses another"
            logger.warning(told, context.reward.name, name)
        if name not in context.guards:
            context.further_rewards.append(model)
        return model

    # --- what it reads

    def reading(self, rewards: Sequence[RewardModel]) -> Reading | None:
        """How trajectories are read for it, where `rewards` are those whose scores it may read; None if it reads
        latents."""
        if self.encoder is None:
            return None
        config = self.config
        return Reading(
            partial(embed_images, self.encoder),
            decode=self.decoder,
            image_size=config.image_size,
            clean=config.reads == "clean",
            steps=self.steps,
            every=config.read_every,
            held=config.between == "held",
            rewards=rewards if config.scores else (),
        )

    def _width(self) -> int:
        width = self.policy.latent_size if self.encoder is None else self.encoder.embed_dim
        assert width is not None, "checked by _encoder"
        if self.config.prompt:
            width += self.policy.encode_prompts([""]).summary().shape[1]
        return width + len(self.policy.process) * self.config.step

    def inputs(self, batch: Trajectories) -> Tensor:
        """What the critic reads of each sample at each step, (N, K, D)."""
        return self._inputs(brought(self._seen(batch), self.policy.device), self._summaries(batch))

    def _seen(self, batch: Trajectories) -> Tensor:
        """What it sees of each sample at each step, (N, K, E): an embedding, or x_k itself."""
        if self.encoder is None:
            return batch.latents[:, : self.steps].flatten(2)
        assert batch.image_embeds is not None
        return batch.image_embeds

    def _summaries(self, batch: Trajectories) -> Tensor:
        """(N, P), with P = 0 for a critic that does not know the prompt."""
        if not self.config.prompt:
            return batch.rewards.new_zeros(len(batch), 0)
        return self.policy.encode_prompts(batch.prompts).summary()

    def _inputs(self, seen: Tensor, summaries: Tensor) -> Tensor:
        if not (self.config.prompt or self.config.step):
            return seen
        count, steps, _ = seen.shape
        parts = [seen, summaries[:, None].expand(-1, steps, -1)]
        if self.config.step:
            one_hot = torch.eye(steps, len(self.policy.process), device=seen.device)
            parts.append(one_hot.expand(count, -1, -1))
        return torch.cat(parts, dim=-1)

    def _inputs_at(self, batch: Trajectories, rows: Tensor, steps: Tensor) -> Tensor:
        """`inputs`, but of M pairs alone, (M, D): latents of a whole epoch are too large to copy in every update."""
        parts = [brought(self._seen(batch)[rows, steps], self.policy.device)]
        if self.config.prompt:
            parts.append(self._summaries(batch)[rows])
        if self.config.step:
            parts.append(F.one_hot(steps, len(self.policy.process)).float().to(parts[0].device))
        return torch.cat(parts, dim=-1)

    def predict(self, batch: Trajectories, returns: Tensor, scores: Tensor | None = None) -> Tensor:
        """The residuals, (N, T), in units of the normalised reward.

        returns: (N, T), for the steps that it does not read; scores: (N, K, S), for a critic that reads them.
        """
        inputs = self.inputs(batch)
        if self.network.needs_moments:  # gathering an epoch's inputs from all processes is not for every epoch
            self.network.see(self.context.gather(inputs.contiguous()).flatten(0, 1))
        read = self.network(inputs) + (0 if self.regression is None else self.regression(scores))
        return torch.cat([read, returns[:, self.steps :]], dim=1)

    @property
    def gae_lambda(self) -> float:
        """Lambda of this epoch: 1 as long as a critic that learns at the end of an epoch has learned nothing."""
        return 1.0 if self.config.history and not self.history else self.config.gae_lambda

    def known(self, trained: Tensor) -> Tensor:
        """The steps whose residuals it learns, bool (T,), if the policy trains on `trained`, bool (T,)."""
        return torch.ones_like(trained) if self.config.history else trained

    # --- its updates

    def update(self, batch: Trajectories, targets: TensorGroup, rows: Tensor, steps: Tensor) -> None:
        """Eq. 9-10 on all M pairs at once: the critic is small, and dropout then does not depend on the micro-batch."""
        if self.config.history:
            return
        self.optimizer.zero_grad()
        place, processes = (self.context.epoch + 1, self.context.progress.updates, 0), self.context.processes
        draw = generator_at(self.context.config.seed, "dropout", *place)
        residuals = self.network(self._inputs_at(batch, rows, steps), draw, processes.rank, processes.count)
        old, returns = targets["residuals"][rows, steps], targets["returns"][rows, steps]
        loss = objectives.critic_loss(residuals, old, returns, self.config.clip_range or torch.inf).mean()
        loss.backward()
        self.context.add("critic/loss", loss)
        self.context.step(self.optimizer, self.config.max_grad_norm)

    def finish(self, batch: Trajectories, targets: TensorGroup) -> None:
        """Without Eq. 9-10: regress on the returns of the latest epochs, after the policy's updates of this one.

        Not before: a critic that has seen a sample's return is no baseline for it, but a bias. All processes do the
        same work on the same rows.
        """
        if not self.config.history:
            return
        returns = targets["returns"][:, : self.steps]
        scores = targets.get("scores", returns.new_zeros(*returns.shape, 0))
        kept = (self._seen(batch), self._summaries(batch), scores, returns)
        gathered = [self._gather(tensor.contiguous()) for tensor in kept]
        self.history = [*self.history, dict(zip(HISTORY, gathered, strict=True))][-self.config.history :]
        inputs = torch.cat([self._of(epoch).flatten(0, 1) for epoch in self.history])
        returns = torch.cat([epoch["returns"] for epoch in self.history])
        if self.config.scores:
            scores = torch.cat([epoch["scores"] for epoch in self.history])
            self.regression = StepRegression.fit(scores, returns)
            returns = returns - self.regression(scores)
        returns = returns.flatten()
        draw = generator_at(self.context.config.seed, "regression", self.context.epoch + 1)
        with torch.enable_grad():
            for _ in range(self.config.passes):
                for rows in torch.randperm(len(inputs), generator=draw).split(self.config.batch):
                    self.optimizer.zero_grad()
                    F.mse_loss(self.network(inputs[rows], dropout=draw), returns[rows]).backward()
                    self.context.step(self.optimizer, self.config.max_grad_norm)

    def _gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes; rows without numbers are not sent, as NCCL cannot gather them."""
        if rows.numel():
            return self.context.gather(rows)
        return rows.new_zeros(len(rows) * self.context.processes.count, *rows.shape[1:])

    def _of(self, epoch: TensorGroup) -> Tensor:
        return self._inputs(epoch["image_embeds"], epoch["summaries"])

    # --- metrics and saved state

    def metrics(self, targets: TensorGroup, trained: Tensor) -> Metrics:
        """The variance of the returns that the residuals explain, over the `trained` steps, bool (T,), and thirds of
        them."""
        gather = self.context.gather
        residuals, returns = (gather(targets[name][:, trained].contiguous()) for name in ("residuals", "returns"))
        metrics = {"critic/explained_variance": objectives.explained_variance(residuals, returns).item()}
        thirds = zip(THIRDS, residuals.tensor_split(3, dim=1), returns.tensor_split(3, dim=1), strict=True)
        for third, ours, theirs in thirds:
            if ours.numel():
                metrics[f"critic/explained_variance_{third}"] = objectives.explained_variance(ours, theirs).item()
        return metrics

    def state(self) -> dict[str, TensorGroup]:
        named = dict(self.network.named_parameters())
        history = {f"{name}.{i}": epoch[name] for i, epoch in enumerate(self.history) for name in HISTORY}
        groups = {"critic": self.network.state_dict(), "critic_optimizer": optimizer_tensors(self.optimizer, named)}
        groups |= {"critic_history": history} if history else {}
        return groups | ({"critic_regression": vars(self.regression)} if self.regression else {})

    def load_state(self, tensors: dict[str, TensorGroup]) -> None:
        self.network.load_state_dict(tensors["critic"])
        named = dict(self.network.named_parameters())
        load_optimizer_tensors(self.optimizer, named, tensors["critic_optimizer"])
        kept = tensors.get("critic_history", {})
        self.history = [{name: kept[f"{name}.{i}"] for name in HISTORY} for i in range(len(kept) // len(HISTORY))]
        fitted = tensors.get("critic_regression")
        self.regression = StepRegression(**fitted) if fitted else None
