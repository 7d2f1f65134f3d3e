from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from barlow import checkpoint, manifest
from barlow.checkpoint import latest, load, save, set_aside, verify
from barlow.errors import NumbersError, Stopped, UserError
from barlow.tensorfile import is_dense


def tensors() -> dict[str, Tensor]:
    """Every kind a run holds, and the odd ones."""
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 3, 3, generator=numbers)
    tied = torch.randn(5, 2, generator=numbers)
    return {
        "model/conv.weight": weight.to(memory_format=torch.channels_last),
        "model/point.weight": torch.randn(6, 4, 1, 1, generator=numbers).to(memory_format=torch.channels_last),
        "model/volume.weight": torch.randn(2, 3, 2, 2, 2, generator=numbers).to(memory_format=torch.channels_last_3d),
        "model/turned.weight": torch.randn(3, 7, generator=numbers).t(),
        "model/part": torch.randn(8, 8, generator=numbers)[2:5, ::2],
        "model/wide": torch.randn(1, 3, generator=numbers).expand(4, 3),
        "model/tied.a": tied,
        "model/tied.b": tied,
        "model/bn.running_mean": torch.randn(3, generator=numbers, dtype=torch.float64),
        "model/bn.num_batches_tracked": torch.tensor(17),
        "model/half": torch.randn(3, generator=numbers).half(),
        "model/brain": torch.randn(3, generator=numbers).bfloat16(),
        "model/mask": torch.tensor([True, False, True]),
        "model/empty": torch.empty(0, 3),
        "model/bytes": torch.arange(5, dtype=torch.uint8),
        "optimizer/step/conv.weight": torch.tensor(3.0),
        "optimizer/exp_avg/conv.weight": torch.zeros_like(weight),
    }


STATE = {"config": {"lr": 0.1, "name": "λ"}, "seed": 2**63, "best": [0.1 + 0.2, None, True]}


def step(folder: Path, number: int) -> Path:
    return folder / f"step-{number:09d}"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path, 1234, tensors(), STATE)


def reseal(path: Path, **changes: object) -> None:
    """What an attacker does: changes the manifest and makes every checksum right again."""
    content = json.loads((path / "manifest.json").read_text()) | changes
    content["sha256"] = manifest.seal(content)
    (path / "manifest.json").write_text(json.dumps(content))


def rehash(path: Path, name: str) -> None:
    files = json.loads((path / "manifest.json").read_text())["files"]
    size, sha256 = checkpoint.digest(path / name)
    reseal(path, files=files | {name: {"bytes": size, "sha256": sha256}})


def test_everything_comes_back_bit_for_bit_with_its_strides(saved: Path) -> None:
    assert saved.name == "step-000001234"
    assert (saved.parent / "latest").read_text() == "step-000001234\n"
    back = load(saved)
    assert (back.step, back.state) == (1234, STATE)
    assert back.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        other = back.tensors[name]
        assert other.dtype == tensor.dtype, name
        assert torch.equal(other, tensor), name
        if name not in ("model/part", "model/wide"):  # views with holes or overlaps come back row-major
            assert other.stride() == tensor.stride(), name
    assert back.tensors["model/tied.a"].data_ptr() == back.tensors["model/tied.b"].data_ptr()
    assert list(back.group("optimizer")) == ["exp_avg/conv.weight", "step/conv.weight"]


@pytest.mark.parametrize(("shape", "strides", "dense"), [
    ((2, 3), (3, 1), True), ((2, 3), (1, 2), True), ((2, 3), (1, 3), False), ((2, 3), (4, 1), False),
    ((2, 3), (0, 1), False), ((1, 3), (2, 1), True), ((1, 3), (9, 1), False), ((), (), True), ((2, 2), (1, 1), False),
])  # fmt: skip
def test_dense_is_a_permutation_of_row_major(shape: tuple[int, ...], strides: tuple[int, ...], dense: bool) -> None:
    assert is_dense(shape, strides) is dense


def test_other_tools_can_open_the_tensors(saved: Path) -> None:
    from safetensors.torch import load_file

    assert torch.equal(load_file(saved / "model.safetensors")["conv.weight"], tensors()["model/conv.weight"])


