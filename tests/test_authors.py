"""The authors' own functions as golden values: what their code gave on fixed tensors, against ours.

The files golden/tdpo_*.json hold numbers alone, inputs and outputs, and name the repository, its commit and the
functions that ran. Where we deviate on purpose a test says so:

- overlap: theirs counts the masks' elements and is always 100 %; ours follows Eq. 12;
- redraws: theirs set the same seed before every reset, so that each one gives the same weights; ours are fresh;
- Adam's moments: theirs are found by position, so that an optimizer in another order loses those of other neurons;
- policy/approx_kl: theirs is the estimator k3, ours k2, which agree to the third order of the log-ratio;
- the clip fraction: theirs counts the samples that clipping made worse, ours all that lie outside the range.

Theirs: float32 on a CPU; normalised rewards in float32, returns in float64.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comfy_tdpo.methods.advantages import RewardMoments, returns, temporal_rewards
from comfy_tdpo.methods.critic import TemporalCritic
from comfy_tdpo.methods.kl_control import KLCoefficient
from comfy_tdpo.methods.neurons import (
    ActivationRecorder,
    HiddenLayer,
    active_masks,
    critic_layers,
    dormant_percent,
    lora_layers,
    overlap_percent,
    reset_masks,
    reset_neurons,
)
from comfy_tdpo.methods.objectives import approximate_kl, critic_loss, outside, policy_loss
from comfy_tdpo.process.ddim import make_ddim
from comfy_tdpo.process.gaussian import log_prob
from comfy_tdpo.randomness import generator_at

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # short sums in another order


def golden(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "golden" / f"tdpo_{name}.json").read_text())


NEURONS, LOSSES, REWARDS, CRITIC, STEP = (golden(name) for name in ("neurons", "losses", "rewards", "critic", "step"))


# --- neurons


class Recycled:
    """The network of a golden case, its hidden layers, and AdamW with the case's moments."""

    def __init__(self, linears: list[nn.Linear], layers: dict[str, HiddenLayer], case: dict[str, Any]):
        self.linears, self.layers = linears, layers
        self.parameters = [parameter for linear in linears for parameter in linear.parameters()]
        with torch.no_grad():
            for parameter, values in zip(self.parameters, case["weights"].values(), strict=True):
                parameter.copy_(torch.tensor(values))
        self.optimizer = torch.optim.AdamW([self.parameters[i] for i in case.get("order", range(len(self.parameters)))])
        for parameter, (first, second) in zip(self.parameters, case["moments"], strict=True):
            self.optimizer.state[parameter] = {"exp_avg": torch.tensor(first), "exp_avg_sq": torch.tensor(second)}
        self.before = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def scores(self, inputs: list) -> dict[str, Tensor]:
        x = torch.tensor(inputs)
        with ActivationRecorder(self.layers) as recorder:
            for linear in self.linears:
                x = linear(x)
        return recorder.scores()

    def reset(self, active: dict[str, Tensor]) -> None:
        reset_neurons(self.layers, reset_masks(active, "active"), self.optimizer, torch.Generator().manual_seed(0))

    def moments(self) -> list[list[Tensor]]:
        return [[self.optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq")] for p in self.parameters]


def recycled_mlp(case: dict[str, Any]) -> Recycled:
    sizes = case["sizes"]
    linears = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    std = 1 / (sizes[0] + 1)
    pairs = zip(linears[:-1], linears[1:], strict=True)
    return Recycled(linears, {str(i): HiddenLayer(a, b, std, std) for i, (a, b) in enumerate(pairs)}, case)


def recycled_lora(case: dict[str, Any]) -> Recycled:
    linears = []
    for values in case["weights"].values():
        width, inputs = torch.tensor(values).shape
        linears.append(nn.Linear(inputs, width, bias=False))
    layers = {name: HiddenLayer(*linears[2 * i : 2 * i + 2], 1 / 4, 0.0) for i, name in enumerate("ab")}
    return Recycled(linears, layers, case)


def assert_dormant(active: dict[str, Tensor], theirs: list[list[int]]) -> None:
    assert [(~mask).int().tolist() for mask in active.values()] == theirs


def assert_reset_as_theirs(network: Recycled, case: dict[str, Any]) -> None:
    """The same entries are redrawn, which must be other numbers, and the same moments are forgotten."""
    weights = [torch.tensor(values) for values in case["weights_after_reset"].values()]
    for ours, theirs, before in zip(network.parameters, weights, network.before, strict=True):
        assert torch.equal(ours != before, theirs != before)
        assert torch.equal(ours == 0, theirs == 0), "biases, and a LoRA's B"
    for ours, theirs in zip(network.moments(), case["moments_after_reset"], strict=True):
        assert [moment.tolist() for moment in ours] == [torch.tensor(moment).tolist() for moment in theirs]


def test_the_critics_neurons_are_scored_masked_and_reset_as_theirs():
    case = NEURONS["critic"]
    network = recycled_mlp(case)
    scores = network.scores(case["inputs"][0])
    for ours, theirs in zip(scores.values(), case["scores_first"], strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs), **FLOAT32)
    active = active_masks(scores, case["threshold"])
    assert_dormant(active, case["dormant"][0])
    assert sum(map(len, active.values())) == case["total"] == 12
    assert dormant_percent(active) == pytest.approx(case["dormant_percent"][0], rel=1e-6)  # float32
    assert dormant_percent(active_masks(scores, 0.0)) == case["dormant_percent_at_0"] == 0
    active = active_masks(network.scores(case["inputs"][1]), case["threshold"])
    assert_dormant(active, case["dormant"][1])
    network.reset(active)
    assert_reset_as_theirs(network, case)


def test_a_loras_neurons_are_scored_masked_and_reset_as_theirs():
    case = NEURONS["lora"]
    network = recycled_lora(case)
    scores = network.scores(case["inputs"])
    for ours, theirs in zip(scores.values(), case["scores"], strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs), **FLOAT32)
    active = active_masks(scores, case["threshold"])
    assert_dormant(active, case["dormant"])
    assert dormant_percent(active) == pytest.approx(case["dormant_percent"], rel=1e-6)
    network.reset(active)
    assert_reset_as_theirs(network, case)


