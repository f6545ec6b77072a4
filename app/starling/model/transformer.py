"""Self-attention over the cells of a map (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

from __future__ import annotations

from torch import Tensor, nn

from starling.model.blocks import C3

HEADS = 4


class TransformerLayer(nn.Module):
    """Attend, then mix each cell's channels; both are added to what came in, and nothing is normalised."""

    def __init__(self, channels: int, heads: int = HEADS) -> None:
        super().__init__()
        self.q = nn.Linear(channels, channels, bias=False)
        self.k = nn.Linear(channels, channels, bias=False)
        self.v = nn.Linear(channels, channels, bias=False)
        self.ma = nn.MultiheadAttention(channels, heads)
        self.fc1 = nn.Linear(channels, channels, bias=False)
        self.fc2 = nn.Linear(channels, channels, bias=False)

    def forward(self, cells: Tensor) -> Tensor:
        """Return [cells, B, channels] for the same."""
        attended, _ = self.ma(self.q(cells), self.k(cells), self.v(cells), need_weights=False)
        cells = cells + attended
        return cells + self.fc2(self.fc1(cells))


class TransformerBlock(nn.Module):
    """Layers of attention over all cells of a map; a linear layer stands in for a position embedding."""

    def __init__(self, channels: int, number: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.tr = nn.Sequential(*(TransformerLayer(channels) for _ in range(number)))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the input's shape; memory grows with the square of its cells."""
        cells = x.flatten(2).permute(2, 0, 1)
        return self.tr(cells + self.linear(cells)).permute(1, 2, 0).reshape(x.shape)


class C3Transformer(C3):
    """A cross-stage partial block around attention."""

    def __init__(self, c_in: int, c_out: int, number: int = 1) -> None:
        super().__init__(c_in, c_out, number=0)
        self.m = TransformerBlock(c_out // 2, number)
