"""How many images does a student need, with no teacher, with one, or with both? And of what use are images without labels?
Nested subsets of a data set.

    python -m studies.data_efficiency.study --name fashion_mnist --stage search --methods both_views --variations trials
    python -m studies.data_efficiency.study --name fashion_mnist --stage search --methods both_views --variations finalists
    python -m studies.data_efficiency.study --name fashion_mnist --stage choose
    python -m studies.data_efficiency.study --name fashion_mnist --stage grid --images 3000 --methods both_views --seeds 0

A cell is one model: a subset, a method, a seed and a recipe. Its JSON file in RESULTS_DIR holds the recipe, versions,
metrics, predictions and time. A cell with a file is not run again, so a stopped study resumes. Several processes can share
a study: give each its own `--seeds` or `--images`.

`--stage search` measures on held-out images: a fifth of a subset of Fashion-MNIST, the validation split of another data set.
`--stage choose` fixes the best recipe of each method in RESULTS_DIR/recipes.json, by the second round (`finalists`) if it was
run. `--stage grid` trains on the whole subset by these recipes, and only then opens the test images. `python -m studies.data_efficiency.report` turns the cells into tables, pictures and model cards.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from .recipes import DATASETS, METHODS, SAME_RECIPE, TRIALS, VARIATIONS, combine
from .runs import Study, study_folders, write


@dataclass
class StudyArguments:
    name: str = HfArg(help=f"The data set: {', '.join(DATASETS)}.")
    dataset: str | None = HfArg(default=None, help="Its folder; by default its Hub id.")
    stage: str = HfArg(default="grid", help="search, choose or grid.")
    images: list[int] | None = HfArg(default=None, help="Sizes of the training subset; by default all of the study.")
    methods: list[str] = HfArg(default_factory=lambda: list(METHODS), help=", ".join(METHODS))
    variations: list[str] = HfArg(
        default_factory=lambda: ["base"],
        help=f"trials, finalists, or any of {', '.join(VARIATIONS)}; + joins several.",
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="One cell each.")
    teacher_steps: int | None = HfArg(default=None, help="Other steps than the study's, to try it out.")
    student_steps: int | None = HfArg(default=None, help="Other steps than the study's, to try it out.")
    bf16: bool | None = HfArg(
        default=None, help="Train and record under bf16; by default on hardware with bf16 units."
    )
    results_dir: str | None = HfArg(default=None, help="Folder of the cells; by default results/data_efficiency/NAME.")
    work_dir: str | None = HfArg(
        default=None, help="Folder of models and tables; by default outputs/data_efficiency/NAME."
    )

    def __post_init__(self):
        is_round = self.stage == "search" and self.variations in (["trials"], ["finalists"])
        names = [] if is_round else [name for variation in self.variations for name in variation.split("+")]
        known_sizes = DATASETS[self.name].steps if self.name in DATASETS else ()
        sizes = [] if self.student_steps and self.teacher_steps else self.images or []
        for argument, given, known in (
            ("name", [self.name], DATASETS),
            ("stage", [self.stage], ["search", "choose", "grid"]),
            ("methods", self.methods, METHODS),
            ("variations", names, VARIATIONS),
            ("images", sizes, known_sizes),
        ):
            for value in given:
                if value not in known:
                    raise ValueError(f"{argument}={value} is unknown. Choose from {', '.join(map(str, known))}.")
        self.dataset = self.dataset or DATASETS[self.name].source
        self.images = self.images or list(known_sizes)


def trial_paths(study: Study, method: str, variation: str) -> dict[tuple[str, str], Path]:
    """The cells of a trial, by number of images and seed."""
    name = f"_{method}_{variation}_"
    paths = (study.results_dir / "search").glob(f"*[0-9]{name}[0-9].json")
    return {tuple(path.stem.split(name)): path for path in paths}


def search_accuracies(study: Study, method: str, variations: Iterable[str]) -> dict[str, float]:
    """Accuracy of each trial on held-out images: the mean over the sizes and seeds that every one of them has.

    Raises:
        ValueError: there is no cell that all have.
    """
    paths = {variation: trial_paths(study, method, variation) for variation in variations}
    common = set.intersection(*map(set, paths.values()))
    if not common:
        missing = ", ".join(f'"{name}"' for name, found in paths.items() if not found) or "of one size and seed"
        raise ValueError(f"The method {method} has no cells of the trials {missing}. Run --stage search first.")
    accuracies = {
        variation: [json.loads(found[key].read_text())["metrics"]["accuracy"] for key in common]
        for variation, found in paths.items()
    }
    return {variation: sum(values) / len(values) for variation, values in accuracies.items()}


def finalists(study: Study, method: str) -> list[str]:
    """The trials of the second round: the best two of the first, with twice the steps."""
    accuracies = search_accuracies(study, method, TRIALS[method])
    ranking = sorted(accuracies, key=accuracies.get, reverse=True)
    return [f"{variation}+patience_2" for variation in ranking[:2]]


def choose(study: Study, methods: list[str]) -> None:
    """Fix the recipe of each method: the best trial of its last round."""
    recipes = json.loads(study.recipes_path.read_text()) if study.recipes_path.exists() else {}
    recipes |= {name: {} for name, method in METHODS.items() if method.preset or method.is_ensemble}
    for method in (name for name in TRIALS if name in methods):
        names = finalists(study, method)
        if not any(trial_paths(study, method, name) for name in names):
            names = TRIALS[method]
        accuracies = search_accuracies(study, method, names)
        best = max(accuracies, key=accuracies.get)
        recipes[method] = combine(best.removesuffix("+patience_2"))
        print(method, {name: round(100 * value, 2) for name, value in accuracies.items()}, recipes[method])
    recipes |= {method: recipes[other] for method, other in SAME_RECIPE.items() if other in recipes}
    write(study.recipes_path, recipes)


def main(arguments=None):
    parser = HfArgumentParser(StudyArguments, description=__doc__.splitlines()[0])
    (args,) = parser.parse_args_into_dataclasses(arguments)
    folders = study_folders(args.name, args.results_dir, args.work_dir)
    steps = args.teacher_steps, args.student_steps
    study = Study(args.name, args.dataset, *folders, args.stage == "search", *steps, args.bf16)
    if args.stage == "choose":
        return choose(study, args.methods)
    for images, seed, method in product(args.images, args.seeds, args.methods):
        if args.variations == ["finalists"]:
            variations = finalists(study, method)
        else:
            variations = TRIALS[method] if args.variations == ["trials"] else args.variations
        for variation in variations:
            changes = {**study.chosen(method), **combine(variation)}
            study.run_cell(study.recipe(method, images, seed, changes), variation)


if __name__ == "__main__":
    main()
