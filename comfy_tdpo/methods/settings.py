"""The settings of policy-gradient methods; the defaults are the paper's TDPO-R (arXiv 2402.08552)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..settings import Count, MethodSettings, OptimizerSettings, PolicySettings, Positive, Rate, Section, Unset

CriticActivation = Literal["identity", "relu", "leaky_relu"]
NeuronActivation = Literal["relu", "leaky_relu"]
NeuronData = Literal["epoch", "first-step"]
Neurons = Literal["active", "dormant", "all", "none"]


class ClippedPolicySettings(PolicySettings):
    """The LoRA and its update (Eq. 8)."""

    clip_range: Positive = Field(
        default=1e-4,
        description="clip range of the ratio, stated for a latent of 4 x 64 x 64 and scaled to the actual one",
    )
    timestep_order: Literal["shuffled", "denoising"] = Field(
        default="shuffled",
        description="shuffled for each sample (the authors' code), or from noisy to clean (Algorithm 1)",
    )


class CriticSettings(OptimizerSettings):
    """The temporal critic and its update (Eq. 9-10)."""

    enabled: bool = Field(default=True, description="whether there is a critic at all; without one it is DDPO")
    activation: CriticActivation = Field(
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


class NeuronSettings(Section):
    """Resets of neurons (Eq. 11-12)."""

    reset: Neurons = Field(default="active", description="which of the critic's neurons")
    threshold: float = Field(
        default=0.0, ge=0, le=1e3, description="a neuron of the critic whose score is above it is active"
    )
    policy_reset: Neurons = Field(default="none", description="which of the LoRA's neurons")
    policy_measure: bool = Field(
        default=False, description="measure the LoRA's neurons every epoch even where none of them is reset"
    )
    policy_threshold: float = Field(default=0.1, ge=0, le=1e3, description="the same threshold for the LoRA's neurons")
    every: Count = Field(default=10, description="epochs between two resets")
    activation: NeuronActivation = Field(
        default="relu", description="what is taken of a layer's output to score its neurons"
    )
    data: NeuronData = Field(
        default="epoch",
        description="embeddings the critic's neurons are scored on: all of the epoch's, or the noisiest step's",
    )


class KLSettings(Section):
    """The penalty for leaving the base model (Section 5)."""

    coefficient: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="normalised reward per nat of a trajectory; 0: no penalty. (The authors' kl_coef is per nat and "
        "element of a step's latent: theirs times C * H * W is this one)",
    )
    form: Literal["exact", "sampled"] = Field(
        default="exact",
        description="exact: each step's KL is a term of the loss, and that of later steps lowers the returns; sampled: "
        "the log-ratio of each sampled step to the base model is a cost of that step (the paper), which is noisier",
    )
    target: Annotated[Positive | None, Unset] = Field(
        default=None, description="nats per trajectory to steer the coefficient to; none: fixed"
    )
    horizon: Count = Field(default=10_000, description="samples over which the coefficient adapts")


class MomentsSettings(Section):
    """Normalisation of rewards per prompt."""

    buffer_size: Count = Field(default=32, description="latest rewards of a prompt that are remembered")
    min_count: Count = Field(default=16, description="rewards a prompt needs before its own moments are used")


class PolicyGradientSettings(MethodSettings):
    """DDPO, TDPO and TDPO-R."""

    updates: Literal["timestep", "trajectory"] = Field(
        default="timestep",
        description="one gradient update a timestep (TDPO), or one for all steps of a trajectory (DDPO)",
    )
    gamma: Rate = Field(default=1.0, description="discount of the returns")
    advantage_clip: Annotated[Positive | None, Unset] = Field(
        default=None, description="clip of the advantages without a critic; none: none"
    )
    policy: ClippedPolicySettings = ClippedPolicySettings()
    critic: CriticSettings = CriticSettings()
    neurons: NeuronSettings = NeuronSettings()
    kl: KLSettings = KLSettings()
    moments: MomentsSettings = MomentsSettings()

    @model_validator(mode="after")
    def _check_method(self) -> "PolicyGradientSettings":
        if self.moments.min_count > self.moments.buffer_size:
            raise ValueError("moments.min_count is larger than moments.buffer_size; it would never be reached")
        if self.neurons.reset != "none" and not self.critic.enabled:
            raise ValueError("neurons.reset needs a critic; set it to none, or critic.enabled to true")
        if self.kl.target is not None and not self.kl.coefficient:
            raise ValueError("kl.target steers kl.coefficient, which is 0; give it a value to start from")
        if self.advantage_clip is not None and self.critic.enabled:
            raise ValueError("advantage_clip is for algorithms without a critic; set it to none")
        return self

    def check_samples(self, samples_per_epoch: int) -> None:
        if samples_per_epoch < 2:
            raise ValueError("samples_per_epoch is 1; at least 2 are needed to normalise rewards")
        if self.kl.target is not None and self.kl.horizon < samples_per_epoch:
            raise ValueError(
                f"kl.horizon {self.kl.horizon} is less than the {samples_per_epoch} samples of an epoch; the "
                "coefficient would jump; give it several times as many"
            )

    @property
    def further_rewards(self) -> list[str]:
        return [self.critic.encoder] if self.critic.encoder else []
