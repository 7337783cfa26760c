"""Encoders of other projects: the same features as in their own modules, and a refusal for what cannot be the same."""

import argparse
import dataclasses
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import MaskedAutoEncoderViT, ViT
from safetensors.torch import save_file
from test_weights import make_card
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from nnunet_vit_mae.cli import plan as plan_command
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.foreign import monai_vit, primus, timm_vit
from nnunet_vit_mae.foreign.checkpoints import is_foreign
from nnunet_vit_mae.foreign.conversion import Target, convert_checkpoint
from nnunet_vit_mae.foreign.parts import ConvertedEncoder, cube_root, mlp_tensors
from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder, build_encoder, build_segmenter
from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.positions import PositionTable
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.plans import load_plan
from nnunet_vit_mae.optimisation import parameter_groups
from nnunet_vit_mae.presets import SIZES, Size
from nnunet_vit_mae.settings import Network, Pretraining, Settings
from nnunet_vit_mae.transfer import Destination, adapt_encoder
from nnunet_vit_mae.weights import read_encoder, save_encoder

WIDTH, DEPTH, HEADS = 48, 2, 2
SIDE = 4  # voxels of a token
TARGET = Target(patch_size=(8, 32, 32), spacing=(1.0, 1.0, 1.0))
PATTERNS = {"yzx": "b c z y x -> b (y z x) c", "zyx": "b c z y x -> b (z y x) c"}


