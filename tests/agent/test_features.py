import numpy as np
import pytest
import torch
from torch import nn

from agent.features import class_moments
from agent.recalibrate import measure, own_alone
from agent.train import evaluate, evaluate_counts
from datavector.networks import build, create_base, head_tensors


def test_a_class_with_few_images_leaves_no_trace():
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    found = class_moments(features, labels, 4, floor=3)
    kept = features[labels != 1].double().numpy()
    assert found.counts.tolist() == [3, 0, 4, 0]
    assert not found.sums[[1, 3]].any()
    np.testing.assert_allclose(found.second, kept.T @ kept)
    np.testing.assert_allclose(found.sums[0], features[:3].double().sum(0).numpy())


def test_no_image_enough_of_any_class_gives_moments_of_nothing():
    found = class_moments(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), 2, floor=3)
    assert not found.counts.any()
    assert not found.sums.any()
    assert not found.second.any()


def test_the_same_features_give_the_same_bits_every_time():
    features, labels = torch.rand(97, 640, generator=torch.Generator().manual_seed(1)), torch.arange(97) % 3
    first, second = (class_moments(features, labels, 3, floor=5) for _ in range(2))
    assert first.sums.tobytes() == second.sums.tobytes()
    assert first.second.tobytes() == second.second.tobytes()


def test_an_evaluation_counts_what_the_network_answers_and_how_sure_it_is(base, val_set):
    network = build(base)
    found = evaluate_counts(network, base, val_set)
    assert np.array_equal(found.confusion, evaluate(network, base, val_set))
    assert found.bins[:, 0].sum() == found.images == len(val_set)
    assert found.bins[:, 1].sum() == np.trace(found.confusion)
    assert 1 / len(base.classes) <= found.bins[:, 2].sum() / len(val_set) <= 1


NO_HEAD = ("maxvit_t", "squeezenet1_0")  # a linear layer without a bias, and a convolution


@pytest.mark.parametrize(
    "architecture",
    ["resnet18", "mobilenet_v3_small", "vit_b_16", "swin_t", "convnext_tiny", "regnet_y_400mf", *NO_HEAD],
)
def test_the_head_is_the_last_linear_layer_where_there_is_one(tmp_path, architecture):
    made = create_base(tmp_path, architecture=architecture, classes=("a", "b", "c"), size=224)
    layer = made.head
    if architecture in NO_HEAD:
        assert layer is None
        return
    assert isinstance(build(made).get_submodule(layer), nn.Linear)
    assert head_tensors(made) == {f"{layer}.weight", f"{layer}.bias"}


def test_the_features_of_a_pass_times_the_head_are_its_logits(base):
    images = torch.randint(0, 256, (12, 3, base.input.size, base.input.size), dtype=torch.uint8)
    network, layer = build(base), base.head
    found = measure(network, base, images, own_alone, head=layer)
    head = network.get_submodule(layer)
    torch.testing.assert_close(head(found.features), found.logits)
    assert measure(network, base, images, own_alone).features is None
