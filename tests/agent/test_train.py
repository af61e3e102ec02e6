import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agent import train as training
from agent.train import (
    TrainSettings,
    class_log_prior,
    clearly_worse,
    epoch_batches,
    evaluate,
    learning_rate,
    train,
)
from datavector.data.images import ImageSet
from datavector.errors import DiskFull, Interrupted, NoImages, NotFinite, TrainingFailed, UsageError
from datavector.layout import TensorFile
from datavector.metrics import accuracy
from datavector.model import is_statistic
from datavector.networks import build, create_base, load_file

CLASSES, SIZE = ("dark", "red", "bright"), 32
SETTINGS = TrainSettings(epochs=3, batch_size=8, device="cpu")


@pytest.fixture(scope="module")
def result(base, train_set, val_set, tmp_path_factory):
    return train(base, train_set, val_set, SETTINGS, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def expected(result):
    return result.weights.read_bytes()


def test_the_same_seed_gives_the_same_bits_whatever_ran_before(base, train_set, val_set, tmp_path, expected):
    torch.manual_seed(99)
    torch.rand(17)
    assert train(base, train_set, val_set, SETTINGS, tmp_path).weights.read_bytes() == expected


def test_another_seed_gives_other_weights(base, train_set, val_set, tmp_path, expected):
    other = TrainSettings(epochs=3, batch_size=8, device="cpu", seed=1)
    assert train(base, train_set, val_set, other, tmp_path).weights.read_bytes() != expected


def test_processes_that_prepare_images_change_nothing(base, train_set, val_set, tmp_path, expected):
    settings = TrainSettings(epochs=3, batch_size=8, device="cpu", workers=2)
    assert train(base, train_set, val_set, settings, tmp_path).weights.read_bytes() == expected


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_they_share_images_in_a_file_whatever_the_start_method(base, train_set, val_set, tmp_path, expected):
    (tmp_path / "pixels").write_bytes(train_set.images.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "pixels"), size=train_set.images.numel(), dtype=torch.uint8)
    cached = replace(train_set, images=mapped.reshape(train_set.images.shape))
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)  # Python 3.14's own
    try:
        done = train(base, cached, val_set, replace(SETTINGS, workers=1), tmp_path)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert done.weights.read_bytes() == expected


def test_colours_are_learned_by_a_pretrained_network(train_set, val_set, tmp_path):
    base = create_base(tmp_path / "base", architecture="efficientnet_lite0", classes=CLASSES, size=SIZE)
    settings = TrainSettings(epochs=6, batch_size=8, learning_rate=1e-3, device="cpu")
    reports = []
    done = train(base, train_set, val_set, settings, tmp_path / "run", on_epoch=reports.append)
    network = build(base)
    load_file(network, done.weights, base.layout)
    assert accuracy(evaluate(network, base, val_set)) > 0.6
    assert [report.epoch for report in reports] == list(range(1, 7))
    assert tuple(reports) == done.history
    assert done.validation.sum() == len(val_set)
    assert (done.images, done.batchnorm_images) == (len(train_set), len(train_set))


def test_batchnorm_is_trained_too(base, result):
    with base.open() as file:
        before = {name: file.read(f"{name}.weight") for name in base.batchnorm_layers}
    after = result.tensors(base)
    assert any(not np.array_equal(before[name], after[f"{name}.weight"]) for name in before)


@pytest.mark.parametrize("step", [0, 1, 2, 3, 5, 8])
def test_a_stop_at_any_step_goes_on_to_the_same_bits(base, train_set, val_set, tmp_path, expected, monkeypatch, step):
    stop, steps = threading.Event(), []

    def count(*arguments):
        steps.append(arguments)
        if len(steps) > step:
            stop.set()
        return learning_rate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate", count)
        if step == 8:  # the last step: nothing is left to stop
            train(base, train_set, val_set, SETTINGS, tmp_path, stop=stop)
        else:
            with pytest.raises(Interrupted):
                train(base, train_set, val_set, SETTINGS, tmp_path, stop=stop)
    assert train(base, train_set, val_set, SETTINGS, tmp_path).weights.read_bytes() == expected


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import torch
from pathlib import Path
from agent import train as training
from datavector.data.images import ImageSet
from datavector.model import BaseModel

torch.set_num_threads(int(sys.argv[5]))
step, left = training.learning_rate, int(sys.argv[4])