@pytest.fixture(autouse=True, scope="module")
def _tiny_size():
    """A size for tests, with heads of 24, which rotary positions of three axes fill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "Tiny", Size(WIDTH, DEPTH, HEADS, WIDTH, 1, HEADS))
        yield


def scrambled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give all parameters, norms and biases too, random values of their own size."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        deviation = 0.2 if parameter.ndim < 3 else 0.05
        parameter.data += deviation * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def make_primus(grid: tuple[int, int, int], order: str = "zyx", **changes) -> Primus:
    """A Primus for a grid (z y x), whose tokens are flattened in an order."""
    z, y, x = grid
    shape = (y, z, x) if order == "yzx" else grid
    options = {"init_values": 0.1, "scale_attn_inner": True} | changes
    return scrambled(
        Primus(1, WIDTH, (SIDE,) * 3, 2, DEPTH, HEADS, input_shape=tuple(SIDE * side for side in shape), **options)
    )


def checkpoint_of(network: nn.Module, patch: list[int] | None = None, **changes) -> dict:
    """What nnssl saves."""
    plan = {
        "architecture_plans": {"arch_class_name": "PrimusM", "arch_kwargs": None, "arch_kwargs_requiring_import": None},
        "pretrain_plan": {
            "dataset_name": "Dataset745_OpenMind",
            "configurations": {
                "onemmiso": {
                    "spacing": [1, 1, 1],
                    "patch_size": patch or [16, 16, 16],
                    "normalization_schemes": ["ZScoreNormalization"],
                }
            },
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": patch or [16, 16, 16],
        "key_to_encoder": "eva",
        "key_to_stem": "down_projection",
        "keys_to_in_proj": ["down_projection.proj"],
        "key_to_lpe": "eva.pos_embed",
    }
    return {"network_weights": network.state_dict(), "nnssl_adaptation_plan": plan | changes}


def primus_features(network: Primus, volume: Tensor, order: str) -> Tensor:
    """The features (b d z y x) of a Primus that flattens its tokens in an order."""
    embedded = network.down_projection(volume)
    z, y, x = embedded.shape[2:]
    back, forth = PATTERNS[order].split(" -> ")
    features, _ = network.eva(rearrange(embedded, PATTERNS[order]))
    return rearrange(features, f"{forth} -> {back}", z=z, y=y, x=x)


def encoder_from(conversion: ConvertedEncoder) -> Encoder:
    block = {"size": conversion.size, "token": conversion.token} | conversion.network
    encoder = build_encoder(Settings.from_dict({"network": block}).network, len(conversion.channel_names))
    encoder.load_state_dict(conversion.tensors)
    return encoder.eval()


def features_of(encoder: Encoder, volume: Tensor) -> Tensor:
    encoded = encoder.encode(volume, ())
    z, y, x = encoded.grid
    return rearrange(encoded.tokens, "b (z y x) d -> b d z y x", z=z, y=y, x=x)


def volume_of(grid: tuple[int, int, int], side: int = SIDE, channels: int = 1) -> Tensor:
    z, y, x = (side * tokens for tokens in grid)
    return torch.randn(2, channels, z, y, x, generator=torch.Generator().manual_seed(7))


def assert_equal_features(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert theirs.std() > 0.1


# ---------- Primus, as nnssl saves it


@torch.no_grad()
@pytest.mark.parametrize(
    ("grid", "order"),
    [((4, 4, 4), "yzx"), ((3, 3, 2), "yzx"), ((4, 4, 4), "zyx"), ((2, 3, 4), "zyx"), ((3, 1, 2), "zyx")],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"init_values": None, "scale_attn_inner": False}, {"init_values": None}, {"use_abs_pos_embed": False}],
    ids=["V1 of nnssl", "V1 of the first paper", "no scale", "no learned positions"],
)
def test_features_are_those_of_primus(grid, order, options):
    network = make_primus(grid, order, **options)
    checkpoint = checkpoint_of(network, [SIDE * side for side in grid])
    encoder, volume = encoder_from(primus.convert_primus(checkpoint, order=order)), volume_of(grid)
    assert_equal_features(features_of(encoder, volume), primus_features(network, volume, order))


@torch.no_grad()
@settings(max_examples=15)
@given(grid=st.tuples(*[st.integers(1, 4)] * 3), order=st.sampled_from(["yzx", "zyx"]), seed=st.integers(0, 99))
def test_rotary_positions_alone_fit_any_grid_in_either_order(grid, order, seed):
    network = scrambled(make_primus(grid, order, use_abs_pos_embed=False), seed)
    encoder, volume = encoder_from(primus.convert_primus(checkpoint_of(network), order=order)), volume_of(grid)
    assert_equal_features(features_of(encoder, volume), primus_features(network, volume, order))


@torch.no_grad()
def test_the_wrong_order_gives_other_features():
    network, volume = make_primus((4, 4, 4), "yzx"), volume_of((4, 4, 4))
    ours = features_of(encoder_from(primus.convert_primus(checkpoint_of(network), order="zyx")), volume)
    assert (ours - primus_features(network, volume, "yzx")).abs().max() > 0.1


@torch.no_grad()
def test_register_tokens_take_part():
    network, volume = make_primus((2, 3, 4), num_register_tokens=3), volume_of((2, 3, 4))
    embedded = rearrange(network.down_projection(volume), PATTERNS["zyx"])
    tokens = torch.cat([network.register_tokens.expand(2, -1, -1), embedded], dim=1)
    theirs = network.eva(tokens)[0][:, 3:]
    conversion = primus.convert_primus(checkpoint_of(network, [8, 12, 16]), order="zyx")
    assert conversion.network["register_tokens"] == 3
    encoder = encoder_from(conversion)
    assert_equal_features(encoder.encode(volume, ()).tokens, theirs)
    assert [level.shape[1] for level in encoder.encode(volume, (1, 2)).hidden] == [24, 24]


def test_what_the_card_of_a_primus_says():
    conversion = primus.convert_primus(checkpoint_of(make_primus((4, 4, 4), "yzx")))
    assert (conversion.size, conversion.token, conversion.dataset) == ("Tiny", [4, 4, 4], "Dataset745_OpenMind")
    assert conversion.network == {
        "blocks": "modern",
        "rotary_base": 10_000.0,
        "position_unit": "token",
        "norm_eps": 1e-5,
        "tokenizer": "linear",
        "positions": "both",
        "learned_positions": [4, 4, 4],
        "register_tokens": 0,
    }
    assert (conversion.patch_size, conversion.spacing) == ([16, 16, 16], [1.0, 1.0, 1.0])
    assert conversion.notes[0] == (
        "Tokens are in the order y z x there (as in nnssl's EvaMAE), z y x here: positions are transposed."
    )
    assert conversion.notes[-1].endswith("tensors are used; left out: mask_token, up_projection.")


@pytest.mark.parametrize(("trainer", "order"), [("BaseEvaMAETrainer", "y z x"), ("SimMIMEvaTrainer_BS8", "z y x")])
def test_the_trainer_of_nnssl_decides_the_order(trainer, order):
    checkpoint = checkpoint_of(make_primus((4, 4, 4))) | {"trainer_name": trainer}
    assert f"order {order} there" in primus.convert_primus(checkpoint).notes[0]


def test_a_convolutional_stem_stays_behind_and_is_said():
    network = scrambled(PrimusV2(1, WIDTH, (8, 8, 8), 2, DEPTH, HEADS, input_shape=(16, 16, 16)))
    conversion = primus.convert_primus(checkpoint_of(network))
    assert conversion.token == [8, 8, 8]
    assert not any(name.startswith("tokenizer.") for name in conversion.tensors)
    assert "tokenizer" not in conversion.network
    assert any("convolutional stem" in note for note in conversion.notes)


def test_a_grid_on_which_rotary_positions_are_misplaced_is_refused():
    network = make_primus((2, 3, 4), "yzx")
    with pytest.raises(UserError, match="2 x 3 x 4 tokens in the order y z x"):
        primus.convert_primus(checkpoint_of(network, [8, 12, 16]))


def test_positions_of_an_unknown_grid_are_left_out_and_said():
    conversion = primus.convert_primus(checkpoint_of(make_primus((2, 3, 4)), [16, 16, 16]), order="zyx")
    assert conversion.network["learned_positions"] == []
    assert any("24 fill no known grid" in note for note in conversion.notes)


@given(heads=st.integers(1, 4), frequencies=st.integers(1, 5), axes=st.permutations([0, 1, 2]))
def test_rotary_rows_are_a_permutation_within_each_head(heads, frequencies, axes):
    head_width = 6 * frequencies
    rows = primus.rotary_rows(heads * head_width, heads, tuple(axes)).reshape(heads, head_width)
    assert (rows.sort(dim=1).values == torch.arange(heads * head_width).reshape(heads, head_width)).all()
    assert (rows[:, head_width // 2 :] == rows[:, : head_width // 2] + 1).all()  # a pair's second is its neighbour


# ---------- timm


def make_timm(**changes) -> VisionTransformer:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS} | changes
    return scrambled(VisionTransformer(**options))


@torch.no_grad()
@pytest.mark.parametrize("token_depth", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"reg_tokens": 2, "init_values": 0.1},
        {"reg_tokens": 2, "no_embed_class": True},
        {"qkv_bias": False},
        {"mlp_ratio": 2},
    ],
    ids=["plain", "no class token", "registers and scales", "registers without positions", "no bias", "narrow MLP"],
)
def test_features_of_a_grey_picture_are_those_of_timm(token_depth, options):
    network, picture = make_timm(**options), torch.randn(2, 1, 32, 32)
    theirs = network.forward_features(picture.expand(-1, 3, -1, -1))[:, network.num_prefix_tokens :]
    target = {"patch_size": (token_depth, 32, 32), "spacing": (1.0, 1.0, 1.0), "token_depth": token_depth}
    encoder = encoder_from(timm_vit.convert_timm_vit({"model": network.state_dict()}, **target))
    volume = picture[:, :, None].expand(-1, -1, token_depth, -1, -1)
    assert_equal_features(encoder.encode(volume, ()).tokens, theirs)


def test_positions_are_repeated_along_z():
    conversion = timm_vit.convert_timm_vit(make_timm().state_dict(), patch_size=(24, 32, 32), spacing=(1.0, 1.0, 1.0))
    assert (conversion.token, conversion.network["learned_positions"]) == ([8, 8, 8], [3, 4, 4])
    table = conversion.tensors["position_table.values"]
    assert (table == table[:1]).all()


def test_a_norm_of_queries_and_keys_is_refused():
    with pytest.raises(UserError, match=r"no place for \(blocks.0.attn.q_norm.weight"):
        timm_vit.convert_timm_vit(make_timm(qk_norm=True).state_dict(), patch_size=(8, 32, 32), spacing=(1.0, 1.0, 1.0))


@given(st.sampled_from([8, 16]), st.floats(0.2, 10), st.floats(0.2, 2))
def test_the_depth_of_a_token_is_a_known_side(side, z, y):
    assert timm_vit.cubic_depth(side, (z, y, y)) in (1, 2, 4, 8, 16, 32)


# ---------- MONAI


def monai_features(network: nn.Module, volume: Tensor) -> Tensor:
    """The features (b n d) in the order z y x of a network that reads x y z."""
    swapped = volume.permute(0, 1, 4, 3, 2)
    if isinstance(network, ViT):
        tokens = network(swapped)[0]
    else:
        embedded = network.patch_embedding(swapped)
        tokens = network.blocks(torch.cat([network.cls_token.expand(2, -1, -1), embedded], dim=1))[:, 1:]
    x, y, z = (voxels // SIDE for voxels in swapped.shape[2:])
    return rearrange(tokens, "b (x y z) d -> b (z y x) d", x=x, y=y, z=z)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize("projection", ["conv", "perceptron"])
@pytest.mark.parametrize("kind", [ViT, MaskedAutoEncoderViT])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "pos_embed_type": "learnable"}], ids=["default", "biases"])
def test_features_are_those_of_monai(projection, kind, options):
    sizes = {"hidden_size": WIDTH, "mlp_dim": 4 * WIDTH - 50, "num_layers": DEPTH, "num_heads": HEADS}
    if kind is MaskedAutoEncoderViT:
        sizes |= {"decoder_hidden_size": WIDTH, "decoder_num_layers": 1, "decoder_num_heads": HEADS}
        if "pos_embed_type" not in options:
            options = options | {"pos_embed_type": "sincos"}
    network = scrambled(kind(2, (3 * SIDE,) * 3, SIDE, proj_type=projection, **sizes, **options))
    conversion = monai_vit.convert_monai_vit(network.state_dict())
    volume = volume_of((3, 3, 3), channels=2)
    assert_equal_features(encoder_from(conversion).encode(volume, ()).tokens, monai_features(network, volume))


def test_positions_of_monai_that_fill_no_cube_are_left_out_and_said():
    network = ViT(1, (8, 12, 16), SIDE, WIDTH, 4 * WIDTH, DEPTH, HEADS)
    conversion = monai_vit.convert_monai_vit(network.state_dict())
    assert conversion.network["learned_positions"] == []
    assert any("24 fill no cube" in note for note in conversion.notes)


def test_positions_of_monai_that_are_taken_for_a_cubes_are_said():
    network = ViT(1, (2 * SIDE, 4 * SIDE, 8 * SIDE), SIDE, WIDTH, 4 * WIDTH, DEPTH, HEADS)
    conversion = monai_vit.convert_monai_vit(network.state_dict())
    assert conversion.network["learned_positions"] == [4, 4, 4]
    assert any("64 positions are taken for a cube of 4 x 4 x 4 tokens" in note for note in conversion.notes)


@torch.no_grad()
def test_where_the_weights_of_monai_fit_two_numbers_of_channels_both_are_said_and_the_token_chooses():
    network = scrambled(ViT(8, (12,) * 3, SIDE, WIDTH, 4 * WIDTH, DEPTH, HEADS, proj_type="perceptron"))
    conversion = monai_vit.convert_monai_vit(network.state_dict())
    assert (conversion.token, len(conversion.channel_names)) == ([2 * SIDE] * 3, 1)
    said = f"1 with tokens of {2 * SIDE} voxels a side are assumed, though 8 with tokens of {SIDE} fit too"
    assert any(said in note and f"--token {SIDE} chooses" in note for note in conversion.notes)
    chosen = monai_vit.convert_monai_vit(network.state_dict(), token=[SIDE] * 3)
    assert (chosen.token, len(chosen.channel_names)) == ([SIDE] * 3, 8)
    volume = volume_of((3, 3, 3), channels=8)
    assert_equal_features(encoder_from(chosen).encode(volume, ()).tokens, monai_features(network, volume))


@torch.no_grad()
def test_a_token_of_monai_that_is_no_cube_is_taken_as_it_is_given():
    """Its weights are those of four channels with cubes, too, which is said where no token is given."""
    sides = (SIDE, 2 * SIDE, 2 * SIDE)
    network = ViT(1, [3 * side for side in sides[::-1]], sides[::-1], WIDTH, 4 * WIDTH, DEPTH, HEADS, "perceptron")
    network = scrambled(network)
    given = monai_vit.convert_monai_vit(network.state_dict(), token=sides)
    assert (given.token, len(given.channel_names)) == (list(sides), 1)
    assert not any("Channels" in note for note in given.notes)
    swapped = torch.randn(2, 1, *(3 * side for side in sides)).permute(0, 1, 4, 3, 2)
    expected = rearrange(network(swapped)[0], "b (x y z) d -> b (z y x) d", x=3, y=3, z=3)
    found = encoder_from(given).encode(swapped.permute(0, 1, 4, 3, 2), ()).tokens
    assert_equal_features(found, expected)
    assumed = monai_vit.convert_monai_vit(network.state_dict())
    assert (assumed.token, len(assumed.channel_names)) == ([SIDE] * 3, 4)
    assert any(f"4 with tokens of {SIDE} voxels a side are assumed; --token" in note for note in assumed.notes)
    with pytest.raises(UserError, match="which no number of channels up to 8 makes of 8 x 8 x 8 voxels"):
        monai_vit.convert_monai_vit(network.state_dict(), token=[8] * 3)


# ---------- parts


@given(st.integers(1, 60))
def test_cube_roots_are_exact(side):
    assert cube_root(side**3) == side
    assert cube_root(side**3 + 1) == 0


def test_a_wider_mlp_is_refused():
    layers = (torch.ones(9, 2), torch.ones(9)), (torch.ones(2, 9), torch.ones(2))
    with pytest.raises(UserError, match="9 features wide, more than 4 x 2"):
        mlp_tensors(*layers)


@settings(max_examples=20)
@given(grid=st.tuples(*[st.integers(1, 5)] * 3), other=st.tuples(*[st.integers(1, 5)] * 3))
def test_a_position_table_is_itself_on_its_grid_and_within_its_range_on_others(grid, other):
    table = PositionTable(grid, 6)
    assert torch.equal(table(grid), table.values.flatten(0, 2))
    assert table(other).shape == (other[0] * other[1] * other[2], 6)
    assert table(other).min() >= table.values.min() - 1e-6
    assert table(other).max() <= table.values.max() + 1e-6


def test_learned_positions_and_registers_learn_in_pretraining_and_finetuning():
    block = {"size": "Tiny", "token": [4, 4, 4], "learned_positions": [2, 2, 2], "register_tokens": 2}
    network = Settings.from_dict({"network": block | {"positions": "both", "decoder": "upscale"}}).network
    autoencoder, volume = build_autoencoder(network, 1, Pretraining(mask_ratio=0.5)), volume_of((2, 3, 4))
    masking = Masking(mask_ratio=0.5, rebuilt_share=1.0)
    masks = masking.rounds(masking.draw(torch.ones(2, 24)))[0]
    reconstruction_loss(autoencoder(volume, masks), norm_pix=True).backward()
    segmenter = build_segmenter(network, 1, 2, drop_path=0.0)
    segmenter(volume).square().mean().backward()
    for name in ("position_table.values", "register_tokens"):
        for learner in (autoencoder, segmenter):
            assert learner.encoder.get_parameter(name).grad.abs().max() > 0
    groups = parameter_groups(segmenter.named_parameters(), weight_decay=0.1, layer_decay=0.5, depth=DEPTH)
    own = [group for group in groups if any(p is segmenter.encoder.register_tokens for p in group["params"])]
    assert [(group["weight_decay"], group["lr_scale"]) for group in own] == [(0.0, 0.5**3)]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"learned_positions": [4, 4]}, "network.learned_positions"),
        ({"learned_positions": [4, 4, 0]}, "network.learned_positions"),
        ({"learned_positions": [4, 4, 4], "adaptive": True, "decoder": "unetr"}, "network.learned_positions"),
        ({"register_tokens": 1, "adaptive": True, "decoder": "unetr"}, "network.register_tokens"),
        ({"register_tokens": -1}, "network.register_tokens"),
        ({"norm_eps": 0}, "network.norm_eps"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, name):
    with pytest.raises(UserError, match=name):
        Settings.from_dict({"network": changes})


# ---------- files


def convert(file: Path) -> tuple[dict[str, Tensor], object]:
    return convert_checkpoint(file, TARGET)


def saved(content: object, file: Path) -> Path:
    torch.save(content, file)
    return file


def test_each_kind_is_told_by_its_names(tmp_path):
    made = {
        "nnssl": checkpoint_of(make_primus((4, 4, 4))),
        "timm": {"module." + name: tensor for name, tensor in make_timm().state_dict().items()},
        "MONAI": {"state_dict": ViT(1, (8, 8, 8), SIDE, WIDTH, 4 * WIDTH, DEPTH, HEADS).state_dict()},
    }
    for kind, content in made.items():
        _, card = convert(saved(content, tmp_path / f"{kind}.pth"))
        assert card.source.startswith(f"{kind} (")
        assert card.origin.startswith(f"converted from {kind}")


def test_a_timm_file_in_safetensors_is_the_same(tmp_path):
    state = make_timm().state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    one, other = convert(tmp_path / "vit.safetensors")[0], convert(saved(state, tmp_path / "vit.pth"))[0]
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_ours_are_not_foreign(tmp_path):
    network = Network(size="XS", token=(2, 4, 8))
    save_encoder(build_encoder(network, 2), make_card(), tmp_path / "ours.safetensors")
    assert not is_foreign(tmp_path / "ours.safetensors")
    assert not is_foreign(tmp_path / "missing.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"")
    assert not is_foreign(tmp_path / "broken.safetensors")


def plan_without(key: str) -> dict:
    checkpoint = checkpoint_of(make_primus((4, 4, 4)))
    del checkpoint["nnssl_adaptation_plan"][key]
    return checkpoint


def with_nan() -> dict:
    checkpoint = checkpoint_of(make_primus((4, 4, 4)))
    checkpoint["network_weights"]["eva.norm.weight"][0] = torch.nan
    return checkpoint


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: [1, 2], "holds a list"),
        (lambda: {"a": torch.ones(2)}, "it cannot be converted"),
        (lambda: {}, "it cannot be converted"),
        (lambda: checkpoint_of(make_primus((4, 4, 4))) | {"args": argparse.Namespace(lr=1)}, "never unpickled"),
        (lambda: checkpoint_of(nn.Conv3d(1, 2, 3)), r"\(PrimusM\) is not a Primus"),
        (lambda: plan_without("key_to_encoder"), "does not name key_to_encoder"),
        (with_nan, "NaN or Inf in transformer.norm.weight"),
        (lambda: make_timm(embed_dim=36).state_dict(), "width 36 with 2 blocks is none of our sizes"),
        (lambda: make_timm(img_size=28, patch_size=14).state_dict(), "tokens of .* have sides other than"),
        (lambda: make_timm(mlp_ratio=5).state_dict(), "240 features wide"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path, content, reason):
    file = saved(content(), tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=reason) as caught:
        convert(file)
    assert str(caught.value).count(str(file)) == 1
    assert str(caught.value).endswith(".")


CHANGES = {
    "removed": lambda tensor: None,
    "no elements": lambda tensor: tensor[:0],
    "a scalar": lambda tensor: torch.tensor(1.0),
    "flat": lambda tensor: tensor.flatten(),
    "an axis more": lambda tensor: tensor[None],
    "longer": lambda tensor: torch.cat([tensor, tensor]),
    "integers": lambda tensor: tensor.long(),
    "text": lambda tensor: "text",
}


@pytest.mark.parametrize("kind", ["nnssl", "timm", "MONAI"])
def test_whatever_a_tensor_is_there_is_an_encoder_or_a_sentence(tmp_path, kind):
    content = {
        "nnssl": lambda: checkpoint_of(make_primus((4, 4, 4)))["network_weights"],
        "timm": lambda: make_timm().state_dict(),
        "MONAI": lambda: ViT(1, (8, 8, 8), SIDE, WIDTH, 4 * WIDTH, DEPTH, HEADS).state_dict(),
    }[kind]()
    plan = checkpoint_of(make_primus((4, 4, 4))) if kind == "nnssl" else {}
    for name in (name for name in content if "blocks.1" not in name):
        for change in CHANGES.values():
            other = content | {name: change(content[name])}
            file = saved(plan | {"network_weights": other}, tmp_path / "checkpoint.pth")
            with suppress(UserError):
                convert(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture_plans": [1]},
        {"pretrain_plan": "text"},
        {"pretrain_plan": {"configurations": {"a": {"spacing": [math.nan, 1, 1]}}}},
        {"pretrain_plan": {"configurations": {"a": {"patch_size": ["big"]}}}},
        {"pretrain_plan": {"configurations": {"a": {"normalization_schemes": [1]}}}},
        {"pretrain_num_input_channels": 10**12, "key_to_stem": "stem"},
        {"pretrain_num_input_channels": "one", "key_to_stem": "stem"},
        {"key_to_encoder": ["eva"]},
    ],
)
def test_a_plan_of_nnssl_of_another_form_is_refused(tmp_path, changes):
    checkpoint = checkpoint_of(make_primus((4, 4, 4)), **changes)
    if changes.get("key_to_stem") == "stem":  # only where there is no kernel is the plan asked for channels
        checkpoint["network_weights"].pop("down_projection.proj.weight")
    file = saved(checkpoint, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"checkpoint\.pth"):
        convert(file)


@given(content=st.binary(max_size=60))
def test_any_bytes_are_refused(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("bytes") / "checkpoint.pth"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint\.pth"):
        convert(file)


def test_an_order_is_only_for_nnssl(tmp_path):
    file = saved(make_timm().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="order of tokens is only asked for with checkpoints of nnssl"):
        convert_checkpoint(file, dataclasses.replace(TARGET, token_order="zyx"))


def test_a_converted_encoder_is_refused_for_other_blocks(tmp_path):
    tensors, card = convert(saved(checkpoint_of(make_primus((4, 4, 4))), tmp_path / "checkpoint.pth"))
    entries = {field.name: getattr(card, field.name) for field in dataclasses.fields(Destination)}
    assert adapt_encoder(tensors, card, Destination(**entries))[1] == []
    other = card.network | {"blocks": "vit", "rotary_base": 100.0}
    with pytest.raises(UserError, match=r"rotary_base 10000.0 there, 100.0 here|blocks modern there, vit here"):
        adapt_encoder(tensors, card, Destination(**(entries | {"network": other})))


# ---------- the command


@pytest.mark.slow
def test_plans_and_trainer_take_a_checkpoint_of_nnssl(in_workspace, tmp_path, capsys, refused):
    from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerViTMAE

    file = saved(checkpoint_of(make_primus((4, 4, 4), "yzx")), tmp_path / "checkpoint_final.pth")
    plan_command.main(f"-d 901 -o Foreign --encoder {file} --decoder upscale".split())
    printed = capsys.readouterr().out
    assert "y z x there" in printed
    plan = load_plan(find_dataset("901"), "Foreign", "3d_fullres")
    network = plan.settings.network
    assert (network.size, network.token, network.blocks, network.learned_positions) == (
        "Tiny",
        (4, 4, 4),
        "modern",
        (4, 4, 4),
    )
    written = in_workspace.preprocessed / "encoders" / "Foreign__3d_fullres.safetensors"
    assert plan.settings.encoder.file == str(written)
    tensors, card = read_encoder(written)
    assert card.network == network.encoder_settings

    plans = plan.plans.plans | {"continue_training": False}
    trainer = nnUNetTrainerViTMAE(plans, "3d_fullres", 0, plan.dataset_json, torch.device("cpu"))
    trainer.initialize()
    own = trainer.segmenter.encoder.state_dict()
    assert torch.equal(
        own["transformer.blocks.1.attention.qkv.weight"], tensors["transformer.blocks.1.attention.qkv.weight"]
    )
    assert own["tokenizer.projection.weight"].shape == (WIDTH, 2 * SIDE**3)

    before = sorted(in_workspace.preprocessed.rglob("*"))
    for arguments in (
        f"--encoder {file} --size S",
        f"--encoder {saved([1], tmp_path / 'list.pth')}",
        "--token_order zyx",
    ):
        assert refused(plan_command.main, *f"-d 901 -o Other {arguments}".split())
    assert sorted(in_workspace.preprocessed.rglob("*")) == before
