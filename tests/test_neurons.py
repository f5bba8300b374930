"""Neurons: scores against brute force, and resets that touch what they should and not one bit more."""

import numpy as np
import pytest
import torch
from torch import nn
from toy import new_run, toy_training

from comfy_tdpo.methods.critic import TemporalCritic
from comfy_tdpo.methods.neurons import (
    ActivationRecorder,
    HiddenLayer,
    active_masks,
    critic_layers,
    dormant_percent,
    lora_layers,
    overlap_percent,
    policy_layers,
    reset_masks,
    reset_neurons,
)

EMBED_DIM = 24


def make_critic(activation: str = "identity") -> TemporalCritic:
    """A critic of weights and biases that are all unlike, and not near zero."""
    critic, generator = TemporalCritic(EMBED_DIM, activation), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return critic


def trained_adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW after two steps, in reversed order of `parameters`, so that a look-up by position finds the wrong state."""
    optimizer, generator = torch.optim.AdamW(reversed(parameters), lr=1e-3), torch.Generator().manual_seed(2)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = 1 + torch.rand(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


def snapshot(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    """Per parameter its weights, moments and step."""
    return [
        {"weight": p.detach().clone(), **{name: value.clone() for name, value in optimizer.state[p].items()}}
        for p in parameters
    ]


def random_masks(layers: dict[str, HiddenLayer]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(layer.incoming.out_features, generator=generator) < 0.4 for n, layer in layers.items()}


def assert_reset_exactly(touched: torch.Tensor, before: dict, after: dict, *, std: float) -> None:
    """`touched` entries were redrawn at `std`, their moments forgotten, and all others kept every bit."""
    assert torch.equal(after["step"], before["step"])
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert torch.equal(after[name][~touched], before[name][~touched])
    for name in ("exp_avg", "exp_avg_sq"):
        assert (before[name] != 0).all() and (after[name][touched] == 0).all()
    drawn = after["weight"][touched]
    if len(drawn):
        assert (drawn != before["weight"][touched]).all()
        # five standard errors, 1 / sqrt(2 n) each, of a standard deviation from n draws; one of 0 is exact
        assert drawn.square().mean().sqrt().item() == pytest.approx(std, rel=5 / (2 * len(drawn)) ** 0.5)


# --- resets


@pytest.mark.parametrize("reset", ["none", "active", "dormant", "all"])
def test_a_reset_of_the_critic_touches_exactly_its_neurons(reset):
    critic = make_critic()
    layers, parameters = critic_layers(critic), list(critic.parameters())
    optimizer, active = trained_adamw(parameters), random_masks(layers)
    before = snapshot(parameters, optimizer)
    count = reset_neurons(layers, reset_masks(active, reset), optimizer, torch.Generator().manual_seed(0))
    after = snapshot(parameters, optimizer)

    chosen = {
        "none": lambda mask: mask & ~mask,
        "active": lambda mask: mask,
        "dormant": lambda mask: ~mask,
        "all": lambda mask: mask | ~mask,
    }[reset]
    neurons = [torch.zeros(EMBED_DIM, dtype=torch.bool), *(chosen(m) for m in active.values()), torch.zeros(1).bool()]
    assert [len(mask) for mask in neurons] == [EMBED_DIM, 1024, 128, 64, 16, 1]
    assert count == sum(int(mask.sum()) for mask in neurons)
    for i, (inputs, outputs) in enumerate(zip(neurons, neurons[1:], strict=False)):
        weights = outputs[:, None] | inputs[None, :]  # rows of the neurons it feeds, columns of those it reads
        assert_reset_exactly(weights, before[2 * i], after[2 * i], std=1 / (EMBED_DIM + 1))
        assert_reset_exactly(outputs, before[2 * i + 1], after[2 * i + 1], std=0)


@pytest.mark.parametrize("reset", ["none", "active", "dormant", "all"])
def test_a_reset_of_the_lora_touches_exactly_its_neurons(make_policy, reset):
    policy = make_policy(trained=True, rank=8)
    layers = lora_layers(policy.model.network)
    assert len(layers) == len(policy.parameters) / 2 == 32  # 4 transformer blocks, 2 attentions, 4 projections
    optimizer, active = trained_adamw(policy.parameters), random_masks(layers)
    masks = reset_masks(active, reset)
    downs, ups = ([getattr(layer, side).weight for layer in layers.values()] for side in ("incoming", "outgoing"))
    before = snapshot(downs, optimizer), snapshot(ups, optimizer)
    base = {name: p.clone() for name, p in policy.model.network.named_parameters() if not p.requires_grad}
    count = reset_neurons(layers, masks, optimizer, torch.Generator().manual_seed(0))
    after = snapshot(downs, optimizer), snapshot(ups, optimizer)
    assert count == sum(int(mask.sum()) for mask in masks.values())
    for i, mask in enumerate(masks.values()):
        rows, columns = mask[:, None].expand_as(downs[i]), mask[None, :].expand_as(ups[i])
        assert_reset_exactly(rows, before[0][i], after[0][i], std=1 / 8)
        assert_reset_exactly(columns, before[1][i], after[1][i], std=0)
    assert all(torch.equal(p, base[name]) for name, p in policy.model.network.named_parameters() if name in base)


def test_a_policy_whose_neurons_are_all_reset_is_the_base_model(make_policy, generator):
    policy = make_policy(trained=True)
    layers, embeds = lora_layers(policy.model.network), policy.encode_prompts(["a red circle"])
    masks = reset_masks(random_masks(layers), "all")
    reset_neurons(layers, masks, torch.optim.AdamW(policy.parameters), generator)  # no Adam state yet: none is needed
    latents, position = torch.randn(1, *policy.latent_shape, generator=generator), torch.tensor([1])
    with torch.no_grad():
        got = policy.step(latents, position, embeds).mean
        with policy.reference():
            expected = policy.step(latents, position, embeds).mean
    assert torch.equal(got, expected)


def test_every_reset_draws_fresh_numbers():
    def weights_after(*seeds: int) -> torch.Tensor:
        critic = make_critic()
        layers, optimizer = critic_layers(critic), trained_adamw(list(critic.parameters()))
        for seed in seeds:
            masks = reset_masks(random_masks(layers), "all")
            reset_neurons(layers, masks, optimizer, torch.Generator().manual_seed(seed))
        return torch.cat([layer.weight.detach().flatten() for layer in critic.layers])

    assert torch.equal(weights_after(5), weights_after(5))
    assert (weights_after(5) != weights_after(6)).float().mean() > 0.999  # float32 draws may coincide
    assert torch.equal(weights_after(5, 6), weights_after(6)), "what was there before must not matter"


# --- scores


def brute_force_scores(outputs: list[np.ndarray], slope: float) -> np.ndarray:
    """Eq. 11 in float64 from a layer's outputs (..., H), all rows of all forwards alike."""
    rows = np.concatenate([output.reshape(-1, output.shape[-1]).astype(np.float64) for output in outputs])
    means = np.abs(np.where(rows > 0, rows, slope * rows)).mean(0)
    return means / (means.mean() + 1e-9)


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.01)])
def test_recorded_scores_over_several_forwards(generator, activation, slope):
    first, second, third = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 1)
    layers = {"first": HiddenLayer(first, second, 1.0, 1.0), "second": HiddenLayer(second, third, 1.0, 1.0)}
    inputs = [torch.randn(*shape, 6, generator=generator) for shape in ((7,), (2, 3), (1,))]  # unlike numbers of rows
    with ActivationRecorder(layers, activation) as recorder:
        for x in inputs:
            third(second(first(x)))
    first(torch.full((1, 6), 1e6))  # after the block: does not count
    outputs = [first(x).detach() for x in inputs]
    expected = {
        "first": brute_force_scores([x.numpy() for x in outputs], slope),
        "second": brute_force_scores([second(x).detach().numpy() for x in outputs], slope),
    }
    scores = recorder.scores()
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        np.testing.assert_allclose(score.numpy(), expected[name], rtol=1e-5, atol=1e-7)  # float32 sums of 14 rows


