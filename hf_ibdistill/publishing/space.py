"""Publish the demo of a model as a Space."""

import json
import logging
import re
import sys
from collections.abc import Mapping
from importlib.metadata import requires, version
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, SpaceCardData
from huggingface_hub.errors import RepositoryNotFoundError
from jinja2 import Environment, StrictUndefined
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from ..checks import check_installed
from .hub import call_hub, ensure_repo


logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
_TEMPLATES = Path(__file__).parent / "templates"


def push_space_to_hub(
    repo_id: str,
    space: str,
    *,
    teachers: Mapping[str, str] | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Publish the page of [`build_demo`] for a model on the Hub as a Space.

    The Space holds the page, a card that links the model, this package's own source, and the versions of the libraries
    that are installed here. Another call replaces these files, and leaves others, such as images in the folder
    "examples", which the page offers.

    Args:
        repo_id: "user/name" of the model.
        space: "user/name" of the Space, or "name" for the user of the token; made if it does not exist.
        teachers: name → "user/name" of a teacher on the Hub, to show beside the model.
        private: whether a new Space is private; by default the setting of the account decides.
        commit_message: title of the commit.
        token: as for [`push_folder_to_hub`].

    Returns:
        The address of the Space.

    Raises:
        ImportError: gradio is not installed, so that its version is unknown.
        ValueError: a model is not on the Hub, or no classifier that needs no code of its own.
        PermissionError, ConnectionError: as from [`push_folder_to_hub`].
    """
    check_installed("gradio", extra="demo")
    models = {"repo_id": repo_id, **{f"teachers={name}": source for name, source in (teachers or {}).items()}}
    types = {_check_model(argument, source, token) for argument, source in models.items()}
    space = ensure_repo(space, kind="space", private=private, token=token)
    api, repo = HfApi(token=token), {"repo_id": space, "repo_type": "space"}
    files = _space_files(repo_id, teachers or {}, types)

    # Made again for each try, as in `push_folder_to_hub`.
    def commit():
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        # Modules that this version no longer has.
        old = [path for path in api.list_repo_files(**repo) if path.startswith(f"{_PACKAGE.name}/")]
        operations += [CommitOperationDelete(path) for path in old if path not in files]
        message = commit_message or f"Upload the demo of {repo_id}"
        return api.create_commit(**repo, operations=operations, commit_message=message)

    return str(call_hub(commit, space).repo_url)


def _check_model(argument: str, repo_id: str, token: str | None) -> str:
    """The `model_type` of a classifier on the Hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"{argument}={repo_id} is no name of the form user/name. A Space loads models from the Hub.")
    api = HfApi(token=token)
    try:
        info = call_hub(lambda: api.model_info(repo_id), repo_id)
        names = [file.rfilename for file in info.siblings]
    except (PermissionError, ValueError) as error:
        if not isinstance(error.__cause__, RepositoryNotFoundError):
            raise
        names = []
    if "config.json" not in names:
        raise ValueError(
            f"{argument}={repo_id} is no model on the Hub. Publish it first: hf-ibdistill push --folder …"
        )
    path = call_hub(lambda: api.hf_hub_download(repo_id, "config.json"), repo_id)
    model_type = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{argument}={repo_id} has model_type={model_type}, no image classifier of transformers or this package. Choose "
            "another model."
        )
    if info.private:
        logger.warning("%s is private. Add a token that may read it to the Space, as the secret HF_TOKEN.", repo_id)
    return model_type


def _space_files(repo_id: str, teachers: Mapping[str, str], types: set[str]) -> dict[str, bytes]:
    """Path in the Space → content."""
    # It is on no package index, so the Space carries it.
    sources = [path for path in sorted(_PACKAGE.rglob("*.py")) if path.is_file()] + sorted(_TEMPLATES.iterdir())
    files = {f"{_PACKAGE.name}/{path.relative_to(_PACKAGE).as_posix()}": path.read_bytes() for path in sources}
    name = repo_id.partition("/")[2]
    data = SpaceCardData(
        title=f"Demo of {name}",
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        license="apache-2.0",
        models=sorted({repo_id, *teachers.values()}),
        tags=["hf_ibdistill"],
    )
    facts = {"repo_id": repo_id, "teachers": dict(teachers)}
    card = SpaceCard.from_template(data, template_path=str(_TEMPLATES / "space_card.md"), title=data.title, **facts)
    app = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        (_TEMPLATES / "space_app.jinja").read_text(encoding="utf-8")
    )
    texts = {
        "README.md": str(card),
        "app.py": app.render(facts),
        "requirements.txt": "".join(f"{line}\n" for line in _requirements("timm_wrapper" in types)),
    }
    return files | {path: text.encode() for path, text in texts.items()}


def _requirements(with_timm: bool) -> list[str]:
    """The libraries that the page needs, each at the version that is installed here."""
    needed = [line for line in requires(_PACKAGE.name) or [] if "extra ==" not in line]
    names = [re.match(r"[\w.-]+", line)[0] for line in needed] + ["gradio"] + ["timm"] * with_timm
    # A build for one kind of device has a suffix, which package indexes lack.
    return [f"{name}=={version(name).partition('+')[0]}" for name in names]
