"""GPT-2 from scratch: the demonstration on a small computer, and the paper's own size."""

from nomadam.experiments.configuration import Run
from nomadam.experiments.language_model import GPT2Model, TokenData
from nomadam.experiments.optimizer_choice import choose_optimizer, schedule_for

# The optimizers that the demonstration sets beside one another; the first is the reference.
COMPARED = ("adamw", "sgdm", "sgd_sai")

# Each is the best of its row in GRID by validation loss; sgdm in EMA form, so 10 times torch's.
LEARNING_RATES = {"adamw": 2e-3, "sgdm": 2.0, "sgd_sai": 1e-2}

# As many values for each optimizer, a factor of 2 apart.
GRID = {
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "sgdm": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "sgd_sai": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
}


def demo(optimizer: str = "sgd_sai") -> Run:
    """A GPT-2 with 1.3 million parameters on Python's standard library: minutes on two cores.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``. Those of
            `LEARNING_RATES` have the rate found by the grid, others the rate of their row.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> demo("adamw").optimizer.name
        'adamw'
    """
    return _small(optimizer, LEARNING_RATES.get(optimizer), name="gpt2_pretraining.demo")


def demo_learning_rates() -> list[Run]:
    """The demonstration at six learning rates for each of its three optimizers.

    Example:
        >>> len(demo_learning_rates())
        18
    """
    return [
        _small(optimizer, lr, name="gpt2_pretraining.demo_learning_rates")
        for optimizer in COMPARED
        for lr in GRID[optimizer]
    ]


def _small(optimizer: str, lr: float | None, *, name: str) -> Run:
    return Run(
        name=name,
        model=GPT2Model(layers=4, heads=4, width=128),
        data=TokenData(source="stdlib", vocab_size=4096, context=64),
        optimizer=choose_optimizer(optimizer, lr=lr),
        schedule=schedule_for(optimizer, warmup_fraction=0.1),
        # 1024 tokens a step: a tenth of a second on two cores.
        steps=500,
        batch_size=16,
        evaluate_every=50,
        evaluation_batches=32,
        checkpoint_every=100,
    )


def small_openwebtext(optimizer: str = "sgd_sai") -> Run:
    """GPT-2 small on OpenWebText with the settings of the SGD-SaI paper: for GPUs.

    Point it at tokens in nanoGPT's format with ``--set data.source=FOLDER``. The paper states
    no learning rate for SGD-SaI, so that of the demonstration stands here; AdamW's is the paper's.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> run = small_openwebtext("adamw")
        >>> run.batch_size * run.accumulation * run.data.tokens_per_row
        491520
    """
    lr = 6e-4 if optimizer == "adamw" else LEARNING_RATES.get(optimizer)
    arguments = {"beta2": 0.95} if optimizer == "adamw" else {}
    return Run(
        name="gpt2_pretraining.small_openwebtext",
        model=GPT2Model(layers=12, heads=12, width=768),
        data=TokenData(source="Skylion007/openwebtext", vocab_size=50304, context=1024),
        optimizer=choose_optimizer(optimizer, lr=lr, weight_decay=0.1, arguments=arguments),
        # Down to a tenth, 6e-5 for AdamW.
        schedule=schedule_for(optimizer, warmup_steps=2000, final_fraction=0.1),
        steps=100_000,
        batch_size=12,
        accumulation=40,
        precision="bf16_autocast",
        evaluate_every=1000,
        evaluation_batches=200,
        checkpoint_every=1000,
    )
