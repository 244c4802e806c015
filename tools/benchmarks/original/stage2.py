"""The original's transformer (minGPT): its training step and its ways to sample.

Three projections, scores [b,heads,t,t] under a mask that lies in memory, logits of every position.
Legend: b batch, t positions, c width, v vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Past = tuple[Tensor, Tensor]
TOP_K = 100


class Attention(nn.Module):
    """Masked attention, or with a past that of one more position."""

    mask: Tensor

    def __init__(self, width: int, heads: int, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        seen = torch.ones(positions, positions).tril().view(1, 1, positions, positions)
        self.register_buffer("mask", seen, persistent=False)

    def forward(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        b, t, c = x.shape
        key, query, value = (
            linear(x).view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for linear in (self.key, self.query, self.value)
        )
        if past is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))
        scores = (query @ key.transpose(-2, -1)) * (1.0 / key.shape[-1] ** 0.5)
        if past is None:
            scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        read = F.softmax(scores, dim=-1) @ value
        return self.proj(read.transpose(1, 2).contiguous().view(b, t, c)), (key, value)


class Block(nn.Module):
    """Attention and perceptron, each after a norm and with a residual."""

    def __init__(self, width: int, heads: int, positions: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, positions)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        read, present = self.attn(self.ln1(x), past)
        x = x + read
        return x + self.mlp(self.ln2(x)), present


class GPT(nn.Module):
    """The transformer with the weights of one of ours that has `gpt` blocks; nothing is shared
    with it. The condition's tokens have the codes' table."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        config = ours.config
        self.positions = config.positions
        self.tok_emb = nn.Embedding(config.vocabulary, config.width)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.positions, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.positions) for _ in range(config.layers)
        )
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        there = ours.state_dict()
        self.load_state_dict({name: there[name] for name in self.state_dict()})
        self.to(ours.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [b,t,v] of all positions."""
        x = self.tok_emb(ids) + self.pos_emb[:, : ids.shape[1]]
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.ln_f(x))

    def next(self, ids: Tensor) -> Tensor:
        """The token after ids [b,t], drawn from the TOP_K best."""
        return self.drawn(self(ids)[:, -1])

    def sample_with_past(self, ids: Tensor, count: int) -> Tensor:
        """So many tokens after ids [b,t], with keys and values of those before."""
        pasts: list[Past | None] = [None] * len(self.blocks)
        read, found, seen = ids, [], 0
        for _ in range(count):
            x = self.tok_emb(read) + self.pos_emb[:, seen : seen + read.shape[1]]
            for layer, block in enumerate(self.blocks):
                x, pasts[layer] = block(x, pasts[layer])
            seen += read.shape[1]
            read = self.drawn(self.head(self.ln_f(x))[:, -1])
            found.append(read)
        return torch.cat(found, dim=1)

    def drawn(self, logits: Tensor) -> Tensor:
        """A token [b,1] from logits [b,v]."""
        best, _ = logits.topk(TOP_K)
        logits = logits.clone()
        logits[logits < best[:, [-1]]] = -float("inf")
        return F.softmax(logits, dim=-1).multinomial(1)


class Stage2:
    """The training step: AdamW, decay on the weights of linear layers."""

    def __init__(self, gpt: GPT, lr: float, weight_decay: float = 0.01) -> None:
        self.gpt = gpt
        decayed = [module.weight for module in gpt.modules() if isinstance(module, nn.Linear)]
        known = {id(weight) for weight in decayed}
        others = [parameter for parameter in gpt.parameters() if id(parameter) not in known]
        groups = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))

    def loss(self, condition: Tensor, codes: Tensor) -> Tensor:
        """Mean nats of codes [b,n] after the condition's tokens [b,m]."""
        logits = self.gpt(torch.cat([condition, codes], dim=1)[:, :-1])
        logits = logits[:, condition.shape[1] - 1 :]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), codes.reshape(-1))

    def step(self, condition: Tensor, codes: Tensor) -> Tensor:
        """Train on one batch; gives its loss."""
        loss = self.loss(condition, codes)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()
