"""Models that move between sites: what is in an archive, what is refused, and that nnU-Net predicts the same."""

import hashlib
import json
import os
import shutil
import stat
import struct
import zipfile

import numpy as np
import pytest
import torch
from conftest import Poison, Workspace
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from safetensors.torch import load, save

from nnunet_vit_mae.cli import export_model, import_model
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.nnunet import importing, predicted_cases, training_range
from nnunet_vit_mae.nnunet.calibrated import write_calibrated
from nnunet_vit_mae.nnunet.folders import Dataset
from nnunet_vit_mae.nnunet.models import find_model, model_hash
from nnunet_vit_mae.nnunet.plans import load_plan
from nnunet_vit_mae.nnunet.quantification import thresholds_of
from nnunet_vit_mae.nnunet.shared_models import DatasetName, read_weights, weights_content
from nnunet_vit_mae.nnunet.trainers import OUR_TRAINERS
from nnunet_vit_mae.nnunet.untrained import expected_tensors
from nnunet_vit_mae.storage.archives import FORMAT
from nnunet_vit_mae.storage.entries import entries_as
from nnunet_vit_mae.storage.files import file_hash

PLAN = "mae3d_plan -d 901 -o Tiny --recipe quick --token 4 --epochs 1 --iterations 1 --batch_size 2"
TRAINERS = ("nnUNetTrainerViTScratch", "nnUNetTrainerBaseline")
SECRET = "/home/somebody/patients"


def model_folder(results, trainer):
    return results / "Dataset901_Tiny" / f"{trainer}__Tiny__3d_fullres"


def pretend_to_train(workspace, trainer, folds=("0", "all")):
    """Leave what `nnUNetv2_train` leaves, with random weights."""
    folder = model_folder(workspace.root / "results", trainer)
    folder.mkdir(parents=True)
    plans = json.loads((workspace.preprocessed / "Tiny.json").read_text())
    plans["configurations"]["3d_fullres"]["vit_mae"]["encoder"] = {
        "file": f"{SECRET}/encoder.safetensors",
        "sha256": "0" * 64,
    }
    description = json.loads((workspace.preprocessed / "dataset.json").read_text())
    description["training"] = [{"image": f"{SECRET}/Mueller.nii.gz"}]
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(description))
    shutil.copy(workspace.preprocessed / "dataset_fingerprint.json", folder)
    manager = PlansManager(plans)
    for seed, fold in enumerate(folds):
        torch.manual_seed(seed)
        network = OUR_TRAINERS[trainer].build_network_architecture(
            manager, manager.get_configuration("3d_fullres"), 2, 2, enable_deep_supervision=False
        )
        weights = network.state_dict()
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {
            "network_weights": weights,
            "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.1}]},
            "grad_scaler_state": None,
            "logging": {"train_losses": [np.float64(0.5)], "dice_per_class_or_region": [[np.float32(0.1)]]},
            "_best_ema": np.float64(0.5),
            "current_epoch": 1,
            "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": fold, "dataset_json": description}
            | {"device": torch.device("cpu")},
            "trainer_name": trainer,
            "inference_allowed_mirroring_axes": (0, 1, 2),
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


@pytest.fixture(scope="module")
def site(planned, tmp_path_factory):
    """The site that trained both models."""
    workspace = planned.copied_to(tmp_path_factory.mktemp("site"))
    workspace.call(*PLAN.split())
    for trainer in TRAINERS:
        pretend_to_train(workspace, trainer)
    return workspace


@pytest.fixture(scope="module")
def archives(site, tmp_path_factory):
    """Both models in archives."""
    folder = tmp_path_factory.mktemp("archives")
    for trainer in TRAINERS:
        site.call(*f"mae3d_export -d 901 -p Tiny -tr {trainer} -f 0 all -o {folder / trainer}.zip".split())
    return {trainer: folder / f"{trainer}.zip" for trainer in TRAINERS}


