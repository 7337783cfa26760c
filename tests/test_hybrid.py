"""The hybrid: nnU-Net's U-Net, which the encoder's map joins through a projection that starts at zero."""

from functools import partial

import pytest
import torch
from conftest import small_unet
from torch import Tensor, nn

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.build import build_segmenter
from nnunet_vit_mae.networks.decoders.unet import matching_stage
from nnunet_vit_mae.networks.memory import finetuning_memory
from nnunet_vit_mae.networks.segmenter import Segmenter
from nnunet_vit_mae.settings import Network

STRIDES = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)]
SHAPE = (8, 16, 24)


unet = partial(small_unet, 2, 3, STRIDES, deep_supervision=True)


def hybrid(token: tuple[int, int, int] = (4, 8, 8)) -> Segmenter:
    torch.manual_seed(0)
    network = Network(size="XS", token=token, decoder="unet")
    return build_segmenter(network, 2, 3, drop_path=0.0, unet=unet)


@pytest.mark.parametrize("supervised", [True, False])
def test_at_the_first_step_it_is_the_u_net(supervised):
    network, volume = hybrid().eval(), torch.randn(2, 2, *SHAPE)
    network.decoder.deep_supervision = supervised
    found, expected = network(volume), network.decoder.unet(volume)
    assert isinstance(found, list) == supervised
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_one_step_of_learning_lets_the_encoder_in():
    network, volume = hybrid(), torch.randn(2, 2, *SHAPE)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        sum(part.square().mean() for part in network(volume)).backward()
        gradients.append(network.encoder.tokenizer.projection.weight.grad.abs().sum())
        optimizer.step()
    assert gradients[0] == 0
    assert gradients[1] > 0


@pytest.mark.parametrize(
    ("token", "stage"), [((4, 8, 8), 3), ((2, 4, 4), 2), ((1, 2, 2), 1), ((8, 8, 8), 3), ((16, 16, 16), 3)]
)
def test_the_map_joins_the_stage_of_the_tokens_stride(token, stage):
    assert matching_stage(unet(), token) == stage


@pytest.mark.parametrize("token", [(8, 8, 8), (4, 4, 8), (16, 16, 16)])
def test_tokens_that_fit_no_stage_or_reach_out_of_the_volume_work(token):
    """The outputs at all resolutions have the sizes of nnU-Net's targets."""
    shapes = [tuple(part.shape[2:]) for part in hybrid(token)(torch.randn(1, 2, *SHAPE))]
    assert shapes == [(8, 16, 24), (8, 8, 12), (4, 4, 6)]


def joined(network: Segmenter, token: int) -> tuple[Tensor, Tensor]:
    """Return what the change of a token adds to the features of the U-Net (f z y x), and what it adds to the map."""
    decoder, given = network.decoder, []
    nn.init.normal_(decoder.projection.weight)
    encoded = network.encoder.encode(torch.randn(1, 2, *SHAPE), ())
    other = encoded._replace(tokens=encoded.tokens.clone())
    other.tokens[0, token] += 1
    decoder.unet.decoder.register_forward_pre_hook(lambda _, features: given.append(features[0][decoder.stage][0]))
    for one in (encoded, other):
        decoder(one)
    return given[1] - given[0], decoder.projection.weight.sum(dim=1).flatten()


@torch.no_grad()
def test_a_token_joins_the_features_of_its_place():
    added, change = joined(hybrid(), token=4)
    expected = torch.zeros(len(change), 2, 2, 3)
    expected[:, 0, 1, 1] = change  # (0 * 2 + 1) * 3 + 1 = 4
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_map_of_large_tokens_is_interpolated_and_what_lies_behind_the_volume_is_cut_off():
    """Two tokens of 16 voxels along x are four places of the U-Net, of which a volume of 24 voxels has three."""
    added, change = joined(hybrid((16, 16, 16)), token=1)
    expected = change[:, None, None, None] * torch.tensor([0, 0.25, 0.75])
    torch.testing.assert_close(added, expected.expand(-1, 2, 2, -1), atol=1e-5, rtol=1e-5)


def test_its_memory_can_be_estimated():
    network = Network(size="XS", token=(4, 8, 8), decoder="unet")
    one, two = (finetuning_memory(network, SHAPE, 2, 3, batch, unet=unet) for batch in (1, 2))
    assert 0 < one < two


def test_it_needs_a_u_net_and_stacked_channels():
    with pytest.raises(ValueError, match="U-Net"):
        build_segmenter(Network(size="XS", decoder="unet"), 2, 3, drop_path=0.0)
    with pytest.raises(UserError, match=r"network\.decoder"):
        Network(size="XS", decoder="unet", adaptive=True)
