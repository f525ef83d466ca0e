"""Compressor, decoder and the BEV network around them: sizes, parameters, gradients, mirroring."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from occfeat_targets.store.grid import VoxelGrid
from occfeat_train.augment import Draws, network_inputs
from occfeat_train.models.bev_net import BEVNet, ModelSettings, mirror
from occfeat_train.models.decoder import Compressor, Decoder, EveryOther, UpAndAdd
from occfeat_train.tasks.vehicle import SegmentationHead


def count(module):
    return sum(p.numel() for p in module.parameters())


def conv(inputs, outputs, kernel):
    return inputs * outputs * kernel**2


def conv_norm(inputs, outputs, kernel):
    """A convolution without bias and a batch norm."""
    return conv(inputs, outputs, kernel) + 2 * outputs


def resnet18_stage(inputs, outputs):
    """Two basic blocks of two 3x3 convolutions; a projected shortcut where the width changes."""
    first = conv_norm(inputs, outputs, 3) + conv_norm(outputs, outputs, 3)
    shortcut = conv_norm(inputs, outputs, 1) if inputs != outputs else 0
    return first + shortcut + 2 * conv_norm(outputs, outputs, 3)


def test_parameters_are_those_of_simple_bev():
    decoder = Decoder(128)
    parts = {
        "stem": conv_norm(128, 64, 7),
        "layer1": resnet18_stage(64, 64),
        "layer2": resnet18_stage(64, 128),
        "layer3": resnet18_stage(128, 256),
        "up3": conv(256, 128, 1),
        "up2": conv(128, 64, 1),
        "up1": conv(64, 128, 1),
    }
    assert {name: count(module) for name, module in decoder.named_children()} == parts
    assert count(Compressor(8 * 128, 128)) == conv(8 * 128, 128, 3)
    branches = 3 * conv(128, 128, 3) + conv(128, 1 + 1 + 2, 1) + 4
    assert count(SegmentationHead(128)) == branches


@pytest.mark.parametrize("size", [(16, 24), (17, 23), (31, 9), (9, 10)])
def test_output_has_the_size_of_the_input(size):
    x = torch.randn(2, 8, *size)
    assert Decoder(8)(x).shape == x.shape


def test_stages_have_half_quarter_and_eighth_size():
    decoder, sizes = Decoder(8), {}
    for name in ("layer1", "layer2", "layer3"):
        decoder.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, n=name: sizes.update({n: tuple(out.shape[1:])})
        )
    decoder(torch.randn(1, 8, 40, 24))
    assert sizes == {"layer1": (4, 20, 12), "layer2": (8, 10, 6), "layer3": (16, 5, 3)}


@pytest.mark.parametrize(
    ("small", "large"), [((4, 6), (8, 12)), ((5, 3), (9, 6)), ((2, 2), (7, 3))]
)
def test_convolving_before_or_after_interpolation_is_the_same(small, large):
    up = UpAndAdd(6, 4).double()
    x, skip = torch.randn(2, 6, *small).double(), torch.randn(2, 4, *large).double()
    published = up.conv(F.interpolate(x, large, mode="bilinear", align_corners=False))
    expected = F.instance_norm(published) + skip
    torch.testing.assert_close(up(x, skip), expected, atol=1e-9, rtol=0)


def test_the_decoder_is_the_published_chain():
    """With the blocks' residuals alive, from its own layers joined as the paper joins them."""
    torch.manual_seed(0)
    decoder = Decoder(8).double().eval()
    awaken(decoder)
    x = torch.randn(2, 8, 16, 24).double()
    stem, norm = decoder.stem[0], decoder.stem[1]
    y = F.relu(norm(F.conv2d(x, stem.weight, stride=2, padding=3)))
    layer1 = resnet_stage(decoder.layer1, y)
    layer2 = resnet_stage(decoder.layer2, layer1)
    layer3 = resnet_stage(decoder.layer3, layer2)

    def up(module, deep, skip):
        deep = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        return F.instance_norm(F.conv2d(deep, module.conv.weight)) + skip

    y = up(decoder.up3, layer3, layer2)
    y = up(decoder.up1, up(decoder.up2, y, layer1), x)
    torch.testing.assert_close(decoder(x), y, atol=1e-9, rtol=0)


