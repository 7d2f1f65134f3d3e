"""The command line: verbs, exit codes, one clear sentence for each mistake, nothing lost, no traceback."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import blobs
from PIL import Image

import barlow
from barlow.cli import app, main
from barlow.config import Config
from barlow.preview import show_views

RUN = ["--steps", "2", "--batch-size", "16", "--encoder", "resnetv2_18", "--image-size", "32", "--projector", "16-16",
       "--encoder-args", '{"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_chs": 8}', "--held-out", "8",
       "--precision", "float32", "--devices", "1", "--workers", "0"]  # fmt: skip

OPTIONS = """--config --encoder --image-size --batch-size --projector --lambda --views --twins --epochs --steps
--minutes --optimizer --lr --precision --workers --devices --seed --checkpoint-every --time-limit --micro-batch
--resume --dry-run --out"""  # the names that the command line has promised to keep


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of one command."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    out = capsys.readouterr()
    code = ended.value.code
    return (0 if code is None else int(code)), out.out, out.err


def folder(path: Path, count: int = 40) -> Path:
    path.mkdir()
    for i, picture in enumerate(blobs(count)):
        Image.fromarray(picture).save(path / f"{i:03d}.png")
    return path


def test_verbs() -> None:
    verbs = {name for command in app for name in [command] if not name.startswith("-")}
    assert verbs == {
        "check", "compare", "completion", "curate", "embed", "evaluate", "export", "pretrain", "report", "views",
    }  # fmt: skip


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--version")
    assert code == 0
    assert out.startswith(f"barlow {barlow.__version__}, torch {torch.__version__}, ")
    shown = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "(no GPU)"
    assert shown in out


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["pretrain", "--help"]])
def test_help_and_version_do_not_import_torch(words: list[str]) -> None:
    """Through the module, as where the script is not on the path. The time itself is noise on a busy machine."""
    program = "import runpy, sys\ntry: runpy.run_module('barlow', run_name='__main__')\n"
    program += "finally: assert not {'torch', 'numpy', 'pyarrow', 'timm'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "barlow" in done.stdout


@pytest.mark.parametrize("imported", ["cyclopts", "torch"])
@pytest.mark.parametrize("ignored", [False, True])
def test_an_interrupt_during_the_imports_leaves_no_traceback(tmp_path: Path, imported: str, ignored: bool) -> None:
    """The script of the package and the module begin alike; what is imported then sends the signal itself."""
    stand_in = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(7)"
    (tmp_path / f"{imported}.py").write_text(stand_in)
    handler = "SIG_IGN" if ignored else "default_int_handler"  # set in any case: the tests may run where it is ignored
    program = f"import signal; signal.signal(signal.SIGINT, signal.{handler}); from barlow.__main__ import main; main()"
    paths = os.pathsep.join([str(tmp_path), str(Path(barlow.__file__).parent.parent)])
    done = subprocess.run([sys.executable, "-c", program, "views", "sample", "-o", "a.png"], capture_output=True,
                          text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})  # fmt: skip
    assert (done.returncode, done.stderr) == ((7, "") if ignored else (130, "barlow: interrupted\n"))


def test_the_script_of_the_package_is_the_module() -> None:
    about = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert tomllib.loads(about)["project"]["scripts"] == {"barlow": "barlow.__main__:main"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_verbs_and_their_options(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    code, out, _ = call(capsys, "completion", shell)
    assert code == 0
    for word in ("pretrain", "export", "batch-size", "with-preprocessing"):
        assert word in out
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=out, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_help_lists_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    listed = {int(word[0]) for line in out.splitlines() if (word := line.split()) and word[0].isdecimal()}
    assert code == 0
    assert listed == {0, 2, 3, 4, 75, 130, 143}


def test_help_has_the_promised_names(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "pretrain", "--help")
    assert code == 0
    for option in OPTIONS.split():
        assert option in out


def test_pretrain_then_embed_then_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images, run, output = folder(tmp_path / "images"), tmp_path / "run", tmp_path / "e.parquet"
    code, out, err = call(capsys, "pretrain", images, "--out", run, *RUN)
    assert code == 0, err
    assert out == ""  # standard output is for results
    assert "step 2 of 2" in err
    assert "twins found" in err
    assert "floor" in err
    code, out, err = call(capsys, "embed", run, images, "-o", output)
    assert (code, out) == (0, f"{output}: 40 rows\n"), err
    table = pq.read_table(output)
    assert table.column_names == ["path", "embedding"]
    assert table["path"].to_pylist() == [f"{i:03d}.png" for i in range(40)]
    assert len(table["embedding"][0]) == 8
    code, out, _ = call(capsys, "embed", run, images, "-o", tmp_path / "e.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "e.npy"), np.stack(table["embedding"].to_pylist()).astype("f4"))
    assert (tmp_path / "e.txt").read_text().split() == table["path"].to_pylist()
    code, out, err = call(capsys, "export", run, "--to", "timm", "-o", tmp_path / "folder")
    assert code == 0, err
    assert "opened again with timm; on 8 images the largest difference is" in out
    assert "32 images of `images`" in (tmp_path / "folder" / "README.md").read_text()  # and eight held out
    code, out, _ = call(capsys, "report", run)
    assert (code, out.strip()) == (0, str(run / "report.html"))


def test_broken_files_are_quarantined_and_the_run_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images, run = folder(tmp_path / "images"), tmp_path / "run"
    (images / "words.jpg").write_text("this is no picture")
    (images / "empty.png").touch()
    code, _, err = call(capsys, "pretrain", images, "--out", run, *RUN)
    assert code == 0, err
    text = (run / "quarantine.jsonl").read_text()
    assert "words.jpg" in text
    assert "empty.png" in text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of 40 images, finished run on them)."""
    tmp = tmp_path_factory.mktemp("trained")
    images, run = folder(tmp / "images"), tmp / "run"
    with pytest.raises(SystemExit):
        main(["pretrain", str(images), "--out", str(run), *RUN])
    return images, run


