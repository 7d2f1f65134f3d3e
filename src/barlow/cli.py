"""The command line: words → settings → one function call; prints, and turns every ending into its exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from barlow.config import Config, merge, read_toml
from barlow.errors import DataError, NumbersError, Stopped, UserError
from barlow.words import HELP, as_json, misread, typed, version_line

app = App(
    name="barlow",
    help=HELP,
    version=version_line,
    suppress_keyboard_interrupt=False,  # main says it
    help_format="plaintext",  # markdown would import a parser that help has no time for
    default_parameter=Parameter(negative_iterable=(), converter=typed),
)
FULL = (errno.ENOSPC, errno.EDQUOT)

Settings = Annotated[Config | None, Parameter(name="*")]


@app.command
def pretrain(
    settings: Settings = None,
    *,
    config: Path | None = None,
    resume: Path | None = None,
    allow: tuple[str, ...] = (),
    replay: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train an encoder on unlabelled images.

    Only the images are needed: every setting that is not given is chosen from them and from this machine, and printed
    with its reason. Repeating the command, or --resume DIR, continues a run to the bit.

    Args:
        config: TOML file with the same words; options on the command line go before it.
        resume: Run folder to continue.
        allow: A setting that may differ from the run that is continued, such as lr; index when images are gone or
            changed; network when the weights do not all fit. May be repeated.
        replay: Run folder whose loss or gradient was not finite: repeat that step and say what broke first.
        dry_run: Print the plan, with time and memory measured on a few steps, and stop.
    """
    given = settings or Config()
    if config is not None:
        given = merge(read_toml(config), given)
    from barlow import run
    from barlow.resume import in_folder

    given = in_folder(given, resume, settings.out if settings else None)
    if replay is not None:
        run.replay(replay)
    else:
        run.pretrain(given, resume=resume is not None, allow=allow, dry_run=dry_run)


@app.command
def evaluate(
    run: Path, /, *, labels: str, images: str | None = None, test: str | None = None, seed: int = 0,
    fine_tune: Annotated[bool, Parameter(negative="")] = False, json: bool = False,
) -> None:  # fmt: skip
    """Measure the encoder of a run with labels, beside the untrained encoder and raw pixels.

    Weighted k-NN, also on whitened features, a linear probe, and probes on 1 % and 10 % of the labels. The result is
    kept in evaluation.json and shown in the report.

    Args:
        run: Run folder.
        labels: sample, a folder of class folders (train/ and test/ inside are used as such), an .npz with labels, or a
            CSV with the columns path and label.
        images: Folder of the images that a CSV labels, which may be a few of many. [default: beside the CSV, else the
            images that the run was trained on]
        test: Labelled images to test on, in the same forms. [default: a fifth of the labels]
        seed: Seed of the draws of few labels, and of the split where there is one.
        fine_tune: Also train the whole network on 10 % and on all labels, beside one from scratch. Takes minutes.
        json: Print the result as JSON.
    """
    from barlow.evaluate import evaluate, table
    from barlow.report import write_report

    result = evaluate(run, labels, images=images, test=test, seed=seed, fine_tune=fine_tune)
    if (run / "metrics.jsonl").is_file():  # not where only an encoder was copied somewhere
        write_report(run)
    print(as_json(result) if json else table(result))


@app.command
def embed(
    run: Path, images: str, /, *, output: Annotated[Path, Parameter(name=["--output", "-o"])], part: str | None = None
) -> None:
    """Write one row an image: its path and its embedding.

    Args:
        run: Run folder or encoder folder.
        images: Anything that pretrain takes.
        output: FILE.parquet, or FILE.npy with FILE.txt (paths); with --part a folder. Only its own is replaced.
        part: The part of the images to do, such as 2/8 for the second of eight processes; what is done already is kept.
    """
    from barlow.parts import embed_as_told

    print(embed_as_told(run, images, output, part))


@app.command
def views(
    images: str, /, *, output: Annotated[Path, Parameter(name=["--output", "-o"])], config: Path | None = None,
    views: str | None = None, image_size: int | None = None, channels: int | None = None, seed: int | None = None,
    count: int = 8,
) -> None:  # fmt: skip
    """Draw a contact sheet of a few images and their random views, before any training.

    What is shown is what a run with the same settings draws in its first epoch.

    Args:
        images: Anything that pretrain takes.
        output: FILE.png. Only its own is replaced.
        config: As in pretrain: such as rows of views of your own.
        views: As in pretrain.
        image_size: As in pretrain.
        channels: As in pretrain.
        seed: As in pretrain.
        count: Number of images.
    """
    from barlow.preview import show_views

    given = Config(images, views=views, image_size=image_size, channels=channels, seed=seed)
    print(show_views(merge(read_toml(config), given) if config else given, output, count))


