"""What configurations are made of: frozen sections of typed fields, each with a line of meaning and unit.

Light, since `--help` reads it. A method declares its own settings with this, the trainer the common ones.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

Positive = Annotated[float, Field(gt=0, lt=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Rate = Annotated[float, Field(gt=0, le=1)]

NONE = "none"  # TOML and a command line have no null


def _unset(value: Any) -> Any:
    return None if value == NONE else value


Unset = BeforeValidator(_unset)


class MayChange:
    """Marks a setting that a run may change when it resumes, as in `Annotated[int, MAY_CHANGE]`."""


MAY_CHANGE = MayChange()


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


class OptimizerSettings(Section):
    """AdamW, and the clipping of its gradients."""

    lr: Rate = Field(default=1e-4, description="learning rate")
    weight_decay: float = Field(default=1e-4, ge=0, le=1, description="AdamW's weight decay")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the second moment")
    eps: Positive = Field(default=1e-8, description="AdamW's epsilon")
    max_grad_norm: Positive = Field(default=1.0, description="gradients are clipped to this norm")


class PolicySettings(OptimizerSettings):
    """What is trained of the model, and its optimizer."""

    rank: int = Field(default=4, ge=1, le=1024, description="rank of the LoRA")
    alpha: Annotated[Positive | None, Unset] = Field(
        default=None, description="alpha of the LoRA; none: the rank, so that its scale is 1"
    )
    targets: Literal["attention", "attention+feed-forward"] = Field(
        default="attention", description="which projections of the transformer blocks get a LoRA"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory for about a third more time")


class MethodSettings(Section):
    """What every method's settings have; its own are a subclass, whose fields are laid over the trainer's.

    A method that samples or trains in another way refines `policy`.
    """

    policy: PolicySettings = PolicySettings()

    def check_samples(self, samples_per_epoch: int) -> None:
        """Raise ValueError where the method cannot work with that many samples an epoch."""

    @property
    def further_rewards(self) -> list[str]:
        """The names of rewards that the method reads beside those that train and watch."""
        return []


def section_of(info: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or None where it holds a value."""
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting of `section` as (dotted name, FieldInfo): first its own, then those of the sections in it."""
    yield from ((f"{prefix}{name}", info) for name, info in section.model_fields.items() if not section_of(info))
    for name, info in section.model_fields.items():
        if inner := section_of(info):
            yield from leaves(inner, f"{prefix}{name}.")
