"""The path inside nnU-Net on a tiny dataset: plans, unlabelled images, and which cases pre-training may see."""

import json
import os
import shutil

import blosc2
import numpy as np
import pytest
import torch
from conftest import SHAPE, blob, write_case
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_vit_mae.cli import plan as plan_command
from nnunet_vit_mae.cli import preprocess as preprocess_command
from nnunet_vit_mae.cli import pretrain as pretrain_command
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.folds import labelled_cases, pretraining_cases, reference_segmentations, split_of
from nnunet_vit_mae.nnunet.plans import load_plan, schedule_of, settings_for, settings_of
from nnunet_vit_mae.nnunet.preprocessing import _preprocess_case, resampled_problem
from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerBaseline, nnUNetTrainerViTScratch
from nnunet_vit_mae.recipes import read_recipe
from nnunet_vit_mae.settings import Settings
from nnunet_vit_mae.storage.files import locked

pytestmark = pytest.mark.slow


def tiny_plan(name="nnUNetPlans", configuration="3d_fullres"):
    return load_plan(find_dataset("901"), name, configuration)


def add_2d(workspace, **changes):
    """Add a 2D configuration to the plans: slices along the first axis of the plans, at another spacing."""
    file = workspace.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    flat = {"patch_size": [18, 22], "spacing": [0.8, 1.1], "data_identifier": "nnUNetPlans_2d"}
    configurations = {"2d": plans["configurations"]["3d_fullres"] | flat}
    file.write_text(json.dumps(plans | {"configurations": plans["configurations"] | configurations} | changes))


def test_plans_keep_the_baselines_files_and_leave_the_source_alone(in_workspace, capsys):
    source = (in_workspace.preprocessed / "nnUNetPlans.json").read_bytes()
    plan_command.main("-d 901 -o Short --epochs 3 --iterations 7 --token 2 4 8 --size XS --lr 0.001".split())
    assert "Short.json" in capsys.readouterr().out
    assert (in_workspace.preprocessed / "nnUNetPlans.json").read_bytes() == source

    before, after = tiny_plan(), tiny_plan("Short")
    assert after.preprocessed_folder == before.preprocessed_folder
    assert after.plans.plans_name == "Short"
    assert after.configuration.batch_size == before.configuration.batch_size
    assert after.settings.network.token == (2, 4, 8)
    assert (after.settings.finetuning.epochs, after.settings.finetuning.iterations) == (3, 7)
    assert after.settings.finetuning.lr == 0.001


@pytest.mark.parametrize("thickness", [1.0, 5.0])  # of anisotropic voxels slices are repeated, not blended
def test_plans_resample_logits_as_nnunet_does(in_workspace, thickness):
    plan_command.main("-d 901 -o Fast --size XS --token 8".split())
    logits = np.random.default_rng(0).normal(size=(3, 5, 9, 7)).astype(np.float32)
    spacings = (thickness, 1.0, 1.0), (thickness * 5 / 7, 9 / 12, 7 / 11)
    found = [
        np.asarray(tiny_plan(name).configuration.resampling_fn_probabilities(logits, (7, 12, 11), *spacings))
        for name in ("nnUNetPlans", "Fast")
    ]
    assert found[0].shape == (3, 7, 12, 11)
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_only_nnunets_default_resampling_of_logits_is_replaced(in_workspace):
    plan_command.main("-d 901 -o Fast --size XS --token 8".split())
    before, after = (tiny_plan(name).configuration.configuration for name in ("nnUNetPlans", "Fast"))
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {"vit_mae", "resampling_fn_probabilities", "resampling_fn_probabilities_kwargs"}
    assert after["resampling_fn_probabilities"] == "resample_torch_fornnunet"

    file = in_workspace.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["resampling_fn_probabilities_kwargs"]["order"] = 3
    file.write_text(json.dumps(plans))
    plan_command.main("-d 901 -o Cubic --size XS --token 8".split())
    assert tiny_plan("Cubic").configuration.configuration["resampling_fn_probabilities_kwargs"]["order"] == 3


