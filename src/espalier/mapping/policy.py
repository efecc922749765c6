"""Policy: a small recurrent network that emits an option for every layer, trained by REINFORCE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from espalier.mapping.space import Option, Space

WIDTH = 32
FAVOURED = 0.8  # the probability with which a choice that is known to be good starts, however many there are
FAR = 4.0  # what others lose in their logits for every factor e that their latency is from that choice's
LR, ENTROPY = 0.03, 0.2


class Policy(nn.Module):
    """p(options) = product over layers of p(option of this layer | options of the layers before it).

    A GRU reads what was chosen for the layer before; its head and a table of biases by layer give the logits. Updates
    are REINFORCE with the place in the batch as advantage, -1 .. 1, so that a plan far above the target does not drown
    what sets the others apart (our reading), and a little entropy.

    favourite: a choice that is known to be good, to begin near: most layers of a sample have it.
    """

    def __init__(self, space: Space, seed: int, favourite: Sequence[int] | None = None) -> None:
        super().__init__()
        self.sizes = [len(each) for each in space.options]
        widest = max(self.sizes, default=1)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.before = nn.Embedding(widest + 1, WIDTH)
            self.cell = nn.GRUCell(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, widest)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.bias = nn.Parameter(torch.zeros(len(self.sizes), widest))
        for layer, known in enumerate(favourite or ()):
            with torch.no_grad():
                self.bias[layer, : self.sizes[layer]] = _near(space.options[layer], known)
        reach = torch.arange(widest)[None, :] < torch.tensor(self.sizes)[:, None]
        self.register_buffer("reach", reach, persistent=False)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=LR)

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
        for layer in range(len(self.sizes)):
            logits, state = self._layer(layer, last, state)
            table = logits.log_softmax(1)
            log_p = log_p + table.gather(1, chosen[:, layer : layer + 1])[:, 0]
            entropy = entropy - (table.exp() * table.masked_fill(~self._of(layer), 0)).sum(1).mean()
            last = chosen[:, layer] + 1
        loss = -(gain * log_p).mean() - ENTROPY * entropy
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 5.0)
        self.optimizer.step()

    def _of(self, layer: int) -> Tensor:
        reach = self.reach
        assert isinstance(reach, Tensor)
        return reach[layer][None, :]

    def _layer(self, layer: int, last: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.cell(self.before(last), state)
        logits = self.head(state) + self.bias[layer]
        return logits.masked_fill(~self._of(layer), float("-inf")), state


def _near(options: Sequence[Option], known: int) -> Tensor:
    """Logits of a layer's options around one: it is favoured, and of the others those that are about as fast, so that
    a plan with some layers changed keeps about its latency."""
    ms = torch.tensor([max(each.ms, 1e-6) for each in options]).log()
    logits = -FAR * (ms - ms[known]).abs()
    others = torch.cat([logits[:known], logits[known + 1 :]]).logsumexp(0)
    logits[known] = math.log(FAVOURED / (1 - FAVOURED)) + (others if len(options) > 1 else 0.0)
    return logits
