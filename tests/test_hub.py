"""Publishing on a Hub, and using what was published: with this package, without it, and when the network fails.

The author and the users are processes of their own, which talk to the Hub of hub_server.py. What goes wrong is tested in
this process.
"""

import ast
import contextlib
import json
import re
import subprocess
import sys
import sysconfig
import threading
import venv
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_from_disk
from hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, Faults, Hub, LargeFile, User, run_hub  # noqa: F401
from huggingface_hub import DatasetCard, ModelCard, constants
from transformers import TrainerCallback, ViTImageProcessor

import hf_ibdistill
from hf_ibdistill import (
    IBResNetConfig,
    IBResNetForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
    export_logits_table,
    push_folder_to_hub,
    push_logits_to_hub,
    read_records,
)


ROOT = Path(hf_ibdistill.__file__).parents[1]
# Unlike any other text, so that it can be looked for.
SECRET = "hf_OnlyAliceKnowsThisOne"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FILES = {
    "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 100,
    "sub/notes.txt": b"text",
}


# Round trips: an author's process, and the processes of two users

USE = """
import json
import sys

import PIL.Image
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

IMAGE = PIL.Image.frombytes("L", (8, 8), bytes(range(0, 256, 4))).convert("RGB")


def use(*names, **keywords):
    # All of them are loaded before the first is asked.
    models = [AutoModelForImageClassification.from_pretrained(name, **keywords) for name in names]
    pixels = [AutoImageProcessor.from_pretrained(name)(IMAGE, return_tensors="pt").pixel_values for name in names]
    classifiers = [pipeline("image-classification", model=name, **keywords) for name in names]
    return [
        {
            "logits": model(pixel_values).logits.tolist(),
            "gradient": gradient(model, pixel_values),
            "pipeline": classify(IMAGE, top_k=10),
        }
        for model, pixel_values, classify in zip(models, pixels, classifiers)
    ]


def gradient(model, pixel_values):
    model.zero_grad()
    model(pixel_values).logits[0, 0].backward()
    return [parameter.grad.double().abs().sum().item() for parameter in model.parameters() if parameter.grad is not None]
"""

AUTHOR = """
import runpy

import hf_ibdistill

scripts, token = sys.argv[1:]
sys.path.insert(0, scripts)


def run(script, *arguments):
    sys.argv = [f"{scripts}/{script}", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


few, one = ["--images_per_class", "3"], ["--max_steps", "1", "--warmup_steps", "0"]
publish = ["--push_to_hub", "true", "--hub_model_id"]
run("train_teacher.py", *few, *one, "--output_dir", "conv", "--preset", "convolution-small")
run("train_teacher.py", *few, *one, "--output_dir", "inv", "--preset", "involution-small",
    *publish, "alice/inv", "--hub_private_repo", "true")
run("record_logits.py", *few, "--num_views", "2", "--output_dir", "table", "--teachers", "conv=conv", "inv=alice/inv")
run("distill_student.py", "--dataset", "table", *one, "--patch_embedding", "bias_stems", "--output_dir", "student",
    "--save_strategy", "epoch", "--hub_strategy", "every_save", "--hub_token", token, *publish, "student")
run("push_to_hub.py", "--folder", "table", "--repo_id", "logits", "--revision", "v1", "--commit_message", "Recorded")
run("push_to_hub.py", "--folder", "table", "--repo_id", "alice/pictures", "--with_images", "--private")
run("push_to_hub.py", "--folder", "conv", "--repo_id", "alice/conv", "--create_pr")
try:
    run("train_teacher.py", *few, *one, "--output_dir", "refused", *publish, "alice/refused", "--hub_strategy", "checkpoint")
except SystemExit as refused:
    print(refused.code)
# transformers' own way: no image processor, and a card that says nothing.
AutoModelForImageClassification.from_pretrained("student").push_to_hub("alice/bare")
print(json.dumps(use("student", "inv")))
"""

