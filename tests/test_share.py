"""`mae3d_share` and `hf:` addresses, against a hub on this machine."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from hub_server import HubServer, running_hub
from test_weights import CASES, make_card

from nnunet_vit_mae import UserError, load_encoder
from nnunet_vit_mae.cli import plan, share
from nnunet_vit_mae.hub import WEIGHTS, download, local_file
from nnunet_vit_mae.networks.build import build_encoder
from nnunet_vit_mae.nnunet.scheduled import ScheduledTrainer
from nnunet_vit_mae.nnunet.trainers import _unchanged, nnUNetTrainerViTMAE
from nnunet_vit_mae.settings import EncoderFile
from nnunet_vit_mae.sharing.model_folder import write_model_folder
from nnunet_vit_mae.storage.files import file_hash
from nnunet_vit_mae.weights import encoder_content, hashed_name, read_encoder, save_encoder

REPOSITORY = "lab/vessel"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, an empty cache, and a token that may write."""
    with running_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server


@pytest.fixture
def offline(monkeypatch):
    """Call it to have no network from then on."""
    return lambda: monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write_encoder(file: Path, **changes) -> Path:
    card = make_card(channel_names=["T1", "FLAIR"], normalization=["ZScoreNormalization"] * 2, **changes)
    save_encoder(build_encoder(card.settings, 2), card, file)
    file.with_name("progress.png").write_bytes(b"a curve")
    return file


@pytest.fixture
def encoder(tmp_path):
    return write_encoder(tmp_path / "run" / "encoder.safetensors")


@pytest.fixture
def uploaded(hub, encoder):
    """An encoder on the hub; gives its commit."""
    return hub.commit(REPOSITORY, {WEIGHTS: encoder.read_bytes()})


@pytest.fixture
def in_study(in_workspace):
    """The dataset 901 with an encoder of `mae3d_pretrain`."""
    folder = in_workspace.results / "mae3d_pretrain__nnUNetPlans__3d_fullres" / "fold_all"
    write_encoder(folder / "encoder.safetensors", dataset="Dataset901_Tiny")
    return in_workspace


# ---------- the folder


