"""The typed, frozen configuration of a run: every setting, its default (the paper's value) and its validation."""

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from comfy_tdpo.counts import number_of
from comfy_tdpo.methods import ALGORITHMS, settings_class
from comfy_tdpo.process import PROCESSES
from comfy_tdpo.registry import entry
from comfy_tdpo.resolution import normalised
from comfy_tdpo.rewards import ONLY_EVALUATE, check_reward, reward_names
from comfy_tdpo.rewards.gradients import check_gradients
from comfy_tdpo.settings import (
    MAY_CHANGE,
    NONE,
    Count,
    MethodSettings,
    OveroptimisationSettings,
    Positive,
    Section,
    Unset,
    leaves,
)
from comfy_tdpo.tastes.names import is_taste
from comfy_tdpo.user_files import user_path

from .messages import check_text, explain
from .parsing import named_values, split_names, with_named_rewards

DEFAULT_ALGORITHM = "tdpo-r"
# of a recommendation; the errors then come about equally from images and from prompts, and Shapes takes a minute or two
IMAGES, MOST_IMAGES = 88, 4096


def _pairs(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if any("=" not in part for part in value.split(",") if part.strip()):
        raise ValueError("expected NAME=VALUE, or several with commas between them")
    return named_values(value)


def _absolute(paths: dict[str, str]) -> dict[str, str]:
    """Absolute paths, so that a run can be resumed from any folder."""
    return {name: str(user_path(path).absolute()) for name, path in paths.items()}


def _normalised_or_none(value: Any) -> int | str | None:
    return None if value is None else normalised(value)


Names = Annotated[list[str], BeforeValidator(split_names)]
Pairs = BeforeValidator(_pairs)  # NAME=VALUE,NAME=VALUE on a command line, a table in TOML


class OutputConfig(Section):
    """What is written to the run folder, and how often."""

    checkpoint_every: Count = Field(default=1, description="epochs between checkpoints")
    keep_checkpoints: Count = Field(default=2, description="latest checkpoints to keep")
    samples_every: Count = Field(default=5, description="epochs between sample grids and LoRA snapshots")
    grid_images: int = Field(default=16, ge=1, le=256, description="images in a sample grid")
    recommend: bool = Field(
        default=False, description="at the end, find the LoRA and the strength to use; see `recommend --help`"
    )
    recommend_images: int = Field(
        default=IMAGES,
        ge=2,
        le=MOST_IMAGES,
        description="images per snapshot and strength that output.recommend draws; fewer are faster and less certain",
    )
    trackers: Names = Field(default=[], description="accelerate trackers, such as tensorboard or wandb")


class TrainConfig(MethodSettings):
    """All settings of a run except its algorithm's own; see `config_class`."""

    algorithm: str = Field(
        default=DEFAULT_ALGORITHM,
        description="training algorithm, which brings values of its own; ddpo-g, the recipe, is the default of the "
        "presets shapes and sd15",
    )
    model: Annotated[str, MAY_CHANGE] = Field(
        default="shapes",
        min_length=1,
        description="'shapes' or 'shapes-flow', a diffusers folder, a hub id or a .safetensors checkpoint",
    )
    prediction_type: Annotated[Literal["epsilon", "v_prediction", "sample"] | None, Unset] = Field(
        default=None, description="what the model predicts, if its own configuration does not say"
    )
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32",
        description="precision of the base model, and of the arithmetic; a LoRA is always fp32. fp16 is for Stable "
        "Diffusion 1.x, 2.x and XL, which it rounds less than bf16 does; other models may overflow in it",
    )
    deterministic: Annotated[bool, MAY_CHANGE] = Field(
        default=False,
        description="repeat a run to the last bit on a GPU too, with the same GPU, software and micro_batch, at some "
        "cost in speed; on the CPU, runs repeat without it",
    )
    compile: Annotated[bool, MAY_CHANGE] = Field(
        default=False,
        description="compile the denoiser's transformer blocks by torch.compile, which needs a compiler and makes the "
        "first epoch slower, and may make the others faster on a GPU; not for algorithms that back-propagate the "
        "reward",
    )
    rewards: dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]] = Field(
        default={"shapes-aesthetic": 1.0}, min_length=1, description="training rewards and their weights"
    )
    eval_rewards: Annotated[Names, MAY_CHANGE] = Field(
        default=[], description="rewards to measure every epoch: held-out rewards, or parts of the training sum"
    )
    guards: Names = Field(
        default=[],
        description="rewards that are not trained on and restrain the training, as guard_penalty and kl.gate say",
    )
    reward_scales: Annotated[dict[str, Positive], Pairs] = Field(
        default={},
        description="divisors of the training rewards, applied before they are weighted and summed, such as the "
        "standard deviations that `score` prints; NAME=NUMBER,...",
    )
    reward_weights: Annotated[
        dict[str, Annotated[str, Field(min_length=1)]], Pairs, AfterValidator(_absolute), MAY_CHANGE
    ] = Field(
        default={},
        description="files or folders to load rewards from instead of the hub, and those of tastes; NAME=PATH,...",
    )
    reward_precision: Literal["fp32", "bf16"] = Field(default="fp32", description="precision of the rewards' encoders")
    prompts: str = Field(
        default="shapes",
        description="prompt set, or a file: text with one prompt a line (# starts a comment), CSV, JSON or JSON lines",
    )
    grid_prompts: Annotated[str | None, Unset] = Field(
        default=None, description="prompts of the sample grids; none means the training prompts"
    )
    seed: int = Field(default=42, ge=0, lt=2**63, description="all random numbers derive from it")
    epochs: Annotated[int, MAY_CHANGE] = Field(
        default=100, ge=1, le=9999, description="rounds of sampling and updating"
    )
    samples_per_epoch: Count = Field(default=256, description="images sampled and scored per epoch")
    samples_per_prompt: Count = Field(
        default=1,
        description="images of each prompt that is drawn in an epoch; must divide samples_per_epoch",
    )
    samples_per_update: Count = Field(
        default=128, description="samples per gradient update; must divide samples_per_epoch"
    )
    micro_batch: Annotated[Count | None, Unset] = Field(
        default=None,
        description="largest number of samples per forward pass, rounded down to a divisor of samples_per_update, with "
        "sdpo to an even one, at least 2; none means as many as fit",
    )
    decode_batch: Count = Field(default=16, description="largest number of images decoded and embedded at once")
    steps: int = Field(default=50, ge=1, le=1000, description="denoising steps T")
    eval_steps: Annotated[int | None, Unset] = Field(
        default=None,
        ge=1,
        le=1000,
        description="denoising steps of sample grids and of what evaluate and recommend draw; none means those of the "
        "training, whose samples held-out rewards are measured on in any case",
    )
    guidance: float = Field(default=5.0, ge=1, le=100, description="classifier-free guidance scale; 1 turns it off")
    eval_guidance: Annotated[float | None, Unset] = Field(
        default=None,
        ge=1,
        le=100,
        description="guidance scale of the same images as eval_steps; none means that of the training. With guidance 1 "
        "and a value above it here, the model is trained without guidance and used with it",
    )
    embedded_guidance: Annotated[float | None, Unset] = Field(
        default=None,
        ge=0,
        le=100,
        description="guidance scale that a model distilled from guidance, such as FLUX.1 dev, is conditioned on, in "
        "training and afterwards; guidance itself is then 1. none means the model's own",
    )
    resolution: Annotated[int | str, BeforeValidator(normalised)] = Field(
        default=512, description="side of the square images in pixels, or WIDTHxHEIGHT, such as 832x1216"
    )
    eval_resolution: Annotated[int | str | None, BeforeValidator(_normalised_or_none), Unset] = Field(
        default=None, description="resolution of the same images as eval_steps; none means that of the training"
    )
    process: Annotated[str | None, Unset] = Field(
        default=None,
        description="process that turns the model's output into a denoising step; few-steps and lcm are for models "
        "distilled to a few steps; flow-ddim, flow-sde and cps for flow matching. The last step of these has no noise, "
        "so policy gradients leave it out. none means the model's own. Choices",
    )
    stop_on_overoptimisation: Annotated[bool, MAY_CHANGE] = Field(
        default=False, description="end the run, saved, once the rule in overoptimisation says that it overoptimises"
    )
    overoptimisation: OveroptimisationSettings = OveroptimisationSettings()
    hang_limit: Annotated[Count, MAY_CHANGE] = Field(
        default=50,
        description="of several processes, seconds that the others wait for one that shows no progress before all end; "
        "with compile at least 1800, as compiling shows none",
    )
    output: Annotated[OutputConfig, MAY_CHANGE] = OutputConfig()

    @property
    def measured(self) -> list[str]:
        """The rewards to measure every epoch: `eval_rewards`, and the one that is watched for overoptimisation."""
        watched = self.overoptimisation.reward
        return list(dict.fromkeys([*self.eval_rewards, *([watched] if watched else [])]))

    @property
    def drawn_with(self) -> dict[str, Any]:
        """Steps, guidance and resolution of sample grids, and of what is drawn to evaluate or recommend."""
        own = {name: getattr(self, f"eval_{name}") for name in ("steps", "guidance", "resolution")}
        return {name: getattr(self, name) if value is None else value for name, value in own.items()}

    @property
    def drawn_with_told(self) -> str:
        """The same for a user, such as "20 steps, guidance 5, 512 px"."""
        drawn = self.drawn_with
        return f"{number_of(drawn['steps'], 'step')}, guidance {drawn['guidance']:g}, {drawn['resolution']} px"

    @property
    def trained_on(self) -> list[str]:
        """The training rewards with a non-zero weight."""
        return [name for name, weight in self.rewards.items() if weight]

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.samples_per_epoch % self.samples_per_update:
            raise ValueError(
                f"samples_per_epoch {self.samples_per_epoch} is not a multiple of samples_per_update "
                f"{self.samples_per_update}; choose a divisor"
            )
        if self.samples_per_epoch % self.samples_per_prompt:
            raise ValueError(
                f"samples_per_epoch {self.samples_per_epoch} is not a multiple of samples_per_prompt "
                f"{self.samples_per_prompt}; choose a divisor"
            )
        self.policy.check_optimizer(self.precision)
        self._check_shard()
        if self.compile and self.needs_gradient:
            raise ValueError(
                f"compile is true, but {self.algorithm} draws with gradients, for numbers of rows that vary, each of "
                "which torch would compile for; set compile to false, or choose another algorithm"
            )
        self.check_samples(self.samples_per_epoch)
        self.check_updates(self.samples_per_update)
        self.check_steps(self.steps)
        self.check_model(self.model)
        self.check_groups(self.samples_per_prompt)
        self.check_guards(self.guards)
        self._check_guard_names()
        if self.process is not None:
            entry(PROCESSES, "process", self.process)
        if len(set(self.eval_rewards)) < len(self.eval_rewards):
            raise ValueError(f"eval_rewards lists a reward twice: {', '.join(self.eval_rewards)}; remove one")
        if len(self.trained_on) == 1 and self.trained_on[0] in self.eval_rewards:
            raise ValueError(
                f"eval_rewards lists {self.trained_on[0]!r}, which is trained on; choose a different held-out reward"
            )
        self.overoptimisation.check(self.trained_on, self.guards, self.stop_on_overoptimisation)
        if not any(self.rewards.values()):
            raise ValueError("the weights of all rewards are 0; give at least one a different weight")
        used = [*self.rewards, *self.measured, *self.guards, *self.further_rewards]
        for name in used:
            check_reward(name)
        if self.needs_gradient:
            check_gradients(self.trained_on, self.algorithm)
        if tastes := [name for name in used if is_taste(name)]:
            self._check_folders(tastes)
            used += reward_names()  # a taste reads through the encoder of one of them, which its folder names
        for name in self.reward_scales.keys() - set(self.rewards):
            raise ValueError(f"reward_scales names {name}, which is not trained on; remove it, or add it to rewards")
        for name in self.reward_weights.keys() - set(used):
            raise ValueError(f"reward_weights names {name}, which is not used; remove it, or use that reward")
        return self

    def _check_shard(self) -> None:
        """Raise ValueError for settings with which the weights cannot be shared out over processes."""
        if not self.policy.shard:
            return
        if self.needs_gradient:
            raise ValueError(
                f"policy.shard is true, but {self.algorithm} back-propagates through several steps at once; choose an "
                "algorithm that does not, or set policy.shard to false"
            )
        choices: dict[str, tuple[Any, list[Any]]] = {
            "policy.train": (self.policy.train, ["full"]),
            "policy.optimizer": (self.policy.optimizer, ["adamw"]),
            "precision": (self.precision, ["fp32", "bf16"]),
            "output.recommend": (self.output.recommend, [False]),
            "compile": (self.compile, [False]),
        }
        if neurons := getattr(self, "neurons", None):
            choices["neurons.policy_reset"] = neurons.policy_reset, ["none"]
            choices["neurons.policy_measure"] = neurons.policy_measure, [False]
        for name, (value, possible) in choices.items():
            if value not in possible:
                got, expected = str(value).lower(), " or ".join(map(str, possible)).lower()
                raise ValueError(
                    f"policy.shard is true, but {name} is {got}; set it to {expected}, or policy.shard to false"
                )

    def _check_folders(self, tastes: list[str]) -> None:
        """Raise ValueError for a taste whose folder is not given."""
        for name in tastes:
            if name not in self.reward_weights:
                raise ValueError(
                    f"got reward {name!r} without its folder; expected where its votes are: reward_weights "
                    f"{name}=FOLDER"
                )

    def _check_guard_names(self) -> None:
        """Raise ValueError for a guard that has another role too: it would not be independent of what it guards.

        Those that only evaluate would not be independent of the run that they are to judge.
        """
        if len(set(self.guards)) < len(self.guards):
            raise ValueError(f"guards lists a reward twice: {', '.join(self.guards)}; remove one")
        roles = {"rewards": self.trained_on, "eval_rewards": self.eval_rewards}
        for role, names in roles.items():
            for name in set(self.guards) & set(names):
                raise ValueError(f"guards lists {name!r}, which is in {role} too; remove it from one of them")
        for name in set(self.guards) & set(ONLY_EVALUATE):
            raise ValueError(
                f"guards lists {name!r}, which may only evaluate what others have restrained; choose another reward "
                "that reads prompts, such as shapes-alignment"
            )


