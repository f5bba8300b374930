"""The settings of SDPO (arXiv 2411.11727)."""

from pydantic import Field, model_validator

from ..settings import Count, MethodSettings, Rate
from .sections import HistorySettings, SteppedPolicySettings


class SDPOSettings(MethodSettings):
    """SDPO; the defaults are the authors'."""

    rows_together = 2

    samples_per_prompt: Count = Field(
        default=2, description="images of each prompt that is drawn in an epoch; they are compared in pairs"
    )
    gamma: Rate = Field(default=0.99, description="discount factor of the returns")
    policy: SteppedPolicySettings = SteppedPolicySettings()
    moments: HistorySettings = HistorySettings()

    @model_validator(mode="after")
    def _check_moments(self) -> "SDPOSettings":
        self.moments.check()
        return self

    def check_groups(self, samples_per_prompt: int) -> None:
        if samples_per_prompt % 2:
            raise ValueError(
                f"samples_per_prompt is {samples_per_prompt}, but sdpo compares two images of one prompt; set it to 2"
            )

    def check_updates(self, samples_per_update: int) -> None:
        if samples_per_update % 2:
            raise ValueError(
                f"samples_per_update is {samples_per_update}, but sdpo trains on pairs of samples; set it to an even "
                "number"
            )

    def check_steps(self, steps: int) -> None:
        if steps < 3:
            raise ValueError(
                f"steps is {steps}, but sdpo scores the first step, the last and one between them; set it to 3 or more"
            )
        self.policy.check_steps(steps)

    @property
    def queries_per_sample(self) -> int:
        return 3