def test_the_folder_has_the_weights_and_says_what_they_are(encoder, tmp_path):
    names = write_model_folder(encoder, tmp_path / "shared", licence="cc-by-4.0")
    assert sorted(names) == sorted(file.name for file in (tmp_path / "shared").iterdir())
    (tensors, card), (before, own) = read_encoder(tmp_path / "shared" / WEIGHTS), read_encoder(encoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    assert len(card.cases_seen) == len(own.cases_seen)
    config = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert config["sha256"] == file_hash(tmp_path / "shared" / WEIGHTS)
    assert (config["token"], config["channel_names"]) == ([2, 4, 8], ["T1", "FLAIR"])
    page = (tmp_path / "shared" / "README.md").read_text()
    assert re.match(r"---\nlibrary_name: nnunet-vit-mae\nlicense: cc-by-4.0\n", page)
    for row in (
        "| cases | 2, without labels, of fold 0 |",
        "| contrasts, in the order of the channels | T1, FLAIR |",
        "| licence of the data | CC0 1.0 — “phantoms” |",
        "| spacing (z y x) | 3.0, 0.8, 0.9 mm |",
        "| axes of the files, which are z y x, in the order of the volumes | z y x |",
        "| epochs, steps | 800, 1600 |",
        "| mask_ratio | 0.9 |",
        "![Loss and learning rate by epoch](loss.png)",
        "hf:OWNER/NAME",
    ):
        assert row in page
    assert (tmp_path / "shared" / "loss.png").read_bytes() == b"a curve"


def test_no_case_and_no_path_leaves_the_site(tmp_path):
    secret = "/home/anna/Dataset900_Carotid"
    encoder = write_encoder(tmp_path / "run" / "encoder.safetensors", dataset=secret, notes=[f"{secret}/case.nii.gz"])
    write_model_folder(encoder, tmp_path / "shared", licence="other")
    for file in (tmp_path / "shared").iterdir():
        content = file.read_bytes()
        for word in ("anna", str(tmp_path), *CASES, *map(hashed_name, CASES)):
            assert word.encode() not in content, file


def test_hashes_of_cases_stay_if_they_are_asked_for(encoder, tmp_path):
    write_model_folder(encoder, tmp_path / "shared", licence="other", case_hashes=True)
    assert read_encoder(tmp_path / "shared" / WEIGHTS)[1].seen(CASES) == CASES


@pytest.mark.parametrize(
    ("case_hashes", "said"),
    [
        (True, "The encoder has seen the images (not the labels) of 2 of the 3 validation cases."),
        (False, "The card of the encoder does not say which cases it has seen (pre-trained on 2 cases of A, fold 0)."),
    ],
)
def test_a_trainer_says_what_a_shared_card_tells_of_the_validation_cases(tmp_path, monkeypatch, case_hashes, said):
    shared, logged = tmp_path / "shared", []
    encoder = write_encoder(tmp_path / "run" / "encoder.safetensors", dataset="A")
    write_model_folder(encoder, shared, licence="other", case_hashes=case_hashes)
    trainer = object.__new__(nnUNetTrainerViTMAE)
    _, trainer.encoder_card = read_encoder(shared / WEIGHTS)
    trainer.plans_manager, trainer.fold = SimpleNamespace(dataset_name="A"), 0
    monkeypatch.setattr(trainer, "print_to_log_file", logged.append)
    validation = SimpleNamespace(identifiers=[*CASES, "another"])
    monkeypatch.setattr(ScheduledTrainer, "get_tr_and_val_datasets", lambda _: (None, validation))
    trainer.get_tr_and_val_datasets()
    assert logged == [said]


def test_a_table_of_the_card_holds_whatever_a_dataset_is_called(tmp_path):
    encoder = write_encoder(tmp_path / "run" / "encoder.safetensors", dataset="A | B\n<script>")
    write_model_folder(encoder, tmp_path / "shared", licence="other")
    assert r"| dataset | A \| B &lt;script&gt; |" in (tmp_path / "shared" / "README.md").read_text()


# ---------- to the hub and back


def test_an_encoder_is_shared_and_used_elsewhere(hub: HubServer, in_study, tmp_path, monkeypatch, capsys):
    shared = tmp_path / "shared"
    share.main(["-d", "901", "-o", str(shared), "--repo", REPOSITORY])
    (commit,) = hub.commits[REPOSITORY]
    address = f"hf:{REPOSITORY}@{commit}"
    assert f"mae3d_plan --encoder {address}" in capsys.readouterr().out
    assert hub.commits[REPOSITORY][commit] == {file.name: file.read_bytes() for file in shared.iterdir()}
    assert hub.private == {REPOSITORY: True}
    assert f"hf:{REPOSITORY}" in (shared / "README.md").read_text()

    plan.main(["-d", "901", "-o", "FromHub", "--encoder", f"hf:{REPOSITORY}"])
    assert address in capsys.readouterr().out
    plans = json.loads((in_study.preprocessed / "FromHub.json").read_text())
    pinned = EncoderFile(**plans["configurations"]["3d_fullres"]["vit_mae"]["encoder"])
    assert pinned == EncoderFile(file=address, sha256=file_hash(shared / WEIGHTS))

    hub.answered.clear()
    assert file_hash(_unchanged(pinned)) == pinned.sha256
    assert not hub.answered  # it is in the cache
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "another_machine"))
    assert file_hash(_unchanged(pinned)) == pinned.sha256
    assert hub.answered
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "a_third_machine"))
    hub.commits[REPOSITORY][commit][WEIGHTS] += b" "
    with pytest.raises(UserError, match=f"The encoder {address} has changed since the plans were written"):
        _unchanged(pinned)


def test_a_branch_is_pinned_to_its_commit_and_an_old_commit_stays(hub: HubServer, uploaded, encoder):
    tensors, card = read_encoder(encoder)
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    newer = hub.commit(REPOSITORY, {WEIGHTS: encoder_content(changed, card)})
    assert download(f"hf:{REPOSITORY}")[1] == download(f"hf:{REPOSITORY}@main")[1] == f"hf:{REPOSITORY}@{newer}"
    assert local_file(f"hf:{REPOSITORY}@{uploaded}").read_bytes() == encoder.read_bytes()


def test_features_of_an_encoder_on_the_hub(uploaded):
    with torch.inference_mode():
        tokens, grid = load_encoder(f"hf:{REPOSITORY}@{uploaded}")(torch.randn(2, 2, 6, 12, 8))
    assert (tokens.shape, grid) == ((2, 9, 96), (3, 3, 1))


