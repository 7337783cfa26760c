"""`mae3d_study`: arms and commands as data, the workflow on a tiny dataset, and the report from made-up results."""

import html
import importlib.util
import itertools
import json
import os
import pickle
import runpy
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from conftest import read_voxels

from nnunet_vit_mae.cli import study as command
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.nnunet.plans import load_plan
from nnunet_vit_mae.settings import Settings
from nnunet_vit_mae.statistics import mean_interval
from nnunet_vit_mae.storage.files import write_json
from nnunet_vit_mae.study import comparisons, costs, workflow
from nnunet_vit_mae.study.arms import ARMS, arms_from, arms_to_json, choose_arms, encoder_recipe, scratch_pairs
from nnunet_vit_mae.study.comparisons import Question, Variant
from nnunet_vit_mae.study.design import (
    StudyDesign,
    StudyModel,
    check_unchanged,
    refuse_other_encoders,
    refuse_plans_of_others,
)
from nnunet_vit_mae.study.figures import training_figure
from nnunet_vit_mae.study.report import write_study_report
from nnunet_vit_mae.study.results import measure_study
from nnunet_vit_mae.study.steps import EVALUATE, guarded_shell, steps_of
from nnunet_vit_mae.study.training import pretraining_curves, training_curves


def study_of(folder, *arms, **changes) -> StudyDesign:
    choices = {
        "output": str(folder / "my study"),
        "dataset": "Dataset901_Tiny",
        "raw": str(folder / "raw"),
        "preprocessed_folder": str(folder / "preprocessed"),
        "results": str(folder / "results"),
        "arms": choose_arms(arms or ["unet", "vit"]),
        "few": (10, 25),
        "seeds": 2,
        "device": "cpu",
    }
    return StudyDesign(**{**choices, **changes})


def by_name(study) -> dict[tuple[str, str], list[str]]:
    return {(step.kind, step.name): list(step.command) for step in steps_of(study)}


# ---------- arms


def test_every_built_in_arm_has_settings_that_exist():
    for arm in ARMS.values():
        Settings.from_dict(arm.recipe)
    assert arms_from(arms_to_json(ARMS)) == ARMS


def test_arms_of_a_file_stand_beside_those_of_ours(tmp_path):
    file = tmp_path / "my_arms.json"
    file.write_text(
        json.dumps({"large": {"trainer": "nnUNetTrainerViTMAE", "encoder": True, "recipe": {"network": {"size": "M"}}}})
    )
    arms = choose_arms([str(file), "unet", "vit"])
    assert list(arms) == ["large", "unet", "vit"]
    assert arms["large"].recipe == {"network": {"size": "M"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "object of arms"),
        ({"a b": {"trainer": "T"}}, "letters, digits and underscores"),
        ({"a": {"trainer": "T", "size": "M"}}, "unknown key size"),
        ({"a": {"trainer": 3}}, "arm a in .*arms.json .*trainer is 3, but it must be text"),
        ({"a": {"trainer": "T", "calibrate": "yes"}}, "calibrate is 'yes', but it must be true or false"),
        ({"a": {"members": ["unet", 3]}}, r"members\[1\] is 3, but it must be text"),
        ({"a": {}}, "either a trainer, or members"),
        ({"a": {"trainer": "T", "members": ["unet", "vit"]}}, "either a trainer, or members"),
        ({"a": {"trainer": "T", "recipe": {"network": 1}}}, r"recipe\.network is 1, but it must be an object"),
        ({"a": {"trainer": "T", "planner": "P"}}, "has the planner P, but would use nnUNetPlans: name the plans"),
        ({"a": []}, r"is \[\], but it must be an object: .* an arm has some of trainer, recipe"),
    ],
)
def test_a_bad_file_of_arms_is_refused(tmp_path, content, message):
    file = tmp_path / "arms.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        choose_arms([str(file)])


def test_unknown_and_missing_arms_are_named():
    with pytest.raises(UserError, match="--arms Vit: choose from unet"):
        choose_arms(["Vit"])
    with pytest.raises(UserError, match="unet twice"):
        choose_arms(["unet", "unet"])
    with pytest.raises(UserError, match="add vit to --arms"):
        choose_arms(["unet", "ensemble"])


def test_arms_that_differ_in_their_decoder_share_an_encoder(tmp_path):
    arms = {**choose_arms(["unet", "vit", "hybrid"]), "m": replace(ARMS["vit"], recipe={"network": {"size": "M"}})}
    study = study_of(tmp_path, arms=arms)
    assert study.encoders == ["vit", "m"]
    assert study.encoder_of("hybrid") == "vit"
    assert encoder_recipe({"network": {"decoder": "unet", "size": "S"}, "finetuning": {"lr": 1.0}}) == {
        "network": {"size": "S"},
        "pretraining": {},
    }


def test_an_arm_from_scratch_belongs_to_the_same_network_pre_trained():
    arms = choose_arms(["scratch", "hybrid_scratch", "vit", "hybrid", "unet"])
    assert scratch_pairs(arms) == [("scratch", "vit"), ("hybrid_scratch", "hybrid")]


# ---------- steps


def test_each_step_is_a_command_that_can_be_typed(tmp_path):
    study = study_of(tmp_path, "unet", "vit", unlabelled=True, pretrain_epochs=7)
    steps = {key: shlex.join(words) for key, words in by_name(study).items()}
    output, results = study.output, tmp_path / "results"
    assert steps["preprocess", "labelled"] == "nnUNetv2_plan_and_preprocess -d 901 -c 3d_fullres"
    assert steps["preprocess", "unlabelled"] == "mae3d_preprocess -d 901 -c 3d_fullres -p nnUNetPlans"
    assert steps["split", "patients"] == "mae3d_split -d 901 --development 0.2 --few 10 25"
    assert steps["pretrain", "vit"] == (
        "mae3d_pretrain -d 901 -c 3d_fullres -p my_study_encoder_vit -f 0 --epochs 7 --c -device cpu"
    )
    encoder = results / "mae3d_pretrain__my_study_encoder_vit__3d_fullres" / "fold_0" / "encoder.safetensors"
    assert steps["plan", "vit_s1"] == (
        f"mae3d_plan -d 901 -c 3d_fullres -p nnUNetPlans -o my_study_vit_s1 --recipe '{output}/recipes/vit_s1.json' "
        f"--batch_size plans --encoder {encoder}"
    )
    assert "--encoder" not in steps["plan", "unet_s0"]
    assert steps["train", "vit_25_s1"] == (
        "nnUNetv2_train 901 3d_fullres 2 -p my_study_vit_s1 -tr nnUNetTrainerViTMAE --npz --c -device cpu"
    )
    assert steps["calibrate", "unet_10_s0"] == (
        "mae3d_calibrate -d 901 -c 3d_fullres -p my_study_unet_s0 -tr nnUNetTrainerBaseline -f 1 -device cpu"
    )
    assert steps["predict", "unet_10_s0_calibrated"].endswith(
        "-f 1 -device cpu -chk checkpoint_calibrated.pth -npp 1 -nps 1"
    )
    assert steps["report", "study"] == f"mae3d_study -o '{output}' --step report"
    assert f"-p 'unet calibrated={output}/predictions/unet_10_s0_calibrated'" in steps[EVALUATE, "10_labels"]


