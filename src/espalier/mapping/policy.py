"""Policy: a small recurrent network that emits an option for every layer, trained by REINFORCE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from espalier.mapping.space import Space

WIDTH = 32
SPREAD = 0.55  # of the entropy that even choices would have is what a policy begins with
STEP = 0.15  # of sensitivities (logarithms) and tastes in one update, root mean square
LR, ENTROPY = 0.01, 0.02
_COLDEST = 1e-3  # the least temperature beside the largest cost: two options that tie stay two
_STRONG = 3.0  # how much more sensitive than it would have to be a layer is taken for that was left dense


class Policy(nn.Module):
    """p(options) = product over layers of p(option of this layer | options of the layers before it).

        logit(option) = -(sensitivity * damage + price * latency) / temperature + taste of its scheme + head(GRU)

    It begins where the rule ends: most likely are the options that lose least for what they take, at the price for
    which the limit is met; with `favourite`, sensitivities under which that choice is about the most likely. A
    layer's sensitivity, a scheme's taste, and the GRU, which reads what the layers before it got, are learnt by
    REINFORCE, with the place in the batch as advantage, -1 .. 1, so that a plan far above the target does not drown
    what sets the others apart, and a little entropy. The paper's controller begins knowing nothing, and takes thousands
    of trials; the prior is our reading.

    limit_ms: the latency that is asked. favourite: a choice that is known to be good.
    """

    def __init__(self, space: Space, seed: int, limit_ms: float, favourite: Sequence[int] | None = None) -> None:
        super().__init__()
        self.sizes = [len(each) for each in space.options]
        widest = max(self.sizes, default=1)
        labels = sorted({o.label or "" for each in space.options for o in each})
        taste = {label: k for k, label in enumerate(labels)}
        rows = [[(o.damage, o.ms, float(taste[o.label or ""])) for o in each] for each in space.options]
        table = torch.tensor([row + [(0.0, 0.0, 0.0)] * (widest - len(row)) for row in rows], dtype=torch.float64)
        damage, ms = table[..., 0], table[..., 1]
        reach = torch.arange(widest)[None, :] < torch.tensor(self.sizes)[:, None]
        price = _price(damage, ms, reach, limit_ms - space.fixed_ms)
        known = torch.zeros(len(rows), dtype=torch.float64)
        if favourite is not None:
            known = _sensitivities(damage, price * ms, reach, torch.tensor(list(favourite)))
        cost = (known.exp()[:, None] * damage + price * ms).masked_fill(~reach, float("inf"))
        self.temperature = _temperature(cost, SPREAD * sum(map(math.log, self.sizes)))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.before = nn.Embedding(widest + 1, WIDTH)
            self.cell = nn.GRUCell(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, widest)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.sensitivity = nn.Parameter(known.float())
        self.taste = nn.Parameter(torch.zeros(len(labels)))
        self._damage, self._priced, self._scheme = damage.float(), (price * ms).float(), table[..., 2].long()
        self._reach = reach
        recurrent = [*self.before.parameters(), *self.cell.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(recurrent, lr=LR)

    def sample(self, generator: torch.Generator) -> tuple[int, ...]:
        """One choice for every layer."""
        picked: list[int] = []
        state = torch.zeros(1, WIDTH)
        last = torch.zeros(1, dtype=torch.long)
        with torch.no_grad():
            for layer in range(len(self.sizes)):
                logits, state = self._layer(layer, last, state)
                last = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
                picked.append(int(last))
                last = last + 1
        return tuple(picked)

    def learn(self, picked: Sequence[Sequence[int]], rewards: Sequence[float]) -> None:
        """One step towards the choices that did better than others of the batch."""
        place = torch.tensor(list(rewards)).argsort().argsort().float()
        gain = 2 * place / max(1, len(place) - 1) - 1
        chosen = torch.tensor([list(p) for p in picked])
        state, last = torch.zeros(len(chosen), WIDTH), torch.zeros(len(chosen), dtype=torch.long)
        log_p, entropy = torch.zeros(len(chosen)), torch.zeros(())
        for layer, size in enumerate(self.sizes):
            logits, state = self._layer(layer, last, state)
            table = logits.log_softmax(1)
            log_p = log_p + table.gather(1, chosen[:, layer : layer + 1])[:, 0]
            entropy = entropy - (table.exp() * table)[:, :size].sum(1).mean()
            last = chosen[:, layer] + 1
        loss = -(gain * log_p).mean() - ENTROPY * entropy
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():  # a step of fixed length: rewards are few, and their gradients' sizes say little
            for few in (self.sensitivity, self.taste):
                assert few.grad is not None
                few.sub_(STEP * few.grad / few.grad.square().mean().sqrt().clamp_min(1e-12))
                few.grad = None

    def _layer(self, layer: int, last: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.cell(self.before(last), state)
        cost = self.sensitivity[layer].exp() * self._damage[layer] + self._priced[layer]
        prior = -(cost - cost[self._reach[layer]].min()) / self.temperature + self.taste[self._scheme[layer]]
        logits = self.head(state) + prior
        return logits.masked_fill(~self._reach[layer], -1e9), state


def _price(damage: Tensor, ms: Tensor, reach: Tensor, left_ms: float) -> float:
    """Damage for a millisecond, such that the best option of every layer together take what is left."""

    def taken(price: float) -> float:
        best = (damage + price * ms).masked_fill(~reach, float("inf")).argmin(1, keepdim=True)
        return float(ms.gather(1, best).sum())

    low, high = 1e-6, 1e9
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if taken(middle) <= left_ms else (middle, high)
    return high


def _sensitivities(damage: Tensor, priced: Tensor, reach: Tensor, favourite: Tensor) -> Tensor:
    """The logarithms of sensitivities for which the best option of every layer takes what the favourite does."""
    tried = torch.linspace(-4.0, 4.0, 161, dtype=torch.float64)
    costs = tried.exp()[:, None, None] * damage + priced
    best = costs.masked_fill(~reach, float("inf")).argmin(2)  # [tried, layers]
    apart = (priced[None].expand(len(tried), -1, -1).gather(2, best[..., None])[..., 0] - _at(priced, favourite)).abs()
    nearest = apart <= apart.min(0).values + 1e-12
    middle = (nearest * tried[:, None]).sum(0) / nearest.sum(0)
    first = torch.where(nearest, tried[:, None], math.inf).min(0).values
    return torch.where(favourite == 0, (first + math.log(_STRONG)).clamp(max=4.0), middle)


def _at(table: Tensor, picked: Tensor) -> Tensor:
    return table.gather(1, picked[:, None])[:, 0]


def _temperature(cost: Tensor, entropy: float) -> float:
    """At which the choices of all layers together have this entropy."""

    def reached(temperature: float) -> float:
        p = (-cost / temperature).softmax(1)
        return -float((p * p.clamp_min(1e-300).log()).sum())

    worst = float(cost.masked_fill(cost.isinf(), 0.0).max())
    low, high = max(_COLDEST * worst, 1e-12), 1e9
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reached(middle) >= entropy else (middle, high)
    return high
