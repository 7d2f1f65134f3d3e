"""The loss in the place of lightly's, in the loop that its documentation shows: its transform, its head.

Only the import of the loss differs: ``from barlow import BarlowTwinsLoss``. lightly's own loss of the same embeddings
is printed beside it.

Needs lightly: pip install lightly

    python examples/loss_lightly.py [--quick]
"""

import argparse

import numpy as np
import torch
from lightly.loss import BarlowTwinsLoss as LightlysLoss
from lightly.models.modules import BarlowTwinsProjectionHead
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from barlow import BarlowTwinsLoss


class Digits(Dataset):
    """scikit-learn's digits as colour pictures, transformed, as a data set of torchvision hands them over."""

    def __init__(self, transform: BYOLTransform) -> None:
        self.images, self.labels, self.transform = load_digits().images, load_digits().target, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[list[Tensor], int]:
        picture = Image.fromarray((self.images[i] * 15.9).astype(np.uint8)).convert("RGB")
        return self.transform(picture), int(self.labels[i])


class BarlowTwins(nn.Module):
    """Images (n, 3, 16, 16) → embeddings (n, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.projection_head = BarlowTwinsProjectionHead(256, 128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))


def main(quick: bool = False) -> list[tuple[float, float]]:
    """Trains on scikit-learn's digits; returns the loss of every step, ours and lightly's."""
    torch.manual_seed(0)
    transform = BYOLTransform(
        BYOLView1Transform(input_size=16, gaussian_blur=0.0), BYOLView2Transform(input_size=16, gaussian_blur=0.0)
    )
    loader = DataLoader(Digits(transform), batch_size=128, shuffle=True, drop_last=True)
    model = BarlowTwins()
    criterion, theirs = BarlowTwinsLoss(lambda_=5e-3), LightlysLoss(lambda_param=5e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    losses: list[tuple[float, float]] = []
    for epoch in range(1 if quick else 8):
        for views, *_ in loader:
            z0, z1 = model(views[0]), model(views[1])
            loss = criterion(z0, z1)
            losses.append((loss.item(), theirs(z0.detach(), z1.detach()).item()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if quick and len(losses) == 3:
                break
        print(f"epoch {epoch}: loss {losses[-1][0]:.3f}, lightly's {losses[-1][1]:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
