"""Publish models and recorded logits on the Hub."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from datasets import Dataset
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects, httpx, validate_repo_id

from .data import find_columns
from .logits.encoding import ROW_KEY, column_name, recorded_teachers
from .logits.publishing import PROVENANCE, export_logits_table
from .model_card import UNPUBLISHED


logger = logging.getLogger(__name__)

# Checkpoints and pickles stay at home: a pickle runs code where it is opened, and one of training arguments holds tokens.
# So do hidden files, and the trainer's state, which names folders of this machine.
_IGNORED = ["checkpoint-*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"]
_IGNORED += ["trainer_state.json", ".*", "*/.*", "_*", "*.pyc", "*.partial"]
_WAITS = (1, 1, 2, 2, 4, 4, 8, 8)

Result = TypeVar("Result")


def push_folder_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Publish a folder: a model's, as training or `save_pretrained` leave it (weights, configuration, the code that loads it
    without this package, image processor, card, picture), or a table's, as [`export_logits_table`] does.

    A busy or cut connection is tried again for half a minute. What has arrived is not sent twice, so calling it again
    completes the job. On the Hub, the card's example names the repository. A table takes the place of the one that is there.

    Args:
        folder: the folder.
        repo_id: "user/name" or, for the token's user, "name"; made if it does not exist.
        private: whether a new repository is private; by default as the account's setting says.
        revision: the branch to commit to, made if it does not exist; by default the main one.
        commit_message: title of the commit or pull request.
        create_pr: open a pull request instead of committing.
        token: an access token with the right to write; by default the one that `hf auth login` or `HF_TOKEN` left.

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        ValueError: the folder holds neither a model nor a table, or the repository's name is not valid.
        PermissionError: there is no token, or it may not write there.
        ConnectionError: the Hub cannot be reached, or does not answer.
    """
    folder = Path(folder).resolve()
    kind = _kind(folder)
    repo_id = ensure_repo(repo_id, kind=kind, private=private, token=token)
    api, repo = HfApi(token=token), {"repo_id": repo_id, "repo_type": kind}
    if revision is not None and not revision.startswith("refs/"):
        _call(lambda: api.create_branch(**repo, branch=revision, exist_ok=True), repo_id)

    # Not `upload_folder`, which asks the Hub twice about the card and gives up whenever it is busy then.
    def upload():
        operations = _additions(folder, repo_id)
        if kind == "dataset":
            # Of a table that had more files, the last would stay and be read as rows of this one.
            new = {operation.path_in_repo for operation in operations}
            old = filter_repo_objects(api.list_repo_files(**repo, revision=revision), allow_patterns="data/*.parquet")
            operations += [CommitOperationDelete(path) for path in old if path not in new]
        return api.create_commit(
            **repo,
            operations=operations,
            revision=revision,
            commit_message=commit_message or f"Upload {folder.name}",
            create_pr=create_pr,
        )

    # A second commit of the same files changes nothing; a second pull request would.
    commit = _call(upload, repo_id, repeat_cut=not create_pr)
    return commit.pr_url or str(commit.repo_url)


def ensure_repo(repo_id: str, *, kind: str = "model", private: bool | None = None, token: str | None = None) -> str:
    """Make a repository on the Hub unless it is there; returns its whole name. Arguments and errors are
    [`push_folder_to_hub`]'s."""
    validate_repo_id(repo_id)
    if token is None and get_token() is None:
        raise PermissionError(
            f"Publishing {repo_id} needs an access token with the right to write. Log in with `hf auth login`, or set "
            "HF_TOKEN."
        )
    api = HfApi(token=token)
    url = _call(lambda: api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True), repo_id)
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
        repo_id: "user/name" of a data set.
        with_images: publish images and labels too. Without them, whoever has the images joins the two with
            [`attach_teacher_logits`].
        private, revision, commit_message, create_pr, token: as for [`push_folder_to_hub`].

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        ValueError: these are several splits, or the table has no provenance or no logits; and as [`push_folder_to_hub`].
    """
    if isinstance(table, dict):
        raise ValueError(f'A repository holds one split. Give one of {", ".join(table)}, for example table["train"].')
    # Before the files are written, which takes its time; and the card needs the whole name.
    repo_id = ensure_repo(repo_id, kind="dataset", private=private, token=token)
    columns = [ROW_KEY, *map(column_name, recorded_teachers(table))]
    if with_images:
        columns = [*find_columns(table), *columns]
    with tempfile.TemporaryDirectory() as folder:
        exported = export_logits_table(table.select_columns(columns), Path(folder) / "table", repo_id=repo_id)
        return push_folder_to_hub(
            exported,
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
            f"{folder} holds neither a model (config.json) nor a table of logits ({PROVENANCE}). Give the folder of a "
            "trained model, or what export_logits_table wrote."
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} has a config.json but no weights (*.safetensors). Save the model there with save_pretrained."
        )
    return "model"


def _additions(folder, repo_id):
    """The files to publish; the card with the repository's name in its example."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {path: folder / path for path in filter_repo_objects(paths, ignore_patterns=_IGNORED)}
    if "README.md" in files:
        files["README.md"] = files["README.md"].read_bytes().replace(UNPUBLISHED.encode(), repo_id.encode())
    return [CommitOperationAdd(path, content) for path, content in files.items()]


def _call(action: Callable[[], Result], repo_id: str, repeat_cut: bool = True) -> Result:
    """Do it, again where the Hub was busy or the connection was cut, and say in a sentence why it cannot be done."""
    for wait in (*_WAITS, None):
        try:
            return action()
        except OfflineModeIsEnabled as error:
            raise ConnectionError(f"{repo_id} cannot be published offline. Unset HF_HUB_OFFLINE.") from error
        # The last: a busy Hub's answer that the client takes for its own.
        except (HfHubHTTPError, httpx.TransportError, RuntimeError, json.JSONDecodeError) as error:
            problem, is_passing = _explain(error, repo_id, repeat_cut)
            if not is_passing or wait is None:
                raise problem from error
            logger.warning("%s Trying again in %d s.", problem, wait)
            time.sleep(wait)


def _explain(error, repo_id, repeat_cut):
    """What to tell the user, and whether trying again may help."""
    again = (
        "Nothing local is lost: publish it again, for example a saved folder with scripts/push_to_hub.py; what has arrived "
        "is not sent twice."
    )
    if isinstance(error, RuntimeError):
        # A large file that the client could not send, after having tried for long itself.
        return ConnectionError(f"Not all files of {repo_id} could be sent. {again}"), False
    if isinstance(error, httpx.TransportError):
        if repeat_cut:
            return ConnectionError(f"The connection to the Hub was cut while publishing {repo_id}. {again}"), True
        return ConnectionError(
            f"The connection to the Hub was cut while publishing {repo_id}. Look whether the pull request is there before "
            "you call it again; nothing local is lost."
        ), False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None or status >= 500 or status == 429:
        return ConnectionError(f"The Hub is busy ({status or 'no answer'}). {again}"), True
    if isinstance(error, RevisionNotFoundError):
        return ValueError(
            f"{repo_id} has no such revision. Leave it out, name a branch, or open a pull request with create_pr."
        ), False
    if status in (401, 403, 404):
        return PermissionError(
            f"{repo_id} cannot be published ({status}): the token is not valid or has no right to write, or the name belongs "
            "to somebody else. Log in with a token that may write (`hf auth login`), choose another name, or propose it to "
            "the owner with create_pr."
        ), False
    return ValueError(f"The Hub refused {repo_id} ({status}): {error.server_message or 'no reason given'}."), False