USER = """
from datasets import Image, load_dataset, load_from_disk
from transformers import Trainer, TrainingArguments

import hf_ibdistill as ib

author, = sys.argv[1:]
result = {
    "used": [use("alice/student", "alice/inv"), use("alice/student", "alice/inv", trust_remote_code=True)],
    "remote": [name for name in sys.modules if name.startswith("transformers_modules")],
}

result["revision"] = ib.load_teachers({"inv": "alice/inv"})[0].revision
recorded = load_from_disk(f"{author}/table")["train"]
images = ib.select_per_class(ib.load_image_dataset("digits")["train"], 3, "label")
opened = ib.open_logits_table("alice/logits", revision="v1")
tables = {"joined": ib.attach_teacher_logits(images, opened), "pictures": ib.open_logits_table("alice/pictures")}
result["tables"] = {
    name: {
        "features": table.features == recorded.features,
        "columns": [column for column in recorded.column_names if table[column][:] == recorded[column][:]],
        "records": ib.read_records(table) == ib.read_records(recorded),
    }
    for name, table in tables.items()
}
streamed = ib.open_logits_table("alice/logits", revision="v1", streaming=True)
result["streamed"] = [row["row_key"] for row in streamed] == recorded["row_key"][:]
plain = load_dataset("alice/logits", revision="v1")
result["plain"] = [list(plain), plain["train"].features == opened.features, len(plain["train"])]

settings = {"max_steps": 1, "warmup_steps": 0, "report_to": "none", "use_cpu": True}


def train(trainer):
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    return sum(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters())) / len(before)


def distil(model, table, processor, output_dir):
    args = ib.DistillationArguments(output_dir, eval_strategy="no", **settings)
    return train(ib.EnsembleDistillationTrainer(model, args, train_dataset=table, processing_class=processor))


auto, processor = AutoModelForImageClassification, AutoImageProcessor.from_pretrained("alice/student")
student = auto.from_pretrained("alice/student")
result["trained"] = {"on its table": distil(student, tables["joined"], processor, "again")}

keywords = {"num_labels": 3, "ignore_mismatched_sizes": True}
tuned = auto.from_pretrained("alice/student", fusion="class_token", **keywords)
rows = [{**processor(IMAGE.rotate(90 * i), return_tensors="pt"), "labels": i % 3} for i in range(4)]
rows = [{**row, "pixel_values": row["pixel_values"][0]} for row in rows]
trainer = Trainer(tuned, TrainingArguments("tuned", **settings), train_dataset=rows)
result["trained"]["plain Trainer"] = train(trainer)
trainer.save_model()
result["tuned"] = auto.from_pretrained("tuned").config.to_dict()

new = ib.load_image_dataset("digits")["train"].filter(lambda label: label < 3, input_columns="label").select(range(12))
new = new.cast_column("label", type(new.features["label"])(names=["zero", "one", "two"]))
keywords |= ib.class_config(new)
inv = AutoImageProcessor.from_pretrained("alice/inv")
teachers = {name: (auto.from_pretrained("alice/inv", **keywords), inv) for name in ("conv", "inv")}
new = ib.record_teacher_logits(new, teachers, output_dir="new")
result["trained"]["new logits"] = distil(auto.from_pretrained("alice/student", **keywords), new, processor, "own")
print(json.dumps(result))
"""