def test_labels_for_a_few_of_the_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, trained: tuple[Path, Path]
) -> None:
    """A table of labels that lies elsewhere is about the images of the run, and need not name them all."""
    images, run = trained
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n" + "".join(f"{i:03d}.png,{'ab'[i % 2]}\n" for i in range(30)))
    for more in ([], ["--images", images]):
        code, out, err = call(capsys, "evaluate", run, "--labels", table, *more)
        assert code == 0, err
        assert "accuracy on 6 images, 24 for training" in out
        for row in (
            "k-NN (24 labels)",
            "k-NN whitened (24 labels)",
            "linear (24 labels)",
            "1 % of labels",
            "10 % of labels",
        ):
            assert row in out
        page = (run / "report.html").read_text(encoding="utf-8")
        assert "With labels" in page
        (run / "report.html").unlink()
    table.write_text("path,label\nelsewhere/x.png,cat\nelsewhere/y.png,dog\n")
    code, _, err = call(capsys, "evaluate", run, "--labels", table)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "none of the paths in" in err


def test_embed_names_what_it_leaves_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, trained: tuple[Path, Path]
) -> None:
    images, run = folder(tmp_path / "images", 4), trained[1]
    (images / "words.jpg").write_text("this is no picture")
    code, out, err = call(capsys, "embed", run, images, "-o", tmp_path / "e.npy")
    assert (code, err) == (0, "left out words.jpg: text, not an image\n")
    assert out.endswith("e.npy: 4 rows\n")


def test_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images, run = folder(tmp_path / "images"), tmp_path / "run"
    code, _, err = call(capsys, "pretrain", images, "--out", run, "--dry-run", *RUN)
    assert code == 0, err
    assert "plan              2 steps: " in err
    assert "peak memory" in err
    assert not run.exists()


