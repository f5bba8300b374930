"""The settings of the policy-gradient methods; the defaults are those of the paper's TDPO-R (arXiv 2402.08552)."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from ..settings import Count, OptimizerSettings, PolicySettings, Positive, Rate, Section, Unset
from ..user_files import user_path
from .decoder import FULL, TINY

if TYPE_CHECKING:
    from ..reference import Reference

CriticArchitecture = Literal["authors", "standardised", "dpok"]
CriticActivation = Literal["identity", "relu", "leaky_relu"]
PolicyObjective = Literal["clip", "step-normalised", "trust-region"]
NeuronActivation = Literal["relu", "leaky_relu"]
NeuronData = Literal["epoch", "first-step", "batch"]
Neurons = Literal["active", "dormant", "all", "none"]


def _named_or_absolute(decoder: str) -> str:
    """An absolute path, so that a run can be resumed from any folder, or one of the names."""
    return decoder if decoder in (FULL, TINY) else str(user_path(decoder).absolute())


class SteppedPolicySettings(PolicySettings):
    """What is trained and its updates, each on some of the denoising steps."""

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
        "trains; they are chosen at random for each epoch",
    )

    def bounds(self, steps: int) -> range:
        """The positions, out of `steps`, from train_from to train_until."""
        return range(round(self.train_from * steps), round(self.train_until * steps))

    def check_steps(self, steps: int) -> None:
        """Raise ValueError if none of `steps` would be trained."""
        if not self.bounds(steps):
            raise ValueError(
                f"policy.train_from {self.train_from:g} and policy.train_until {self.train_until:g} leave none of "
                f"the {steps} steps to train; expected at least one step between them: move them apart"
            )


class ClippedPolicySettings(SteppedPolicySettings):
    """What is trained and its update (Eq. 8)."""

    objective: PolicyObjective = Field(
        default="clip",
        description="what keeps an update close to the policy that sampled: clipping the probability ratio (clip, the "
        "paper); clipping a ratio in which every step counts alike whatever its noise (step-normalised); or ignoring "
        "steps that have moved further than policy.trust_region (trust-region)",
    )
    trust_region: Positive = Field(
        default=0.16,
        description="with objective trust-region, the KL in nats by which a step may move from the policy that sampled",
    )
    replay: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="latest earlier epochs whose samples are kept and trained on again, beside the new ones, so that a "
        "reset of the policy's neurons forgets less; 0 keeps none. 256 samples of 50 steps at 512 pixels take 0.9 GB "
        "of memory, and as much in each checkpoint",
    )
    replay_share: Rate = Field(
        default=0.5, description="with policy.replay, replayed samples in an update for each new one"
    )


class CriticSettings(OptimizerSettings):
    """The temporal critic and its update (Eq. 9-10)."""

    enabled: bool = Field(default=True, description="train a temporal critic; without one, the algorithm is DDPO")
    reads: Literal["noisy", "clean", "latent"] = Field(
        default="noisy",
        description="what the critic sees at each step: the decoded noisy latent (the paper), the decoded clean "
        "latent that the model predicts from it, or the noisy latent itself, without an encoder (latent, DPOK)",
    )
    prompt: bool = Field(default=False, description="whether the critic also reads the prompt")
    step: bool = Field(default=False, description="whether the critic also reads the step")
    scores: bool = Field(
        default=False,
        description="whether the critic also reads how the training reward and the guards score what it sees, which "
        "evaluates them once more for each trained step and the one after; needs critic.reads clean and critic.history",
    )
    architecture: CriticArchitecture = Field(
        default="authors",
        description="five layers that start near zero (the authors' code), or two layers of 256 neurons on "
        "standardised inputs, with larger initial weights (standardised), which learn from fewer samples, or three "
        "layers of 256 neurons, whose output is multiplied by a vector learned for each step (dpok); needs critic.step",
    )
    activation: CriticActivation = Field(
        default="identity",
        description="activation between the critic's layers; identity is in the authors' code, the others in the paper",
    )
    clip_range: Annotated[Positive | None, Unset] = Field(
        default=0.2,
        description="how far updates may move the critic's prediction from its old value, in normalised reward; none "
        "turns clipping off",
    )
    encoder: Annotated[str | None, Unset] = Field(
        default=None,
        description="reward whose image encoder the critic uses; none means the training reward's or, if it has none, "
        "that of a guard or of a small reward",
    )
    image_size: Annotated[int | None, Unset] = Field(
        default=None,
        ge=8,
        le=4096,
        description="side in pixels at which latents are decoded for the critic; none means full size. Without effect "
        "with critic.reads latent",
    )
    decoder: Annotated[str, Field(min_length=1), AfterValidator(_named_or_absolute)] = Field(
        default=FULL,
        description="what decodes the latents that the critic sees: the model's own decoder (full), the small one that "
        "ships for Shapes (tiny), or a small one for the model's latents in this file, such as "
        "taesd_decoder.safetensors. Images that rewards score are always decoded in full",
    )
    read_every: Count = Field(
        default=1,
        description="of how many steps the critic sees one, besides the last; the others get embeddings by "
        "critic.between, and nothing of them is decoded",
    )
    between: Literal["held", "interpolated"] = Field(
        default="held",
        description="with critic.read_every, the embedding of a step that the critic does not see: that of the one "
        "before that it sees (held), or interpolated between the steps around it, of which the later one also knows "
        "the noise of the steps between, so that the critic may credit them less for it",
    )
    history: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="latest epochs to train the critic on, at the end of each epoch; 0 trains it along with the policy "
        "on the same samples (the paper)",
    )
    passes: Count = Field(default=2, description="times that critic.history is gone through at the end of an epoch")
    batch: Count = Field(default=96, description="pairs of a sample and a step in each update on critic.history")
    gae_lambda: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="lambda of generalised advantage estimation: 1 compares the reward with the critic's prediction "
        "(the paper), 0 each prediction with the next; lower values have less variance and more bias",
    )

    @property
    def sees_images(self) -> bool:
        """Whether there is a critic that sees decoded images."""
        return self.enabled and self.reads != "latent"

    def check_reading(self) -> None:
        """Raise ValueError if settings of what it sees contradict each other."""
        images = {"encoder": None, "decoder": FULL, "read_every": 1}
        for name, default in images.items():
            value = getattr(self, name)
            if self.reads == "latent" and value != default:
                unset = "none" if default is None else default
                raise ValueError(
                    f"critic.{name} is {value!r}, but critic.reads is latent, and such a critic sees no images; set "
                    f"critic.{name} to {unset}, or critic.reads to noisy or clean"
                )
        if self.scores and self.read_every > 1:
            raise ValueError(
                f"critic.scores needs the scores of every step, but critic.read_every is {self.read_every}; set it to "
                "1, or critic.scores to false"
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
    policy_reset: Neurons = Field(
        default="none",
        description="which of the policy's neurons are reset: those of the LoRA's rank, which start anew, or with "
        "policy.train full those of feed-forward layers, which get the base model's weights again. Choices",
    )
    policy_measure: bool = Field(
        default=False, description="measure the policy's neurons every epoch, even if none of them are reset"
    )
    policy_threshold: float = Field(
        default=0.1,
        ge=0,
        le=1e3,
        description="a neuron of the policy counts as active if its mean activation, relative to its layer's mean, is "
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
    """The KL penalty, which keeps the policy near a reference, at first the base model (Section 5)."""

    coefficient: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="weight of the KL penalty, in normalised reward per nat of a trajectory; 0 turns it off. (Per nat "
        "averaged over the C * H * W elements of a latent, it is C * H * W times as large: so divide a weight for such "
        "an average, such as the authors' kl_penalty_coef * init_kl_coef, by C * H * W)",
    )
    form: Literal["exact", "sampled", "loss"] = Field(
        default="exact",
        description="how the KL penalty is applied. With exact, each step's KL is added to the loss, and the KL of "
        "later steps lowers the returns. With sampled, as in the paper, the log-ratio of each sample to the base model "
        "lowers the reward of its step, which is noisier. With loss, as in DPOK, each step's KL is added to the loss, "
        "and the returns are the rewards alone. Choices",
    )
    weighting: Annotated[Literal["uniform", "sigma", "noise"] | None, Unset] = Field(
        default=None,
        description="what each step's own KL counts for in the loss: the same at all steps (uniform); in proportion to "
        "the step's noise (sigma), as the policy's gradient does with policy.objective step-normalised; or as much as "
        "the mean squared difference of the predicted noises, of which kl.coefficient is then the weight (noise, "
        "DPOK). none chooses what goes with the objective. Choices",
    )
    target: Annotated[Positive | None, Unset] = Field(
        default=None,
        description="KL to aim for, in nats per trajectory, by adapting kl.coefficient; none keeps the coefficient "
        "fixed",
    )
    horizon: Count = Field(
        default=10_000,
        description="with kl.controller ziegler, samples over which kl.coefficient may change by a factor of about 1.2",
    )
    controller: Literal["ziegler", "proportional-integral"] = Field(
        default="ziegler",
        description="how kl.coefficient adapts to kl.target: slowly, over kl.horizon samples (ziegler), or within "
        "about ten epochs, whatever their samples (proportional-integral)",
    )
    reset_above: Annotated[Positive | None, Unset] = Field(
        default=None,
        description="KL, in nats per trajectory, above which the policy of that epoch becomes the reference, so that "
        "the KL starts again at 0; none means never. (A threshold for a KL averaged over elements and steps, as in "
        "GARDO, is C * H * W * steps times smaller)",
    )
    reset_every: Annotated[Count | None, Unset] = Field(
        default=None, description="epochs after which the policy becomes the reference; none means never"
    )
    gate: bool = Field(
        default=False,
        description="restrain only the samples that the training reward ranks furthest above the guards' ranking "
        "(GARDO); needs guards",
    )
    gate_share: Rate = Field(
        default=0.1, description="largest share of an epoch's samples that kl.gate restrains, at first; it adapts"
    )
    gate_window: Count = Field(
        default=20,
        description="epochs with which kl.gate compares the disagreement of reward and guards: above all of them, its "
        "share grows by a tenth, and below all of them it shrinks by a tenth",
    )

    def measures_afterwards(self, reference: "Reference") -> bool:
        """Whether the KL is measured once an epoch is sampled, since swapping the `reference` in for each step would
        copy all weights of the network."""
        return self.coefficient > 0 and reference.costly


class HistorySettings(Section):
    """Normalisation of rewards by the latest of their prompt."""

    buffer_size: Count = Field(
        default=32, description="how many of a prompt's latest rewards are used to normalise its rewards"
    )
    min_count: Count = Field(
        default=16,
        description="rewards a prompt needs before they are normalised by its own mean and std instead of the batch's",
    )

    def check(self) -> None:
        """Raise ValueError if they contradict each other."""
        if self.min_count > self.buffer_size:
            raise ValueError(
                "moments.min_count is larger than moments.buffer_size, so it would never be reached; lower it"
            )


class MomentsSettings(HistorySettings):
    """What rewards are normalised by."""

    baseline: Literal["history", "group", "epoch"] = Field(
        default="history",
        description="what a reward is compared with: the latest rewards of its prompt (history), the mean of the "
        "other images of its prompt in the same epoch (group), which needs samples_per_prompt above 1, or the mean of "
        "the epoch (epoch), which leaves the differences between prompts to the critic",
    )
    group_std: Literal["batch", "group", "none"] = Field(
        default="batch",
        description="with moments.baseline group, the standard deviation that rewards are divided by: that of all the "
        "epoch's rewards (batch), of the prompt's images alone (group), or none, with which kl.coefficient is in the "
        "reward's own units",
    )

    @property
    def in_raw_units(self) -> bool:
        """Whether rewards are not divided by a standard deviation."""
        return self.baseline == "group" and self.group_std == "none"
