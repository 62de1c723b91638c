"""Run and comparison folders as a training leaves them, made without training."""

import json
import math
import os
import random
from pathlib import Path

FINAL = {"adamw": 5.496, "sgdm": 6.028, "sgd_sai": 5.318, "muon": 5.008}
BEST_LR = {"adamw": 3e-3, "sgdm": 8.0, "sgd_sai": 1e-2, "muon": 3e-3}
STATE_BYTES = {"adamw": 8, "sgdm": 4, "sgd_sai": 4, "muon": 5}
STEP_MS = {"adamw": 2.91, "sgdm": 1.02, "sgd_sai": 1.31, "muon": 14.2}
SHA256 = "3f" * 32


def gpt2_blocks(layers, width=128, vocabulary=4096, context=64):
    """Name -> shape of the parameters of a GPT-2 without biases, in the model's order."""
    blocks = {
        "transformer.wte.weight": [vocabulary, width],
        "transformer.wpe.weight": [context, width],
    }
    for layer in range(layers):
        start = f"transformer.h.{layer}"
        blocks[f"{start}.ln_1.weight"] = [width]
        blocks[f"{start}.attn.c_attn.weight"] = [width, 3 * width]
        blocks[f"{start}.attn.c_proj.weight"] = [width, width]
        blocks[f"{start}.ln_2.weight"] = [width]
        blocks[f"{start}.mlp.c_fc.weight"] = [width, 4 * width]
        blocks[f"{start}.mlp.c_proj.weight"] = [4 * width, width]
    blocks["transformer.ln_f.weight"] = [width]
    return blocks