def test_config_file_and_option_over_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images, run, recipe = folder(tmp_path / "images"), tmp_path / "run", tmp_path / "recipe.toml"
    recipe.write_text(f'images = "{images}"\nout = "{run}"\nlambda = 0.5\nseed = 3\n')
    code, _, err = call(capsys, "pretrain", "--config", recipe, "--seed", "4", *RUN)
    assert code == 0, err
    written = (run / "config.toml").read_text()
    assert "lambda = 0.5" in written
    assert "seed = 4" in written


def mistakes(tmp: Path) -> dict[str, tuple[list[object], str]]:
    """What people do, and words of the answer."""
    images = folder(tmp / "images")
    (tmp / "none").mkdir()
    (tmp / "one").mkdir()
    Image.fromarray(blobs(1)[0]).save(tmp / "one" / "a.png")
    (tmp / "two").mkdir()
    for name in "ab":
        Image.fromarray(blobs(1)[0]).save(tmp / "two" / f"{name}.png")
    (tmp / "tables.toml").write_text("[training]\nlr = 1")
    (tmp / "empty.npy").touch()
    (tmp / "thesis").mkdir()
    (tmp / "thesis" / "chapter1.tex").write_text("dear reader")
    (tmp / "bad.toml").write_text("lamda = 0.1")
    (tmp / "begun").mkdir()
    (tmp / "begun" / "config.toml").touch()
    (tmp / "labels.csv").write_text("path,label\nelsewhere/x.png,cat\n")
    return {
        "no images named": (["pretrain"], "No images are named"),
        "no such folder": (["pretrain", tmp / "nowhere"], "nowhere"),
        "no images in it": (["pretrain", tmp / "none", "--out", tmp / "o"], "none"),
        "one image": (["pretrain", tmp / "one", "--out", tmp / "o"], "only one usable image"),
        "empty array file": (["pretrain", tmp / "empty.npy", "--out", tmp / "o"], "empty.npy"),
        "out is something else": (["pretrain", images, "--out", tmp / "thesis"], "chapter1.tex"),
        "out is a file": (["pretrain", images, "--out", tmp / "bad.toml"], "is a file"),
        "batch too large": (["pretrain", images, "--out", tmp / "o", "--batch-size", 64], "batch_size = 64 is larger"),
        "unknown encoder": (["pretrain", images, "--out", tmp / "o", "--encoder", "resnet81"], "no encoder 'resnet81'"),
        "unknown views": (["pretrain", images, "--out", tmp / "o", "--views", "wild"], "views = 'wild'"),
        "unknown key": (["pretrain", images, "--config", tmp / "bad.toml"], "did you mean 'lambda'"),
        "two lengths": (["pretrain", images, "--out", tmp / "o", "--steps", 2, "--minutes", 1], "Give one of"),
        "unknown option": (["pretrain", images, "--lamda", 1], "Did you mean --lambda"),
        "not a number": (["pretrain", images, "--lr", "fast"], "--lr"),
        "resume of nothing": (["pretrain", "--resume", tmp / "none"], "no run to resume"),
        "no such run": (["embed", tmp / "none", images, "-o", tmp / "e.npy"], "neither a run folder"),
        "no encoder yet": (["embed", tmp / "begun", images, "-o", tmp / "e.npy"], "begun is not finished: go on with"),
        "export to nowhere": (["export", tmp / "none", "--to", "timm", "-o", tmp / "e"], "neither a run folder"),
        "export to what": (["export", tmp / "none", "--to", "caffe", "-o", tmp / "e"], "--to"),
        "report of nothing": (["report", tmp / "none"], "none"),
        "unknown verb": (["train", images], "Unknown command"),
        "one word too many": (["pretrain", images, "more"], "Nothing is done with 'more'"),
        "no value": (["pretrain", images, "--lr"], "--lr requires an argument"),
        "empty images": (["pretrain", ""], "images is empty"),
        "empty out": (["pretrain", images, "--out", ""], "out is empty"),
        "two images": (["pretrain", tmp / "two", "--out", tmp / "o"], "2 usable images, of which 2 are held out"),
        "all held out": (["pretrain", images, "--out", tmp / "o", "--held-out", 39], "of which 39 are held out"),
        "negative lr": (["pretrain", images, "--lr", -1], "lr = -1.0 is outside its range"),
        "lr not a number": (["pretrain", images, "--lr", "nan"], "lr = nan is outside its range"),
        "image size of nothing": (["pretrain", images, "--image-size", 0], "image_size = 0 is outside its range"),
        "half a pixel": (["pretrain", images, "--image-size", 9.5], "'9.5' is not a whole number"),
        "no projector": (["pretrain", images, "--projector", "abc"], "projector 'abc' is not a list of widths"),
        "sd of nothing": (["pretrain", images, "--std", 0], "std = (0.0,) holds"),
        "mean not a number": (["pretrain", images, "--mean", "nan"], "mean = (nan,) holds"),
        "mean of other channels": (
            ["pretrain", images, "--out", tmp / "o", "--mean", 0.5, "--mean", 0.5],
            "mean has 2 values for 1 channels",
        ),
        "channels mismatch": (["pretrain", images, "--out", tmp / "o", "--channels", 4], "can have 4 channels"),
        "arguments not JSON": (["pretrain", images, "--encoder-args", '{"layers":'], "is not JSON"),
        "arguments not an object": (["pretrain", images, "--encoder-args", "[1]"], "is not a JSON object"),
        "arguments that timm does not know": (
            ["pretrain", images, "--out", tmp / "o", "--encoder-args", '{"depth": 3}'],
            "unexpected keyword argument 'depth'",
        ),
        "an encoder on a hub": (
            ["pretrain", images, "--out", tmp / "o", "--encoder", "hf-hub:some/model"],
            "knows no encoder 'hf-hub:some/model'",
        ),
        "unknown optimiser": (["pretrain", images, "--optimizer", "sgd"], 'Invalid value "sgd"'),
        "not a length of time": (
            ["pretrain", images, "--out", tmp / "o", "--time-limit", "soon", *RUN],
            "'soon' is no length of time",
        ),
        "no such config": (["pretrain", images, "--config", tmp / "none.toml"], "none.toml cannot be read"),
        "config not TOML": (["pretrain", images, "--config", tmp / "labels.csv"], "is not TOML"),
        "config of tables": (["pretrain", images, "--config", tmp / "tables.toml"], "unknown key 'training'"),
        "three outputs": (["embed", tmp / "none", images, "-o", tmp / "e.csv"], "must end in .parquet or .npy"),
        "no such part": (["embed", tmp / "none", images, "-o", tmp / "e", "--part", "9/8"], "There is no part 9 of 8"),
        "not a part": (["embed", tmp / "none", images, "-o", tmp / "e", "--part", "two"], "is not a part such as 2/8"),
        "output nowhere": (["views", images, "-o", tmp / "nowhere" / "v.png"], "does not exist; make it first"),
        "a sheet that is no PNG": (["views", images, "-o", tmp / "v.jpg"], "name it v.png"),
        "sheet of nothing": (["views", images, "-o", tmp / "v.png", "--count", 0], "count = 0"),
        "evaluate nothing": (["evaluate", tmp / "none", "--labels", "sample"], "neither a run folder"),
        "check of nothing": (["check", tmp / "none"], "no images"),
    }


