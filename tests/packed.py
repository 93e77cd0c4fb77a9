"""Random packed weights."""

import torch

from sparsekit.inference.packed import PackedWeight


def random_packed(
    out: int, columns: int, group_size: int, sparse: bool, device: str = "cpu", seed: int = 0
) -> PackedWeight:
    """2:4 or dense, with every code and every pattern in it."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = {"generator": generator, "device": device}
    scales = (0.5 + torch.rand(out, columns // group_size, **draw)).half()
    count = columns // 4 if sparse else columns // 2
    values = torch.randint(0, 256, (out, count), **draw).to(torch.uint8)
    if not sparse:
        return PackedWeight(values, None, scales, group_size, (out, columns))
    places = torch.rand(out, columns // 4, 4, **draw).argsort(-1)[..., :2].sort(-1).values
    quads = places[..., 0] | places[..., 1] << 2
    positions = (quads[:, 0::2] | quads[:, 1::2] << 4).to(torch.uint8)
    return PackedWeight(values, positions, scales, group_size, (out, columns))
