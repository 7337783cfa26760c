"""What `mae3d_plan` chooses and says: from flags, recipes, the memory of a GPU, and encoders from elsewhere."""

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_weights import make_card

from nnunet_vit_mae.cli import plan as plan_command
from nnunet_vit_mae.cli import pretrain as pretrain_command
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.nnunet import planner
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.planner import choose_settings
from nnunet_vit_mae.nnunet.plans import load_plan, settings_for
from nnunet_vit_mae.nnunet.trainers import _unchanged
from nnunet_vit_mae.settings import EncoderFile, Network, Pretraining, token_grid
from nnunet_vit_mae.units import GIB
from nnunet_vit_mae.weights import save_encoder

pytestmark = pytest.mark.slow

PATCH = (14, 20, 24)  # as nnU-Net plans it: 4 x 5 x 6 tokens of 4, 2 x 3 x 3 of 8, 1 x 2 x 2 of 16
Z_SCORES = ["ZScoreNormalization"] * 2
HERE = {
    "size": "XS",
    "token": [4, 4, 4],
    "channel_names": ["T1", "FLAIR"],
    "normalization": Z_SCORES,
    "patch_size": list(PATCH),
    "spacing": [1.5, 1.0, 1.0],
}


def tiny_plan(name="nnUNetPlans"):
    return load_plan(find_dataset("901"), name, "3d_fullres")


def gigabytes_for(network: Network, batch: int) -> int:
    """An estimate for tests: 1/100 GiB for each token of a batch, so 1.2 GiB for each volume at token 4."""
    return batch * math.prod(token_grid(PATCH, network.token)) * GIB // 100


@pytest.fixture
def linear_estimates(monkeypatch):
    """Rehearsals of real networks take seconds; most tests here ask what becomes of their results."""
    monkeypatch.setattr(planner, "finetuning_memory", lambda network, *others, **_: gigabytes_for(network, others[-1]))
    monkeypatch.setattr(
        planner, "pretraining_memory", lambda network, *others, **_: gigabytes_for(network, others[-1]) // 8
    )


@pytest.fixture
def plan(in_workspace, linear_estimates, capsys):
    """Call `mae3d_plan`; gives the table's rows by name, the notes and the settings that were written."""

    def call(arguments: str, name: str = "P"):
        plan_command.main(f"-d 901 -o {name} {arguments}".split())
        *lines, last = capsys.readouterr().out.splitlines()
        assert last.startswith(f"Wrote {in_workspace.preprocessed / name}.json")
        table = [line for line in lines if not line.startswith(" ")]
        rows = {name: (value, reason) for name, value, reason in (re.split("  +", row, maxsplit=2) for row in table)}
        notes = [line.strip() for line in lines if line.startswith(" ")]
        return rows, notes, tiny_plan(name).settings

    return call


@pytest.fixture
def not_planned(in_workspace, linear_estimates, refused):
    """Call `mae3d_plan`, insist on a refusal and on no new plans; gives the sentence."""

    def call(arguments: str) -> str:
        before = sorted(in_workspace.preprocessed.rglob("*"))
        message = refused(plan_command.main, *f"-d 901 -o P {arguments}".split())
        assert sorted(in_workspace.preprocessed.rglob("*")) == before
        return message

    return call


@pytest.fixture
def encoder_of(tmp_path):
    """Write an encoder that fits the tiny dataset but for the changes in its card."""

    def write(**changes) -> Path:
        card = make_card(**(HERE | changes))
        torch.manual_seed(0)
        own = {"adaptive": card.adaptive, "modality_vectors": card.modality_vectors}
        chosen = Network(size=card.size, token=tuple(card.token), **own)
        network = build_autoencoder(chosen, len(card.channel_names), Pretraining(mask_ratio=0.9))
        save_encoder(network.encoder, card, tmp_path / "elsewhere" / "encoder.safetensors")
        return tmp_path / "elsewhere" / "encoder.safetensors"

    return write


