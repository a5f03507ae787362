import copy

import pytest
import torch
from safetensors.torch import save_file

from carvana import models
from carvana.errors import UserError

SMALL = models.ModelConfig("unet", "resnet18", "16,8,8,8,8", 64, 96)


def lite0(size):
    return models.SegmentationModel(models.ModelConfig("unet", "tu-tf_efficientnet_lite0", "16,8,8,8,8", size, size))


def test_classic_unet_has_31_million_parameters_and_keeps_the_size():
    model = models.SegmentationModel(models.ModelConfig("classic_unet", "", "", 64, 64)).eval()
    assert 30.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 31.1e6
    assert model(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape == (1, 64, 64)


@pytest.mark.parametrize("arch", ["unet", "unetplusplus", "fpn", "linknet", "deeplabv3plus", "manet"])
def test_architectures_by_name_turn_images_into_logits(arch):
    network = models.ModelConfig(arch, "resnet18", "", 64, 96)
    assert models.SegmentationModel(network).eval()(torch.zeros(2, 64, 96, 3, dtype=torch.uint8)).shape == (2, 64, 96)


def test_images_reach_the_network_normalised_as_its_encoder_was_trained():
    seen = []
    model = lite0(32).eval()
    model.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(3).repeat(512).reshape(1, 32, 32, 3))
    assert seen[0].unique().tolist() == pytest.approx([-1, 1])
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (("unte", "resnet18", "", 64, 64), 'arch "unte" is unknown, did you mean "unet"'),
        (("unet", "resnt18", "", 64, 64), 'encoder "resnt18" is unknown, did you mean "resnet18"'),
        (("unet", "tu-resnt18", "", 64, 64), 'encoder "tu-resnt18" is unknown, did you mean "tu-resnet18"'),
        (("unet", "resnet18", "", 100, 64), "height is 100, .* multiple of 32; the nearest is 96"),
        (("unet", "resnet18", "a,b", 64, 64), 'decoder_channels is "a,b"'),
        (("unet", "resnet18", "8,8", 64, 64), "cannot be built"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(network, message):
    with pytest.raises(UserError, match=message):
        models.SegmentationModel(models.ModelConfig(*network))


@pytest.mark.filterwarnings("ignore:`timm-` encoders")
@pytest.mark.parametrize("encoder", ["timm-tf_efficientnet_lite0", "tu-tf_efficientnet_lite0"])
def test_timm_weights_match_under_both_families_of_names(encoder, real_data):
    model = models.SegmentationModel(models.ModelConfig("unet", encoder, "16,8,8,8,8", 64, 64))
    sentence = models.load_encoder(model, real_data / "weights" / "tf_efficientnet_lite0.safetensors")
    matched, total = (int(word) for word in sentence.split() if word.isdigit())
    assert matched == total > 200


def test_weights_from_pth_and_safetensors_are_loaded(tmp_path):
    model = models.SegmentationModel(SMALL)
    wanted = {name: torch.full(tensor.shape, 3) for name, tensor in model.net.encoder.state_dict().items()}
    torch.save({"state_dict": wanted}, tmp_path / "w.pth")
    save_file(wanted, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        model = models.SegmentationModel(SMALL)
        assert "tensors matched" in models.load_encoder(model, tmp_path / name)
        assert (model.net.encoder.conv1.weight == 3).all()


def test_weights_that_fit_nothing_are_an_error(tmp_path):
    save_file({"other": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="none of its 1 tensors fits resnet18"):
        models.load_encoder(models.SegmentationModel(SMALL), tmp_path / "w.safetensors")


def test_missing_broken_and_pickled_weights_are_an_error(tmp_path):
    model = models.SegmentationModel(SMALL)
    with pytest.raises(UserError, match=r"none.pth does not exist"):
        models.check_weights(SMALL, str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="classic_unet has no encoder"):
        models.check_weights(models.ModelConfig("classic_unet", "", "", 64, 64), "imagenet")
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken.pth cannot be read"):
        models.load_encoder(model, tmp_path / "broken.pth")
    torch.save({"code": torch.nn.Linear(1, 1)}, tmp_path / "pickled.pth")
    with pytest.raises(UserError, match=r"pickled.pth cannot be read"):
        models.load_encoder(model, tmp_path / "pickled.pth")


def test_a_checkpoint_alone_rebuilds_the_network(tmp_path):
    model, images = models.SegmentationModel(SMALL).eval(), torch.randint(0, 255, (1, 64, 96, 3), dtype=torch.uint8)
    models.save_checkpoint(tmp_path / "best.safetensors", model.state_dict(), SMALL, dice=0.5)
    loaded, facts = models.load_checkpoint(tmp_path / "best.safetensors")
    assert facts == {"dice": 0.5}
    assert loaded.config == SMALL
    assert torch.equal(loaded(images), model(images))


def test_a_broken_checkpoint_is_named(tmp_path):
    (tmp_path / "best.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"best.safetensors cannot be read"):
        models.load_checkpoint(tmp_path / "best.safetensors")


@pytest.mark.parametrize(("encoder", "page"), [
    ("resnet34", "huggingface.co/smp-hub/resnet34.imagenet/tree/main"),
    ("tu-tf_efficientnet_lite0", "huggingface.co/timm/tf_efficientnet_lite0.in1k/tree/main"),
])  # fmt: skip
def test_encoder_weights_without_a_network_are_an_error_that_says_where_they_are(monkeypatch, encoder, page):
    def refuse(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(models.smp.encoders, "get_encoder", refuse)
    model = models.SegmentationModel(models.ModelConfig("unet", encoder, "16,8,8,8,8", 64, 96))
    with pytest.raises(UserError, match=rf"ConnectionError\). Save model.safetensors from https://{page} elsewhere"):
        models.load_encoder(model, "imagenet")


def test_depthwise_convolutions_learn_in_float32_and_every_other_layer_in_half():
    model = lite0(64)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    layer = next(layer for layer in layers if layer.stride == (1, 1) and layer.kernel_size == (5, 5))
    x = torch.randn(1, layer.in_channels, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        learning = layer(x.bfloat16())
        assert model.train()(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).dtype == torch.bfloat16
    exact = torch.nn.functional.conv2d(x.bfloat16().float(), layer.weight, padding=layer.padding, groups=layer.groups)
    assert torch.equal(learning, exact.bfloat16())


def test_a_copy_of_a_network_computes_with_its_own_weights():
    model = lite0(64).eval()
    other, images = copy.deepcopy(model), torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)
    before = model(images)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    assert torch.equal(model(images), before)
    assert not torch.equal(other(images), before)