def test_the_decoder_is_nnunets_own_unet_unless_another_is_given(in_workspace):
    plan_command.main("-d 901 -o Default --size XS --token 8".split())
    plan_command.main("-d 901 -o Given --size XS --token 8 --decoder mae".split())
    plan_command.main("-d 901 -o Adaptive --size XS --adaptive".split())
    decoders = [tiny_plan(name).settings.network.decoder for name in ("Default", "Given", "Adaptive")]
    assert decoders == ["unet", "mae", "unetr"]
    plan_command.main("-d 901 -o Slow --size XS --lr 5e-4".split())
    plan_command.main("-d 901 -o Kept -p Slow --decoder sfpn".split())
    names = ("Default", "Given", "Adaptive", "Slow", "Kept")
    assert [tiny_plan(name).settings.finetuning.lr for name in names] == [1e-3, 3e-4, 3e-4, 5e-4, 5e-4]


def block_of(workspace, name, configuration):
    return json.loads((workspace.preprocessed / f"{name}.json").read_text())["configurations"][configuration]


def test_plans_of_one_configuration_leave_those_of_another_in_the_file(in_workspace, refused):
    file = in_workspace.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    low = plans["configurations"]["3d_fullres"] | {"spacing": [3.0, 2.0, 2.0]}
    plans["configurations"]["3d_lowres"] = low
    file.write_text(json.dumps(plans))
    plan_command.main("-d 901 -c 3d_lowres -o Both --size XS --token 8".split())
    lowres = block_of(in_workspace, "Both", "3d_lowres")
    plan_command.main("-d 901 -o Both --size S --token 8".split())
    plan_command.main("-d 901 -o Both --size XS --token 4".split())
    assert block_of(in_workspace, "Both", "3d_lowres") == lowres
    assert lowres["resampling_fn_probabilities"] == "resample_torch_fornnunet"
    assert block_of(in_workspace, "Both", "3d_fullres")["vit_mae"]["network"]["token"] == [4, 4, 4]

    before = (in_workspace.preprocessed / "Both.json").read_bytes()
    low["spacing"][0] = 2.5
    file.write_text(json.dumps(plans))
    message = refused(plan_command.main, *"-d 901 -o Both --size XS --token 8".split())
    assert "Both.json also has settings for 3d_lowres, which is another configuration in nnUNetPlans" in message
    assert (in_workspace.preprocessed / "Both.json").read_bytes() == before
    plan_command.main("-d 901 -c 3d_lowres -o Both --size XS --token 8".split())
    plan_command.main("-d 901 -o Both --size XS --token 8".split())


def test_new_plans_tell_which_models_they_leave_behind(in_workspace, caplog):
    """Training with `--c` is refused later, when the old plans are gone."""
    model = in_workspace.results / "nnUNetTrainerViTMAE__Again__3d_fullres"
    plan_command.main("-d 901 -o Again --size XS".split())
    model.mkdir(parents=True)
    plan_command.main("-d 901 -o Again --size XS --epochs 3".split())  # with which a training goes on
    assert "another network" not in caplog.text
    plan_command.main("-d 901 -o Again --size S".split())
    assert f"{model.name} had another network in the plans Again and cannot be continued" in caplog.text


PROTOCOL = ("mask_ratio", "norm_pix", "decoder", "rebuilt_share")


def test_an_adaptive_network_has_its_own_rate_and_protocol_on_plans_of_another(in_workspace):
    def adaptive(name):
        settings = settings_for(tiny_plan(name).configuration, 2, adaptive=True)
        return settings.finetuning.lr, *(getattr(settings.pretraining, entry) for entry in PROTOCOL)

    recipe = in_workspace.root / "recipe.json"
    recipe.write_text(json.dumps({"pretraining": {"mask_ratio": 0.6, "plain_share": 0.5}}))
    for flags in ("Plain", "Chosen --lr 5e-4", f"Recipe --recipe {recipe}", "Adaptive --adaptive"):
        plan_command.main(f"-d 901 --size XS -o {flags}".split())
    plan_command.main("-d 901 -p Plain -o Made --adaptive".split())
    stock = adaptive("nnUNetPlans")
    assert stock == (3e-4, 0.7, False, "self", 1.0)  # AMAE, section 2.4
    assert [adaptive(name) for name in ("Plain", "Adaptive", "Made")] == [stock] * 3
    assert adaptive("Chosen") == (5e-4, *stock[1:])
    assert adaptive("Recipe") == (3e-4, 0.6, True, "self", 1.0)
    stacked = settings_for(tiny_plan("Plain").configuration, 2, adaptive=False)
    assert stacked == tiny_plan("Plain").settings