def test_all_arms_start_from_the_plans_of_the_study(tmp_path):
    arms = choose_arms(["unet", "vit", "resenc"], "nnUNetResEncUNetLPlans")
    study = study_of(tmp_path, arms=arms, base_plans="nnUNetResEncUNetLPlans", unlabelled=True)
    steps = {key: shlex.join(words) for key, words in by_name(study).items()}
    assert steps["preprocess", "labelled"] == (
        "nnUNetv2_preprocess -d 901 -c 3d_fullres -plans_name nnUNetResEncUNetLPlans"
    )
    assert steps["preprocess", "unlabelled"] == "mae3d_preprocess -d 901 -c 3d_fullres -p nnUNetResEncUNetLPlans"
    sources = {name: steps["plan", name].split()[6] for name in ("unet_s0", "vit_s0", "encoder_vit", "resenc_s0")}
    assert sources == dict.fromkeys(["unet_s0", "vit_s0", "encoder_vit"], "nnUNetResEncUNetLPlans") | {
        "resenc_s0": "nnUNetResEncUNetMPlans"
    }
    assert (study.same_as("unet"), study_of(tmp_path, arms=arms).same_as("unet")) == ("unet", None)


def test_every_step_waits_for_steps_that_exist(tmp_path):
    study = study_of(tmp_path, *ARMS, test=0.2, csv="patients.csv", preprocessed=True)
    steps = steps_of(study)
    done: set[str] = set()
    for step in steps:
        assert set(step.after) <= done, step
        done.add(step.marker)
    assert len(done) == len(steps)
    commands = by_name(study)
    assert ("preprocess", "labelled") not in commands
    assert "--test 0.2 --csv patients.csv --patient patient" in shlex.join(commands["split", "patients"])
    assert commands["plan_architecture", "nnUNetPlannerResEncM"][-2:] == ["-pl", "nnUNetPlannerResEncM"]
    assert ("calibrate", "primus_10_s0") in commands


def test_an_ensemble_takes_probabilities_and_is_calibrated(tmp_path):
    study = study_of(tmp_path, "unet", "vit", "scratch", "ensemble")
    commands = by_name(study)
    assert "--save_probabilities" in commands["predict_probabilities", "vit_10_s0_final"]
    assert "-npp" not in by_name(replace(study, device="cuda"))["predict", "scratch_10_s0_final"]
    assert ("predict", "scratch_10_s0_final") in commands
    folders = [str(Path(study.output, "predictions", f"{name}_10_s0_final")) for name in ("unet", "vit", "ensemble")]
    assert commands["ensemble", "ensemble_10_s0"] == [
        *("nnUNetv2_ensemble", "-i", folders[0], folders[1], "-o", folders[2], "--save_npz")
    ]
    assert commands["calibrate_ensemble", "ensemble_10_s0"][-3:] == ["--step", "calibrate", "ensemble_10_s0"]


def test_recipes_hold_the_seed_and_the_same_schedule_for_all_arms(tmp_path):
    recipe = {"network": {"size": "XS"}, "finetuning": {"epochs": 5}}
    recipes = study_of(tmp_path, "unet", "vit", recipe=recipe).recipes()
    by_file = {file.name: content for file, content in recipes.items()}
    assert by_file["unet_s1.json"]["finetuning"] == {"epochs": 5, "seed": 1}
    assert by_file["vit_s0.json"]["network"] == {"size": "XS", "decoder": "unetr"}
    assert by_file["encoder_vit.json"] == {"network": {"size": "XS"}, "pretraining": {}}


def test_a_study_is_continued_with_the_same_choices_only(tmp_path):
    study = study_of(tmp_path, "unet", "vit")
    Path(study.output).mkdir()
    Path(study.output, "study.json").write_text(json.dumps(study.to_json()))
    check_unchanged(replace(study, seeds=5, arms=choose_arms(["unet", "vit", "scratch"])))
    with pytest.raises(UserError, match="few = "):
        check_unchanged(replace(study, few=(10,)))
    with pytest.raises(UserError, match="another arm vit"):
        check_unchanged(replace(study, arms={"vit": replace(ARMS["vit"], recipe={"network": {"size": "M"}})}))


def test_no_encoder_is_pre_trained_twice(tmp_path):
    """It is named after the first of the arms that share it."""
    study = study_of(tmp_path, "unet", "hybrid")
    refuse_other_encoders(study)
    for file, recipe in study.recipes().items():
        write_json(recipe, file)
    for arms in (["hybrid", "unet"], ["unet", "hybrid", "vit"], ["unet", "hybrid_scratch", "hybrid"]):
        refuse_other_encoders(replace(study, arms=choose_arms(arms)))
    with pytest.raises(UserError, match="the encoder of hybrid, and would pre-train it again as that of vit"):
        refuse_other_encoders(replace(study, arms=choose_arms(["unet", "vit", "hybrid"])))


