"""How much of the image targets of a run is the picture's colour, and not its shape.

    python experiments/m3i_small/target_colour.py runs/sweeps/table4/intern_image-m3i-seed0 INDEX

Targets are the encoder's features, each vector normalised as targets are, about the mean of its
position. A linear map from the colour of the border, the mean colour and their squares is fitted to
half of the pictures; printed is the share of the variance that it predicts in the other half, for
the untrained encoder, the teacher and the student.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from m3i_scale.config import load_config
from m3i_scale.data.make import Sample
from m3i_scale.data.sequential import central_square, walk
from m3i_scale.engine.checkpoint import CheckpointReader, complete_checkpoints
from m3i_scale.objective.likelihoods import normalise
from m3i_scale.objective.m3i import M3I
from m3i_scale.transfer import loading
from m3i_scale.transfer.features import Pixels, open_source

BORDER = 4  # pixels


def colours(images: Tensor) -> Tensor:
    """Border and mean colour of (N, 3, H, W), their squares and 1: (N, 13)."""
    edges = [images[:, :, :BORDER].flatten(2), images[:, :, -BORDER:].flatten(2)]
    border = torch.cat(edges, 2).median(2).values
    mean = images.mean((2, 3))
    return torch.cat([border, mean, border**2, mean**2, torch.ones(len(images), 1)], 1)


@torch.no_grad()
def targets(networks: M3I, images: Tensor) -> Tensor:
    """Normalised features about the mean of each position: (N, positions * width)."""
    parts = [networks.student.backbone.features(part) for part in images.split(100)]
    features = normalise(torch.cat(parts), "layer_norm")
    return (features - features.mean(0)).flatten(1)


def explained(known: Tensor, wanted: Tensor) -> float:
    """Share of the variance of the second half that a linear fit to the first half predicts."""
    half = len(known) // 2
    fit = torch.linalg.lstsq(known[:half], wanted[:half]).solution
    rest = wanted[half:] - known[half:] @ fit
    return 1 - float(rest.square().sum() / wanted[half:].square().sum())


def main() -> None:
    """Read the run, print the three shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with a teacher")
    parser.add_argument("index", help="index of the pictures")
    parser.add_argument("--limit", type=int, default=800, help="pictures (%(default)s)")
    options = parser.parse_args()
    config = load_config(options.run / "config.yaml")
    reader = CheckpointReader(complete_checkpoints(options.run / "checkpoints")[-1])
    samples = (sample for _, sample in walk(open_source(options.index), limit=options.limit))
    size = config.data.image_size
    pixels = torch.stack([central_square(s.image, size) for s in samples if isinstance(s, Sample)])
    images = Pixels.of(config.data).prepare(pixels, torch.device("cpu"))
    encoders = {
        "untrained": loading.build_untrained(config),
        "teacher": loading.build_trained(config, reader, "teacher"),
        "student": loading.build_trained(config, reader, "student"),
    }
    for name, networks in encoders.items():
        print(f"{name:10} {explained(colours(images), targets(networks, images)):.2f}")


if __name__ == "__main__":
    main()
