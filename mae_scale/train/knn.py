"""Classification by the nearest neighbours: it measures features without any training.

The rule is that of DINO (Caron et al., arXiv 2104.14294, section 4.1), after Wu et al. (arXiv
1805.01978, section 3.4): the K nearest images by the cosine of their features vote for their
classes, each with the weight exp(cosine / temperature).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional as F

from mae_scale.models.numerics import full_fp32
from mae_scale.train.validation import rank_of_label

NEIGHBOURS, TEMPERATURE = 20, 0.07  # the values of DINO
_QUERIES = 256  # number of images that are compared at a time


@torch.no_grad()
def knn_scores(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor | None,
    labels: torch.Tensor,
    classes: int,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[str, float]:
    """Compute the share of queries whose label wins the vote or is among the first five.

    All ranks call with the same arguments and get the same bits, whatever their number: each
    compares some blocks of queries, and the blocks do not depend on the number of ranks.

    Args:
        bank: float32 [N, D], features of the images that vote.
        bank_labels: int64 [N], their classes.
        queries: float32 [M, D], features of the images to classify; None: the bank itself, where no
            image takes part in its own vote.
        labels: int64 [M], classes of the queries.
        classes: number of classes.
        neighbours: K, the number of neighbours that vote.
        temperature: divisor of the cosines in the weights of the votes.

    Returns:
        "knn_top1" and "knn_top5", in percent.
    """
    bank = F.normalize(bank, dim=1)
    asked = bank if queries is None else F.normalize(queries, dim=1)
    bank_labels, labels = bank_labels.to(bank.device), labels.to(bank.device)
    neighbours = min(neighbours, len(bank) - (queries is None))
    right = torch.zeros(2, dtype=torch.int64, device=bank.device)
    starts = range(0, len(asked), _QUERIES)
    for start in starts[dist.get_rank() :: dist.get_world_size()]:
        with full_fp32():
            cosines = asked[start : start + _QUERIES] @ bank.T
        own, rows = labels[start : start + _QUERIES], torch.arange(len(cosines), device=bank.device)
        if queries is None:
            cosines[rows, start + rows] = -torch.inf
        nearest, which = cosines.topk(neighbours, dim=1)
        # The largest cosine is 1, so that nothing overflows, whatever the temperature.
        weights = ((nearest - 1) / temperature).exp()
        votes = (weights[..., None] * F.one_hot(bank_labels[which], classes)).sum(dim=1)
        place = rank_of_label(votes, own)
        place[votes[rows, own] == 0] = classes  # no neighbour has the class
        right += torch.stack([(place < 1).sum(), (place < 5).sum()])
    dist.all_reduce(right)
    top1, top5 = (100 * count / len(asked) for count in right.tolist())
    return {"knn_top1": top1, "knn_top5": top5}