def test_an_encoder_with_nan_or_without_a_tensor_is_refused(not_planned, encoder_of):
    file = encoder_of()
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    name = "transformer.norm.weight"
    save_file(tensors | {name: tensors[name] * torch.nan}, file, metadata)
    assert f"has NaN or Inf in {name}" in not_planned(f"--encoder {file}")
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, file, metadata)
    assert f"it lacks {name}" in not_planned(f"--encoder {file}")


# ---------- the table


def test_the_table_has_a_row_and_a_reason_for_each_choice(plan):
    rows, notes, settings = plan("--size XS")
    assert list(rows) == [
        "size",
        "token",
        "decoder",
        "upsampling",
        "batch, fine-tuning",
        "batch, pre-training",
        "mirroring",
        "memory, fine-tuning",
        "memory, pre-training",
    ]
    assert rows["size"] == ("XS", "as given")
    assert rows["token"][0] == "4 x 4 x 4"
    assert rows["token"][1].startswith("the smallest of 4 to 16")
    assert rows["token"][1].endswith("within about 4096 tokens: 120 tokens in a patch of 14 x 20 x 24")
    assert rows["decoder"][0] == "unet"
    assert rows["upsampling"] == ("nearest", "not used by this decoder")
    assert rows["batch, fine-tuning"] == ("2", "default")
    assert rows["batch, pre-training"] == ("16", "default")
    assert rows["mirroring"] == ("zyx", "no label names a side of the body")
    assert rows["memory, fine-tuning"][0] == "2.4 GiB"
    assert rows["memory, pre-training"][0] == "2.4 GiB"
    assert all("estimated" in rows[f"memory, {phase}"][1] for phase in ("fine-tuning", "pre-training"))
    assert notes == []
    assert (settings.network.size, settings.network.token) == ("XS", (4, 4, 4))


def test_what_is_given_is_said_to_be_given_and_the_rest_to_come_from_the_plans(plan):
    assert plan("--token 8 --batch_size 6", "First")[0]["token"][1].startswith("as given: 18 tokens")
    rows, _, settings = plan("-p First --size XS", "Second")
    assert rows["size"] == ("XS", "as given")
    assert rows["token"] == ("8 x 8 x 8", "as in First: 18 tokens in a patch of 14 x 20 x 24")
    assert rows["batch, fine-tuning"] == ("6", "as in First")
    assert rows["batch, pre-training"] == ("16", "as in First")
    assert settings.network.token == (8, 8, 8)


@pytest.mark.parametrize("kind", ["nearest", "transposed"])
def test_upsampling_is_written_and_explained(plan, kind):
    rows, _, settings = plan(f"--size XS --decoder sfpn --upsampling {kind}")
    assert settings.network.upsampling == rows["upsampling"][0] == kind
    assert kind in rows["upsampling"][1]
    assert rows["decoder"][0] == settings.network.decoder == "sfpn"


@pytest.mark.parametrize("decoder", ["unetr", "sfpn", "upscale", "mae"])
def test_an_adaptive_network_has_the_decoder_of_its_plans(plan, decoder):
    rows, _, settings = plan(f"--size XS --adaptive --decoder {decoder}")
    assert rows["decoder"][0] == settings.network.decoder == decoder
    assert settings_for(tiny_plan("P").configuration, 2, adaptive=True) == settings
    assert plan("-p P --adaptive", name="Again")[2] == settings


def test_an_unknown_way_of_upsampling_is_refused(not_planned):
    assert "--upsampling" in not_planned("--upsampling trilinear")


def test_taps_have_a_row_where_the_decoder_has_some(plan):
    rows, _, settings = plan("--size XS --token 16 --decoder unetr")
    assert rows["taps"][0] == "2, 3, 4"
    assert settings.network.tapped_blocks == (2, 3, 4)
    assert "taps" not in plan("--size XS --token 16 --decoder sfpn")[0]


def test_plans_keep_the_baselines_files(plan, encoder_of):
    plan(f"--size XS --token 4 --encoder {encoder_of()} -gpu_memory_target 5")
    assert tiny_plan("P").configuration.data_identifier == "nnUNetPlans_3d_fullres"
    assert tiny_plan("P").configuration.batch_size == tiny_plan().configuration.batch_size