def dies(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)

training.learning_rate = dies
sets = torch.load(Path(sys.argv[2]) / "sets.pt", weights_only=True)
train_set, val_set = (ImageSet(images, labels, ("",) * len(labels), ()) for images, labels in sets)
settings = training.TrainSettings(epochs=3, batch_size=8, device="cpu")
training.train(BaseModel.load(Path(sys.argv[1])), train_set, val_set, settings, Path(sys.argv[2]))
"""


def test_kill_9_in_the_middle_of_an_epoch_ends_in_the_same_bits(base, train_set, val_set, tmp_path, expected):
    torch.save([(each.images, each.labels) for each in (train_set, val_set)], tmp_path / "sets.pt")
    root = str(training.Path(training.__file__).parents[1])
    command = [sys.executable, "-c", KILLED, str(base.path), str(tmp_path), root, "5", str(torch.get_num_threads())]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / training.CHECKPOINT).is_file()
    assert train(base, train_set, val_set, SETTINGS, tmp_path).weights.read_bytes() == expected


def test_a_finished_training_is_not_done_again(base, train_set, val_set, result):
    again = train(base, train_set, val_set, SETTINGS, result.weights.parent, on_epoch=pytest.fail)
    assert again.history == result.history
    assert sorted(path.name for path in result.weights.parent.iterdir()) == [training.RESULT, training.TUNED]


def test_what_training_leaves_is_its_owners_alone(base, train_set, val_set, tmp_path):
    stop = threading.Event()
    with pytest.raises(Interrupted):
        train(base, train_set, val_set, SETTINGS, tmp_path, stop=stop, on_epoch=lambda _: stop.set())
    half = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert half == {training.CHECKPOINT: 0o600, training.BEST: 0o600}
    done = train(base, train_set, val_set, SETTINGS, tmp_path)
    assert done.weights.stat().st_mode & 0o777 == 0o600


def test_a_kill_while_the_result_is_written_never_leaves_an_old_one_with_new_weights(
    base, train_set, val_set, tmp_path, expected, monkeypatch
):
    train(base, train_set, val_set, SETTINGS, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(base, train_set, val_set, replace(SETTINGS, seed=1), tmp_path)
    assert (tmp_path / training.TUNED).read_bytes() != expected
    assert train(base, train_set, val_set, SETTINGS, tmp_path).weights.read_bytes() == expected


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_images_are_hashed_once(base, train_set, val_set, tmp_path, monkeypatch):
    asked, key = [], training.Job.key
    monkeypatch.setattr(training.Job, "key", lambda *arguments: asked.append(arguments) or key(*arguments))
    train(base, train_set, val_set, replace(SETTINGS, epochs=1), tmp_path)
    assert len(asked) == 1


def test_a_checkpoint_of_other_images_is_not_gone_on_with(base, train_set, val_set, tmp_path, expected):
    stop = threading.Event()
    stop.set()
    fewer = ImageSet(train_set.images[:20], train_set.labels[:20], train_set.records[:20], ())
    with pytest.raises(Interrupted):
        train(base, fewer, val_set, SETTINGS, tmp_path, stop=stop)
    assert train(base, train_set, val_set, SETTINGS, tmp_path).weights.read_bytes() == expected


def test_a_checkpoint_of_another_precision_is_not_gone_on_with(
    base, train_set, val_set, tmp_path, expected, monkeypatch
):
    stop = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(training, "_precision", lambda _: torch.bfloat16)
        with pytest.raises(Interrupted):
            train(base, train_set, val_set, SETTINGS, tmp_path, stop=stop, on_epoch=lambda _: stop.set())
    assert train(base, train_set, val_set, SETTINGS, tmp_path).weights.read_bytes() == expected


@pytest.mark.parametrize(("generation", "precision"), [(7, torch.float16), (8, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float16(monkeypatch, generation, precision):
    """There is no GPU here: this one is said to be a V100 or T4 (7), or an A100 (8), and tensors can be made on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=generation))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert training._precision(torch.device("cuda")) is precision


