import threading

import numpy as np
import pytest
import torch

from agent.recalibrate import (
    affordable_images,
    choose_images,
    forward_with_moments,
    input_moments,
    own_alone,
    recalibrate,
)
from datavector.errors import WrongLayout
from datavector.merge.batchnorm import Moments, pool
from datavector.networks import batchnorm_modules, build, export_tensors, preprocess


def train_mode_pass(base, images):
    """What torch itself computes when BatchNorm normalises with the batch; dropout stays off."""
    network = build(base)
    for layer in batchnorm_modules(network).values():
        layer.train()
    with torch.no_grad():
        return network(preprocess(images, base.input))


def test_a_pass_equals_torchs_own_batch_normalisation(base, train_set):
    network = build(base)
    moments, logits = forward_with_moments(network, preprocess(train_set.images, base.input), own_alone)
    torch.testing.assert_close(logits, train_mode_pass(base, train_set.images), rtol=0, atol=1e-4)
    assert list(moments) == list(batchnorm_modules(network))
    with torch.no_grad():
        torch.testing.assert_close(network(preprocess(train_set.images, base.input)), logits, rtol=0, atol=1e-5)


def test_a_meeting_of_unequal_shifted_sites_equals_one_pass_over_all_images(base, sites):
    """Every site runs in a thread of its own; at each layer all wait for each other."""
    barrier = threading.Barrier(len(sites))
    given, logits = {}, {}

    def site(index):
        def exchange(layer, own):
            given[layer, index] = own
            barrier.wait(timeout=60)
            return pool([given[layer, each] for each in range(len(sites))])

        inputs = preprocess(sites[index].images, base.input)
        _, logits[index] = forward_with_moments(build(base), inputs, exchange)

    threads = [threading.Thread(target=site, args=(index,)) for index in range(len(sites))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = train_mode_pass(base, torch.cat([each.images for each in sites]))
    assert together.std() > 1e-3  # else nothing could fail
    torch.testing.assert_close(torch.cat([logits[i] for i in range(len(sites))]), together, rtol=0, atol=1e-4)


def test_a_visitor_normalises_with_what_earlier_ones_left(base, sites):
    earlier, _ = forward_with_moments(build(base), preprocess(sites[0].images, base.input), own_alone)
    network = build(base)
    own, _ = forward_with_moments(
        network, preprocess(sites[1].images, base.input), lambda layer, fresh: pool([fresh, earlier[layer]])
    )
    first = next(iter(own))
    expected = pool([own[first], earlier[first]])
    statistics = export_tensors(network)
    np.testing.assert_allclose(statistics[f"{first}.running_mean"], expected.mean, rtol=1e-6)
    np.testing.assert_allclose(statistics[f"{first}.running_var"], expected.variance, rtol=1e-6)


def test_nothing_but_the_statistics_changes(base, train_set):
    network = build(base)
    before = export_tensors(network)
    forward_with_moments(network, preprocess(train_set.images, base.input), own_alone)
    after = export_tensors(network)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert all(name.endswith((".running_mean", ".running_var")) for name in changed)
    assert not any(layer._forward_pre_hooks for layer in network.modules())


def test_moments_are_accurate_far_from_zero():
    values = 1000 + torch.randn((6, 2, 5, 5), generator=torch.Generator().manual_seed(0)) * 0.01
    found = input_moments(values)
    exact = values.double().numpy()
    assert found.count == 6 * 25
    np.testing.assert_allclose(found.mean, exact.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(found.variance, exact.var(axis=(0, 2, 3)), rtol=1e-8)


def test_an_answer_for_another_layer_is_refused(base, train_set):
    inputs = preprocess(train_set.images[:2], base.input)
    with pytest.raises(WrongLayout, match="channels"):
        forward_with_moments(build(base), inputs, lambda *_: Moments(1, np.zeros(1), np.ones(1)))


def test_a_limit_uses_that_many_images_and_always_the_same(base, train_set):
    first = recalibrate(build(base), base, train_set, own_alone, max_images=7, seed=3)
    second = recalibrate(build(base), base, train_set, own_alone, max_images=7, seed=3)
    assert first.images == 7
    assert torch.equal(first.logits, second.logits)
    assert choose_images(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    assert choose_images(50, 9, 0).tolist() != choose_images(50, 9, 1).tolist()


def test_memory_bounds_the_number_of_images(base):
    network = build(base)
    assert affordable_images(network, base, torch.device("cpu")) >= 1
