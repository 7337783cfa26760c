"""What `mae3d_doctor` finds: in installations, on machines and in datasets that are fit for the work or not."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import blob, write_case
from test_weights import make_card

from nnunet_vit_mae.cli import doctor as doctor_command
from nnunet_vit_mae.doctor import installation, machine
from nnunet_vit_mae.doctor.diagnosis import ERROR, OK, WARNING
from nnunet_vit_mae.installation import trainers_folder
from nnunet_vit_mae.networks.build import build_segmenter
from nnunet_vit_mae.nnunet.capacity import memory_of
from nnunet_vit_mae.nnunet.diagnoses import diagnose_dataset, diagnose_trainers, diagnose_variables
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.plans import load_plan
from nnunet_vit_mae.processes import memory
from nnunet_vit_mae.settings import Network
from nnunet_vit_mae.storage.files import set_aside
from nnunet_vit_mae.storage.layout import encoder_file
from nnunet_vit_mae.weights import save_encoder


def levels(diagnoses):
    return {(diagnosis.topic, diagnosis.level) for diagnosis in diagnoses}


def test_requirements_that_are_not_met_are_errors(monkeypatch):
    needed = ["numpy>=1000", "no-such-package>=1", "scipy", 'absent-extra; extra == "study"']
    monkeypatch.setattr(installation.metadata, "requires", lambda name: needed)
    first, *unmet = installation.diagnose_packages()
    assert first.level == OK
    assert "torch 2" in first.text
    assert [(diagnosis.level, diagnosis.advice) for diagnosis in unmet] == [
        (ERROR, 'pip install "numpy>=1000"'),
        (ERROR, 'pip install "no-such-package>=1"'),
    ]


def test_this_installation_is_complete():
    assert levels(installation.diagnose_packages()) == {("versions", OK)}
    assert not list(installation.diagnose_imports())


def test_a_package_that_does_not_load_is_an_error(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\nlong explanation")

    monkeypatch.setattr(installation, "import_module", broken)
    (diagnosis,) = installation.diagnose_imports()
    assert diagnosis.level == ERROR
    assert diagnosis.text == "torch cannot be imported (operator torchvision::nms does not exist)."


def test_a_gpu_that_torch_counts_but_was_not_built_for_is_an_error(monkeypatch):
    ones, cards = torch.ones, [SimpleNamespace(name="V100", major=7, minor=0, total_memory=16e9)]
    cards.append(SimpleNamespace(name="H100", major=9, minor=0, total_memory=80e9))

    def made(size, *, device):
        if device == "cuda:0":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nlong advice")
        return ones(size)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    monkeypatch.setattr(torch, "ones", made)
    old, new = machine.diagnose_gpu({})
    assert (old.level, new.level) == (ERROR, OK)
    reason = "CUDA error: no kernel image is available for execution on the device"
    assert old.text.endswith(f"no bf16: training runs in fp32. This torch cannot compute on it ({reason}).")
    assert old.advice == "End other programs on it, or install a torch for generation 7.0 of cards."
    assert new.text.endswith(", bf16.")


def test_a_driver_without_a_card_is_no_gpu(monkeypatch, tmp_path):
    """As on login nodes; and a card that the user hides needs no other driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    program, devices = tmp_path / "nvidia-smi", tmp_path / "dev"
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    has_card = machine._has_card
    monkeypatch.setattr(machine, "_has_card", lambda: has_card(devices))
    for text, level in (("exit 9", WARNING), ("echo No devices found", WARNING), ("echo GPU 0: H100", ERROR)):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        (found,) = machine.diagnose_gpu({})
        assert found.level == level, text
        assert found.text.startswith("torch finds no GPU" if level == WARNING else "There is a GPU")
    devices.mkdir()
    (devices / "nvidia0").touch()
    program.write_text("#!/bin/sh\nexit 9\n")
    (hidden,) = machine.diagnose_gpu({"CUDA_VISIBLE_DEVICES": ""})
    assert (hidden.level, hidden.advice) == (WARNING, "To use it: unset CUDA_VISIBLE_DEVICES")
    (wrong,) = machine.diagnose_gpu({"CUDA_VISIBLE_DEVICES": "7"})
    assert wrong.level == ERROR
    assert wrong.advice.endswith("or correct CUDA_VISIBLE_DEVICES, which is '7'.")


