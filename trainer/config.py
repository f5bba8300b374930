"""One typed, frozen configuration, and how presets, files and flags make it.

Later layers win: the defaults below (the paper's values), the algorithm's row of Table 1, the preset, the preset's own
values for that algorithm, a configuration file, the command line.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from comfy_tdpo.rewards import check_reward
from comfy_tdpo.user_files import user_path

from .config_messages import check_text, explain
from .toml_files import read_toml

Positive = Annotated[float, Field(gt=0, lt=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Rate = Annotated[float, Field(gt=0, le=1)]
Algorithm = Literal["tdpo-r", "tdpo", "ddpo-2", "ddpo-100"]
NeuronActivation = Literal["relu", "leaky_relu"]

PRESETS = Path(__file__).parent / "presets"

# Table 1 of the paper, as overrides of the defaults, which are TDPO-R's.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "tdpo-r": {},
    "tdpo": {"neurons": {"reset": "none"}},
    "ddpo-2": {
        "updates": "trajectory",
        "advantage_clip": 5.0,
        "policy": {"lr": 3e-4},
        "critic": {"enabled": False},
        "neurons": {"reset": "none"},
    },
    "ddpo-100": {"advantage_clip": 5.0, "critic": {"enabled": False}, "neurons": {"reset": "none"}},
}


NONE = "none"  # TOML and a command line have no null


def _unset(value: Any) -> Any:
    return None if value == NONE else value


def _split(value: Any) -> Any:
    parts = value.split(",") if isinstance(value, str) else value
    if parts == [NONE]:
        return []
    return (
        [part.strip() if isinstance(part, str) else part for part in parts if part]
        if isinstance(parts, list)
        else parts
    )


def named_values(text: str) -> dict[str, str]:
    """NAME=VALUE,NAME=VALUE, as a command line has it; a name without a value gets an empty one."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    return {name.strip(): value.strip() for name, _, value in pairs}


def weighted(texts: list[str]) -> dict[str, float]:
    """The rewards that NAME or NAME=WEIGHT name, and their weights."""
    weights: dict[str, float] = {}
    for text in texts:
        name, _, weight = (part.strip() for part in text.partition("="))
        if name in weights:
            raise ValueError(f"got reward {name!r} twice; expected each reward once: NAME=WEIGHT weighs it")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"got reward {text!r}; expected NAME or NAME=WEIGHT with a number") from None
    return weights


def _pairs(value: Any) -> Any:
    return named_values(value) if isinstance(value, str) else value


def _absolute(paths: dict[str, str]) -> dict[str, str]:
    """A run resumes from anywhere."""
    return {name: str(user_path(path).absolute()) for name, path in paths.items()}


Unset = BeforeValidator(_unset)
Names = Annotated[list[str], BeforeValidator(_split)]
Pairs = BeforeValidator(_pairs)  # NAME=VALUE,NAME=VALUE on a command line, a table in TOML


