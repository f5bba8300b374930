"""The settings of the policy-gradient methods; the defaults are those of the paper's TDPO-R (arXiv 2402.08552)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..settings import Count, MethodSettings, OptimizerSettings, PolicySettings, Positive, Rate, Section, Unset

CriticActivation = Literal["identity", "relu", "leaky_relu"]
NeuronActivation = Literal["relu", "leaky_relu"]
NeuronData = Literal["epoch", "first-step", "batch"]
Neurons = Literal["active", "dormant", "all", "none"]


class ClippedPolicySettings(PolicySettings):
    """The LoRA and its update (Eq. 8)."""

    clip_range: Positive = Field(
        default=1e-4,
        description="clip range of the policy ratio for a latent of 4 x 64 x 64, scaled to the actual latent size",
    )
    timestep_order: Literal["shuffled", "denoising"] = Field(
        default="shuffled",
        description="order of the steps in an epoch's updates, either shuffled for each sample (the authors' code) "
        "or from noisy to clean (Algorithm 1)",
    )
    train_from: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="fraction of the denoising steps, from noisy to clean, before which none are trained; rounded to "
        "whole steps",
    )
    train_until: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="fraction of the denoising steps after which none are trained; rounded to whole steps. Steps that "
        "are not trained are sampled like the others",
    )
    train_share: Rate = Field(
        default=1.0,
        description="fraction of the steps from policy.train_from to policy.train_until, at least one, that each epoch "
        "trains; they are drawn anew for each epoch",
    )

    def bounds(self, steps: int) -> range:
        """The positions, out of `steps`, from train_from to train_until."""
        return range(round(self.train_from * steps), round(self.train_until * steps))


class CriticSettings(OptimizerSettings):
    """The temporal critic and its update (Eq. 9-10)."""

    enabled: bool = Field(default=True, description="train a temporal critic; without one, the algorithm is DDPO")
    activation: CriticActivation = Field(
        default="identity",
        description="activation between the critic's layers; identity is in the authors' code, the others in the paper",
    )
    clip_range: Positive = Field(
        default=0.2,
        description="how far updates may move the critic's prediction from its old value, in normalised reward",
    )
    encoder: Annotated[str | None, Unset] = Field(
        default=None, description="reward whose image encoder the critic uses; none means the training reward's"
    )
    image_size: Annotated[int | None, Unset] = Field(
        default=None,
        ge=8,
        le=4096,
        description="side in pixels at which noisy latents are decoded for the critic; none means full size",
    )


class NeuronSettings(Section):
    """Resets of neurons (Eq. 11-12)."""

    reset: Neurons = Field(default="active", description="which of the critic's neurons are reset")
    threshold: float = Field(
        default=0.0,
        ge=0,
        le=1e3,
        description="a neuron of the critic counts as active if its mean activation, relative to its layer's mean, is "
        "above this",
    )
    policy_reset: Neurons = Field(default="none", description="which of the LoRA's neurons are reset")
    policy_measure: bool = Field(
        default=False, description="measure the LoRA's neurons every epoch, even if none of them are reset"
    )
    policy_threshold: float = Field(
        default=0.1,
        ge=0,
        le=1e3,
        description="a neuron of the LoRA counts as active if its mean activation, relative to its layer's mean, is "
        "above this",
    )
    every: Count = Field(default=10, description="epochs between resets of neurons")
    activation: NeuronActivation = Field(
        default="relu", description="function applied to a layer's output before its neurons are measured"
    )
    data: NeuronData = Field(
        default="epoch",
        description="embeddings on which the critic's neurons are measured: all of an epoch's, only those of its "
        "noisiest step, or those of one batch, a quarter of the samples, each at the step it was last trained on (the "
        "authors' code)",
    )


class KLSettings(Section):
    """The KL penalty, which keeps the policy near the base model (Section 5)."""

    coefficient: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="weight of the KL penalty, in normalised reward per nat of a trajectory; 0 turns it off. (The "
        "authors' weight, kl_penalty_coef * init_kl_coef, is for a log-ratio averaged over the C * H * W elements of a "
        "latent; divide it by C * H * W to get this value)",
    )
    form: Literal["exact", "sampled"] = Field(
        default="exact",
        description="how the KL penalty is applied. With exact, each step's KL is added to the loss, and the KL of "
        "later steps lowers the returns. With sampled, as in the paper, the log-ratio of each sample to the base model "
        "lowers the reward of its step, which is noisier. Choices",
    )
    target: Annotated[Positive | None, Unset] = Field(
        default=None,
        description="KL to aim for, in nats per trajectory, by adapting kl.coefficient; none keeps the coefficient "
        "fixed",
    )
    horizon: Count = Field(
        default=10_000,
        description="samples over which kl.coefficient may change by a factor of about 1.2 when kl.target is set",
    )


class MomentsSettings(Section):
    """Per-prompt normalisation of rewards."""

    buffer_size: Count = Field(
        default=32, description="how many of a prompt's latest rewards are used to normalise its rewards"
    )
    min_count: Count = Field(
        default=16,
        description="rewards a prompt needs before they are normalised by its own mean and std instead of the batch's",
    )


class PolicyGradientSettings(MethodSettings):
    """DDPO, TDPO and TDPO-R."""

    updates: Literal["timestep", "trajectory"] = Field(
        default="timestep",
        description="one update per step (timestep, as in TDPO), or one for all steps of a trajectory (DDPO)",
    )
    gamma: Rate = Field(default=1.0, description="discount factor of the returns")
    advantage_clip: Annotated[Positive | None, Unset] = Field(
        default=None,
        description="clip advantages to plus or minus this value (only without a critic); none turns clipping off",
    )
    policy: ClippedPolicySettings = ClippedPolicySettings()
    critic: CriticSettings = CriticSettings()
    neurons: NeuronSettings = NeuronSettings()
    kl: KLSettings = KLSettings()
    moments: MomentsSettings = MomentsSettings()

    @model_validator(mode="after")
    def _check_method(self) -> "PolicyGradientSettings":
        if self.moments.min_count > self.moments.buffer_size:
            raise ValueError(
                "moments.min_count is larger than moments.buffer_size, so it would never be reached; lower it"
            )
        if self.neurons.reset != "none" and not self.critic.enabled:
            raise ValueError("neurons.reset needs a critic; set it to none, or set critic.enabled to true")
        if self.kl.target is not None and not self.kl.coefficient:
            raise ValueError(
                "kl.target adapts kl.coefficient, which is 0; set kl.coefficient to a starting value above 0"
            )
        if self.advantage_clip is not None and self.critic.enabled:
            raise ValueError("advantage_clip is for algorithms without a critic; set it to none")
        return self

    def check_samples(self, samples_per_epoch: int) -> None:
        if samples_per_epoch < 2:
            raise ValueError("samples_per_epoch is 1; at least 2 are needed to normalise rewards")
        if self.kl.target is not None and self.kl.horizon < samples_per_epoch:
            raise ValueError(
                f"kl.horizon {self.kl.horizon} is less than the {samples_per_epoch} samples of an epoch, so the "
                "coefficient would jump; set it to several times as many"
            )

    def check_steps(self, steps: int) -> None:
        policy = self.policy
        if not policy.bounds(steps):
            raise ValueError(
                f"policy.train_from {policy.train_from:g} and policy.train_until {policy.train_until:g} leave none of "
                f"the {steps} steps to train; expected at least one step between them: move them apart"
            )

    @property
    def further_rewards(self) -> list[str]:
        return [self.critic.encoder] if self.critic.encoder else []
