"""Publishing on a Hub, and using what was published: with this package, without it, and when the network fails.

The author and the users are processes of their own, which reach the Hub of hub_server.py. Faults are tested in this process.
"""

import ast
import json
import subprocess
import sys
import sysconfig
import threading
import time
import venv
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_from_disk
from hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, Faults, Hub, LargeFile, User, run_hub  # noqa: F401
from huggingface_hub import DatasetCard, ModelCard, constants
from running import run
from transformers import AutoModelForImageClassification, TrainerCallback, ViTImageProcessor

import hf_ibdistill
from hf_ibdistill import (
    IBResNetConfig,
    IBResNetForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
    create_model_card,
    export_logits_table,
    push_folder_to_hub,
    push_logits_to_hub,
    read_records,
)


ROOT = Path(hf_ibdistill.__file__).parents[1]
# Unlike any other text, so that a search finds it.
SECRET = "hf_OnlyAliceKnowsThisOne"
CODE = {
    "ibvit": {
        "configuration_ibvit.py",
        "modeling_ibvit.py",
        "conversion_vit.py",
        "involution.py",
        "involution_triton.py",
    },
    "ibresnet": {"configuration_ibresnet.py", "modeling_ibresnet.py", "involution.py", "involution_triton.py"},
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FILES = {
    "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 100,
    "sub/notes.txt": b"text",
}


# Round trips: an author, users with and without the package, and a user without a network

USE = """
import json
import sys

import PIL.Image
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

IMAGE = PIL.Image.frombytes("L", (8, 8), bytes(range(0, 256, 4))).convert("RGB")


def use(*names, **keywords):
    # All of them are loaded before the first predicts.
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

# Importing the libraries takes most of the time of a process here. So one process imports them, without this package, and
# each person is a fork of it, with an empty cache.
PEOPLE = """
import os
import shutil
import traceback
from pathlib import Path

import huggingface_hub
import sklearn.metrics
from datasets import load_dataset, load_from_disk
from transformers import Trainer, TrainingArguments, ViTImageProcessor


def become(folder, code, token, path, arguments):
    os.chdir(folder)
    for stream, file in ((1, "output"), (2, "errors")):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), stream)
    os.environ["HF_TOKEN"], sys.path[:0], sys.argv[1:] = token, path, arguments
    try:
        exec(code, globals())
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for person in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        status = become(**person)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(Path(person["folder"], "errors").read_text()[-4000:])
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
"""

AUTHOR = """
from hf_ibdistill.commands import main as run

token, = sys.argv[1:]
data, one = ["--dataset", "images"], ["--max_steps", "1", "--warmup_steps", "0"]
publish = ["--push_to_hub", "true", "--hub_model_id"]
run(["train-teacher", *data, *one, "--output_dir", "conv", "--preset", "convolution-small"])
run(["train-teacher", *data, *one, "--output_dir", "inv", "--preset", "involution-small",
     *publish, "alice/inv", "--hub_private_repo", "true"])
run(["record", *data, "--num_views", "2", "--output_dir", "table", "--teachers",
     f"conv={os.getcwd()}/conv", "inv=alice/inv"])
run(["distill", "--dataset", "table", *one, "--patch_embedding", "bias_stems", "--output_dir", "student",
     "--save_strategy", "epoch", "--hub_strategy", "every_save", "--hub_token", token, *publish, "student"])
run(["push", "--folder", "table", "--repo_id", "logits", "--revision", "v1", "--commit_message", "Recorded"])
run(["push", "--folder", "table", "--repo_id", "alice/pictures", "--with_images", "--private"])
run(["push", "--folder", "conv", "--repo_id", "alice/conv", "--create_pr"])
try:
    run(["train-teacher", *data, *one, "--output_dir", "refused", *publish, "alice/refused",
         "--hub_strategy", "checkpoint"])
except SystemExit as refused:
    print(refused.code)