def test_a_study_does_not_take_the_plans_of_another_folder_with_the_same_name(tmp_path):
    """Its recipes say which plans are its own, also when arms and seeds are added."""
    study = study_of(tmp_path / "a", "unet", "vit", preprocessed_folder=str(tmp_path))
    twin = replace(study, output=str(tmp_path / "b" / "my study"))
    refuse_plans_of_others(study)
    (tmp_path / "my_study_b_unet_s0.json").touch()  # of a folder "my study b"
    refuse_plans_of_others(study)
    assert sorted(study.recipe_files.values()) == sorted(study.recipes())
    for name, recipe in study.recipe_files.items():
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.touch()
        (tmp_path / f"{name}.json").touch()
    refuse_plans_of_others(study)
    refuse_plans_of_others(replace(study, seeds=5, arms=choose_arms(["unet", "vit", "scratch"])))
    for arms in (["unet"], ["vit"]):
        with pytest.raises(UserError, match="another name of the folder with -o"):
            refuse_plans_of_others(replace(twin, arms=choose_arms(arms)))
    for seed in range(2):
        (tmp_path / f"my_study_vit_s{seed}.json").unlink()
    with pytest.raises(UserError, match=r"my_study_encoder_vit\.json was not made by the study in"):
        refuse_plans_of_others(replace(twin, arms=choose_arms(["vit"])))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("study", "study"),
        ("2026_study", "study_2026_study"),
        ("7 T", "study_7_T"),
        ("_a", "_a"),
        ("Köln ½", "Köln__"),
        ("T²", "T_"),
    ],
)
def test_plans_of_a_study_have_names_that_mae3d_plan_takes(tmp_path, folder, name):
    study = study_of(tmp_path, output=str(tmp_path / folder))
    assert study.name == name
    assert all(plans.isidentifier() for plans in study.recipe_files)


# ---------- progress


def test_progress_knows_what_failed_and_how_long_the_rest_takes(tmp_path):
    study = study_of(tmp_path, "unet", few=(10,), preprocessed=True)
    steps = {(step.kind, step.name): step for step in steps_of(study)}
    folder = Path(study.output)

    def put(name: str, text: str = "") -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    assert workflow.progress_of(study).text(jobs=1) == f"0 of {len(steps)} steps are done."
    for key in (("split", "patients"), ("plan", "unet_s0"), ("plan", "unet_s1"), ("train", "unet_10_s0")):
        put(steps[key].marker)
        put(steps[key].compute, "s\tmax_rss\tcpu_time\n7200.0\t3000\tNA\n")
    put(steps["train", "unet_10_s1"].log)
    progress = workflow.progress_of(study)
    assert [step.name for step in progress.failed] == ["unet_10_s1"]
    assert progress.text(jobs=1) == f"4 of {len(steps)} steps are done; at least 2 h 0 min left."
    assert progress.text(jobs=2).endswith("at least 1 h 0 min left.")
    cost = costs.cost_of(study, "unet")
    assert (cost.training, cost.memory, cost.pretraining) == ("2 h 0 min", "2.9 GiB", "")


def test_samples_and_parameters_are_those_of_the_trainer(tmp_path):
    configuration = {"batch_size": 2, "vit_mae": {"finetuning": {"batch_size": 4, "epochs": 10, "iterations": 5}}}
    assert costs.samples_text(configuration, "nnUNetTrainerBaseline") == "100 (10 x 5 x 2)"
    for trainer in ("nnUNetTrainerViTMAE", "nnUNetTrainerBaselineAdamW"):
        assert costs.samples_text(configuration, trainer) == "200 (10 x 5 x 4)"
    study = study_of(tmp_path, few=(10,), configuration="own")
    own = {"inherits_from": "3d_fullres", "vit_mae": configuration["vit_mae"]}
    write_json(
        {"configurations": {"3d_fullres": {"batch_size": 2}, "own": own}}, study.model_folder("unet", 0) / "plans.json"
    )
    assert costs.cost_of(study, "unet").samples == "100 (10 x 5 x 2)"
    weight = torch.zeros(3, 4)
    torch.save({"network_weights": {"a": weight, "same": weight, "b": torch.zeros(5)}}, tmp_path / "checkpoint.pth")
    assert costs.count_parameters(tmp_path / "checkpoint.pth") == 17


# ---------- report


def made_up(arms, few=(10, 25), seeds=3, cases=12, labels=("a & b",)) -> pd.DataFrame:
    """Results in which the ViT is better than the U-Net by 0.1 and calibration halves the volume difference."""
    random = np.random.default_rng(0)
    difficulty = random.uniform(0, 0.2, cases)
    rows = []
    for arm, number, seed, calibrated, case, label in itertools.product(
        arms, few, range(seeds), (False, True), range(cases), labels
    ):
        dice = 0.5 + 0.1 * (arm == "vit") + 0.005 * number - difficulty[case] + random.normal(0, 0.01)
        volume = 100 * (1 - dice) / (1 + calibrated)
        key = {"arm": arm, "few": number, "seed": seed, "calibrated": calibrated, "case": f"c{case}", "label": label}
        rows.append(key | {"dice": dice, "absolute_difference_mm3": volume})
    return pd.DataFrame(rows)


def test_pairs_are_means_over_seeds_of_the_same_case():
    table = made_up(["unet", "vit"], few=(10,), seeds=2, cases=3)
    table.loc[(table["case"] == "c0") & (table["arm"] == "vit"), "dice"] = np.nan
    paired = comparisons.compare_pair(table, Variant("unet", False), Variant("vit", False), 10, "a & b", "dice")
    chosen = table[~table["calibrated"] & (table["case"] != "c0")].groupby("arm")["dice"].mean()
    assert paired is not None
    assert (paired.cases, paired.seeds, len(paired.seed_differences)) == (2, 2, 2)
    assert paired.difference == pytest.approx(chosen["vit"] - chosen["unet"])
    assert np.mean(paired.seed_differences) == pytest.approx(paired.difference)
    only_seed_0 = table[(table["seed"] == 0) | (table["arm"] == "vit")]
    paired = comparisons.compare_pair(only_seed_0, Variant("unet", False), Variant("vit", False), 10, "a & b", "dice")
    assert paired is not None
    assert paired.seeds == 1
    assert comparisons.compare_pair(table, Variant("x", False), Variant("vit", False), 10, "a & b", "dice") is None