def test_deviation_overlap_is_of_the_dormant_sets():
    """Dormant in both epochs: one neuron; in the smaller set: three. Theirs: 0 % at first, 100 % ever after."""
    case = NEURONS["critic"]
    before, now = ({str(i): ~torch.tensor(mask).bool() for i, mask in enumerate(masks)} for masks in case["dormant"])
    assert overlap_percent(now, before) == pytest.approx(100 / 3)
    assert case["overlap_percent"] == [0.0, 100.0]


def test_deviation_every_reset_draws_other_weights():
    case, resets = NEURONS["same_seed"], []
    assert case["weights_after_first"] == case["weights_after_second"]
    network = recycled_mlp(NEURONS["critic"])
    everything = {name: torch.ones(layer.incoming.out_features).bool() for name, layer in network.layers.items()}
    for epoch in (1, 2):
        draw = generator_at(case["seed"], "neurons", epoch)
        reset_neurons(network.layers, everything, network.optimizer, draw)
        resets.append([linear.weight.detach().clone() for linear in network.linears])
    for once, twice in zip(*resets, strict=True):
        assert (once != twice).all()


def test_deviation_moments_belong_to_their_parameter_and_not_to_its_position():
    case = NEURONS["optimizer_in_another_order"]
    network = recycled_mlp(case)
    active = active_masks(network.scores(case["inputs"]), case["threshold"])
    assert_dormant(active, case["dormant"])
    network.reset(active)
    first, _, second, *_ = [moment == 0 for moment, _ in network.moments()]
    assert first[active["0"]].all() and not first[~active["0"]].any(), "the rows of the reset neurons"
    assert second[:, active["0"]].all(), "the columns that read them"
    theirs = [torch.tensor(moments[0]) == 0 for moments in case["moments_after_reset"]]
    assert not torch.equal(theirs[0], first)