class Section(BaseModel):
    """A group of fields: frozen, and unknown keys fail."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are for switches; give a number or a word")
        return value


class OptimizerConfig(Section):
    """AdamW, and the clipping of its gradients."""

    lr: Rate = Field(default=1e-4, description="learning rate")
    weight_decay: float = Field(default=1e-4, ge=0, le=1, description="AdamW's weight decay")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the second moment")
    eps: Positive = Field(default=1e-8, description="AdamW's epsilon")
    max_grad_norm: Positive = Field(default=1.0, description="gradients are clipped to this norm")


class PolicyConfig(OptimizerConfig):
    """The LoRA on the U-Net and its update (Eq. 8)."""

    clip_range: Positive = Field(
        default=1e-4,
        description="clip range of the ratio, stated for a latent of 4 x 64 x 64 and scaled to the actual one",
    )
    rank: int = Field(default=4, ge=1, le=1024, description="rank of the LoRA")
    alpha: Annotated[Positive | None, Unset] = Field(
        default=None, description="alpha of the LoRA; none: the rank, so that its scale is 1"
    )
    targets: Literal["attention", "attention+feed-forward"] = Field(
        default="attention", description="which projections of the transformer blocks get a LoRA"
    )
    timestep_order: Literal["shuffled", "denoising"] = Field(
        default="shuffled",
        description="shuffled for each sample (the authors' code), or from noisy to clean (Algorithm 1)",
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory for about a third more time")


class CriticConfig(OptimizerConfig):
    """The temporal critic and its update (Eq. 9-10)."""

    enabled: bool = Field(default=True, description="whether there is a critic at all; without one it is DDPO")
    activation: Literal["identity", "relu", "leaky_relu"] = Field(
        default="identity",
        description="between the layers; identity is the authors' code, the others are the paper's words",
    )
    clip_range: Positive = Field(
        default=0.2, description="how far a prediction may move from its old value, in normalised reward"
    )
    encoder: Annotated[str | None, Unset] = Field(
        default=None, description="reward whose image encoder the critic reads; none: the training reward's"
    )
    image_size: Annotated[int | None, Unset] = Field(
        default=None,
        ge=8,
        le=4096,
        description="pixels at which noisy latents are decoded for the critic; none: full size",
    )


class NeuronConfig(Section):
    """Resets of neurons (Eq. 11-12)."""

    reset: Literal["none", "active", "dormant", "all"] = Field(
        default="active", description="which of the critic's neurons"
    )
    threshold: float = Field(
        default=0.0, ge=0, le=1e3, description="a neuron of the critic whose score is above it is active"
    )
    policy_reset: Literal["none", "active", "dormant", "all"] = Field(
        default="none", description="which of the LoRA's neurons"
    )
    policy_measure: bool = Field(
        default=False, description="measure the LoRA's neurons every epoch even where none of them is reset"
    )
    policy_threshold: float = Field(default=0.1, ge=0, le=1e3, description="the same threshold for the LoRA's neurons")
    every: Count = Field(default=10, description="epochs between two resets")
    activation: NeuronActivation = Field(
        default="relu", description="what is taken of a layer's output to score its neurons"
    )
    data: Literal["epoch", "first-step"] = Field(
        default="epoch",
        description="embeddings the critic's neurons are scored on: all of the epoch's, or the noisiest step's",
    )


class KLConfig(Section):
    """The penalty for leaving the base model (Section 5)."""

    coefficient: float = Field(default=0.0, ge=0, le=1e6, description="normalised reward per nat; 0: no penalty")
    target: Annotated[Positive | None, Unset] = Field(
        default=None, description="nats per trajectory to steer the coefficient to; none: fixed"
    )
    horizon: Count = Field(default=10_000, description="samples over which the coefficient adapts")


class MomentsConfig(Section):
    """Normalisation of rewards per prompt."""

    buffer_size: Count = Field(default=32, description="latest rewards of a prompt that are remembered")
    min_count: Count = Field(default=16, description="rewards a prompt needs before its own moments are used")


class OutputConfig(Section):
    """What is written to the run folder, and how often."""

    checkpoint_every: Count = Field(default=1, description="epochs between checkpoints")
    keep_checkpoints: Count = Field(default=2, description="latest checkpoints that are kept")
    samples_every: Count = Field(default=5, description="epochs between sample grids and LoRA snapshots")
    grid_images: int = Field(default=16, ge=1, le=256, description="images in a sample grid")
    trackers: Names = Field(default=[], description="accelerate's trackers, such as tensorboard or wandb")


class TrainConfig(Section):
    """A whole run. The defaults are the paper's TDPO-R."""

    algorithm: Algorithm = Field(default="tdpo-r", description="sets the values of the paper's Table 1")
    model: str = Field(
        default="shapes",
        min_length=1,
        description="'shapes', a diffusers folder, a hub id or a .safetensors checkpoint",
    )
    prediction_type: Annotated[Literal["epsilon", "v_prediction", "sample"] | None, Unset] = Field(
        default=None, description="what the model predicts, where its own configuration does not say"
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of the base model; the LoRA is always fp32")
    rewards: dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]] = Field(
        default={"shapes-aesthetic": 1.0}, min_length=1, description="training rewards and weights"
    )
    eval_rewards: Names = Field(default=[], description="rewards that only watch, or parts of a sum")
    reward_scales: Annotated[dict[str, Positive], Pairs] = Field(
        default={},
        description="what training rewards are divided by before they are weighted and summed, such as their standard "
        "deviations, which `score` prints; NAME=NUMBER,...",
    )
    reward_weights: Annotated[dict[str, Annotated[str, Field(min_length=1)]], Pairs, AfterValidator(_absolute)] = Field(
        default={}, description="files or folders to load rewards from instead of the hub; NAME=PATH,..."
    )
    reward_precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of the rewards' encoders")
    prompts: str = Field(default="shapes", description="prompt set, or a text file with one prompt a line")
    grid_prompts: Annotated[str | None, Unset] = Field(
        default=None, description="prompts of the sample grids; none: the training prompts"
    )
    seed: int = Field(default=42, ge=0, lt=2**63, description="every random number derives from it")
    epochs: int = Field(default=100, ge=1, le=9999, description="rounds of sampling and updating")
    samples_per_epoch: Count = Field(default=256, description="reward queries an epoch")
    samples_per_update: Count = Field(
        default=128, description="samples in one gradient update; divides samples_per_epoch"
    )
    updates: Literal["timestep", "trajectory"] = Field(
        default="timestep",
        description="one gradient update a timestep (TDPO), or one for all steps of a trajectory (DDPO)",
    )
    micro_batch: Annotated[Count | None, Unset] = Field(
        default=None,
        description="most samples in one forward; a divisor of samples_per_update is used. none: what fits",
    )
    decode_batch: Count = Field(default=16, description="images decoded and embedded at once")
    steps: int = Field(default=50, ge=1, le=1000, description="denoising steps T")
    guidance: float = Field(default=5.0, ge=1, le=100, description="classifier-free guidance scale; 1: none")
    resolution: int = Field(default=512, ge=8, le=8192, description="pixels a side of the images")
    gamma: Rate = Field(default=1.0, description="discount of the returns")
    advantage_clip: Annotated[Positive | None, Unset] = Field(
        default=None, description="clip of the advantages without a critic; none: none"
    )
    policy: PolicyConfig = PolicyConfig()
    critic: CriticConfig = CriticConfig()
    neurons: NeuronConfig = NeuronConfig()
    kl: KLConfig = KLConfig()
    moments: MomentsConfig = MomentsConfig()
    output: OutputConfig = OutputConfig()

    @property
    def trained_on(self) -> list[str]:
        """The rewards that count in training."""
        return [name for name, weight in self.rewards.items() if weight]

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.samples_per_epoch % self.samples_per_update:
            raise ValueError(
                f"samples_per_epoch {self.samples_per_epoch} is no multiple of samples_per_update "
                f"{self.samples_per_update}; choose a divisor"
            )
        if self.samples_per_epoch < 2:
            raise ValueError("samples_per_epoch is 1; at least 2 are needed to normalise rewards")
        if self.moments.min_count > self.moments.buffer_size:
            raise ValueError("moments.min_count is larger than moments.buffer_size; it would never be reached")
        if self.neurons.reset != "none" and not self.critic.enabled:
            raise ValueError("neurons.reset needs a critic; set it to none, or critic.enabled to true")
        if self.kl.target is not None and not self.kl.coefficient:
            raise ValueError("kl.target steers kl.coefficient, which is 0; give it a value to start from")
        if self.kl.target is not None and self.kl.horizon < self.samples_per_epoch:
            raise ValueError(
                f"kl.horizon {self.kl.horizon} is less than the {self.samples_per_epoch} samples of an epoch; the "
                "coefficient would jump; give it several times as many"
            )
        if self.advantage_clip is not None and self.critic.enabled:
            raise ValueError("advantage_clip is for algorithms without a critic; set it to none")
        if len(set(self.eval_rewards)) < len(self.eval_rewards):
            raise ValueError(f"eval_rewards lists a reward twice: {', '.join(self.eval_rewards)}; take one out")
        if len(self.trained_on) == 1 and self.trained_on[0] in self.eval_rewards:
            raise ValueError(
                f"eval_rewards lists {self.trained_on[0]!r}, which is trained on; a held-out reward is another one"
            )
        if not any(self.rewards.values()):
            raise ValueError("the weights of all rewards are 0; give at least one another weight")
        encoders = [self.critic.encoder] if self.critic.encoder else []
        used = [*self.rewards, *self.eval_rewards, *encoders]
        for name in used:
            check_reward(name)
        for name in self.reward_scales.keys() - set(self.rewards):
            raise ValueError(f"reward_scales names {name}, which is not trained on; take it out, or add it to rewards")
        for name in self.reward_weights.keys() - set(used):
            raise ValueError(f"reward_weights names {name}, which is not used; take it out, or use it")
        return self