def test_a_seed_counts_for_a_case_if_both_arms_have_a_value():
    """The Dice of two empty masks is not defined: here seed 1 of one arm has none for the first case."""
    table = made_up(["unet", "vit"], few=(10,), seeds=2, cases=2)
    first_case, vit = table["case"] == "c0", table["arm"] == "vit"
    table["dice"] = np.where(vit, 0.5, 0.4) + 0.2 * table["seed"]
    table.loc[first_case & ~vit & (table["seed"] == 1), "dice"] = np.nan
    pair = (Variant("unet", False), Variant("vit", False))
    paired = comparisons.compare_pair(table, *pair, 10, "a & b", "dice")
    assert paired is not None
    assert (paired.cases, paired.seeds) == (2, 2)
    assert (paired.difference, paired.low, paired.high) == pytest.approx((0.1, 0.1, 0.1))
    table.loc[first_case & vit & (table["seed"] == 0), "dice"] = np.nan  # no seed has both
    paired = comparisons.compare_pair(table, *pair, 10, "a & b", "dice")
    assert paired is not None
    assert paired.cases == 1


def test_the_scans_of_a_patient_are_one_pair_and_are_drawn_together():
    """Of four patients with three scans each, all of which improve: p cannot be below 1/8."""
    table = made_up(["unet", "vit"], few=(10,), seeds=2)
    table["patient"] = table["case"].map({f"c{number}": f"P{number // 3}" for number in range(12)})
    vit = Variant("vit", False)
    paired = comparisons.compare_pair(table, Variant("unet", False), vit, 10, "a & b", "dice")
    point = comparisons.point_of(table, vit, 10, "a & b", "dice")
    assert paired is not None
    assert point is not None
    means = table[~table["calibrated"]].pivot_table(index=["case", "patient"], columns="arm", values="dice")
    patients, options = means.index.get_level_values("patient").tolist(), comparisons.OPTIONS.bootstrap
    assert (paired.cases, paired.p) == (12, 0.125)
    expected = mean_interval((means["vit"] - means["unet"]).to_numpy(), groups=patients, **options)
    assert (paired.low, paired.high) == pytest.approx(expected)
    expected = mean_interval(means["vit"].to_numpy(), groups=patients, **options)
    assert (point.low, point.high) == pytest.approx(expected)
    of_seeds = table[(table["arm"] == "vit") & ~table["calibrated"]].groupby("seed")["dice"].mean()
    assert (point.mean, *point.seeds) == pytest.approx((means["vit"].mean(), *of_seeds))


def test_no_arm_is_better_where_mean_and_ranks_disagree():
    table = made_up(["unet", "vit"], few=(10,), seeds=1, cases=15)
    worst = (table["arm"] == "vit") & (table["case"] == "c14")
    table.loc[worst, "absolute_difference_mm3"] = 9999.0
    pair = (Variant("unet", False), Variant("vit", False))
    answers = comparisons.answer(Question("?", (pair,)), table)
    volume = next(paired for paired in answers if paired.measure != "dice" and paired.label == "a & b")
    assert volume.significant
    assert volume.difference > 0 > volume.direction
    assert comparisons.verdict_of(volume) == "They differ, but mean and ranks disagree"


def test_an_answer_is_corrected_and_put_into_a_sentence():
    pair = (Variant("unet", False), Variant("vit", False))
    answers = comparisons.answer(Question("?", (pair,)), made_up(["unet", "vit"]))
    dice = [paired for paired in answers if paired.measure == "dice"]
    assert [paired.few for paired in dice] == [10, 25]
    assert all(paired.p_holm == pytest.approx(2 * paired.p) for paired in dice if paired.p is not None)
    assert comparisons.verdict_of(dice[0]) == "vit is better"
    sentence = comparisons.sentence_of(dice[0])
    assert sentence.startswith("With 10 labels, a & b: mean Dice was 0.5")
    assert "(95% confidence interval 0." in sentence
    assert sentence.endswith("12 test cases, means of 3 seeds).")
    volume = next(paired for paired in answers if paired.measure != "dice")
    assert volume.difference < 0
    assert comparisons.verdict_of(volume) == "vit is better"


def test_what_cannot_be_said_is_said():
    arms = choose_arms(["unet", "vit", "primus", "resenc"])
    text = " ".join(
        comparisons.limits_of_study([], arms, iterations=1000, seeds=1, cases=5, patients=5, by_patient=False)
    )
    assert "1,000 iterations. unet, resenc: nnU-Net's SGD, whose schedule is made for 250,000. vit: AdamW" in text
    for part in ("one training run", "only 5 test cases", "Without --csv", "primus: nnU-Net's own", "resenc: plans"):
        assert part in text
    long = comparisons.limits_of_study(
        [], choose_arms(["unet", "vit"]), iterations=250_000, seeds=3, cases=50, patients=50, by_patient=True
    )
    alone = comparisons.limits_of_study(
        [], choose_arms(["unet"]), iterations=10, seeds=3, cases=50, patients=50, by_patient=True
    )
    scans = comparisons.limits_of_study([], {}, iterations=10, seeds=3, cases=50, patients=5, by_patient=True)
    assert next(scans).startswith("There are only 5 test patients: even large differences")
    assert " ".join(long) == (text := " ".join(alone))
    assert text.startswith("The intervals and tests are over test cases")


def test_networks_are_compared_with_the_u_net_that_learns_as_they_do(tmp_path):
    study = study_of(tmp_path, "unet", "unet_adamw", "hybrid", few=(10,))
    titles = {question.title: question.pairs for question in comparisons.questions_of(study)}
    by_adamw = [(str(first), str(second)) for first, second in titles["Other arms minus U-Net trained by AdamW"]]
    assert by_adamw == [("unet_adamw", "unet"), ("unet_adamw", "hybrid")]
    for title, of_unet in (("both calibrated", "calibrated unet"), ("as trained", "unet")):
        (pairs,) = (pairs for known, pairs in titles.items() if known.endswith(title))
        found = [(str(first), str(second)) for first, second in pairs]
        assert found == [(of_unet, "calibrated unet_adamw"), (of_unet, "calibrated hybrid")]
    without = comparisons.questions_of(study_of(tmp_path, "unet", "hybrid", few=(10,)))
    assert "Other arms minus U-Net trained by AdamW" not in {question.title for question in without}


