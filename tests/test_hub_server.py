"""The Hub of the tests answers the real clients like the Hub does; and what these clients do by themselves, and what
they leave to their callers, when it fails."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, Faults, LargeFile, run_hub  # noqa: F401
from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, httpx


WEIGHTS = bytes(range(256)) * 20_000


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)


def status_of(function, *arguments, **keywords):
    with pytest.raises(HfHubHTTPError) as caught:
        function(*arguments, **keywords)
    return caught.value.response.status_code


def statuses(hub, path):
    return [request.status for request in hub.requests if path in request.path]


def test_a_folder_comes_back_bit_for_bit(hub, api, tmp_path):
    files = {"README.md": "---\nlicense: mit\n---\n# Ä\n".encode(), "sub/empty.bin": b"", "sub/model.bin": WEIGHTS}
    for path, content in files.items():
        (tmp_path / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / path).write_bytes(content)
    api.create_repo("alice/model")
    commit = api.upload_folder(repo_id="alice/model", folder_path=tmp_path / "out", commit_message="All of it")

    assert hub.files("alice/model") == files
    assert hub.repos["model", "alice/model"].refs["main"][:2] == (commit.oid, "All of it")
    assert [isinstance(content, LargeFile) for content in hub.files("alice/model").values()] == [False, False, True]
    assert set(api.list_repo_files("alice/model")) == {".gitattributes", *files}
    folder, weights = api.get_paths_info("alice/model", ["sub", "sub/model.bin", "sub/none"])
    assert (folder.path, weights.size, weights.lfs.size) == ("sub", len(WEIGHTS), len(WEIGHTS))
    assert [file.path for file in api.list_repo_tree("alice/model", "sub")] == ["sub/empty.bin", "sub/model.bin"]
    assert api.model_info("alice/model", files_metadata=True).siblings[-1].lfs.sha256 == weights.lfs.sha256
    assert api.model_info("alice/model").card_data.license == "mit"

    copy = snapshot_download("alice/model", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False)
    assert {path: (tmp_path / copy / path).read_bytes() for path in files} == files
    with HfFileSystem(endpoint=hub.endpoint, token=False).open("alice/model/sub/model.bin", block_size=1024) as file:
        file.seek(1000)
        assert file.read(50) == WEIGHTS[1000:1050]
    assert 206 in statuses(hub, "model.bin")

    again = api.upload_folder(repo_id="alice/model", folder_path=tmp_path / "out")
    assert again.oid == commit.oid
    assert statuses(hub, "/storage/") == [200, 200]  # stored and verified, once
    api.delete_folder("sub", "alice/model")
    assert set(hub.files("alice/model")) == {"README.md"}


def test_headers(hub):
    hub.create("alice/model").commit("main", {"a.bin": LargeFile(WEIGHTS), "b.txt": b"text"})
    address = f"{hub.endpoint}/alice/model/resolve/main"
    head = get_session().head(f"{address}/a.bin").headers
    assert head["X-Repo-Commit"] == hub.repos["model", "alice/model"].refs["main"].oid
    assert (head["X-Linked-Size"], head["Content-Length"], head["X-Linked-ETag"]) == (
        "5120000",
        "5120000",
        head["ETag"],
    )
    for wanted, status, content in [("0-1", 206, b"te"), ("2-", 206, b"xt"), ("-1", 206, b"t"), ("4-", 416, b"")]:
        answer = get_session().get(f"{address}/b.txt", headers={"Range": f"bytes={wanted}"})
        assert (answer.status_code, answer.content) == (status, content)
    assert get_session().get(f"{address}/a.bin", headers={"If-None-Match": head["ETag"]}).status_code == 304
    assert get_session().head(f"{address}/c.txt").headers["X-Error-Code"] == "EntryNotFound"


def test_who_may_read(hub, api, tmp_path):
    api.create_repo("alice/private", repo_type="dataset", private=True)
    api.upload_file(repo_id="alice/private", repo_type="dataset", path_in_repo="a.txt", path_or_fileobj=b"secret")
    place = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    private = {"repo_id": "alice/private", "repo_type": "dataset"}
    for token in (False, OTHER_TOKEN):
        reader = HfApi(endpoint=hub.endpoint, token=token)
        assert not reader.repo_exists(**private)
        assert not reader.file_exists(filename="a.txt", **private)
        assert status_of(reader.dataset_info, "alice/private") == (404 if token else 401)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(filename="a.txt", token=token, **private, **place)
    assert api.dataset_info("alice/private").private
    path = hf_hub_download(filename="a.txt", token=READ_TOKEN, **private, **place)
    assert Path(path).read_text() == "secret"

    hub.create("alice/gated", gated=True).commit("main", {"a.txt": b"text"})
    assert HfApi(endpoint=hub.endpoint, token=OTHER_TOKEN).model_info("alice/gated").gated == "auto"
    for token in (False, OTHER_TOKEN):
        with pytest.raises(GatedRepoError):
            hf_hub_download("alice/gated", "a.txt", token=token, **place)
    assert "token" not in str(hub.requests)


def test_who_may_write(hub, api):
    assert api.whoami()["name"] == "alice"
    api.create_repo("alice/model")
    assert api.create_repo("alice/model", exist_ok=True).repo_id == "alice/model"
    assert status_of(api.create_repo, "alice/model") == 409
    assert status_of(api.create_repo, "bob/model") == 403
    file = {"path_in_repo": "a.txt", "path_or_fileobj": b"a"}
    for token, creating, uploading in [(False, 401, 401), (READ_TOKEN, 403, 403), (OTHER_TOKEN, 403, 403)]:
        writer = HfApi(endpoint=hub.endpoint, token=token)
        assert status_of(writer.create_repo, "alice/new") == creating
        assert status_of(writer.upload_file, repo_id="alice/model", **file) == uploading
    assert status_of(api.upload_file, repo_id="alice/none", **file) == 404
    assert status_of(HfApi(endpoint=hub.endpoint, token="no-token").whoami) == 401
    assert list(hub.repos) == [("model", "alice/model")]
    assert hub.files("alice/model") == {}

    with pytest.raises(HFValidationError):
        api.create_repo("alice/a--b")  # which the client does not send
    headers = {"Authorization": f"Bearer {WRITE_TOKEN}"}
    for name in ("a--b", "a..b", "a b", "é", "-a", "a.", "a.git", "", "a" * 97):
        answer = get_session().post(f"{hub.endpoint}/api/repos/create", json={"name": name}, headers=headers)
        assert answer.status_code == 400, name
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(repo_id="alice/model", path_in_repo="README.md", path_or_fileobj=b"---\na: [\n---\n")


def test_revisions(hub, api, tmp_path):
    first = hub.create("alice/model").commit("main", {"a.txt": b"1"})

    def content(revision):
        place = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
        path = hf_hub_download("alice/model", "a.txt", revision=revision, token=False, **place)
        return Path(path).read_text()

    api.create_branch("alice/model", branch="feature/x")
    api.create_branch("alice/model", branch="feature/x", exist_ok=True)
    assert status_of(api.create_branch, "alice/model", branch="feature/x") == 409
    with pytest.raises(BadRequestError):
        api.create_branch("alice/model", branch="refs/pr/1")
    file = {"repo_id": "alice/model", "path_in_repo": "a.txt"}
    api.upload_file(path_or_fileobj=b"2", revision="feature/x", **file)
    other = HfApi(endpoint=hub.endpoint, token=OTHER_TOKEN)
    assert other.upload_file(path_or_fileobj=b"3", create_pr=True, **file).pr_revision == "refs/pr/1"
    assert api.upload_file(path_or_fileobj=WEIGHTS[:99], create_pr=True, **file).pr_revision == "refs/pr/2"
    api.upload_file(path_or_fileobj=b"4", revision="refs/pr/2", **file)
    main = api.upload_file(path_or_fileobj=b"5", parent_commit=first.oid, **file)
    assert status_of(api.upload_file, path_or_fileobj=b"6", parent_commit=first.oid, **file) == 412
    revisions = ["main", "feature/x", "refs/pr/1", "refs/pr/2", first.oid, main.oid]
    assert [content(revision) for revision in revisions] == ["5", "2", "3", "4", "1", "5"]
    assert api.model_info("alice/model").sha == main.oid
    assert api.model_info("alice/model", revision=first.oid).sha == first.oid

    for function in (content, lambda revision: api.model_info("alice/model", revision=revision)):
        with pytest.raises(RevisionNotFoundError):
            function("none")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"7", revision="none", **file)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("alice/model", "none", endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    assert not api.file_exists("alice/model", "none")
    assert not api.revision_exists("alice/model", "none")


class TestFaults:
    """Seen with huggingface_hub 2.4. A test that fails here says that the client has changed, and that what relies on
    it may do with fewer retries of its own, or needs more."""

    def test_the_client_retries_what_comes_before_the_commit(self, hub, api):
        """In its several threads."""
        hub.create("alice/model")
        hub.faults = Faults(unavailable_every=3, only="preupload|batch|storage")
        files = {f"{number}.bin": WEIGHTS + bytes([number]) for number in range(3)}
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit("alice/model", operations, commit_message="Large files")
        assert hub.files("alice/model") == files
        assert [request.status for request in hub.requests].count(503) == 3

    def test_the_client_does_not_retry_the_rest(self, hub, api):
        hub.create("alice/model")
        hub.faults = Faults(unavailable_every=1, only="create|branch|paths-info|commit")
        assert status_of(api.create_repo, "alice/new", exist_ok=True) == 503
        assert status_of(api.create_branch, "alice/model", branch="new", exist_ok=True) == 503
        assert status_of(api.get_paths_info, "alice/model", ["a.txt"]) == 503
        assert status_of(api.upload_file, repo_id="alice/model", path_in_repo="a", path_or_fileobj=b"a") == 503
        assert [request.status for request in hub.requests].count(503) == 4
        # Before it looks at the status of the validation of a README, the client reads JSON, which this is not.
        hub.faults = Faults(unavailable_every=1, only="validate-yaml")
        with pytest.raises(json.JSONDecodeError):
            api.upload_file(repo_id="alice/model", path_in_repo="README.md", path_or_fileobj=b"# Title")
        assert hub.files("alice/model") == {}

    def test_what_is_tried_again_succeeds(self, hub, api):
        hub.faults = Faults(unavailable_every=3)
        for _ in range(3):
            with contextlib.suppress(HfHubHTTPError):
                api.create_repo("alice/model", exist_ok=True)
                api.upload_file(repo_id="alice/model", path_in_repo="a.txt", path_or_fileobj=b"a")
                break
        assert hub.files("alice/model") == {"a.txt": b"a"}
        assert [request.status for request in hub.requests] == [200, 200, 503, 409, 503, 200, 503, 409, 200, 200]

    @pytest.mark.parametrize("where", ["half", "answer"])
    def test_the_client_sends_a_large_file_again(self, hub, api, where):
        hub.create("alice/model")
        hub.faults = Faults(cut_uploads={1: where})
        api.upload_file(repo_id="alice/model", path_in_repo="model.bin", path_or_fileobj=WEIGHTS)
        assert hub.files("alice/model") == {"model.bin": WEIGHTS}
        assert statuses(hub, "/storage/") == [0, 200, 200]

    @pytest.mark.parametrize("size", [1, 5_000_000])
    def test_a_commit_cut_in_half_is_lost(self, hub, api, size):
        hub.create("alice/model")
        hub.faults = Faults(cut_uploads={1: "half"})
        file = {"repo_id": "alice/model", "path_in_repo": "a.txt", "path_or_fileobj": b"a" * size}
        with pytest.raises(httpx.TransportError):
            api.upload_file(**file)
        assert hub.files("alice/model") == {}
        api.upload_file(**file)
        assert hub.files("alice/model") == {"a.txt": b"a" * size}

    def test_a_commit_without_answer_has_happened(self, hub, api):
        """So sending it again makes a second one of it, unless the client asks first what is there: it does so for new
        operations only, and compares with "main" when it is about to open a pull request."""
        repo = hub.create("alice/model")

        def commits(cut, function, **keywords):
            before = len(repo.commits)
            hub.faults = Faults(cut_uploads={1: "answer"} if cut else {})
            if cut:
                with pytest.raises(httpx.TransportError):
                    function(repo_id="alice/model", **keywords)
            else:
                function(repo_id="alice/model", **keywords)
            return len(repo.commits) - before

        file = {"path_in_repo": "a.txt", "path_or_fileobj": b"a"}
        assert [commits(cut, api.upload_file, **file) for cut in (True, False)] == [1, 0]
        same = {"operations": [CommitOperationAdd("b.txt", b"b")], "commit_message": "b"}
        assert [commits(cut, api.create_commit, **same) for cut in (True, False)] == [1, 1]
        proposed = {"path_in_repo": "c.txt", "path_or_fileobj": b"c", "create_pr": True}
        assert [commits(cut, api.upload_file, **proposed) for cut in (True, False)] == [1, 1]
        assert set(repo.refs) == {"main", "refs/pr/1", "refs/pr/2"}


OWN_MODEL = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel


class OwnConfig(PreTrainedConfig):
    model_type = "own"
    size: int = 3


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(config.size, 2)
        self.post_init()

    def forward(self, inputs):
        return self.layer(inputs)
"""

