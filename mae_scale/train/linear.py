"""A linear classifier on features, solved in one step: roughly what a linear probe would find.

Ridge regression of the classes needs no training, no learning rate and no random number, so that it
can be done between two steps of a run.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mae_scale.models.numerics import full_fp32
from mae_scale.train.validation import rank_of_label

_RIDGE = 0.01  # penalty as a share of the features' variance, which is 1


@torch.no_grad()
def linear_scores(features: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, float]:
    """Measure how well a linear classifier of one half of the images does on the other half.

    Both halves take their turn, and each has every second image of every class. The features are
    standardised; the squared error of the one-hot labels is minimised with a small ridge.

    Args:
        features: float32 [N, D], features of the images.
        labels: int64 [N], classes of the images.
        classes: number of classes.

    Returns:
        "linear_top1" and "linear_top5", in percent of all images.
    """
    labels = labels.to(features.device)
    half = torch.empty_like(labels)
    half[labels.argsort(stable=True)] = torch.arange(len(labels), device=labels.device) % 2
    right = torch.zeros(2, dtype=torch.int64, device=labels.device)
    for tested in (0, 1) if len(labels) > 1 else ():
        train, test = features[half != tested], features[half == tested]
        mean, std = train.mean(dim=0), train.std(dim=0, correction=0).clamp(min=1e-6)
        train, test = (train - mean) / std, (test - mean) / std
        wanted = F.one_hot(labels[half != tested], classes).float()
        share = wanted.mean(dim=0)
        with full_fp32():
            square, product = train.T @ train, train.T @ (wanted - share)
            square.diagonal().add_(_RIDGE * len(train))
            weight = torch.linalg.solve(square.double(), product.double()).float()
            place = rank_of_label(test @ weight + share, labels[half == tested])
        right += torch.stack([(place < 1).sum(), (place < 5).sum()])
    top1, top5 = (100 * count / len(labels) for count in right.tolist())
    return {"linear_top1": top1, "linear_top5": top5}