def test_real_estimates_are_printed_and_much_memory_changes_nothing(in_workspace, capsys):
    common = "-d 901 --size XS --token 16 --batch_size 2"
    plan_command.main(f"{common} -o Free".split())
    free = capsys.readouterr().out
    plan_command.main(f"{common} -o Held -gpu_memory_target 1000".split())
    assert capsys.readouterr().out == free.replace("Free", "Held")
    assert tiny_plan("Held").settings == tiny_plan("Free").settings
    sizes = re.findall(r"^memory, .* (\d+(?:\.\d)?) MiB ", free, flags=re.MULTILINE)
    assert len(sizes) == 2


# ---------- memory: at token 4 a batch of 4 needs 4.8 GiB, at token 8 a batch of 4 needs 0.72 GiB; 1 GiB is for CUDA


@pytest.mark.parametrize("target", ["5.81", "100", "1e6"])
def test_enough_memory_changes_nothing(plan, target):
    without = plan("--size XS")
    assert plan(f"--size XS -gpu_memory_target {target}") == without


def test_batches_are_halved_to_fit_the_memory_and_that_is_said(plan):
    plan("--size XS --batch_size 4", "First")
    rows, _, settings = plan("-p First -gpu_memory_target 3.41")
    assert settings.finetuning.batch_size == 2
    assert rows["batch, fine-tuning"] == ("2", "4 halved to fit the memory")
    assert rows["batch, pre-training"] == ("16", "as in First")
    assert rows["memory, fine-tuning"][0] == "2.4 GiB"


def test_the_token_grows_to_fit_the_memory(plan):
    rows, _, settings = plan("--size XS -gpu_memory_target 3.39")
    assert settings.network.token == (4, 4, 8)
    assert rows["token"] == ("4 x 4 x 8", "the smallest that fits the memory: 60 tokens in a patch of 14 x 20 x 24")
    assert rows["decoder"][0] == settings.network.decoder == "unet"
    assert rows["batch, fine-tuning"] == ("2", "default")


def test_what_is_given_stays_when_memory_is_short(plan):
    rows, _, settings = plan("--size XS --decoder sfpn --batch_size 3 -gpu_memory_target 3.39")
    assert rows["batch, fine-tuning"] == ("3", "as given")
    assert (settings.network.token, settings.network.decoder) == ((4, 4, 8), "sfpn")


@pytest.mark.parametrize(
    ("arguments", "token", "size"),
    [
        ("-gpu_memory_target 1.01", "[16, 16, 16]", "81.9 MiB (fine-tuning, batch 2)"),
        ("-gpu_memory_target 0.5", "[16, 16, 16]", "81.9 MiB (fine-tuning, batch 2)"),
        ("--token 4 -gpu_memory_target 3.39", "[4, 4, 4]", "2.4 GiB (fine-tuning, batch 2)"),
        ("--token 4 --batch_size 4 -gpu_memory_target 3.41", "[4, 4, 4]", "4.8 GiB (fine-tuning, batch 4)"),
    ],
)
def test_too_little_memory_is_refused_with_sizes(not_planned, arguments, token, size):
    message = not_planned(f"--size XS {arguments}")
    assert message.startswith(f"Error: With token {token} a training step needs about {size}")
    assert message.count("\n") == 1


@pytest.mark.parametrize("target", ["0", "-8", "nan", "inf", "much"])
def test_a_memory_that_is_none_is_refused(not_planned, target):
    assert "-gpu_memory_target" in not_planned(f"-gpu_memory_target {target}")


# ---------- taps in recipes


def recipe(folder: Path, network: dict) -> Path:
    (folder / "recipe.json").write_text(json.dumps({"network": network}))
    return folder / "recipe.json"


