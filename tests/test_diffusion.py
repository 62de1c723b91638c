"""The digits' diffusion, made small: two stages that go on exactly, and who judges them."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_training import assert_same_training, go, raise_signal_at, weights

from nomadam.experiments import sample_quality
from nomadam.experiments.configuration import from_json, override, short_hash, to_json
from nomadam.experiments.data.noised_images import load_noised
from nomadam.experiments.denoising import LoRAUNetModel, NoisedImageData, UNetModel
from nomadam.experiments.diffusion import NEW_CLASS, demo, pretrain
from nomadam.experiments.sample_quality import frechet_distance, judged, write_grid
from nomadam.runs import Interrupted

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
Image = pytest.importorskip("PIL.Image")
SMALL = {
    "steps": "4",
    "batch_size": "4",
    "evaluate_every": "2",
    "evaluation_batches": "2",
    "model.pretraining.model.channels": "8,8",
    "model.pretraining.model.sampling_steps": "2",
    "model.pretraining.model.num_samples": "64",
    "model.pretraining.steps": "2",
    "model.pretraining.evaluation_batches": "1",
}


@pytest.fixture
def quick_judge(monkeypatch):
    monkeypatch.setattr(sample_quality, "TRAINING_STEPS", 2)


@pytest.fixture(scope="module")
def zeros():
    return load_noised("digits", classes=[0], validation_fraction=1 / 3, draws=3)


def test_adapters_are_trained_on_a_frozen_first_stage_and_go_on_exactly(tmp_path, quick_judge):
    run = override(demo(), SMALL)
    result = go(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(run, tmp_path / "parts", progress=raise_signal_at(3, "SIGINT"))
    again = go(run, tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 4)
    first = run.model.first_stage()
    found = tmp_path / f"diffusion.pretrain-{short_hash(first)}"
    before, after = weights(found, 2), run.model.build(image_size=8, channels=1, pretrained=found)
    own = after.state_dict()
    frozen = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): tensor
        for name, tensor in own.items()
        if "lora" not in name
    }
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], before[name]) for name in before)
    trained = weights(tmp_path / "whole", 4)
    assert all("lora" in name for name in trained)
    moved = {name for name in trained if not torch.equal(trained[name], own[name])}
    assert any("lora_A" in name for name in moved) and any("lora_B" in name for name in moved)
    judged_as = {"recognised", "recognised_held_out", "frechet_distance"}
    assert judged_as < result.keys()
    assert all(result[name] == again[name] for name in judged_as)
    pictures = [(tmp_path / each / "samples.png").read_bytes() for each in ("whole", "parts")]
    assert pictures[0] == pictures[1] != (found / "samples.png").read_bytes()


def test_the_first_stage_has_seen_the_other_classes_and_is_the_same_for_all_optimizers():
    stages = [demo(optimizer).model.first_stage() for optimizer in ("adamw", "sgd_sai")]
    assert stages[0] == stages[1] == pretrain()
    assert set(stages[0].data.classes) == set(range(10)) - {NEW_CLASS}
    assert demo().data.classes == (NEW_CLASS,)
    for run in (demo(), pretrain()):
        assert from_json(to_json(run)) == run


def test_an_adapter_says_nothing_at_first(zeros):
    unet = UNetModel(channels=(8, 8))
    run = dataclasses.replace(pretrain(), model=unet)
    model = LoRAUNetModel(pretraining=run, rank=2)
    batch = next(zeros.validation_batches(batch_size=16))
    losses = []
    for each in (unet, model):
        torch.manual_seed(0)
        module = each.build(image_size=8, channels=1).eval()
        losses.append(each.loss(module, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    with pytest.raises(ValueError, match="'nowhere': must be an end of a layer's name"):
        dataclasses.replace(model, targets=("nowhere",)).build(image_size=8, channels=1)


class Given(torch.nn.Module):
    """Stands for a UNet: what it is given, times a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, noised, steps):
        return SimpleNamespace(sample=noised * self.weight)


