"""Ingredients of strong recipes."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_ibdistill import (
    ImageTrainingArguments,
    ViewRecipe,
    build_image_processor,
    class_config,
    evaluate_model,
)
from studies.data_efficiency import tables
from studies.data_efficiency.ingredients import (
    AveragedWeights,
    MixedClassificationTrainer,
    RandAugmentCollator,
    draw_mixture,
    mix,
)
from studies.data_efficiency.recipes import INGREDIENTS, METHODS, VARIATIONS, Recipe, combine
from studies.data_efficiency.runs import Study, build_model


RESULTS = Path(__file__).parents[2] / "results" / "data_efficiency"


def digits_study(folder, **kwargs):
    kwargs = {"teacher_steps": 1, "student_steps": 3, "is_search": True, "bf16": False, **kwargs}
    return Study("fashion_mnist", "digits", folder / "results", folder / "work", **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of teachers that the tests share."""
    return tmp_path_factory.mktemp("study")


def prepare(folder, method, **changes):
    """The trainer of a cell."""
    parent = digits_study(folder)
    recipe = parent.recipe(method, 100, 0, changes)
    train, _ = parent.rows(recipe)
    processor = build_image_processor(train)
    model = build_model(recipe, class_config(train), processor.size["height"])
    trainer, *_ = parent._prepare(recipe, model, processor, train)
    return trainer


# Recipes


@pytest.mark.parametrize("path", sorted(RESULTS.glob("cifar10/search/5000_*.json")), ids=lambda path: path.stem)
def test_cells_from_before_the_ingredients_are_those_of_todays_recipes(path, tmp_path):
    cell = json.loads(path.read_text())
    method, images, seed = (cell["recipe"][name] for name in ("method", "images", "seed"))
    parent = Study("cifar10", "none", tmp_path, tmp_path, is_search=True)
    assert Recipe(**cell["recipe"]) == parent.recipe(method, images, seed, combine(cell["variation"]))


def test_ingredients_combine_with_each_other_and_with_more_steps(tmp_path):
    parent = digits_study(tmp_path)
    changes = combine("cutmix+drop_path+ema+rand_augment+patience_6")
    recipe = parent.recipe("both_online", 100, 0, changes)
    assert (recipe.mixing, recipe.drop_path, recipe.ema, recipe.rand_augment) == ("cutmix", 0.1, 0.999, 7)
    assert recipe.steps == 18 and recipe.temperature == 4
    assert parent.recipe("co_advise", 100, 0, {}).temperature == 1
    assert METHODS["both_online"].teachers == METHODS["co_advise"].teachers and set(INGREDIENTS) <= set(VARIATIONS)


def test_geometry_of_the_package_is_stored(tmp_path):
    recipe = digits_study(tmp_path).recipe("both_views", 100, 0, combine("color_and_geometry"))
    assert (recipe.views().photometric_ops, recipe.views().geometric_ops) == (1, 1)
    plain = digits_study(tmp_path).recipe("both_views", 100, 0, {}).views()
    assert (plain.photometric_ops, plain.geometric_ops) == (0, 0)