def resnet_stage(stage, x):
    """Basic blocks of He et al., from a stage's convolutions and norms in their order."""
    for block in stage.layers:
        convs = [m for m in block.layer.modules() if isinstance(m, nn.Conv2d)]
        norms = [m for m in block.layer.modules() if isinstance(m, nn.BatchNorm2d)]
        assert [c.kernel_size for c in convs] == [(3, 3)] * 2
        inner = F.relu(norms[0](F.conv2d(x, convs[0].weight, stride=convs[0].stride, padding=1)))
        inner = norms[1](F.conv2d(inner, convs[1].weight, padding=1))
        shortcut = [m for m in block.shortcut.modules() if isinstance(m, nn.Conv2d)]
        if shortcut:
            (projection,) = shortcut
            (norm,) = [m for m in block.shortcut.modules() if isinstance(m, nn.BatchNorm2d)]
            x = norm(F.conv2d(x, projection.weight, stride=projection.stride))
        x = F.relu(x + inner)
    return x


def residual_norms(decoder):
    """The last batch norm of every block."""
    blocks = [b for stage in (decoder.layer1, decoder.layer2, decoder.layer3) for b in stage.layers]
    return [[m for m in b.layer.modules() if isinstance(m, nn.BatchNorm2d)][-1] for b in blocks]


def awaken(decoder):
    for norm in residual_norms(decoder):
        nn.init.ones_(norm.weight)


def test_blocks_start_as_their_shortcuts():
    norms = residual_norms(Decoder(8))
    assert len(norms) == 6
    for norm in norms:
        assert not norm.weight.any()


def test_every_parameter_receives_a_gradient():
    torch.manual_seed(0)
    compressor, decoder = Compressor(24, 8), Decoder(8)
    network = nn.Sequential(compressor, decoder)
    out_gradient = torch.randn(2, 8, 24, 16)
    network(torch.randn(2, 24, 24, 16)).backward(out_gradient)
    asleep = {id(norm.weight) for norm in residual_norms(decoder)}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        if id(parameter) in asleep or "layer" not in name:
            assert parameter.grad.any(), name  # gradient reaches a norm of weight 0 …
    awaken(decoder)
    network.zero_grad()
    network(torch.randn(2, 24, 24, 16)).backward(out_gradient)
    for name, parameter in network.named_parameters():
        assert parameter.grad.any(), name  # … and, once it is not 0, all that lies before it


@pytest.mark.parametrize(("lift", "compresses"), [("simplebev", True), ("bevformer", False)])
@pytest.mark.parametrize("layers", [1, 3])
def test_volumes_are_compressed_even_of_a_single_layer(lift, compresses, layers):
    settings = ModelSettings(lift=lift, encoder_weights="random", channels=4)
    grid = VoxelGrid((1.0, 9.0, 8), (-3.0, 4.0, 7), (0.0, 2.0, layers))
    compressor = BEVNet(settings, grid).compressor
    assert isinstance(compressor, Compressor) == compresses
    if compresses:
        assert compressor[0].weight.shape == (4, 4 * layers, 3, 3)


def test_compressor_is_convolution_instance_norm_gelu():
    compressor = Compressor(6, 4).double()
    x = torch.randn(2, 6, 7, 5).double()
    y = F.conv2d(x, compressor[0].weight, padding=1)
    mean, variance = y.mean((2, 3), keepdim=True), y.var((2, 3), unbiased=False, keepdim=True)
    y = (y - mean) / (variance + 1e-5).sqrt()
    expected = y * 0.5 * (1 + torch.erf(y / 2**0.5))
    torch.testing.assert_close(compressor(x), expected, atol=1e-10, rtol=0)


# --- mirroring ------------------------------------------------------------------------------------


def test_mirror_flips_the_chosen_items_alone():
    x = torch.randn(2, 3, 4, 5, 6)
    flip = torch.tensor([[True, False, True], [False, True, True]])
    mirrored = mirror(x, flip, dims=(-1,))
    for b in range(2):
        for n in range(3):
            expected = x[b, n, :, :, torch.arange(5, -1, -1)] if flip[b, n] else x[b, n]
            assert torch.equal(mirrored[b, n], expected)


