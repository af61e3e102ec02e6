"""Merging plain checkpoints: the same as merging vectors, whatever the format and the type."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from datavector.checkpoints import compare_files, merge_files
from datavector.errors import ArtifactError, NotFinite, UsageError, WrongLayout
from datavector.merge import methods


def state(seed, dtype=torch.float32, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.Generator().manual_seed(0)
    shapes = {"conv.weight": (4, 3, 3, 3), "fc.weight": (7, 500), "fc.bias": (7,), "bn.running_mean": (4,)}
    tensors = {
        name: (torch.randn(shape, generator=base) + shift * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }
    return tensors | {"bn.num_batches_tracked": torch.tensor(seed)}


@pytest.fixture
def files(tmp_path):
    """A base and three models that were fine-tuned from it."""
    made = {"base": state(0)} | {f"m{seed}": state(seed, shift=0.01) for seed in (1, 2, 3)}
    for name, tensors in made.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path


def models(folder, suffix=".safetensors"):
    return [folder / f"m{seed}{suffix}" for seed in (1, 2, 3)]


def test_the_sum_is_the_base_plus_all_differences_and_the_rest_is_the_bases(files):
    assert merge_files(files / "base.safetensors", models(files), "sum", {}, files / "out.safetensors")
    base, found = load_file(files / "base.safetensors"), load_file(files / "out.safetensors")
    tuned = [load_file(path) for path in models(files)]
    for name in ("conv.weight", "fc.weight", "fc.bias"):
        expected = base[name].double() + sum(each[name].double() - base[name].double() for each in tuned)
        torch.testing.assert_close(found[name], expected.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["bn.running_mean"], base["bn.running_mean"])
    assert found["bn.num_batches_tracked"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_output_has_the_bases_types(tmp_path, dtype):
    for name, tensors in {"base": state(0, dtype), "m1": state(1, dtype, 0.05), "m2": state(2, dtype, 0.05)}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    merge_files(
        tmp_path / "base.safetensors", [tmp_path / "m1.safetensors", tmp_path / "m2.safetensors"], "mean", {},
        tmp_path / "out.safetensors",
    )  # fmt: skip
    found = load_file(tmp_path / "out.safetensors")["fc.weight"]
    tuned = [load_file(tmp_path / f"m{seed}.safetensors")["fc.weight"].double() for seed in (1, 2)]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), (tuned[0] + tuned[1]) / 2, rtol=1e-2, atol=1e-2)


def test_weights_that_overflow_the_bases_type_are_refused_and_leave_nothing(tmp_path):
    for name, value in {"base": 0.0, "m1": 6e4, "m2": 6e4}.items():
        save_file({"fc.weight": torch.full((2, 2), value, dtype=torch.float16)}, tmp_path / f"{name}.safetensors")
    tuned = [tmp_path / "m1.safetensors", tmp_path / "m2.safetensors"]
    with pytest.raises(NotFinite, match=r"fc\.weight overflow F16"):
        merge_files(tmp_path / "base.safetensors", tuned, "sum", {}, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1))
@settings(deadline=None)
def test_bfloat16_is_rounded_as_torch_rounds_it(values):
    from datavector.checkpoints import _from_float, _to_float

    array = np.array(values, dtype=np.float32)
    expected = torch.from_numpy(array).bfloat16()
    np.testing.assert_array_equal(_to_float(_from_float(array, "BF16"), "BF16"), expected.float().numpy())


@pytest.mark.parametrize("method", sorted(set(methods()) - {"fisher", "regmean"}))
def test_every_method_merges_checkpoints_in_any_order(files, method):
    for number, order in enumerate([models(files), models(files)[::-1]]):
        merge_files(files / "base.safetensors", order, method, {}, files / f"{number}.safetensors")
    assert (files / "0.safetensors").read_bytes() == (files / "1.safetensors").read_bytes()


def test_pytorch_files_give_what_safetensors_give(files):
    for name in ("base", "m1", "m2", "m3"):
        torch.save(load_file(files / f"{name}.safetensors"), files / f"{name}.pt")
    merge_files(files / "base.safetensors", models(files), "ties", {"density": 0.3}, files / "a.safetensors")
    merge_files(files / "base.pt", models(files, ".pt"), "ties", {"density": 0.3}, files / "b.safetensors")
    first, second = load_file(files / "a.safetensors"), load_file(files / "b.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_output_says_how_it_was_made(files):
    merge_files(files / "base.safetensors", models(files), "dare", {"seed": 3}, files / "out.safetensors")
    with safe_open(files / "out.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["method"] == "dare"
    assert json.loads(metadata["parameters"])["seed"] == 3
    assert json.loads(metadata["models"]) == ["m1.safetensors", "m2.safetensors", "m3.safetensors"]


def test_samples_weigh(files):
    merge_files(
        files / "base.safetensors", models(files), "weighted-mean", {}, files / "out.safetensors", samples=[98, 1, 1]
    )
    tuned = [load_file(path)["fc.bias"].double() for path in models(files)]
    expected = 0.98 * tuned[0] + 0.01 * tuned[1] + 0.01 * tuned[2]
    torch.testing.assert_close(load_file(files / "out.safetensors")["fc.bias"], expected.float(), rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="2 samples for 3 models"):
        merge_files(files / "base.safetensors", models(files), "mean", {}, files / "x", samples=[1, 2])


def test_inner_products_are_those_of_the_differences(files):
    base = load_file(files / "base.safetensors")
    rows = [
        torch.cat(
            [
                (load_file(path)[name] - base[name]).double().flatten()
                for name in ("conv.weight", "fc.weight", "fc.bias")
            ]
        )
        for path in models(files)
    ]
    expected = torch.stack(rows) @ torch.stack(rows).T
    np.testing.assert_allclose(compare_files(files / "base.safetensors", models(files)), expected.numpy(), rtol=1e-9)


def test_a_model_of_other_tensors_is_refused_by_name(files):
    other = load_file(files / "m1.safetensors")
    save_file(other | {"fc.weight": torch.zeros(8, 500)}, files / "wide.safetensors")
    save_file({name: tensor for name, tensor in other.items() if name != "fc.bias"}, files / "less.safetensors")
    for name, says in (("wide", "fc.weight"), ("less", "fc.bias")):
        with pytest.raises(WrongLayout, match=says):
            merge_files(files / "base.safetensors", [files / f"{name}.safetensors"], "sum", {}, files / "out")
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" + b"x" * 100,
        (1 << 60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{",
        (62).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(62),
        (62).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}'.ljust(62) + b"x" * 9,
        (62).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":"no","data_offsets":[0,8]}}'.ljust(62) + b"x" * 9,
    ],
)
def test_a_file_that_only_looks_like_a_checkpoint_is_refused(files, content):
    (files / "odd.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError):
        merge_files(files / "base.safetensors", [files / "odd.safetensors"], "sum", {}, files / "out")


def test_a_pytorch_file_with_code_in_it_is_refused(files):
    torch.save(torch.nn.Linear(2, 2), files / "module.pt")
    with pytest.raises(ArtifactError, match="no PyTorch state dict"):
        merge_files(files / "module.pt", [files / "module.pt"], "sum", {}, files / "out")


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "datavector", "merge", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_command_merges_and_compares(files):
    base, picture = files / "base.safetensors", files / "cosines.png"
    done = command("--base", base, "--method", "ties", "--param", "density=0.2", *models(files), "-o", files / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ties of 3 models" in done.stdout
    assert "BatchNorm statistics are the base's" in done.stdout
    shown = command("--base", base, "--compare", "--picture", picture, *models(files))
    assert shown.returncode == 0
    assert "1.000" in shown.stdout
    assert "m3.safetensors" in shown.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--method", "tise"], 2, "did you mean 'ties'"),
        (["--method", "ties", "--param", "densty=0.2"], 2, "did you mean 'density'"),
        (["--param", "scale"], 2, "not name=number"),
        (["--method", "fisher"], 2, "only hospitals send"),
    ],
)
def test_the_command_names_what_is_wrong(files, arguments, code, says):
    done = command("--base", files / "base.safetensors", *arguments, *models(files), "-o", files / "out")
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    missing = command("--base", files / "absent.safetensors", *models(files), "-o", files / "out")
    assert missing.returncode == 1
    assert "absent.safetensors" in missing.stderr
