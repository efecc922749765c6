"""What a network is trained to say: the labels, and softly what a teacher says."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from espalier.train.recipe import Recipe


def objective(out: Tensor, labels: Tensor, taught: Tensor | None, recipe: Recipe) -> Tensor:
    """The loss of logits `out` ``[N, C]``: a scalar, the mean over the images.

    ``(1 - d) CE(out, labels) + d T^2 KL(softmax(taught / T) || softmax(out / T))`` with ``d = recipe.distill`` and
    ``T = recipe.temperature`` (Hinton et al., arXiv 1503.02531, section 2; T^2 keeps the gradients of both parts in
    proportion when T changes). `taught` are the teacher's logits, or None where there is no teacher.

    >>> out, same = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> float(objective(out, same, out, Recipe(distill=1.0)))
    0.0
    """
    loss = F.cross_entropy(out, labels, label_smoothing=recipe.label_smoothing)
    if taught is None or not recipe.distill:
        return loss
    t = recipe.temperature
    soft = F.log_softmax(taught.float() / t, 1)
    apart = F.kl_div(F.log_softmax(out.float() / t, 1), soft, reduction="batchmean", log_target=True)
    return (1 - recipe.distill) * loss + recipe.distill * t * t * apart