@pytest.mark.parametrize(("few", "labels"), [((10, 60), ("a & b", "c")), ((10,), ("a & b",))])
def test_the_report_has_curves_comparisons_and_limits(tmp_path, few, labels):
    study = study_of(tmp_path, "unet", "vit", "scratch", few=few)
    table = made_up(study.arms, few=few, labels=labels)
    missing = [StudyModel("scratch", 10, 1, True)]
    page = write_study_report(
        study,
        table,
        comparisons.answers_of(study, table),
        missing,
        [costs.cost_of(study, arm) for arm in study.arms],
    )
    text = page.read_text()
    assert text.count("data:image/svg+xml") == len(labels) * (1 + 5)
    for part in ("Pre-trained minus from scratch", "a &amp; b", "scratch_10_s1_calibrated", "What cannot be said"):
        assert part in text
    rows = pd.read_csv(tmp_path / "my study" / "comparisons.csv")
    pairs = 1 + 2 + 2 + 2 + 3  # of scratch, of the U-Net thrice, of calibration
    assert len(rows) == pairs * len(few) * len(labels) * 2
    assert set(rows["first"]) == {"scratch", "unet", "calibrated unet", "vit"}
    assert len(list((tmp_path / "my study" / "figures").glob("learning_curves*.png"))) == len(labels)
    assert 'id="training"' not in text  # nothing has been trained
    assert "resamples of the cases. Two-sided Wilcoxon signed-rank tests; Holm" in " ".join(text.split())


def test_the_report_says_that_patients_are_drawn_and_compared(tmp_path):
    study = study_of(tmp_path, "unet", "vit", few=(10,))
    table = made_up(study.arms, few=(10,))
    table["patient"] = table["case"].str.replace("c1.*", "c1", regex=True)  # c1, c10 and c11 are of one
    page = write_study_report(study, table, comparisons.answers_of(study, table), [], [])
    text = " ".join(html.unescape(page.read_text()).split())
    assert "resamples of the patients, each with all cases. Two-sided Wilcoxon" in text
    assert "tests of the means of each patient's cases; Holm" in text
    assert "There are only 10 test patients" in text
    of_one = table.assign(patient="c1")
    page = write_study_report(study, of_one, comparisons.answers_of(study, of_one), [], [])
    assert "\N{EN DASH} to" not in page.read_text()


def test_the_report_shows_how_models_learned(tmp_path):
    study = study_of(tmp_path, "unet", "vit", few=(10, 25), seeds=2)
    encoder = study.encoder_file("vit")
    encoder.parent.mkdir(parents=True)
    encoder.touch()
    torch.save({"losses": [0.5, 0.4, 0.9, 0.8], "network": {}}, encoder.parent / "state.pt")
    protocol = {"epochs": 4, "plain_share": 0.5}
    (encoder.parent / "config.json").write_text(json.dumps({"pretraining": protocol}))
    for arm, fold, seed in (("unet", 1, 0), ("unet", 2, 1), ("vit", 2, 0), ("vit", 2, 1)):
        folder = study.model_folder(arm, seed) / f"fold_{fold}"
        folder.mkdir(parents=True)
        log = {"train_losses": [0.1, np.float32(-0.2)], "ema_fg_dice": [0.3, np.float64(0.4)]}
        torch.save({"network_weights": {"a": torch.zeros(3)}, "logging": log}, folder / "checkpoint_final.pth")

    (curve,) = pretraining_curves(study)
    assert (curve.encoder, curve.losses.tolist(), curve.plain) == ("vit", [0.5, 0.4, 0.9, 0.8], 2)
    curves = training_curves(study)
    assert [(c.arm, c.few, c.seed) for c in curves] == [
        ("unet", 10, 0), ("unet", 25, 1), ("vit", 25, 0), ("vit", 25, 1)
    ]  # fmt: skip
    assert curves[0].losses.tolist() == pytest.approx([0.1, -0.2])
    assert curves[0].dice.tolist() == pytest.approx([0.3, 0.4])

    panels = training_figure(curves).axes
    assert [len(axes.lines) for axes in panels] == [1, 1, 3, 3]
    table = made_up(study.arms, seeds=1, cases=3)
    page = write_study_report(study, table, comparisons.answers_of(study, table), [], [])
    assert 'id="training"' in page.read_text()
    assert {"pretraining.png", "training.svg"} <= {file.name for file in (Path(study.output) / "figures").iterdir()}


def test_models_that_are_done_are_measured_once(tmp_path):
    study = study_of(tmp_path, "unet", few=(10,), seeds=1, preprocessed=True)
    mask = np.zeros((4, 5, 6), np.uint8)
    mask[1, 1:3, 2:4] = 1
    model = StudyModel("unet", 10, 0, False)
    for folder in (study.test_labels, study.predictions(model)):
        folder.mkdir(parents=True)
        sitk.WriteImage(sitk.GetImageFromArray(mask), str(folder / "007.nii.gz"))
    with pytest.raises(UserError, match="No model"):
        measure_study(study)
    marker = Path(study.output, "done", "predict", model.name)
    marker.parent.mkdir(parents=True)
    marker.touch()
    (Path(study.raw) / "scans.csv").write_text("case,slice_thickness_mm\n007,0.5\n")
    table, missing = measure_study(study)
    assert table["slice_thickness_mm"].tolist() == [0.5]  # the spacing is 1 mm
    assert table[["arm", "few", "seed", "calibrated", "case", "dice"]].to_numpy().tolist() == [
        ["unet", 10, 0, False, "007", 1]
    ]
    assert missing == [StudyModel("unet", 10, 0, True)]
    elsewhere = study.predictions(model).rename(tmp_path / "elsewhere")
    again, _ = measure_study(study)
    pd.testing.assert_frame_equal(table, again)
    elsewhere.rename(study.predictions(model))
    mask[2, 1:3, 2:4] = 1
    reference = study.test_labels / "007.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(reference))  # corrected
    os.utime(reference, (1, 1))  # as copies of a backup are
    corrected, _ = measure_study(study)
    assert corrected["dice"].tolist() == pytest.approx([2 / 3])