@pytest.mark.parametrize("flags", ["", "--upsampling transposed --epochs 3", "-gpu_memory_target 1000"])
def test_taps_of_a_recipe_survive(plan, tmp_path, flags):
    file = recipe(tmp_path, {"size": "XS", "token": [8, 8, 8], "decoder": "unetr", "taps": [1, 2]})
    rows, _, settings = plan(f"--recipe {file} {flags}")
    assert settings.network.taps == (1, 2)
    assert rows["taps"][0] == "1, 2"


def test_taps_of_other_plans_survive_what_does_not_touch_the_network(plan, tmp_path):
    file = recipe(tmp_path, {"size": "XS", "token": [8, 8, 8], "decoder": "unetr", "taps": [1, 2]})
    plan(f"--recipe {file}", "First")
    assert plan("-p First --epochs 3 -gpu_memory_target 1000")[2].network.taps == (1, 2)


@pytest.mark.parametrize("flags", ["--epochs 3", "--upsampling transposed", "--token 16 --size XS --decoder unetr"])
def test_taps_of_plans_with_an_encoder_survive_what_leaves_the_blocks(plan, tmp_path, encoder_of, flags):
    file = recipe(tmp_path, {"decoder": "unetr", "taps": [1, 2, 4]})
    plan(f"--recipe {file} --encoder {encoder_of(token=[16, 16, 16])}", "First")
    rows, _, settings = plan(f"-p First {flags}")
    assert settings.encoder.file
    assert settings.network.taps == (1, 2, 4)
    assert rows["taps"][0] == "1, 2, 4"


def test_taps_of_other_plans_survive_another_way_of_upsampling(plan, tmp_path):
    file = recipe(tmp_path, {"size": "XS", "token": [8, 8, 8], "decoder": "unetr", "taps": [1, 2]})
    plan(f"--recipe {file}", "First")
    network = plan("-p First --upsampling transposed")[2].network
    assert (network.taps, network.upsampling) == ((1, 2), "transposed")


@pytest.mark.parametrize(
    ("flags", "tapped"), [("--size S", (4, 7, 10)), ("--decoder sfpn", ()), ("--adaptive", (2, 3, 4))]
)
def test_taps_of_other_plans_are_reset_by_another_network(plan, tmp_path, flags, tapped):
    file = recipe(tmp_path, {"size": "XS", "token": [8, 8, 8], "decoder": "unetr", "taps": [1, 2]})
    plan(f"--recipe {file}", "First")
    network = plan(f"-p First {flags}")[2].network
    assert (network.taps, network.tapped_blocks) == ((), tapped)


def test_taps_of_other_plans_are_reset_by_another_token(plan, tmp_path):
    file = recipe(tmp_path, {"size": "XS", "token": [8, 8, 8], "decoder": "unetr", "taps": [1, 2]})
    plan(f"--recipe {file}", "First")
    network = plan("-p First --token 4 --decoder unetr")[2].network
    assert (network.taps, network.tapped_blocks) == ((), (2, 3, 4))


def test_taps_are_reset_when_memory_asks_for_another_token(in_workspace, linear_estimates):
    changes = {"network": {"size": "XS", "decoder": "unetr", "taps": [1]}}
    kept, _ = choose_settings(tiny_plan(), changes, memory_target=3.41)
    reset, choices = choose_settings(tiny_plan(), changes, memory_target=3.39)
    assert (kept.network.token, kept.network.taps) == ((4, 4, 4), (1,))
    assert (reset.network.token, reset.network.taps, reset.network.decoder) == ((4, 4, 8), (), "unetr")
    assert {choice.name: choice.value for choice in choices}["taps"] == "2, 3, 4"


def test_taps_that_do_not_fit_a_token_that_is_given_are_refused(not_planned, tmp_path):
    file = recipe(tmp_path, {"size": "XS", "token": [8, 8, 8], "decoder": "unetr", "taps": [1, 2]})
    assert "network.taps is [1, 2]" in not_planned(f"--recipe {file} --token 16")


def test_taps_of_a_recipe_are_checked_for_the_token_of_the_plans(plan, tmp_path):
    file = recipe(tmp_path, {"size": "XS", "decoder": "unetr", "taps": [3]})
    assert plan(f"--recipe {file}")[2].network.taps == (3,)


