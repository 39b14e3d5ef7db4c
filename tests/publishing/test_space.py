"""`hf-ibdistill push --space`: the files of a Space on the Hub of hub_server.py, and the page that they serve."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from browser import choose, free_port, open_browser, open_page, predict, serve
from hub_server import READ_TOKEN, WRITE_TOKEN
from huggingface_hub import SpaceCard, constants
from packaging.requirements import Requirement
from running import run
from small import NAMES, image_bytes, make_student, make_teacher

import hf_ibdistill
from hf_ibdistill import push_folder_to_hub, push_space_to_hub


PACKAGE = Path(hf_ibdistill.__file__).parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"student": make_student(folder / "student"), "conv": make_teacher(folder / "conv")}


@pytest.fixture
def logged_in(author, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    return author


def publish(hub, folders):
    for name, folder in folders.items():
        push_folder_to_hub(folder, f"alice/{name}")
    run("push", "--repo_id", "alice/student", "--space", "alice/demo", "--teachers", "conv=alice/conv")
    return hub.files("alice/demo", "space")


def test_a_space_serves_the_page(logged_in, folders, tmp_path):
    files = publish(logged_in, folders)
    for path, content in files.items():
        (tmp_path / "space" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / path).write_bytes(content)
    # A visitor sees images that the owner added.
    (tmp_path / "space" / "examples").mkdir()
    (tmp_path / "space" / "examples" / "mine.png").write_bytes(image_bytes(3))
    port = free_port()
    environment = logged_in.environment(
        READ_TOKEN, GRADIO_SERVER_PORT=str(port), GRADIO_TEMP_DIR=str(tmp_path / "uploads")
    )
    environment.pop("PYTHONPATH", None)
    asked = len(logged_in.requests)
    # Without bytecode, so that the package is imported from nowhere else: the test below compares the files with its own.
    with serve(["-v", "app.py"], port, tmp_path / "space", environment) as (url, log):
        assert re.search(
            rf"code object from .*{re.escape(str(tmp_path))}/space/hf_ibdistill/demo\.py", log.read_text()
        )
        with open_browser() as browser, open_page(browser, url, 1280, 800) as page:
            assert page.get_by_role("heading", level=1).all_inner_texts() == ["Demo of alice/student"]
            page.get_by_role("button", name="Example mine").wait_for()
            choose(page, "photo.png", image_bytes(5))
            name, tables = predict(page)
            assert name in NAMES and list(tables)[-1] == "Teacher conv" and len(tables) == 5
    loaded = {
        request.path.split("/resolve/")[0] for request in logged_in.requests[asked:] if "/resolve/" in request.path
    }
    assert loaded == {"/alice/student", "/alice/conv"}


def test_its_files_its_pins_and_its_card(logged_in, folders, tmp_path):
    files = publish(logged_in, folders)
    sources = {path for path in files if path.startswith("hf_ibdistill/")}
    assert files.keys() - sources == {"app.py", "requirements.txt", "README.md"}
    # The whole package and nothing else.
    on_disk = {f"hf_ibdistill/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")}
    assert {path for path in sources if path.endswith(".py")} == on_disk
    assert {Path(path).suffix for path in sources} == {".py", ".md", ".html", ".jinja"}
    assert all(files[path] == (PACKAGE.parent / path).read_bytes() for path in sources)

    pins = {pin.name: pin for pin in map(Requirement, files["requirements.txt"].decode().splitlines())}
    assert {
        "torch",
        "torchvision",
        "transformers",
        "datasets",
        "huggingface-hub",
        "matplotlib",
        "gradio",
    } <= pins.keys()
    assert not {"pytest", "onnx", "timm", "hf_ibdistill"} & pins.keys()
    for name, pin in pins.items():
        (exact,) = pin.specifier
        assert exact.operator == "==" and pin.specifier.contains(importlib.metadata.version(name), prereleases=True)
        assert "+" not in exact.version

    card = SpaceCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert data["sdk"] == "gradio" and data["sdk_version"] == importlib.metadata.version("gradio")
    assert data["models"] == ["alice/conv", "alice/student"] and data["app_file"] == "app.py"
    assert data["title"] == "Demo of student" and data["license"] == "apache-2.0"
    assert "https://huggingface.co/alice/student" in card.text and "https://huggingface.co/alice/conv" in card.text
    # Neither the machine nor the token of the author.
    for path in ("app.py", "README.md", "requirements.txt"):
        assert str(tmp_path.parents[1]) not in files[path].decode() and WRITE_TOKEN not in files[path].decode()


def test_a_second_push_changes_what_changed(logged_in, folders):
    publish(logged_in, folders)
    repo = logged_in.repos["space", "alice/demo"]
    before, commits = logged_in.files("alice/demo", "space"), len(repo.commits)
    assert push_space_to_hub("alice/student", "demo", teachers={"conv": "alice/conv"}).endswith("/spaces/alice/demo")
    assert len(repo.commits) == commits
    # An older version had another module, and the owner has added images and changed nothing else.
    old = {**before, "hf_ibdistill/old.py": b"", "examples/mine.png": b"1", ".gitattributes": b""}
    repo.commit("main", old, "by hand")
    push_space_to_hub("alice/student", "alice/demo", commit_message="Alone")
    after = logged_in.files("alice/demo", "space")
    assert after.keys() == before.keys() | {"examples/mine.png"} and repo.refs["main"].title == "Alone"
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {"app.py", "README.md"} and b"conv" not in after["app.py"]


def test_a_folder_is_published_before_its_space(logged_in, folders, capsys):
    run("push", "--folder", folders["student"], "--repo_id", "alice/student", "--space", "alice/demo", "--private")
    assert capsys.readouterr().out.split() == [
        f"{logged_in.endpoint}/{name}" for name in ("alice/student", "spaces/alice/demo")
    ]
    assert logged_in.repos["model", "alice/student"].private and logged_in.repos["space", "alice/demo"].private


def test_a_private_model_needs_a_secret(logged_in, folders, caplog):
    push_folder_to_hub(folders["student"], "alice/student", private=True)
    push_space_to_hub("alice/student", "alice/demo")
    assert "alice/student is private" in caplog.text and "HF_TOKEN" in caplog.text


def test_mistakes_are_named_before_a_space_is_made(logged_in, folders):
    push_folder_to_hub(folders["student"], "alice/student")
    logged_in.create("alice/empty")
    logged_in.create("alice/text").commit("main", {"config.json": b'{"model_type": "bert_of_mine"}'})
    for repo_id, message in (
        ("alice/gone", "repo_id=alice/gone is no model on the Hub"),
        ("alice/empty", "repo_id=alice/empty is no model on the Hub"),
        ("alice/text", "repo_id=alice/text has model_type=bert_of_mine"),
        ("student", "repo_id=student is no name of the form user/name"),
    ):
        with pytest.raises(ValueError, match=message):
            push_space_to_hub(repo_id, "alice/demo")
    with pytest.raises(ValueError, match="teachers=conv=outputs/conv/1 is no name"):
        push_space_to_hub("alice/student", "alice/demo", teachers={"conv": "outputs/conv/1"})
    for flags, message in (
        (["--repo_id", "alice/student"], "folder and space"),
        (["--repo_id", "alice/student", "--space", "alice/demo", "--create_pr"], "create_pr=True .*space=alice/demo"),
        (["--repo_id", "alice/student", "--folder", "x", "--teachers", "conv=x"], "teachers=.*space=None"),
    ):
        with pytest.raises(SystemExit, match=message):
            run("push", *flags)
    assert ("space", "alice/demo") not in logged_in.repos
