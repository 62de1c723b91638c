"""The table of trainers: what passed, in which versions, by which test; from what was recorded."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nomadam.reports.tables import markdown_table

TESTS = Path(__file__).parents[1] / "tests_integrations"
RECORDED = Path(__file__).parents[1] / "results" / "integrations.json"
LABELS: Mapping[str, str] = MappingProxyType(
    {
        "plain_pytorch": "a loop of PyTorch",
        "compiled": "torch.compile",
        "mixed_precision": "AMP, GradScaler",
        "fsdp2": "FSDP2",
        "transformers_trainer": "transformers' Trainer",
        "trl_sft": "trl's SFTTrainer",
        "trl_grpo": "trl's GRPOTrainer",
        "peft_lora": "peft, LoRA",
        "accelerate_loop": "accelerate",
        "diffusers_loop": "diffusers, UNet and DiT",
        "lightning_trainer": "Lightning's Trainer",
        "lightning_fabric": "Lightning's Fabric",
        "deepspeed_zero": "DeepSpeed, ZeRO 0 to 2",
        "ray_train": "Ray Train",
        "torchtitan_container": "torchtitan",
        "timm_model": "timm",
        "kohya_arguments": "class path and key=value (kohya)",
        "optax_gain": "optax, on JAX",
        "slurm": "Slurm, slurm.sh",
    }
)
BENEATH = ("accelerate", "transformers")
COLUMNS = ("train", "resume", "sharded")


def trainers_table(recorded: Path = RECORDED) -> str:
    """A line for each trainer that was recorded.

    Args:
        recorded: what the tests wrote: trainer to ``versions``, ``date`` and the columns, each
            ``passed``, ``failed``, ``skipped`` or None.

    Raises:
        KeyError: a recorded trainer has no label here.
    """
    rows = json.loads(recorded.read_text())
    lines = [_line(name, rows[name]) for name in (*LABELS, *rows.keys() - LABELS) if name in rows]
    heads = ["", "versions", "trains", "resumes", "in several processes", "tested by"]
    return markdown_table(heads, lines, left=range(len(heads)))


def _line(name: str, row: Mapping[str, Any]) -> list[str]:
    packages = [*row["versions"]]
    # torch comes first and then the trainer; what this one is built on is not told.
    told = [p for p in packages[1:] if p not in packages[2:] or p not in BENEATH] or packages
    versions = ", ".join(f"{package} {row['versions'][package]}" for package in told)
    cells = ["–" if row[column] is None else row[column] for column in COLUMNS]
    (test,) = TESTS.rglob(f"test_{name}.py")
    return [LABELS[name], versions, *cells, f"{test.relative_to(TESTS)}"]
