"""The temporal critic in a run: the encoder it reads images with, its predictions and its updates.

Shapes: N samples of an epoch in this process, T denoising steps, M (sample, step) pairs of one gradient update, D
embedding width.
"""

import logging

from torch import Tensor

from ..optimizers import adamw, load_optimizer_tensors, optimizer_tensors
from ..randomness import generator_at
from ..rewards import RewardModel, encoder_name, load_reward
from ..rollout import Trajectories
from . import Metrics, TensorGroup, objectives
from .context import Context
from .critic import TemporalCritic

logger = logging.getLogger(__name__)


class CriticTraining:
    """R_phi of arXiv 2402.08552 (Eq. 7) and its training (Eq. 9-10).

    encoder: the reward whose image encoder the critic uses; network, optimizer: the critic itself.
    """

    def __init__(self, context: Context):
        self.context, self.config = context, context.config.critic
        self.encoder = self._encoder()
        logger.info("the critic uses the image encoder of %s", encoder_name(self.encoder))
        embed_dim = self.encoder.embed_dim
        assert embed_dim is not None, "checked by _encoder"
        draw = generator_at(context.config.seed, "critic")
        self.network = TemporalCritic(embed_dim, self.config.activation, draw).to(context.policy.device)
        self.optimizer = adamw(list(self.network.parameters()), self.config)

    def _encoder(self) -> RewardModel:
        config, name = self.context.config, self.config.encoder
        how = (self.context.policy.device, config.reward_precision, config.reward_weights)
        model = load_reward(name, *how) if name else self.context.reward
        if model.embed_dim is None:
            raise ValueError(
                f"reward {model.name!r} has no image encoder for the critic; set critic.encoder to a reward that "
                "has one, or choose an algorithm without a critic (ddpo-2, ddpo-100)"
            )
        return model

    def predict(self, batch: Trajectories) -> Tensor:
        """The residuals, (N, T), in units of the normalised reward."""
        assert batch.image_embeds is not None
        return self.network(batch.image_embeds)

    def update(self, batch: Trajectories, targets: TensorGroup, rows: Tensor, steps: Tensor) -> None:
        """Eq. 9-10 on all M pairs at once: the critic is small, and dropout then does not depend on the micro-batch."""
        context, seed = self.context, self.context.config.seed
        assert batch.image_embeds is not None
        self.optimizer.zero_grad()
        place = (context.epoch + 1, context.progress.updates, context.accelerator.process_index)
        residuals = self.network(batch.image_embeds[rows, steps], dropout=generator_at(seed, "dropout", *place))
        old, returns = targets["residuals"][rows, steps], targets["returns"][rows, steps]
        loss = objectives.critic_loss(residuals, old, returns, self.config.clip_range).mean()
        loss.backward()
        context.add("critic/loss", loss)
        context.step(self.optimizer, self.config.max_grad_norm)

    def metrics(self, targets: TensorGroup) -> Metrics:
        trained, gather = self.context.policy.process.stochastic, self.context.gather
        residuals, returns = (gather(targets[name][:, trained].contiguous()) for name in ("residuals", "returns"))
        return {"critic/explained_variance": objectives.explained_variance(residuals, returns).item()}

    def state(self) -> dict[str, TensorGroup]:
        named = dict(self.network.named_parameters())
        return {"critic": self.network.state_dict(), "critic_optimizer": optimizer_tensors(self.optimizer, named)}

    def load_state(self, tensors: dict[str, TensorGroup]) -> None:
        self.network.load_state_dict(tensors["critic"])
        named = dict(self.network.named_parameters())
        load_optimizer_tensors(self.optimizer, named, tensors["critic_optimizer"])