def test_flags_win_over_the_recipe(in_workspace):
    plan_command.main("-d 901 -o Q --recipe quick --epochs 2".split())
    settings, recipe = tiny_plan("Q").settings, read_recipe("quick")
    assert settings.finetuning.epochs == 2
    assert settings.finetuning.iterations == recipe["finetuning"]["iterations"]
    assert settings.network.size == recipe["network"]["size"]


@pytest.mark.parametrize("name", ["amae", "quick", "vitiac"])
def test_recipes_are_valid(name):
    Settings.from_dict(read_recipe(name))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("-d 902 -o Short", "-d 902 is no dataset in nnU-Net's three folders: check the number"),
        ("-d nonsense -o Short", "nonsense"),
        ("-d 901 -o nnUNetPlans", "not written by mae3d_plan"),
        ("-d 901 -o bad/name", "letters, digits"),
        ("-d 901 -o splits_final", "not a name for plans"),
        ("-d 901 -o Short -p Missing", "run mae3d_plan -d 901 -o Missing first, or check -p"),
        ("-d 901 -o Short -p nnUNetPlan", "(did you mean nnUNetPlans?): run nnUNetv2_plan_and_preprocess -d 901 first"),
        ("-d 901 -o Short -c 3d_lowres", "no configuration 3d_lowres"),
        ("-d 901 -o Short -c 2d", "2D"),
        ("-d 901 -o Short --recipe nowhere", "no recipe nowhere"),
        ("-d 901 -o Short --token 3", "network.token"),
        ("-d 901 -o Short --token 4 4", "one number or three"),
    ],
)
def test_mistakes_in_planning_get_one_sentence(in_workspace, refused, arguments, reason):
    if "2d" in arguments:
        add_2d(in_workspace)
    before = sorted(file.name for file in in_workspace.preprocessed.iterdir())
    assert reason in refused(plan_command.main, *arguments.split())
    assert sorted(file.name for file in in_workspace.preprocessed.iterdir()) == before


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [('{"finetuning": {"epoch": 3}}', "epoch"), ("[]", "an object"), ('{"network": "S"}', "an object"), ("{", "JSON")],
)
def test_a_mistake_in_a_recipe_is_named(in_workspace, refused, tmp_path, recipe, reason):
    (tmp_path / "mine.json").write_text(recipe)
    assert reason in refused(plan_command.main, "-d", "901", "-o", "S", "--recipe", str(tmp_path / "mine.json"))


def test_unset_variables_are_named(in_workspace, refused, monkeypatch):
    monkeypatch.delenv("nnUNet_results")
    assert "nnUNet_results" in refused(plan_command.main, "-d", "901", "-o", "S")


