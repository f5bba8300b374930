"""AdamW with weights in bf16 and both moments in 8 bits: 6 bytes for each weight, its gradient included.

bf16 has 8 bits of mantissa, so that a step smaller than 1/512 of a weight would be lost in rounding to nearest. So
everything stored is rounded up or down at random, and is right on average (stochastic rounding, as in arXiv
2010.06192). A moment is float8 (e4m3) times one scale for each BLOCK of values, and of the second moment the root is
stored, whose range is half as many powers of ten.

The random numbers have coordinates like all others, (seed, parameter, step), but are drawn on the parameter's device,
so that they depend on its kind.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .randomness import derive_seed
from .settings import OptimizerSettings

BLOCK = 256
MANTISSA = 23  # bits, of float32
BF16, FLOAT8 = 7, 3  # bits
LARGEST = 448.0  # of float8 e4m3
LEAST = 1e-38


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW on `parameters`, which keep their dtype; `seed`: of the run."""

    def __init__(self, parameters: list[nn.Parameter], settings: OptimizerSettings, seed: int):
        super().__init__(parameters, {"lr": settings.lr})
        self.settings, self.seed = settings, seed

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad.float(), place, group["lr"])

    def _step(self, parameter: nn.Parameter, gradient: Tensor, place: int, lr: float) -> None:
        state, beta1, beta2 = self.state[parameter], self.settings.beta1, self.settings.beta2
        if not state:
            state["step"] = torch.zeros(())
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, dtype=torch.float8_e4m3fn)
                state[f"{moment}_scale"] = gradient.new_zeros(-(-parameter.numel() // BLOCK))
        state["step"] += 1
        step = int(state["step"])
        draw = torch.Generator(parameter.device).manual_seed(derive_seed(self.seed, "rounding", place, step))
        mean = restored(state["exp_avg"], state["exp_avg_scale"]).lerp_(gradient, 1 - beta1)
        root = restored(state["exp_avg_sq"], state["exp_avg_sq_scale"])
        root = (beta2 * root**2 + (1 - beta2) * gradient**2).sqrt_()
        corrected = root / (1 - beta2**step) ** 0.5
        change = mean / (1 - beta1**step) / (corrected + self.settings.eps)
        # Adam's own bound: a root that was rounded to 0 must not make a step of any size
        bound = max(1.0, (1 - beta1) / (1 - beta2) ** 0.5)
        weight = parameter.float() * (1 - lr * self.settings.weight_decay) - lr * change.clamp_(-bound, bound)
        parameter.copy_(rounded(weight, BF16, draw))
        state["exp_avg"], state["exp_avg_scale"] = shortened(mean, draw)
        state["exp_avg_sq"], state["exp_avg_sq_scale"] = shortened(root, draw)


def rounded(values: Tensor, bits: int, draw: torch.Generator) -> Tensor:
    """float32 `values` with `bits` bits of mantissa: each is rounded up or down at random, and is right on average."""
    dropped = 1 << (MANTISSA - bits)
    noise = torch.randint(dropped, values.shape, generator=draw, device=values.device, dtype=torch.int32)
    return ((values.view(torch.int32) + noise) & -dropped).view(torch.float32)


def shortened(values: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """float32 `values` as float8 of the same shape, and the scale of each BLOCK of them."""
    blocks = F.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1).clamp_(min=LEAST) / LARGEST
    codes = rounded(blocks / scales[:, None], FLOAT8, draw).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.flatten()[: values.numel()].view(values.shape), scales


def restored(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values that `shortened` made codes and scales of."""
    return (codes.float().flatten() * scales.repeat_interleave(BLOCK)[: codes.numel()]).view(codes.shape)
