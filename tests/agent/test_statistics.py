import numpy as np
import torch
from torch.nn import functional

from agent.statistics import write_statistics
from datavector.layout import TensorFile
from datavector.merge.statistics import FISHER, REGMEAN, layout_of
from datavector.networks import build, preprocess


def some_images(base, count=5):
    generator = torch.Generator().manual_seed(0)
    size = base.input.size
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % len(base.classes)


def test_fisher_information_is_the_mean_squared_gradient(base, tmp_path):
    (images, labels), network = some_images(base), build(base)
    write_statistics(FISHER, tmp_path / "fisher", network, base, images, labels)
    head = f"{base.head}.weight"
    expected = 0
    for index in range(len(images)):
        network.zero_grad()
        logits = network(preprocess(images[index : index + 1], base.input))
        functional.cross_entropy(logits, labels[index : index + 1]).backward()
        expected = expected + network.get_parameter(head).grad.square() / len(images)
    with TensorFile(tmp_path / "fisher", layout_of(FISHER, base)) as file:
        np.testing.assert_allclose(file.read(head), expected.numpy(), rtol=1e-4, atol=1e-9)


def test_a_gram_matrix_gives_a_layers_squared_answers(base, tmp_path):
    """The sum over places of (W x)^2 is the diagonal of W G W^T, for every layer that is a matrix."""
    (images, labels), network = some_images(base), build(base)
    write_statistics(REGMEAN, tmp_path / "regmean", network, base, images, labels)
    layout, answers = layout_of(REGMEAN, base), {}

    def keep(name, layer, output):
        values = output if layer.bias is None else output - layer.bias.reshape(1, -1, *[1] * (output.dim() - 2))
        axes = [axis for axis in range(output.dim()) if axis != 1]
        answers[name] = answers.get(name, 0) + values.double().square().sum(axes)

    for name, layer in network.named_modules():
        if f"{name}.weight" in layout.by_name and getattr(layer, "groups", 1) == 1:
            layer.register_forward_hook(lambda module, _, output, name=f"{name}.weight": keep(name, module, output))
    with torch.no_grad():
        network(preprocess(images, base.input))
    assert answers
    with TensorFile(tmp_path / "regmean", layout) as file:
        for name, squares in answers.items():
            weight = network.get_parameter(name).detach().double().flatten(1).numpy()
            found = np.einsum("oi,ij,oj->o", weight, file.read(name).astype(np.float64), weight)
            np.testing.assert_allclose(found, squares.numpy(), rtol=1e-3)
