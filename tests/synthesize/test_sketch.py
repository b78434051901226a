"""Maps keep inner products, are linear, depend on name and place alone, and stay the same from version to version."""

import hashlib

import numpy as np
import pytest
import torch

from bloomery.synthesize.sketch import SketchConfig, Sketcher, _random

SHAPES = {"wide": (6, 400), "tall": (300, 5), "vector": (700,), "stacked": (3, 8, 40), "square": (50, 50)}


def sketched(kind, name, gradient, seed=0, dim=64):
    projection = Sketcher(SketchConfig(kind=kind, dim=dim, seed=seed)).of(name, SHAPES[name])
    z = torch.zeros(len(gradient), dim, dtype=gradient.dtype)
    projection.add(z, gradient.reshape(len(gradient), projection.num_rows, projection.num_cols))
    return z


def pair(name):
    """Two gradients with a cosine of about 0.7; products of few tokens, as real ones are."""
    draw = torch.Generator().manual_seed(1)
    shape = SHAPES[name] if len(SHAPES[name]) > 1 else (1, *SHAPES[name])
    rows = torch.Size(shape[:-1]).numel()
    left, right = torch.randn(3, rows, 4, generator=draw), torch.randn(3, 4, shape[-1], generator=draw)
    one, other, third = left @ right
    found = torch.stack([one, one + other, third]).flatten(1)
    return found / found.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", ["countsketch", "rademacher"])
@pytest.mark.parametrize("name", SHAPES)
def test_inner_products_are_kept_on_average(kind, name):
    gradients = pair(name)
    exact = gradients @ gradients.T
    found = torch.stack([z @ z.T for z in (sketched(kind, name, gradients, seed) for seed in range(60))])
    noise = found.std(0).max()
    assert float(noise) < 3 / 64**0.5
    assert float((found.mean(0) - exact).abs().max()) < 4 * float(noise) / 60**0.5


@pytest.mark.parametrize("kind", ["countsketch", "rademacher"])
def test_parts_add_up_and_names_differ(kind):
    gradients = torch.randn(2, 50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sketcher = Sketcher(SketchConfig(kind=kind, dim=32))
    whole, parts, other = (torch.zeros(2, 32, dtype=torch.float64) for _ in range(3))
    sketcher.of("square", (50, 50)).add(whole, gradients)
    for rows in torch.arange(50).split(20):
        for cols in torch.arange(50).split(33):
            sketcher.of("square", (50, 50)).add(parts, gradients[:, rows][:, :, cols], rows, cols)
    torch.testing.assert_close(parts, whole)
    sketcher.of("another", (50, 50)).add(other, gradients)
    assert not torch.allclose(other, whole)


def test_the_bits_are_those_of_splitmix64():
    """By Python's own integers; another version must not draw other maps."""

    def splitmix(x, mask=2**64 - 1):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key = int.from_bytes(hashlib.blake2b(b"0/w", digest_size=8).digest(), "little")
    expected = [splitmix((key + n * 0x9E3779B97F4A7C15) % 2**64) for n in range(3)]
    assert _random(0, "w", np.arange(3, dtype=np.uint64)).tolist() == expected
    assert expected == [8834021663702253145, 3219234901278683267, 6148132628854278065]
