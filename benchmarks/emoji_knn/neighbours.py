"""Nearest neighbours among features, and how much features have moved."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def centre(x: Float[Tensor, "n d"], mean: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """Take the common direction away and bring features to length 1."""
    return F.normalize(x - mean, dim=-1)


def classify(
    queries: Float[Tensor, "q d"],
    references: Float[Tensor, "r d"],
    labels: Int[Tensor, " r"],
    k: int,
) -> Int[Tensor, " q"]:
    """Give each query the class of most of its nearest references.

    Nearness is the cosine of features from which the mean of the references is taken away. A tie
    of votes goes to the class whose voters are nearer in sum, and then to the lower class.

    Args:
        queries: features to classify.
        references: features whose classes are known.
        labels: class of each reference.
        k: how many references vote.

    Returns:
        Class of each query.

    Raises:
        ValueError: there are fewer than k references.
    """
    if k > len(references):
        raise ValueError(f"k={k} needs at least {k} references, got {len(references)}")
    mean = references.mean(0)
    similarity = centre(queries, mean) @ centre(references, mean).T
    nearest, index = similarity.topk(k, dim=1)
    voters = labels[index]
    votes = torch.zeros(len(queries), int(labels.max()) + 1)
    # similarities sum to at most k in size: divided by 2 k + 1 they never outweigh a vote
    votes = votes.scatter_add(1, voters, 1 + nearest / (2 * k + 1))
    return votes.argmax(1)


def match_labels(
    queries: Float[Tensor, "q d"],
    truth: Int[Tensor, " q"],
    references: Float[Tensor, "r d"],
    labels: Int[Tensor, " r"],
    k: int,
) -> Bool[Tensor, " q"]:
    """Say for each query whether its nearest references name its class (see `classify`)."""
    return classify(queries, references, labels, k) == truth


def compare_centred(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], mean: Float[Tensor, " d"]
) -> Float[Tensor, " n"]:
    """Return the cosine of two features of each picture, both with a mean taken away."""
    return (centre(x, mean) * centre(y, mean)).sum(-1)
