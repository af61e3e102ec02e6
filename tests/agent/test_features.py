import numpy as np
import pytest
import torch
from torch import nn

from agent.features import class_moments
from agent.recalibrate import measure, own_alone
from datavector.networks import build, create_base


def test_a_class_with_few_images_leaves_no_trace():
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    found = class_moments(features, labels, 4, floor=3)
    kept = features[labels != 1].double().numpy()
    assert found.counts.tolist() == [3, 0, 4, 0]
    assert not found.sums[[1, 3]].any()
    np.testing.assert_allclose(found.second, kept.T @ kept)
    np.testing.assert_allclose(found.sums[0], features[:3].double().sum(0).numpy())


@pytest.mark.parametrize("architecture", ["resnet18", "mobilenet_v3_small", "vit_b_16", "squeezenet1_0"])
def test_the_head_is_the_last_linear_layer_where_there_is_one(tmp_path, architecture):
    made = create_base(tmp_path, architecture=architecture, classes=("a", "b", "c"), size=224)
    layer = made.head
    if architecture == "squeezenet1_0":
        assert layer is None
        return
    assert isinstance(build(made).get_submodule(layer), nn.Linear)


def test_the_features_of_a_pass_times_the_head_are_its_logits(base):
    images = torch.randint(0, 256, (12, 3, base.input.size, base.input.size), dtype=torch.uint8)
    network, layer = build(base), base.head
    found = measure(network, base, images, own_alone, head=layer)
    head = network.get_submodule(layer)
    torch.testing.assert_close(head(found.features), found.logits)
    assert measure(network, base, images, own_alone).features is None