def configuration(optimizer, lr, seed, steps, layers, arguments):
    return {
        "name": "gpt2_pretraining.demo",
        "model": {"class": "nomadam.experiments.language_model.GPT2Model", "layers": layers,
                  "heads": 4, "width": 128, "dropout": 0.0, "bias": False, "tie_embeddings": True},
        "data": {"class": "nomadam.experiments.language_model.TokenData", "source": "stdlib",
                 "vocab_size": 4096, "context": 64, "validation_fraction": 0.05, "max_bytes": None},
        "optimizer": {"name": optimizer, "lr": lr, "weight_decay": 0.1, "arguments": arguments},
        "schedule": {"name": "cosine", "warmup_fraction": 0.1, "final_fraction": 0.0,
                     "milestones": [0.5, 0.75]},
        "steps": steps, "batch_size": 16, "accumulation": 1, "clip_norm": 1.0, "precision": "fp32",
        "seed": seed, "evaluate_every": max(1, steps // 10), "checkpoint_every": 100,
    }  # fmt: skip


def metrics(optimizer, final, seed, steps, evaluate_every, diverges_at):
    rows, noise, seconds = [], random.Random(f"{optimizer}{final}{seed}"), 0.0
    final += noise.gauss(0, 0.02)
    for step in range(1, steps + 1):
        seconds += 0.05 + STEP_MS.get(optimizer, 1.0) / 1000
        level = final + (8.32 - final) * math.exp(-4.5 * step / steps)
        row = {
            "step": step, "tokens": step * 1024, "seconds": seconds,
            "train_loss": level + noise.gauss(0, 0.12), "lr": 1e-3, "grad_norm": 0.8,
            "step_ms": 52.0, "optimizer_ms": STEP_MS.get(optimizer, 1.0) + noise.random() / 10,
            "peak_memory_mb": 540.0,
        }  # fmt: skip
        if diverges_at is not None and step > diverges_at - 8:
            row["train_loss"] = level * 1.9 ** (step - diverges_at + 8)
        if diverges_at == step:
            rows.append({**row, "train_loss": None, "grad_norm": None})
            return rows
        if step % evaluate_every == 0 or step == steps:
            row["validation_loss"] = level + 0.03
        rows.append(row)
    return rows


def gains_of(layers, seed):
    noise = random.Random(seed)
    found = {}
    for name, shape in gpt2_blocks(layers).items():
        numel = math.prod(shape)
        excess = 1.3 + noise.random() if len(shape) == 1 else 1.0
        found[name] = {"gain": math.sqrt(numel - 1) * excess, "numel": numel, "shape": shape}
    return found


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_run(
    folder, optimizer="adamw", *, lr=None, seed=0, steps=300, layers=4, arguments=None, final=None,
    diverges_at=None, stops_at=None, changes=None, data=None, environment=True, result=None,
):  # fmt: skip
    """Write one run folder; `stops_at` leaves it unfinished, `changes` replaces top fields.

    `result` adds fields to result.json.
    """
    folder.mkdir(parents=True)
    run = configuration(
        optimizer, lr or BEST_LR.get(optimizer, 1e-3), seed, steps, layers, arguments or {}
    )
    run.update(changes or {})
    num_params = sum(math.prod(shape) for shape in gpt2_blocks(layers).values())
    write_json(folder / "run.json", {
        "format": 1, "run": run, "num_params": num_params,
        "data": {"source": "stdlib", "files": 1203, "bytes": 14_200_331, "train_tokens": 3_901_004,
                 "validation_tokens": 201_000, "sha256": SHA256, "tokenizer_sha256": "7b" * 32,
                 **(data or {})},
        "optimizer_summary": f"{optimizer} over 2 groups",
    })  # fmt: skip
    if environment:
        write_json(folder / "environment.json", {
            "python": "3.11.9", "torch": "2.13.0", "nomadam": "0.1.0", "numpy": "2.4.6",
            "device": "cpu", "device_name": "x86_64, 2 cores", "threads": 2,
            "platform": "Linux-6.1-x86_64", "git_commit": "63b0ffe", "git_dirty": False,
            "command": ["nomadam", "run", "gpt2_pretraining.demo", "--set", f"seed={seed}"],
        })  # fmt: skip
    final = FINAL.get(optimizer, 5.5) if final is None else final
    rows = metrics(optimizer, final, seed, steps, run["evaluate_every"], diverges_at)
    rows = rows[:stops_at]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if stops_at is not None:
        return folder
    if optimizer == "sgd_sai":
        write_json(folder / "gains.json", {"blocks": gains_of(layers, seed)})
    per_param = STATE_BYTES.get(optimizer, 4)
    last = rows[-1]
    write_json(folder / "result.json", {
        "status": "finished" if diverges_at is None else "diverged", "steps": len(rows),
        "validation_loss": last.get("validation_loss"),
        "best_validation_loss": last.get("validation_loss"), "train_loss": last["train_loss"],
        "state_bytes": per_param * num_params, "state_bytes_per_param": per_param,
        "num_params": num_params, "optimizer_ms": STEP_MS.get(optimizer, 1.0) + seed / 100,
        "step_ms": 52.0, "first_optimizer_ms": 9.0,
        "peak_memory_mb": 520.0 + per_param * 1.4 + seed, "baseline_memory_mb": 431.0,
        "seconds": last["seconds"], "tokens": last["tokens"], "diverged_at_step": diverges_at,
        **(result or {}),
    })  # fmt: skip
    return folder


IMAGES = {"source": "digits", "train_tokens": None, "validation_tokens": None,
          "tokenizer_sha256": None, "validation_images": 599}  # fmt: skip
RATES = {"adamw": 1e-3, "sgdm_decoupled": 0.1, "sgd_sai": 1e-2}


def accuracy_at(optimizer, rate, decay):
    """A ridge where rate times decay is right, as the studies have it; nothing measured."""
    off = math.log10(rate / RATES.get(optimizer, 1e-2))
    width = {"adamw": 0.5, "sgdm_decoupled": 0.7, "sgd_sai": 1.2}.get(optimizer, 0.8)
    off_ridge = off + 0.4 * math.log10(decay / 1e-2)
    return 0.12 + 0.84 * math.exp(-((off_ridge / width) ** 2) / 2)


def write_cell(
    folder, optimizer, rate, decay, *, seed=0, family=None, lost=False,
    name="resnet18_grid.demo_grid",
):  # fmt: skip
    """Write the run folder of a cell of a grid on images."""
    accuracy = accuracy_at(optimizer, rate, decay)
    accuracy += random.Random(f"{optimizer}{rate}{decay}{seed}{family}").gauss(0, 0.01)
    accuracy -= {"vgg": 0.05, "mobilenet": 0.1}.get(family, 0.0)
    model = {"class": "nomadam.experiments.image_classification.ConvolutionalModel", "width": 8,
             "family": family or "resnet18", "label_smoothing": 0.1}  # fmt: skip
    choice = {"name": optimizer, "lr": rate, "weight_decay": decay, "arguments": {}}
    return write_run(
        folder, optimizer, seed=seed, steps=20, layers=1, data=IMAGES,
        final=3.0 - 2.4 * accuracy, diverges_at=12 if lost else None,
        changes={"name": name, "model": model, "optimizer": choice},
        result={"validation_accuracy": None if lost else accuracy},
    )  # fmt: skip


def write_grid(root, optimizers=tuple(RATES), *, rates=5, decays=3, seeds=1, families=(None,)):
    """Write the cells of a grid: rates a factor of 4 apart, decays of 10; the largest diverge."""
    folders = []
    for optimizer in optimizers:
        for i in range(rates):
            for j in range(decays):
                for family in families:
                    for seed in range(seeds):
                        rate = RATES[optimizer] * 4.0 ** (i - rates // 2)
                        decay = 1e-2 * 10.0 ** (j - decays // 2)
                        corner = optimizer != "adamw" and i == rates - 1 and j == decays - 1
                        lost = corner or (optimizer == "sgd_sai" and i == rates - 1 and seed == 1)
                        folders.append(
                            write_cell(
                                root / f"{optimizer}-{i}-{j}-{family}-{seed}", optimizer, rate,
                                decay, seed=seed, family=family, lost=lost,
                            )
                        )  # fmt: skip
    return folders


def write_trials(root, optimizers, *, trials=10, seeds=5):
    """Write what a tuning leaves: trials at scattered values, and the best one with more seeds."""
    folders = []
    for optimizer in optimizers:
        noise, best = random.Random(optimizer), None
        for trial in range(trials):
            rate = float(f"{RATES.get(optimizer, 1e-2) * 10 ** noise.uniform(-1.5, 1.5):.4g}")
            decay = float(f"{10 ** noise.uniform(-4, 0):.4g}")
            lost = noise.random() < 0.05
            folders.append(
                write_cell(root / f"{optimizer}-{trial}", optimizer, rate, decay, lost=lost)
            )
            score = accuracy_at(optimizer, rate, decay)
            if not lost and (best is None or score > best[0]):
                best = score, rate, decay
        for seed in range(1, seeds + 1):
            path = root / f"{optimizer}-final-{seed}"
            folders.append(write_cell(path, optimizer, *best[1:], seed=seed))
    return folders


def write_comparison(folder, members, name="gpt2_pretraining.demo", reference="adamw"):
    """Write comparison.json over (label, run folder) pairs, as paths relative to it."""
    folder.mkdir(parents=True, exist_ok=True)
    arms = []
    for label, path in members:
        run = json.loads((path / "run.json").read_text())["run"] if path.exists() else {}
        arms.append({"label": label, "optimizer": label.split()[0], "seed": run.get("seed", 0),
                     "folder": os.path.relpath(path, folder)})  # fmt: skip
    write_json(folder / "comparison.json",
               {"format": 1, "name": name, "reference": reference, "arms": arms})  # fmt: skip
    return folder


def demo_comparison(root: Path, *, seeds=1, layers=4, steps=300):
    """The demo's comparison: three arms."""
    members = [
        (name, write_run(root / f"{name}-{seed}", name, seed=seed, layers=layers, steps=steps))
        for name in ("adamw", "sgdm", "sgd_sai")
        for seed in range(seeds)
    ]
    return write_comparison(root / "comparison", members)


def grid_comparison(root: Path, *, steps=120):
    """Three optimizers at five learning rates, the largest of which diverge."""
    members = []
    for name in ("adamw", "sgdm", "sgd_sai"):
        for power in range(-2, 3):
            lr = BEST_LR[name] * 2.0**power
            final = FINAL[name] + 0.09 * power * power + 0.05 * power
            lost = 60 if power == 2 and name != "adamw" else None
            path = write_run(
                root / f"{name}-{power}", name, lr=lr, final=final, diverges_at=lost, steps=steps
            )
            members.append((f"{name} lr={lr:g}", path))
    return write_comparison(root / "comparison", members, "gpt2_pretraining.grid", "adamw")