@pytest.mark.parametrize("name", ["dataset", "dataset_fingerprint", "splits_final", "split", "patients"])
def test_plans_are_not_named_like_another_file_of_their_folder(not_planned, name):
    assert f"-o {name} is not a name for plans" in not_planned(f"-o {name} --size XS")


# ---------- encoders from elsewhere


def test_an_encoder_brings_size_and_token_and_is_recorded(plan, encoder_of, monkeypatch):
    file = encoder_of(token=[2, 4, 8], channel_names=["t1", "T2", "SWI"], patch_size=[8, 8, 8], spacing=[3.0, 1.0, 1.0])
    monkeypatch.chdir(file.parent)
    rows, notes, settings = plan("--encoder encoder.safetensors")
    assert (settings.network.size, settings.network.token, settings.network.decoder) == ("XS", (2, 4, 8), "unet")
    assert settings.encoder.file == str(file.resolve())
    assert settings.encoder.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert rows["size"][0] == "XS"
    assert rows["token"][0] == "2 x 4 x 8"
    assert rows["encoder"] == ("encoder.safetensors", "pre-trained on 2 cases of Dataset900_CarotidPhantom")
    assert notes == [
        "Patch [8, 8, 8] there, [14, 20, 24] here: positions are rebuilt for it.",
        "Spacing (mm) [3.0, 1.0, 1.0] there, [1.5, 1.0, 1.0] here: a token has another length.",
        "Tokenizer: made for t1, T2, SWI, used for T1, FLAIR; T1 by name; "
        "FLAIR from the mean over its channels, all scaled by 3/2.",
    ]


def test_an_encoder_that_fits_as_it_is_gets_no_notes_and_may_be_confirmed_by_flags(plan, encoder_of):
    file = encoder_of()
    silent, confirmed = plan(f"--encoder {file}"), plan(f"--encoder {file} --size XS --token 4 --decoder sfpn")
    assert silent[1] == confirmed[1] == []
    assert silent[2].encoder == confirmed[2].encoder
    assert [chosen.network.decoder for _, _, chosen in (silent, confirmed)] == ["unet", "sfpn"]


def test_an_adaptive_encoder_brings_an_adaptive_network_and_its_decoder(plan, encoder_of):
    rows, notes, settings = plan(f"--encoder {encoder_of(adaptive=True, modality_vectors='learned')}")
    assert settings.network.modality_vectors == "learned"
    assert (settings.network.adaptive, settings.network.decoder, settings.network.token) == (True, "unetr", (4, 4, 4))
    assert rows["token"][1].endswith("in a patch of 14 x 20 x 24, for each of up to 2 contrasts")
    assert notes == []


def test_without_an_encoder_none_is_recorded(plan):
    rows, _, settings = plan("--size XS")
    assert settings.encoder == EncoderFile()
    assert "encoder" not in rows


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--size S", "size XS there, S here"),
        ("--token 8", "token [4, 4, 4] there, [8, 8, 8] here"),
        ("--token 2 4 4", "token [4, 4, 4] there, [2, 4, 4] here"),
        ("--size S --token 8", "size XS there, S here; token [4, 4, 4] there, [8, 8, 8] here"),
        ("--recipe quick --token 4 8 8", "token [4, 4, 4] there, [4, 8, 8] here"),
    ],
)
def test_flags_that_contradict_the_encoder_are_refused(not_planned, encoder_of, arguments, reason):
    file = encoder_of()
    message = not_planned(f"--encoder {file} {arguments}")
    assert f"{file} does not fit here ({reason})" in message
    assert message.count("\n") == 1