@pytest.fixture(scope="module")
def archive(archives):
    return archives[TRAINERS[0]]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Another site, which has no dataset at all."""
    workspace = Workspace(tmp_path_factory.mktemp("elsewhere"))
    for name in ("raw", "preprocessed", "results"):
        (workspace.root / name).mkdir()
    return workspace


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return tmp_path / "results"


def logits_of(folder, environment):
    """Logits of nnU-Net's own predictor, for each fold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", environment["nnUNet_extTrainer"])
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
        predictor.initialize_from_trained_model_folder(str(folder), use_folds=(0, "all"))
    patch = predictor.configuration_manager.patch_size
    volume = torch.randn(1, 2, *patch, generator=torch.Generator().manual_seed(0))
    logits = []
    for parameters in predictor.list_of_parameters:
        predictor.network.load_state_dict(parameters)
        with torch.no_grad():
            logits.append(predictor.network.eval()(volume))
    return logits, predictor.allowed_mirroring_axes, predictor.trainer_name


@pytest.mark.parametrize("trainer", TRAINERS)
def test_nnunet_predicts_the_same_elsewhere(trainer, site, archives, elsewhere):
    archive = archives[trainer]
    printed = elsewhere.call("mae3d_import", str(archive)).stdout
    folder = model_folder(elsewhere.root / "results", trainer)
    assert f"-p Tiny -tr {trainer} -f 0 all -chk checkpoint_final.pth" in printed
    before = logits_of(model_folder(site.root / "results", trainer), site.environment)
    after = logits_of(folder, elsewhere.environment)
    assert before[1:] == after[1:] == ((0, 1, 2), trainer)
    for one, other in zip(before[0], after[0], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(*after[0])
    assert not [file for file in folder.parent.iterdir() if file.name.startswith(".") and file.is_dir()]
    assert (folder / training_range.CARD).is_file()
    assert "already exists: add --overwrite" in elsewhere.call("mae3d_import", str(archive), code=2).stderr
    (folder / "note.txt").write_text("mine")
    elsewhere.call("mae3d_import", str(archive), "--overwrite")
    (moved,) = folder.parent.glob(f"{folder.name}_until_*")
    assert (moved / "note.txt").read_text() == "mine"
    assert not (folder / "note.txt").exists()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_archive_holds_no_path_no_case_and_no_code(trainer, site, archives):
    archive = archives[trainer]
    content = archive.read_bytes()
    cases = [file.name.removesuffix(".nii.gz") for file in (site.raw / "labelsTr").iterdir()]
    for secret in (SECRET, "Mueller", str(site.root), *cases):
        assert secret.encode() not in content
    assert b"encoder.safetensors" in content
    with zipfile.ZipFile(archive) as opened:
        names = set(opened.namelist())
        assert names == {
            *("manifest.json", "card.json", "plans.json", "dataset.json", "dataset_fingerprint.json"),
            *("training_volumes.json", "fold_0/checkpoint_final.json", "fold_0/checkpoint_final.safetensors"),
            *("fold_all/checkpoint_final.json", "fold_all/checkpoint_final.safetensors"),
        }
        card = json.loads(opened.read("card.json"))
        assert (card["dataset"], card["folds"], card["labels"]) == ("Dataset901_Tiny", ["0", "all"], ["blob"])
        assert (card["licence"], card["channel_names"]) == ("CC0", ["T1", "FLAIR"])
        hashes = json.loads(opened.read("manifest.json"))["sha256"]
        assert hashes == {name: hashlib.sha256(opened.read(name)).hexdigest() for name in names - {"manifest.json"}}


def test_a_number_of_a_dataset_may_have_four_digits():
    assert entries_as(DatasetName, "Dataset1001_Head") == "Dataset1001_Head"
    with pytest.raises(ValueError, match="a name such as Dataset501_Name"):
        entries_as(DatasetName, "Dataset1_Head")


def test_a_second_name_of_a_tensor_takes_no_space():
    tensor = torch.arange(1000.0)
    content, shared = weights_content({"a": tensor, "b": tensor, "c": tensor[:10]})
    assert shared == {"b": "a"}
    assert len(content) < 5000
    read = read_weights(content, shared, "file")
    assert torch.equal(read["b"], tensor)
    assert torch.equal(read["c"], tensor[:10])


def test_calibration_moves_without_names_of_cases(site, results, tmp_path, refused, monkeypatch):
    site.use_here(monkeypatch)
    folder = model_folder(site.root / "results", TRAINERS[0])
    name = write_calibrated(folder / "fold_0" / "checkpoint_final.pth", [0.0, 1.5]).relative_to(folder).as_posix()
    record = {"thresholds": {"blob": 0.25}, "before": {}, "after": {}, "cases": [{"case": "Mueller", "fold": "0"}]}
    record["shifts"] = {"blob": 1.5}
    record["uncertainty"] = {"cases": [{"case": "Mueller", "label": "blob"}]}
    record["checkpoints"] = {name: file_hash(folder / name)}
    made_from = ["fold_0/checkpoint_final.pth", "fold_all/checkpoint_final.pth"]  # the archive lacks the second one
    record["made_from"] = {place: file_hash(folder / place) for place in made_from}
    (folder / "calibration.json").write_text(json.dumps(record))
    flags = f"-d 901 -p Tiny -tr {TRAINERS[0]} -f 0".split()
    for number, more in enumerate(([], ["--case_names"])):
        file = tmp_path / f"{number}.zip"
        export_model.main([*flags, "-o", str(file), *more])
        assert (b"Mueller" in file.read_bytes()) == bool(more)
    assert "already exists: give a new file" in refused(export_model.main, *flags, "-o", str(file))
    for shifts, reason in (({}, "has no shift of blob"), ({"blob": "far"}, "shifts.blob is 'far'")):
        members = members_of(tmp_path / "0.zip")
        edited("calibration.json", lambda content, shifts=shifts: content | {"shifts": shifts})(members)
        write(tmp_path / "bad.zip", members)
        assert reason in refused(import_model.main, str(tmp_path / "bad.zip"), "-o", str(results))
    import_model.main([str(tmp_path / "0.zip"), "-o", str(results)])
    installed = json.loads((model_folder(results, TRAINERS[0]) / "calibration.json").read_text())
    assert installed["thresholds"] == {"blob": 0.25}
    assert installed["cases"] == [{"case": "case_1", "fold": "0"}]
    assert installed["uncertainty"]["cases"] == [{"case": "case_1", "label": "blob"}]
    assert list(installed["checkpoints"]) == [name]
    assert list(installed["made_from"]) == made_from[:1]
    moved = Dataset("Dataset901_Tiny", tmp_path, tmp_path, results / "Dataset901_Tiny")
    assert thresholds_of(find_model(moved, "Tiny", trainer=TRAINERS[0])) == {"blob": 0.25}
    for name in ("calibration.json", "fold_0/checkpoint_calibrated.pth"):
        (folder / name).unlink()


def test_an_import_has_the_hash_of_its_model(site, archive, results):
    import_model.main([str(archive), "-o", str(results)])
    folder = model_folder(results, TRAINERS[0])

    def hash_in(results):
        dataset = Dataset("Dataset901_Tiny", site.raw, site.preprocessed, results / "Dataset901_Tiny")
        return model_hash(find_model(dataset, "Tiny", trainer=TRAINERS[0], folds=["0", "all"]))

    known = hash_in(site.root / "results")
    assert hash_in(results) == known
    plans = json.loads((folder / "plans.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["batch_size"] = 7  # of trainings, not of predictions
    (folder / "plans.json").write_text(json.dumps(plans))
    assert hash_in(results) == known
    configuration["spacing"] = [2, 2, 2]
    (folder / "plans.json").write_text(json.dumps(plans))
    found = [known, hash_in(results)]
    file = folder / "fold_0" / "checkpoint_final.pth"
    for change in ({"inference_allowed_mirroring_axes": (0,)}, {"network_weights": {"a": torch.zeros(2)}}):
        torch.save(torch.load(file, weights_only=True) | change, file)
        found.append(hash_in(results))
    assert len({*found}) == len(found)


def test_a_model_that_is_trained_in_the_place_of_an_imported_one_has_its_own_cases(site, archive, results, refused):
    import_model.main([str(archive), "-o", str(results)])
    here = Dataset("Dataset901_Tiny", site.raw, site.preprocessed, results / "Dataset901_Tiny")
    folder, cases = model_folder(results, TRAINERS[0]), len(list((site.raw / "labelsTr").iterdir()))
    stored = json.dumps({"blob": [1.0] * cases})  # as many as here, but of others
    (folder / "training_volumes.json").write_text(stored)

    def volumes(checkpoint):
        found = find_model(here, "Tiny", trainer=TRAINERS[0], folds=["0"], checkpoint=checkpoint)
        return training_range.read_training_volumes(found)["blob"]

    final = folder / "fold_0" / "checkpoint_final.pth"
    write_calibrated(final, [0.0, 1.5])  # with cases of this site
    assert volumes("checkpoint_final.pth") == volumes("checkpoint_calibrated.pth") == [1.0] * cases
    baseline = object.__new__(OUR_TRAINERS["nnUNetTrainerBaseline"])
    message = refused(lambda _: baseline.load_checkpoint(str(final)))  # --c and --val
    assert "no state of the optimiser, like all that mae3d_import" in message
    torch.save(torch.load(final) | {"current_epoch": 1}, final)  # trained anew
    for checkpoint in ("checkpoint_final.pth", "checkpoint_calibrated.pth"):
        (folder / "training_volumes.json").write_text(stored)
        assert 1.0 not in (found := volumes(checkpoint))
        assert len(found) == cases


def test_an_imported_model_is_calibrated_with_cases_of_its_new_site(site, archive, results, monkeypatch, caplog):
    """There, the cases that it was trained on are not known."""
    import_model.main([str(archive), "-o", str(results)])
    nowhere = results.parent / "nowhere"
    model = find_model(
        Dataset("Dataset901_Tiny", nowhere, nowhere, results / "Dataset901_Tiny"), "Tiny", trainer=TRAINERS[0]
    )
    monkeypatch.setattr(predicted_cases, "predict_cases", lambda *_, **__: None)
    with pytest.raises(UserError, match="at another site: give cases of this one with -i and -l"):
        predicted_cases.validation_cases(model, "cpu")
    images, labels = site.raw / "imagesTs", site.raw / "labelsTs"
    assert predicted_cases.development_cases(model, images, labels, "cpu", allow_training_cases=False)
    assert "are at another site: use none of these patients" in caplog.text


def test_a_model_that_does_not_fit_is_not_exported(site, tmp_path, refused, monkeypatch):
    site.use_here(monkeypatch)
    file = model_folder(site.root / "results", TRAINERS[0]) / "fold_0" / "checkpoint_final.pth"
    whole = file.read_bytes()
    flags = [*f"-d 901 -p Tiny -tr {TRAINERS[0]} -f 0 -o".split(), str(tmp_path / "model.zip")]

    def reason(change):
        checkpoint = torch.load(file, weights_only=False)
        change(checkpoint)
        torch.save(checkpoint, file)
        try:
            message = refused(export_model.main, *flags)
        finally:
            file.write_bytes(whole)
        assert list(tmp_path.iterdir()) == []
        return message

    name = next(iter(torch.load(file, weights_only=False)["network_weights"]))
    assert "has NaN or infinite values in" in reason(lambda c: c["network_weights"][name].fill_(torch.nan))
    assert "does not fit its plans" in reason(lambda c: c["network_weights"].pop(name))
    assert "was trained by Other" in reason(lambda c: c.update(trainer_name="Other"))
    assert "inference_allowed_mirroring_axes" in reason(lambda c: c.update(inference_allowed_mirroring_axes=(7,)))
    assert "checkpoint" in reason(lambda c: c.update(code=Poison(tmp_path / "marker")))
    file.write_bytes(whole[:1000])
    assert f"{file} cannot be read" in refused(export_model.main, *flags)
    file.write_bytes(whole)
    message = refused(export_model.main, *flags, "-chk", "checkpoint_best.pth")
    assert "There is no checkpoint" in message


EARLIER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

class nnUNetTrainerEarlier(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(name, arguments, imported, channels, outputs, enable_deep_supervision=True):
        return get_network_from_plans(
            name, arguments, imported, channels, outputs, deep_supervision=enable_deep_supervision
        )
"""


def test_a_trainer_for_an_earlier_nnunet_has_its_network(site, tmp_path, monkeypatch):
    """nnU-Net still takes those that know nothing of plans."""
    site.use_here(monkeypatch)
    (tmp_path / "earlier.py").write_text(EARLIER)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    plan = load_plan("901", "Tiny")
    found, unet = (expected_tensors(plan, name, "m") for name in ("nnUNetTrainerEarlier", TRAINERS[1]))
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in unet.items()}


# ---------- archives of strangers


def members_of(file):
    with zipfile.ZipFile(file) as opened:
        return {name: opened.read(name) for name in opened.namelist() if name != "manifest.json"}


def write(file, members, manifest=None, **how):
    """Write an archive as we do, but of anything; a member is bytes, or the entry and bytes."""
    plain = {name: content for name, content in members.items() if isinstance(content, bytes)}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in plain.items()}
    content = manifest or {"format": FORMAT, "sha256": hashes}
    with zipfile.ZipFile(file, "w", **how) as opened:
        for name, content_ in members.items():
            opened.writestr(name, content_) if isinstance(content_, bytes) else opened.writestr(*content_)
        opened.writestr("manifest.json", content if isinstance(content, bytes) else json.dumps(content))


def edited(name, change):
    """Change a JSON member; the checksums are right again."""

    def edit(members):
        content = json.loads(members[name])
        result = change(content)
        members[name] = json.dumps(content if result is None else result).encode()

    return edit


def in_architecture(**entries):
    def change(plans):
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        architecture["arch_kwargs"] |= entries.pop("kwargs", {})
        architecture |= entries

    return edited("plans.json", change)


def weights(change):
    name = "fold_0/checkpoint_final.safetensors"

    def edit(members):
        tensors = load(members[name])
        members[name] = save(change(tensors) or tensors)

    return edit


def raw_weights(content):
    return lambda members: members.update({"fold_0/checkpoint_final.safetensors": content})


def header(text, data=b""):
    return struct.pack("<Q", len(text)) + text + data


def fill(value):
    def change(tensors):
        next(iter(tensors.values())).fill_(value)

    return change


def added(name, content=b"x"):
    return lambda members: members.update({name: content})


CONFIGURATION = "3d_fullres"
BAD = {
    "another format": (lambda m: None, "is not in the format"),  # with the manifest below
    "parent": (added("../../evil.json"), "has a member '../../evil.json'"),
    "absolute": (added("/tmp/evil.json"), "has a member '/tmp/evil.json'"),
    "windows": (added("fold_0\\..\\..\\evil.json"), "has a member"),
    "drive": (added("C:/evil.json"), "has a member"),
    "pickle": (added("fold_0/checkpoint_final.pth"), "has a member 'fold_0/checkpoint_final.pth'"),
    "hidden": (added("fold_0/.checkpoint_final.json"), "has a member"),
    "surplus fold": (added("fold_7/checkpoint_final.json", b"{}"), "which card.json does not list"),
    "surplus record": (added("calibration.json", b"{}"), "which card.json does not list"),
    "no card": (lambda m: m.pop("card.json"), "has no card.json"),
    "no plans": (lambda m: m.pop("plans.json"), "has no plans.json"),
    "no fold": (lambda m: m.pop("fold_0/checkpoint_final.safetensors"), "has no fold_0/checkpoint_final.safetensors"),
    "card is a list": (edited("card.json", lambda c: []), "card.json in"),
    "dataset leaves": (edited("card.json", lambda c: c.update(dataset="../../x")), "dataset is"),
    "plans leave": (edited("card.json", lambda c: c.update(plans="../x")), "plans is"),
    "trainer leaves": (edited("card.json", lambda c: c.update(trainer="a/../b")), "trainer is"),
    "folds leave": (edited("card.json", lambda c: c.update(folds=["0/../.."])), "folds[0] is"),
    "checkpoint leaves": (edited("card.json", lambda c: c.update(checkpoints=["../x.pth"])), "checkpoints[0] is"),
    "other trainer": (edited("card.json", lambda c: c.update(trainer="nnUNetTrainerX")), "is not installed here"),
    "no trainer": (edited("card.json", lambda c: c.update(trainer="os")), "is not installed here"),
    "other plans": (edited("card.json", lambda c: c.update(plans="Other")), "but a card of Other"),
    "no configuration": (edited("card.json", lambda c: c.update(configuration="2d_x")), "no configuration 2d_x"),
    "not JSON": (lambda m: m.update({"dataset.json": b"{"}), "dataset.json is not valid JSON"),
    "deep JSON": (lambda m: m.update({"dataset.json": b"[" * 200_000}), "dataset.json is not valid JSON"),
    "NaN in JSON": (lambda m: m.update({"training_volumes.json": b'{"blob": [NaN]}'}), "is not valid JSON"),
    "long number": (lambda m: m.update({"training_volumes.json": b"9" * 9999}), "training_volumes.json"),
    "other labels": (edited("training_volumes.json", lambda c: {"x": [1.0]}), "has other labels than the model"),
    "no spacing": (edited("dataset_fingerprint.json", lambda c: {"spacings": []}), "spacings is []"),
    "command as network": (in_architecture(network_class_name="os.system"), "names 'os.system' as network_class_name"),
    "command as part": (
        in_architecture(kwargs={"norm_op": "os.system"}, _kw_requires_import=["norm_op"]),
        "names 'os.system' as norm_op",
    ),
    "way to a command": (
        in_architecture(network_class_name="dynamic_network_architectures.architectures.unet.np.os.System"),
        "as network_class_name",
    ),
    "preprocessor": (
        edited("plans.json", lambda p: p["configurations"][CONFIGURATION].update(preprocessor_name="subprocess")),
        "names 'subprocess' as preprocessor_name",
    ),
    "huge network": (in_architecture(kwargs={"features_per_stage": [10**9] * 3}), "has 1000000000 as features"),
    "endless network": (in_architecture(kwargs={"n_conv_per_stage": [10**6] * 3}), "as n_conv_per_stage"),
    "data leave": (
        edited("plans.json", lambda p: p["configurations"][CONFIGURATION].update(data_identifier="../..")),
        "data_identifier is '../..'",
    ),
    "NaN": (weights(fill(torch.nan)), "has NaN or infinite values"),
    "infinite": (weights(fill(torch.inf)), "has NaN or infinite values"),
    "renamed": (weights(lambda t: {f"{k}_": v for k, v in t.items()}), "is missing, but"),
    "integers": (weights(lambda t: {k: v.int() for k, v in t.items()}), "is int32"),
    "surplus tensor": (weights(lambda t: {**t, "more": torch.zeros(1)}), "more is float32 [1], but missing"),
    "other shapes": (weights(lambda t: {k: torch.zeros(3) for k in t}), "is float32 [3], but"),
    "no weights": (raw_weights(b""), "is longer than itself"),
    "long header": (raw_weights(struct.pack("<Q", 2**62) + b"{}"), "is longer than itself"),
    "header too long": (raw_weights(header(b" " * (2**24 + 1))), "is longer than itself"),
    "huge shape": (
        raw_weights(
            header(b'{"a": {"dtype": "F32", "shape": [99999999999, 99999], "data_offsets": [0, 4]}}', bytes(4))
        ),
        "is damaged",
    ),
    "pickle as weights": (raw_weights(b"\x80\x04" + b"cposix\nsystem\n" * 9), "is longer than itself"),
    "other fold": (edited("fold_0/checkpoint_final.json", lambda c: c.update(fold="3")), "belongs to another model"),
    "axes": (
        edited("fold_0/checkpoint_final.json", lambda c: c.update(inference_allowed_mirroring_axes=[5])),
        "inference_allowed_mirroring_axes",
    ),
    "shared with none": (
        edited("fold_0/checkpoint_final.json", lambda c: c.update(shared={"x": "none"})),
        "lacks the tensor 'none'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_archives_of_strangers_are_refused_before_anything_is_written(case, archive, results, tmp_path, refused, site):
    members = members_of(archive)
    change, reason = BAD[case]
    change(members)
    file = tmp_path / "bad.zip"
    write(file, members, manifest={"format": "zip 7", "sha256": {}} if case == "another format" else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", site.environment["nnUNet_extTrainer"])
        message = refused(import_model.main, str(file))
    assert reason in message
    assert str(file) in message
    assert not results.exists()


def link(name, target):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry, target


CONTAINERS = {
    "empty": (lambda file, members: file.write_bytes(b""), "not a zip file"),
    "no zip": (lambda file, members: file.write_bytes(b"\x80\x04" * 99), "not a zip file"),
    "cut off": (lambda file, members: file.write_bytes(file.read_bytes()[:-200]), "not a zip file"),
    "folder": (lambda file, members: (file.unlink(), file.mkdir()), "is not a file"),
    "missing": (lambda file, members: file.unlink(), "is missing"),
    "no manifest": (lambda file, members: zipfile.ZipFile(file, "w").close(), "has no manifest.json"),
    "manifest is a list": (lambda file, members: write(file, members, manifest=b"[]"), "is not in the format"),
    "compressed": (lambda file, members: write(file, members, compression=zipfile.ZIP_DEFLATED), "that is compressed"),
    "link": (lambda file, members: write(file, {**members, "l": link("plans.json", "/etc/passwd")}), "twice"),
    "link alone": (
        lambda file, members: write(file, {**without(members), "l": link("plans.json", "/etc/passwd")}),
        "a link or no file",
    ),
    "many": (lambda file, members: write(file, {f"fold_{i}/x": b"" for i in range(1001)}), "has 1002 members"),
    "wrong checksum": (
        lambda file, members: write(file, members, manifest={"format": FORMAT, "sha256": dict.fromkeys(members, "0")}),
        "does not have its checksum",
    ),
    "not in the list": (
        lambda file, members: write(file, members, manifest={"format": FORMAT, "sha256": {}}),
        "its members are not those in manifest.json",
    ),
    "flipped bit": (lambda file, members: file.write_bytes(flipped(file.read_bytes())), "is damaged"),
}


def without(members):
    return {name: content for name, content in members.items() if name != "plans.json"}


def flipped(content):
    place = content.index(b"3d_fullres")
    return content[:place] + b"4" + content[place + 1 :]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", CONTAINERS)
def test_files_that_are_no_such_archive_are_refused(case, archive, results, tmp_path, refused):
    file = tmp_path / "bad.zip"
    shutil.copy(archive, file)
    change, reason = CONTAINERS[case]
    change(file, members_of(archive))
    assert reason in refused(import_model.main, str(file))
    assert not results.exists()


def test_members_that_share_their_bytes_are_refused(results, tmp_path, refused):
    """A small file whose members together are as large as the disk: their entries point to the same bytes."""
    file = tmp_path / "bad.zip"
    write(file, {"fold_0/checkpoint_a.json": b" " * 10_000})
    content = file.read_bytes()
    start = content.index(b"PK\x01\x02")
    length = content.index(b"PK\x01\x02", start + 4) - start
    entry = content[start : start + length]
    more = b"".join(entry.replace(b"checkpoint_a", b"checkpoint_" + bytes([98 + i])) for i in range(9))
    end = bytearray(content[content.index(b"PK\x05\x06") :])
    for place, by in ((8, 9), (10, 9)):
        end[place : place + 2] = struct.pack("<H", struct.unpack("<H", end[place : place + 2])[0] + by)
    end[12:16] = struct.pack("<I", struct.unpack("<I", end[12:16])[0] + len(more))
    file.write_bytes(content[: content.index(b"PK\x05\x06")] + more + bytes(end))
    assert "has members that are larger than itself" in refused(import_model.main, str(file))
    assert not results.exists()


def test_an_import_that_fails_leaves_the_earlier_model(archive, results, refused, monkeypatch):
    import_model.main([str(archive)])
    (folder,) = [path for path in (results / "Dataset901_Tiny").iterdir() if path.is_dir()]
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device", "weights")

    monkeypatch.setattr(importing.torch, "save", full)
    refused(import_model.main, str(archive), "--overwrite")
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_a_dataset_of_the_same_number_is_named(archive, results, capsys):
    (results / "Dataset901_Other").mkdir(parents=True)
    import_model.main([str(archive)])
    assert "Dataset901_Other has the same number: from now on, name either dataset in full" in capsys.readouterr().out


def test_nnunets_variable_names_the_folder(archive, refused, monkeypatch):
    monkeypatch.delenv("nnUNet_results", raising=False)
    assert "nnUNet_results is not set" in refused(import_model.main, str(archive))
    assert "nnUNet_results" not in os.environ