def test_a_label_may_have_the_name_that_pandas_gives_to_missing_values(tmp_path):
    study = study_of(tmp_path, "unet", few=(10,), seeds=1, preprocessed=True)
    model = StudyModel("unet", 10, 0, False)
    for folder in (study.test_labels, study.predictions(model)):
        folder.mkdir(parents=True)
        sitk.WriteImage(sitk.GetImageFromArray(np.ones((2, 3, 4), np.uint8)), str(folder / "NA.nii.gz"))
    (study.predictions(model) / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "NA": 1}}))
    marker = Path(study.output, "done", "predict", model.name)
    marker.parent.mkdir(parents=True)
    marker.touch()
    table, _ = measure_study(study)
    assert table[["case", "label"]].to_numpy().tolist() == [["NA", "NA"]]


# ---------- the ensemble


def test_an_ensemble_is_calibrated_on_the_mean_of_its_members(planned, tmp_path, monkeypatch):
    from nnunet_vit_mae.nnunet.ensembling import calibrate_ensemble
    from nnunet_vit_mae.nnunet.folders import Dataset
    from nnunet_vit_mae.nnunet.plans import load_plan

    plan = load_plan(
        Dataset(planned.dataset, planned.raw, planned.preprocessed, planned.results), "nnUNetPlans", "3d_fullres"
    )
    image = sitk.ReadImage(str(planned.raw / "labelsTr" / "train_0.nii.gz"))
    labels = sitk.GetArrayFromImage(image)
    geometry = {"spacing": image.GetSpacing(), "origin": image.GetOrigin(), "direction": image.GetDirection()}
    properties = {"sitk_stuff": geometry, "spacing": image.GetSpacing()[::-1]}

    def put(folder: Path, name: str, foreground: np.ndarray) -> None:
        folder.mkdir(exist_ok=True)
        np.savez_compressed(
            folder / f"{name}.npz", probabilities=np.stack([1 - foreground, foreground]).astype(np.float32)
        )
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(properties))

    # the mean is 0.3 in the label and 0.1 outside: nothing at 0.5, everything right at the fitted threshold
    put(tmp_path / "unet", "train_0", np.where(labels == 1, 0.5, 0.1))
    put(tmp_path / "vit", "train_0", np.where(labels == 1, 0.1, 0.1))
    put(tmp_path / "test", "test_0", np.where(labels == 1, 0.3, 0.1))
    (tmp_path / "test" / "dataset.json").write_text("{}")
    record = calibrate_ensemble(plan, [tmp_path / "unet", tmp_path / "vit"], tmp_path / "test", tmp_path / "out")
    assert 0.1 < json.loads(record.read_text())["thresholds"]["blob"] < 0.3
    np.testing.assert_array_equal(read_voxels(tmp_path / "out" / "test_0.nii.gz"), labels)
    members = [tmp_path / "unet", tmp_path / "vit"]
    put(members[1], "train_0", np.full_like(labels[1:], 0.1, dtype=np.float32))
    with pytest.raises(UserError, match=r"unet.train_0.npz and .*vit.train_0.npz differ in their voxels"):
        calibrate_ensemble(plan, members, tmp_path / "test", tmp_path / "out")
    put(members[0], "train_0", np.full_like(labels[1:], 0.1, dtype=np.float32))
    with pytest.raises(UserError, match=r"unet.train_0.npz has .* voxels, but .*train_0.nii.gz has"):
        calibrate_ensemble(plan, members, tmp_path / "test", tmp_path / "out")
    put(members[1], "train_1", np.where(labels == 1, 0.1, 0.1))
    with pytest.raises(UserError, match="different cases"):
        calibrate_ensemble(plan, members, tmp_path / "test", tmp_path / "out")


# ---------- the command


def test_bad_input_gets_one_sentence(in_workspace, tmp_path, refused, monkeypatch):
    common = ("-o", str(tmp_path / "study"), "-device", "cpu", "--dry-run")
    known = (*common, "-d", "901", "--few", "2")
    assert "-d is missing" in refused(command.main, *common)
    assert "--few is missing" in refused(command.main, *common, "-d", "901")
    assert "choose from unet" in refused(command.main, *known, "--arms", "resnet")
    assert "leave --test out" in refused(command.main, *known, "--test", "0.2")
    assert "There is no table" in refused(command.main, *known, "--csv", "nowhere.csv")
    assert "--few 6 is too many: fold 0 has only 5 training patients" in refused(command.main, *known, "--few", "6")
    assert "There is no recipe" in refused(command.main, *known, "--recipe", "nowhere")
    assert "no configuration 4d" in refused(command.main, *known, "-c", "4d")
    assert "study.json is missing" in refused(command.main, *common, "--step", "report")
    assert "pip install snakemake-executor-plugin-nowhere" in refused(command.main, *known, "--executor", "nowhere")
    plans = in_workspace.preprocessed / "study_unet_s0.json"
    plans.touch()
    assert f"{plans} was not made by the study in {tmp_path / 'study'}" in refused(command.main, *known)
    monkeypatch.setattr(workflow, "find_spec", lambda name: None)
    assert 'pip install "nnunet-vit-mae[study]"' in refused(command.main, *known)
    assert not (tmp_path / "study").exists()


def test_a_test_set_has_images_and_labels_of_the_same_cases(in_workspace, tmp_path, refused):
    labels = in_workspace.raw / "labelsTs"
    known = ["-o", str(tmp_path / "study"), "-device", "cpu", "--dry-run", "-d", "901", "--few", "2"]
    (labels / "test_1.nii.gz").rename(tmp_path / "test_1.nii.gz")
    message = f"imagesTs and labelsTs of {in_workspace.raw} hold different cases (only one of them has test_1)"
    assert message in refused(command.main, *known)
    (labels / "test_0.nii.gz").unlink()
    (labels / ".DS_Store").touch()
    assert command._study(command._parse(known), tmp_path / "study").test == command.DEFAULT_TEST


MOVE = "move them aside with mae3d_split -d 901 --development 0.34 --few 2 --overwrite, or work on a copy"