def test_an_encoder_for_intensities_in_another_range_is_refused(not_planned, encoder_of):
    file = encoder_of(normalization=["NoNormalization"])
    assert "normalised by NoNormalization there, ZScoreNormalization here" in not_planned(f"--encoder {file}")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b""), "damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "damaged"),
        (lambda file: file.write_bytes((2).to_bytes(8, "little") + b"{}"), "no card"),
        (
            lambda file: file.write_bytes(file.read_bytes().replace(b"data_licence", b"data_license")),
            "data_licence, data_license",
        ),
    ],
)
def test_a_file_that_is_no_encoder_is_refused_by_name(not_planned, encoder_of, spoil, reason):
    file = encoder_of()
    spoil(file)
    message = not_planned(f"--encoder {file}")
    assert str(file) in message
    assert reason in message
    assert message.count("\n") == 1


def test_memory_halves_batches_but_never_changes_an_encoders_token(plan, not_planned, encoder_of):
    file = encoder_of()
    _, _, settings = plan(f"--encoder {file} -gpu_memory_target 3.41", "Halved")
    assert (settings.finetuning.batch_size, settings.network.token) == (2, (4, 4, 4))
    assert "With token [4, 4, 4]" in not_planned(f"--encoder {file} -gpu_memory_target 3.39")


def test_an_encoder_needs_no_memory_for_a_pre_training(plan, not_planned, encoder_of, monkeypatch):
    monkeypatch.setattr(planner, "pretraining_memory", lambda *_, **__: 2**60)
    rows, _, settings = plan(f"--encoder {encoder_of()} -gpu_memory_target 3.41")
    assert not [name for name in rows if "pre-training" in name]
    assert settings.pretraining.batch_size == 16
    message = not_planned(f"--encoder {encoder_of()} -gpu_memory_target 3.39")
    assert "2.4 GiB (fine-tuning, batch 2), more than the 2.4 GiB that" in message


def test_plans_that_start_from_an_encoder_are_not_pretrained(plan, encoder_of, refused, in_workspace):
    file = encoder_of()
    plan(f"--encoder {file}")
    message = refused(pretrain_command.main, *"-d 901 -p P -device cpu".split())
    assert f"plans P start from the encoder {file}, which is trained already" in message
    assert "nnUNetv2_train" in message
    assert not in_workspace.results.exists()


@pytest.mark.parametrize("arguments", ["--size S", "--token 8", "-gpu_memory_target 3.39"])
def test_plans_from_plans_with_an_encoder_cannot_contradict_it(plan, not_planned, encoder_of, arguments):
    plan(f"--encoder {encoder_of()}", "First")
    not_planned(f"-p First {arguments}")


# ---------- the encoder at the time of fine-tuning


def test_the_encoder_that_was_planned_with_is_found_again(plan, encoder_of):
    file = encoder_of()
    assert _unchanged(plan(f"--encoder {file}")[2].encoder) == file


def test_an_encoder_that_changed_after_planning_is_refused(plan, encoder_of):
    encoder = plan(f"--encoder {encoder_of()}")[2].encoder
    file = encoder_of(seed=8)
    with pytest.raises(UserError, match=rf"{re.escape(str(file))} has changed .* run mae3d_plan again\.$"):
        _unchanged(encoder)


def test_an_encoder_that_went_missing_is_refused(plan, encoder_of):
    file = encoder_of()
    encoder = plan(f"--encoder {file}")[2].encoder
    file.unlink()
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}, which the plans name, is missing"):
        _unchanged(encoder)


@pytest.mark.parametrize(("lowest", "warned"), [(131.0, True), (-60.0, False)])
def test_ct_whose_soft_tissue_nnunet_clips_away_is_warned_about(in_workspace, lowest, warned):
    file = in_workspace.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization", "ZScoreNormalization"]
    clip = {"percentile_00_5": lowest, "mean": 300.0, "std": 100.0}
    plans["foreground_intensity_properties_per_channel"]["0"] |= clip
    (in_workspace.preprocessed / "Dense.json").write_text(json.dumps(plans | {"plans_name": "Dense"}))
    warnings = planner.clipping_warnings(tiny_plan("Dense"))
    assert len(warnings) == warned
    if warned:
        assert "clips the channel T1 below 131 HU" in warnings[0]
        assert re.search(r"one constant \(\d+% of the voxels of a few cases\)", warnings[0])
