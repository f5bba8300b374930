"""What scores of unfinished images say about the return: for each step a linear regression of its own.

At the last steps, the predicted clean image is nearly the image, and its score nearly the reward. At the first steps it
says little, so its coefficients are small.

Shapes: N samples, T denoising steps, S scores of each step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..exact import exact

RIDGE = 1.0  # shrinks a coefficient as much as one more sample would, with a score of 1 and a return of 0 from the mean


@dataclass(frozen=True)
class StepRegression:
    """returns ~ intercept + scores @ weights at each step: weights (T, S), intercept (T,)."""

    weights: Tensor
    intercept: Tensor

    @classmethod
    def fit(cls, scores: Tensor, returns: Tensor) -> "StepRegression":
        """The ridge regression of returns, (N, T), on scores, (N, T, S), solved in float64."""
        x, y = exact(scores).transpose(0, 1), exact(returns).T  # (T, N, S), (T, N)
        x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        centred = x - x_mean
        gram = centred.mT @ centred + RIDGE * torch.eye(x.shape[-1], dtype=x.dtype)
        weights = torch.linalg.solve(gram, centred.mT @ (y - y_mean)[..., None])[..., 0]
        intercept = y_mean[:, 0] - (x_mean[:, 0] * weights).sum(-1)
        return cls(*(found.float().to(scores.device) for found in (weights, intercept)))

    def __call__(self, scores: Tensor) -> Tensor:
        """The predicted returns, (N, T), from scores, (N, T, S)."""
        return self.intercept + (scores * self.weights).sum(-1)
