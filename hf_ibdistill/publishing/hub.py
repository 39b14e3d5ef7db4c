"""Publish models and recorded logits on the Hub."""

import json
import logging
import os
import re
import tempfile
import time
from pathlib import Path

from datasets import Dataset
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects, httpx, validate_repo_id

from ..data.columns import IMAGE, LABEL, as_image_table, require_table
from ..logits.encoding import FILE_KEY, ROW_KEY, column_name, recorded_teachers
from ..logits.provenance import check_files, only_record
from .cards import UNPUBLISHED
from .predictions import PREDICTIONS
from .report import PICTURES, REPORT
from .tables import PROVENANCE, export_logits_table


logger = logging.getLogger(__name__)

# Pickles run code when they are opened, and pickled training arguments hold tokens. Hidden files may hold secrets, and the
# state of the trainer has paths of this machine.
_IGNORED = ["checkpoint-*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "trainer_state.json",
            ".*", "*/.*", "_*", "*.pyc", "*.partial", PREDICTIONS]  # fmt: skip
# These show images of the data, which may be private.
_SHOWING_IMAGES = [REPORT, f"{PICTURES}/examples.png", f"{PICTURES}/attention.png"]
# Seconds before each retry.
_WAITS = (1, 1, 2, 2, 4, 4, 8, 8)


def push_folder_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    with_images: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Publish the folder of a model or of a table.

    A model's folder is what training or `save_pretrained` left; a table's is what [`export_logits_table`] wrote. A busy Hub
    and cut connections are retried for half a minute. Files that have arrived are not sent twice, so another call completes
    an interrupted one. The example in the published card has the name of the repository. A table replaces the one that is
    there.

    Args:
        folder: the folder.
        repo_id: "user/name", or "name" for the user of the token; made if it does not exist.
        with_images: include the pictures and the report of a model that show images of its data. Without them, the card
            has the other pictures. The predictions for each row stay here.
        private: whether a new repository is private; by default the setting of the account decides.
        revision: the branch to commit to, made if it does not exist; by default the main one.
        commit_message: title of the commit or pull request.
        create_pr: open a pull request instead of committing.
        token: an access token with the right to write; by default that of `hf auth login` or `HF_TOKEN`.

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        ValueError: the folder holds neither a model nor a table, or the name or revision is not valid.
        PermissionError: there is no token, or it has no right to write there.
        ConnectionError: the Hub cannot be reached, or stays busy.
    """
    folder = Path(folder).resolve()
    kind = _kind(folder)
    repo_id = ensure_repo(repo_id, kind=kind, private=private, token=token)
    api, repo = HfApi(token=token), {"repo_id": repo_id, "repo_type": kind}
    if revision is not None and not revision.startswith("refs/"):
        call_hub(lambda: api.create_branch(**repo, branch=revision, exist_ok=True), repo_id)

    # Not `upload_folder`: its card is the file on disk, and it may spread a table over several commits. The operations are
    # made again for each try, because only then the client compares them with the files that have arrived.
    def commit():
        operations = _additions(folder, repo_id, with_images)
        if kind == "dataset":
            # The last files of a longer table would be read as rows of this one.
            new = {operation.path_in_repo for operation in operations}
            old = filter_repo_objects(api.list_repo_files(**repo, revision=revision), allow_patterns="data/*.parquet")
            operations += [CommitOperationDelete(path) for path in old if path not in new]
        message = commit_message or f"Upload {folder.name}"
        return api.create_commit(
            **repo, operations=operations, commit_message=message, revision=revision, create_pr=create_pr
        )

    info = call_hub(commit, repo_id, revision, create_pr)
    return info.pr_url or str(info.repo_url)


def ensure_repo(repo_id: str, *, kind: str = "model", private: bool | None = None, token: str | None = None) -> str:
    """Make a repository on the Hub if it does not exist; returns its full name. Arguments and errors are those of
    [`push_folder_to_hub`]."""
    validate_repo_id(repo_id)
    if token is None and get_token() is None:
        raise PermissionError(
            f"repo_id={repo_id} needs an access token with the right to write. Log in with `hf auth login`, or set HF_TOKEN."
        )
    api = HfApi(token=token)
    how = {"repo_type": kind, "private": private, "space_sdk": "gradio" if kind == "space" else None}
    url = call_hub(lambda: api.create_repo(repo_id, **how, exist_ok=True), repo_id)
    return url.repo_id


def push_logits_to_hub(
    table: Dataset,
    repo_id: str,
    *,
    with_images: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Publish a recorded table as Parquet, with its provenance and a card. A repository holds one table, as its split
    "train".

    Args:
        table: what [`record_teacher_logits`] returned, one split.
        repo_id: "user/name" of a dataset.
        with_images: include images and labels. Without them, [`attach_teacher_logits`] joins the logits to a copy of
            the images.
        private, revision, commit_message, create_pr, token: as for [`push_folder_to_hub`].

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        ValueError: these are several splits, or the table has no provenance or no logits, or is damaged; and as from
            [`push_folder_to_hub`].
    """
    require_table(table, "table")
    only_record(table)
    file_key = [FILE_KEY] if FILE_KEY in table.column_names else []
    columns = [ROW_KEY, *file_key, *map(column_name, recorded_teachers(table))]
    if with_images:
        table = as_image_table(table)
        columns = [IMAGE, LABEL, *columns]
    check_files(table, quickly=True)
    # Before the files are written, because that takes time.
    repo_id = ensure_repo(repo_id, kind="dataset", private=private, token=token)
    with tempfile.TemporaryDirectory() as folder:
        return push_folder_to_hub(
            export_logits_table(table.select_columns(columns), Path(folder) / "table"),
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message or "Upload recorded logits",
            create_pr=create_pr,
            token=token,
        )


