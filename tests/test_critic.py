"""The critic: its shape, its initial weights, and that it can learn."""

import math

import pytest
import torch
import torch.nn.functional as F

from comfy_tdpo.methods.critic import TemporalCritic
from comfy_tdpo.methods.objectives import critic_loss, explained_variance
from comfy_tdpo.methods.sections import CriticSettings


@pytest.mark.parametrize("embed_dim", [64, 768])
def test_layers_and_their_draw(embed_dim):
    critic = TemporalCritic(embed_dim, generator=torch.Generator().manual_seed(0))
    sizes = [(layer.in_features, layer.out_features) for layer in critic.layers]
    assert sizes == [(embed_dim, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]
    for layer in critic.layers:
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))
        # the standard error of a standard deviation from n draws is 1 / sqrt(2 n); five of them
        tolerance = 5 / math.sqrt(2 * layer.weight.numel())
        assert layer.weight.square().mean().sqrt().item() * (embed_dim + 1) == pytest.approx(1, abs=tolerance)


def test_identity_activation_is_a_product_of_matrices(generator):
    critic = TemporalCritic(24).double()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    embeds = F.normalize(torch.randn(3, 5, 24, generator=generator, dtype=torch.float64), dim=-1)
    product, offset = torch.eye(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    for layer in critic.layers:
        product, offset = layer.weight @ product, layer.weight @ offset + layer.bias
    expected = (embeds @ product.T + offset)[..., 0]
    got = critic(embeds)
    assert got.shape == (3, 5)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # float64


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.01)])
def test_activations_lie_between_the_layers_and_not_after_the_last(generator, activation, slope):
    critic = TemporalCritic(24, activation).double()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    x = torch.randn(50, 24, generator=generator, dtype=torch.float64)
    got = critic(x)
    for layer in critic.layers[:-1]:
        x = x @ layer.weight.T + layer.bias
        x = torch.where(x > 0, x, slope * x)
    expected = (x @ critic.layers[-1].weight.T + critic.layers[-1].bias)[:, 0]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # float64
    assert got.min() < 0, "an activation after the last layer would hide this"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_dropout_is_on_where_a_generator_is_given_and_repeats_with_its_seed(generator):
    critic, embeds = TemporalCritic(24), torch.randn(8, 24, generator=generator)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    assert torch.equal(critic(embeds), critic(embeds))
    dropped = critic(embeds, dropout=seeded(1))
    assert not torch.equal(dropped, critic(embeds))
    assert torch.equal(dropped, critic(embeds, dropout=seeded(1)))
    assert not torch.equal(dropped, critic(embeds, dropout=seeded(2)))


def test_dropout_takes_the_shares_that_are_stated_and_keeps_the_mean():
    """With all weights 1/width and unit inputs each layer's output is the share of what was kept before it."""
    critic = TemporalCritic(1)
    with torch.no_grad():
        for layer in critic.layers:
            layer.weight.fill_(1 / layer.in_features)
    got = critic(torch.ones(20_000, 1), dropout=seeded(0))
    # one over 64 units of keeping 0.9 is the widest: std 1/3 / 8, over 20,000 rows a standard error of 3e-4; five
    assert got.mean().item() == pytest.approx(1, abs=1.5e-3)
    # variances p / (1 - p) of a mean over 1024, 128 and 64 units, each relative to what the layer before gave
    expected = (1 + 0.25 / 1024) * (1 + 0.25 / 128) * (1 + (1 / 9) / 64) - 1
    # five standard errors of a variance from 20,000 draws
    assert got.var().item() == pytest.approx(expected, rel=5 * (2 / 20_000) ** 0.5)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    TemporalCritic(24, generator=seeded(0))(torch.ones(2, 24), dropout=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="got activation 'gelu'; expected one of identity, relu, leaky_relu"):
        TemporalCritic(8, "gelu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explained_variance_rises_where_it_can(generator, dtype):
    """Returns that are linear in the embedding, learned with the library's loss and default optimiser settings.

    The width is Shapes' own. Embeddings may come out of an encoder in bfloat16.
    """
    direction = torch.randn(64, generator=generator)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = F.normalize(torch.randn(count, 64, generator=generator), dim=-1)
        return embeds.to(dtype).float(), embeds @ direction  # the returns' standard deviation is about 1

    @torch.no_grad()
    def explained() -> float:
        return explained_variance(critic(unseen), unseen_returns).item()

    settings, critic = CriticSettings(), TemporalCritic(64, generator=seeded(0))
    optimizer = torch.optim.AdamW(
        critic.parameters(),
        settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    unseen, unseen_returns = draw(500)
    assert abs(explained()) < 1e-3, "drawn at 1/65, the critic starts as a constant"
    for _ in range(12):  # epochs of 20 updates over 24 embeddings each
        embeds, returns = draw(480)
        with torch.no_grad():
            old = critic(embeds)
        for rows in torch.arange(480).split(24):
            loss = critic_loss(critic(embeds[rows], generator), old[rows], returns[rows], settings.clip_range).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(critic.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    # measured 0.9X; a critic whose gradients vanish, as after the authors' second unscale, stays at 0.00
    assert explained() > 0.5
