"""The metrics of an epoch that all algorithms have: of its samples' rewards, and of its updates.

Everything is gathered from all processes.
"""

import torch

from comfy_tdpo.diversity import diversity
from comfy_tdpo.methods.context import Context
from comfy_tdpo.rollout import Trajectories

from .run import EpochMetrics


def reward_metrics(context: Context, batch: Trajectories, prompts: list[str]) -> EpochMetrics:
    """Mean and standard deviation of the training reward, of those that it sums, of held-out ones and guards; and the
    diversity.

    batch: this process's samples; prompts: those of all processes.
    """
    trained = {context.reward.name: batch.rewards, **batch.part_rewards}  # the sum first: see reward_names
    by_kind = {"reward": trained, "eval": batch.eval_rewards, "guard": batch.guard_rewards}
    metrics = EpochMetrics()
    for kind, rewards in by_kind.items():
        for name, scores in rewards.items():
            scores = context.gather(scores)
            metrics[f"{kind}/{name}/mean"] = scores.mean().item()
            metrics[f"{kind}/{name}/std"] = scores.std(correction=0).item()
    if batch.final_embeds is not None:
        distance = diversity(context.gather(batch.final_embeds), prompts)
        metrics |= {} if distance is None else {"diversity": distance}
    return metrics


def update_metrics(context: Context) -> EpochMetrics:
    """Means and maxima over the epoch's updates."""
    progress = context.progress
    found = progress.sums | progress.maxima
    if not found:
        return {}
    values = context.processes.gather(torch.stack(list(found.values()))[None])  # one row per process
    means, maxima = values.mean(0).tolist(), values.amax(0).tolist()
    return {
        name: largest if name in progress.maxima else mean / progress.updates
        for name, mean, largest in zip(found, means, maxima, strict=True)
    }
