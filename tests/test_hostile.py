"""Files from a stranger: settings, tar shards, labels. (Checkpoints and encoders have tests of their own.)"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import blobs
from corpus import encoded, picture

from barlow import Config, pretrain
from barlow.config import read_toml
from barlow.errors import UserError
from barlow.images import open_images
from barlow.labels import labels_from_csv


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize(
    "arguments",
    [
        "{ checkpoint_path = '%s' }",
        "{ pretrained_cfg = { file = '%s' } }",
        "{ pretrained_cfg_overlay = { file = '%s' } }",
        "{ pretrained = true, pretrained_cfg = { file = '%s' } }",
    ],
)
def test_settings_cannot_name_a_file_of_weights(tmp_path: Path, arguments: str) -> None:
    """timm would load any of these with torch.load."""
    trap, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    trap.write_bytes(pickle.dumps(Trap(sprung)))
    np.save(tmp_path / "a.npy", blobs(64))
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f'images = "{tmp_path}/a.npy"\nencoder = "resnetv2_18"\nsteps = 1\nout = "{tmp_path}/run"\nimage_size = 32\n'
        f"encoder_args = {arguments % trap}\n"
    )
    with pytest.raises(UserError, match="encoder"):
        pretrain(read_toml(settings), quiet=True)
    assert not sprung.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../weights.pth", "local-dir:/tmp", "hf-hub:someone/something"])
def test_settings_cannot_name_an_encoder_elsewhere(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "a.npy", blobs(64))
    with pytest.raises(UserError, match="encoder"):
        pretrain(Config(str(tmp_path / "a.npy"), encoder=name, steps=1, out=str(tmp_path / "run")), quiet=True)


def test_members_of_a_tar_that_lead_outside_touch_nothing(tmp_path: Path) -> None:
    """Names with ../, absolute names, links and devices: bytes of images are read at their offsets, and that is all."""
    shard = tmp_path / "in" / "set.tar"
    shard.parent.mkdir()
    image = encoded(picture(), "PNG")
    with tarfile.open(shard, "w") as tar:
        for name in ("../../outside.png", "/absolute.png", "good.png"):
            member = tarfile.TarInfo(name)
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
        for name, kind, target in (
            ("link.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.png", tarfile.LNKTYPE, "../../outside.png"),
            ("device.png", tarfile.CHRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    images = open_images(shard)
    assert len(images) == 3
    for i in range(3):
        np.testing.assert_array_equal(images.read(i), picture())
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/absolute.png").exists()


def test_labels_from_a_stranger_are_text(tmp_path: Path) -> None:
    """Formulas, paths elsewhere, markup and pickles in a table of labels stay words, or are refused."""
    np.save(tmp_path / "a.npy", blobs(2))
    images = open_images(tmp_path / "a.npy")
    table = tmp_path / "labels.csv"
    words = ["\"=cmd|'/c calc'!A1\"", '"<script>alert(1)</script>"']
    table.write_text("path,label\n" + "".join(f"{images.key(i)},{word}\n" for i, word in enumerate(words)))
    numbers, names = labels_from_csv(table, images)
    assert sorted(names) == sorted(word.strip('"') for word in words)
    assert set(numbers) == {0, 1}
    table.write_text("path,label\n../../etc/passwd,1\n/etc/shadow,2\n")
    with pytest.raises(UserError, match="not the table of labels"):
        labels_from_csv(table, images)
    sprung = tmp_path / "sprung"
    table.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(UserError):
        labels_from_csv(table, images)
    assert not sprung.exists()