def test_a_file_that_is_no_encoder_of_ours_is_refused(hub: HubServer):
    hub.commit(REPOSITORY, {WEIGHTS: b"something else"})
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        load_encoder(f"hf:{REPOSITORY}")


# ---------- what goes wrong


@pytest.mark.parametrize(
    ("address", "words"),
    {
        "hf:lab": "not an address on the hub: write hf:owner/name",
        "hf:lab/vessel@": "not an address on the hub",
        "hf:lab/../vessel": "not an address on the hub",
        "hf:lab/none": "no such repository; if it is private, log in",
        "hf:lab/vessel@v9": "no such revision",
        "hf:lab/empty": f"has no {WEIGHTS}",
    }.items(),
)
def test_an_address_that_leads_nowhere(hub: HubServer, uploaded, address, words):
    hub.commit("lab/empty", {"README.md": b"nothing"})
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        download(address)
    assert address in str(caught.value)


def test_without_a_network_a_command_says_what_it_needs(hub, offline, in_study, refused):
    offline()
    sentence = refused(plan.main, "-d", "901", "-o", "FromHub", "--encoder", f"hf:{REPOSITORY}")
    assert "this needs a network (unset HF_HUB_OFFLINE, check HF_ENDPOINT)" in sentence
    assert not (in_study.preprocessed / "FromHub.json").exists()


def test_a_hub_that_does_not_answer(hub: HubServer, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the tries
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match="cannot be reached: this needs a network"):
        download(f"hf:{REPOSITORY}")


def test_what_was_downloaded_needs_no_network(uploaded, offline):
    address = download(f"hf:{REPOSITORY}")[1]
    offline()
    assert download(address)[1] == address


def test_a_token_that_may_not_write_leaves_a_folder_to_go_on_with(hub, in_study, tmp_path, monkeypatch, refused):
    command = ["-d", "901", "-o", str(tmp_path / "shared"), "--repo", REPOSITORY, "--public"]
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    sentence = refused(share.main, *command)
    assert "log in with `hf auth login`, or set HF_TOKEN to a token" in sentence
    assert (tmp_path / "shared" / WEIGHTS).is_file()
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    share.main(command)
    assert hub.private == {REPOSITORY: False}
    (files,) = hub.commits[REPOSITORY].values()
    assert sorted(files) == ["README.md", "config.json", "loss.png", WEIGHTS]


def test_sharing_without_a_network(hub, offline, in_study, tmp_path, refused):
    offline()
    sentence = refused(share.main, "-d", "901", "-o", str(tmp_path / "shared"), "--repo", REPOSITORY)
    assert "is written, but cannot be pushed to lab/vessel, because the hub cannot be reached" in sentence


@pytest.mark.parametrize(
    ("flags", "words"),
    {
        "-p None": "There are no plans None",
        "-f 1": "There is no encoder",
        "--public": "--public is for a repository on the hub",
        "--repo vessel": "vessel is not OWNER/NAME",
        "--licence CC-BY": "CC-BY is not a licence as the hub spells it",
    }.items(),
)
def test_mistakes(in_study, tmp_path, refused, flags, words):
    assert words in refused(share.main, "-d", "901", "-o", str(tmp_path / "shared"), *flags.split())
    assert not (tmp_path / "shared").exists()


def test_plans_with_the_name_of_others_are_told_from_them(in_study, tmp_path, refused):
    """Pre-training would keep the encoder under the name in the file, where that of the other plans is."""
    plans = json.loads((in_study.preprocessed / "nnUNetPlans.json").read_text())
    copied = in_study.preprocessed / "Copied.json"
    copied.write_text(json.dumps(plans))
    sentence = refused(share.main, "-d", "901", "-p", "Copied", "-o", str(tmp_path / "shared"))
    assert f"-p names the plans Copied, but the plans_name in {copied} is nnUNetPlans" in sentence
    copied.write_text(json.dumps(plans | {"plans_name": "Copied"}))
    assert "run mae3d_pretrain -d 901 -c 3d_fullres -p Copied -f all first" in refused(
        share.main, "-d", "901", "-p", "Copied", "-o", str(tmp_path / "shared")
    )
