"""The loss in a Lightning module. On several devices it is that of the joined batch, under Lightning's DDP too.

Needs Lightning: pip install lightning

    python examples/loss_lightning.py [--quick]
"""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from barlow import BarlowTwinsLoss


class BarlowTwins(lightning.LightningModule):
    """Images (n, 1, 8, 8) → embeddings (n, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten())
        self.projector = nn.Sequential(nn.Linear(1024, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(),
                                       nn.Linear(128, 128))  # fmt: skip
        self.criterion = BarlowTwinsLoss()
        self.losses: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.criterion(self(view(batch[0])), self(view(batch[0])))
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def view(images: Tensor) -> Tensor:
    """Moved by up to a pixel, in noise."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return images.roll((down, right), (2, 3)) + 0.2 * torch.randn_like(images)


def main(quick: bool = False) -> list[float]:
    """Trains on scikit-learn's digits; returns the loss of every step."""
    lightning.seed_everything(0, verbose=False)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    loader = DataLoader(TensorDataset(images), batch_size=256, shuffle=True, drop_last=True)
    module = BarlowTwins()
    trainer = lightning.Trainer(
        max_steps=20 if quick else 400, devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=not quick,
    )  # fmt: skip
    trainer.fit(module, loader)
    print(f"loss {module.losses[0]:.2f} at first, {module.losses[-1]:.2f} after {len(module.losses)} steps")
    return module.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
