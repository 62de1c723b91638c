"""torch.compile, of the model and of the step."""

import compiled
import plain_pytorch
import pytest
import torch
from same_bits import assert_same, parameters_of
from torch._dynamo.testing import CompileCounter

PACKAGES = ()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """The same training without a compiler, but that its biases and norms do not decay."""
    return plain_pytorch.main(10, tmp_path_factory.mktemp("eager") / "checkpoint.pt")


def test_trains(eager, tmp_path):
    model, optimizer, losses = compiled.main(10, tmp_path / "checkpoint.pt")
    assert losses[-1] < losses[0] * 0.7
    assert optimizer.gains() == pytest.approx(eager[1].gains(), rel=1e-5)
    for name, param in parameters_of(eager[0]).items():
        torch.testing.assert_close(model.get_parameter(name), param, rtol=1e-3, atol=1e-3)


def test_resumes_with_the_same_bits(tmp_path):
    """Compiled anew, with the gains that the checkpoint holds."""
    for steps, name in [(10, "whole.pt"), (4, "half.pt"), (10, "half.pt")]:
        torch._dynamo.reset()
        compiled.main(steps, tmp_path / name)
    assert_same(torch.load(tmp_path / "half.pt"), torch.load(tmp_path / "whole.pt"))


def test_a_schedule_has_nothing_compiled_again(monkeypatch, tmp_path):
    counter, counts = CompileCounter(), []
    take = torch.nn.utils.clip_grad_norm_  # called once a step
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda *args: (counts.append(counter.frame_count), take(*args)),
    )
    compiled.main(8, tmp_path / "checkpoint.pt", counter)
    assert counts[0] >= 1, "the model was not compiled"
    assert counts[3] > counts[0], "the step was not compiled"
    assert counts[-1] == counts[3]
