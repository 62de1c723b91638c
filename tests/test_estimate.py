"""What a Run would cost: frozen parameters and every held-out row are counted."""

import dataclasses

import pytest
from tiny_training import TinyModel, go, tiny_run

from nomadam.experiments import diffusion, vit_classification
from nomadam.experiments.configuration import override
from nomadam.experiments.estimate import estimate, validation_batches
from nomadam.runs import RunFolder
from nomadam.terminal import estimate_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartlyFrozen(TinyModel):
    """Its embedding, of 32 times 8 values, stays as it is."""

    def build(self, *, vocab_size):
        module = super().build(vocab_size=vocab_size)
        module[0].weight.requires_grad_(False)
        return module


def test_frozen_parameters_are_told_and_weigh(tmp_path):
    frozen, whole = tiny_run(model=PartlyFrozen()), tiny_run()
    results = [go(run, tmp_path / str(number)) for number, run in enumerate((frozen, whole))]
    everything = results[1]["num_params"]
    assert "num_all_params" not in results[1]
    assert results[0]["num_params"] == everything - 256
    assert results[0]["num_all_params"] == everything
    header = RunFolder(tmp_path / "0").read_json("run.json")
    assert header["num_params"] == everything - 256 and header["num_all_params"] == everything
    cost = estimate(frozen, device="cpu")
    assert cost["num_all_params"] == everything == cost["num_params"] + 256
    assert cost["parameter_mb"] == everything * 4 / 1e6
    assert cost["gradient_mb"] == cost["num_params"] * 4 / 1e6
    told = f"{everything - 256:,} of {everything:,} train ("
    assert told in "\n".join(estimate_lines(cost))
    assert f"{everything:,} (" in "\n".join(estimate_lines(estimate(whole, device="cpu")))


@pytest.mark.parametrize("make", [diffusion.demo, diffusion.pretrain, vit_classification.demo])
@pytest.mark.parametrize("most", [None, 3])
def test_as_many_held_out_batches_as_there_are(make, most):
    run = override(make(), {"evaluation_batches": most})
    dataset = run.data.load()
    batches = run.data.validation_batches(dataset, batch_size=run.batch_size, max_batches=most)
    assert validation_batches(run, dataset.description) == len(list(batches))


def test_a_picture_of_a_concept_is_held_out_as_often_as_it_is_noised():
    fields = {"data.weights": "w", "data.pictures": "p", "data.draws": 16, "batch_size": 4}
    run = override(diffusion.stable_diffusion_lora(), fields)
    assert validation_batches(run, {"validation_images": 3}) == 12