USE = """
def use(classifier, own, data):
    picture = data["train"][0]["image"]
    return {
        "picture": [picture.size, list(picture.tobytes())],
        "labels": [data["train"].features["label"].names, data["train"]["label"][:], data["test"]["label"][:]],
        "classes": [entry["score"] for entry in classifier(picture)],
        "own": own(torch.ones(1, own.config.size)).tolist(),
    }
"""

PUSH = """
import json, torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from own_model import OwnConfig, OwnModel
from PIL.Image import new
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
rows = {"image": [new("RGB", (16, 16), (50 * i, 7, 9)) for i in range(4)], "label": [0, 1, 1, 0]}
rows = Dataset.from_dict(rows, features=features)
data = DatasetDict(train=rows.select(range(3)), test=rows.select([3]))
data.push_to_hub("alice/pictures", private=True)

shape = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
model = ViTForImageClassification(ViTConfig(**shape, intermediate_size=8, id2label={0: "cat", 1: "dog"})).eval()
processor = ViTImageProcessor(size={"height": 16, "width": 16})
model.push_to_hub("alice/vit", private=True)
processor.push_to_hub("alice/vit")
OwnConfig.register_for_auto_class()
OwnModel.register_for_auto_class("AutoModel")
own = OwnModel(OwnConfig(size=5))
own.push_to_hub("alice/own", revision="v2")
classifier = pipeline("image-classification", model=model, image_processor=processor)
"""