def test_unlabelled_images_get_the_labelled_ones_preprocessing(in_workspace, capsys):
    """The image of a training case, put into the pool, comes out as nnU-Net preprocessed it."""
    channels, _ = blob(0)
    write_case(in_workspace.raw / "imagesUn", "twin", channels)
    preprocess_command.main("-d 901 -np 1".split())
    assert "4 of 4 unlabelled cases" in capsys.readouterr().out
    plan = tiny_plan()
    twin = blosc2.open(str(plan.unlabelled_folder / "twin.b2nd"))[:]
    labelled = blosc2.open(str(plan.preprocessed_folder / "train_0.b2nd"))[:]
    assert twin.dtype == labelled.dtype
    assert np.array_equal(twin, labelled)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_a_2d_configuration_preprocesses_the_pool_as_nnunet_does(in_workspace, capsys, order):
    """Slices keep their own spacing, which is that along the first axis of the plans."""
    add_2d(in_workspace, transpose_forward=order, transpose_backward=np.argsort(order).tolist())
    preprocess_command.main("-d 901 -c 2d -np 1".split())
    assert "3 of 3 unlabelled cases" in capsys.readouterr().out
    plan = tiny_plan(configuration="2d")
    files = [str(file) for file in sorted((in_workspace.raw / "imagesUn").glob("pool_0_*"))]
    expected, _, _ = plan.configuration.preprocessor_class(verbose=False).run_case(
        files, None, plan.plans, plan.configuration, plan.dataset_json
    )
    assert np.array_equal(blosc2.open(str(plan.unlabelled_folder / "pool_0.b2nd"))[:], expected)


def test_slices_of_a_2d_configuration_that_grow_too_large_are_found(in_workspace):
    add_2d(in_workspace)
    plan = tiny_plan(configuration="2d")
    assert resampled_problem(plan, (9, 512, 512), (1e-3, 0.8, 1.1)) is None
    assert "at the spacing of the plans it" in (resampled_problem(plan, (9, 512, 512), (1.0, 800.0, 1100.0)) or "")


