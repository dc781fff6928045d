"""A transformer with RMS norm: sums and norms in one pass, a sample's bits its own.

python examples/ship_a_transformer.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normkit

WIDTH, HEADS, LENGTH = 64, 4, 32


class Block(nn.Module):
    """Attention and a perceptron; each sum of the residual stream is normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm = normkit.nn.RMSNorm(WIDTH)
        self.perceptron = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, h: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of the block and the stream without it."""
        h = self.attention(h, h, h, need_weights=False)[0]
        h, stream = self.norm(stream, residual=h)  # norm(stream + h), stream + h
        return self.perceptron(h), stream


class Reverser(nn.Module):
    """Read a sequence of digits and say it backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.first = normkit.nn.RMSNorm(WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norms = nn.ModuleList(normkit.nn.RMSNorm(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, digits: Tensor) -> Tensor:
        """Return the scores of each digit at each place."""
        stream = self.embedding(digits) + self.position
        h = self.first(stream)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            h, stream = block(h, stream)
            h, stream = norm(stream, residual=h)
        return self.head(h)


def main(steps: int = 400) -> dict[str, object]:
    """Train, then compare a sample alone with the same sample in a batch."""
    torch.manual_seed(0)
    model = Reverser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        digits = torch.randint(10, (64, LENGTH))
        loss = F.cross_entropy(model(digits).flatten(0, 1), digits.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:>4}: loss {loss.item():.3f}")
    model.eval()
    digits = torch.randint(10, (256, LENGTH))
    with torch.no_grad():
        right = (model(digits).argmax(2) == digits.flip(1)).float().mean()
        x = torch.randn(256, LENGTH, WIDTH)
        same = torch.equal(model.first(x)[7:8], model.first(x[7:8]))
    print(f"{float(right):.1%} right; a norm alone and in the batch, same bits: {same}")
    return {"right": float(right), "same": same}


if __name__ == "__main__":
    main()
