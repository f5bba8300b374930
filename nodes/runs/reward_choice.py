"""The rewards chosen by Reward Model nodes, as passed along a wire."""

from dataclasses import dataclass, field

from comfy_tdpo.rewards import check_reward, name_of_sum


@dataclass(frozen=True)
class RewardChoice:
    """Rewards by name: the weight of each in their sum, and the weights file of those for which one was chosen."""

    weights: dict[str, float]
    files: dict[str, str] = field(default_factory=dict)

    def with_reward(self, name: str, weight: float, file: str | None = None) -> "RewardChoice":
        """This choice and one more reward; if the reward is already included, its weights add up."""
        check_reward(name)
        files = joined(self.files, {name: file} if file else {})
        return RewardChoice(self.weights | {name: self.weights.get(name, 0.0) + weight}, files)

    @property
    def name(self) -> str:
        return name_of_sum(self.weights)


def joined(files: dict[str, str], others: dict[str, str]) -> dict[str, str]:
    """Both mappings; ValueError if they name different files for a reward, which is one model in a run."""
    for name, file in others.items():
        if files.get(name, file) != file:
            raise ValueError(f"got {files[name]} and {file} as the weights of reward {name!r}; choose one of them")
    return files | others