def test_a_study_goes_on_with_its_own_splits_only(in_workspace, tmp_path, refused):
    """Otherwise its remaining models train on cases that others are tested on."""
    known = ["-o", str(tmp_path / "study"), "-d", "901", "--few", "2", "--development", "0.34", "-device", "cpu"]
    study = command._study(command._parse(known), tmp_path / "study")
    write_json(study.to_json(), tmp_path / "study" / "study.json")
    split = by_name(study)["split", "patients"]
    in_workspace.call("mae3d_split", "-d", "901", "--folds", "3")
    message = refused(command.main, *known)
    assert f"holds other splits than those of the study, and models may have been trained with them: {MOVE}" in message
    assert not (tmp_path / "study" / "done").exists()
    in_workspace.call(*split, "--overwrite")
    command.main([*known, "--dry-run"])
    in_workspace.call("mae3d_study", "-o", study.output, "--step", "splits")
    in_workspace.call(*split)  # the same again
    in_workspace.call("mae3d_study", "-o", study.output, "--step", "splits")
    in_workspace.call("mae3d_split", "-d", "901", "--folds", "3", "--overwrite")
    for arguments in ([*known, "--dry-run"], ["-o", study.output, "--step", "splits"]):
        message = refused(command.main, *arguments)
        assert f"does not hold the splits that the study in {study.output} began with: copy" in message
    with pytest.raises(UserError, match="does not hold the splits"):
        command._do_step(study, "test")
    for name in ("splits_final.json", "split.json"):
        shutil.copy(tmp_path / "study" / name, in_workspace.preprocessed)
    command.main(["-o", study.output, "--step", "splits"])
    record = in_workspace.preprocessed / "split.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"test": ["train_0"]}))
    assert "does not hold the splits" in refused(command.main, *known, "--dry-run")
    (in_workspace.preprocessed / "splits_final.json").unlink()
    assert "does not hold the splits" in refused(command.main, *known, "--dry-run")
    steps = {step.kind: guarded_shell(study, step) for step in steps_of(study)}
    guard = f"mae3d_study -o {study.output} --step splits"
    assert steps["split"] == f"{shlex.join(split)} && {guard}"
    assert all(steps[kind].startswith(f"{guard} && ") for kind in ("pretrain", "train", "calibrate"))
    assert guard not in steps["predict"]


def test_choices_can_stand_in_a_file(in_workspace, tmp_path, refused):
    file, arms = tmp_path / "choices.json", tmp_path / "mine.json"
    arms.write_text(json.dumps({"mine": {"trainer": "nnUNetTrainerViTMAE", "encoder": True}}))
    choices = {"dataset": "901", "arms": ["unet", "mine.json"], "few": [2], "development": 0.34, "recipe": "quick"}
    file.write_text(json.dumps(choices))
    args = command._parse(["-o", str(tmp_path / "study"), "--config", str(file), "--seeds", "1", "-device", "cpu"])
    study = command._study(args, tmp_path / "study")
    assert (list(study.arms), study.few, study.seeds, study.development) == (["unet", "mine"], (2,), 1, 0.34)
    assert study.recipe["network"]["size"] == "XS"
    assert (study.unlabelled, study.preprocessed, study.test) == (True, True, 0)
    for wrong, message in (
        ({"sise": 3}, "unknown choice sise"),
        ({"few": 3}, f"{file} cannot be used, because few is 3, but it must be a list: correct it."),
        ({"few": [2, 0]}, "few[1] is 0, but it must be above 0"),
        ({"few": [True]}, "few[0] is True, but it must be a whole number"),
        ({"arms": "unet"}, "arms is 'unet', but it must be a list"),
        ({"arms": [3]}, "arms[0] is 3, but it must be text"),
        ({"seeds": [3]}, f"{file} has seeds = [3]: give text or a number."),
        ({"seeds": True}, "has seeds = True: give text or a number"),
        ([], "object of choices"),
        ({"device": "gpu"}, "device is 'gpu', but it must be 'cuda' or 'cpu'"),
        ({"device": 0}, "device is 0, but it must be 'cuda' or 'cpu'"),
    ):
        file.write_text(json.dumps(wrong))
        assert message in refused(command.main, "-o", str(tmp_path / "study"), "--config", str(file))


STUDIES = Path(__file__).parent.parent / "examples" / "studies"
EXAMPLES = [file for file in sorted(STUDIES.glob("*.json")) if "dataset" in json.loads(file.read_text())]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_examples_are_studies(in_workspace, tmp_path, file, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["thin_plans.py", "901", "--width", "3"])
    runpy.run_path(str(STUDIES / "thin_plans.py"), run_name="__main__")  # which some of them start from
    call = ["-o", str(tmp_path / "study"), "--config", str(file), "-d", "901", "-device", "cpu"]
    study = command._study(command._parse(call), tmp_path / "study")
    assert study.arms
    assert study.recipe["finetuning"]["epochs"] > 0
    thin = load_plan("901", "nnUNetPlansThin").configuration
    assert thin.network_arch_init_kwargs["features_per_stage"][:2] == [3, 6]
    assert thin.batch_size == 2


def test_test_cases_of_the_split_are_linked(tmp_path):
    study = study_of(tmp_path, test=0.2)
    for name in ("imagesTr/a_0000", "imagesTr/b_0000", "labelsTr/a", "labelsTr/b"):
        (tmp_path / "raw" / f"{name}.nii.gz").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / f"{name}.nii.gz").touch()
    (tmp_path / "raw" / "dataset.json").write_text("{}")
    (tmp_path / "preprocessed").mkdir()
    (tmp_path / "preprocessed" / "split.json").write_text(json.dumps({"test": ["b"], "left_out": []}))
    for _ in range(2):
        command._do_step(study, "test")
    assert [file.name for file in study.test_images.iterdir()] == ["b_0000.nii.gz"]
    assert [file.name for file in study.test_labels.iterdir()] == ["b.nii.gz"]
    with pytest.raises(UserError, match="give splits, test, report, or calibrate"):
        command._do_step(study, "calibrate")
    with pytest.raises(UserError, match="no such ensemble"):
        command._do_step(study, "calibrate", "unet_10_s0")


def snakemake_is_here() -> bool:
    return importlib.util.find_spec("snakemake") is not None


needs_snakemake = pytest.mark.skipif(not snakemake_is_here(), reason="the extra `study` is not installed")