def test_mirror_has_one_choice_per_axis():
    x = torch.arange(12.0).view(1, 1, 3, 4).repeat(4, 1, 1, 1)
    flip = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    none, rows, columns, both = mirror(x, flip, dims=(-2, -1))[:, 0]
    assert none[0].tolist() == [0, 1, 2, 3]
    assert rows[0].tolist() == [8, 9, 10, 11]
    assert columns[0].tolist() == [3, 2, 1, 0]
    assert both[0].tolist() == [11, 10, 9, 8]


@pytest.mark.parametrize("dims", [(-1,), (-2, -1)])
def test_mirroring_twice_gives_back_the_same(dims):
    x = torch.randn(4, 2, 3, 5)
    flip = torch.rand(4, 2) < 0.5 if len(dims) > 1 else torch.tensor([True, False, True, True])
    once = mirror(x, flip, dims)
    assert not torch.equal(once, x)
    assert torch.equal(mirror(once, flip, dims), x)
    assert mirror(x, None, dims) is x


GRID = VoxelGrid((1.0, 9.0, 8), (-3.0, 4.0, 7), (0.0, 2.0, 2))
CHANNELS = 4
FLIPS = torch.tensor([[False, False], [True, False], [False, True], [True, True]])


def network(encoder, decoder):
    """A BEV network with another encoder, compressor and decoder around its lifting."""
    config = ModelSettings(encoder_weights="random", channels=CHANNELS)
    net = BEVNet(config, GRID).eval()
    net.encoder, net.compressor, net.decoder = encoder, nn.Identity(), decoder
    return net