LOAD = """
import json, torch
from datasets import load_dataset
from transformers import AutoModel, pipeline

data = load_dataset("alice/pictures")
own = AutoModel.from_pretrained("alice/own", revision="v2", trust_remote_code=True)
classifier = pipeline("image-classification", model="alice/vit")
"""


def run(environment, folder, *code):
    """What a fresh process prints last, as JSON."""
    command = [sys.executable, "-c", "\n".join(code)]
    process = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_transformers_and_datasets_get_back_what_they_pushed(hub, tmp_path):
    (tmp_path / "author").mkdir()
    (tmp_path / "author" / "own_model.py").write_text(OWN_MODEL)
    show = "print(json.dumps(use(classifier, own, data)))"
    pushed = run(hub.environment(WRITE_TOKEN), tmp_path / "author", PUSH, USE, show)
    assert {name for _, name in hub.repos} == {"alice/pictures", "alice/vit", "alice/own"}
    assert hub.repos["dataset", "alice/pictures"].private
    assert set(hub.files("alice/own", revision="v2")) > {"config.json", "model.safetensors", "own_model.py"}
    assert isinstance(hub.files("alice/own", revision="v2")["model.safetensors"], LargeFile)

    loaded = run(hub.environment(READ_TOKEN), tmp_path, LOAD, USE, show)
    assert loaded == pushed
    assert {request.status for request in hub.requests} <= {200, 206, 304, 404, 409}
