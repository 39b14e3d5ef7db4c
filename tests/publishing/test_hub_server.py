"""The Hub of the tests answers the real client like the Hub does; and which faults the client retries by itself, so that
`publishing/hub.py` need not."""

import contextlib
import json
import time
from pathlib import Path

import pytest
from hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, Faults, LargeFile, run_hub  # noqa: F401
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
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
    _, weights = api.list_repo_tree("alice/model", "sub")
    assert (weights.path, weights.size, weights.lfs.size) == ("sub/model.bin", len(WEIGHTS), len(WEIGHTS))
    info = api.model_info("alice/model")
    assert info.card_data.license == "mit" and not info.private and info.sha == commit.oid

    copy = snapshot_download("alice/model", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False)
    assert {path: (tmp_path / copy / path).read_bytes() for path in files} == files
    with HfFileSystem(endpoint=hub.endpoint, token=False).open("alice/model/sub/model.bin", block_size=1024) as file:
        file.seek(1000)
        assert file.read(50) == WEIGHTS[1000:1050]
    assert 206 in statuses(hub, "model.bin")

    again = api.upload_folder(repo_id="alice/model", folder_path=tmp_path / "out")
    assert again.oid == commit.oid
    assert statuses(hub, "/storage/") == [200, 200]  # stored and verified, once
    api.create_commit("alice/model", [CommitOperationDelete("sub/empty.bin")], commit_message="Delete")
    assert set(hub.files("alice/model")) == {"README.md", "sub/model.bin"}


def test_headers(hub):
    hub.create("alice/model").commit("main", {"a.bin": LargeFile(WEIGHTS), "b.txt": b"text"})
    address = f"{hub.endpoint}/alice/model/resolve/main"
    head = get_session().head(f"{address}/a.bin").headers
    assert head["X-Repo-Commit"] == hub.repos["model", "alice/model"].refs["main"].oid
    assert head["Content-Length"] == head["X-Linked-Size"] == "5120000"
    assert head["X-Linked-ETag"] == head["ETag"]
    for wanted, content in [("0-1", b"te"), ("2-", b"xt"), ("2-9", b"xt")]:
        answer = get_session().get(f"{address}/b.txt", headers={"Range": f"bytes={wanted}"})
        assert (answer.status_code, answer.content) == (206, content)
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
    assert "token" not in str(hub.requests)


def test_who_may_write(hub, api):
    api.create_repo("alice/model")
    assert api.create_repo("alice/model", exist_ok=True).repo_id == "alice/model"
    assert status_of(api.create_repo, "alice/model") == 409
    assert status_of(api.create_repo, "bob/model") == 403
    file = {"path_in_repo": "a.txt", "path_or_fileobj": b"a"}
    for token, status in [("no-token", 401), (READ_TOKEN, 403), (OTHER_TOKEN, 403)]:
        writer = HfApi(endpoint=hub.endpoint, token=token)
        assert status_of(writer.create_repo, "alice/new") == status
        assert status_of(writer.upload_file, repo_id="alice/model", **file) == status
    assert status_of(api.upload_file, repo_id="alice/none", **file) == 404
    assert list(hub.repos) == [("model", "alice/model")]
    assert hub.files("alice/model") == {}


def test_revisions(hub, api, tmp_path):
    first = hub.create("alice/model").commit("main", {"a.txt": b"1"})

    def content(revision):
        place = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
        path = hf_hub_download("alice/model", "a.txt", revision=revision, token=False, **place)
        return Path(path).read_text()

    api.create_branch("alice/model", branch="feature/x")
    api.create_branch("alice/model", branch="feature/x", exist_ok=True)
    assert status_of(api.create_branch, "alice/model", branch="feature/x") == 409
    file = {"repo_id": "alice/model", "path_in_repo": "a.txt"}
    api.upload_file(path_or_fileobj=b"2", revision="feature/x", **file)
    other = HfApi(endpoint=hub.endpoint, token=OTHER_TOKEN)
    assert other.upload_file(path_or_fileobj=b"3", create_pr=True, **file).pr_revision == "refs/pr/1"
    assert api.upload_file(path_or_fileobj=WEIGHTS[:99], create_pr=True, **file).pr_revision == "refs/pr/2"
    api.upload_file(path_or_fileobj=b"4", revision="refs/pr/2", **file)
    main = api.upload_file(path_or_fileobj=b"5", **file)
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


class TestFaults:
    """Seen with huggingface_hub 2.4. A failure here means that the client has changed, and that publishing/hub.py needs
    fewer retries of its own, or more."""

    @pytest.fixture(autouse=True)
    def no_waits(self, monkeypatch):
        monkeypatch.setattr(time, "sleep", lambda seconds: None)

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
        hub.faults = Faults(unavailable_every=1, only="create|branch|commit")
        assert status_of(api.create_repo, "alice/new", exist_ok=True) == 503
        assert status_of(api.create_branch, "alice/model", branch="new", exist_ok=True) == 503
        assert status_of(api.upload_file, repo_id="alice/model", path_in_repo="a", path_or_fileobj=b"a") == 503
        assert [request.status for request in hub.requests].count(503) == 3
        # Before it looks at the status of the check of a README, the client reads JSON, which this is not.
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
        """A retry makes a second commit of it, unless the client asks first what is there. It asks for new operations
        only, and compares with "main" before it opens a pull request."""
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