def _kind(folder):
    if (folder / PROVENANCE).is_file():
        return "dataset"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"folder={folder} holds neither a model (config.json) nor a table of logits ({PROVENANCE}). Give the folder of "
            "a trained model, or one that export_logits_table wrote."
        )
    if not any(path.name != PREDICTIONS for path in folder.glob("*.safetensors")):
        raise ValueError(
            f"folder={folder} has a config.json but no weights (*.safetensors). Save the model there with save_pretrained."
        )
    return "model"


def _additions(folder, repo_id, with_images):
    """The files to publish; the example in the card gets the name of the repository."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    ignored = _IGNORED if with_images else [*_IGNORED, *_SHOWING_IMAGES]
    files = {path: folder / path for path in filter_repo_objects(paths, ignore_patterns=ignored)}
    if "README.md" in files:
        card = files["README.md"].read_bytes().replace(UNPUBLISHED.encode(), repo_id.encode())
        for path in () if with_images else _SHOWING_IMAGES:
            card = re.sub(rb"^!\[.*\]\(%b\)\r?\n\r?\n?" % re.escape(path).encode(), b"", card, flags=re.MULTILINE)
        files["README.md"] = card
    return [CommitOperationAdd(path, content) for path, content in files.items()]


def call_hub(action, repo_id, revision=None, create_pr=False):
    """Call the Hub, and retry if it is busy or cuts the connection.

    huggingface_hub retries uploads of large files by itself. It does not retry requests that make a repository, a branch or
    a commit, or that check a card.
    """
    for wait in (*_WAITS, None):
        try:
            return action()
        except OfflineModeIsEnabled as error:
            raise ConnectionError(f"repo_id={repo_id} cannot be published offline. Unset HF_HUB_OFFLINE.") from error
        # RuntimeError: the client has used up its retries of a large file. JSONDecodeError: it reads any answer to the check
        # of a card as JSON, and that of a busy Hub is HTML.
        except (HfHubHTTPError, httpx.TransportError, RuntimeError, json.JSONDecodeError) as error:
            problem, is_passing = _explain(error, repo_id, revision, create_pr)
            if not is_passing or wait is None:
                raise problem from error
            logger.warning("%s Retrying in %d s.", problem, wait)
            time.sleep(wait)


def _explain(error, repo_id, revision, create_pr):
    """The error for the user, and whether a retry may help."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    is_cut = isinstance(error, httpx.TransportError)
    if is_cut and create_pr:
        # A second commit of the same files changes nothing, but a second pull request would stay.
        return ConnectionError(
            f"The connection was cut while opening a pull request on {repo_id}. Look whether it is there before you run "
            "`hf-ibdistill push` again; nothing local is lost."
        ), False
    if is_cut or status is None or status >= 500 or status == 429:
        reason = "the connection was cut" if is_cut else f"the Hub is busy ({status or 'no answer'})"
        return ConnectionError(
            f"repo_id={repo_id} is not complete: {reason}. Run `hf-ibdistill push` again; nothing local is lost, and files "
            "that have arrived are not sent twice."
        ), not isinstance(error, RuntimeError)
    if isinstance(error, RevisionNotFoundError):
        message = f"revision={revision} does not exist in {repo_id}. Leave it out, name a branch, or set create_pr."
        return ValueError(message), False
    if status in (401, 403, 404):
        return PermissionError(
            f"repo_id={repo_id} cannot be published ({status}): the token is invalid or has no right to write there. Log in "
            "with a token that may write (`hf auth login`), choose another name, or propose it to the owner with create_pr."
        ), False
    reason = error.server_message or "no reason given"
    return ValueError(f"The Hub refused repo_id={repo_id} ({status}): {reason}."), False