STRANGER = """
import importlib.util

found = importlib.util.find_spec("hf_ibdistill")
used = use("alice/student", "alice/inv", trust_remote_code=True)
again = use("alice/inv", "alice/student", trust_remote_code=True)[::-1]
print(json.dumps({"found": found is not None, "used": [used, again], "imported": "hf_ibdistill" in sys.modules}))
"""


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(environment, folder, code, *arguments, python=sys.executable):
    folder.mkdir(exist_ok=True)
    command = [python, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result_of(process):
    """What it prints last, as JSON; and everything that it wrote."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-4000:]
    return json.loads(output.splitlines()[-1]), output + errors


def with_package(environment):
    return {**environment, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def running_hub(folder):
    with Hub(folder) as hub:
        hub.tokens[SECRET] = User("alice", "write")
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield hub
        hub.shutdown()
    assert not [request for request in hub.requests if request.status == 500]


@pytest.fixture(scope="module")
def shared_hub(tmp_path_factory):
    """A Hub that keeps what the author published."""
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def hopeless(tmp_path_factory):
    """A Hub that takes no commit, a folder, and a process that publishes it there."""
    folder = write(tmp_path_factory.mktemp("hopeless") / "folder", FILES)
    with running_hub(tmp_path_factory.mktemp("busy")) as hub:
        hub.faults = Faults(unavailable_every=1, only="/commit/")
        command = [sys.executable, ROOT / "scripts" / "push_to_hub.py", "--folder", folder, "--repo_id", "alice/model"]
        environment, pipe = with_package(hub.environment(SECRET)), subprocess.PIPE
        process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        yield hub, folder, process
        process.kill()


@pytest.fixture(scope="module")
def published(hopeless, shared_hub, tmp_path_factory):  # the other one mostly waits, so it may begin
    """The author's folder, the predictions before publishing, and what the author's process wrote."""
    folder = tmp_path_factory.mktemp("author")
    environment = with_package(shared_hub.environment(SECRET))
    return folder, *result_of(start(environment, folder, USE + AUTHOR, ROOT / "scripts", SECRET))


@pytest.fixture(scope="module")
def user(shared_hub, published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    environment = with_package(shared_hub.environment(READ_TOKEN))
    return folder, *result_of(start(environment, folder, USE + USER, published[0]))


@pytest.fixture(scope="module")
def stranger(shared_hub, published, tmp_path_factory):
    """A user whose Python finds this one's libraries, but nothing that only an editable install makes importable."""
    folder = tmp_path_factory.mktemp("stranger")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    libraries = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    (libraries / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    environment = shared_hub.environment(READ_TOKEN)
    environment.pop("PYTHONPATH", None)
    return result_of(start(environment, folder / "work", USE + STRANGER, python=python))[0]


def test_the_package_reads_back_what_it_published_and_runs_no_remote_code(published, user):
    _, before, _ = published
    _, result, _ = user
    assert [len(entry["pipeline"]) for entry in before] == [10, 10]
    assert result["used"] == [before, before]
    assert result["remote"] == []


def test_a_teacher_on_the_hub_is_recorded_with_its_commit(shared_hub, user):
    assert user[1]["revision"] == shared_hub.repos["model", "alice/inv"].refs["main"].oid


def test_transformers_alone_predicts_the_same(published, stranger):
    assert not stranger["found"], "only an editable install of hf_ibdistill is hidden"
    assert not stranger["imported"]
    assert stranger["used"] == [published[1], published[1]]


@pytest.mark.parametrize(("name", "family"), [("alice/student", "ibvit"), ("alice/inv", "ibresnet")])
def test_published_code_imports_nothing_else(name, family, shared_hub, published):
    files = shared_hub.files(name)
    code = {path for path in files if path.endswith(".py")}
    assert code == {f"configuration_{family}.py", f"modeling_{family}.py", "involution.py"}
    # huggingface_hub comes with transformers.
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for path in code:
        for node in ast.walk(ast.parse(files[path])):
            if isinstance(node, ast.Import):
                assert {name.name.partition(".")[0] for name in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                ours = node.level == 1 and f"{node.module}.py" in code
                assert ours or (node.level == 0 and node.module.partition(".")[0] in allowed), (path, node.module)


@pytest.mark.parametrize("name", ["joined", "pictures"])
def test_a_published_table_comes_back_with_and_without_images(name, user):
    columns = ["image", "label", "row_key", "conv_logits", "inv_logits"]
    found = user[1]["tables"][name]
    assert sorted(found.pop("columns")) == sorted(columns)
    assert found == {"features": True, "records": True}
    assert user[1]["streamed"]


def test_datasets_alone_opens_a_published_table(user):
    assert user[1]["plain"] == [["train"], True, 30]


def test_fine_tuning_from_the_hub(user):
    folder, result, _ = user
    # All weights change, but for the teacher tokens' where the class token speaks alone.
    assert result["trained"] == {"on its table": 1, "plain Trainer": pytest.approx(1, abs=0.1), "new logits": 1}
    assert result["tuned"]["fusion"] == "class_token" and len(result["tuned"]["id2label"]) == 3
    # It can be published in turn: its code is its own, not that of the repository that it comes from.
    assert set(result["tuned"]["auto_map"].values()) == {
        "configuration_ibvit.IBViTConfig",
        "modeling_ibvit.IBViTForImageClassification",
    }
    assert {"configuration_ibvit.py", "modeling_ibvit.py"} <= {path.name for path in (folder / "tuned").iterdir()}


def titles(hub, name):
    return [commit.title for commit in hub.repos["model", name].commits.values()]


def test_scripts_pass_on_where_and_how(shared_hub, published):
    repos, printed = shared_hub.repos, published[2]
    assert {name: repo.private for (_, name), repo in repos.items()} == {
        "alice/inv": True,
        "alice/student": False,
        "alice/logits": False,
        "alice/pictures": True,
        "alice/conv": False,
        "alice/bare": False,
    }
    assert titles(shared_hub, "alice/student")[1:] == ["Training in progress, step 1", "End of training"]
    assert set(repos["dataset", "alice/logits"].refs) == {"main", "v1"}
    assert repos["dataset", "alice/logits"].refs["v1"].title == "Recorded"
    assert repos["dataset", "alice/pictures"].refs["main"].title == "Upload recorded logits"
    assert shared_hub.files("alice/logits", kind="dataset") == {}
    assert set(repos["model", "alice/conv"].refs) == {"main", "refs/pr/1"}
    assert shared_hub.files("alice/conv") == {} and shared_hub.files("alice/conv", revision="refs/pr/1")
    for address in ("datasets/alice/logits", "datasets/alice/pictures", "alice/conv/discussions/1"):
        assert f"{shared_hub.endpoint}/{address}\n" in printed
    assert 'hub_strategy="checkpoint" would publish pickles of the optimizer' in printed
    assert 'Choose "end" or "every_save".' in printed


def test_published_cards_are_filled_and_parse(shared_hub, published):
    folder = published[0]
    for name, local in (("alice/student", "student"), ("alice/inv", "inv")):
        card = ModelCard(shared_hub.files(name)["README.md"].decode())
        measured = json.loads((folder / local / "results.json").read_text())
        metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert metrics == pytest.approx(measured["metrics"], abs=1e-6)
        assert f'model="{name}", trust_remote_code=True' in card.text
        assert str(folder) not in card.content
    # Its first teacher was a folder, its second came from the Hub.
    student = shared_hub.files("alice/student")["README.md"].decode()
    assert "| conv | conv |" in student and "| inv | [alice/inv](https://huggingface.co/alice/inv) |" in student
    # Nobody had said where this one would be published.
    proposed = shared_hub.files("alice/conv", revision="refs/pr/1")["README.md"].decode()
    assert 'model="alice/conv"' in proposed
    assert 'model="path/to/this/folder"' in (folder / "conv" / "README.md").read_text()

    logits = DatasetCard(shared_hub.files("alice/logits", kind="dataset", revision="v1")["README.md"].decode())
    assert 'open_logits_table("alice/logits")' in logits.text and "attach_teacher_logits(images, table)" in logits.text
    pictures = DatasetCard(shared_hub.files("alice/pictures", kind="dataset")["README.md"].decode())
    assert "attach_teacher_logits" not in pictures.text and "about 30 images, 2 augmented views" in pictures.text


def test_files_on_the_hub(shared_hub, published):
    model = {"config.json", "model.safetensors", "preprocessor_config.json", "involution.py", "README.md"}
    ibvit, ibresnet = ({f"{kind}_{f}.py" for kind in ("configuration", "modeling")} for f in ("ibvit", "ibresnet"))
    assert set(shared_hub.files("alice/student")) == model | ibvit | {"results.json"}
    assert set(shared_hub.files("alice/inv")) == model | ibresnet | {"results.json"}
    assert set(shared_hub.files("alice/bare")) == (model - {"preprocessor_config.json"}) | ibvit
    in_progress = [c for c in shared_hub.repos["model", "alice/student"].commits.values() if "progress" in c.title]
    assert set(in_progress[0].files) == {".gitattributes"} | (model - {"README.md"}) | ibvit
    table = {"README.md", "provenance.json", "data/train-00000-of-00001.parquet"}
    assert set(shared_hub.files("alice/logits", kind="dataset", revision="v1")) == table
    assert set(shared_hub.files("alice/pictures", kind="dataset")) == table


def test_no_token_is_anywhere_and_no_pickle_on_the_hub(shared_hub, published, user):
    folder, _, printed = published
    checkpoint = {path.name for path in (folder / "student" / "checkpoint-1").iterdir()}
    assert {"optimizer.pt", "trainer_state.json"} <= checkpoint and "training_args.bin" not in checkpoint
    local = [path for place in (folder, user[0]) for path in place.rglob("*") if path.is_file()]
    assert len(local) > 50 and not [path for path in local if SECRET.encode() in path.read_bytes()]
    commits = [commit for repo in shared_hub.repos.values() for commit in repo.commits.values()]
    there = [(path, content) for commit in commits for path, content in commit.files.items()]
    assert len(there) > 40 and not [path for path, content in there if SECRET.encode() in content]
    assert not [path for path, _ in there if path.endswith(PICKLES)]
    assert SECRET not in str(shared_hub.requests) and SECRET not in printed


# What goes wrong


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "folder", FILES)


@pytest.fixture
def author(hub, monkeypatch, tmp_path):
    """Makes `hub` this process's, which has no token but the one that a test gives."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return hub


def push(folder, repo_id="alice/model", token=WRITE_TOKEN, **keywords):
    return push_folder_to_hub(folder, repo_id, token=token, **keywords)


def test_arguments_pass_through(author, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert (
        push(".", "model", private=True, revision="dev/1", commit_message="First") == f"{author.endpoint}/alice/model"
    )
    repo = author.repos["model", "alice/model"]
    assert repo.private and repo.refs["dev/1"].title == "First"
    assert author.files("alice/model", revision="dev/1") == FILES and author.files("alice/model") == {}
    assert push(".", create_pr=True).endswith("/alice/model/discussions/1")
    assert author.files("alice/model", revision="refs/pr/1") == FILES and author.files("alice/model") == {}
    (folder / "more.txt").write_text("more")
    push(".", revision="refs/pr/1")
    assert "more.txt" in author.files("alice/model", revision="refs/pr/1")
    assert repo.refs["refs/pr/1"].title == "Upload folder"
    with pytest.raises(ValueError, match="no such revision. Leave it out, name a branch, or open a pull request"):
        push(".", revision="refs/pr/7")


def test_what_is_private_or_a_pickle_stays_at_home(author, folder):
    stays = ["training_args.bin", "optimizer.pt", "sub/state.pkl", "sub/rng.pth", "old.ckpt", "trainer_state.json"]
    stays += [".env", "sub/.env", ".git/config", "checkpoint-1/model.safetensors", "__pycache__/a.pyc", "sub/b.pyc"]
    write(folder, dict.fromkeys(stays, SECRET.encode()))
    push(folder)
    assert author.files("alice/model") == FILES


def test_a_second_push_adds_nothing_and_loses_nothing(author, folder):
    for _ in range(2):
        push(folder)
    repo = author.repos["model", "alice/model"]
    assert len(repo.commits) == 2
    repo.commit("main", {**repo.refs["main"].files, "by_hand.md": b"# Note"})
    (folder / "config.json").write_bytes(b'{"more": 1}')
    push(folder)
    assert author.files("alice/model") == {**FILES, "by_hand.md": b"# Note", "config.json": b'{"more": 1}'}
    # The weights had arrived before.
    sent = [request for request in author.requests if request.method == "PUT"]
    assert len(sent) == 1 and isinstance(author.files("alice/model")["model.safetensors"], LargeFile)


def test_a_table_takes_the_place_of_a_longer_one(author, published, tmp_path):
    table = load_from_disk(published[0] / "table")["train"]
    push(export_logits_table(table, tmp_path / "long", rows_per_file=12), "alice/logits")
    push(export_logits_table(table, tmp_path / "short"), "alice/logits")
    files = author.files("alice/logits", kind="dataset")
    assert set(files) == {"README.md", "provenance.json", "data/train-00000-of-00001.parquet"}
    assert 'open_logits_table("alice/logits")' in files["README.md"].decode()
    assert json.loads(files["provenance.json"]) == read_records(table)[0]


def test_tables_are_checked_before_anything_is_sent(author, published):
    tables = load_from_disk(published[0] / "table")
    assert isinstance(tables, DatasetDict)
    with pytest.raises(
        ValueError, match=r'one split. Give one of test, train, validation, for example table\["train"\]'
    ):
        push_logits_to_hub(tables, "alice/logits", token=WRITE_TOKEN)
    assert author.requests == []
    with pytest.raises(ValueError, match="has no logits; its columns are row_key. record_teacher_logits adds them"):
        push_logits_to_hub(tables["train"].select_columns(["row_key"]), "alice/logits", token=WRITE_TOKEN)
    assert author.files("alice/logits", kind="dataset") == {}


def test_a_folder_that_is_nothing_to_publish(author, folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights .*Save the model there with save_pretrained"):
        push(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="neither a model .* nor a table .*Give the folder of a trained model"):
        push(folder)
    assert author.requests == []


@pytest.mark.parametrize("name", ["alice/a--b", "alice/a b", "alice/.a", "a/b/c", "alice/a.git", "é", ""])
def test_names_that_are_not_valid(author, folder, name):
    with pytest.raises(ValueError, match="[Rr]epo[_ ]id"):
        push(folder, name)
    assert author.requests == []


def test_who_may_not_publish(author, folder):
    with pytest.raises(PermissionError, match="needs an access token .*`hf auth login`, or set HF_TOKEN"):
        push(folder, token=None)
    assert author.requests == []
    private, public = author.create("bob/private", private=True), author.create("bob/public")
    author.create("alice/there")
    refused = [(READ_TOKEN, "alice/model"), (READ_TOKEN, "alice/there"), ("no-such-token", "alice/model")]
    refused += [(WRITE_TOKEN, "bob/private"), (WRITE_TOKEN, "bob/public"), (WRITE_TOKEN, "bob/new")]
    for token, name in refused:
        with pytest.raises(
            PermissionError, match="token that may write .*choose another name, or propose it"
        ) as caught:
            push(folder, name, token=token)
        assert name in str(caught.value) and token not in str(caught.value)
    assert {repo.name for repo in author.repos.values()} == {"bob/private", "bob/public", "alice/there"}
    assert len(private.commits) == len(public.commits) == 1
    # What the message proposes works.
    assert push(folder, "bob/public", create_pr=True).endswith("/bob/public/discussions/1")
    assert author.files("bob/public", revision="refs/pr/1") == FILES
    assert push(folder, token=OTHER_TOKEN, repo_id="public").endswith("/bob/public")
    assert read(folder) == FILES


def test_a_hub_that_is_busy_once_in_three_writes(author, folder, caplog):
    author.faults = Faults(unavailable_every=3)
    push(folder, revision="dev")
    assert author.files("alice/model", revision="dev") == FILES
    assert [request.status for request in author.requests].count(503) >= 2
    assert re.search(r"The Hub is busy .*Trying again in 1 s\.", caplog.text)
    assert WRITE_TOKEN not in caplog.text


@pytest.mark.parametrize("where", ["half", "answer"])
def test_a_connection_that_is_cut_in_a_commit(author, folder, where, caplog):
    author.faults = Faults(cut_uploads={1: where}, only="/commit/")
    push(folder)
    assert author.files("alice/model") == FILES
    assert titles(author, "alice/model") == ["initial commit", "Upload folder"]
    assert "was cut while publishing alice/model. Nothing local is lost" in caplog.text


def test_a_connection_that_is_cut_in_a_large_file(author, folder):
    author.faults = Faults(cut_uploads={1: "half"}, only="/storage/")
    push(folder)
    assert author.files("alice/model") == FILES


@pytest.mark.parametrize(("where", "there"), [("half", 0), ("answer", 1)])
def test_a_pull_request_is_not_opened_twice(author, folder, where, there):
    push(folder)
    (folder / "config.json").write_bytes(b'{"more": 1}')
    author.faults = Faults(cut_uploads={1: where}, only="/commit/")
    with pytest.raises(ConnectionError, match="Look whether the pull request is there before you call it again"):
        push(folder, create_pr=True)
    opened = [ref for ref in author.repos["model", "alice/model"].refs if ref.startswith("refs/pr/")]
    assert len(opened) == there
    assert push(folder, create_pr=True).endswith(f"/discussions/{there + 1}")


# Trainers


def build_trainer(output_dir, **settings):
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    table = Dataset.from_dict({"image": list(pixels), "label": [0, 1, 0, 1]}, features=features)
    shape = {"stem": "plain", "embedding_size": 16, "hidden_sizes": (16,), "depths": (1,), "downsample_strides": (1,)}
    model = IBResNetForImageClassification(IBResNetConfig(id2label={0: "cat", 1: "dog"}, **shape))
    settings = {"eval_strategy": "no", "per_device_train_batch_size": 2, "max_steps": 2, **settings}
    args = ImageTrainingArguments(str(output_dir), use_cpu=True, bf16=False, disable_tqdm=True, **settings)
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    return ImageClassificationTrainer(model, args, train_dataset=table, processing_class=processor)


def test_a_trainer_passes_arguments_on(author, tmp_path):
    trainer = build_trainer(tmp_path / "model")
    how = {"token": WRITE_TOKEN, "private": True, "revision": "v1"}
    assert trainer.push_to_hub("Trained", **how) == f"{author.endpoint}/alice/model"
    repo, files = author.repos["model", "alice/model"], author.files("alice/model", revision="v1")
    assert repo.private and repo.refs["v1"].title == "Trained" and author.files("alice/model") == {}
    # Nothing was evaluated, so the card has no results.
    card = ModelCard(files["README.md"].decode())
    assert 'model="alice/model"' in card.text and card.data.eval_results is None and "## Results" not in card.text
    assert trainer.push_to_hub("Trained", create_pr=True, token=WRITE_TOKEN).endswith("/discussions/1")
    assert author.files("alice/model", revision="refs/pr/1").keys() == files.keys()


def test_a_trainer_says_before_training_that_it_cannot_publish(author, tmp_path):
    with pytest.raises(PermissionError, match="hf auth login"):
        build_trainer(tmp_path / "model", push_to_hub=True)
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match=f'"{strategy}" would publish pickles .*Choose "end" or "every_save"'):
            build_trainer(tmp_path / "model", push_to_hub=True, hub_token=WRITE_TOKEN, hub_strategy=strategy)
    assert author.requests == []


class LoseRights(TrainerCallback):
    def __init__(self, hub):
        self.tokens = hub.tokens

    def on_step_end(self, args, state, control, **kwargs):
        self.tokens[WRITE_TOKEN] = User("alice", "write" if state.global_step == 1 else "read")


def test_training_goes_on_when_a_save_cannot_be_published(author, tmp_path, caplog):
    often = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "every_save", "hub_token": WRITE_TOKEN}
    trainer = build_trainer(tmp_path / "model", push_to_hub=True, **often)
    trainer.add_callback(LoseRights(author))
    trainer.train()
    assert titles(author, "alice/model")[1:] == ["Training in progress, step 1"]
    assert "checkpoint-2 was not published: alice/model cannot be published (403)" in caplog.text
    author.tokens[WRITE_TOKEN] = User("alice", "write")
    trainer.push_to_hub()
    assert titles(author, "alice/model")[2:] == ["End of training"]
    everything = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert "optimizer.pt" in everything and "training_args.bin" not in everything


# Offline, and a Hub that does not come back

OFFLINE = """
import hf_ibdistill as ib

author, = sys.argv[1:]
try:
    ib.push_folder_to_hub(f"{author}/student", "alice/student")
except ConnectionError as error:
    message = str(error)
used = use(f"{author}/student", f"{author}/inv")
from datasets import load_from_disk

table = load_from_disk(f"{author}/table")["train"]
opened = ib.open_logits_table(ib.export_logits_table(table, "exported"))
processor, args = AutoImageProcessor.from_pretrained(f"{author}/student"), {"max_steps": 1, "eval_strategy": "no"}
student = AutoModelForImageClassification.from_pretrained(f"{author}/student")
args = ib.DistillationArguments("again", **args)
ib.EnsembleDistillationTrainer(student, args, train_dataset=opened, processing_class=processor).train()
print(json.dumps({"message": message, "used": used}))
"""


def test_offline_everything_local_works_and_publishing_says_so(shared_hub, published, tmp_path):
    environment = with_package(shared_hub.environment(SECRET, HF_HUB_OFFLINE="1"))
    before = len(shared_hub.requests)
    result, _ = result_of(start(environment, tmp_path, USE + OFFLINE, published[0]))
    assert result["message"] == "alice/student cannot be published offline. Unset HF_HUB_OFFLINE."
    assert result["used"] == published[1]
    assert len(shared_hub.requests) == before


def test_a_hub_that_does_not_come_back(hopeless, author, monkeypatch):
    hub, folder, process = hopeless
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1 and "Traceback" not in errors and SECRET not in output + errors
    assert errors.count("Trying again") == 8
    assert re.fullmatch(
        r"push_to_hub.py: The Hub is busy \(503\)\. Nothing local is lost: publish it again, for example a saved folder "
        r"with scripts/push_to_hub\.py; what has arrived is not sent twice\.",
        errors.splitlines()[-1],
    )
    assert read(folder) == FILES and hub.files("alice/model") == {}
    hub.faults = Faults()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    push(folder)
    assert hub.files("alice/model") == FILES
    assert [request.method for request in hub.requests].count("PUT") == 1
