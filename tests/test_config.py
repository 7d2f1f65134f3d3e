"""The same words in Python, TOML and on the command line; mistakes answered with the nearest word."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from barlow.config import Config, differences, from_mapping, merge, read_toml, to_toml
from barlow.errors import UserError

FULL = Config(
    "photos", out="run", encoder="resnet18", encoder_args={"layers": [1, 1, 1, 1], "act_layer": "gelu"},
    pretrained=False, image_size=64, channels=3, channels_b=1, mean=(0.5, 0.25, 0.125),
    mean_b=(0.5,), std=(0.1, 0.2, 0.3), std_b=(0.25,),
    views=({"crop": [0.2, 1.0]}, {"flip": 0.5}),
    projector=(64, 32), twins="shared", lambda_=0.0051, batch_size=128, micro_batch=32, epochs=2.5, steps=None,
    minutes=None, optimizer="lars", lr=0.2, lr_bias=1e-4, weight_decay=1.5e-6, warmup=0.01, precision="bfloat16",
    workers=0, devices=1, seed=7, held_out=10, health_every=5, checkpoint_every=9, stop_on_collapse=True,
    time_limit="2h", cache=True, cache_form="jpeg", max_bad=0.1, keep_every=500, timeout="90s", threads=3,
    logger=("wandb", "mlflow"),
)  # fmt: skip


def test_toml_round_trip_of_every_field(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(FULL), encoding="utf-8")
    assert read_toml(path) == FULL
    unset = {f.name for f in dataclasses.fields(FULL) if getattr(FULL, f.name) is None}
    assert unset == {"steps", "minutes"}  # a new field must be added to FULL above


def test_tables_written_in_python_are_those_of_the_file(tmp_path: Path) -> None:
    """Else the same program, run again, would be refused its own run."""
    config = Config("photos", views=({"crop": (0.2, 1.0)}, {"flip": 0.5}), encoder_args={"layers": (1, np.int64(2))})
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert read_toml(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    "text", ['images = "a \\" b\\n"', "images = 'C:\\photos'", 'images = "ü 猫"', 'images = "a\\u007fb"']
)
def test_awkward_text_survives_toml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    config = read_toml(path)
    path.write_text(to_toml(config), encoding="utf-8")
    assert read_toml(path) == config


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown key 'lamda'; did you mean 'lambda'\?"):
        from_mapping({"lamda": 0.1}, "x.toml")
    with pytest.raises(UserError, match="unknown key 'zzz'; known are"):
        from_mapping({"zzz": 0.1}, "x.toml")


def test_dashes_and_underscores_are_the_same_word() -> None:
    assert from_mapping({"batch-size": 64}, "x") == from_mapping({"batch_size": 64}, "x") == Config(batch_size=64)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("batch_size", "many", "is not a whole number"),
        ("batch_size", True, "is not a whole number"),
        ("lambda", "x", "is not a number"),
        ("twins", "siamese", "is not one of shared, unshared"),
        ("encoder", 3, "is not a text"),
        ("cache", 1, "is not true or false"),
        ("mean", [0.1, "b"], "is not a list"),
    ],
)
def test_wrong_types_say_what_is_needed(key: str, value: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_mapping({key: value}, "x.toml")


NO_SETTING = (object(), {1}, 1j, b"x", (object(),), ((1,),), {1: 2}.keys(), np.zeros((2, 2)))
ODD = (
    3,
    2.5,
    True,
    "x",
    (1, "x"),
    (1, 2),
    (0.5,),
    (True,),
    ({"a": 1},),
    {"a": 1},
    Path("x"),
    np.int64(3),
    np.float32(0.5),
    [8],
)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Config)])
def test_from_python_every_field_refuses_what_it_cannot_be_in_one_sentence_or_means_it(
    field: str, tmp_path: Path
) -> None:
    name, taken = field.rstrip("_"), 0
    for value in (*NO_SETTING, *ODD):
        said, config = "", None
        try:
            config = Config(**{field: value})
        except UserError as error:
            said = str(error)
        if config is None:
            assert said.startswith(name), value
            assert len(said.splitlines()) == 1
            assert len(said) < 200
        else:  # what is taken is what a file can hold
            assert not any(value is one for one in NO_SETTING), value
            taken += 1
            (tmp_path / "a.toml").write_text(to_toml(config), encoding="utf-8")
            assert read_toml(tmp_path / "a.toml") == config
    assert taken < len(ODD)


def test_what_is_needed_is_said() -> None:
    for given, words in {
        "steps": "steps = 'x' is not a whole number.",
        "lr": "lr = 'x' is not a number.",
        "twins": "twins = 'x' is not one of shared, unshared.",
        "mean": "mean = 'x' is not a list, each a number.",
        "logger": "logger = ('x',) is not one or more of tensorboard, wandb, mlflow, trackio.",
        "cache": "cache = 'x' is not true or false.",
    }.items():
        with pytest.raises(UserError) as refused:
            Config(**{given: "x"})  # type: ignore[arg-type]
        assert str(refused.value) == words
    for name in ("mean", "mean_b"):
        with pytest.raises(UserError, match=rf"^{name} = \(nan,\) holds something that is no finite number\.$"):
            Config(**{name: (math.nan,)})  # type: ignore[arg-type]
    for name, value in (("std", 0.0), ("std_b", -0.25), ("std_b", math.inf)):
        with pytest.raises(UserError, match=rf"^{name} = .* holds something that is no finite number above 0\.$"):
            Config(**{name: (0.5, value)})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"encoder = 3 is not a text\."):
        Config(encoder=3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a\.toml: lr = -1 is outside its range"):
        from_mapping({"lr": -1}, "a.toml")
    assert Config(Path("photos"), steps=np.int64(3)) == Config("photos", steps=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 1), ("lambda_", -0.1), ("epochs", 0), ("lr", 0), ("warmup", 1.5), ("image_size", 4), ("max_bad", 2),
     ("projector", (8, 0)), ("projector", "8-x"), ("encoder_args", "{"), ("encoder_args", "[1]"),
     ("encoder_args", '{"global_pool": null}'), ("encoder_args", {"layers": [1, None]})],
)  # fmt: skip
def test_values_outside_their_range(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field.rstrip("_")):
        Config(**{field: value})  # type: ignore[arg-type]


def test_spellings_of_the_projector() -> None:
    assert Config(projector="64-32-16").projector == Config(projector="64,32,16").projector == (64, 32, 16)


def test_command_line_goes_over_file() -> None:
    below, above = Config("a", epochs=3, lr=0.1), Config(steps=7, lr=0.2)
    assert merge(below, above) == Config("a", steps=7, lr=0.2)  # one length replaces the other


def test_differences_count_only_what_is_given() -> None:
    old = Config("a", lr=0.1, lambda_=0.005, workers=1)
    assert differences(old, Config(lr=0.1)) == []
    assert differences(old, Config(lambda_=0.01, workers=4), frozenset({"workers"})) == ["lambda: 0.005 → 0.01"]


def test_files_that_are_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("a = = b")
    with pytest.raises(UserError, match="is not TOML"):
        read_toml(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_toml(tmp_path / "b.toml")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_toml(path)
    path.write_text('images = "C:\\pictures"')
    with pytest.raises(UserError, match=r"is not TOML: .*Write a path with '/', or between single quotes"):
        read_toml(path)
    path.write_text("seed = 4", encoding="utf-8-sig")  # as editors of Windows save it
    assert read_toml(path).seed == 4