def views(batch, seed=0):
    """Smooth random images (B, 2, 3, 32, 48) and cameras that look along x."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch * 2, 3, 4, 6, generator=generator)
    images = F.interpolate(coarse, (32, 48), mode="bilinear").unflatten(0, (batch, 2))
    K = torch.tensor([[24.0, 0, 24], [0, 24, 16], [0, 0, 1]]).repeat(batch, 2, 1, 1)
    cam_T_ego = torch.tensor(
        [[0.0, -1, 0, 0.2], [0, 0, -1, 1.2], [1, 0, 0, 0.1], [0, 0, 0, 1]]
    ).repeat(batch, 2, 1, 1)
    cam_T_ego[:, 1, 0, 3] = -0.4
    return images, K, cam_T_ego


class FourChannels(nn.Module):
    """Mean colours of 4x4 pixels and their product: mirrored images give mirrored features."""

    def forward(self, x):
        x = F.avg_pool2d(x, 4)
        return torch.cat([x, x.prod(dim=1, keepdim=True)], dim=1)


class Asymmetric(FourChannels):
    """The same times a ramp over the columns."""

    def forward(self, x):
        x = super().forward(x)
        return x * torch.linspace(1, 3, x.shape[-1])


class BEVRamp(nn.Module):
    """Multiplies a BEV map with a ramp along x and another along y."""

    def forward(self, x):
        return x * torch.linspace(1, 2, x.shape[-2])[:, None] * torch.linspace(-1, 3, x.shape[-1])


def test_mirrored_images_and_bev_give_the_same_map_through_symmetric_layers():
    images, K, cam_T_ego = views(4)
    net = network(FourChannels(), nn.Identity())
    expected = net(images, K, cam_T_ego)
    assert (expected != 0).float().mean() > 0.3
    image_flip = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    shown = torch.where(image_flip[..., None, None, None], images.flip(-1), images)
    torch.testing.assert_close(net(shown, K, cam_T_ego, image_flip), expected)
    torch.testing.assert_close(net(images, K, cam_T_ego, bev_flip=FLIPS), expected)
    torch.testing.assert_close(net(shown, K, cam_T_ego, image_flip, FLIPS), expected)
    assert not torch.allclose(net(shown, K, cam_T_ego), expected, atol=1e-2)


def test_the_encoder_sees_images_as_given_and_lifting_sees_features_mirrored_back():
    images, K, cam_T_ego = views(2)
    encoder = Asymmetric()
    net = network(encoder, nn.Identity())
    image_flip = torch.tensor([[True, False], [True, True]])
    features = encoder(images.flatten(0, 1)).unflatten(0, (2, 2))
    for b, n in ((0, 0), (1, 0), (1, 1)):
        features[b, n] = features[b, n].flip(-1)
    expected = net.lift(features, K, cam_T_ego, (32, 48))
    torch.testing.assert_close(net(images, K, cam_T_ego, image_flip), expected)


def test_the_decoder_sees_the_bev_mirrored_and_the_map_comes_back_unmirrored():
    images, K, cam_T_ego = views(4)
    decoder = BEVRamp()
    lifted = network(FourChannels(), nn.Identity())(images, K, cam_T_ego)
    flipped = network(FourChannels(), decoder)(images, K, cam_T_ego, bev_flip=FLIPS)
    axes = [(), (-2,), (-1,), (-2, -1)]
    for b, dims in enumerate(axes):
        expected = decoder(lifted[b].flip(dims)).flip(dims)
        torch.testing.assert_close(flipped[b], expected)
    assert not torch.allclose(flipped[3], decoder(lifted[3]), atol=0.1)


def test_images_mirrored_by_augmentation_give_the_same_map_as_straight_ones():
    """Augmentation and network agree on what ``image_flip`` means."""
    images, K, cam_T_ego = views(1)
    stored = (images.permute(0, 1, 3, 4, 2) * 255).round().to(torch.uint8)
    batch = {"images": stored, "K": K, "cam_T_ego": cam_T_ego}
    net = network(FourChannels(), nn.Identity())

    def result(flip):
        still = torch.zeros(1, 2, dtype=torch.bool)
        shift = torch.tensor([[[0.5, -0.5], [-0.4, 0.2]]])
        resize, angle, seed = torch.full((1, 2), 0.9), torch.zeros(1), torch.zeros(1).long()
        draws = Draws(resize, shift, torch.tensor([flip]), still, angle, seed)
        return net(**network_inputs(batch, draws, (32, 48), 0.2))

    straight = result([False, False])
    assert straight.any()
    torch.testing.assert_close(result([True, True]), straight, atol=1e-5, rtol=0)
    torch.testing.assert_close(result([False, True]), straight, atol=1e-5, rtol=0)


def test_the_real_network_has_the_documented_shape_and_takes_any_number_of_cameras():
    torch.manual_seed(0)
    grid = VoxelGrid((1.0, 9.0, 16), (-3.0, 4.0, 17), (0.0, 2.0, 2))
    net = BEVNet(ModelSettings(encoder_weights="random", channels=8), grid).eval()
    images, K, cam_T_ego = views(2)
    with torch.no_grad():
        assert net(images, K, cam_T_ego).shape == (2, 8, 16, 17)
        assert net(images[:, :1], K[:, :1], cam_T_ego[:, :1]).shape == (2, 8, 16, 17)


def test_few_channels_do_not_corrupt_the_heap():
    """oneDNN's gradient of a 1x1 convolution of stride 2 does, on the paper's grid: 7 of 7 runs of
    8, 16 and 24 channels died."""
    code = """if True:
        import torch
        from occfeat_train.models.decoder import Decoder
        for channels in range(4, 68, 4):
            decoder = Decoder(channels).to(memory_format=torch.channels_last)
            x = torch.randn(1, channels, 200, 200).to(memory_format=torch.channels_last)
            decoder(x.requires_grad_()).square().sum().backward()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [(8, 6), (7, 9)])
def test_every_other_pixel_convolved_is_a_stride_of_two(size):
    plain = nn.Conv2d(16, 32, 1, stride=2, bias=False).double()
    ours = EveryOther(16, 32, 1, stride=2, bias=False).double()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    assert torch.equal(ours(x), plain(x))
    points = {}
    for channels in (16, 32):  # a stride that is 1 stays, and so do the digits of larger networks
        convs = [m for m in Decoder(channels).modules() if isinstance(m, nn.Conv2d)]
        points[channels] = [type(m) for m in convs if m.kernel_size == (1, 1) and m.stride[0] == 2]
    assert points == {16: [EveryOther, nn.Conv2d], 32: [nn.Conv2d, nn.Conv2d]}