# The way of transformers: no image processor, and an empty card.
AutoModelForImageClassification.from_pretrained("student").push_to_hub("alice/bare")
print(json.dumps(use("student", "inv")))
"""

USER = """
import hf_ibdistill as ib

author, = sys.argv[1:]
result = {
    "used": [use("alice/student", "alice/inv"), use("alice/student", "alice/inv", trust_remote_code=True)],
    "remote": [name for name in sys.modules if name.startswith("transformers_modules")],
}

result["revision"] = ib.load_teachers({"inv": "alice/inv"})[0].revision
recorded, images = (load_from_disk(f"{author}/{name}")["train"] for name in ("table", "images"))
opened = ib.open_logits_table("alice/logits", revision="v1")
(record,) = ib.read_records(recorded)
# The rest of the path describes the author's machine.
assert record["teachers"][0]["source"] == f"{author}/conv"
record["teachers"][0]["source"] = "conv"
tables = {"joined": ib.attach_teacher_logits(images, opened), "pictures": ib.open_logits_table("alice/pictures")}
result["tables"] = {
    name: {
        "features": table.features == recorded.features,
        "columns": [column for column in recorded.column_names if table[column][:] == recorded[column][:]],
        "records": ib.read_records(table) == [record],
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

new = images.filter(lambda label: label < 3, input_columns="label")
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


OFFLINE = """
import socket

import hf_ibdistill as ib

author, = sys.argv[1:]
huggingface_hub.constants.HF_HUB_OFFLINE, connections = True, []
socket.socket.connect = lambda *arguments: connections.append(str(arguments))
try:
    ib.push_folder_to_hub(f"{author}/student", "alice/student")
except ConnectionError as error:
    message = str(error)
used = use(f"{author}/student", f"{author}/inv")
opened = ib.open_logits_table(ib.export_logits_table(load_from_disk(f"{author}/table")["train"], "exported"))
processor = AutoImageProcessor.from_pretrained(f"{author}/student")
student = AutoModelForImageClassification.from_pretrained(f"{author}/student")
args = ib.DistillationArguments("again", max_steps=1, eval_strategy="no")
ib.EnsembleDistillationTrainer(student, args, train_dataset=opened, processing_class=processor).train()
print(json.dumps({"message": message, "used": used, "connections": connections}))
"""


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_images(folder):
    """Splits of 30, 10 and 10 images of 10 classes."""
    features = Features({"image": Image(), "label": ClassLabel(names=[str(number) for number in range(10)])})
    splits = DatasetDict()
    for split, rows in (("train", 30), ("validation", 10), ("test", 10)):
        pixels = np.random.default_rng(len(splits)).integers(0, 256, (rows, 8, 8), dtype=np.uint8)
        rows = {"image": list(pixels), "label": [row % 10 for row in range(rows)]}
        splits[split] = Dataset.from_dict(rows, features=features)
    splits.save_to_disk(folder)


def make_stranger(folder):
    """A Python that finds the libraries of this one, but nothing that only an editable install makes importable."""
    venv.create(folder, symlinks=True)
    libraries = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (libraries / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def shared_hub(tmp_path_factory):
    """A Hub that keeps what the author published."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.tokens[SECRET] = User("alice", "write")
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield hub
        hub.shutdown()
    assert not [request for request in hub.requests if request.status == 500]


@pytest.fixture(scope="module")
def people(shared_hub, tmp_path_factory):
    """Person → folder, with what was printed in its files "output" and "errors"."""
    folder = tmp_path_factory.mktemp("people")
    save_images(folder / "author" / "images")
    persons = [("author", AUTHOR, SECRET, [ROOT], [SECRET]), ("user", USER, READ_TOKEN, [ROOT], [folder / "author"])]
    persons += [("stranger", STRANGER, READ_TOKEN, [], []), ("offline", OFFLINE, SECRET, [ROOT], [folder / "author"])]
    names, keys = [name for name, *_ in persons], ("folder", "code", "token", "path", "arguments")
    for name in names:
        (folder / name).mkdir(exist_ok=True)
    persons = json.dumps([dict(zip(keys, (folder / name, *rest))) for name, *rest in persons], default=str)
    environment = shared_hub.environment()
    environment.pop("PYTHONPATH", None)
    command = [make_stranger(folder / "venv"), "-c", USE + PEOPLE, persons]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: folder / name for name in names}


def result_of(folder):
    """What a person printed last."""
    return json.loads((folder / "output").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def published(people):
    """The author's folder, and the predictions there before publishing."""
    return people["author"], result_of(people["author"])


@pytest.fixture(scope="module")
def user(people):
    return people["user"], result_of(people["user"])


def test_the_package_reads_back_what_it_published_and_runs_no_remote_code(published, user):
    before, result = published[1], user[1]
    assert [len(entry["pipeline"]) for entry in before] == [10, 10]
    assert result["used"] == [before, before]
    assert result["remote"] == []


def test_a_teacher_on_the_hub_is_recorded_with_its_commit(shared_hub, user):
    assert user[1]["revision"] == shared_hub.repos["model", "alice/inv"].refs["main"].oid


def test_transformers_alone_predicts_the_same(people, published):
    stranger = result_of(people["stranger"])
    assert not stranger["found"], "only an editable install of hf_ibdistill is hidden"
    assert not stranger["imported"]
    assert stranger["used"] == [published[1], published[1]]


@pytest.mark.parametrize(("name", "family"), [("alice/student", "ibvit"), ("alice/inv", "ibresnet")])
def test_published_code_imports_nothing_else(name, family, shared_hub, published):
    files = shared_hub.files(name)
    code = {path for path in files if path.endswith(".py")}
    assert code == CODE[family]
    # huggingface_hub comes with transformers.
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for path in code:
        tree = ast.parse(files[path])
        # Not required, so in a `try`.
        tries = [statement for node in ast.walk(tree) if isinstance(node, ast.Try) for statement in node.body]
        optional = {*map(id, (node for statement in tries for node in ast.walk(statement)))}
        for node in ast.walk(tree):
            known = allowed | {"triton"} if id(node) in optional else allowed
            if isinstance(node, ast.Import):
                assert {name.name.partition(".")[0] for name in node.names} <= known
            elif isinstance(node, ast.ImportFrom):
                ours = node.level == 1 and f"{node.module}.py" in code
                assert ours or (node.level == 0 and node.module.partition(".")[0] in known), (path, node.module)


@pytest.mark.parametrize("name", ["joined", "pictures"])
def test_a_published_table_comes_back_with_and_without_images(name, user):
    columns = ["image", "label", "row_key", "file_key", "conv_logits", "inv_logits"]
    found = user[1]["tables"][name]
    assert sorted(found.pop("columns")) == sorted(columns)
    assert found == {"features": True, "records": True}
    assert user[1]["streamed"]


def test_datasets_alone_opens_a_published_table(user):
    assert user[1]["plain"] == [["train"], True, 30]


def test_fine_tuning_from_the_hub(user):
    folder, result = user
    # All weights change, those of teacher tokens that have no part in the prediction as well.
    assert result["trained"] == {"on its table": 1, "plain Trainer": 1, "new logits": 1}
    assert result["tuned"]["fusion"] == "class_token" and len(result["tuned"]["id2label"]) == 3
    # It can be published in turn, because its code is in its folder, not in the repository that it comes from.
    assert set(result["tuned"]["auto_map"].values()) == {
        "configuration_ibvit.IBViTConfig",
        "modeling_ibvit.IBViTForImageClassification",
        "modeling_ibvit.IBViTModel",
    }
    assert CODE["ibvit"] <= {path.name for path in (folder / "tuned").iterdir()}


def titles(hub, name):
    return [commit.title for commit in hub.repos["model", name].commits.values()]


def test_commands_pass_on_where_and_how(shared_hub, published):
    repos, printed = shared_hub.repos, (published[0] / "output").read_text()
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
    assert 'hub_strategy="checkpoint"' in printed


def test_published_cards_are_filled_and_parse(shared_hub, published):
    folder = published[0]
    for name, local in (("alice/student", "student"), ("alice/inv", "inv")):
        card = ModelCard(shared_hub.files(name)["README.md"].decode())
        measured = json.loads((folder / local / "results.json").read_text())
        metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert metrics == pytest.approx(measured["metrics"], abs=1e-6)
        assert f'model="{name}", trust_remote_code=True' in card.text
        assert str(folder) not in card.content
        # The card is made of the results and nothing else.
        model = AutoModelForImageClassification.from_pretrained(folder / local)
        assert create_model_card(model, measured, repo_id=name).content == (folder / local / "README.md").read_text()
    # Its first teacher was a folder, its second came from the Hub.
    student = shared_hub.files("alice/student")["README.md"].decode()
    assert "| conv | conv |" in student and "| inv | [alice/inv](https://huggingface.co/alice/inv) |" in student
    # This card was made before there was a repository.
    proposed = shared_hub.files("alice/conv", revision="refs/pr/1")["README.md"].decode()
    assert 'model="alice/conv"' in proposed
    assert 'model="path/to/this/folder"' in (folder / "conv" / "README.md").read_text()

    logits = DatasetCard(shared_hub.files("alice/logits", kind="dataset", revision="v1")["README.md"].decode())
    assert 'open_logits_table("alice/logits")' in logits.text and "attach_teacher_logits(images, table)" in logits.text
    pictures = DatasetCard(shared_hub.files("alice/pictures", kind="dataset")["README.md"].decode())
    assert "attach_teacher_logits" not in pictures.text and "about 30 images, 2 augmented views" in pictures.text


def test_files_on_the_hub(shared_hub, published):
    model, ibvit = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}, CODE["ibvit"]
    # Not the pictures and the report with images of the data.
    pictures = {f"pictures/{name}.png" for name in ("curves", "classes", "calibration")}
    assert set(shared_hub.files("alice/student")) == model | ibvit | {"results.json"} | pictures
    assert set(shared_hub.files("alice/inv")) == model | CODE["ibresnet"] | {"results.json"} | pictures
    assert set(shared_hub.files("alice/bare")) == (model - {"preprocessor_config.json"}) | ibvit
    in_progress = [c for c in shared_hub.repos["model", "alice/student"].commits.values() if "progress" in c.title]
    assert set(in_progress[0].files) == {".gitattributes"} | (model - {"README.md"}) | ibvit
    table = {"README.md", "provenance.json", "data/train-00000-of-00001.parquet"}
    assert set(shared_hub.files("alice/logits", kind="dataset", revision="v1")) == table
    assert set(shared_hub.files("alice/pictures", kind="dataset")) == table


def test_no_token_is_anywhere_and_no_pickle_on_the_hub(shared_hub, people):
    checkpoint = {path.name for path in (people["author"] / "student" / "checkpoint-1").iterdir()}
    assert {"optimizer.pt", "trainer_state.json"} <= checkpoint and "training_args.bin" not in checkpoint
    # What was printed is in files as well.
    local = [path for folder in people.values() for path in folder.rglob("*") if path.is_file()]
    assert len(local) > 50 and not [path for path in local if SECRET.encode() in path.read_bytes()]
    commits = [commit for repo in shared_hub.repos.values() for commit in repo.commits.values()]
    there = [(path, content) for commit in commits for path, content in commit.files.items()]
    assert len(there) > 40 and not [path for path, content in there if SECRET.encode() in content]
    assert not [path for path, _ in there if path.endswith(PICKLES)]
    assert SECRET not in str(shared_hub.requests)
    # No path of this machine is there.
    assert not [path for path, content in there if str(people["author"].parent).encode() in content]


def test_offline_everything_local_works_and_publishing_is_refused(people, published):
    result = result_of(people["offline"])
    assert "alice/student" in result["message"] and "HF_HUB_OFFLINE" in result["message"]
    assert result["used"] == published[1]
    assert result["connections"] == []


# What goes wrong


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "folder", FILES)


@pytest.fixture
def waits(monkeypatch):
    """The seconds that retries wait for, which do not pass."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


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
    for revision in ("refs/pr/1", "dev/1"):
        push(".", revision=revision)
        assert "more.txt" in author.files("alice/model", revision=revision)
    assert repo.refs["refs/pr/1"].title == "Upload folder"
    with pytest.raises(ValueError, match="revision=refs/pr/7 .* alice/model"):
        push(".", revision="refs/pr/7")


def test_what_is_private_or_a_pickle_stays_at_home(author, folder):
    stays = ["training_args.bin", "optimizer.pt", "sub/state.pkl", "sub/rng.pth", "old.ckpt", "trainer_state.json"]
    stays += [".env", "sub/.env", ".git/config", "checkpoint-1/model.safetensors", "__pycache__/a.pyc", "sub/b.pyc"]
    write(folder, dict.fromkeys(stays, SECRET.encode()))
    push(folder)
    assert author.files("alice/model") == FILES


def test_images_of_the_data_stay_at_home_unless_asked_for(author, folder):
    lines = [f"![alt {name}](pictures/{name}.png)" for name in ("curves", "examples", "attention")]
    pictures = {f"pictures/{name}.png": b"png" for name in ("curves", "examples", "attention")}
    write(folder, {**pictures, "report.html": b"html", "predictions.safetensors": b"0"})
    (folder / "README.md").write_text("# Card\n\n" + "\n\n".join(lines) + "\n\n## Recipe\n")
    push(folder)
    files = author.files("alice/model")
    assert files.keys() == {*FILES, "README.md", "pictures/curves.png"}
    assert files["README.md"].decode() == f"# Card\n\n{lines[0]}\n\n## Recipe\n"
    push(folder, with_images=True)
    files = author.files("alice/model")
    assert files.keys() == {*FILES, "README.md", "report.html", *pictures}
    assert files["README.md"].decode() == (folder / "README.md").read_text()


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
    (record,) = read_records(table)
    record["teachers"][0]["source"] = "conv"
    assert json.loads(files["provenance.json"]) == record


def test_tables_are_checked_before_anything_is_sent(author, published):
    tables = load_from_disk(published[0] / "table")
    assert isinstance(tables, DatasetDict)
    with pytest.raises(TypeError, match="train, validation, test"):
        push_logits_to_hub(tables, "alice/logits", token=WRITE_TOKEN)
    assert author.requests == []
    with pytest.raises(ValueError, match="columns are row_key"):
        push_logits_to_hub(tables["train"].select_columns(["row_key"]), "alice/logits", token=WRITE_TOKEN)
    assert author.files("alice/logits", kind="dataset") == {}


def test_a_folder_that_is_nothing_to_publish(author, folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{folder.name} .*safetensors"):
        push(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=f"{folder.name} .*config.json"):
        push(folder)
    assert author.requests == []


@pytest.mark.parametrize("name", ["alice/a--b", "alice/a b", "alice/.a", "a/b/c", "alice/a.git", "é", ""])
def test_names_that_are_not_valid(author, folder, name):
    with pytest.raises(ValueError, match="[Rr]epo[_ ]id"):
        push(folder, name)
    assert author.requests == []


def test_who_may_not_publish(author, folder):
    with pytest.raises(PermissionError, match="alice/model .*HF_TOKEN"):
        push(folder, token=None)
    assert author.requests == []
    private, public = author.create("bob/private", private=True), author.create("bob/public")
    author.create("alice/there")
    refused = [(READ_TOKEN, "alice/model"), (READ_TOKEN, "alice/there"), ("no-such-token", "alice/model")]
    refused += [(WRITE_TOKEN, "bob/private"), (WRITE_TOKEN, "bob/public"), (WRITE_TOKEN, "bob/new")]
    for token, name in refused:
        with pytest.raises(PermissionError, match=f"{name} .*40[134].*create_pr") as caught:
            push(folder, name, token=token)
        assert token not in str(caught.value)
    assert {repo.name for repo in author.repos.values()} == {"bob/private", "bob/public", "alice/there"}
    assert len(private.commits) == len(public.commits) == 1
    # What the message proposes works.
    assert push(folder, "bob/public", create_pr=True).endswith("/bob/public/discussions/1")
    assert author.files("bob/public", revision="refs/pr/1") == FILES
    assert push(folder, token=OTHER_TOKEN, repo_id="public").endswith("/bob/public")
    assert read(folder) == FILES


def test_a_hub_that_is_busy_once_in_three_writes(author, folder, waits, caplog):
    author.faults = Faults(unavailable_every=3)
    push(folder, revision="dev")
    assert author.files("alice/model", revision="dev") == FILES
    assert [request.status for request in author.requests].count(503) >= 2
    assert "alice/model" in caplog.text and "503" in caplog.text and "1 s." in caplog.text
    assert WRITE_TOKEN not in caplog.text


@pytest.mark.parametrize("where", ["half", "answer"])
def test_a_connection_that_is_cut_in_a_commit(author, folder, waits, where, caplog):
    author.faults = Faults(cut_uploads={1: where}, only="/commit/")
    push(folder)
    assert author.files("alice/model") == FILES
    assert titles(author, "alice/model") == ["initial commit", "Upload folder"]
    assert "cut" in caplog.text and "alice/model" in caplog.text


def test_a_connection_that_is_cut_in_a_large_file(author, folder, waits):
    author.faults = Faults(cut_uploads={1: "half"}, only="/storage/")
    push(folder)
    assert author.files("alice/model") == FILES


@pytest.mark.parametrize(("where", "there"), [("half", 0), ("answer", 1)])
def test_a_pull_request_is_not_opened_twice(author, folder, where, there):
    push(folder)
    (folder / "config.json").write_bytes(b'{"more": 1}')
    author.faults = Faults(cut_uploads={1: where}, only="/commit/")
    with pytest.raises(ConnectionError, match="pull request on alice/model"):
        push(folder, create_pr=True)
    opened = [ref for ref in author.repos["model", "alice/model"].refs if ref.startswith("refs/pr/")]
    assert len(opened) == there
    assert push(folder, create_pr=True).endswith(f"/discussions/{there + 1}")


def test_a_hub_that_does_not_come_back(author, folder, waits, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    command = ["push", "--folder", folder, "--repo_id", "alice/model"]
    # First it stores no large file, which the client itself retries. Then it stores them, but takes no commit.
    for path, has_own_retries in (("/storage/", True), ("/commit/", False)):
        author.faults = Faults(unavailable_every=1, only=path)
        waits.clear()
        with pytest.raises(SystemExit, match="alice/model .*hf-ibdistill push") as stopped:
            run(*command)
        assert "\n" not in stopped.value.code and WRITE_TOKEN not in stopped.value.code + caplog.text
        assert read(folder) == FILES and author.files("alice/model") == {}
        assert 0 < len(waits) < 8 if has_own_retries else waits == [1, 1, 2, 2, 4, 4, 8, 8]
    assert "503" in stopped.value.code
    # The command that the message proposes completes the job.
    author.faults = Faults()
    run(*command)
    assert author.files("alice/model") == FILES
    assert [request.status for request in author.requests if request.method == "PUT"].count(200) == 1


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


def test_a_trainer_refuses_before_training_what_it_cannot_publish(author, tmp_path):
    with pytest.raises(PermissionError, match="hf auth login"):
        build_trainer(tmp_path / "model", push_to_hub=True)
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match=f'"{strategy}"'):
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
    (warning,) = [record.getMessage() for record in caplog.records if "checkpoint-2" in record.getMessage()]
    assert "alice/model" in warning and "403" in warning
    author.tokens[WRITE_TOKEN] = User("alice", "write")
    trainer.push_to_hub()
    assert titles(author, "alice/model")[2:] == ["End of training"]
    everything = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert "optimizer.pt" in everything and "training_args.bin" not in everything
