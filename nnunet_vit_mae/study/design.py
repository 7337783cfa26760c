"""What a study compares and where: written to `study.json` in its folder, which every later call reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.channels import visible_files
from nnunet_vit_mae.recipes import merged
from nnunet_vit_mae.storage.files import read_json
from nnunet_vit_mae.storage.layout import FINAL, dataset_id, encoder_file, model_folder
from nnunet_vit_mae.study.arms import ARMS, DEFAULT_PLANS, WITHOUT_UNET, Arm, arms_from, arms_to_json, encoder_recipe

STUDY_FILE = "study.json"
MAY_CHANGE = ("arms", "seeds", "device", "preprocessed")  # of a study that was begun


@dataclass(frozen=True, kw_only=True)
class StudyDesign:
    """The choices of a study. `few` are numbers of training patients, as in `mae3d_split --few`."""

    output: str  # folder of the study
    dataset: str  # Dataset501_Name
    raw: str  # its folders
    preprocessed_folder: str
    results: str
    arms: Mapping[str, Arm]
    few: tuple[int, ...]
    seeds: int = 3
    configuration: str = "3d_fullres"
    base_plans: str = DEFAULT_PLANS  # nnU-Net's plans by which the dataset is preprocessed
    development: float = 0.2  # share of patients to calibrate on
    test: float = 0.0  # share of patients to test on; 0: imagesTs and labelsTs
    csv: str = ""  # which case belongs to which patient
    patient: str = "patient"
    recipe: Mapping[str, Any] = field(default_factory=dict)  # a partial vit_mae block for all arms
    pretrain_epochs: int = 0  # 0: as the plans say
    device: str = "cuda"
    unlabelled: bool = False  # whether there are imagesUn
    preprocessed: bool = False  # whether nnU-Net had preprocessed the dataset before

    @property
    def id(self) -> str:
        """The number of the dataset, as `-d` takes it."""
        return dataset_id(self.dataset)

    @property
    def name(self) -> str:
        """The name of the folder, with which the names of plans begin, so it is one that `mae3d_plan -o` takes."""
        signs = Path(self.output).name
        # Python counts the ² of T² among numbers, but takes no name with it
        name = "".join(sign if sign.isalnum() and f"_{sign}".isidentifier() else "_" for sign in signs)
        return name if name.isidentifier() else f"study_{name}"

    @property
    def trained(self) -> dict[str, Arm]:
        """The arms that are trained, without ensembles."""
        return {name: arm for name, arm in self.arms.items() if not arm.members}

    def same_as(self, built_in: str) -> str | None:
        """Return the arm that is this built-in one on the plans of the study, if there is one."""
        wanted = dataclasses.replace(ARMS[built_in], plans=self.base_plans)
        return next((name for name, arm in self.arms.items() if arm == wanted), None)

    @property
    def members(self) -> set[str]:
        """The arms that belong to an ensemble."""
        return {member for arm in self.arms.values() for member in arm.members}

    def fold(self, few: int) -> int:
        """Return the fold of `mae3d_split` with this many training patients; fold 0 has all of them."""
        return 1 + self.few.index(few)

    def recipe_of(self, arm: str) -> dict[str, Any]:
        """Return the settings of an arm, without the seed."""
        recipe = merged(self.recipe, self.arms[arm].recipe)
        return recipe if recipe.get("network", {}).get("adaptive") else merged(WITHOUT_UNET, recipe)

    def encoder_of(self, arm: str) -> str:
        """Return the first arm with the same encoder, after which the encoder is named."""

        def key(name: str) -> tuple[str, dict[str, Any]]:
            return self.arms[name].plans, encoder_recipe(self.recipe_of(name))

        return next(name for name, other in self.arms.items() if other.encoder and key(name) == key(arm))

    @property
    def encoders(self) -> list[str]:
        """The distinct encoders."""
        return list(dict.fromkeys(self.encoder_of(name) for name, arm in self.arms.items() if arm.encoder))

    def plans(self, arm: str, seed: int) -> str:
        """Return the name of the plans of an arm."""
        return f"{self.name}_{arm}_s{seed}"

    def encoder_plans(self, arm: str) -> str:
        """Return the name of the plans of an encoder."""
        return f"{self.name}_encoder_{arm}"

    def encoder_file(self, arm: str) -> Path:
        """Return where `mae3d_pretrain` writes an encoder."""
        return encoder_file(Path(self.results), self.encoder_plans(arm), self.configuration, "0")

    def model_folder(self, arm: str, seed: int) -> Path:
        """Return where nnU-Net keeps a model."""
        trainer, plans = self.arms[arm].trainer, self.plans(arm, seed)
        return model_folder(Path(self.results), trainer, plans, self.configuration)

    def fold_folder(self, arm: str, few: int, seed: int) -> Path:
        """Return where nnU-Net keeps the fold with this many training patients of a model."""
        return self.model_folder(arm, seed) / f"fold_{self.fold(few)}"

    def checkpoint(self, arm: str, few: int, seed: int) -> Path:
        """Return what `nnUNetv2_train` writes at its end."""
        return self.fold_folder(arm, few, seed) / FINAL

    def recipe_file(self, arm: str, seed: int) -> Path:
        """Return the recipe of an arm and seed, which `mae3d_plan` reads."""
        return Path(self.output, "recipes", f"{arm}_s{seed}.json")

    def encoder_recipe_file(self, arm: str) -> Path:
        """Return the recipe of an encoder."""
        return Path(self.output, "recipes", f"encoder_{arm}.json")

    @property
    def recipe_files(self) -> dict[str, Path]:
        """The recipe of each of the plans, by their names."""
        of_encoders = {self.encoder_plans(name): self.encoder_recipe_file(name) for name in self.encoders}
        of_arms = {
            self.plans(name, seed): self.recipe_file(name, seed) for name in self.trained for seed in range(self.seeds)
        }
        return of_encoders | of_arms

    def recipes(self) -> dict[Path, dict[str, Any]]:
        """Return the content of all recipes by file."""
        recipes = {self.encoder_recipe_file(name): encoder_recipe(self.recipe_of(name)) for name in self.encoders}
        for name in self.trained:
            for seed in range(self.seeds):
                recipe = merged(self.recipe_of(name), {"finetuning": {"seed": seed}})
                recipes[self.recipe_file(name, seed)] = recipe
        return recipes

    def predictions(self, model: StudyModel) -> Path:
        """Return the folder of a model's predictions of the test cases."""
        return Path(self.output, "predictions", model.name)

    @property
    def test_images(self) -> Path:
        """Images to test on."""
        return Path(self.output, "test", "imagesTs") if self.test else Path(self.raw, "imagesTs")

    @property
    def test_labels(self) -> Path:
        """Reference segmentations to test with."""
        return Path(self.output, "test", "labelsTs") if self.test else Path(self.raw, "labelsTs")

    @property
    def references(self) -> list[Path]:
        """The files in `test_labels`; there are none before the test cases of a split have been collected."""
        files = visible_files(self.test_labels) if self.test_labels.is_dir() else []
        return [file for file in files if file.exists()]  # links may lead nowhere

    def models(self) -> list[StudyModel]:
        """Return all models that are tested."""
        return [
            StudyModel(name, few, seed, calibrated)
            for name, arm in self.arms.items()
            for few in self.few
            for seed in range(self.seeds)
            for calibrated in ((False, True) if arm.calibrate else (False,))
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the study as JSON holds it."""
        content = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return content | {"arms": arms_to_json(self.arms), "few": list(self.few), "recipe": merged(self.recipe)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> StudyDesign:
        """Return the study that `to_json` wrote."""
        return cls(**{**content, "arms": arms_from(content["arms"]), "few": tuple(content["few"])})


@dataclass(frozen=True)
class StudyModel:
    """An arm with a number of labels and a seed, calibrated or as trained."""

    arm: str
    few: int
    seed: int
    calibrated: bool

    @property
    def run(self) -> str:
        """The training that it comes from."""
        return f"{self.arm}_{self.few}_s{self.seed}"

    @property
    def name(self) -> str:
        """The name of its predictions."""
        return f"{self.run}_{'calibrated' if self.calibrated else 'final'}"


def read_study(output: Path) -> StudyDesign:
    """Read the study in a folder. Raises `UserError` when there is none."""
    file = output / STUDY_FILE
    content = read_json(file)
    try:
        return StudyDesign.from_json(content)
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{file} was not written by mae3d_study: give the folder of a study with -o.") from None


def check_unchanged(study: StudyDesign) -> None:
    """Raise `UserError` when the folder holds a study with other choices: its models would be mixed with new ones.

    Arms and seeds may be added.
    """
    if not (Path(study.output) / STUDY_FILE).is_file():
        return
    before, now = read_study(Path(study.output)).to_json(), study.to_json()
    changed = [key for key in now if key not in MAY_CHANGE and now[key] != before[key]]
    if changed:
        key = changed[0]
        raise UserError(
            f"{study.output} holds a study with {key} = {before[key]!r} instead of {now[key]!r}: give another folder "
            "with -o, or the same choices to continue."
        )
    for name, arm in before["arms"].items():
        if name in now["arms"] and now["arms"][name] != arm:
            raise UserError(f"{study.output} holds a study with another arm {name}: give the new one another name.")


def refuse_other_encoders(study: StudyDesign) -> None:
    """Raise `UserError` when an arm that was begun would have its encoder pre-trained anew, under another name.

    An encoder is named after the first of the arms that share it, so the order of arms that were begun must stay.
    """
    for name, arm in study.arms.items():
        first = study.encoder_of(name) if arm.encoder else name
        begun = arm.encoder and study.recipe_file(name, 0).is_file()
        if begun and not study.encoder_recipe_file(first).is_file():
            raise UserError(
                f"The study in {study.output} has begun with the encoder of {name}, and would pre-train it again as "
                f"that of {first}: give --arms in the earlier order, with new ones after them."
            )


def refuse_plans_of_others(study: StudyDesign) -> None:
    """Raise `UserError` when plans of the study's names are there that it did not make: the models would be mixed.

    Those of a folder with the same name elsewhere have these names. A study's own plans have a recipe in its folder.
    """
    for name, recipe in study.recipe_files.items():
        plans = Path(study.preprocessed_folder, f"{name}.json")
        if plans.exists() and not recipe.exists():
            raise UserError(
                f"{plans} was not made by the study in {study.output}, whose models would be mixed with others: choose "
                "another name of the folder with -o."
            )