def test_bad_images_are_named_and_the_others_done_then_the_rest_on_a_second_call(in_workspace, capsys):
    pool = in_workspace.raw / "imagesUn"
    channels, _ = blob(30)
    write_case(pool, "one_channel", channels[:1])
    write_case(pool, "three_channels", [*channels, channels[0]])
    holes = [np.where(np.indices(SHAPE)[0] == 3, np.nan, channel).astype(np.float32) for channel in channels]
    write_case(pool, "holes", holes)
    write_case(pool, "sizes", [channels[0], channels[1][:-1]])
    for number in range(2):
        (pool / f"rubbish_{number:04d}.nii.gz").write_bytes(b"not an image")
    write_case(pool, "checksum", [np.random.default_rng(0).random((40, 50, 60))] * 2)
    content = (damaged := pool / "checksum_0001.nii.gz").read_bytes()
    damaged.write_bytes(content[:-8] + bytes(4) + content[-4:])

    with pytest.raises(SystemExit) as stop:
        preprocess_command.main("-d 901 -np 1".split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "3 of 9 unlabelled cases" in out
    lines = {line.split()[2]: line for line in err.splitlines() if line.startswith("Not preprocessed")}
    assert "channels 0000, but" in lines["one_channel"]
    assert "channels 0000, 0001, 0002" in lines["three_channels"]
    assert "NaN" in lines["holes"]
    assert set(lines) == {"one_channel", "three_channels", "holes", "sizes", "rubbish", "checksum"}
    assert "checksum_0001.nii.gz is cut off or damaged, copy it again" in lines["checksum"]
    assert "differ in size" in lines["sizes"]
    assert "cannot be preprocessed: " in lines["rubbish"]

    for number in range(2):
        (pool / f"rubbish_{number:04d}.nii.gz").unlink()
    for case in ("one_channel", "three_channels", "holes", "sizes", "checksum"):
        for file in pool.glob(f"{case}_*"):
            file.unlink()
    write_case(pool, "repaired", channels)
    preprocess_command.main("-d 901 -np 1".split())
    assert "4 of 4 unlabelled cases are in" in (text := capsys.readouterr().out)
    assert "(1 were to do)" in text


def preprocess_or_die(dataset, plans_name, configuration, raw_case):
    if raw_case[0] == "pool_0":
        os._exit(1)  # as when memory is out
    return _preprocess_case(dataset, plans_name, configuration, raw_case)


def test_a_case_whose_process_is_killed_is_named_and_the_others_are_done(in_workspace, monkeypatch, capsys):
    for file in (in_workspace.raw / "imagesUn").glob("pool_2_*"):
        file.unlink()
    monkeypatch.setattr("nnunet_vit_mae.nnunet.preprocessing._preprocess_case", preprocess_or_die)
    with pytest.raises(SystemExit) as stop:
        preprocess_command.main("-d 901 -np 2".split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "1 of 2 unlabelled cases are in" in out
    assert "Not preprocessed: pool_0 was being preprocessed when its process was killed" in err
    assert [file.name for file in tiny_plan().unlabelled_folder.glob("*.b2nd")] == ["pool_1.b2nd"]


def test_a_second_job_is_refused_and_leaves_the_files_of_the_first(in_workspace, refused):
    folder = tiny_plan().unlabelled_folder
    folder.mkdir()
    unfinished = folder / ".123_0123abcd.pool_0.b2nd"
    unfinished.write_bytes(b"half")
    with locked(folder):
        message = refused(preprocess_command.main, *"-d 901 -np 1".split())
        assert f"Another process is writing to {folder}: wait until it has finished" in message
        assert unfinished.exists()
    preprocess_command.main("-d 901 -np 1".split())
    assert not unfinished.exists()


def test_a_job_keeps_others_out_until_its_last_case(in_workspace, monkeypatch):
    seen = []

    def preprocess(*arguments):
        with pytest.raises(UserError, match="Another process is writing to"), locked(tiny_plan().unlabelled_folder):
            pytest.fail("two at a time")
        seen.append(arguments[-1][0])
        return _preprocess_case(*arguments)

    monkeypatch.setattr("nnunet_vit_mae.nnunet.preprocessing._preprocess_case", preprocess)
    preprocess_command.main("-d 901 -np 1".split())
    assert sorted(seen) == ["pool_0", "pool_1", "pool_2"]


def test_a_change_of_plans_makes_the_pool_anew(in_workspace, capsys):
    preprocess_command.main("-d 901 -np 1".split())
    file = in_workspace.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    file.write_text(json.dumps(plans))
    preprocess_command.main("-d 901 -np 1".split())
    assert "(3 were to do)" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", [nnUNetTrainerBaseline, nnUNetTrainerViTScratch])
def test_images_that_were_preprocessed_for_another_spacing_are_refused(in_workspace, refused, capsys, trainer):
    """nnU-Net plans a dataset anew when cases are added, and plans of ours are as the dataset was before."""
    plan_command.main("-d 901 -o Older --size XS --token 2 4 8 --epochs 1".split())
    file = in_workspace.preprocessed / "Older.json"
    plans = json.loads(file.read_text())
    description = json.loads((in_workspace.preprocessed / "dataset.json").read_text())
    trainer(plans | {"continue_training": False}, "3d_fullres", 0, description, torch.device("cpu"))
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    file.write_text(json.dumps(plans))
    capsys.readouterr()
    message = refused(pretrain_command.main, *"-d 901 -p Older -device cpu --epochs 1 --batch_size 2".split())
    assert "train_0 has " in message
    assert "at the spacing of the plans Older. The dataset was planned and preprocessed anew" in message
    with pytest.raises(SystemExit):
        trainer(plans | {"continue_training": False}, "3d_fullres", 0, description, torch.device("cpu"))
    assert message == capsys.readouterr().err
    for kind in ("data", "seg", "probabilities"):  # as nnU-Net's planners without resampling write
        plans["configurations"]["3d_fullres"][f"resampling_fn_{kind}"] = "no_resampling_hack"
    trainer(plans | {"continue_training": False}, "3d_fullres", 0, description, torch.device("cpu"))


def test_without_unlabelled_images_the_reader_is_told_where_to_put_them(in_workspace, refused):
    for file in (in_workspace.raw / "imagesUn").iterdir():
        file.unlink()
    assert "imagesUn" in refused(preprocess_command.main, "-d", "901")


def test_pretraining_sees_a_folds_training_cases_and_the_pool_but_never_test_images(in_workspace):
    preprocess_command.main("-d 901 -np 1".split())
    plan = tiny_plan()
    everything = {case.name for case in pretraining_cases(plan, "all")}
    assert everything == {f"train_{i}" for i in range(6)} | {f"pool_{i}" for i in range(3)}
    for fold in range(5):
        names = {case.name for case in pretraining_cases(plan, str(fold))}
        splits = json.loads((in_workspace.preprocessed / "splits_final.json").read_text())
        assert names == set(splits[fold]["train"]) | {f"pool_{i}" for i in range(3)}
        assert not names & set(splits[fold]["val"])
    with pytest.raises(UserError, match="-f 5"):
        pretraining_cases(plan, "5")


@pytest.mark.parametrize("content", ["{}", "[]", '[{"train": ["a"]}]', '[{"train": ["a"], "val": [1]}]'])
def test_a_file_of_splits_that_is_none_is_refused(in_workspace, content):
    (in_workspace.preprocessed / "splits_final.json").write_text(content)
    with pytest.raises(UserError, match=r"splits_final\.json cannot be used"):
        split_of(tiny_plan(), "0", [])


def test_an_unlabelled_pool_that_was_forgotten_is_mentioned(in_workspace, caplog):
    assert len(pretraining_cases(tiny_plan(), "all")) == 6
    assert "3 unlabelled images" in caplog.text
    assert "run mae3d_preprocess -d 901 -c 3d_fullres -p nnUNetPlans first" in caplog.text


def test_plans_that_were_copied_from_another_dataset_are_refused(in_workspace):
    """nnU-Net takes the dataset to train on from the plans."""
    plans = json.loads((in_workspace.preprocessed / "nnUNetPlans.json").read_text()) | {
        "dataset_name": "Dataset902_New"
    }
    (in_workspace.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    with pytest.raises(UserError, match="would train on that dataset and not on Dataset901_Tiny"):
        tiny_plan()


def test_advice_to_preprocess_names_configuration_and_plans(in_workspace):
    add_2d(in_workspace)
    plans = json.loads((in_workspace.preprocessed / "nnUNetPlans.json").read_text()) | {"plans_name": "Mine"}
    (in_workspace.preprocessed / "Mine.json").write_text(json.dumps(plans))
    plan = tiny_plan("Mine", "2d")
    shutil.rmtree(in_workspace.preprocessed / "gt_segmentations")
    for read in (labelled_cases, reference_segmentations):
        with pytest.raises(UserError, match="run nnUNetv2_preprocess -d 901 -c 2d -plans_name Mine"):
            read(plan)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("-d 901", "-device cpu"),
        ("-d 901 -device cpu -f 9", "-f 9"),
        ("-d 901 -device cpu -f 00", "-f 00"),
        ("-d 901 -device cpu --seed -1", "is not from 0 to"),
        ("-d 901 -device cpu --mask_ratio 1.5", "mask_ratio"),
    ],
)
def test_mistakes_in_pretraining_get_one_sentence(in_workspace, refused, monkeypatch, arguments, reason):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert reason in refused(pretrain_command.main, *arguments.split())
    assert not in_workspace.results.exists()


def test_a_partial_block_keeps_the_defaults_of_its_patch(in_workspace):
    file = in_workspace.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    defaults = tiny_plan().settings
    plans["configurations"]["3d_fullres"]["vit_mae"] = {"finetuning": {"epochs": 5}}
    file.write_text(json.dumps(plans))
    assert tiny_plan().settings.network == defaults.network
    assert tiny_plan().settings.finetuning.batch_size == defaults.finetuning.batch_size
    plans["configurations"]["3d_fullres"]["vit_mae"] = {"network": {"adaptive": True}}
    file.write_text(json.dumps(plans))
    assert tiny_plan().settings.network.decoder == "unetr"


def test_the_baseline_takes_a_2d_configuration_too(in_workspace):
    plan = tiny_plan()
    flat = ConfigurationManager(plan.configuration.configuration | {"patch_size": [18, 22], "spacing": [1.0, 1.0]})
    assert schedule_of(flat).epochs == 1000
    with pytest.raises(UserError, match="2D"):
        settings_of(flat)


def test_the_pool_is_what_imagesun_holds_and_whole_files_only(in_workspace, caplog):
    preprocess_command.main("-d 901 -np 1".split())
    plan = tiny_plan()
    (plan.unlabelled_folder / ".123_0123abcd.pool_0.b2nd").write_bytes(b"half")  # a process was killed while it wrote
    for file in (in_workspace.raw / "imagesUn").glob("pool_1_*"):  # a consent was withdrawn
        file.unlink()
    assert {case.name for case in pretraining_cases(plan, "all")} == {f"train_{i}" for i in range(6)} | {
        "pool_0",
        "pool_2",
    }
    shutil.rmtree(in_workspace.raw)  # a compute node without the raw data
    assert {case.name for case in pretraining_cases(plan, "all")} == {f"train_{i}" for i in range(6)} | {
        f"pool_{i}" for i in range(3)
    }
    assert not caplog.text


def test_images_that_took_the_place_of_others_are_preprocessed_anew_whatever_their_date(in_workspace, caplog, capsys):
    preprocess_command.main("-d 901 -np 1".split())
    plan, images = tiny_plan(), in_workspace.raw / "imagesUn"
    other, pool = sorted(images.glob("pool_0_*")), sorted(images.glob("pool_1_*"))
    for image, file in zip(other, pool, strict=True):
        shutil.copy(image, file)
        os.utime(file, (0, 0))  # as rsync -a and backups do
    for file in other:
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1000))  # a copy with a date of its own, or a rounded one
    assert "pool_1" not in {case.name for case in pretraining_cases(plan, "all")}
    assert "1 unlabelled images" in caplog.text
    capsys.readouterr()
    preprocess_command.main("-d 901 -np 1".split())
    assert "3 of 3 unlabelled cases" in (told := capsys.readouterr().out)
    assert "(1 were to do)" in told
    voxels = [blosc2.open(str(plan.unlabelled_folder / f"pool_{number}.b2nd"))[:] for number in (0, 1)]
    assert np.array_equal(*voxels)
    (plan.unlabelled_folder / ".images" / "pool_0.json").unlink()  # of an earlier version
    preprocess_command.main("-d 901 -np 1".split())
    assert "(0 were to do)" in capsys.readouterr().out


