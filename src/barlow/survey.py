"""Before a run: the images opened and looked at, what is not given chosen, and all of it said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from barlow.check import animated, laid_on_white, marked, several_pages
from barlow.config import Config
from barlow.console import say, say_choice
from barlow.convert import range_in_words
from barlow.draws import IntArray
from barlow.errors import UserError
from barlow.images import Images, open_images
from barlow.index import modes
from barlow.objective import floor
from barlow.own import Own
from barlow.plan import Choice, Findings, doubt, resolve
from barlow.prepare import NONE, build_encoders, choose_cache, look, views_of
from barlow.views import View

LONG = 0.1  # share of long images from which on they are warned of


def survey(config: Config, images: Any, own: Own = NONE) -> tuple[Images, Config, list[Choice]]:
    """(images, resolved settings, automatic choices with their reasons)."""
    if images is None and config.images is None:
        raise UserError("No images are named: barlow pretrain IMAGES, with a folder, an array file or sample.")
    if sum(value is not None for value in (config.epochs, config.steps, config.minutes)) > 1:
        raise UserError("Give one of --epochs, --steps and --minutes, not several.")
    source: Any = images if images is not None else config.images
    opened = open_images(source, channels=config.channels, channels_b=config.channels_b)
    found = look(opened, config.devices)
    resolved, choices = resolve(config, found)
    for warning in filter(None, (doubt(resolved, found), long_images(found, opened.sizes))):
        say(f"warning: {warning}")
    resolved, more = choose_cache(resolved, opened, asked=bool(config.cache or config.cache_form))
    choices = [choice for choice in choices if choice.word not in {other.word for other in more}] + more
    if own.views is None:
        views_of(resolved)  # what cannot be built is refused before anything is printed or written
    elif len(own.views) != 2 and resolved.twins == "unshared":
        raise UserError(f"pairs and unshared twins take two views, not {len(own.views)}.")
    if opened.shape and any(isinstance(view, View) for view in own.views or ()):
        raise UserError("Samples are no images: their views are functions of your own (samples, generator), no View.")
    build_encoders(resolved, opened, own)
    return opened, resolved, choices


def long_images(found: Findings, sizes: IntArray | None = None) -> str:
    """What to warn of where less than half of an image will be seen by its features: a sentence, or nothing. By the
    usual size, and by the share of such images where their ``sizes`` (n, 2) are given."""
    long = max(found.height, found.width)
    if 2 * found.side >= long:
        count = 0 if sizes is None else int((2 * sizes.min(1) < sizes.max(1)).sum())
        if count <= LONG * found.images:
            return ""
        return (f"{count:,} of {found.images:,} images are more than twice as long as wide, or the reverse: features "
                "come from the middle square alone; where the rest counts, save each as several squares")  # fmt: skip
    return (f"these images are about {found.width} × {found.height} pixels: views are cut from anywhere, but features "
            f"come from the middle square, {found.side / long:.0%} of an image; where the rest counts, save each as "
            "several squares")  # fmt: skip


def show_choices(images: Images, config: Config, choices: Sequence[Choice]) -> None:
    """Prints what was found, then every automatic choice with its reason."""
    left_out = f", {images.bad.num_rows:,} unusable left out" if images.bad.num_rows else ""
    what = "samples" if images.shape else "images"
    say(f"{len(images):,} {what if images.second is None else f'pairs of {what}'}{left_out}")
    for one in (images, images.second):
        if one is None:
            continue
        if words := range_in_words(one.dtype, one.value_range):
            say(f"{words}{', of the second images' if one is images.second else ''}")
        if count := animated(modes(one.rows)):
            say(f"note: {several_pages(count)}")
        if count := marked(modes(one.rows), one.channels):
            say(f"note: {laid_on_white(count, '--channels-b' if one is images.second else '--channels')}")
    for choice in choices:
        say_choice(choice.word, choice.value, choice.reason)
    dim = config.projector[-1] if isinstance(config.projector, tuple) else 0
    least = floor(config.batch_size or 0, int(dim), config.lambda_ or 0)
    say_choice("floor", round(least, 2), "the least that the loss can be with this batch, width and λ")
