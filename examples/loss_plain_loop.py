"""The loss alone, in a training loop of one's own: two views in, one scalar out.

python examples/loss_plain_loop.py [--quick]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from barlow import BarlowTwinsLoss


def view(images: torch.Tensor) -> torch.Tensor:
    """Moved by up to a pixel, in noise."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return images.roll((down, right), (2, 3)) + 0.2 * torch.randn_like(images)


def main(quick: bool = False) -> list[float]:
    """Trains on scikit-learn's digits; returns the loss of every step."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    encoder = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten())
    projector = nn.Sequential(nn.Linear(1024, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128))
    network = nn.Sequential(encoder, projector)
    criterion = BarlowTwinsLoss()  # λ by the width of the embedding
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for step in range(20 if quick else 400):
        batch = images[torch.randperm(len(images))[:256]]
        loss = criterion(network(view(batch)), network(view(batch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            terms = criterion.terms
            print(f"step {step:>3}: loss {losses[-1]:6.2f}, mean of the diagonal {terms.mean_diagonal:.2f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