@pytest.mark.parametrize("critic_activation", ["identity", "relu"])
def test_critic_scores(generator, critic_activation):
    critic, x = make_critic(critic_activation), torch.randn(40, EMBED_DIM, generator=generator)
    with ActivationRecorder(critic_layers(critic)) as recorder:
        critic(x)
    scores = recorder.scores()
    assert list(scores) == ["layers.0", "layers.1", "layers.2", "layers.3"]
    x = x.double()
    for layer, score in zip(critic.layers, scores.values(), strict=False):
        x = x @ layer.weight.detach().double().T + layer.bias.detach().double()
        # float32 through up to four layers of sums of up to 1024 terms
        np.testing.assert_allclose(score.numpy(), brute_force_scores([x.numpy()], 0.0), rtol=1e-4, atol=1e-6)
        x = x.clamp(min=0) if critic_activation == "relu" else x


def test_lora_scores_are_of_the_rank_space(make_policy, generator):
    policy = make_policy(trained=True, rank=8)
    layers = lora_layers(policy.model.network)
    with torch.no_grad(), ActivationRecorder(layers) as recorder:
        policy.step(
            torch.randn(2, *policy.latent_shape, generator=generator),
            torch.tensor([0, 2]),
            policy.encode_prompts(["a red circle", "two blue squares"]),
        )
    scores = recorder.scores()
    assert scores.keys() == layers.keys() and all(score.shape == (8,) for score in scores.values())
    # a layer's scores average 1, but for the 1e-9 in the denominator and float32
    assert all(score.mean().item() == pytest.approx(1, abs=1e-4) for score in scores.values())


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in module.modules())


