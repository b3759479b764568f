"""Small batches for tests of the engine."""

import torch

from sparkjoy.testing import TinyPolicy

ROWS, TOKENS, WIDTH, ACTIONS = 13, 5, 4, 6


def make_case(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    policy = TinyPolicy(WIDTH, ACTIONS, dtype=dtype)
    size = (ROWS,) if shape == "rows" else (ROWS, TOKENS)
    batch = {
        "state": torch.randn(*size, WIDTH, generator=generator, dtype=dtype),
        "action": torch.randint(ACTIONS, size, generator=generator),
    }
    per_token = shape == "ragged tokens, an advantage each"
    advantages = torch.randn(size if per_token else ROWS, generator=generator, dtype=dtype)
    advantages[2] = 0  # a row that teaches nothing
    mask = None
    if shape.startswith("ragged"):
        lengths = torch.randint(0, TOKENS + 1, (ROWS,), generator=generator)
        mask = torch.arange(TOKENS) < lengths.unsqueeze(1)
    return policy, batch, advantages, mask


SHAPES = ("rows", "tokens", "ragged tokens", "ragged tokens, an advantage each")
