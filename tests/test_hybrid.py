"""The hybrid: nnU-Net's U-Net, which the encoder's map joins through a projection that starts at zero."""

from functools import partial

import pytest
import torch
from conftest import small_unet

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


def test_its_memory_can_be_estimated():
    network = Network(size="XS", token=(4, 8, 8), decoder="unet")
    one, two = (finetuning_memory(network, SHAPE, 2, 3, batch, unet=unet) for batch in (1, 2))
    assert 0 < one < two


def test_it_needs_a_u_net_and_stacked_channels():
    with pytest.raises(ValueError, match="U-Net"):
        build_segmenter(Network(size="XS", decoder="unet"), 2, 3, drop_path=0.0)
    with pytest.raises(UserError, match=r"network\.decoder"):
        Network(size="XS", decoder="unet", adaptive=True)