@pytest.mark.parametrize("damage", ["half", "cut", "empty", "foreign"])
def test_a_damaged_checkpoint_is_not_gone_on_with(base, train_set, val_set, tmp_path, expected, damage):
    torch.save([1, 2, 3], tmp_path / "foreign")
    whole = (tmp_path / "foreign").read_bytes()
    content = {"half": b"half a checkpoint", "cut": whole[:-100], "empty": b"", "foreign": whole}[damage]
    (tmp_path / training.CHECKPOINT).write_bytes(content)
    assert train(base, train_set, val_set, SETTINGS, tmp_path).weights.read_bytes() == expected


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="this system has no file that cannot be read")
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(base, train_set, val_set, tmp_path):
    (tmp_path / training.CHECKPOINT).symlink_to("/proc/self/mem")  # reading its begin is an I/O error
    with pytest.raises(OSError, match="Input/output error"):
        train(base, train_set, val_set, SETTINGS, tmp_path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_checkpoint_for_which_memory_lacks_is_not_taken_for_a_damaged_one(
    base, train_set, val_set, tmp_path, monkeypatch, error
):
    def no_memory(*_, **__):
        raise error

    torch.save({}, tmp_path / training.CHECKPOINT)
    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(type(error)):
        train(base, train_set, val_set, SETTINGS, tmp_path)


def test_without_validation_images_the_last_epoch_is_kept(base, train_set, tmp_path):
    none = ImageSet(train_set.images[:0], train_set.labels[:0], (), ())
    done = train(base, train_set, none, SETTINGS, tmp_path)
    assert done.epoch == 3
    assert not done.validation.any()


def test_an_earlier_epoch_is_kept_only_where_the_later_one_is_clearly_worse():
    assert not clearly_worse(0.8, 0.9, 18)
    assert clearly_worse(0.5, 0.9, 18)
    assert clearly_worse(0.87, 0.9, 2000)
    assert not clearly_worse(0.9, 0.9, 2000)
    assert not clearly_worse(float("nan"), 0.0, 0)


def test_a_class_without_images_gives_finite_weights(base, train_set, val_set, tmp_path):
    two = train_set.labels < 2
    partial = ImageSet(train_set.images[two], train_set.labels[two], train_set.records[: int(two.sum())], ())
    done = train(base, partial, val_set, SETTINGS, tmp_path)
    assert all(np.isfinite(tensor).all() for tensor in done.tensors(base).values())
    assert class_log_prior(torch.tensor([0, 0, 1]), 4).isfinite().all()


def test_a_training_that_diverges_says_so(base, train_set, val_set, tmp_path):
    with pytest.raises(NotFinite, match="diverged"):
        train(base, train_set, val_set, TrainSettings(learning_rate=1e30, device="cpu"), tmp_path)


def test_a_disk_that_the_checkpoint_fills_is_said_to_be_full(base, train_set, val_set, tmp_path, small_disk):
    small_disk(tmp_path / "disk", 2 * base.layout.size >> 20)  # a checkpoint has three times the weights
    with pytest.raises(DiskFull, match=r"on the disk of .*checkpoint\.pt"):
        train(base, train_set, val_set, SETTINGS, tmp_path / "disk")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == [training.BEST]


def test_a_disk_that_the_images_for_several_processes_fill_is_said_to_be_full(
    base, train_set, val_set, tmp_path, small_disk
):
    small_disk(tmp_path / "disk", 1)
    (tmp_path / "disk" / "other").write_bytes(bytes((1 << 20) - train_set.images.nbytes // 2))
    with pytest.raises(DiskFull, match="on the disk of"):
        train(base, train_set, val_set, replace(SETTINGS, processes=2), tmp_path / "disk")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["other"]


def test_one_image_is_too_few(base, train_set, val_set, tmp_path):
    one = ImageSet(train_set.images[:1], train_set.labels[:1], train_set.records[:1], ())
    with pytest.raises(NoImages):
        train(base, one, val_set, SETTINGS, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(base, train_set, val_set, tmp_path):
    with pytest.raises(UsageError, match="no GPU"):
        train(base, train_set, val_set, TrainSettings(device="cuda"), tmp_path)


def test_every_image_comes_at_most_once_an_epoch_in_an_order_of_its_own():
    first, again, second = (epoch_batches(26, SETTINGS, epoch) for epoch in (0, 0, 1))
    flat = [index for batch in first for index in batch]
    assert first == again != second
    assert len(flat) == len(set(flat)) == 24
    assert epoch_batches(3, SETTINGS, 0) != []


def test_the_learning_rate_rises_then_falls_to_nothing():
    rates = [learning_rate(step, 100, 1e-3) for step in range(100)]
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) < 15
    assert rates[-1] < 1e-5
    assert min(rates) > 0


# --- Several processes: three, as two numbers have only one sum


@pytest.fixture
def several(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return replace(SETTINGS, processes=2)


@pytest.mark.slow
def test_three_processes_that_were_stopped_go_on_to_the_same_bits(
    base, train_set, val_set, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings, reports, stop = replace(SETTINGS, epochs=5, batch_size=6, processes=3), [], threading.Event()
    done = train(base, train_set, val_set, settings, tmp_path / "whole", on_epoch=reports.append)
    assert [report.epoch for report in reports] == [1, 2, 3, 4, 5]
    assert done.history == tuple(reports)
    assert sorted(path.name for path in done.weights.parent.iterdir()) == [training.RESULT, training.TUNED]
    with pytest.raises(Interrupted):
        train(base, train_set, val_set, settings, tmp_path / "parts", stop=stop, on_epoch=lambda _: stop.set())
    assert "Traceback" not in capfd.readouterr().err
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [training.BEST, training.CHECKPOINT]
    resumed = train(base, train_set, val_set, settings, tmp_path / "parts")
    assert resumed.weights.read_bytes() == done.weights.read_bytes()
    assert [report.train_loss for report in resumed.history] == [report.train_loss for report in done.history]


@pytest.mark.slow
def test_several_processes_may_each_have_workers_that_prepare_images(base, train_set, val_set, tmp_path, several):
    without = train(base, train_set, val_set, several, tmp_path / "without").weights.read_bytes()
    settings = replace(several, workers=1)
    assert train(base, train_set, val_set, settings, tmp_path / "with").weights.read_bytes() == without


@pytest.mark.slow
def test_several_processes_that_diverge_say_so(base, train_set, val_set, tmp_path, several, capfd):
    with pytest.raises(NotFinite, match="diverged in epoch 1; lower learning_rate"):
        train(base, train_set, val_set, replace(several, learning_rate=1e30), tmp_path)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_disk_that_the_first_of_several_processes_fills_is_said_to_be_full_and_nobody_waits_for_it(
    base, train_set, val_set, tmp_path, several, small_disk, capfd
):
    small_disk(tmp_path / "disk", 2 * base.layout.size >> 20)
    with pytest.raises(DiskFull, match=r"on the disk of .*checkpoint\.pt"):
        train(base, train_set, val_set, several, tmp_path / "disk")
    assert "Traceback" not in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "disk").iterdir()] == [training.BEST]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
def test_one_of_several_processes_that_is_killed_ends_the_others(base, train_set, val_set, tmp_path, several):
    def kill_the_second(_):
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                ours = str(tmp_path).encode() in (process / "cmdline").read_bytes()
                if ours and b"\0RANK=1\0" in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)

    with pytest.raises(TrainingFailed, match=r"ended with exit code 1; .* go on from the last checkpoint"):
        train(base, train_set, val_set, replace(several, epochs=50), tmp_path, on_epoch=kill_the_second)
    assert sorted(path.name for path in tmp_path.iterdir()) == [training.BEST, training.CHECKPOINT]


@pytest.fixture(scope="module")
def together(base, train_set, tmp_path_factory):
    """What `tests.agent.together` leaves, with three processes."""
    folder = tmp_path_factory.mktemp("together")
    torch.save((train_set.images, train_set.labels), folder / "set.pt")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "tests.agent.together", str(base.path), str(folder)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], env=environment)
    return folder


@pytest.mark.slow
def test_every_process_gets_the_mean_over_all_and_whatever_is_not_finite(together):
    for rank in range(3):
        mean, not_finite = torch.load(together / f"averages-{rank}.pt", weights_only=True)
        assert torch.equal(mean[0], torch.full((2, 3), 1.0))
        assert torch.equal(mean[1], torch.arange(4.0).reshape(2, 2).T)
        assert not_finite[0].isinf().all()
        assert not_finite[1].isfinite().all()


@pytest.mark.slow
def test_every_processs_images_change_the_weights(base, together):
    def trained(name):
        with TensorFile(together / name / training.BEST, base.layout) as file:
            return {spec.name: file.read(spec.name) for spec in base.layout.tensors if not is_statistic(spec.name)}

    usual = trained("usual")
    for rank in range(3):
        assert any(not np.array_equal(usual[name], other) for name, other in trained(f"other-{rank}").items())