def test_redraws_have_their_scale(make_policy):
    """Theirs are measured, on 786432 and on 64000 draws: relative errors of 1/sqrt(2 n), 0.08 % and 0.28 %."""
    std = NEURONS["redraw_std"]
    layer = critic_layers(TemporalCritic(768))["layers.0"]
    assert layer.incoming_std == layer.outgoing_std == pytest.approx(std["linear_768"], rel=0.004)
    (of_lora,) = {layer.incoming_std for layer in lora_layers(make_policy(rank=16).model.network).values()}
    assert of_lora == pytest.approx(std["lora_rank_16"], rel=0.014)


# --- the critic


def chirp(count: int, rate: float, power: float, phase: float = 0.0) -> Tensor:
    """Numbers that look random and need no file, float64."""
    return torch.sin(rate * torch.arange(count, dtype=torch.float64) ** power + phase)


@pytest.mark.parametrize("reward", ["aesthetic", "hpsv2"])
def test_the_critic_is_theirs(reward):
    case = CRITIC[reward]
    width = case["embed_dim"]
    critic = TemporalCritic(width)
    assert critic.stds[0] == pytest.approx(case["init_std"][0], rel=0.004)  # of 800 thousand draws
    assert critic.stds[0] == pytest.approx(case["init_std"][1], rel=0.01)  # of 131 thousand
    assert case["largest_initial_bias"] == 0 == max(layer.bias.abs().max() for layer in critic.layers)
    assert [share for share in critic.dropout if share] == case["dropout"]
    with torch.no_grad():
        for i, parameter in enumerate(critic.parameters()):
            fan_in = critic.layers[i // 2].in_features
            values = 1.5 / fan_in**0.5 * chirp(parameter.numel(), 0.7, 1.1, i)
            parameter.copy_(values.reshape(parameter.shape))
        embeds = chirp(6 * width, 0.9, 1.3).reshape(6, width)
        embeds = (6 * embeds / embeds.norm(dim=1, keepdim=True)).float()
        with ActivationRecorder(critic_layers(critic)) as recorder:
            residuals = critic(embeds)
    # float32 through five layers, sums of up to 1024 terms of either sign
    torch.testing.assert_close(residuals, torch.tensor(case["residuals"]), rtol=1e-4, atol=1e-5)
    for threshold, count in ((0.0, case["dormant"]), (0.25, case["dormant_at_0.25"])):
        active = active_masks(recorder.scores(), threshold)
        assert sum(map(len, active.values())) == case["neurons"]
        assert sum(int((~mask).sum()) for mask in active.values()) == count


# --- the denoising step


@pytest.mark.parametrize("case", STEP["cases"], ids=["50 steps", "20 steps"])
def test_the_step_and_its_log_probability_are_theirs(case, make_scheduler):
    """Epsilon prediction and eta 1, at the first step, in the middle, and at the last."""
    shape = STEP["shape"]
    count, positions = math.prod(shape), torch.tensor(case["positions"])
    output, latents = ((1.5 * chirp(count, r, p)).reshape(shape).float() for r, p in ((0.7, 1.1), (0.9, 1.3)))
    process = make_ddim(make_scheduler(), case["steps"])
    assert process.times[positions].tolist() == case["timesteps"]
    step = process.step(output, latents, positions)
    torch.testing.assert_close(step.mean.flatten(), torch.tensor(case["mean"]), **FLOAT32)
    torch.testing.assert_close(step.std.flatten(), torch.tensor(case["std"]), **FLOAT32)
    following = torch.tensor(case["next_latents"]).reshape(shape)
    expected = torch.tensor(case["log_prob"])
    # z = (x - mean) / sigma carries the mean's rounding, of 2e-7, over a sigma of 0.02 at the last step
    torch.testing.assert_close(log_prob(following, step.mean, step.std), expected, rtol=0, atol=1e-5)
    other = process.step(output + 0.1 * chirp(count, 0.5, 1.4).reshape(shape).float(), latents, positions)
    expected = torch.tensor(case["log_prob_of_other_output"])
    torch.testing.assert_close(log_prob(following, other.mean, other.std), expected, rtol=0, atol=1e-5)


# --- losses


@pytest.mark.parametrize("case", LOSSES["cases"], ids=["wide clip", "their clip", "no critic clip"])
def test_the_losses_and_their_gradients_are_theirs(case):
    inputs = {name: torch.tensor(values) for name, values in case["inputs"].items()}
    expected = {name: torch.tensor(values) for name, values in case["outputs"].items()}
    log_probs, residuals = inputs["log_probs"].requires_grad_(), inputs["residuals"].requires_grad_()
    ratio = (log_probs - inputs["old_log_probs"]).exp()
    policy = policy_loss(ratio, inputs["temporal_rewards"], case["clip_range"]).mean()
    clip = case["clip_range_critic"] or float("inf")  # theirs: 0 is no clip
    critic = critic_loss(residuals, inputs["old_residuals"], inputs["returns"], clip).mean()
    (policy + critic).backward()
    torch.testing.assert_close(policy, expected["pg_loss"], **FLOAT32)
    torch.testing.assert_close(critic, expected["cf_loss"], **FLOAT32)
    torch.testing.assert_close(log_probs.grad, expected["grad_log_probs"], **FLOAT32)
    torch.testing.assert_close(residuals.grad, expected["grad_residuals"], **FLOAT32)


@pytest.mark.parametrize("case", LOSSES["cases"], ids=["wide clip", "their clip", "no critic clip"])
def test_deviation_what_is_told_of_an_update(case):
    inputs = {name: torch.tensor(values) for name, values in case["inputs"].items()}
    log_ratio = inputs["log_probs"] - inputs["old_log_probs"]
    third_order = log_ratio.abs().pow(3).mean().item() / 6
    rounding = 2e-8  # theirs is a difference of float32 numbers near 1
    theirs = case["outputs"]["approx_kl"]
    assert approximate_kl(log_ratio).item() == pytest.approx(theirs, abs=1.2 * third_order + rounding)
    ratio, clip = log_ratio.exp(), case["clip_range"]
    clipped = ratio.clamp(1 - clip, 1 + clip)
    worse = -inputs["temporal_rewards"] * clipped > -inputs["temporal_rewards"] * ratio
    assert worse.float().mean().item() == pytest.approx(case["outputs"]["pg_clipfrac"])
    assert torch.equal(outside(ratio, clip), (ratio < 1 - clip) | (ratio > 1 + clip))
    assert outside(ratio, clip).float().mean().item() > case["outputs"]["pg_clipfrac"]


# --- rewards


def test_rewards_are_normalised_by_prompt_as_theirs():
    case = REWARDS["moments"]
    moments = RewardMoments(case["buffer_size"], case["min_count"])
    for batch in case["batches"]:
        rewards = torch.tensor(batch["rewards"])
        ours = moments.add([str(prompt) for prompt in batch["prompts"]], rewards)(rewards)
        # theirs takes means of float32 rewards of about 5 and divides their differences by standard deviations
        torch.testing.assert_close(ours, torch.tensor(batch["normalised"]), rtol=1e-5, atol=1e-5)
    kept = {prompt: pytest.approx(buffer) for prompt, buffer in case["buffers"].items()}
    assert moments.state_dict() == kept


@pytest.mark.parametrize("case", REWARDS["returns"], ids=["plain", "discounted with KL", "KL"])
def test_returns_and_temporal_rewards_are_theirs(case):
    log_ratio = torch.tensor(case["log_probs"]) - torch.tensor(case["reference_log_probs"])
    ours = returns(torch.tensor(case["rewards"]), case["kl_coefficient"] * log_ratio, case["gamma"])
    torch.testing.assert_close(ours, torch.tensor(case["returns"]), **FLOAT32)
    advantages, _ = temporal_rewards(ours, torch.tensor(case["residuals"]))
    torch.testing.assert_close(advantages, torch.tensor(case["temporal_rewards"]), **FLOAT32)


def test_the_kl_coefficient_adapts_as_theirs():
    case = REWARDS["kl_controller"]
    coefficient = KLCoefficient(case["value"], case["target"], case["horizon"])
    for kl, samples, expected in case["updates"]:
        coefficient.update(kl, samples)
        assert coefficient.value == pytest.approx(expected, rel=1e-8)  # the file's nine digits