@needs_snakemake
def test_a_dry_run_prints_the_commands(in_workspace, tmp_path, capfd):
    few = "--arms unet vit ensemble --few 2 --seeds 1 --development 0.34 -device cpu --dry-run".split()
    command.main(["-d", "901", "-o", str(tmp_path / "study"), *few])
    printed = capfd.readouterr().out
    first, *lines = printed.splitlines()
    assert first == "Left: 2 trainings of 250,000 iterations (1000 epochs of 250), 1 pre-training of 800 epochs."
    for part in ("mae3d_preprocess -d 901", "nnUNetv2_train 901 3d_fullres 1 -p study_vit_s0", "nnUNetv2_ensemble -i"):
        assert [line for line in lines if line.startswith(part)]
    assert all(line.startswith(("mae3d_", "nnUNetv2_")) for line in lines)
    assert "nnUNetv2_plan_and_preprocess" not in printed
    assert not (tmp_path / "study" / "study.json").exists()


def test_how_much_is_left_to_train_is_counted(tmp_path):
    recipe = {"finetuning": {"epochs": 20, "iterations": 50}}
    study = study_of(tmp_path, "unet", "vit", "primus", recipe=recipe, few=(10,), pretrain_epochs=7)
    assert workflow.work_text(study, steps_of(study)) == (
        "Left: 4 trainings of 1,000 iterations (20 epochs of 50), 2 trainings with the schedule of "
        "nnUNet_PrimusV2M_Trainer, 1 pre-training of 7 epochs."
    )
    assert workflow.work_text(study, []) == "Left: nothing to train."


@needs_snakemake
def test_a_failed_step_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """With stand-ins for nnU-Net's commands and ours, of which the calibration of the ViT fails."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("split", "plan", "pretrain", "calibrate", "evaluate", "study"):
        fails = "case $* in *_vit_*) echo Error: no; exit 3;; esac" if name == "calibrate" else ""
        (bin_folder / f"mae3d_{name}").write_text(f"#!/bin/sh\necho $0\n{fails}\n")
    for name in ("train", "predict"):
        (bin_folder / f"nnUNetv2_{name}").write_text("#!/bin/sh\n")
    for file in bin_folder.iterdir():
        file.chmod(0o755)
    monkeypatch.setattr(workflow.sysconfig, "get_path", lambda name: str(bin_folder))
    raw = str(tmp_path / "{raw}")  # braces are Snakemake's signs for names
    study = study_of(tmp_path, few=(10,), seeds=1, preprocessed=True, raw=raw)
    study.test_labels.mkdir(parents=True)
    (study.test_labels / "case.nii.gz").touch()
    lines: list[str] = []
    assert not workflow.run_workflow(study, 2, None, lines.append)
    progress = workflow.progress_of(study)
    assert [(step.kind, step.name) for step in progress.failed] == [("calibrate", "vit_10_s0")]
    assert {step.kind for step in progress.waiting} == {"predict", EVALUATE, "report"}
    with pytest.raises(SystemExit) as stop:
        command._tell_failures(study)
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert "Failed or interrupted: calibrate vit_10_s0" in told
    assert "\n  Error: no\n" in told
    (bin_folder / "mae3d_calibrate").write_text("#!/bin/sh\n")
    (bin_folder / "mae3d_evaluate").write_text(f"#!/bin/sh\nmkdir -p '{study.output}/evaluations/10_labels'\n")
    (bin_folder / "nnUNetv2_train").write_text("#!/bin/sh\nexit 1\n")  # is done, so it is not typed again
    assert workflow.run_workflow(study, 1, None, lines.append)
    for more in (replace(study, seeds=2), replace(study, arms=study.arms | choose_arms(["unet_adamw"]))):
        left = [line.split()[0] for line in workflow.commands_left(more).splitlines()[1:]]
        assert {"nnUNetv2_train", "nnUNetv2_predict"} < {*left}
        assert left[-1] == "mae3d_study"
    assert not workflow.commands_left(study).splitlines()[1:]
    study.references[0].write_text("corrected")
    os.utime(study.references[0], (1, 1))  # as copies of a backup are
    left = workflow.commands_left(study).splitlines()[1:]
    assert [line.split()[0] for line in left] == ["mae3d_evaluate", "mae3d_study"]
    (bin_folder / "mae3d_study").write_text("#!/bin/sh\nexit 1\n")
    assert not workflow.run_workflow(study, 1, None, lines.append)
    left = workflow.commands_left(study).splitlines()[1:]  # also after a call that was stopped
    assert [line.split()[0] for line in left] == ["mae3d_study"]


@pytest.mark.slow
@needs_snakemake
def test_a_study_from_beginning_to_end(in_workspace, tmp_path, capfd, forked_commands):
    """A pre-trained ViT and an arm of the user's, with one label number and seed."""
    shutil.rmtree(in_workspace.raw / "imagesUn")
    arms = tmp_path / "arms.json"
    arms.write_text(json.dumps({"mine": {"trainer": "nnUNetTrainerViTScratch", "calibrate": False}}))
    flags = "--few 2 --seeds 1 --development 0.34 --recipe quick --epochs 1 --iterations 1 --pretrain_epochs 1"
    call = ["-d", "901", "-o", str(tmp_path / "study"), "--arms", "vit", str(arms), *flags.split(), "-device", "cpu"]
    command.main(call)
    folder = tmp_path / "study"
    table = pd.read_csv(folder / "results.csv")
    assert set(zip(table["arm"], table["calibrated"], strict=True)) == {("vit", False), ("vit", True), ("mine", False)}
    assert set(table["case"]) == {"test_0", "test_1"}
    page = (folder / "index.html").read_text()
    assert "Pre-trained minus from scratch" in page
    assert "2 (1 x 1 x 2)" in page  # samples: the batch of nnU-Net's plans
    assert (folder / "evaluations" / "2_labels" / "index.html").is_file()
    log = next(
        (in_workspace.results / "nnUNetTrainerViTMAE__study_vit_s0__3d_fullres" / "fold_1").glob("training_log*")
    )
    assert "Loaded the encoder" in log.read_text()
    capfd.readouterr()
    command.main(call)  # everything is done
    assert "Shell command: " not in capfd.readouterr().out


def test_the_arms_of_the_documentation_are_those_of_the_code():
    page = (Path(__file__).parent.parent / "docs" / "study.md").read_text()
    for name, arm in ARMS.items():
        assert f"| `{name}` |" in page
        assert not arm.trainer or arm.trainer in page