def test_same_tensors_make_the_same_bytes_in_any_order(saved: Path, tmp_path: Path) -> None:
    turned = dict(reversed(tensors().items()))
    turned["model/tied.a"], turned["model/tied.b"] = turned.pop("model/tied.a"), turned.pop("model/tied.b")
    again = save(tmp_path / "again", 1234, turned, STATE)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_a_loaded_tensor_lives_on_when_its_file_is_gone(saved: Path) -> None:
    back = load(saved)
    (saved / "model.safetensors").write_bytes(b"\xff" * (saved / "model.safetensors").stat().st_size)
    assert torch.equal(back.tensors["model/half"], tensors()["model/half"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_finite_is_never_saved(saved: Path, bad: float, dtype: torch.dtype) -> None:
    wrong = torch.zeros(50, dtype=dtype)
    wrong[31] = bad
    with pytest.raises(NumbersError, match=r"model/conv\.weight is not finite at step 1235"):
        save(saved.parent, 1235, tensors() | {"model/conv.weight": wrong}, STATE)
    with pytest.raises(NumbersError):
        save(saved.parent, 1235, tensors(), {"loss": bad})
    assert latest(saved.parent) == saved
    assert sorted(path.name for path in saved.parent.iterdir()) == ["latest", saved.name]


def test_keys_and_kinds_that_cannot_be_saved_leave_nothing_behind(tmp_path: Path) -> None:
    for key in ("weight", "../evil/weight", "model/", "/weight", "manifest.json/x", "Model/x"):
        with pytest.raises(ValueError, match="does not read group/name"):
            save(tmp_path, 1, {key: torch.zeros(1)}, {})
    with pytest.raises(TypeError, match="sparse"):
        save(tmp_path, 1, {"model/x": torch.eye(2).to_sparse()}, {})
    with pytest.raises(TypeError, match="complex"):
        save(tmp_path, 1, {"model/x": torch.zeros(2, dtype=torch.complex64)}, {})
    with pytest.raises(TypeError):
        save(tmp_path, 1, {}, {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_one_of_the_same_step_is_replaced(saved: Path) -> None:
    again = save(saved.parent, 1234, {"model/x": torch.ones(2)}, {"n": 2})
    assert again == saved
    assert load(saved).state == {"n": 2}
    assert sorted(path.name for path in saved.parent.iterdir()) == ["latest", saved.name]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_any_flipped_bit_cut_or_loss_is_found_and_the_one_before_is_taken(
    saved: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = save(saved.parent, 2000, tensors(), STATE)
    good = (newer / name).read_bytes()
    for place in {*range(0, len(good), max(1, len(good) // 40)), len(good) - 2}:
        if chr(good[place]) in " \n" and name == "manifest.json":
            continue  # white space of the manifest means nothing
        (newer / name).write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with pytest.raises(UserError):
            load(newer)
    for damaged in (good[: len(good) // 2], b"", good + b"\0", None):
        (newer / name).unlink() if damaged is None else (newer / name).write_bytes(damaged)
        assert latest(saved.parent) == saved
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert all(str(newer) in sentence for sentence in said)
    (newer / name).write_bytes(good)
    assert latest(saved.parent) == newer
    assert not capsys.readouterr().err


def test_nothing_there_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latest(tmp_path / "no") is None
    assert latest(tmp_path) is None
    step(tmp_path, 5).mkdir()
    assert latest(tmp_path) is None
    told = capsys.readouterr().err
    assert "no manifest.json" in told
    assert "the checkpoint before it" not in told  # there is none
    with pytest.raises(UserError, match="not a complete checkpoint"):
        load(tmp_path / "no")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize(("owner", "name"), [(Path, "lstat"), (checkpoint, "digest"), (Path, "iterdir")])
def test_a_disk_that_fails_is_no_damage(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, owner: Any, name: str
) -> None:
    """Kills: one passing fault of a network disk, for which a run goes on from an older checkpoint, or from none."""
    newer = save(saved.parent, 2000, tensors(), STATE)
    real, waits, left = getattr(owner, name), list[float](), 0

    def failing(path: Path, *rest: object) -> object:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(number, os.strerror(number))
        return real(path, *rest)

    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(owner, name, failing)
    for left in range(1, 1 + len(checkpoint.WAITS)):
        waits.clear()
        faults = left
        assert latest(saved.parent) == newer
        assert waits == list(checkpoint.WAITS[:faults])
    left = 99
    with pytest.raises(Stopped, match=rf"cannot be read now \({os.strerror(number)}\): give the same") as stopped:
        latest(saved.parent)
    assert stopped.value.exit_code == 75
    left = 2
    assert load(newer).step == 2000
    assert not capsys.readouterr().err


def test_damaged_ones_that_were_passed_over_never_count_again(saved: Path) -> None:
    folder = saved.parent
    for number in (2000, 3000):
        (save(folder, number, tensors(), STATE) / "state.json").write_bytes(b"")
    put_back = saved.rename(folder / f"{saved.name}.old")
    saved.mkdir()  # a save of the same step, cut off in the middle
    set_aside(folder, put_back)
    assert checkpoint.candidates(folder) == [put_back]
    set_aside(folder, put_back)
    save(folder, 2000, tensors(), STATE)
    assert {path.name for path in folder.iterdir()} == {"latest", put_back.name, "step-000002000"}


# ---------------------------------------------------------------- checkpoints from strangers


def test_a_pickle_under_our_name_is_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for payload in (pickle.dumps(Evil()), b"PK\x03\x04" + b"\0" * 100):
        (saved / "model.safetensors").write_bytes(payload)
        rehash(saved, "model.safetensors")
        with pytest.raises(UserError, match="not a tensor file"):
            load(saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("header", [
    (1 << 62).to_bytes(8, "little") + b"{}",
    (200 << 20).to_bytes(8, "little") + b"{}" + b" " * 1000,
    (90).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'.ljust(90),
    (70).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}'.ljust(70) + b"\0" * 4,
    (70).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[9,13]}}'.ljust(70) + b"\0" * 13,
    (70).to_bytes(8, "little") + b'{"x":{"dtype":"WAT","shape":[1],"data_offsets":[0,4]}}'.ljust(70) + b"\0" * 4,
    (70).to_bytes(8, "little") + b'{"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'.ljust(70) + b"\0",
    (4).to_bytes(8, "little") + b"[[[[",
])  # fmt: skip
def test_a_lying_header_is_refused(saved: Path, header: bytes) -> None:
    (saved / "model.safetensors").write_bytes(header)
    rehash(saved, "model.safetensors")
    with pytest.raises(UserError, match="not a tensor file"):
        load(saved)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "x/../y.safetensors", "model.pt", "a\\b.safetensors",
                                  "", "..", "latest", "model.safetensors\n"])  # fmt: skip
def test_a_manifest_cannot_name_files_elsewhere(saved: Path, name: str) -> None:
    (saved.parent / "secret").write_text("x")
    files = json.loads((saved / "manifest.json").read_text())["files"]
    reseal(saved, files=files | {name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(UserError, match="names a file"):
        load(saved)


def test_unexpected_files_links_and_pipes_are_refused(saved: Path) -> None:
    (saved / ".DS_Store").write_text("a hidden file is not ours to mind")
    verify(saved)
    (saved / "model.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.pt is not expected"):
        load(saved)
    (saved / "model.pt").unlink()
    for name in ("state.json", "manifest.json"):
        content = (saved / name).read_bytes()
        (saved.parent / "elsewhere").write_bytes(content)
        (saved / name).unlink()
        (saved / name).symlink_to(saved.parent / "elsewhere")
        with pytest.raises(UserError, match="not a plain file"):
            load(saved)
        (saved / name).unlink()
        os.mkfifo(saved / name)
        with pytest.raises(UserError, match="not a plain file"):
            load(saved)
        (saved / name).unlink()
        (saved / name).write_bytes(content)
    verify(saved)


@pytest.mark.parametrize("text", [
    b"[" * 100_000, b"[]", b'{"a": NaN}', b'{"a": Infinity}', b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}", b"",
])  # fmt: skip
def test_hostile_json_is_refused(saved: Path, text: bytes) -> None:
    (saved / "state.json").write_bytes(text)
    rehash(saved, "state.json")
    with pytest.raises(UserError, match="is damaged"):
        load(saved)
    (saved / "manifest.json").write_bytes(text)
    with pytest.raises(UserError):
        load(saved)


def test_json_too_large_is_refused_before_it_is_read(saved: Path) -> None:
    with (saved / "manifest.json").open("ab") as file:
        file.truncate(1 << 40)  # sparse: takes no room
    with pytest.raises(UserError, match="at most 64 MiB"):
        load(saved)


@pytest.mark.parametrize("changes", [
    {"format": 2}, {"format": None}, {"step": "1234"}, {"step": 1235}, {"step": True}, {"files": []}, {"files": {}},
    {"strides": 3}, {"strides": {"model/half": [1 << 40]}}, {"strides": {"model/half": [-1]}},
    {"strides": {"model/half": [0]}}, {"strides": {"model/half": ["1"]}}, {"strides": {"model/half": [1, 1]}},
    {"strides": {"model/point.weight": [1 << 50, 1, 4, 4]}}, {"strides": {"model/point.weight": [4, 1, -1, 4]}},
    {"strides": {"model/point.weight": [4, 1, 4, 1 << 70]}}, {"strides": {"model/half": None}},
    {"aliases": {"model/x": "model/none"}}, {"aliases": {"model/half": "model/mask"}}, {"aliases": {"model/x": ["y"]}},
])  # fmt: skip
def test_a_manifest_that_lies_is_refused(saved: Path, changes: dict[str, object]) -> None:
    reseal(saved, **changes)
    with pytest.raises(UserError):
        load(saved)


def test_nan_from_a_stranger_is_refused(saved: Path) -> None:
    raw = bytearray((saved / "optimizer.safetensors").read_bytes())
    raw[-4:] = b"\x00\x00\xc0\x7f"
    (saved / "optimizer.safetensors").write_bytes(raw)
    rehash(saved, "optimizer.safetensors")
    with pytest.raises(UserError, match="not finite"):
        load(saved)