@pytest.mark.parametrize(
    ("method", "variation", "message"),
    [
        ("both_views", "mixup", "mixing=mixup.* both_views "),
        ("both_row", "rand_augment", "rand_augment=7.* both_row "),
        ("conv", "drop_path", "drop_path=0.1.* conv"),
        ("undistilled", "resnet+drop_path", "drop_path=0.1.* student=resnet"),
    ],
)
def test_ingredients_that_a_method_cannot_have(method, variation, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        digits_study(tmp_path).recipe(method, 100, 0, combine(variation))


@pytest.mark.parametrize("method", ["both_online", "undistilled"])
def test_a_cell_with_every_ingredient(method, tmp_path):
    parent, variation = digits_study(tmp_path), "cutmix+ema+drop_path+rand_augment"
    cell = parent.run_cell(parent.recipe(method, 100, 0, combine(variation)), variation)
    folder = tmp_path / "work" / "100_0_held_out" / f"{method}_{variation}"
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.drop_path_rate == 0.1 and cell["recipe"]["rand_augment"] == 7
    assert all(np.isfinite(list(entry.values())).all() for entry in cell["losses"]) and len(cell["losses"]) == 3


def test_the_images_that_choose_the_weights_do_not_measure_them(tmp_path):
    parent = digits_study(tmp_path, student_steps=20)
    recipe = parent.recipe("undistilled", 100, 0, combine("early_stopping"))
    cell = parent.run_cell(recipe, "early_stopping")
    work, held_out = tmp_path / "work" / "100_0_held_out", parent.rows(recipe)[1]
    model = AutoModelForImageClassification.from_pretrained(work / "undistilled_early_stopping")
    choosing, measuring = (held_out.select(range(first, len(held_out), 2)) for first in (0, 1))
    rights = [
        evaluate_model(model, build_image_processor(held_out), rows)["accuracy"] for rows in (choosing, measuring)
    ]
    tried = cell["validation"]
    assert len(tried) == 20 and min(tried) < max(tried)
    assert [max(tried), cell["metrics"]["accuracy"]] == pytest.approx(rights)
    assert len(cell["predictions"]) == len(measuring) == len(held_out) // 2
    with pytest.raises(ValueError, match="early_stopping=True .*--stage search"):
        digits_study(tmp_path, is_search=False).recipe("undistilled", 100, 0, combine("early_stopping"))


def test_a_search_keeps_the_labels_of_a_validation_split(tmp_path):
    folders = tmp_path / "results", tmp_path / "work"
    parent = Study("fashion_mnist_unlabelled", "digits", *folders, is_search=True, student_steps=1, bf16=False)
    recipe = parent.recipe("undistilled", 100, 0, {})
    parent.run_cell(recipe, "base")
    labels = json.loads((tmp_path / "results" / "validation_labels.json").read_text())
    assert labels == "".join(map(str, parent.rows(recipe)[1]["label"])) and len(labels) == 144
    assert not (tmp_path / "results" / "test_labels.json").exists()


def test_an_ingredient_is_compared_with_the_same_recipe_without_it(tmp_path):
    labels = np.array([0, 1, 2, 3, 4, 5])
    cells = {
        ("mixup+patience_2", 0): "012345",
        ("patience_2", 0): "012300",
        ("patience_2", 1): "000000",
        # The halves that measure have the classes 1, 3 and 5.
        ("early_stopping+patience_2", 0): "130",
        ("early_stopping+patience_2", 1): "135",
        # Of no use here: two ingredients, and one without its recipe.
        ("ema+mixup+patience_2", 0): "012345",
        ("cutmix", 0): "012345",
    }
    for (variation, seed), predictions in cells.items():
        recipe = {"method": "co_advise", "images": 100, "seed": seed, "steps": 1200}
        cell = {"recipe": recipe, "variation": variation, "predictions": predictions}
        (tmp_path / f"100_co_advise_{variation}_{seed}.json").write_text(json.dumps(cell))
    rows = tables.ingredient_table(tmp_path, labels).splitlines()[2:]
    assert len(rows) == 2
    # 2 of 3 and 3 of 3 are right, against 2 of 3 and none.
    start = "| Co-advise: both, online | 100 | {} | patience_2 | 1,200 | {} | {} | {} | {} |"
    assert rows[0].startswith(start.format("early_stopping", 2, "83.3", "33.3", "+50.00"))
    assert rows[1].startswith(start.format("mixup", 1, "100.0", "66.7", "+33.33"))


# Mixed images


@pytest.mark.parametrize("size", [(32, 32), (28, 40)])
def test_the_box_of_cutmix_has_the_area_of_the_other_image(size):
    height, width = size
    images = torch.stack((torch.ones(3, height, width), torch.zeros(3, height, width)))
    random, shares = np.random.default_rng(0), []
    for _ in range(1000):
        share, box = draw_mixture("cutmix", height, width, random)
        mixed = mix(images, share, box)
        assert mixed[0].mean().item() == pytest.approx(share, abs=1e-6)
        assert torch.equal(mixed[1], 1 - mixed[0])
        zeros = (mixed[0, 0] == 0).nonzero()
        if len(zeros):
            # One full rectangle, and the same in larger images of a teacher.
            sides = zeros.max(0).values - zeros.min(0).values + 1
            assert len(zeros) == sides.prod()
        larger = mix(images.repeat_interleave(3, -1).repeat_interleave(3, -2), share, box)
        assert torch.equal(larger, mixed.repeat_interleave(3, -1).repeat_interleave(3, -2))
        shares.append(share)
    # The border cuts a side of s to s − s²/4 on average. With s² uniform, the box has 0.321 of the area, and less by rounding.
    assert 0.66 < np.mean(shares) < 0.73
    assert len(images.unique()) == 2  # the batch stays as it is


def test_the_shares_of_mixup_are_those_of_its_distribution():
    random = np.random.default_rng(0)
    shares = [draw_mixture("mixup", 32, 32, random) for _ in range(4000)]
    assert {box for _, box in shares} == {None}
    # Beta(α, α) has the mean ½ and the variance 1 / (4 · (2α + 1)).
    values = np.array([share for share, _ in shares])
    assert values.mean() == pytest.approx(0.5, abs=0.02) and values.var() == pytest.approx(1 / 10.4, rel=0.05)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("method", ["both_online", "undistilled"])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_mixed_loss_is_the_naive_one(kind, method, label_smoothing, folder):
    trainer = prepare(folder, method, mixing=kind, label_smoothing=label_smoothing)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(7)])
    count, _, height, width = batch["pixel_values"].shape
    share, box = draw_mixture(kind, height, width, np.random.default_rng(0))

    def naive(images):
        mixed = images.clone()
        for i in range(count):
            for row in range(height):
                for column in range(width):
                    own, other = images[i, :, row, column], images[count - 1 - i, :, row, column]
                    if box is None:
                        mixed[i, :, row, column] = share * own + (1 - share) * other
                    elif box[0] <= row / height < box[2] and box[1] <= column / width < box[3]:
                        mixed[i, :, row, column] = other
        return mixed

    model, labels = trainer.model.eval(), batch["labels"]
    one_hot = F.one_hot(labels, 10).float()
    targets = share * one_hot + (1 - share) * one_hot[torch.arange(count - 1, -1, -1)]
    outputs = model(naive(batch["pixel_values"]))
    expected = label_loss = F.cross_entropy(outputs.class_logits, targets, label_smoothing=label_smoothing)
    for i, teacher in enumerate(getattr(trainer, "teachers", [])):
        with torch.no_grad():
            answer = teacher.model(naive(batch["teacher_pixel_values"][teacher.name])).logits
        given = outputs.teacher_token_logits[:, i]
        divergence = F.kl_div((given / 4).log_softmax(-1), (answer / 4).softmax(-1), reduction="batchmean")
        expected = expected + 16 * divergence
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = trainer.compute_loss(model.train(), batch, num_items_in_batch=torch.tensor(count))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5, check_dtype=False)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)
    if method == "both_online":
        # Logs have the term of the mixed labels.
        assert trainer._loss_terms[1].item() == pytest.approx(label_loss.item(), rel=1e-5)
    # The next batch has another share; evaluation mixes nothing.
    assert trainer.compute_loss(model, batch).item() != loss.item()
    plain, logits = trainer.compute_loss(model.eval(), batch), model(batch["pixel_values"]).class_logits
    # The trainer of transformers smooths labels in evaluation as well.
    smoothing = 0.0 if method == "both_online" else label_smoothing
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels, label_smoothing=smoothing))


