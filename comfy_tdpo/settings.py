"""Building blocks of configurations: frozen sections of typed fields, each with a description and its unit.

Cheap to import, because `--help` needs it. Each method declares its own settings with these, and the trainer declares
the common ones.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

Positive = Annotated[float, Field(gt=0, lt=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Rate = Annotated[float, Field(gt=0, le=1)]

NONE = "none"  # neither TOML nor the command line has a null


def _unset(value: Any) -> Any:
    return None if value == NONE else value


Unset = BeforeValidator(_unset)


class MayChange:
    """Marks a setting that may change when a run resumes, as in `Annotated[int, MAY_CHANGE]`."""


MAY_CHANGE = MayChange()


class Section(BaseModel):
    """A frozen group of fields that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would accept true as 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are for switches; give a number or a word")
        return value


class OptimizerSettings(Section):
    """AdamW and gradient clipping."""

    lr: Rate = Field(default=1e-4, description="learning rate")
    weight_decay: float = Field(default=1e-4, ge=0, le=1, description="AdamW's weight decay")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's beta1, the decay rate of the first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's beta2, the decay rate of the second moment")
    eps: Positive = Field(default=1e-8, description="AdamW's epsilon")
    max_grad_norm: Positive = Field(
        default=1.0, description="maximum gradient norm; larger gradients are scaled down to it"
    )


class PolicySettings(OptimizerSettings):
    """The trained part of the model, and its optimizer."""

    train: Literal["lora", "full"] = Field(
        default="lora",
        description="what is trained: a LoRA, or every weight of the denoiser (full), which takes far more memory and "
        "disk, and to which rank, alpha and targets do not apply. Choices",
    )
    rank: int = Field(default=4, ge=1, le=1024, description="rank of the LoRA")
    alpha: Annotated[Positive | None, Unset] = Field(
        default=None,
        description="alpha of the LoRA, whose output is scaled by alpha / rank; none sets alpha to the rank",
    )
    targets: Literal["attention", "attention+feed-forward"] = Field(
        default="attention", description="projections of the transformer blocks that get a LoRA"
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute activations in the backward pass, which saves memory and takes about a third longer; a "
        "GPU on which one sample does not fit without it turns it on by itself",
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="decay rate of a moving average of the trained weights, updated after each gradient update, such "
        "as 0.9. Sample grids and snapshots are then of the average; training images are of the weights themselves. 0 "
        "turns it off. With policy.train full, the average takes 4 bytes of the device's memory for each weight",
    )
    optimizer: Literal["adamw", "adamw-8bit"] = Field(
        default="adamw",
        description="with policy.train full, 16 bytes of memory for each weight (adamw), in float32 throughout, or 6 "
        "(adamw-8bit): weights in bf16, rounded at random so that small steps count on average, and AdamW's moments in "
        "8 bits; needs precision bf16. Choices",
    )
    shard: Annotated[bool, MAY_CHANGE] = Field(
        default=False,
        description="with policy.train full and several processes, share out weights, gradients and moments over the "
        "processes, for a model that does not fit on one GPU; gathers the weights of one block at a time. See "
        "docs/many-gpus.md",
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="how the learning rate changes over the run's updates after the warm-up: not at all, or falling "
        "to almost 0 along a line or half a cosine. If epochs is raised when the run resumes, the remaining updates "
        "follow the schedule of the longer run. Choices",
    )
    warmup_updates: int = Field(
        default=0,
        ge=0,
        le=10_000_000,
        description="first updates of the run, over which the learning rate rises in equal steps to policy.lr",
    )

    @property
    def trains_all(self) -> bool:
        return self.train == "full"

    def check_optimizer(self, precision: str) -> None:
        """Raise ValueError if the optimizer does not go with what is trained or with the model's precision."""
        if self.optimizer == "adamw-8bit" and (self.train, precision) != ("full", "bf16"):
            raise ValueError(
                f"policy.optimizer adamw-8bit keeps the weights of the whole model in bf16, but policy.train is "
                f"{self.train} and precision is {precision}; set them to full and bf16, or policy.optimizer to adamw"
            )


