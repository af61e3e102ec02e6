import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from datavector.errors import BaseModelError, UsageError, WrongLayout
from datavector.networks import (
    architectures,
    batchnorm_modules,
    build,
    create_base,
    export_tensors,
    load_file,
    load_weights,
    preprocess,
)

CLASSES = ("glioma", "meningioma", "no_tumor")
SMALL = "shufflenet_v2_x0_5"


@pytest.fixture
def state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return models.get_model(SMALL, weights=None).state_dict()


def make(path, **changes):
    return create_base(path, **{"architecture": SMALL, "classes": CLASSES, "size": 32, **changes})


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("resnet18", 32),
        ("densenet121", 32),
        ("regnet_y_400mf", 32),
        ("efficientnet_b0", 32),
        ("mobilenet_v3_small", 32),
        ("efficientnet_lite0", 64),
        ("convnext_tiny", 32),
        ("swin_t", 32),
        ("vit_b_32", 64),
    ],
)
def test_every_family_becomes_an_artifact_and_a_network_again(tmp_path, architecture, size):
    base = make(tmp_path, architecture=architecture, size=size)
    network = build(base)
    tensors = export_tensors(network)
    assert list(tensors) == [spec.name for spec in base.layout.tensors]
    with base.open() as file:
        assert all(np.array_equal(tensors[spec.name], file.read(spec.name)) for spec in base.layout.tensors)
    with torch.no_grad():
        logits = network(preprocess(torch.zeros((2, 3, size, size), dtype=torch.uint8), base.input))
    assert logits.shape == (2, 3)
    assert not network.training
    assert set(batchnorm_modules(network)) == set(base.batchnorm_layers)


def test_pretrained_weights_stay_and_only_the_head_is_new(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    tensors = export_tensors(build(make(tmp_path / "base", weights=tmp_path / "w.pth")))
    assert tensors["fc.weight"].shape == (3, 1024)
    assert not tensors["fc.bias"].any()
    body = [name for name in tensors if not name.startswith("fc.")]
    assert all(np.array_equal(tensors[name], state[name].numpy()) for name in body)


def test_a_safetensors_file_gives_the_same_base_as_a_pickled_one(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    first, second = (make(tmp_path / kind, weights=tmp_path / f"w.{kind}") for kind in ("pth", "safetensors"))
    assert (first.path / "base.safetensors").read_bytes() == (second.path / "base.safetensors").read_bytes()
    assert first.pretrained != second.pretrained  # the files' own digests


def test_the_seed_alone_decides_the_head(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    torch.manual_seed(1)
    one = make(tmp_path / "1", weights=tmp_path / "w.pth", seed=5)
    torch.manual_seed(2)
    two = make(tmp_path / "2", weights=tmp_path / "w.pth", seed=5)
    other = make(tmp_path / "3", weights=tmp_path / "w.pth", seed=6)
    assert one.digest == two.digest != other.digest


def test_the_head_is_the_one_that_it_always_was(tmp_path):
    """A base made elsewhere from the same seed must not differ: values fixed once, compared for ever."""
    head = export_tensors(build(make(tmp_path, seed=0)))["fc.weight"]
    np.testing.assert_allclose(head[0, :3], [-0.00023396, 0.01676389, -0.02572014], atol=1e-7)


def test_building_leaves_the_global_generator_alone(tmp_path):
    base = make(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build(base)
    assert torch.equal(torch.rand(4), expected)


def test_two_networks_of_a_base_share_nothing(tmp_path):
    base = make(tmp_path)
    one, two = build(base), build(base)
    before = export_tensors(two)
    with torch.no_grad():
        for tensor in one.state_dict().values():
            tensor.zero_()
    assert all(np.array_equal(before[name], tensor) for name, tensor in export_tensors(two).items())


def test_densenet_weights_with_the_old_names_are_understood(tmp_path):
    state = models.get_model("densenet121", weights=None).state_dict()
    old = {name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): state[name] for name in state}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "w.pth")
    tensors = export_tensors(build(make(tmp_path / "base", architecture="densenet121", weights=tmp_path / "w.pth")))
    name = "features.denseblock1.denselayer1.norm1.weight"
    assert np.array_equal(tensors[name], state[name].numpy())


def test_position_embeddings_are_interpolated_to_another_size(tmp_path):
    state = models.get_model("vit_b_32", weights=None).state_dict()
    torch.save(state, tmp_path / "w.pth")
    base = make(tmp_path / "base", architecture="vit_b_32", weights=tmp_path / "w.pth", size=64)
    assert base.layout.by_name["encoder.pos_embedding"].shape == (1, 5, 768)


def test_weights_of_another_architecture_are_refused(tmp_path, state):
    torch.save(models.get_model("squeezenet1_1", weights=None).state_dict(), tmp_path / "w.pth")
    with pytest.raises(BaseModelError, match="does not fit"):
        make(tmp_path / "base", weights=tmp_path / "w.pth")
    torch.save({**state, "conv1.0.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(BaseModelError, match=r"conv1\.0\.weight"):
        make(tmp_path / "base", weights=tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"not weights at all"])
def test_unreadable_weights_are_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BaseModelError):
        make(tmp_path / "base", weights=tmp_path / name)


def test_weights_that_would_run_code_are_refused(tmp_path):
    torch.save({"conv1.0.weight": pytest.fail}, tmp_path / "w.pth")
    with pytest.raises(BaseModelError, match="safely"):
        make(tmp_path / "base", weights=tmp_path / "w.pth")


def test_a_list_of_tensors_is_no_state_dict(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "w.pth")
    with pytest.raises(BaseModelError, match="named tensors"):
        make(tmp_path / "base", weights=tmp_path / "w.pth")


def test_an_unknown_architecture_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'resnet50'"):
        make(tmp_path, architecture="resnet5O")
    assert {"efficientnet_lite0", "vit_b_16"} <= set(architectures())


def test_a_size_that_an_architecture_cannot_take_is_refused(tmp_path):
    with pytest.raises(UsageError, match="65 pixels"):
        make(tmp_path, architecture="vit_b_32", size=65)
    with pytest.raises(UsageError, match="choose a size"):
        make(tmp_path, size=8)


def test_images_become_what_torchvision_would_make_of_them(tmp_path):
    base = make(tmp_path)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    preset = models.get_model_weights(SMALL).DEFAULT.transforms()
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (preset.mean, preset.std))
    torch.testing.assert_close(preprocess(images, base.input), (images / 255 - mean) / std)


def test_other_weights_can_be_loaded_from_a_file_or_a_mapping(tmp_path):
    one, two = make(tmp_path / "1", seed=1), make(tmp_path / "2", seed=2)
    network, expected = build(one), export_tensors(build(two))
    load_file(network, two.path / "base.safetensors", two.layout)
    assert all(np.array_equal(expected[name], tensor) for name, tensor in export_tensors(network).items())
    del expected["fc.bias"]
    with pytest.raises(WrongLayout, match=r"fc\.bias"):
        load_weights(network, expected)
