"""Builds a configuration from a Train node's inputs."""

from dataclasses import dataclass, field

from comfy_tdpo.clean_text import clean
from comfy_tdpo.prompts import load_prompts, prompt_sets
from comfy_tdpo.settings import NONE
from comfy_tdpo.shapes import MODELS

from ...trainer.config import Fields, TrainConfig, make_config, merge, override
from ...trainer.config.toml_files import parse_toml
from .combos import AUTO, check_choice
from .prompts import Prompts, read_prompts
from .reward_choice import RewardChoice, joined
from .used import used_by, used_of_critic

# Settings that the node's inputs and wires set, so that the `settings` text must not.
INPUTS = (
    *("algorithm", "model", "prediction_type", "rewards", "eval_rewards", "reward_weights"),
    *("prompts", "grid_prompts", "seed"),
)
# What to do about those of them that the node calls otherwise, or has no input for.
ELSEWHERE = {
    "rewards": "a wire has them: connect a TDPO Reward Model to reward",
    "eval_rewards": "a wire has them: connect a TDPO Reward Model to held_out",
    "reward_weights": "an input has them: use weights of TDPO Reward Model",
    "prediction_type": "the MODEL knows it: remove it from settings",
    "grid_prompts": "sample grids show the prompts that are trained on: remove it from settings",
    "resolution": "the node has an input for it: use that, or set it to 0",
}
NUMBERS = ("epochs", "samples_per_epoch", "steps", "guidance", "resolution")  # 0: the preset's value


@dataclass(frozen=True)
class Wanted:
    """What a Train node asks for.

    model: the name of its MODEL; preset: of its kind, see comfy_tdpo.models.kind.
    numbers: values of NUMBERS, rank and learning_rate; critic: nested settings, or None for the preset's.
    text: prompts, one per line; prompt_set: the set to use if there is no text; settings: more settings, as TOML.
    """

    model: str
    preset: str
    reward: RewardChoice
    algorithm: str = "ddpo-g"
    seed: int = 42
    numbers: dict[str, float] = field(default_factory=dict)
    held_out: RewardChoice | None = None
    critic: Fields | None = None
    text: str = ""
    prompt_set: str = AUTO
    settings: str = ""

    @property
    def widgets(self) -> Fields:
        """The values of the node's widgets that decide which run it means, by their names."""
        texts = {"prompts": self.text, "prompt_set": self.prompt_set, "settings": self.settings}
        return {"algorithm": self.algorithm, "seed": self.seed} | self.numbers | texts

    def config(self) -> TrainConfig:
        """The configuration; its prompts are the set's, which `prepare` replaces by the run's own file."""
        check_choice(
            "prompt_set", self.prompt_set, [AUTO, *prompt_sets()]
        )  # else a file's text could be copied to the output
        values: Fields = {
            "algorithm": self.algorithm,
            "model": self.model,
            "rewards": self.reward.weights,
            "eval_rewards": list(self.held_out.weights) if self.held_out else [],
            "reward_weights": joined(self.reward.files, self.held_out.files if self.held_out else {}),
            "seed": self.seed,
        }
        values |= {name: self.numbers[name] for name in NUMBERS if self.numbers.get(name)}
        if samples := values.get("samples_per_epoch"):
            values["samples_per_update"] = samples // 2 if samples % 2 == 0 else samples
        lora = {"rank": self.numbers.get("rank"), "lr": self.numbers.get("learning_rate")}
        values["policy"] = {name: value for name, value in lora.items() if value}
        if self.preset not in MODELS:  # what is watched may be a large download, so it has to be wired
            values["overoptimisation"] = {"reward": next(iter(values["eval_rewards"]), NONE)}
        if self.prompt_set != AUTO:
            values["prompts"] = self.prompt_set
        more = self._more()  # together with the inputs, which may need it, as samples_per_epoch does samples_per_prompt
        config = make_config(self.preset, None, merge(values, more))
        return override(override(config, self._critic(config)), more)

    def prompts(self) -> Prompts:
        """The training prompts: the lines of the text, or the set if there are none."""
        written = read_prompts(self.text, "prompts")
        return written if written.words else Prompts(load_prompts(self.config().prompts))

    def _critic(self, config: TrainConfig) -> Fields:
        """The settings of the critic on the wire, for the algorithm's own `config`."""
        if self.critic is None:
            return {}
        sections = used_of_critic(config)
        if not sections:
            raise ValueError(
                f"got a critic for {self.algorithm}, which has none; disconnect the critic, or choose one of "
                f"{', '.join(used_by()['critic'])}"
            )
        return {section: self.critic[section] for section in sections}

    def _more(self) -> Fields:
        try:
            more = parse_toml(clean(self.settings))
        except ValueError as error:
            raise ValueError(
                f"got settings that are not TOML ({error}); expected lines such as micro_batch = 4 or policy.alpha = 8"
            ) from error
        for name in (*INPUTS, *NUMBERS):
            if name in more and (name != "resolution" or self.numbers.get(name)):
                where = ELSEWHERE.get(name, f"the node has an input or a wire for it: use {name}")
                raise ValueError(f"got {name!r} among the settings; {where}")
        return more