def test_the_loss_is_the_error_of_the_noise_under_the_cosine_schedule(zeros):
    model = UNetModel(channels=(8,), timesteps=100, sampling_steps=10)
    batch = next(zeros.validation_batches(batch_size=64))
    assert model.loss(Given(0.0), batch).item() == pytest.approx(batch.noise.square().mean().item())
    steps = (batch.times.double() * 100).floor()

    def kept(step):  # part of the variance that is the image's, arXiv 2102.09672, eq. 17
        return torch.cos((step / 100 + 0.008) / 1.008 * math.pi / 2) ** 2

    share = (kept(steps + 1) / kept(torch.tensor(0.0)))[:, None, None, None]
    inside = share.flatten() > 1e-3  # the schedule's end is clipped
    noised = share.sqrt() * batch.images + (1 - share).sqrt() * batch.noise
    expected = (noised - batch.noise)[inside].square().mean().item()
    rows = dataclasses.replace(
        batch, images=batch.images[inside], noise=batch.noise[inside], times=batch.times[inside]
    )
    assert model.loss(Given(1.0), rows).item() == pytest.approx(expected, rel=1e-4)


def test_sampling_finds_the_only_image_there_is():
    from nomadam.experiments.denoising import _noise_schedule

    model = UNetModel(channels=(8,), timesteps=200, sampling_steps=20)
    image = torch.linspace(-1, 1, 64).reshape(1, 8, 8)

    class Knows(Given):
        def forward(self, noised, step):
            share = _noise_schedule(200).alphas_cumprod[step]
            return SimpleNamespace(sample=(noised - share.sqrt() * image) / (1 - share).sqrt())

    drawn = model.samples(Knows(0.0), (1, 8, 8), number=3)
    assert drawn.shape == (3, 1, 8, 8)
    assert (drawn - image).abs().max() < 1e-3


def test_training_batches_are_pure_and_of_the_chosen_classes(zeros):
    one = zeros.train_batch(seed=1, step=2, micro=3, batch_size=8)
    same = zeros.train_batch(seed=1, step=2, micro=3, batch_size=8)
    assert all(torch.equal(getattr(one, n), getattr(same, n)) for n in ("images", "noise", "times"))
    for other in ({"seed": 2}, {"step": 3}, {"micro": 0}):
        changed = zeros.train_batch(**{"seed": 1, "step": 2, "micro": 3, "batch_size": 8} | other)
        assert not torch.equal(one.noise, changed.noise) and not one.times.equal(changed.times)
    chosen = torch.from_numpy(zeros.chosen.images[: zeros.chosen.num_train]) * 2 - 1
    assert all((image == chosen).flatten(1).all(1).any() for image in one.images)
    assert set(zeros.chosen.labels) == {0} and len(zeros.everything.labels) == 1797
    assert chosen.min() == -1 and chosen.max() == 1


def test_held_out_noise_is_the_same_at_each_evaluation_and_spread_evenly(zeros):
    whole = next(zeros.validation_batches(batch_size=10_000))
    assert len(whole) == 3 * zeros.chosen.num_validation
    parts = list(zeros.validation_batches(batch_size=7))
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    assert torch.equal(torch.cat([part.times for part in parts]), whole.times)
    held_out = torch.from_numpy(zeros.chosen.images[zeros.chosen.num_train :]) * 2 - 1
    assert torch.equal(whole.images[: len(held_out)], held_out)
    assert torch.equal(whole.images[-len(held_out) :], held_out)
    gaps = whole.times.sort().values.diff()
    assert gaps.max() < 3 / len(whole) and 0 <= whole.times.min() and whole.times.max() < 1
    assert len(list(zeros.validation_batches(batch_size=7, max_batches=2))) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNetModel(channels=(12,)), "multiples of 8"),
        (lambda: UNetModel(channels=()), "multiples of 8"),
        (lambda: UNetModel(channels=(8,), sampling_steps=1001), "from 1 to 1000"),
        (lambda: UNetModel(channels=(8,) * 5).build(image_size=8, channels=1), "halved 4 times"),
        (lambda: NoisedImageData(classes=()), "at least one"),
        (lambda: NoisedImageData(classes=(1, 1)), "none twice"),
        (lambda: NoisedImageData(classes=(1, 11)).load(), "data.classes has 11"),
        (lambda: NoisedImageData(classes=(1,), source="letters").load(), "data.source = 'letters'"),
        (lambda: override(demo(), {"model.rank": "0"}), "model.rank = 0"),
        (lambda: LoRAUNetModel(pretraining=demo()), "model.pretraining.model"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("field", ["data.classes", "model.targets"])
def test_no_first_stage_is_trained_in_vain(tmp_path, field):
    with pytest.raises(ValueError, match=f"{field}.* 42|{field} = '42'"):
        go(override(demo(), {**SMALL, field: "42"}), tmp_path / "run")
    assert not list(tmp_path.glob("diffusion.pretrain-*"))


def dense_frechet_distance(one, other):
    from scipy.linalg import sqrtm

    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = sqrtm(first @ second)
    gap = one.mean(0) - other.mean(0)
    return gap @ gap + np.trace(first + second - 2 * root).real


def test_the_frechet_distance_is_that_of_the_dense_formula():
    draw = np.random.default_rng(0)
    one = draw.normal(size=(200, 6)) @ draw.normal(size=(6, 6)) + draw.normal(size=6)
    other = draw.normal(size=(90, 6)) @ draw.normal(size=(6, 6))
    expected = dense_frechet_distance(one, other)
    assert expected > 1
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)
    # In one dimension: (m1 - m2)^2 + (s1 - s2)^2.
    a, b = one[:, :1], other[:, :1]
    by_hand = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(by_hand, rel=1e-9)


