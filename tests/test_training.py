"""The training loop: against a loop written by hand, and in every way that a training can end."""

import dataclasses
import json
import math
import os
import random
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_training import (
    VOCABULARY,
    TinyData,
    TinyModel,
    assert_same_training,
    go,
    raise_signal_at,
    tiny_run,
    weights,
    without_timings,
)

from nomadam.experiments import checkpoints
from nomadam.experiments.configuration import OptimizerChoice, override, to_json
from nomadam.experiments.gpt2_pretraining import demo
from nomadam.experiments.language_model import GPT2Model
from nomadam.experiments.preparation import check_optimizer
from nomadam.experiments.schedule import Schedule
from nomadam.experiments.training import train
from nomadam.optimizers.baselines import BASELINES, build_optimizer
from nomadam.runs import (
    AnotherRunError,
    FolderInUseError,
    Interrupted,
    RunFolder,
)


def by_hand(run):
    """The same training in a few plain lines: the losses, and the weights at the end."""
    torch.manual_seed(run.seed)
    module = run.model.build(vocab_size=VOCABULARY)
    optimizer = build_optimizer(
        run.optimizer.name,
        module,
        lr=run.optimizer.lr,
        weight_decay=run.optimizer.weight_decay,
    )
    torch.manual_seed(run.seed)
    losses = []
    for step in range(1, run.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = run.optimizer.lr * run.schedule.factor(step, run.steps)
        batch = run.data.train_batch(
            None, seed=run.seed, step=step, micro=0, batch_size=run.batch_size
        )
        loss = run.model.loss(module, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), run.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    module.eval()
    total = rows = 0
    with torch.no_grad():
        for batch in run.data.validation_batches(None, batch_size=run.batch_size, max_batches=None):
            total += run.model.loss(module, batch).item() * len(batch)
            rows += len(batch)
    return losses, module.state_dict(), total / rows


@pytest.mark.parametrize("optimizer", ["sgd_sai", "adamw"])
def test_it_is_the_loop_written_by_hand(tmp_path, optimizer):
    run = tiny_run(optimizer, evaluate_every=100)
    result = go(run, tmp_path)
    losses, final, validation_loss = by_hand(run)
    assert [record["train_loss"] for record in RunFolder(tmp_path).metrics()] == losses
    assert result["validation_loss"] == pytest.approx(validation_loss, rel=1e-12)
    for name, tensor in weights(tmp_path, run.steps).items():
        assert torch.equal(tensor, final[name]), name


def test_the_run_folder_has_everything(tmp_path):
    run = tiny_run(steps=10)
    seen = []
    result = go(run, tmp_path, progress=seen.append)
    home = RunFolder(tmp_path)
    metrics = home.metrics()
    assert [record["step"] for record in metrics] == list(range(1, 11))
    assert json.loads(json.dumps(seen)) == [{**line, "unit": "token"} for line in metrics]
    assert [record["step"] for record in metrics if "validation_loss" in record] == [4, 8, 10]
    assert [record["tokens"] for record in metrics] == [24 * step for step in range(1, 11)]
    seconds = [record["seconds"] for record in metrics]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert metrics[-1]["lr"] == 0 and max(record["lr"] for record in metrics) == 3e-2
    for record in metrics:
        assert 0 < record["optimizer_ms"] < record["step_ms"]
        assert record["grad_norm"] > 0 and record["peak_memory_mb"] > 10

    header = home.read_json("run.json")
    assert header["run"] == to_json(run) and header["format"] == 1
    assert header["data"]["sha256"] == TinyData().load().description["sha256"]
    assert "SGDSaI" in header["optimizer_summary"]
    numel = sum(tensor.numel() for tensor in weights(tmp_path, 10).values())
    assert header["num_params"] == numel == result["num_params"]

    surroundings = home.read_json("environment.json")
    assert surroundings["torch"] == torch.__version__ and surroundings["device"] == "cpu"
    assert surroundings["threads"] == 1 and "git_commit" in surroundings

    assert result == home.read_json("result.json")
    assert result["status"] == "finished" and result["diverged_at_step"] is None
    assert result["steps"] == 10 and result["tokens"] == 240
    assert result["validation_loss"] == metrics[-1]["validation_loss"]
    losses = [record["train_loss"] for record in metrics]
    assert result["train_loss"] == pytest.approx(sum(losses) / 10)
    assert result["first_optimizer_ms"] == metrics[0]["optimizer_ms"]
    assert result["seconds"] == seconds[-1]
    # One momentum of the size of the model, one gain for each of its six tensors.
    assert result["state_bytes"] == 4 * numel + 4 * 6
    assert result["state_bytes_per_param"] == pytest.approx(4, rel=0.05)

    gains = home.read_json("gains.json")["blocks"]
    assert gains["0.weight"]["shape"] == [VOCABULARY, 8] and gains["0.weight"]["numel"] == 256
    assert all(entry["gain"] > 0 for entry in gains.values()) and len(gains) == 6
    assert sorted(path.name for path in home.checkpoints.iterdir()) == [
        "step_00000008",
        "step_00000010",
    ]


def test_it_learns(tmp_path):
    result = go(tiny_run(steps=150, evaluate_every=50), tmp_path)
    assert result["validation_loss"] < 0.7 * math.log(VOCABULARY)


def test_a_seed_decides_everything(tmp_path):
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        go(tiny_run(seed=seed), tmp_path / name)
    assert_same_training(tmp_path / "one", tmp_path / "two", 12)
    assert without_timings(tmp_path / "one") != without_timings(tmp_path / "three")


def test_the_callers_random_generators_are_left_alone(tmp_path):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    checkpoints.seed_everything(5)
    expected = draws()
    checkpoints.seed_everything(5)
    go(tiny_run(), tmp_path)
    assert draws() == expected


def test_accumulation_is_a_larger_batch(tmp_path):
    still = TinyModel(dropout=0.0)
    go(tiny_run("adamw", model=still, batch_size=8), tmp_path / "whole")
    go(tiny_run("adamw", model=still, batch_size=2, accumulation=4), tmp_path / "parts")
    left, right = without_timings(tmp_path / "whole"), without_timings(tmp_path / "parts")
    for one, other in zip(left, right, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert one["tokens"] == other["tokens"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_the_norm_before_clipping_is_recorded(tmp_path):
    still = {"model": TinyModel(dropout=0.0), "steps": 2}
    runs = {"none": None, "small": 1e-3, "large": 1e6}
    norms, ends = {}, {}
    for name, clip_norm in runs.items():
        run = tiny_run("sgdm", 1.0, clip_norm=clip_norm, **still)
        go(run, tmp_path / name)
        norms[name] = RunFolder(tmp_path / name).metrics()[0]["grad_norm"]
        ends[name] = weights(tmp_path / name, 2)["0.weight"]
    assert norms["small"] == norms["none"] == norms["large"] > 1e-3
    assert torch.equal(ends["none"], ends["large"])
    assert not torch.allclose(ends["none"], ends["small"])


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16_autocast", torch.float32), ("bf16", torch.bfloat16)],
)
def test_precision(tmp_path, precision, dtype):
    run = tiny_run(model=TinyModel(width=64), precision=precision)
    result = go(run, tmp_path / "run")
    assert {tensor.dtype for tensor in weights(tmp_path / "run", 12).values()} == {dtype}
    assert result["status"] == "finished"
    go(override(run, {"precision": "fp32"}), tmp_path / "fp32")
    one, other = (without_timings(tmp_path / name)[0] for name in ("run", "fp32"))
    assert (one["train_loss"] == other["train_loss"]) == (precision == "fp32")
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_intervals_may_exceed_the_steps(tmp_path, steps):
    run = tiny_run(steps=steps, evaluate_every=1000, checkpoint_every=1000)
    assert go(run, tmp_path)["validation_loss"] > 0
    assert weights(tmp_path, steps)


def test_divergence_is_a_result(tmp_path):
    run = tiny_run("sgdm", 1e30, steps=30)
    result = go(run, tmp_path)
    step = result["diverged_at_step"]
    assert result["status"] == "diverged" and 1 < step < 30 and result["steps"] == step
    assert result["validation_loss"] is None
    last = RunFolder(tmp_path).metrics()[-1]
    assert last["step"] == step and last["train_loss"] is None
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert go(run, tmp_path) == result
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_what_has_finished_is_not_trained_again(tmp_path, monkeypatch):
    result = go(tiny_run(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(*arguments, **options):
        raise AssertionError("it was trained again")

    monkeypatch.setattr(TinyModel, "build", refuse)
    assert go(tiny_run(), tmp_path, progress=refuse) == result
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_again_repeats_from_the_beginning(tmp_path):
    go(tiny_run(), tmp_path / "one")
    go(tiny_run(), tmp_path / "two")
    seen = []
    go(tiny_run(), tmp_path / "two", again=True, progress=seen.append)
    assert [record["step"] for record in seen] == list(range(1, 13))
    assert_same_training(tmp_path / "one", tmp_path / "two", 12)


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_of_another_run_is_refused(tmp_path, again):
    go(tiny_run(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    other = override(tiny_run(), {"optimizer.lr": "1", "steps": "99"})
    with pytest.raises(AnotherRunError, match="optimizer.lr: 0.03 there, 1.0 here") as caught:
        go(other, tmp_path, again=again)
    assert set(caught.value.fields) == {"optimizer.lr", "steps"}
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_folder_in_use_is_refused(tmp_path):
    with RunFolder(tmp_path).locked(), pytest.raises(FolderInUseError):
        go(tiny_run(), tmp_path)
    assert go(tiny_run(), tmp_path)["status"] == "finished"


def test_schedule_free_is_evaluated_and_saved_in_its_own_mode(tmp_path):
    run = tiny_run("schedule_free_adamw", 1e-2, schedule=Schedule(name="constant"))
    result = go(run, tmp_path)
    module = run.model.build(vocab_size=VOCABULARY)
    module.load_state_dict(weights(tmp_path, 12))
    module.eval()
    total = rows = 0
    for batch in run.data.validation_batches(None, batch_size=4, max_batches=None):
        total += run.model.loss(module, batch).item() * len(batch)
        rows += len(batch)
    assert result["validation_loss"] == pytest.approx(total / rows, rel=1e-6)


@pytest.mark.parametrize("device", ["cuda", "tpu", ""])
def test_a_device_that_is_not_there(tmp_path, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match="must be one that this machine has: auto, cpu"):
        train(tiny_run(), tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()


def test_an_unknown_optimizer_or_argument(tmp_path):
    with pytest.raises(ValueError, match="sgd_sai"):
        go(tiny_run("sgd_say"), tmp_path / "one")
    choice = OptimizerChoice(name="adamw", lr=1e-3, arguments={"beta3": 0.5})
    with pytest.raises((TypeError, ValueError), match="beta3"):
        go(dataclasses.replace(tiny_run(), optimizer=choice), tmp_path / "two")


@pytest.mark.parametrize(
    ("optimizer", "argument", "words"),
    [
        ("sgdm", {"momentum": 2}, "momentum must be a number in"),
        ("sgd_sai", {"gain": "x"}, "gain must be"),
        ("sgd_sai", {"nesterov": "no"}, "must be true or false"),
        ("adamw", {"beta2": 1.5}, "beta2"),
        ("adamw", {"beta3": 0.5}, "beta3"),
        ("muon", {"head": "9.weight"}, "9.weight"),
    ],
)
def test_an_argument_out_of_range_is_refused_before_the_data_are_loaded(
    tmp_path, monkeypatch, optimizer, argument, words
):
    monkeypatch.setattr(TinyData, "load", lambda *_: pytest.fail("the data were loaded"))
    choice = OptimizerChoice(name=optimizer, lr=1e-3, arguments=argument)
    generators = torch.get_rng_state()
    with pytest.raises(ValueError, match=words):
        go(dataclasses.replace(tiny_run(), optimizer=choice), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert torch.equal(torch.get_rng_state(), generators)


@pytest.mark.parametrize("optimizer", [n for n, row in BASELINES.items() if not row.needs_lora])
def test_every_optimizer_passes_its_check(optimizer):
    check_optimizer(override(demo(optimizer), {"model.bias": True}), whole=True)
    check_optimizer(tiny_run(optimizer), whole=True)


def test_event_files_without_tensorboard_are_refused_first(tmp_path, monkeypatch):
    go(tiny_run(), tmp_path)
    before = (tmp_path / "result.json").read_bytes()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    monkeypatch.setattr(TinyData, "load", lambda *_: pytest.fail("the data were loaded"))
    with pytest.raises(ImportError, match="pip install tensorboard"):
        go(tiny_run(), tmp_path, tensorboard=True, again=True)
    assert (tmp_path / "result.json").read_bytes() == before


def test_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stop_at_5 = raise_signal_at(5, "SIGINT")
    with pytest.raises(Interrupted):
        train(tiny_run(), tmp_path, device="cpu", tensorboard=True, progress=stop_at_5)
    train(tiny_run(), tmp_path, device="cpu", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("train_loss")
    assert [event.step for event in scalars] == list(range(1, 13))
    losses = [record["train_loss"] for record in RunFolder(tmp_path).metrics()]
    assert [event.value for event in scalars] == pytest.approx(losses, rel=1e-6)


def test_two_processes_train_as_one(tmp_path):
    """The batch is split, the gradients are averaged, one process writes."""
    still = {"model": TinyModel(dropout=0.0), "steps": 6}
    go(tiny_run("adamw", **still), tmp_path / "one")
    code = (
        "from nomadam.experiments.training import train\n"
        "from tiny_training import TinyModel, tiny_run\n"
        "run = tiny_run('adamw', model=TinyModel(dropout=0.0), steps=6)\n"
        f"result = train(run, {str(tmp_path / 'two')!r}, device='cpu')\n"
        "assert result['status'] == 'finished'\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    assert [process.wait() for process in processes] == [0, 0]
    for one, two in zip(
        without_timings(tmp_path / "one"), without_timings(tmp_path / "two"), strict=True
    ):
        assert one == pytest.approx(two, rel=1e-4)


def test_gpt2_has_the_biases_and_ties_that_it_is_told_to():
    batch = torch.randint(0, 300, (2, 9))
    for bias in (False, True):
        for tie in (False, True):
            model = GPT2Model(layers=1, heads=2, width=8, bias=bias, tie_embeddings=tie)
            module = model.build(vocab_size=300, context=8)
            names = dict(module.named_parameters())
            assert any(name.endswith("bias") for name in names) == bias
            assert ("lm_head.weight" in names) != tie
            loss = model.loss(module, batch)
            loss.backward()
            assert loss.dtype == torch.float32
            assert all(parameter.grad is not None for parameter in names.values())
            logits = module(batch[:, :-1]).logits.log_softmax(-1)
            expected = -logits.gather(-1, batch[:, 1:, None]).mean()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
