"""What the pages show of the program itself, put in while the site is built, so that it cannot differ from it.

<!-- help: pretrain -->   the real --help of a verb (of the program where no verb is named)
<!-- settings -->         every setting with its type, what it means, and what is chosen where it is not given
<!-- view -->             every field of a view with its default and what it does
<!-- source: FILE -->     a file of the repository, folded up under its name
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console

from barlow.cli import app
from barlow.config import Config, word

ROOT = Path(__file__).parent.parent.parent
WIDTH = 80  # columns of the help: what fits beside both navigations
WEIGHTS = {"how-to/": 3, "reliability": 0.5, "log": 0.3, "reference/changelog": 0.3, "contributing": 0.3}  # in a search


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of every page. A search finds what helps before what was tried and changed."""
    found = [weight for start, weight in WEIGHTS.items() if page.file.src_uri.startswith(start)]
    page.meta["search"] = {"boost": found[0] if found else 1}
    marks = (("help: ?(\\w*)", helped), ("settings()", settings), ("view()", view), ("source: (\\S+)", source))
    for mark, made in marks:
        markdown = re.sub(f"^<!-- {mark} -->$", lambda found, made=made: made(found[1]), markdown, flags=re.MULTILINE)
    return markdown


def helped(verb: str) -> str:
    """The help of a verb as a block of text."""
    page = io.StringIO()
    console = Console(file=page, width=WIDTH, color_system=None, force_terminal=False)
    app.help_print([verb] if verb else [], console=console)
    lines = [line.rstrip() for line in page.getvalue().strip("\n").splitlines()]
    return "\n".join(["```text", *lines, "```"])


def settings(_: str = "") -> str:
    """A table of all fields of ``Config``, from its docstring: the word, its type, the meaning."""
    from barlow.plan import RULES  # here, because it imports torch, and most pages do without

    text = inspect.getdoc(Config) or ""
    told = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text.partition("Attributes:\n")[2], re.MULTILINE))
    types, rows = get_type_hints(Config), ["| setting | meaning |", "|---|---|"]
    for field in dataclasses.fields(Config):
        meaning, _, default = " ".join(told[field.name].split()).partition(" [default: ")
        default = default.rstrip("]") or ("chosen" if field.name in RULES else "")
        meaning += f" *Not given: {default}.*" if default else ""
        name = word(field.name)
        rows.append(f"| `{name}`{{ #{name} }}<br>{spelled(types[field.name])} | {meaning.replace('|', '¦')} |")
    return "\n".join(rows)


def view(_: str = "") -> str:
    """A table of all fields of ``View``, from its source: the comment behind each says what it is."""
    from barlow.views import View

    fields = re.findall(r"^    (\w+): [^=]+ = (.+?)  # (.+)$", inspect.getsource(View), re.MULTILINE)
    assert [name for name, _, _ in fields] == [field.name for field in dataclasses.fields(View)]
    rows = [f"| `{name}` | `{value}` | {comment} |" for name, value, comment in fields]
    return "\n".join(["| field | not given | meaning |", "|---|---|---|", *rows])


def source(name: str) -> str:
    """A file of the repository as a block that is folded up."""
    lines = (ROOT / name).read_text(encoding="utf-8").rstrip("\n").splitlines()
    inside = [f"```{'toml' if name.endswith('.toml') else 'python'}", *lines, "```"]
    return "\n".join([f'??? example "{name}"', "", *("    " + line if line else "" for line in inside)])


def spelled(kind: Any) -> str:
    """The type in words."""
    plain = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}
    parts = []
    for part in getattr(kind, "__args__", (kind,)):
        name = getattr(part, "__name__", str(part))
        if name == "Literal":
            parts.append(" or ".join(f"`{value}`" for value in part.__args__))
        elif name in ("tuple", "dict"):
            parts.append("list" if name == "tuple" else "table")
        elif part is not type(None):
            parts.append(plain.get(name, name))
    return " or ".join(dict.fromkeys(parts))