@app.command
def check(images: str, /, *, split: tuple[str, ...] = (), json: bool = False) -> None:
    """Look at a pile of images before training: unreadable, tiny, constant, duplicate, leaking; what would be chosen.

    Exit code 3 when they cannot be trained on.

    Args:
        images: Anything that pretrain takes.
        split: Other images, such as a test set, that should share none with these. May be repeated.
        json: Print the report as JSON.
    """
    from barlow.preview import check_images, table

    result = check_images(images, split)
    print(as_json(result) if json else table(result))
    sys.exit(0 if result["usable"] else DataError.exit_code)


@app.command
def curate(
    run: Path,
    images: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    picks: int = 100,
    seed: int = 0,
) -> None:
    """Find near-duplicates and outliers by the encoder's features, and choose a diverse set of images to label first.

    Args:
        run: Run folder or encoder folder.
        images: Anything that pretrain takes.
        output: FILE.csv, one row an image, and FILE.png, a contact sheet. Only its own is replaced.
        picks: Number of images to choose.
        seed: Seed of the clustering that chooses them.
    """
    from barlow.curate import curate

    print(f"{output}: {curate(run, images, output, picks=picks, seed=seed)}")


@app.command
def export(
    run: Path, /, *, to: Literal["timm", "onnx", "torch"], output: Annotated[Path, Parameter(name=["--output", "-o"])],
    with_preprocessing: Annotated[bool, Parameter(negative="")] = False, images: str | None = None,
    push: str | None = None,
) -> None:  # fmt: skip
    """Write the encoder for another tool, open it there again, and compare its features with ours.

    When they differ nothing is left behind.

    Args:
        run: Run folder or encoder folder.
        to: timm (a folder, which transformers opens as well), onnx (for ONNX Runtime) or torch (a torch.export .pt2).
        output: Folder, which must be new or empty, FILE.onnx or FILE.pt2; an earlier export is replaced.
        with_preprocessing: Take uint8 images (n, height, width, channels) of any size, not preprocessed ones.
        images: Images to compare on. [default: the held-out images of the run]
        push: Then upload the timm folder to this repository of the Hugging Face Hub, user/name; private if it is new.
    """
    from barlow.export import export_encoder

    done = export_encoder(run, to, output, with_preprocessing=with_preprocessing, images=images, push=push)
    print(f"{done.path}: opened again with {done.tool}; on {done.images:,} images the largest difference is "
          f"{done.difference:.2g}, of features up to {done.largest:.2g}")  # fmt: skip


@app.command
def compare(runs: tuple[Path, ...], /, *, images: str | None = None, json: bool = False) -> None:
    """Rank runs without labels, and say how sure the ranking is.

    Every encoder is asked about the same images in the same random views.

    Args:
        runs: Run folders, two or more.
        images: Images to ask about. [default: the held-out images of the first run]
        json: Print the result as JSON.
    """
    from barlow.compare import compare, table

    result = compare(runs, images)
    print(as_json(result) if json else table(result))


@app.command
def report(run: Path, /) -> None:
    """Draw the single-file report of a run again.

    Args:
        run: Run folder.
    """
    from barlow.report import write_report

    print(write_report(run))


@app.command
def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that completes the words of this program in a shell.

    bash: barlow completion bash > ~/.local/share/bash-completion/completions/barlow

    Args:
        shell: The shell that it is for.
    """
    print(app.generate_completion(shell=shell))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0, or the code of what went wrong, said in one sentence without a traceback."""
    # Threads of torch that wait for each other by spinning without end are up to thirty times slower as soon as another
    # program wants the same cores; those that sleep at once lose a quarter on quiet ones. A millisecond of spinning
    # costs nothing in either case (docs/log.md, "Threads that spin"). This is read once, when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    _streams()
    try:
        try:
            app(arguments, exit_on_error=False, print_error=False)
        finally:
            sys.stdout.flush()  # a full disk, or a reader that has left, shows here and not behind our back at the exit
    except CycloptsError as error:
        fail(f"barlow: {misread(error)}", UserError.exit_code)
    except (UserError, DataError, NumbersError, Stopped) as error:
        fail(f"barlow: {error}", error.exit_code)
    except BrokenPipeError:
        _forget_output()  # whoever read it has left
        sys.exit(0)
    except OSError as error:
        if error.errno in FULL:  # of standard output there is no name
            _forget_output()
            fail(f"barlow: {error.filename or 'standard output'} cannot be written: {error.strerror}; make room", 75)
        if error.filename is None:
            raise
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
        from barlow.files import in_the_way

        fail(f"barlow: {in_the_way(Path(name))} cannot be used: {error.strerror}", UserError.exit_code)
    except KeyboardInterrupt:
        fail("barlow: interrupted", 130)


def _streams() -> None:
    """Letters that a terminal or a pipe cannot show are escaped, not an error at the end of an hour; a stream that was
    closed before we began (``2>&-``, or no console) swallows what is said."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for as long as we live
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries once more when it exits


def fail(sentence: str, code: int) -> None:
    """Prints one sentence on standard error and exits."""
    print(sentence, file=sys.stderr)
    sys.exit(code)
