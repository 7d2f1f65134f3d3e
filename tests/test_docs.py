"""The documentation keeps its word: what it shows runs, what it names exists, and the reference leaves nothing out."""

from __future__ import annotations

import csv
import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import blobs
from pages import PAGES, ROOT, blocks, ended, run_page, short, small_sample, starts_with
from PIL import Image

from barlow.cli import app, main
from barlow.config import Config, read_toml, word
from barlow.runlog import read_metrics

README = ROOT / "README.md"
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PROSE = re.compile(r"`barlow ([^`]+)`")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, labels.csv and, trained once for all pages, runs/photos."""
    folder = tmp_path_factory.mktemp("docs")
    sample = small_sample(folder / "sample")
    with pytest.MonkeyPatch.context() as patch, short(sample):
        patch.setenv("BARLOW_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        rows = []
        for k, picture in enumerate(blobs(80, 32)):
            path = Path("photos", ("scratch", "sound")[k % 2], f"{k:03d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
            rows.append([path.relative_to("photos"), path.parent.name])
        with Path("labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["path", "label"], *rows])
        assert ended(lambda: main(["pretrain", "photos", "--out", "runs/photos"])) == 0
    return folder  # outside: what is patched here must not be so for the other files of tests


@pytest.mark.filterwarnings("ignore:Pretrained (mean|std)")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_what_a_page_shows_runs(page: Path, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ready / "photos", tmp_path / "photos")
    shutil.copy(ready / "labels.csv", tmp_path)
    if run := starts_with(page):
        shutil.copytree(ready / "runs/photos", tmp_path / run)
    monkeypatch.setenv("BARLOW_CACHE", str(ready / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with short(ready / "sample" / "train.npz"):
        passed_over = run_page(page)
    if page == README:
        import timm

        assert timm.create_model("local-dir:runs/readme/encoder", pretrained=True).num_classes == 0
    if passed_over:
        pytest.skip("; ".join(passed_over))


COMMANDS = sorted(
    {(name(page), command) for page in PAGES for block in blocks(page) if block.language == "bash"
     for command in block.commands() if command.startswith("barlow ") and "exit code 2" not in command}
    | {(name(recipe), line) for recipe in RECIPES
       for line in re.findall(r"^#   (barlow [a-z].*)$", recipe.read_text("utf-8"), re.MULTILINE)}
)  # fmt: skip


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_are_understood(page: str, command: str) -> None:
    """Those of blocks that are not run, too."""
    words = shlex.split(command.split(" > ")[0], comments=True)[1:]
    if not {"--help", "--version"} & set(words):
        app.parse_args(words, exit_on_error=False, print_error=False)


def options(verb: str) -> set[str]:
    arguments = app[verb].assemble_argument_collection()
    return {option for argument in arguments for option in argument.names}


VERBS = [verb for verb in app if not verb.startswith("-")]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_words_in_the_text_exist(page: Path) -> None:
    """Verbs and options that a sentence names: `barlow embed -o`, `--micro-batch`."""
    every = {option for verb in VERBS for option in options(verb)} | {"--help", "--version"}
    text = prose(page)
    for words in PROSE.findall(text):
        verb, *rest = words.split()
        known = options(verb) if verb in VERBS else {"--help", "--version"}
        assert verb in VERBS or verb in known, words
        assert {w.split("=")[0] for w in rest if w.startswith("-")} <= known | {"--help"}, words
    for part in text.split("\n\n"):
        if not re.search("benchmarks/|examples/", part):  # programs with options of their own
            found = set(re.findall(r"`(--[a-z][a-z-]*)[^`]*`", part))
            assert found <= every, f"{name(page)}: {found - every}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    text = prose(page)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), f"{name(page)}: {target}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_settings(recipe: Path) -> None:
    read_toml(recipe)


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(listed) == there
    assert len(listed) == len(there)


def test_every_example_is_shown() -> None:
    text = (ROOT / "docs/how-to/examples.md").read_text(encoding="utf-8")
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(
        re.findall(r"<!-- source: examples/(\w+\.py) -->", text)
    )


def test_every_verb_and_setting_is_in_the_reference() -> None:
    shown = set(re.findall(r"<!-- help: (\w+) -->", (ROOT / "docs/reference/command-line.md").read_text("utf-8")))
    assert shown == set(VERBS)
    told = re.findall(r"^        (\w+): ", Config.__doc__ or "", re.MULTILINE)
    assert told == [field.name for field in dataclasses.fields(Config) if word(field.name)]


def test_every_key_of_metrics_and_every_file_is_explained(ready: Path) -> None:
    text = prose(ROOT / "docs/reference/run-folder.md")
    words = {part for code in re.findall(r"`([^`]+)`", text) for part in re.split(r"[\s,]+", code)}
    lines = read_metrics(ready / "runs/photos/metrics.jsonl")
    assert {key for line in lines for key in line} <= words
    assert {line["kind"] for line in lines} <= words
    assert {path.name for path in (ready / "runs/photos").iterdir() if not path.name.startswith(".")} <= {
        word.rstrip("/") for word in words
    }


def test_pictures_are_small() -> None:
    pictures = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".webp", ".svg")]
    assert pictures
    assert {path.name: path.stat().st_size for path in pictures if path.stat().st_size > 200_000} == {}