def test_mistakes_are_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, (words, answer) in mistakes(tmp_path).items():
        code, out, err = call(capsys, *words)
        assert code == 2, (name, err)
        assert answer in " ".join(f"{out} {err}".replace("│", " ").split()), (name, err)
        assert "Traceback" not in err, (name, err)
        assert len(err.strip().splitlines()) == 1, (name, err)
        assert err.startswith("barlow: "), (name, err)
    assert not (tmp_path / "o" / "config.toml").exists()
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "dear reader"
    assert (tmp_path / "bad.toml").read_text() == "lamda = 0.1"
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


# ---- outputs, and who reads them


def test_no_output_replaces_the_images_or_becomes_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Kills: the list of the images replaced by the list of the rows; a contact sheet that the next run trains on."""
    images, run = folder(tmp_path / "images", 24), tmp_path / "run"
    assert call(capsys, "pretrain", images, "--out", run, *RUN)[0] == 0
    listed, table, column = tmp_path / "l.txt", tmp_path / "t.csv", tmp_path / "c.parquet"
    listed.write_text("".join(f"images/{i:03d}.png\n" for i in range(24)))
    table.write_text("path\n" + listed.read_text())
    pq.write_table(pa.table({"image": [path.read_bytes() for path in sorted(images.iterdir())]}), column)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "notes.png").write_text("mine")
    (tmp_path / "labels.csv").write_text("path,label\n0.png,x\n")
    pq.write_table(pa.table({"path": ["0.png"], "text": ["x"]}), tmp_path / "texts.parquet")
    np.save(tmp_path / "stack.npy", blobs(3))
    (tmp_path / "stack.txt").write_text("mine")
    Image.fromarray(blobs(1)[0]).save(tmp_path / "photo.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words, answer in (
        (["embed", run, listed, "-o", tmp_path / "l.npy"], "l.txt would be written too, and is there already"),
        (["embed", run, column, "-o", column], "c.parquet is where the images come from"),
        (["curate", run, table, "-o", table], "t.csv is where the images come from"),
        (["curate", run, images, "-o", images / "found.csv"], "found.png would lie among the images"),
        (["embed", run, images, "-o", images / "found.npy"], "found.npy would lie among the images"),
        (["views", images, "-o", images / "views.png"], "views.png would lie among the images"),
        (["embed", run, images, "-o", tmp_path / "notes.npy"], "notes.txt would be written too, and is there already"),
        (["curate", run, images, "-o", tmp_path / "notes.csv"], "notes.png would be written too, and is there already"),
        (
            ["curate", run, images, "-o", tmp_path / "labels.csv"],
            "labels.csv is there already, and is no earlier",
        ),
        (["embed", run, images, "-o", tmp_path / "texts.parquet"], "texts.parquet is there already"),
        (["embed", run, images, "-o", tmp_path / "stack.npy"], "stack.npy is there already"),
        (["views", images, "-o", tmp_path / "photo.png"], "photo.png is there already"),
        (["views", images, "-o", tmp_path / "notes.png"], "notes.png is there already"),
    ):
        code, _, err = call(capsys, *words)
        assert (code, answer in err) == (2, True), (words, err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for _ in range(2):  # one's own output may be replaced
        assert call(capsys, "embed", run, listed, "-o", tmp_path / "e.npy")[0] == 0
        assert call(capsys, "embed", run, listed, "-o", tmp_path / "e.parquet")[0] == 0
        assert call(capsys, "curate", run, listed, "-o", tmp_path / "e.csv")[0] == 0
        assert call(capsys, "views", listed, "-o", tmp_path / "v.png", "--count", 1)[0] == 0
    assert (tmp_path / "e.txt").read_text() == listed.read_text()


def test_curate_names_what_it_leaves_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images, run = folder(tmp_path / "images", 24), tmp_path / "run"
    assert call(capsys, "pretrain", images, "--out", run, *RUN)[0] == 0
    (images / "x.png").write_bytes(b"\x89PNG and no more")
    code, out, err = call(capsys, "curate", run, images, "-o", tmp_path / "c.csv")
    assert code == 0
    assert "24 images" in out
    assert "left out x.png: " in err


def test_a_run_whose_images_were_left_behind_says_where_it_looked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "images", 24)
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        assert call(capsys, "pretrain", "images", "--out", name, *RUN)[0] == 0
    (tmp_path / "else" / "where").mkdir(parents=True)
    for name in "ab":
        shutil.move(tmp_path / name, tmp_path / "else" / name)
    monkeypatch.chdir(tmp_path / "else")
    for words in (["compare", "a", "b"], ["pretrain", "--resume", "a"]):
        code, _, err = call(capsys, *words)
        assert code == 2
        assert f"there is no folder images (looked for from {tmp_path / 'else'})" in err
    assert call(capsys, "compare", "a", "b", "--images", "../images")[0] == 0
    longer = ["--steps", "3", "--allow", "steps", "--allow", "images"]
    assert call(capsys, "pretrain", "../images", "--resume", "a", *longer)[0] == 0


def test_letters_that_cannot_be_shown_and_streams_that_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a traceback after the work is done, because of a dash or of nobody who listens."""
    images, raw = folder(tmp_path / "ünï → ρ", 24), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as ended:
        main(["check", str(images)])
    assert ended.value.code == 0
    assert rb"runs/\xfcn\xef \u2192 \u03c1: named after" in raw.getvalue()
    sys.stderr.close()


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Kills: what is said on standard error at a signal, in the file of the lock or of the metrics."""
    program = (
        "import os, sys\nfor number in range(3): os.close(number)\nimport barlow.cli, barlow.__main__\n"
        "def opens():\n with open(sys.argv[1], 'w') as file: file.write(str(file.fileno()))\n"
        "barlow.cli.main = opens\nbarlow.__main__.main()"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "number"], check=False)
    assert done.returncode == 0
    assert int((tmp_path / "number").read_text()) > 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_output_onto_a_full_disk_is_one_sentence() -> None:
    words = [sys.executable, "-c", "from barlow.cli import main; main(['completion', 'bash'])"]
    quiet = {**os.environ, "PYTHONUNBUFFERED": ""}  # the failure then comes at the very end
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=quiet)
    assert done.stderr == "barlow: standard output cannot be written: No space left on device; make room\n"
    assert done.returncode == 75


def test_an_interruption_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("barlow.report.write_report", interrupted)
    assert call(capsys, "report", tmp_path) == (130, "", "barlow: interrupted\n")


def test_names_that_a_shell_or_a_settings_file_cannot_take(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images, run = folder(tmp_path / "images", 24), tmp_path / "a run #1"
    assert call(capsys, "pretrain", images, "--out", run, *RUN)[0] == 0
    code, _, err = call(capsys, "pretrain", "--resume", run, "--steps", 3, "--allow", "steps", "--time-limit", "0.001s")
    assert (code, f"--resume '{run}'" in err) == (75, True), err
    code, _, err = call(capsys, "pretrain", images, "--out", os.fsdecode(bytes(tmp_path) + b"/r\xff"), *RUN)
    assert (code, "r\\xff is no UTF-8, and cannot stand in config.toml: rename it" in err) == (2, True), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a run #1", "images"]


def test_the_sheet_of_views_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of one's own cannot be typed; what is typed goes before the file, as in pretrain."""
    images, rows = folder(tmp_path / "in", 4), ({"flip": 1.0}, {"crop": (0.2, 0.3)})
    file = tmp_path / "mild.toml"
    file.write_text("seed = 3\nepochs = 9\n[[views]]\nflip = 1.0\n[[views]]\ncrop = [0.2, 0.3]\n")
    for typed, config in (
        ([], Config(str(images), views=rows, seed=3)),
        (["--views", "small", "--seed", 4], Config(str(images), views="small", seed=4)),
    ):
        assert call(capsys, "views", images, "-o", tmp_path / "a.png", "--config", file, *typed)[0] == 0
        expected = show_views(config, tmp_path / "b.png", 8).read_bytes()
        assert (tmp_path / "a.png").read_bytes() == expected
