"""Classification by the nearest neighbours: how good features are, without any training.

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

NEIGHBOURS, TEMPERATURE = 20, 0.07  # those of DINO
_QUERIES = 256  # that are compared at a time


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
    """Share of the queries whose label wins the vote, or comes among the five first, in percent.

    All ranks call with the same and get the same, to the bit at any number of them: each compares
    some blocks of queries, whose limits do not depend on the ranks.

    Args:
        bank: float32 [N, D], features of the images that vote.
        bank_labels: int64 [N].
        queries: float32 [M, D]; None: those of the bank, of which each is left out of its own vote.
        labels: int64 [M].
        classes: number of them.
        neighbours, temperature: K and the temperature.

    Returns:
        "knn_top1" and "knn_top5".
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
        # The largest cosine is 1: so nothing overflows, whatever the temperature.
        weights = ((nearest - 1) / temperature).exp()
        votes = (weights[..., None] * F.one_hot(bank_labels[which], classes)).sum(dim=1)
        place = rank_of_label(votes, own)
        place[votes[rows, own] == 0] = classes  # no neighbour has the class
        right += torch.stack([(place < 1).sum(), (place < 5).sum()])
    dist.all_reduce(right)
    top1, top5 = (100 * count / len(asked) for count in right.tolist())
    return {"knn_top1": top1, "knn_top5": top5}
