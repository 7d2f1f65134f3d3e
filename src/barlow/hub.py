"""The only room that sends anything anywhere, and only when the user asked: an encoder folder → a Hub repository."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from barlow.errors import UserError, first_line


def check_push(name: str) -> None:
    """UserError unless ``name`` is user/name and there are credentials: asked before anything is exported."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--push {name!r} is not the name of a repository such as user/name.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name!r} is not a name that the Hub takes: {error}") from None
    if not get_token():
        raise UserError("--push needs credentials for the Hugging Face Hub: run 'hf auth login', or set HF_TOKEN.")


def upload(folder: Path, name: str) -> str:
    """Uploads the files of ``folder`` to the repository ``name``, made private where it is new; returns its address."""
    api = HfApi(library_name="barlow")
    try:
        address = str(api.create_repo(name, private=True, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Encoder trained with barlow")
    except OfflineModeIsEnabled:
        raise UserError(f"--push cannot work while HF_HUB_OFFLINE is set; the folder {folder} is written.") from None
    except Exception as error:  # the client's own and those of what it speaks HTTP with, which changes
        what = f"The folder {folder} is written, but could not be pushed to {name}"
        raise UserError(f"{what}: {first_line(error)}") from None
    return address