class OveroptimisationSettings(Section):
    """The rule that says when a run overoptimises; trainer/overoptimisation.py applies it."""

    reward: Annotated[str | None, Unset, MAY_CHANGE] = Field(
        default=None,
        description="held-out reward to watch, which is measured every epoch: a run overoptimises if this reward falls "
        "while the training reward rises; none watches none",
    )
    window: int = Field(
        default=2,
        ge=1,
        le=50,
        description="latest epochs whose mean is compared with the means of earlier stretches; a tenth of the epochs "
        "so far, if that is more",
    )
    standard_errors: Positive = Field(
        default=3.5,
        description="standard errors that the held-out reward must have fallen by; with lower values a "
        "run is said to overoptimise earlier, and more often by chance",
    )
    fall: float = Field(
        default=0.1,
        ge=0,
        lt=1e6,
        description="standard deviations of the first epoch that the held-out reward must have fallen by",
    )

    def check(self, trained_on: list[str], guards: list[str], stop: bool) -> None:
        """Raise ValueError if the reward is one of `trained_on` or of `guards`, or missing from a run that is to
        `stop`."""
        if self.reward in trained_on:
            raise ValueError(
                f"overoptimisation.reward is {self.reward!r}, which is trained on; choose a different held-out reward, "
                "or none"
            )
        if self.reward in guards:
            raise ValueError(
                f"overoptimisation.reward is {self.reward!r}, which is a guard and so not independent; choose a "
                "different held-out reward, or none"
            )
        if stop and self.reward is None:
            raise ValueError(
                "stop_on_overoptimisation is true, but no reward is watched; set overoptimisation.reward to a held-out "
                "reward"
            )


class MethodSettings(Section):
    """The settings that every method has. A method subclasses this, and its fields are added to the trainer's.

    A method whose policy needs further settings overrides `policy`.

    needs_gradient: whether it back-propagates the training reward.
    rows_together: of which its micro-batches are multiples, such as 2 for pairs.
    """

    needs_gradient: ClassVar[bool] = False
    rows_together: ClassVar[int] = 1

    policy: PolicySettings = PolicySettings()

    def check_samples(self, samples_per_epoch: int) -> None:
        """Raise ValueError if the method cannot work with that many samples per epoch."""

    def check_steps(self, steps: int) -> None:
        """Raise ValueError if the method cannot work with that many denoising steps."""

    def check_updates(self, samples_per_update: int) -> None:
        """Raise ValueError if the method cannot work with that many samples per update."""

    def check_model(self, model: str) -> None:
        """Raise ValueError if the method cannot work with the model of this name."""

    def check_groups(self, samples_per_prompt: int) -> None:
        """Raise ValueError if the method cannot work with that many samples of each prompt."""

    def check_guards(self, guards: list[str]) -> None:
        """Raise ValueError if the method cannot work with these guards; most methods know none."""
        if guards:
            raise ValueError(
                f"guards lists {', '.join(guards)}, but this algorithm uses no guards; list them in eval_rewards to "
                "measure them, or choose another algorithm"
            )

    @property
    def queries_per_sample(self) -> int:
        """How many images the training reward scores for the updates, for each sample of an epoch."""
        return 1

    @property
    def further_rewards(self) -> list[str]:
        """Names of rewards that the method needs in addition to the training and held-out rewards."""
        return []

    @property
    def further_decoder(self) -> Path | None:
        """The file of a decoder that the method needs in addition to the model's own."""
        return None


def section_of(info: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or None if it holds a value."""
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting of `section` as (dotted name, FieldInfo): first its own, then those of the sections in it."""
    yield from ((f"{prefix}{name}", info) for name, info in section.model_fields.items() if not section_of(info))
    for name, info in section.model_fields.items():
        if inner := section_of(info):
            yield from leaves(inner, f"{prefix}{name}.")