def test_the_frechet_distance_of_few_or_constant_features_is_finite_and_none_from_itself():
    draw = np.random.default_rng(1)
    few = draw.normal(size=(5, 20)).astype(np.float32)
    few[:, 3] = 2.0
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, few + 1) == pytest.approx(20, rel=1e-5)
    for bad in (few[:1], few[:, :7], few[0], np.full_like(few, np.nan)):
        with pytest.raises(ValueError, match="features"):
            frechet_distance(few, bad)


def test_the_demonstration_is_large_enough():
    """The trainings behind docs/studies.md: digits that are digits, and a loss that LoRA lowers."""
    results = Path(__file__).parents[1] / "results"
    first, before = (
        json.loads(next(results.glob(f"diffusion_first_stage/{name}/result.json")).read_text())
        for name in ("diffusion.pretrain-*", "diffusion.demo-before")
    )
    assert first["recognised"] > 0.8
    lowest = min(
        json.loads(path.read_text())["validation_loss"]
        for path in results.glob("claims/diffusion/*/result.json")
    )
    assert lowest < 0.9 * before["validation_loss"]


def test_the_judge_knows_digits_from_noise_and_from_other_digits(zeros, monkeypatch):
    monkeypatch.setattr(sample_quality, "TRAINING_STEPS", 150)
    real = torch.from_numpy(zeros.everything.images[-599:]) * 2 - 1
    labels = torch.from_numpy(zeros.everything.labels[-599:])
    before = torch.get_rng_state()
    judge = sample_quality.classifier(zeros.everything)
    monkeypatch.setattr(sample_quality, "classifier", lambda data: judge)
    own = judged(real[labels == 0], zeros)
    assert torch.equal(before, torch.get_rng_state())
    assert own["recognised"] == own["recognised_held_out"] > 0.8
    alike = pytest.approx(own["frechet_distance_held_out"], rel=1e-4)
    assert own["frechet_distance"] == alike
    for wrong in (real[labels == 1], torch.rand(64, 1, 8, 8) * 2 - 1):
        found = judged(wrong, zeros)
        assert found["recognised"] < 0.1
        assert found["frechet_distance"] > 3 * own["frechet_distance"]


def test_the_grid_holds_every_sample_in_its_place(tmp_path):
    samples = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 2, 3)
    write_grid(samples, tmp_path / "grey.png", columns=3, scale=4)
    with Image.open(tmp_path / "grey.png") as opened:
        grey = np.array(opened)
    assert grey.shape == (2 * (2 * 4 + 2), 3 * (3 * 4 + 2))
    middles = grey[5::10, 7::14]
    assert middles.tolist() == [[255, 191, 128], [64, 0, 200]]
    colour = torch.full((1, 3, 2, 2), -1.0)
    colour[:, 0] = 1
    write_grid(colour, tmp_path / "red.png", scale=1)
    with Image.open(tmp_path / "red.png") as opened:
        assert opened.size == (4, 4) and opened.getpixel((1, 1)) == (255, 0, 0)
    with pytest.raises(ValueError, match=r"\[n, 1 or 3, height, width\]"):
        write_grid(torch.zeros(1, 2, 4, 4), tmp_path / "two.png")