@pytest.mark.parametrize("missing", ["triton", "gcc", "Python.h", None])
def test_what_torch_needs_to_compile_is_looked_for(monkeypatch, tmp_path, missing):
    """nnU-Net compiles on a GPU unless told otherwise, and a training ends there if something is missing."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(installation, "find_spec", lambda name: None if name == missing else "found")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" != missing else None)
    monkeypatch.setattr(installation.sysconfig, "get_path", lambda *_: str(tmp_path))
    if missing != "Python.h":
        (tmp_path / "Python.h").touch()
    (found,) = installation.diagnose_compiler({})
    assert found.level == (WARNING if missing else OK)
    if missing:
        assert missing in found.text.lower() + found.text
        assert found.advice.endswith("export nnUNet_compile=f")
    (off,) = installation.diagnose_compiler({"nnUNet_compile": "f"})
    assert off.level == OK
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not list(installation.diagnose_compiler({}))


@pytest.mark.parametrize(("value", "level"), [("1", None), ("many", ERROR), ("-1", ERROR), ("500", WARNING)])
@pytest.mark.parametrize("variable", ["nnUNet_n_proc_DA", "nnUNet_def_n_proc"])
def test_more_workers_than_cores_are_advised_against(monkeypatch, variable, value, level):
    monkeypatch.setattr(machine.joblib, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 64)
    few = dict.fromkeys(machine.DEFAULT_WORKERS, "1")
    known, *found = machine.diagnose_workers(few | {variable: value})
    assert known.level == OK
    assert [diagnosis.level for diagnosis in found] == ([level] if level else [])
    assert all(diagnosis.advice.startswith(f"export {variable}=") for diagnosis in found)


@pytest.mark.parametrize(("text", "bytes_"), [("4096\n", 4096), ("max\n", None)])
def test_the_limit_of_a_container_counts(monkeypatch, tmp_path, text, bytes_):
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "memory.max", tmp_path / "missing"))
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.memory_size() == memory_of(torch.device("cpu")) == (bytes_ or whole)


def test_nnunet_starts_more_workers_than_a_small_machine_has_cores_unless_told(monkeypatch):
    monkeypatch.setattr(machine.joblib, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    _, validation = machine.diagnose_workers({})
    assert validation.text == "nnU-Net's preprocessing and validation would start 8 processes."


def test_little_room_is_advised_against(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**16, 0, 2**16))
    (shared,) = machine.diagnose_shared_memory(tmp_path)
    assert (shared.level, shared.text) == (WARNING, "64 KiB of shared memory is free.")
    assert machine.diagnose_disk("nnUNet_raw", tmp_path).level == WARNING


def test_variables_and_trainers(in_workspace, monkeypatch, tmp_path):
    assert levels(diagnose_variables()) >= {("variables", OK)}
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join((str(tmp_path), str(trainers_folder()))))
    assert levels(diagnose_trainers()) == {("trainers", OK)}
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "gone"))
    gone, missing = diagnose_trainers()
    assert (gone.level, missing.level) == (WARNING, ERROR)
    assert missing.advice == f'export nnUNet_extTrainer="$(mae3d_trainers){os.pathsep}$nnUNet_extTrainer"'
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nowhere"))
    monkeypatch.delenv("nnUNet_raw")
    found = [(diagnosis.text.split()[0], diagnosis.level) for diagnosis in diagnose_variables() if diagnosis.advice]
    assert found == [("nnUNet_raw", ERROR), ("nnUNet_results", WARNING)]


def test_a_dataset(in_workspace):
    dataset = find_dataset("901")
    before = {diagnosis.topic: diagnosis for diagnosis in diagnose_dataset("901", "nnUNetPlans", "3d_fullres")}
    assert before["dataset"].text == "Dataset901_Tiny: T1, FLAIR; 1 label."
    assert before["encoder"].level == WARNING
    assert before["encoder"].advice == "mae3d_pretrain -d 901 -c 3d_fullres -p nnUNetPlans"

    write_case(dataset.raw / "imagesUn", "new", blob(9)[0])
    plan = load_plan(dataset, "nnUNetPlans", "3d_fullres")
    shutil.copy(next(plan.dataset.references.glob("*.nii.gz")), plan.dataset.references / "unprocessed.nii.gz")
    file = encoder_file(dataset.results, "nnUNetPlans", "3d_fullres", "all")
    network = build_segmenter(Network(size="XS", token=(4, 8, 8)), 2, 2, drop_path=0.0)
    save_encoder(network.encoder, make_card(token=[4, 8, 8]), file)
    found = list(diagnose_dataset("901", "nnUNetPlans", "3d_fullres"))
    assert levels(found) >= {("images", ERROR), ("images", WARNING), ("encoder", ERROR)}
    assert [diagnosis.advice for diagnosis in found if diagnosis.topic == "images" and diagnosis.advice] == [
        "nnUNetv2_preprocess -d 901 -c 3d_fullres -plans_name nnUNetPlans",  # with the plans, as others may be meant
        "mae3d_preprocess -d 901 -c 3d_fullres -p nnUNetPlans",
    ]
    encoder = next(diagnosis for diagnosis in found if diagnosis.topic == "encoder")
    assert "size XS there" in encoder.text
    assert encoder.advice.startswith("mae3d_pretrain -d 901 -c 3d_fullres -p nnUNetPlans, or mae3d_plan --encoder")
    set_aside(file.parent)  # as another pre-training does
    after = {diagnosis.topic: diagnosis.text for diagnosis in diagnose_dataset("901", "nnUNetPlans", "3d_fullres")}
    assert after["encoder"] == "There is no encoder for nnUNetPlans yet."
    (unknown,) = diagnose_dataset("902", "nnUNetPlans", "3d_fullres")
    assert unknown.level == ERROR


def test_the_command(in_workspace, capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    doctor_command.main([])
    assert capsys.readouterr().out.endswith("No errors.\n")
    with pytest.raises(SystemExit):
        doctor_command.main(["-d", "902"])
    assert capsys.readouterr().out.endswith("\n1 error.\n")
    with pytest.raises(SystemExit) as stop:
        doctor_command.main(["-d", "902", "--json"])
    assert stop.value.code == 2
    assert {entry["topic"] for entry in json.loads(capsys.readouterr().out)} >= {"versions", "workers", "dataset"}
