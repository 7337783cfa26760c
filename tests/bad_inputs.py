"""Mistakes that users make: what is wrong, the command that meets it, and words of the sentence that it answers with.

`docs/bad_inputs.md` lists them; `python tests/bad_inputs.py` prints it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import SimpleITK as sitk
import torch
from conftest import SHAPE, SPACING

DROP = object()  # an entry to remove
Edit = Callable[[Path], None]  # of the workspace's root

PLANS = "preprocessed/Dataset901_Tiny/Tiny.json"
DATASET = "preprocessed/Dataset901_Tiny/dataset.json"
SPLITS = "preprocessed/Dataset901_Tiny/splits_final.json"
RAW = "raw/Dataset901_Tiny"
RAW_DATASET = f"{RAW}/dataset.json"
CASE = "preprocessed/Dataset901_Tiny/nnUNetPlans_3d_fullres/train_0.b2nd"
POOL = "preprocessed/Dataset901_Tiny/nnUNetPlans_3d_fullres_unlabelled/pool_0.b2nd"
RUN = "results/Dataset901_Tiny/mae3d_pretrain__Tiny__3d_fullres/fold_0"
MODEL = "results/Dataset901_Tiny/nnUNetTrainerViTMAE__Tiny__3d_fullres"
CHECKPOINT = f"{MODEL}/fold_0/checkpoint_final.pth"
CHANNELS = {"0": "T1", "1": "FLAIR"}

PLAN = "mae3d_plan -d 901 -o New"
PRETRAIN = "mae3d_pretrain -d 901 -p Tiny -f 0 --epochs 2 --batch_size 3 -device cpu"
TRAIN = "nnUNetv2_train 901 3d_fullres 0 -p Tiny -tr nnUNetTrainerViTMAE -device cpu"
PREPROCESS = "mae3d_preprocess -d 901 -p Tiny -np 1"
FEATURES = "mae3d_features -d 901 -p Tiny -o features.png -device cpu"
CALIBRATE = "mae3d_calibrate -d 901 -p Tiny -f 0 -device cpu"
QUANTIFY = f"mae3d_quantify -d 901 -p Tiny -f 0 -device cpu -i {RAW}/imagesTs -o volumes.csv"
DICOM = f"{QUANTIFY} --dicom"
OMIT = f"mae3d_omit -d 901 -p Tiny -tr nnUNetTrainerViTMAE -i {RAW}/imagesTs -r {RAW}/labelsTs -o omitted -device cpu"
EVALUATE = f"mae3d_evaluate -r {RAW}/labelsTs -p A={RAW}/labelsTs -o report -np 1 --resamples 20"
EXPORT = "mae3d_export -d 901 -p Tiny"
SHARE = "mae3d_share -d 901 -p Tiny -f 0 -o shared"
SPLIT = "mae3d_split -d 901 -o split --folds 3"
CHECK = "mae3d_check -d 901 -o check -np 1"
FILL = "mae3d_fill_contrasts -d 901"
STUDY = "mae3d_study -d 901 -o study --few 2 --dry-run -device cpu"
CROP = f"mae3d_crop_roi -i {RAW}/imagesTs -o Dataset902_Crop -t {RAW}/imagesTs/test_0_0000.nii.gz "
CROP += f"-r {RAW}/labelsTs/test_0.nii.gz -np 1"
REFINE = "mae3d_refine_labels -d 901 -o refined"
CONVERT = "mae3d_convert -i scans -o Dataset903_New --contrast T1=t1 -np 1"


@dataclass(frozen=True)
class Row:
    """A mistake; `words` are part of the sentence."""

    what: str
    command: str
    words: str
    edit: Edit = lambda root: None
    environment: Mapping[str, str] = field(default_factory=dict)


# ---------- edits


def put(file: str, content: str | bytes) -> Edit:
    """Replace a file by other content."""

    def edit(root: Path) -> None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def put_json(file: str, content: Any) -> Edit:
    """Replace a JSON file."""
    return put(file, json.dumps(content))


def change(file: str, place: str, value: Any) -> Edit:
    """Change the entry of a JSON file that keys lead to, divided by spaces."""

    def edit(root: Path) -> None:
        content = json.loads((root / file).read_text())
        *parents, key = place.split()
        entry = content
        for parent in parents:
            entry = entry[parent]
        if value is DROP:
            del entry[key]
        else:
            entry[key] = value
        (root / file).write_text(json.dumps(content))

    return edit


def configure(key: str, value: Any) -> Edit:
    """Change an entry of the configuration in the plans."""
    return change(PLANS, f"configurations 3d_fullres {key}", value)


def setting(place: str, value: Any) -> Edit:
    """Change a setting of the ViT in the plans."""
    return configure(f"vit_mae {place}", value)


def cut(file: str) -> Edit:
    """Keep the first half of a file, as a full disk does."""

    def edit(root: Path) -> None:
        content = (root / file).read_bytes()
        (root / file).write_bytes(content[: len(content) // 2])

    return edit


def volume(file: str, array: np.ndarray) -> Edit:
    """Write another preprocessed volume."""

    def edit(root: Path) -> None:
        (root / file).unlink()
        blosc2.asarray(np.ascontiguousarray(array), urlpath=str(root / file), mode="w")

    return edit


def image(file: str, array: np.ndarray, *, vector: bool = False) -> Edit:
    """Write another image, with the spacing of the others."""

    def edit(root: Path) -> None:
        written = sitk.GetImageFromArray(array, isVector=vector)
        written.SetSpacing(SPACING[::-1][: written.GetDimension()])
        sitk.WriteImage(written, str(root / file))

    return edit


def link(file: str, target: str) -> Edit:
    """Replace a file by a symbolic link."""

    def edit(root: Path) -> None:
        (root / file).unlink()
        (root / file).symlink_to(target)

    return edit


def saved(file: str, alter: Callable[[dict], Any]) -> Edit:
    """Change a file that torch has saved."""

    def edit(root: Path) -> None:
        content = torch.load(root / file, weights_only=False)
        altered = alter(content)
        torch.save(content if altered is None else altered, root / file)

    return edit


def remove(file: str) -> Edit:
    """Remove a file."""
    return lambda root: (root / file).unlink()


def several(*edits: Edit) -> Edit:
    """Make several edits."""

    def edit(root: Path) -> None:
        for one in edits:
            one(root)

    return edit


def nan_weights(checkpoint: dict) -> None:
    for tensor in checkpoint["network_weights"].values():
        tensor.fill_(float("nan"))


def other_weights(state: dict) -> None:
    state["network"]["other"] = torch.ones(1)


def without_losses(state: dict) -> None:
    del state["losses"]


def cut_probabilities(root: Path) -> None:
    for file in (root / MODEL / "fold_0" / "validation").glob("*.npz"):
        cut(str(file.relative_to(root)))(root)


def calibrated(root: Path) -> None:
    shutil.copyfile(root / CHECKPOINT, root / MODEL / "fold_0" / "checkpoint_calibrated.pth")


def earlier_optimiser(checkpoint: dict) -> None:
    for group in checkpoint["optimizer_state"]["param_groups"]:
        del group["pretrained"]


SMALL = np.ones((2, 9, 9, 9), np.float32)
CUBE = np.ones((4, 4, 4), np.float32)

PLANS_ROWS = [
    Row("plans {}", PRETRAIN, "it has no", put_json(PLANS, {})),
    Row("plans []", PRETRAIN, "its content is [], but it must be an object", put_json(PLANS, [])),
    Row("plans that are not JSON", PRETRAIN, "not valid JSON", put(PLANS, '{"a": ')),
    Row("plans nested without end", PRETRAIN, "Tiny.json", put(PLANS, "[" * 100_000)),
    Row("plans with a number of 5,000 digits", PRETRAIN, "Tiny.json", put(PLANS, "1" * 5000)),
    Row("plans that are not UTF-8", PRETRAIN, "not valid JSON", put(PLANS, b"\xff\xfe{}")),
    Row("configurations null", PRETRAIN, "configurations is None", change(PLANS, "configurations", None)),
    Row(
        "a configuration that is a list",
        PRETRAIN,
        "configurations.3d_fullres",
        change(PLANS, "configurations 3d_fullres", []),
    ),
    Row("no patch_size", PRETRAIN, "has no patch_size", configure("patch_size", DROP)),
    Row("patch_size below 0", PRETRAIN, "patch_size[0] is -8", configure("patch_size", [-8, 8, 8])),
    Row("patch_size of text", PRETRAIN, "patch_size[0] is 'a'", configure("patch_size", ["a", 8, 8])),
    Row("patch_size of four numbers", PRETRAIN, "patch_size", configure("patch_size", [8, 8, 8, 8])),
    Row("patch_size with a fraction", PRETRAIN, "patch_size[1] is 8.5", configure("patch_size", [8, 8.5, 8])),
    Row("a patch of 100,000 voxels a side", PRETRAIN, "needs about", configure("patch_size", [100_000] * 3)),
    Row("spacing 0", PRETRAIN, "spacing[0] is 0", configure("spacing", [0, 0, 0])),
    Row("spacing of text", PRETRAIN, "spacing[0] is 'a'", configure("spacing", ["a", 1, 1])),
    Row("spacing NaN", PRETRAIN, "spacing[0] is nan", configure("spacing", [float("nan"), 1, 1])),
    Row("spacing of two axes for a patch of three", PRETRAIN, "spacing of 2", configure("spacing", [1, 1])),
    Row("batch_size 0", PRETRAIN, "batch_size is 0", configure("batch_size", 0)),
    Row("no data_identifier", PRETRAIN, "no data_identifier", configure("data_identifier", DROP)),
    Row("data_identifier with ..", PRETRAIN, "data_identifier", configure("data_identifier", "../../other")),
    Row("plans_name with ..", PRETRAIN, "plans_name", change(PLANS, "plans_name", "../x")),
    Row("plans_name of other plans", PRETRAIN, "write Tiny there", change(PLANS, "plans_name", "nnUNetPlans")),
    Row("plans_name of other plans", PREPROCESS, "write Tiny there", change(PLANS, "plans_name", "nnUNetPlans")),
    Row("a model's folder renamed", QUANTIFY, "write Tiny there", change(f"{MODEL}/plans.json", "plans_name", "New")),
    Row("plans of another dataset", PRETRAIN, "would train on that", change(PLANS, "dataset_name", "Dataset902_New")),
    Row("dataset_name with ..", PRETRAIN, "dataset_name", change(PLANS, "dataset_name", "../x")),
    Row("no image_reader_writer", PREPROCESS, "no image_reader_writer", change(PLANS, "image_reader_writer", DROP)),
    Row(
        "an unknown image_reader_writer",
        PREPROCESS,
        "'Nothing' as image_reader_writer",
        change(PLANS, "image_reader_writer", "Nothing"),
    ),
    Row(
        "an unknown preprocessor",
        PREPROCESS,
        "'Nothing' as preprocessor_name",
        configure("preprocessor_name", "Nothing"),
    ),
    Row("an unknown resampling function", PREPROCESS, "resampling_fn_data", configure("resampling_fn_data", "nothing")),
    Row("an unknown label_manager", PREPROCESS, "label_manager", change(PLANS, "label_manager", "Nothing")),
    Row(
        "an unknown normalisation", PREPROCESS, "normalization_schemes", configure("normalization_schemes", ["X", "Y"])
    ),
    Row(
        "normalisation for another number of channels",
        PREPROCESS,
        "for 1 channels",
        configure("normalization_schemes", ["ZScoreNormalization"]),
    ),
    Row("transpose_forward of two axes", PREPROCESS, "transpose_forward", change(PLANS, "transpose_forward", [0, 1])),
    Row(
        "intensities without numbers",
        PREPROCESS,
        "foreground_intensity",
        change(PLANS, "foreground_intensity_properties_per_channel", {"0": {"mean": "x"}, "1": {}}),
    ),
    Row("inherits_from itself", PRETRAIN, "Circular", configure("inherits_from", "3d_fullres")),
    Row("inherits_from nothing", PRETRAIN, "does not exist", configure("inherits_from", "nothing")),
    Row("vit_mae a list", PRETRAIN, "vit_mae is []", configure("vit_mae", [])),
    Row("vit_mae null", PRETRAIN, "vit_mae is None", configure("vit_mae", None)),
    Row("vit_mae.network a list", PRETRAIN, "vit_mae.network", configure("vit_mae", {"network": []})),
    Row("an unknown setting", PRETRAIN, "unknown keys: widht", setting("network", {"widht": 3})),
    Row("an unknown size", PRETRAIN, "network.size is 'XXL'", setting("network size", "XXL")),
    Row("a token of two sides", PRETRAIN, "network.token", setting("network token", [8, 8])),
    Row("a mask ratio of 1", PRETRAIN, "mask_ratio is 1.0", setting("pretraining mask_ratio", 1)),
    Row("a batch of 10^30", PRETRAIN, "pretraining.batch_size", setting("pretraining batch_size", 10**30)),
    Row("a learning rate below 0", PRETRAIN, "base_lr is -1", setting("pretraining base_lr", -1.0)),
    Row("a learning rate NaN", PRETRAIN, "base_lr is nan", setting("pretraining base_lr", float("nan"))),
    Row("weight_decay Infinity", PRETRAIN, "weight_decay is inf", setting("pretraining weight_decay", float("inf"))),
    Row("epochs true", PRETRAIN, "pretraining.epochs is True", setting("pretraining epochs", True)),
    Row("epochs as text", TRAIN, "finetuning.epochs is '3'", setting("finetuning epochs", "3")),
    Row("a seed of 2^32", TRAIN, "finetuning.seed", setting("finetuning seed", 2**32)),
    Row("vit_mae a list", TRAIN, "vit_mae is []", configure("vit_mae", [])),
    Row("vit_mae null", TRAIN, "vit_mae is None", configure("vit_mae", None)),
    Row("no patch_size", TRAIN, "has no patch_size", configure("patch_size", DROP)),
    Row("a cascade", TRAIN, "cascade", configure("previous_stage", "3d_lowres")),
    Row("a cascade", PRETRAIN, "cascade", configure("previous_stage", "3d_lowres")),
    Row("a cascade", f"{PLAN} -p Tiny", "cascade", configure("previous_stage", "3d_lowres")),
    Row("a 2D configuration", f"{PLAN} -c 2d", "2D"),
    Row("a patch of 100,000 voxels a side", f"{PLAN} -p Tiny", "needs about", configure("patch_size", [100_000] * 3)),
    Row("patch_size missing", f"{PLAN} -p Tiny", "has no patch_size", configure("patch_size", DROP)),
    Row("a token as large as the patch", f"{PLAN} --token 32", "hides none"),
    Row("a token as large as the patch", PRETRAIN, "hides none", setting("network token", [32, 32, 32])),
]

DATASET_ROWS = [
    Row("no channel_names", PRETRAIN, "has no channel_names", change(DATASET, "channel_names", DROP)),
    Row("channel_names a list", PRETRAIN, "channel_names is ['T1']", change(DATASET, "channel_names", ["T1"])),
    Row(
        "channel_names 0 and 2", PRETRAIN, 'the keys "0", "1"', change(DATASET, "channel_names", {"0": "T1", "2": "T2"})
    ),
    Row("a channel name that is a number", PRETRAIN, "channel_names.0 is 1", change(DATASET, "channel_names 0", 1)),
    Row("one channel where the plans have two", PRETRAIN, "names 1", change(DATASET, "channel_names", {"0": "T1"})),
    Row("file_ending a number", PREPROCESS, "file_ending is 3", change(DATASET, "file_ending", 3)),
    Row("no file_ending", PREPROCESS, "no file_ending", change(DATASET, "file_ending", DROP)),
    Row("file_ending with a folder", PREPROCESS, "file_ending", change(DATASET, "file_ending", "/../x.nii")),
    Row("labels a list", f"{PLAN}", "labels is ['blob']", change(DATASET, "labels", ["blob"])),
    Row("no labels", PLAN, "no labels", change(DATASET, "labels", DROP)),
    Row("labels without background", PLAN, "Background", change(DATASET, "labels", {"blob": 1})),
    Row("a label that is text", PLAN, "labels.blob", change(DATASET, "labels blob", "1")),
    Row("a label of no values", PLAN, "labels.blob", change(DATASET, "labels blob", [])),
    Row(
        "regions without an order",
        PLAN,
        "regions_class_order",
        change(DATASET, "labels", {"background": 0, "all": [1, 2], "core": 2}),
    ),
    Row("licence an object", PRETRAIN, "licence is {}", change(DATASET, "licence", {})),
    Row("dataset.json missing", PRETRAIN, "dataset.json", remove(DATASET)),
    Row(
        "dataset.json a list",
        TRAIN,
        "must be",
        put_json(DATASET, {"labels": [], "channel_names": CHANNELS, "file_ending": ".nii.gz"}),
    ),
    Row("dataset.json a list", SPLIT, "must be an object", put_json(RAW_DATASET, [])),
    Row("labels a list", CHECK, "labels is ['blob']", change(RAW_DATASET, "labels", ["blob"])),
    Row("channel_names a list", CHECK, "channel_names is", change(RAW_DATASET, "channel_names", ["T1"])),
    Row("channel_names twice the same", FILL, "a name of its own", change(RAW_DATASET, "channel_names 1", "T1")),
    Row("dataset.json not JSON", FILL, "not valid JSON", put(RAW_DATASET, "{")),
    Row("file_ending .png", FILL, "format with spacing", change(RAW_DATASET, "file_ending", ".png")),
    Row("contrasts.json a list", FILL, "contrasts.json", put_json(f"{RAW}/contrasts.json", [])),
    Row(
        "contrasts.json of numbers",
        FILL,
        "present",
        put_json(f"{RAW}/contrasts.json", {"imagesTr": {"a": {"present": 3}}}),
    ),
    Row(
        "a label above 65,535",
        EVALUATE,
        "labels.blob",
        put_json(f"{RAW}/labelsTs/dataset.json", {"labels": {"background": 0, "blob": 10**30}}),
    ),
    Row("labels a list", EVALUATE, "labels is [1]", put_json(f"{RAW}/labelsTs/dataset.json", {"labels": [1]})),
]

FOLD = {"train": ["train_0", "train_1"], "val": ["train_2"]}
SPLIT_ROWS = [
    Row("splits null", PRETRAIN, "must be a list", put_json(SPLITS, None)),
    Row("splits []", PRETRAIN, "a list of 1 or more", put_json(SPLITS, [])),
    Row("splits an object", PRETRAIN, "must be a list", put_json(SPLITS, FOLD)),
    Row("splits of numbers", PRETRAIN, "[0] is 1", put_json(SPLITS, [1, 2])),
    Row("a fold without val", PRETRAIN, "no [0].val", put_json(SPLITS, [{"train": ["train_0"]}])),
    Row("train a number", PRETRAIN, "[0].train is 3", put_json(SPLITS, [{"train": 3, "val": 4}])),
    Row(
        "a case that does not exist",
        PRETRAIN,
        "nobody",
        put_json(SPLITS, [{"train": ["train_0", "nobody"], "val": ["train_1"]}]),
    ),
    Row(
        "names with file endings",
        PRETRAIN,
        "no file ending",
        put_json(SPLITS, [{"train": ["train_0.nii.gz"], "val": ["train_1.nii.gz"]}]),
    ),
    Row("no training cases", PRETRAIN, "no cases in train", put_json(SPLITS, [{"train": [], "val": ["train_1"]}])),
    Row("no validation cases", PRETRAIN, "no cases in val", put_json(SPLITS, [{"train": ["train_1"], "val": []}])),
    Row(
        "a case on both sides",
        PRETRAIN,
        "in train and in val",
        put_json(SPLITS, [{"train": ["train_1"], "val": ["train_1"]}]),
    ),
    Row("a case twice", PRETRAIN, "twice in train", put_json(SPLITS, [{"train": ["train_0"] * 2, "val": ["train_1"]}])),
    Row("a fold that does not exist", PRETRAIN.replace("-f 0", "-f 5"), "-f 5"),
    Row("a fold in words", PRETRAIN.replace("-f 0", "-f first"), "-f first"),
    Row("a fold without val", TRAIN, "no [0].val", put_json(SPLITS, [{"train": ["train_0"]}])),
    Row("an object", TRAIN, "must be a list", put_json(SPLITS, FOLD)),
    Row(
        "names with file endings",
        TRAIN,
        "no file ending",
        put_json(SPLITS, [{"train": ["train_0.nii.gz"], "val": ["train_1.nii.gz"]}]),
    ),
    Row("no validation cases", TRAIN, "no cases in val", put_json(SPLITS, [{"train": ["train_1"], "val": []}])),
    Row("a fold that does not exist", TRAIN.replace("fullres 0", "fullres 3"), "-f 3", put_json(SPLITS, [FOLD])),
    Row("splits an object", CALIBRATE, "must be a list", put_json(SPLITS, {"0": 1})),
    Row("splits of numbers", CALIBRATE, "[0] is 1", put_json(SPLITS, [1])),
    Row(
        "names with file endings",
        f"{SPLIT} --verify",
        "no file ending",
        put_json("split/splits_final.json", [{"train": [f"train_{n}" for n in range(6)], "val": ["train_1.nii.gz"]}]),
    ),
    Row("patients.json a list", SPLIT, "patients.json", put_json("split/patients.json", [])),
    Row("split.json a list", PRETRAIN, "split.json", put_json("preprocessed/Dataset901_Tiny/split.json", [])),
    Row(
        "split.json with a number",
        PRETRAIN,
        "test is 3",
        put_json("preprocessed/Dataset901_Tiny/split.json", {"test": 3, "left_out": []}),
    ),
]

FILE_ROWS = [
    Row("an empty preprocessed case", PRETRAIN, "train_0.b2nd is damaged", put(CASE, b"")),
    Row("a preprocessed case of garbage", PRETRAIN, "nnUNetv2_preprocess -d 901", put(CASE, b"garbage" * 99)),
    Row("a preprocessed case cut off", PRETRAIN, "train_0.b2nd is damaged", cut(CASE)),
    Row("a preprocessed case cut off, with --cache", f"{PRETRAIN} --cache 1", "train_0.b2nd is damaged", cut(CASE)),
    Row("an unlabelled case cut off", PRETRAIN, "mae3d_preprocess -d 901", cut(POOL)),
    Row("an unlabelled case of two axes", PRETRAIN, "has the shape (4, 4)", volume(POOL, np.ones((4, 4), np.float32))),
    Row("an unlabelled case without voxels", PRETRAIN, "has the shape", volume(POOL, SMALL[:, :0])),
    Row("an unlabelled case of one channel", PRETRAIN, "instead of 2 channels", volume(POOL, SMALL[:1])),
    Row("an unlabelled case of whole numbers", PRETRAIN, "int16", volume(POOL, SMALL.astype(np.int16))),
    Row(
        "made_with.json of other plans",
        PRETRAIN,
        "other plans",
        put_json(POOL.replace("pool_0.b2nd", "made_with.json"), []),
    ),
    Row("a saved state cut off", f"{PRETRAIN} --c", "state.pt cannot be read", cut(f"{RUN}/state.pt")),
    Row("a saved state of garbage", f"{PRETRAIN} --c", "state.pt cannot be read", put(f"{RUN}/state.pt", b"garbage")),
    Row(
        "a saved state of another network",
        f"{PRETRAIN} --c",
        "another network",
        saved(f"{RUN}/state.pt", other_weights),
    ),
    Row("a saved state that is a list", f"{PRETRAIN} --c", "not the state", saved(f"{RUN}/state.pt", lambda s: [1])),
    Row(
        "a saved state with too many epochs",
        f"{PRETRAIN} --c",
        "has 9 epochs",
        saved(f"{RUN}/state.pt", lambda s: s.update(losses=[0.5] * 9)),
    ),
    Row("a saved state without losses", f"{PRETRAIN} --c", "losses", saved(f"{RUN}/state.pt", without_losses)),
    Row(
        "a saved state of another optimiser",
        f"{PRETRAIN} --c",
        "optimiser",
        saved(f"{RUN}/state.pt", lambda s: s.update(optimizer={})),
    ),
    Row("config.json of the run a list", f"{PRETRAIN} --c", "config.json", put_json(f"{RUN}/config.json", [])),
    Row("a run with another batch", f"{PRETRAIN.replace('size 3', 'size 2')} --c", "settings (pretraining"),
    Row(
        "properties of garbage",
        FEATURES,
        ".pkl",
        several(*(put(CASE.replace("train_0.b2nd", f"train_{n}.pkl"), b"x") for n in range(6))),
    ),
    Row(
        "a preprocessed case cut off",
        FEATURES,
        ".b2nd",
        several(*(cut(CASE.replace("train_0", f"train_{n}")) for n in range(6))),
    ),
    Row("a checkpoint cut off", FEATURES, "checkpoint_final.pth", cut(CHECKPOINT)),
    Row("a checkpoint of NaN", FEATURES, "NaN", saved(CHECKPOINT, nan_weights)),
    Row("a checkpoint cut off", CALIBRATE, "checkpoint_final.pth", cut(CHECKPOINT)),
    Row("a checkpoint that is a list", CALIBRATE, "checkpoint_final.pth", saved(CHECKPOINT, lambda c: [1])),
    Row("a checkpoint in another folder", f"{CALIBRATE} -chk ../plans.json", "-chk ../plans.json"),
    Row("a checkpoint that is no checkpoint", f"{CALIBRATE} -chk debug.json", "debug.json"),
    Row("a checkpoint cut off", f"{TRAIN} --c", "cannot be read", cut(CHECKPOINT)),
    Row(
        "new plans of the same name",
        f"{TRAIN} --c",
        "started with other settings of the network: token",
        setting("network token", [4, 4, 4]),
    ),
    Row(
        "new plans of the same name, and as many weights",
        f"{TRAIN} --c",
        "started with other settings of the network: rotary_base",
        setting("network rotary_base", 50.0),
    ),
    Row(
        "new plans of the same name for another fold",
        TRAIN.replace("fullres 0", "fullres 1"),
        "training of fold_0",
        setting("network rotary_base", 50.0),
    ),
    Row("a checkpoint of an earlier commit", f"{TRAIN} --c", "earlier version", saved(CHECKPOINT, earlier_optimiser)),
    Row("plans.json of the model {}", CALIBRATE, "plans.json", put_json(f"{MODEL}/plans.json", {})),
    Row("dataset.json of the model {}", CALIBRATE, "dataset.json", put_json(f"{MODEL}/dataset.json", {})),
    Row("probabilities cut off", CALIBRATE, ".npz", cut_probabilities),
    Row("a model that is not trained", CALIBRATE.replace("-f 0", "-f 1"), "no checkpoint"),
    Row("a fold twice", CALIBRATE.replace("-f 0", "-f 0 0"), "names the fold 0 twice"),
    Row("training_volumes.json {}", QUANTIFY, "training_volumes.json", put_json(f"{MODEL}/training_volumes.json", {})),
    Row(
        "training_volumes.json of text",
        QUANTIFY,
        "training_volumes.json",
        put_json(f"{MODEL}/training_volumes.json", {"blob": ["x"]}),
    ),
    Row(
        "fingerprint []",
        QUANTIFY,
        "dataset_fingerprint.json",
        put_json(f"{MODEL}/dataset_fingerprint.json", []),
    ),
    Row(
        "fingerprint without spacings",
        QUANTIFY,
        "spacings",
        put_json(f"{MODEL}/dataset_fingerprint.json", {"spacings": []}),
    ),
    Row(
        "calibration.json {}",
        f"{QUANTIFY} -chk checkpoint_calibrated.pth",
        "calibration.json",
        several(put_json(f"{MODEL}/calibration.json", {}), calibrated),
    ),
    Row("the note of the model a list", QUANTIFY, "model.json", put_json("volumes_segmentations/model.json", [])),
    Row(
        "a table in a folder that is a file",
        QUANTIFY.replace("-o volumes.csv", f"-o {RAW_DATASET}/v.csv"),
        "dataset.json",
    ),
    Row("a part that does not exist", f"{QUANTIFY} -num_parts 2 -part_id 2", "-part_id 2"),
    Row("patterns of DICOM series without --dicom", f"{QUANTIFY} --contrast T1=t1", "add --dicom"),
    Row("a pattern for a channel that the model lacks", f"{DICOM} --contrast FLAR=f", "did you mean FLAIR?"),
    Row("no pattern for a channel", f"{DICOM} --contrast T1=t1", "give the series of FLAIR"),
    Row("DICOM in a folder of NIfTI", f"{DICOM} --contrast T1=t1 --contrast FLAIR=f", "There are no DICOM images"),
    Row(
        "codes of a label that the model lacks",
        f"{DICOM} --codes codes.json",
        "did you mean blob?",
        put_json("codes.json", {"blot": {}}),
    ),
    Row(
        "an entry of codes that does not exist",
        f"{DICOM} --codes codes.json",
        "blob.typ",
        put_json("codes.json", {"blob": {"typ": {}}}),
    ),
    Row(
        "a code without its meaning",
        f"{DICOM} --codes codes.json",
        "it has no blob.type.meaning",
        put_json("codes.json", {"blob": {"type": {"value": "1", "scheme": "SCT"}}}),
    ),
    Row("uncertainty of a model that is not calibrated", f"{QUANTIFY} --uncertainty", "needs a calibrated checkpoint"),
    Row("--coverage in percent", f"{QUANTIFY} --uncertainty --coverage 90", "--coverage"),
    Row(
        "a calibration of another checkpoint",
        f"{QUANTIFY} -chk checkpoint_calibrated.pth",
        "belongs to fold_0/checkpoint_calibrated.pth",
        several(put_json(f"{MODEL}/fold_0/calibration.json", {"thresholds": {"blob": 0.5}}), calibrated),
    ),
    Row(
        "uncertainty from training cases",
        f"{CALIBRATE} --uncertainty --allow_training_cases",
        "leave out --allow_training_cases",
    ),
]

POOL_IMAGE = f"{RAW}/imagesUn/pool_1_0000.nii.gz"
IMAGE_ROWS = [
    Row("an image that links to itself", PREPROCESS, "pool_1", link(POOL_IMAGE, "pool_1_0000.nii.gz")),
    Row("an image that links to nothing", PREPROCESS, "pool_1", link(POOL_IMAGE, "nowhere.nii.gz")),
    Row("an image of complex numbers", PREPROCESS, "complex", image(POOL_IMAGE, CUBE.astype(np.complex64))),
    Row(
        "an image of one voxel",
        PREPROCESS,
        "pool_1",
        several(image(POOL_IMAGE, CUBE[:1, :1, :1]), image(POOL_IMAGE.replace("0000", "0001"), CUBE[:1, :1, :1])),
    ),
    Row(
        "a 2D image",
        PREPROCESS,
        "2",
        several(image(POOL_IMAGE, CUBE[0]), image(POOL_IMAGE.replace("0000", "0001"), CUBE[0])),
    ),
    Row("an image of colours", PREPROCESS, "pool_1", image(POOL_IMAGE, np.ones((4, 4, 4, 3), np.uint8), vector=True)),
    Row("an image cut off", PREPROCESS, "pool_1", cut(POOL_IMAGE)),
    Row("an image of NaN", PREPROCESS, "NaN", image(POOL_IMAGE, np.full(SHAPE, np.nan, np.float32))),
]

FLAG_ROWS = [
    Row("nnUNet_raw empty", PRETRAIN, "nnUNet_raw", environment={"nnUNet_raw": ""}),
    Row("nnUNet_results names a file", PRETRAIN, "nnUNet_results", environment={"nnUNet_results": __file__}),
    Row("-d with ..", PRETRAIN.replace("901", "Dataset901_Tiny/../Dataset901_Tiny"), "not the name of a dataset"),
    Row("-d with a digit of another script", PRETRAIN.replace("-d 901", "-d ²"), "-d ²"),
    Row("-d unknown", PRETRAIN.replace("901", "777"), "-d 777"),
    Row("-p unknown", PRETRAIN.replace("Tiny", "Nothing"), "no plans Nothing"),
    Row("-c unknown", f"{PRETRAIN} -c 3d_nothing", "no configuration 3d_nothing"),
    Row("--batch_size 1000000000", PRETRAIN.replace("size 3", "size 1000000000"), "needs about"),
    Row("--batch_size 10^30", PRETRAIN.replace("size 3", f"size {10**30}"), "--batch_size"),
    Row("--epochs 0", f"{PRETRAIN} --epochs 0", "--epochs"),
    Row("--lr nan", f"{PRETRAIN} --lr nan", "--lr"),
    Row("--mask_ratio 1.5", f"{PRETRAIN} --mask_ratio 1.5", "mask_ratio is 1.5"),
    Row("--seed 2^64", f"{PRETRAIN} --seed {2**64}", "--seed"),
    Row("--seed -1", f"{PRETRAIN} --seed -1", "--seed"),
    Row("--cache 0", f"{PRETRAIN} --cache 0", "--cache"),
    Row("-np -1", f"{PRETRAIN} -np -1", "-np"),
    Row("--mirroring of other axes", f"{PLAN} --mirroring xyw", "finetuning.mirroring"),
    Row("--token 7", f"{PLAN} --token 7", "network.token"),
    Row("--token of two numbers", f"{PLAN} --token 4 4", "--token"),
    Row("--lr -1", f"{PLAN} --lr -1", "--lr"),
    Row("--epochs 1.5", f"{PLAN} --epochs 1.5", "--epochs"),
    Row("-gpu_memory_target inf", f"{PLAN} -gpu_memory_target inf", "-gpu_memory_target"),
    Row("a recipe that is a list", f"{PLAN} --recipe recipe.json", "recipe.json", put_json("recipe.json", [])),
    Row(
        "a recipe with an unknown section",
        f"{PLAN} --recipe recipe.json",
        "unknown keys: net",
        put_json("recipe.json", {"net": {}}),
    ),
    Row(
        "a recipe of NaN",
        f"{PLAN} --recipe recipe.json",
        "finetuning.lr is nan",
        put("recipe.json", '{"finetuning": {"lr": NaN}}'),
    ),
    Row("an encoder of garbage", f"{PLAN} --encoder e.safetensors", "e.safetensors", put("e.safetensors", b"x" * 99)),
    Row("-o of other plans", f"{PLAN}".replace("New", "nnUNetPlans"), "nnUNetPlans.json"),
    Row("-o with ..", f"{PLAN}".replace("New", "../New"), "letters, digits"),
    Row("--seed 2^32", f"{EVALUATE} --seed {2**32}", "--seed"),
    Row("--resamples 0", f"{EVALUATE} --resamples 0", "--resamples"),
    Row(
        "--uncertainty of another table",
        f"{EVALUATE} --uncertainty A=t.csv",
        "is not a table of mae3d_quantify --uncertainty",
        put("t.csv", "case,label\ntest_0,blob\n"),
    ),
    Row("--calibration of a list", f"{EVALUATE} --calibration A=c.json", "c.json", put_json("c.json", [])),
    Row(
        "--calibration of text",
        f"{EVALUATE} --calibration A=c.json",
        "thresholds.blob",
        put_json("c.json", {"thresholds": {"blob": "x"}}),
    ),
    Row("-o of the current folder", EVALUATE.replace("-o report", "-o ."), "already exists: give a new folder"),
    Row("predictions that are missing", EVALUATE.replace(f"A={RAW}/labelsTs", "A=nowhere"), "nowhere"),
    Row("--seed 2^32", f"{SPLIT} --seed {2**32}", "--seed"),
    Row("--stratify without a table", f"{SPLIT} --stratify scanner", "--stratify needs a table"),
    Row("--patient without a table", f"{SPLIT} --patient name", "--patient needs a table"),
    Row("--patient without a table", f"{STUDY} --patient name", "--patient needs a table"),
    Row("a table that is missing", f"{SPLIT} --csv nowhere.csv", "--csv"),
    Row("a table without rows", f"{SPLIT} --csv t.csv", "no rows", put("t.csv", "case,patient\n")),
    Row("a table of garbage", f"{SPLIT} --csv t.csv", "t.csv", put("t.csv", b"\xff\x00\x80" * 9)),
    Row(
        "a table with a row that is too short", f"{SPLIT} --csv t.csv", "row 2", put("t.csv", "case,patient\ntrain_0\n")
    ),
    Row(
        "a table with a field that never ends",
        f"{SPLIT} --csv t.csv",
        "t.csv",
        put("t.csv", 'case,patient\ntrain_0,"' + "x" * 200_000 + "\n"),
    ),
    Row("a table without a case", f"{SPLIT} --csv t.csv", "no row for", put("t.csv", "case,patient\ntrain_0,a\n")),
    Row("--folds 9 of 6 cases", SPLIT.replace("folds 3", "folds 9"), "9"),
    Row("a list that is a folder", f"{SPLIT} --leave_out raw", "--leave_out"),
    Row("--few 99 of 6 cases", STUDY.replace("few 2", "few 99"), "--few 99 is too many"),
    Row("a study that is a list", STUDY, "study.json", put_json("study/study.json", [])),
    Row("a study of a number", STUDY, "study.json", put_json("study/study.json", {"arms": 3, "few": 4})),
    Row("choices that are a list", f"{STUDY} --config c.json", "c.json", put_json("c.json", [])),
    Row("choices with an unknown name", f"{STUDY} --config c.json", "unknown choice", put_json("c.json", {"fold": 3})),
    Row("choices with a list of text", f"{STUDY} --config c.json", "few", put_json("c.json", {"few": ["x"]})),
    Row("an arm with a number", f"{STUDY} --arms a.json", "a.json", put_json("a.json", {"mine": {"trainer": 3}})),
    Row(
        "an arm with text among its settings",
        f"{STUDY} --arms a.json",
        "a.json",
        put_json("a.json", {"mine": {"trainer": "nnUNetTrainerViTMAE", "recipe": {"network": "S"}}}),
    ),
    Row("--few above the patients", f"{STUDY} --few 0", "--few"),
    Row(
        "plans of nnU-Net {}", STUDY, "nnUNetPlans.json", put_json("preprocessed/Dataset901_Tiny/nnUNetPlans.json", {})
    ),
    Row("--omit an unknown contrast", f"{OMIT} --omit CT", "--omit CT"),
    Row("--omit all contrasts", f"{OMIT} --omit T1 FLAIR", "would leave none"),
    Row("a checkpoint of NaN", f"{OMIT} --omit FLAIR", "NaN", saved(CHECKPOINT, nan_weights)),
    Row("--channel 7", f"{REFINE} --channel 7", "0007"),
    Row("--threshold nan", f"{REFINE} --threshold nan", "--threshold"),
    Row("qc.csv of something else", CROP, "qc.csv", put("Dataset902_Crop/qc.csv", "a,b\n1,2\n")),
    Row(
        "qc.csv with text for a number",
        CROP,
        "qc.csv",
        put("Dataset902_Crop/qc.csv", "case,status,coverage\nx,done,much\n"),
    ),
    Row("--margin inf", f"{CROP} --margin inf", "--margin"),
    Row("-o without a number", CROP.replace("Dataset902_Crop", "Crop"), "not named as nnU-Net expects"),
    Row("a folder that is missing", CONVERT, "scans"),
    Row("a pattern without a name", CONVERT.replace("T1=t1", "t1"), "--contrast", put("scans/a.dcm", "x")),
    Row("an output that is in use", f"mae3d_demo -o {RAW}", "already exists"),
    Row("--seed 2^64", f"mae3d_demo -o demo --seed {2**64}", "--seed"),
    Row("an unknown flag", "mae3d_trainers --nothing", "--nothing"),
    Row("an unknown flag", "mae3d_doctor --nothing", "--nothing"),
    Row("an address that is none", f"{PLAN} --encoder hf:vessel", "hf:vessel is not an address on the hub"),
    Row("a fold without an encoder", SHARE.replace("-f 0", "-f 3"), "There is no encoder"),
    Row("an encoder cut off", SHARE, "encoder.safetensors is damaged", cut(f"{RUN}/encoder.safetensors")),
    Row("a public repository without a name", f"{SHARE} --public", "--repo"),
    Row("a repository without an owner", f"{SHARE} --repo vessel", "vessel is not OWNER/NAME"),
    Row("a licence that the hub does not know", f"{SHARE} --licence CC", "CC is not a licence"),
    Row("a model that is not trained", f"{EXPORT} -o model.zip -f 3", "no checkpoint"),
    Row("a checkpoint of NaN", f"{EXPORT} -o new.zip", "NaN", saved(CHECKPOINT, nan_weights)),
    Row("an archive that is missing", "mae3d_import nowhere.zip", "nowhere.zip"),
    Row("an archive cut off", "mae3d_import model.zip", "model.zip", cut("model.zip")),
    Row("an archive of garbage", "mae3d_import model.zip", "model.zip", put("model.zip", b"garbage" * 99)),
]

ROWS = PLANS_ROWS + DATASET_ROWS + SPLIT_ROWS + FILE_ROWS + IMAGE_ROWS + FLAG_ROWS
SECTIONS = {
    "Plans": PLANS_ROWS,
    "dataset.json": DATASET_ROWS,
    "Splits": SPLIT_ROWS,
    "Files that commands write for one another": FILE_ROWS,
    "Images": IMAGE_ROWS,
    "Flags, tables, recipes and studies": FLAG_ROWS,
}


def page() -> str:
    """Return `docs/bad_inputs.md`."""
    lines = [
        "# Mistakes and their sentences",
        "",
        "For those who met an error, or who write scripts around the commands.",
        "",
        "After a mistake, every command ends with exit code 2 and one sentence, which says what is wrong, where, and",
        f"what to do. It changes no file. `tests/test_bad_inputs.py` tries the {len(ROWS)} mistakes in these tables;",
        "their last column is a part of the sentence. `tests/bad_inputs.py` has the whole commands.",
    ]
    for title, rows in SECTIONS.items():
        lines += ["", f"## {title}", "", "| Mistake | Command | The sentence contains |", "|---|---|---|"]
        lines += [f"| {row.what} | `{row.command.split()[0]}` | {_cell(row.words)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(words: str) -> str:
    return f"`{words}`".replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
