"""The settings of the policy-gradient methods (arXiv 2402.08552, Algorithm 1)."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..rewards import has_encoder
from ..settings import MethodSettings, Positive, Rate, Unset
from .decoder import check_decoder, decoder_file
from .encoder import encoder_of
from .sections import ClippedPolicySettings, CriticSettings, KLSettings, MomentsSettings, NeuronSettings


class PolicyGradientSettings(MethodSettings):
    """DDPO, TDPO, TDPO-R, GRPO and DPOK."""

    updates: Literal["timestep", "trajectory"] = Field(
        default="timestep",
        description="one update per step (timestep, as in TDPO), or one for all steps of a trajectory (DDPO)",
    )
    gamma: Rate = Field(default=1.0, description="discount factor of the returns")
    advantage_clip: Annotated[Positive | None, Unset] = Field(
        default=None,
        description="clip advantages to plus or minus this value (only without a critic); none turns clipping off",
    )
    favour_diversity: bool = Field(
        default=False,
        description="multiply positive advantages by how different an image is from the others of its prompt in the "
        "epoch (GARDO); needs samples_per_prompt above 1 and a training reward with an image encoder",
    )
    guard_penalty: float = Field(
        default=1.0,
        ge=0,
        le=1e3,
        description="what a sample loses, in normalised reward, for each standard deviation by which a guard scores it "
        "below the level that its prompt had before training; for a prompt without a level, below the mean",
    )
    guard_images: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="images generated per prompt before training, from which the guards' levels are measured, at most "
        "four epochs' worth in all; standard deviations are then those within a prompt. With 0, or too many prompts "
        "for two images each, the first epoch's scores set the levels, and standard deviations are those of all scores",
    )
    guard_adaptation: float = Field(
        default=0.0,
        ge=0,
        le=1e3,
        description="how much a prompt's penalty grows after each epoch for each standard deviation by which its "
        "images are below its level on average, and shrinks if they are above it; it stays between a third of "
        "guard_penalty and four times guard_penalty. 0 keeps it fixed. Needs guard_images",
    )
    guard_slack: float = Field(
        default=0.0,
        ge=0,
        le=1e3,
        description="with guard_adaptation, standard deviations by which a guard may be below its level",
    )
    guard_credit: bool = Field(
        default=False,
        description="whether a guard's score above that level also counts, in favour of the sample, as much as a score "
        "below it counts against it",
    )
    policy: ClippedPolicySettings = ClippedPolicySettings()
    critic: CriticSettings = CriticSettings()
    neurons: NeuronSettings = NeuronSettings()
    kl: KLSettings = KLSettings()
    moments: MomentsSettings = MomentsSettings()

    @model_validator(mode="after")
    def _check_method(self) -> "PolicyGradientSettings":
        self.moments.check()
        if self.critic.encoder and not has_encoder(self.critic.encoder):
            raise ValueError(
                f"critic.encoder is {self.critic.encoder!r}, which has no image encoder; set it to a reward that has "
                "one, or to none"
            )
        self.critic.check_reading()
        if self.critic.architecture == "dpok" and not self.critic.step:
            raise ValueError(
                "critic.architecture dpok has weights for each step, but critic.step is false; set it to true"
            )
        if self.neurons.reset != "none" and not self.critic.enabled:
            raise ValueError("neurons.reset needs a critic; set it to none, or set critic.enabled to true")
        if self.critic.scores and (self.critic.reads != "clean" or not self.critic.history):
            raise ValueError(
                f"critic.scores needs a critic that reads clean images and learns from critic.history, but "
                f"critic.reads is {self.critic.reads} and critic.history is {self.critic.history}; set them to clean "
                "and 4, or critic.scores to false"
            )
        if self.kl.target is not None and not self.kl.coefficient:
            raise ValueError(
                "kl.target adapts kl.coefficient, which is 0; set kl.coefficient to a starting value above 0"
            )
        for name in ("reset_above", "reset_every", "gate"):
            if getattr(self.kl, name) and not self.kl.coefficient:
                raise ValueError(f"kl.{name} needs a KL penalty, but kl.coefficient is 0; set kl.coefficient above 0")
        if self.policy.trains_all and self.policy.replay and (self.kl.reset_above or self.kl.reset_every):
            raise ValueError(
                "policy.replay keeps what the KL's reference says of earlier samples if policy.train is full, and a "
                "reset of the reference would make that wrong; set policy.replay to 0, or kl.reset_above and "
                "kl.reset_every to none"
            )
        if self.kl.target is not None and (self.kl.reset_above or math.inf) <= self.kl.target:
            raise ValueError(
                f"kl.reset_above {self.kl.reset_above:g} is not above kl.target {self.kl.target:g}, so the target "
                "would never be held; raise it, or set one of them to none"
            )
        if self.advantage_clip is not None and self.critic.enabled:
            raise ValueError("advantage_clip is for algorithms without a critic; set it to none")
        return self

    def check_groups(self, samples_per_prompt: int) -> None:
        wanting = {
            "moments.baseline group": self.moments.baseline == "group",
            "favour_diversity": self.favour_diversity,
        }
        for name, on in wanting.items():
            if on and samples_per_prompt < 2:
                raise ValueError(
                    f"{name} compares the images of one prompt, but samples_per_prompt is 1; set it to 2 or more"
                )

    def check_guards(self, guards: list[str]) -> None:
        if self.guard_images == 1:
            raise ValueError("guard_images is 1, too few to tell prompts apart; set it to 2 or more, or to 0")
        if self.guard_adaptation and not self.guard_images:
            raise ValueError(
                "guard_adaptation needs a level for each prompt, but guard_images is 0; set guard_images to 8 or so"
            )
        if self.guard_slack and not self.guard_adaptation:
            raise ValueError("guard_slack is for guard_adaptation, which is 0; set one of them to another value")
        for name in ("guard_images", "guard_adaptation"):
            if getattr(self, name) and not (guards and self.guard_penalty):
                raise ValueError(
                    f"{name} is for the penalty of guards, but there is none; add a guard and set guard_penalty above "
                    f"0, or set {name} to 0"
                )
        if guards and not self.guard_penalty and not self.kl.gate:
            raise ValueError(
                f"guards lists {', '.join(guards)}, but nothing uses them: set guard_penalty above 0 or kl.gate to "
                "true, or list them in eval_rewards to measure them only"
            )
        if guards and self.guard_penalty and self.moments.in_raw_units:
            raise ValueError(
                "moments.group_std none leaves rewards in their own units, but guard_penalty is in normalised reward; "
                "set moments.group_std to batch or group, or train without guards"
            )
        if self.kl.gate and not guards:
            raise ValueError("kl.gate compares the training reward with guards, but guards is empty; add a guard")

    def check_samples(self, samples_per_epoch: int) -> None:
        if samples_per_epoch < 2:
            raise ValueError("samples_per_epoch is 1; at least 2 are needed to normalise rewards")
        by_samples = self.kl.target is not None and self.kl.controller == "ziegler"
        if by_samples and self.kl.horizon < samples_per_epoch:
            raise ValueError(
                f"kl.horizon {self.kl.horizon} is less than the {samples_per_epoch} samples of an epoch, so the "
                "coefficient would jump; set it to several times as many"
            )

    def check_steps(self, steps: int) -> None:
        self.policy.check_steps(steps)

    def check_model(self, model: str) -> None:
        check_decoder(self.critic, model)

    @property
    def further_rewards(self) -> list[str]:
        return [encoder_of(self)] if self.critic.sees_images or self.critic.encoder else []

    @property
    def further_decoder(self) -> Path | None:
        return decoder_file(self.critic)
