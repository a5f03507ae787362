import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from conftest import ENCODER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from carvana import models
from carvana.errors import UserError

SMALL = models.ModelConfig("unet", ENCODER, "16,8,8,8,8", 64, 96)


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
        assert all((parameter == 3).all() for parameter in model.net.encoder.parameters())


def test_weights_that_fit_nothing_are_an_error(tmp_path):
    save_file({"other": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=f"none of its 1 tensors fits {ENCODER}"):
        models.load_encoder(models.SegmentationModel(SMALL), tmp_path / "w.safetensors")


def test_missing_broken_and_pickled_weights_are_an_error(tmp_path):
    model = models.SegmentationModel(SMALL)
    with pytest.raises(UserError, match=r"none.pth does not exist"):
        models.check_weights(SMALL, str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="classic_unet has no encoder"):
        models.check_weights(models.ModelConfig("classic_unet", "", "", 64, 64), "imagenet")
    for encoder in ("resnext101_32x4d", "timm-efficientnet-l2", "tu-botnet50ts_256"):
        with pytest.raises(UserError, match=f"nobody offers these of {encoder}"):
            models.check_weights(models.ModelConfig("unet", encoder, "", 64, 64), "imagenet")
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "best.safetensors"
    models.save_checkpoint(path, models.SegmentationModel(SMALL).state_dict(), SMALL, amp="no")
    return path


DAMAGES = {
    "empty": lambda data: b"",
    "a text": lambda data: b"nothing",
    "cut": lambda data: data[:-4],
    "cut in its header": lambda data: data[:200],
    "longer": lambda data: data + bytes(4),
    "zeros": lambda data: bytes(len(data)),
    "no metadata": lambda data: save({"a": torch.zeros(2)}),
    "no checksum": lambda data: data.replace(b'"sha256"', b'"sha265"'),
    "other facts": lambda data: data.replace(rb"\"amp\": \"no\"", rb"\"amp\": \"na\""),
    "a network that is a list": lambda data: save({"a": torch.zeros(2)}, {"network": "[]", "facts": "{}"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_named(checkpoint, tmp_path, damage):
    path, data = tmp_path / "best.safetensors", checkpoint.read_bytes()
    path.write_bytes(DAMAGES[damage](data))
    assert path.read_bytes() != data
    with pytest.raises(UserError, match=r"best.safetensors cannot be read: .*Delete it and train its fold") as error:
        models.load_checkpoint(path)
    assert "\n" not in str(error.value)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.booleans())
def test_a_checkpoint_with_a_flipped_bit_is_never_used(checkpoint, tmp_path, place, bit, in_header):
    data = bytearray(checkpoint.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    end = len(bytes(data[:header]).rstrip()) if in_header else len(data)
    data[int(place * end)] ^= 1 << bit
    path = tmp_path / "best.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"best.safetensors cannot be read"):
        models.load_checkpoint(path)


class Command:
    """What runs a command where it is unpickled without care."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def torch_saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


WEIGHTS = {
    "nothing": b"",
    "a text": b"weights",
    "a zip of nothing": b"PK\x05\x06" + bytes(18),
    "a list": torch_saved([torch.zeros(2)]),
    "a tensor": torch_saved(torch.zeros(2)),
    "a number": torch_saved(3),
    "texts": torch_saved({"a": "b"}),
    "an empty state_dict": torch_saved({"state_dict": {}}),
    "no state_dict": torch_saved({"state_dict": None}),
    "a set": pickle.dumps({1, 2}),
    "a command": pickle.dumps(Command()),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", WEIGHTS)
def test_encoder_weights_of_a_wrong_content_are_one_short_line(tmp_path, monkeypatch, content, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"w{suffix}"
    path.write_bytes(WEIGHTS[content])
    with pytest.raises(UserError, match=rf"encoder_weights .*w{suffix} (cannot be read|holds no tensors)") as error:
        models.load_encoder(models.SegmentationModel(SMALL), path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("encoder", "page"), [
    ("resnet34", "huggingface.co/smp-hub/resnet34.imagenet"),
    ("tu-tf_efficientnet_lite0", "huggingface.co/timm/tf_efficientnet_lite0.in1k"),
    ("tu-gcvit_xxtiny", "github.com/.*/gcvit_xxtiny_224_nvidia.*.pth"),
])  # fmt: skip
def test_encoder_weights_without_a_network_are_an_error_that_says_where_they_are(monkeypatch, encoder, page):
    def refuse(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(models.smp.encoders, "get_encoder", refuse)
    model = models.SegmentationModel(models.ModelConfig("unet", encoder, "16,8,8,8,8", 64, 96))
    with pytest.raises(UserError, match=rf"ConnectionError\). Save the file at https://{page}, give its path"):
        models.load_encoder(model, "imagenet")


@pytest.mark.parametrize("encoder", ["inceptionv4", "inceptionresnetv2", "xception"])
def test_images_are_scaled_as_those_that_the_encoder_has_learnt_from(encoder):
    known = models.pretrained_config(encoder)  # these had all pixels in [-1, 1]
    assert (known.mean, known.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


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