def test_hooks_are_gone_however_the_block_ends():
    critic = make_critic()
    with ActivationRecorder(critic_layers(critic)):
        assert hooks(critic) == 4
    assert hooks(critic) == 0
    with pytest.raises(KeyboardInterrupt), ActivationRecorder(critic_layers(critic)):
        raise KeyboardInterrupt
    assert hooks(critic) == 0


def test_the_mean_of_several_processes_is_taken_before_scores_are_relative(generator):
    """Processes with unlike data, and one without any: the scores are those of all rows together."""
    critic, x = make_critic(), torch.randn(60, EMBED_DIM, generator=generator)
    x[20:] *= 10
    parts = []
    for rows in (x[:20], x[20:], x):
        with ActivationRecorder(critic_layers(critic)) as recorder:
            critic(rows)
        parts.append(recorder)
    with ActivationRecorder(critic_layers(critic)) as whole:
        critic(x)
    parts[2].forget()
    others: list[list[torch.Tensor]] = [[], []]
    for part, sums in zip(parts[1:], others, strict=True):
        part.scores(total=lambda own, sums=sums: sums.append(own) or own)
    more = zip(*others, strict=True)
    got = parts[0].scores(total=lambda own: own + sum(next(more)))
    for name, score in whole.scores().items():
        torch.testing.assert_close(got[name], score, rtol=1e-5, atol=1e-6)  # float32 sums of 20, 40 and 60 rows


# --- the data they are scored on


def scored(path, make_policy, **overrides) -> tuple[torch.Tensor, torch.Tensor, list]:
    """A training of one epoch: the scores of the first layer, its weighted sums, (N, T, H), and the updates' pairs."""
    training = toy_training(new_run(path, epochs=1, **overrides), make_policy)
    method, pairs, found = training.method, [], {}
    update, finish = method.update, method.finish
    method.update = lambda group: pairs.append(group) or update(group)

    def keep(batch):
        found["outputs"] = method.critic.network.layers[0](batch.image_embeds)
        return finish(batch)

    method.finish = keep
    training.context.record = lambda epoch, scores, reset: found.update(scores=scores["layers.0"])
    list(training.epochs())
    return found["scores"], found["outputs"], pairs


@pytest.mark.parametrize("order", ["shuffled", "denoising"])
@pytest.mark.parametrize("data", ["epoch", "first-step", "batch"])
def test_the_critics_neurons_are_scored_on_the_data_that_is_asked_for(data, order, make_policy, tmp_path):
    settings = {"policy": {"timestep_order": order}, "neurons": {"data": data}}
    scores, outputs, pairs = scored(tmp_path / "run", make_policy, **settings)
    (first_rows, first_steps), _ = pairs[-2:]  # two updates at each of three positions; these are at the last one
    assert len(pairs) == 6 and len(first_rows) == 4
    if order == "denoising":
        assert first_steps.tolist() == [2] * 4
    chosen = {
        "epoch": outputs,
        "first-step": outputs[:, 0],
        "batch": torch.stack([outputs[row, step] for row, step in zip(first_rows[:2], first_steps[:2], strict=True)]),
    }[data]
    # float32 means of two to 24 rows
    np.testing.assert_allclose(scores.numpy(), brute_force_scores([chosen.numpy()], 0.0), rtol=1e-5, atol=1e-6)


def test_a_batch_is_the_same_whatever_the_micro_batch(make_policy, tmp_path):
    settings = {"neurons": {"data": "batch"}}
    runs = [scored(tmp_path / f"{size}", make_policy, micro_batch=size, **settings) for size in (1, 4)]
    (scores, _, _), (others, _, _) = runs
    torch.testing.assert_close(scores, others, rtol=1e-3, atol=1e-3)  # after six updates on sums in another order
    assert scores.unique().numel() > 100


