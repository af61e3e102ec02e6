import threading

import numpy as np
import pytest
import torch

from agent import recalibrate as recalibration
from agent.recalibrate import (
    choose_images,
    chosen_in_memory,
    forward_with_moments,
    free_memory,
    full_precision,
    image_bytes,
    input_moments,
    own_alone,
    recalibrate,
)
from datavector.errors import TryAgain, WrongLayout
from datavector.merge.batchnorm import Moments, pool
from datavector.networks import batchnorm_modules, build, export_tensors, preprocess

CPU = torch.device("cpu")


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


# --- How many images


def test_a_hospitals_own_statistics_never_depend_on_the_memory_that_is_free(base, train_set, monkeypatch):
    monkeypatch.setattr(recalibration, "free_memory", lambda _: 0)
    assert recalibrate(build(base), base, train_set, own_alone, max_images=1024).images == len(train_set)


def test_a_hospitals_own_statistics_stay_within_their_budget(base, train_set):
    needed = image_bytes(build(base), base, CPU)
    found = recalibrate(build(base), base, train_set, own_alone, max_images=1024, budget=9 * needed)
    assert found.images == 9


def test_an_image_takes_four_times_the_largest_batchnorm_input(base):
    largest = []
    network = build(base)
    for layer in batchnorm_modules(network).values():
        layer.register_forward_pre_hook(lambda _, arguments: largest.append(arguments[0][0].numel()))
    with torch.no_grad():
        network(torch.zeros(2, 3, 32, 32))
    assert image_bytes(network, base, CPU) == 4 * 4 * max(largest)


@pytest.mark.parametrize(("room", "used"), [(20, 20), (16, 16), (1000, 26)])
def test_a_visit_takes_as_many_images_as_fit_into_half_of_what_is_free(base, train_set, room, used):
    free = 2 * room * image_bytes(build(base), base, CPU)
    assert len(chosen_in_memory(build(base), base, train_set, max_images=1024, free=free)) == used


@pytest.mark.parametrize("room", [0, 1, 15])
def test_a_visit_with_room_for_a_few_images_only_is_put_off(base, train_set, room):
    free = 2 * room * image_bytes(build(base), base, CPU)
    with pytest.raises(TryAgain, match=f"memory has room for {room} images only; free some"):
        chosen_in_memory(build(base), base, train_set, max_images=1024, free=free)


def test_a_visit_of_a_small_hospital_or_of_few_wanted_images_needs_room_for_these(base, sites, train_set):
    free = 2 * 5 * image_bytes(build(base), base, CPU)
    assert len(chosen_in_memory(build(base), base, sites[0], max_images=1024, free=free)) == 5
    assert len(chosen_in_memory(build(base), base, train_set, max_images=5, free=free)) == 5


GIB = 1 << 30
STATISTICS = f"anon {GIB}\ninactive_file {3 * GIB}\nactive_file {2 * GIB}\ntotal_inactive_file {4 * GIB}\n"


@pytest.fixture
def memory(tmp_path):
    """Writes what a system says of its memory, then asks how much is free: `memory(files, available=GiB)`."""

    def free(files, available=64):
        (tmp_path / "meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable: {available * GIB >> 10} kB\n")
        for name, content in files.items():
            (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / name).write_text(f"{content}\n")
        return free_memory(CPU, machine=tmp_path / "meminfo", groups=tmp_path / "groups") / GIB

    return free


def test_a_control_group_limits_what_is_free_and_its_droppable_files_count_as_free(memory):
    second = {"memory.max": 16 * GIB, "memory.current": 12 * GIB, "memory.stat": STATISTICS}
    assert memory(second) == 16 - (12 - 3)
    assert memory(second, available=5) == 5


def test_a_control_group_of_the_first_version_does_so_too(memory):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    first = dict(zip((f"memory/{name}" for name in names), (16 * GIB, 12 * GIB, STATISTICS), strict=True))
    assert memory(first) == 16 - (12 - 4)


def test_without_a_limit_the_machine_decides(memory):
    assert memory({}) == 64
    assert memory({"memory.max": "max", "memory.current": 12 * GIB, "memory.stat": STATISTICS}) == 64


def test_what_torch_keeps_of_a_gpu_for_its_next_tensors_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 70 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10 * GIB)
    assert free_memory(torch.device("cuda")) == 62 * GIB


def test_a_gpu_measures_in_full_precision_and_goes_on_as_before():
    cudnn = torch.backends.cudnn
    before = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    with full_precision(torch.device("cuda")):
        assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (*before[:3], False)
    with full_precision(CPU):
        assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == before
