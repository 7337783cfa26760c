"""The convolutional tokenizer: it never looks beyond a token's cube, and its maps are put together in their places."""

import math

import pytest
import torch

from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.blueprint import Blueprint
from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.tokenizer import ConvolutionalTokenizer, doublings, patchify, unpatchify
from nnunet_vit_mae.settings import Network, Pretraining, token_grid

TOKEN = (2, 4, 8)
SHAPE = (5, 11, 27)
GRID = (3, 3, 4)
NETWORK = Network(size="XS", token=TOKEN, tokenizer="convolutional")


def tokenizer(channels: int = 2) -> ConvolutionalTokenizer:
    torch.manual_seed(0)
    return ConvolutionalTokenizer(channels, TOKEN, 30, narrowest=4)


def test_a_token_depends_on_its_own_cube_alone():
    volume = torch.randn(1, 2, *SHAPE, requires_grad=True)
    tokens = tokenizer()(patchify(volume, TOKEN))
    number = 17
    tokens[0, number].sum().backward()
    reached = volume.grad.ne(0).float()
    own = torch.zeros(1, math.prod(GRID), 2, math.prod(TOKEN))
    own[:, number] = 1
    z, y, x = SHAPE
    assert torch.equal(reached, unpatchify(own, GRID, TOKEN)[..., :z, :y, :x])


def test_no_gradient_of_the_loss_reaches_a_hidden_voxel_of_the_input():
    """Nothing of a masked token leaks into the prediction: the loss depends on it as a target alone."""
    network = build_autoencoder(NETWORK, 2, Pretraining(mask_ratio=0.5))
    volume = torch.randn(2, 2, *SHAPE, requires_grad=True)
    masks = Masking(mask_ratio=0.5).draw(torch.rand(2, math.prod(GRID)))
    rebuilt = network(volume, masks)
    reconstruction_loss(rebuilt._replace(targets=rebuilt.targets.detach()), norm_pix=False).backward()
    gradient = patchify(volume.grad, TOKEN).abs().sum(dim=(2, 3))
    assert not gradient.gather(1, masks.hidden).any()
    assert gradient.gather(1, masks.visible).all()


def test_visible_tokens_are_embedded_as_all_of_them_are():
    patches = patchify(torch.randn(2, 2, *SHAPE), TOKEN)
    embed = tokenizer().eval()
    chosen = torch.tensor([3, 30, 8])
    torch.testing.assert_close(embed(patches[:, chosen]), embed(patches)[:, chosen], atol=1e-6, rtol=1e-5)


def test_maps_have_the_volume_in_its_place():
    """With an identity in place of the blocks, the finest map is the entry convolution of each cube."""
    embed = tokenizer(1)
    with torch.no_grad():
        embed.entry.weight.zero_()
        embed.entry.weight[:, :, 1, 1, 1] = 1
        embed.entry.bias.zero_()
        for block in embed.blocks:
            block.second.weight.zero_()
            block.second.bias.zero_()
    volume = torch.randn(2, 1, 6, 12, 32)
    _, maps = embed.with_maps(patchify(volume, TOKEN), GRID)
    torch.testing.assert_close(maps[0], volume.expand(-1, 4, -1, -1, -1))
    assert [tuple(entry.shape[1:]) for entry in maps] == [(4, 6, 12, 32), (8, 6, 12, 16), (16, 6, 6, 8)]
    assert doublings(TOKEN)[::-1] == [(1, 1, 2), (1, 2, 2), (2, 2, 2)]


@pytest.mark.parametrize("decoder", ["unetr", "sfpn", "upscale"])
def test_convolutional_decoders_use_the_maps(decoder):
    network = build_segmenter(
        Network(size="XS", token=TOKEN, tokenizer="convolutional", decoder=decoder), 2, 3, drop_path=0.0
    )
    network(torch.randn(2, 2, *SHAPE)).square().mean().backward()
    joins = [p for name, p in network.named_parameters() if ".joins." in name]
    assert len(joins) == 2 * 3
    assert all(p.grad.any() for p in network.parameters())


def test_a_tokenizer_without_halvings_embeds_single_voxels():
    embed = ConvolutionalTokenizer(1, (1, 1, 1), 12, narrowest=4)
    assert embed(torch.randn(2, 5, 1, 1)).shape == (2, 5, 12)


@pytest.mark.parametrize("decoder", ["unetr", "sfpn", "upscale", "mae"])
def test_tokens_of_single_voxels_have_their_map_too(decoder):
    chosen = Network(size="XS", token=(1, 1, 1), tokenizer="convolutional", decoder=decoder)
    network = build_segmenter(chosen, 2, 3, drop_path=0.0)
    logits = network(torch.randn(2, 2, 2, 3, 4))
    assert logits.shape == (2, 3, 2, 3, 4)
    logits.square().mean().backward()
    assert all(p.grad.any() for p in network.parameters())


def test_pretraining_and_fine_tuning_share_the_encoder():
    encoder = build_autoencoder(NETWORK, 2, Pretraining()).encoder.state_dict()
    build_segmenter(NETWORK, 2, 3, drop_path=0.1).encoder.load_state_dict(encoder)
    assert any(name.startswith("tokenizer.blocks") for name in encoder)
    assert token_grid(SHAPE, TOKEN) == GRID


def test_the_widths_of_the_maps_are_known_without_a_tokenizer():
    """Building one would draw random numbers, which the weights of a seed depend on."""
    blueprint, before = Blueprint(network=NETWORK, channels=2), torch.get_rng_state()
    widths = blueprint.stem_widths
    assert torch.equal(torch.get_rng_state(), before)
    volume = torch.randn(1, 2, *(side * tokens for side, tokens in zip(TOKEN, GRID, strict=True)))
    maps = blueprint.tokenizer().with_maps(patchify(volume, TOKEN), GRID)[1]
    assert widths == tuple(one.shape[1] for one in maps)
