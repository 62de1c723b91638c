"""LoRA on GPT-2: the demonstration on docstrings, and the paper's own setting on E2E."""

from dataclasses import replace

from nomadam.experiments import gpt2_pretraining
from nomadam.experiments.configuration import Run
from nomadam.experiments.lora import DocstringData, E2EData, LoRAModel, LoRAOnWeights
from nomadam.experiments.optimizer_choice import choose_optimizer, schedule_for

# The optimizers that the demonstration sets beside one another; the first is the reference.
COMPARED = ("adamw", "sgd_sai", "scaled_adamw")

# Near the best of 3 or 4 rates each, by validation loss after 100 steps; a search and no grid.
LEARNING_RATES = {"adamw": 8e-3, "sgd_sai": 3e-2, "scaled_adamw": 4e-3}

# The paper of the preconditioner has 1e-6, with which scaled_adamw was worse here (5.54 against
# 5.46 at its rate of 1e-3): while B is near 0 the gradients of A are divided by delta.
DELTA = 1e-2


def demo(optimizer: str = "sgd_sai") -> Run:
    """LoRA of rank 4 on the GPT-2 demonstration: first sentences of docstrings from signatures.

    The model is that of ``gpt2_pretraining.demo`` with AdamW, which is trained first where its
    folder is not there. Pairs come from Python's standard library; validated and judged is on
    modules that neither stage has seen.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``. Those of
            `LEARNING_RATES` have the best rate of a short search, others the rate of their row.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> demo("adamw").model.first_stage().name
        'gpt2_pretraining.demo'
    """
    pretraining = gpt2_pretraining.demo("adamw")
    return Run(
        name="lora_finetuning.demo",
        model=LoRAModel(pretraining=pretraining),
        data=DocstringData(tokens=pretraining.data, context=64),  # pyright: ignore
        optimizer=choose_optimizer(
            optimizer, lr=LEARNING_RATES.get(optimizer), suited={"delta": DELTA}
        ),
        schedule=schedule_for(optimizer, warmup_fraction=0.1),
        steps=400,
        batch_size=16,
        evaluate_every=50,
        checkpoint_every=100,
    )


def gpt2_medium_e2e(optimizer: str = "sgd_sai") -> Run:
    """LoRA of rank 4 on GPT-2 medium and E2E with the settings of the SGD-SaI paper: for a GPU.

    Weights and data are read from this machine alone: ``--set model.weights=FOLDER`` with
    config.json and model.safetensors, ``--set data.tokenizer=FOLDER`` with tokenizer.json (the same
    folder), ``--set data.source=FOLDER`` with E2E's CSV files. Five passes over the 42,061 pairs in
    batches of 8, a linear schedule, label smoothing and dropout 0.1, no clipping, as in arXiv
    2106.09685 and 2402.02347. Texts are written greedily here, there by a beam of 10.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``. SGD-SaI has the paper's
            rate and decay, AdamW those of arXiv 2106.09685, others the rate of their row.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> run = gpt2_medium_e2e("sgd_sai")
        >>> run.optimizer.lr, run.optimizer.weight_decay, run.model.targets
        (0.001, 0.01, ('c_attn.q', 'c_attn.v'))
    """
    rates = {"sgd_sai": 1e-3, "adamw": 2e-4}
    schedule = schedule_for(optimizer, warmup_steps=500)
    if schedule.name == "cosine":
        schedule = replace(schedule, name="linear")
    return Run(
        name="lora_finetuning.gpt2_medium_e2e",
        model=LoRAOnWeights(
            weights="gpt2-medium", dropout=0.1, label_smoothing=0.1, num_texts=1000, text_tokens=64
        ),
        data=E2EData(source="e2e-dataset", tokenizer="gpt2-medium", context=512),
        optimizer=choose_optimizer(
            optimizer,
            lr=rates.get(optimizer),
            weight_decay=0.01 if optimizer in rates else None,
        ),
        schedule=schedule,
        steps=26_290,
        batch_size=8,
        clip_norm=None,
        precision="bf16_autocast",
        evaluate_every=2000,
        checkpoint_every=1000,
    )
