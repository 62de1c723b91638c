"""GPT-2 from scratch: the demonstration on a small computer, and its true sizes."""

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


def demo_long(optimizer: str = "sgd_sai") -> Run:
    """The demonstration with sequences of 512 tokens in place of 64: minutes on two cores.

    Two of them a step are as many tokens as the demonstration has, so that nothing else differs;
    the learning rates are the demonstration's too.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> demo_long().batch_size * demo_long().data.tokens_per_row
        1024
    """
    lr = LEARNING_RATES.get(optimizer)
    return _small(optimizer, lr, name="gpt2_pretraining.demo_long", context=512)


def demo_prose(optimizer: str = "sgd_sai") -> Run:
    """The demonstration on English: Python's docstrings and help topics, 2 million bytes.

    A fifth as much text as the demonstration has; the learning rates are those found there.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> demo_prose().data.source
        'stdlib_prose'
    """
    lr = LEARNING_RATES.get(optimizer)
    return _small(optimizer, lr, name="gpt2_pretraining.demo_prose", source="stdlib_prose")


def _small(
    optimizer: str, lr: float | None, *, name: str, context: int = 64, source: str = "stdlib"
) -> Run:
    return Run(
        name=name,
        model=GPT2Model(layers=4, heads=4, width=128),
        data=TokenData(source=source, vocab_size=4096, context=context),
        optimizer=choose_optimizer(optimizer, lr=lr),
        schedule=schedule_for(optimizer, warmup_fraction=0.1),
        # 1024 tokens a step: a tenth of a second on two cores.
        steps=500,
        batch_size=1024 // context,
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
    return _openwebtext(
        optimizer,
        name="gpt2_pretraining.small_openwebtext",
        model=GPT2Model(layers=12, heads=12, width=768),
        adamw_lr=6e-4,
        batch_size=12,
    )


def medium(optimizer: str = "sgd_sai") -> Run:
    """GPT-2 medium (0.35 billion parameters) on OpenWebText: for GPUs.

    All but the model and AdamW's learning rate is as in `small_openwebtext`.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Source: learning rate of arXiv 2005.14165, Table 2.1, for this size.

    Example:
        >>> medium("adamw").optimizer.lr
        0.0003
    """
    return _openwebtext(
        optimizer,
        name="gpt2_pretraining.medium",
        model=GPT2Model(layers=24, heads=16, width=1024),
        adamw_lr=3e-4,
        batch_size=8,
    )


def xl(optimizer: str = "sgd_sai") -> Run:
    """GPT-2 XL (1.56 billion parameters) on OpenWebText: for GPUs.

    All but the model and AdamW's learning rate is as in `small_openwebtext`. Weights, gradients and
    SGD-SaI's state take 19 GB, with AdamW 25 GB, beside the activations.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Source: learning rate of arXiv 2005.14165, Table 2.1, for this size.

    Example:
        >>> xl("adamw").optimizer.lr
        0.0002
    """
    return _openwebtext(
        optimizer,
        name="gpt2_pretraining.xl",
        model=GPT2Model(layers=48, heads=25, width=1600),
        adamw_lr=2e-4,
        batch_size=4,
    )


def _openwebtext(
    optimizer: str, *, name: str, model: GPT2Model, adamw_lr: float, batch_size: int
) -> Run:
    """480 sequences a step, in micro-batches of this many."""
    # The settings of AdamW; any other has the decay of its row, that goes with its rate.
    is_adamw = optimizer == "adamw"
    lr = adamw_lr if is_adamw else LEARNING_RATES.get(optimizer)
    arguments = {"beta2": 0.95} if is_adamw else {}
    return Run(
        name=name,
        model=model,
        data=TokenData(source="Skylion007/openwebtext", vocab_size=50304, context=1024),
        optimizer=choose_optimizer(
            optimizer, lr=lr, weight_decay=0.1 if is_adamw else None, arguments=arguments
        ),
        # Down to a tenth, 6e-5 for AdamW and the small model.
        schedule=schedule_for(optimizer, warmup_steps=2000, final_fraction=0.1),
        steps=100_000,
        batch_size=batch_size,
        accumulation=480 // batch_size,
        precision="bf16_autocast",
        evaluate_every=1000,
        evaluation_batches=200,
        checkpoint_every=1000,
    )