def test_a_pool_of_other_plans_is_refused(in_workspace):
    preprocess_command.main("-d 901 -np 1".split())
    file = in_workspace.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["NoNormalization"] * 2
    file.write_text(json.dumps(plans))
    with pytest.raises(UserError, match="mae3d_preprocess -d 901"):
        pretraining_cases(tiny_plan(), "all")


def test_too_few_cases_for_folds_are_refused(in_workspace):
    plan = tiny_plan()
    for number in range(2):
        for file in plan.preprocessed_folder.glob(f"train_{number}*"):
            file.unlink()
    with pytest.raises(UserError, match="4 labelled cases cannot be split"):
        pretraining_cases(plan, "0")
    assert not (in_workspace.preprocessed / "splits_final.json").exists()


@pytest.mark.parametrize("trainer", [nnUNetTrainerBaseline, nnUNetTrainerViTScratch])
def test_trainers_refuse_a_fold_that_nnunet_would_not_make_before_any_split(in_workspace, capsys, trainer):
    plans = json.loads((in_workspace.preprocessed / "nnUNetPlans.json").read_text())
    description = json.loads((in_workspace.preprocessed / "dataset.json").read_text())

    def refusal(fold):
        with pytest.raises(SystemExit):
            trainer(plans | {"continue_training": False}, "3d_fullres", fold, description, torch.device("cpu"))
        return capsys.readouterr().err

    assert "-f 5 is neither 'all' nor one of the 5 folds" in refusal(5)
    for file in tiny_plan().preprocessed_folder.glob("train_[01]*"):
        file.unlink()
    assert "4 labelled cases cannot be split" in refusal(0)
    assert not (in_workspace.preprocessed / "splits_final.json").exists()


def test_the_second_stage_of_a_cascade_is_refused(in_workspace, refused):
    file = in_workspace.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file.write_text(json.dumps(plans))
    assert "cascade" in refused(pretrain_command.main, *"-d 901 -c 3d_cascade_fullres -device cpu".split())