@torch.no_grad()
def test_the_loras_neurons_are_scored_on_a_quarter_of_the_samples_whatever_the_micro_batch(make_policy, tmp_path):
    training = toy_training(new_run(tmp_path / "run"), make_policy)
    training._sample()
    policy, context, states = training.policy, training.context, training.method.neurons
    batch, seen = context.progress.batch(), []
    states._scores = lambda recorder: seen.append(recorder.scores()) or seen[-1]
    for context.micro_batch in (1, 2, 4):
        states.of_policy(batch)
    assert len(batch) == 8
    with ActivationRecorder(lora_layers(policy.trainable.network)) as recorder:
        for k in range(len(policy.process)):
            policy.step(batch.latents[:2, k], torch.full((2,), k), policy.encode_prompts(batch.prompts[:2]))
    for scores in seen:
        torch.testing.assert_close(scores, recorder.scores(), rtol=1e-4, atol=1e-5)  # float32 sums in another order


# --- masks and their overlap

NOW = {"a": torch.tensor([True, False, False, True]), "b": torch.tensor([False, False])}
BEFORE = {"a": torch.tensor([False, False, True, True]), "b": torch.tensor([False, True])}
ALL_ACTIVE = {"a": torch.ones(4).bool(), "b": torch.ones(2).bool()}


def test_active_is_above_the_threshold():
    scores = {"a": torch.tensor([0.0, 0.1, 0.2])}
    assert active_masks(scores, 0.0)["a"].tolist() == [False, True, True]
    assert active_masks(scores, 0.1)["a"].tolist() == [False, False, True]


def test_dormant_percent():
    assert dormant_percent(NOW) == pytest.approx(100 * 4 / 6, abs=1e-4)  # a float32 mean
    assert dormant_percent(ALL_ACTIVE) == 0


def test_overlap_counts_the_neurons_dormant_both_times():
    """Dormant now: a1, a2, b0, b1; before: a0, a1, b0; both: a1, b0. The authors' code says 100 %."""
    assert overlap_percent(NOW, BEFORE) == pytest.approx(100 * 2 / 3)
    assert overlap_percent(BEFORE, NOW) == pytest.approx(100 * 2 / 3)
    assert overlap_percent(NOW, NOW) == 100
    disjoint = {"a": ~NOW["a"], "b": ~NOW["b"]}
    assert overlap_percent(NOW, disjoint) == 0


def test_an_empty_set_has_no_overlap():
    assert overlap_percent(NOW, ALL_ACTIVE) is None
    assert overlap_percent(ALL_ACTIVE, NOW) is None


def test_overlap_goes_by_the_layers_names_and_not_by_their_order():
    before = {"a": torch.tensor([True, False]), "b": torch.tensor([False, True, True])}
    now = {"b": torch.tensor([False, True, True]), "a": torch.tensor([True, False])}
    assert overlap_percent(now, before) == 100


# --- a policy whose weights are all trained


def test_neurons_of_a_trained_network_are_measured_and_get_the_bases_weights_back(make_policy):
    """Where they are masked, in their rows, their gates' rows and their columns, and nowhere else."""
    policy = make_policy(train="full")
    trainable, base = policy.trainable, {name: w.clone() for name, w in policy.trainable.state().items()}
    optimizer = torch.optim.AdamW(policy.parameters)
    for parameter in policy.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    layers = policy_layers(trainable)
    path = "mid_block.attentions.0.transformer_blocks.0.ff"
    seen = []
    hook = layers[path].network.net[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    latents, conditioning = torch.randn(2, *policy.latent_shape), policy.encode_prompts(["a red circle"] * 2)
    with torch.no_grad(), ActivationRecorder(layers) as recorder:
        policy.step(latents, torch.tensor([0, 2]), conditioning)
    hook.remove()
    scores = recorder.scores()
    mean = seen[0].relu().flatten(0, -2).mean(0)
    torch.testing.assert_close(scores[path], mean / mean.mean(), rtol=1e-5, atol=1e-6)  # float32
    assert len(scores) == 4 and all(score.shape == (128,) for score in scores.values())
    masks = {name: torch.zeros(128, dtype=torch.bool) for name in layers}
    masks[path][5] = True
    assert reset_neurons(layers, masks, optimizer, torch.Generator()) == 1
    reset = {f"{path}.net.0.proj.weight": [5, 133], f"{path}.net.0.proj.bias": [5, 133], f"{path}.net.2.weight": [5]}
    for name, parameter in trainable.parameters.items():
        back = parameter == base[name]
        moments = optimizer.state[parameter]["exp_avg"] == 0
        expected = torch.zeros_like(back)
        (expected.T if name.endswith("net.2.weight") else expected)[reset.get(name, [])] = True
        assert torch.equal(back, expected) and torch.equal(moments, expected), name
