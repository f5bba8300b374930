"""The critic: its shape and draw, and that it learns what there is to learn."""

import math

import pytest
import torch
import torch.nn.functional as F

from comfy_tdpo.critic import TemporalCritic
from comfy_tdpo.objectives import critic_loss, explained_variance
from comfy_tdpo.trainer.config import CriticConfig


@pytest.mark.parametrize("embed_dim", [64, 768])
def test_layers_and_their_draw(embed_dim):
    torch.manual_seed(0)
    critic = TemporalCritic(embed_dim)
    sizes = [(layer.in_features, layer.out_features) for layer in critic.layers]
    assert sizes == [(embed_dim, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]
    for layer in critic.layers:
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))
        # the standard error of a standard deviation from n draws is 1 / sqrt(2 n); five of them
        tolerance = 5 / math.sqrt(2 * layer.weight.numel())
        assert layer.weight.square().mean().sqrt().item() * (embed_dim + 1) == pytest.approx(1, abs=tolerance)


def test_identity_activation_is_a_product_of_matrices(generator):
    critic = TemporalCritic(24).double().eval()
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
    critic = TemporalCritic(24, activation).double().eval()
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


def test_dropout_only_in_training(generator):
    critic, embeds = TemporalCritic(24), torch.randn(8, 24, generator=generator)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    assert not torch.equal(critic.train()(embeds), critic(embeds))
    assert torch.equal(critic.eval()(embeds), critic(embeds))


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
        return explained_variance(critic.eval()(unseen), unseen_returns).item()

    torch.manual_seed(0)
    settings, critic = CriticConfig(), TemporalCritic(64)
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
            old = critic.eval()(embeds)
        critic.train()
        for rows in torch.arange(480).split(24):
            loss = critic_loss(critic(embeds[rows]), old[rows], returns[rows], settings.clip_range).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(critic.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    # measured 0.9X; a critic whose gradients vanish, as after the authors' second unscale, stays at 0.00
    assert explained() > 0.5
