"""The settings of the methods that back-propagate the reward: AlignProp, DRaFT and ReFL."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ...settings import Count, MethodSettings, Positive, Rate, Section, Unset

Truncation = Literal["normal", "uniform", "fixed"]


def _number_or_auto(value: Any) -> Any:
    """One message where pydantic would have one for each type."""
    try:
        return value if value in ("auto", None) else float(value)
    except (TypeError, ValueError):
        raise ValueError("expected a number, auto or none") from None


class RecomputeSettings(Section):
    """Gradient checkpointing: what the backward pass computes again instead of keeping it in memory."""

    steps: bool = Field(
        default=False,
        description="keep only the latents of each step with gradient, and call the model again in the backward pass; "
        "policy.gradient_checkpointing then also keeps less within that call",
    )
    decoder: bool = Field(
        default=False, description="compute the activations of the image decoder's blocks again in the backward pass"
    )
    reward: bool = Field(
        default=False, description="compute the activations of the reward's blocks again in the backward pass"
    )


class DirectSettings(MethodSettings):
    """What they have in common."""

    needs_gradient: ClassVar[bool] = True

    loss_weight: Positive = Field(
        default=1.0,
        description="what the loss is multiplied by; with AdamW, only gradient clipping and epsilon notice it",
    )
    recompute: RecomputeSettings = RecomputeSettings()


class TruncationSettings(Section):
    """Where AlignProp's gradient begins: at a step that is drawn for each sample."""

    first: Truncation = Field(
        default="normal",
        description="how the first step with gradient is drawn: from a normal distribution (the authors' code), "
        "uniformly from all steps (their paper), or not at all (fixed)",
    )
    mean: Rate = Field(
        default=0.84, description="with truncation.first normal, its mean as a fraction of the steps: 42 of 50"
    )
    std: Rate = Field(
        default=0.1, description="with truncation.first normal, its standard deviation as a fraction of the steps"
    )
    last_steps: Count = Field(
        default=1, description="with truncation.first fixed, how many steps, the last ones, have a gradient"
    )


class AlignPropSettings(DirectSettings):
    """AlignProp (arXiv 2310.03739)."""

    reward_target: Annotated[float | None, Unset] = Field(
        default=None,
        description="reward to aim for, in the reward's units: the loss is the distance from it (the authors take 10 "
        "for aesthetic); none means as high as possible",
    )
    truncation: TruncationSettings = TruncationSettings()

    def check_steps(self, steps: int) -> None:
        if self.truncation.first == "fixed":
            check_last_steps("truncation.last_steps", self.truncation.last_steps, steps)
        elif self.truncation.first == "normal" and steps < 2:
            raise ValueError(
                "truncation.first normal leaves the first step out, but there is only one; set steps to 2 or more, or "
                "truncation.first to fixed"
            )


class DraftSettings(DirectSettings):
    """DRaFT-K and DRaFT-LV (arXiv 2309.17400)."""

    last_steps: Count = Field(default=1, description="K of DRaFT-K: how many steps, the last ones, have a gradient")
    renoised: int = Field(
        default=0,
        ge=0,
        le=64,
        description="n of DRaFT-LV: how often each finished latent is noised again for its last step, which alone has "
        "a gradient; 2 in the paper. 0 is DRaFT-K",
    )

    def check_steps(self, steps: int) -> None:
        check_last_steps("last_steps", self.last_steps, steps)
        if self.renoised and self.last_steps > 1:
            raise ValueError(
                f"renoised {self.renoised} repeats the last step alone, but last_steps is {self.last_steps}; set "
                "last_steps to 1, or renoised to 0"
            )

    @property
    def queries_per_sample(self) -> int:
        return self.renoised or 1


class ReflSettings(DirectSettings):
    """ReFL (arXiv 2304.05977)."""

    earliest: float = Field(
        default=0.75,
        ge=0,
        lt=1,
        description="fraction of the steps before which the step with gradient is not drawn; rounded to whole steps",
    )
    reward_cap: Annotated[float | Literal["auto"] | None, Unset, BeforeValidator(_number_or_auto)] = Field(
        default="auto",
        description="reward above which an image has no gradient, in the reward's units; auto is 2 for imagereward, "
        "whose units are standard deviations, and none for any other reward",
    )


def check_last_steps(name: str, last: int, steps: int) -> None:
    """Raise ValueError if the setting `name` asks for more steps than there are."""
    if last > steps:
        raise ValueError(f"{name} is {last}, but steps is {steps}; set it to {steps} or less")