Fields = dict[str, Any]


def validate(values: Fields) -> TrainConfig:
    """A TrainConfig from nested plain values; ValueError, with a one-line message, if they are invalid."""
    check_text(values)
    algorithm = values.get("algorithm", DEFAULT_ALGORITHM)
    paths = {name: values[name] for name in ("model", "prompts", "grid_prompts") if name in values}
    expanded = {name: str(user_path(path)) for name, path in paths.items() if str(path).startswith("~")}
    try:
        return config_class(algorithm).model_validate(with_named_rewards(values) | expanded)
    except ValidationError as error:
        raise ValueError(explain(error.errors(), dict(leaf_fields(algorithm)), algorithms_using)) from error


def config_class(algorithm: str) -> type[TrainConfig]:
    """TrainConfig with the settings of `algorithm`; ValueError if there is no such algorithm."""
    return _config_class(settings_class(algorithm))


@cache
def _config_class(settings: type[MethodSettings]) -> type[TrainConfig]:
    return create_model("TrainConfig", __base__=(settings, TrainConfig))  # type: ignore[arg-type]  # it is a TrainConfig


def leaf_fields(algorithm: str | None = None) -> Iterator[tuple[str, FieldInfo]]:
    """Every setting of `algorithm`, or of all algorithms, as (dotted name, FieldInfo), including those in sections."""
    seen = set()
    for name in [algorithm] if algorithm else ALGORITHMS:
        for field, info in leaves(config_class(name)):
            if field not in seen:
                seen.add(field)
                yield field, info


def algorithms_with(name: str) -> list[str]:
    """The algorithms that have the setting, or the section, of this dotted name."""
    return [
        algorithm
        for algorithm in ALGORITHMS
        if any(known == name or known.startswith(f"{name}.") for known, _ in leaf_fields(algorithm))
    ]


def algorithms_using(name: str) -> list[str]:
    """Those that have it, and do not turn its section off."""
    section, _, _ = name.partition(".")
    return [one for one in algorithms_with(name) if _is_on(ALGORITHMS[one].values.get(section))]


def _is_on(own: Any) -> bool:
    """Whether an algorithm's own values of a section, or its value of a setting, leave it on."""
    return not isinstance(own, dict) or own.get("enabled", True)


def plain_values(config: TrainConfig) -> Fields:
    """The configuration as plain nested values; unset settings are "none"."""
    return _spell_out(config.model_dump(mode="json"))


def _spell_out(values: Fields) -> Fields:
    return {
        name: _spell_out(value) if isinstance(value, dict) else NONE if value is None else value
        for name, value in values.items()
    }