Fields = dict[str, Any]


def presets() -> list[str]:
    """The names of the shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def make_config(preset: str | None = None, file: Path | None = None, overrides: Fields | None = None) -> TrainConfig:
    """The configuration of `preset`, with a TOML `file` and nested `overrides` laid over it.

    Without a preset it is the one made for the model: `shapes` for the embedded world, the paper's for any other. Of a
    preset's held-out rewards those that the layers above train on are left out.

    Raises:
        ValueError: a layer is not what it should be; the message is one line that names the field.
    """
    above = [with_named_rewards(read_toml(file) if file else {}), with_named_rewards(overrides or {})]
    if preset is None:
        preset = "shapes" if _topmost(above, "model", "shapes") == "shapes" else "sd14-aesthetic"
    if preset not in presets():
        raise ValueError(f"got preset {preset!r}; expected one of {', '.join(presets())}")
    base = read_toml(PRESETS / f"{preset}.toml")
    for_algorithm = base.pop("algorithms", {})
    algorithm = _algorithm(*above)
    trained_on = _topmost(above, "rewards", {})
    if isinstance(trained_on, dict):  # whatever else a file holds there is refused below
        base["eval_rewards"] = [name for name in base["eval_rewards"] if name not in trained_on]
    merged: Fields = {}
    for layer in (ALGORITHMS[algorithm], base, for_algorithm.get(algorithm, {}), *above):
        merged = _merge(merged, layer)
    return validate(merged)


def override(config: TrainConfig, changes: Fields) -> TrainConfig:
    """`config` with nested `changes` laid over it."""
    return validate(_merge(plain_values(config), with_named_rewards(changes)))


def with_named_rewards(values: Fields) -> Fields:
    """`values` with a table of rewards where those are a name or a list of names, each of weight 1."""
    rewards = values.get("rewards")
    names = rewards.split(",") if isinstance(rewards, str) else rewards
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return values | {"rewards": weighted(names)}
    return values


def _algorithm(in_file: Fields, overrides: Fields) -> str:
    """Its values lie below those of a file, so a file that is made for another one would mix the two."""
    algorithm = _topmost([in_file, overrides], "algorithm", "tdpo-r")
    if algorithm not in tuple(ALGORITHMS):  # a file may hold a list, which no dictionary looks up
        raise ValueError(f"got algorithm {algorithm!r}; expected one of {', '.join(ALGORITHMS)}")
    if in_file.get("algorithm", algorithm) != algorithm:
        raise ValueError(
            f"got algorithm {algorithm!r} over a file made for {in_file['algorithm']!r}, whose values would stay; "
            "expected the same: take the algorithm and what belongs to it out of the file"
        )
    return algorithm


def _topmost(layers: list[Fields], name: str, default: Any) -> Any:
    return next((layer[name] for layer in reversed(layers) if name in layer), default)


def validate(values: Fields) -> TrainConfig:
    """A TrainConfig from nested plain values; ValueError is one line."""
    check_text(values)
    paths = {name: values[name] for name in ("model", "prompts", "grid_prompts") if name in values}
    expanded = {name: str(user_path(path)) for name, path in paths.items() if str(path).startswith("~")}
    try:
        return TrainConfig.model_validate(with_named_rewards(values) | expanded)
    except ValidationError as error:
        raise ValueError(explain(error.errors(), dict(leaf_fields()))) from error


def _merge(base: Fields, over: Fields) -> Fields:
    """`over` laid over `base`; tables merge but for `rewards`, which is one value."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "rewards"
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def leaf_fields(section: type[Section] = TrainConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, pydantic's FieldInfo), sections opened."""
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from leaf_fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def plain_values(config: TrainConfig) -> Fields:
    """The configuration as plain nested values; what is unset is "none"."""
    return _spell_out(config.model_dump(mode="json"))


def _spell_out(values: Fields) -> Fields:
    return {
        name: _spell_out(value) if isinstance(value, dict) else NONE if value is None else value
        for name, value in values.items()
    }