def test_what_mixed_images_do_not_fit(folder):
    trainer = prepare(folder, "both_online", mixing="mixup")
    kwargs = {"train_dataset": trainer.train_dataset.table, "processing_class": trainer.processing_class}
    kwargs |= {"views": ViewRecipe(num_views=2), "mixing": "mixup"}
    online = {teacher.name: (teacher.model, teacher.image_processor) for teacher in trainer.teachers}
    for argument, value in {
        "gradient_accumulation_steps": 2,
        "confidence_weighting": True,
        "unlabelled_target": "teachers",
    }.items():
        args = type(trainer.args)(str(folder / "trainer"), use_cpu=True, eval_strategy="no", **{argument: value})
        with pytest.raises(ValueError, match=f"{argument}={value} .*mixing=mixup"):
            type(trainer)(trainer.model, args, teachers=online, **kwargs)
    args = ImageTrainingArguments(str(folder / "trainer"), use_cpu=True, eval_strategy="no")
    with pytest.raises(ValueError, match=r"teacher_names=\['conv', 'inv'\] .*mixing=mixup"):
        MixedClassificationTrainer(trainer.model, args, **kwargs)


# RandAugment


def test_student_and_teachers_get_the_same_augmented_view(folder):
    trainer = prepare(folder, "both_online", rand_augment=7)
    assert isinstance(trainer.data_collator, RandAugmentCollator)
    collator = pickle.loads(pickle.dumps(trainer.data_collator))
    rows = [trainer.train_dataset[i] for i in range(8)]
    before = [row["image"].clone() for row in rows]
    torch.manual_seed(3)
    batch = collator(rows)
    # The teachers' processors are equal to the student's.
    for images in batch["teacher_pixel_values"].values():
        assert torch.equal(images, batch["pixel_values"])
    augment = v2.RandAugment(num_ops=2, magnitude=7, interpolation=InterpolationMode.BILINEAR)
    torch.manual_seed(3)
    augmented = [{**row, "image": augment(image)} for row, image in zip(rows, before)]
    expected = collator.collator(augmented)["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    changed = batch["pixel_values"] != collator.collator(rows)["pixel_values"]
    assert changed.flatten(1).any(1).sum() >= 4
    assert all(torch.equal(row["image"], image) for row, image in zip(rows, before))


# Averaged weights


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_is_the_naive_recursion(decay, folder):
    # Batch norms have statistics, and counts that are whole numbers.
    trainer = prepare(folder, "undistilled", ema=decay, student="resnet", patience=4)

    class Weights(TrainerCallback):
        seen = []

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.on_step_end(args, state, control, model)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.seen.append({name: tensor.double().clone() for name, tensor in model.state_dict().items()})

    trainer.add_callback(Weights())
    trainer.train()
    averages, *steps = Weights.seen
    assert len(steps) == 12
    for t, weights in enumerate(steps, start=1):
        share = min(decay, (1 + t) / (10 + t))
        averages = {name: share * averages[name] + (1 - share) * weights[name] for name in weights}
    last, counts = steps[-1], 0
    for name, tensor in trainer.model.state_dict().items():
        counts += not tensor.is_floating_point()
        expected = averages[name] if tensor.is_floating_point() else last[name]
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-4, atol=1e-6)
    assert counts and not torch.allclose(averages["classifier.1.weight"], last["classifier.1.weight"], rtol=1e-3)


def test_the_average_of_the_study_is_what_is_measured(folder):
    trainer = prepare(folder, "undistilled", ema=0.999)
    (callback,) = (found for found in trainer.callback_handler.callbacks if isinstance(found, AveragedWeights))
    trainer.train()
    assert callback.decay == 0.999
    for tensor, average in zip(trainer.model.state_dict().values(), callback.averages, strict=True):
        assert torch.equal(tensor, average)
