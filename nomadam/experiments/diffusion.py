"""Diffusion, adapted to a new class by LoRA: digits without one class first, then that class."""

from nomadam.experiments.configuration import OptimizerChoice, Run
from nomadam.experiments.denoising import LoRAUNetModel, NoisedImageData, UNetModel
from nomadam.experiments.optimizer_choice import choose_optimizer, schedule_for
from nomadam.experiments.schedule import Schedule
from nomadam.experiments.stable_diffusion import ConceptData, StableDiffusionLoRAModel

# The class that the first stage does not see, and that the second one learns.
NEW_CLASS = 0
KNOWN_CLASSES = tuple(label for label in range(10) if label != NEW_CLASS)

# For Muon: no adapter is an output layer, and it takes each filter of theirs as a row.
SUITED = {"head": "", "convolutions": "flatten"}

# Of the second stage: the best of some ten rates each after 300 steps; sgdm_decoupled in EMA form.
LEARNING_RATES = {"adamw": 8e-3, "sgd_sai": 0.8, "sgdm_decoupled": 15.0}


def pretrain() -> Run:
    """A UNet with 0.5 million parameters learns to draw nine of ten digits: 3 minutes on a core.

    It is the first stage of `demo`, whatever the optimizer there, and so always AdamW's.

    Example:
        >>> NEW_CLASS in pretrain().data.classes
        False
    """
    return Run(
        name="diffusion.pretrain",
        model=UNetModel(channels=(32, 48)),
        data=NoisedImageData(classes=KNOWN_CLASSES, draws=2),
        optimizer=OptimizerChoice(name="adamw", lr=2e-3, weight_decay=0.01),
        schedule=Schedule(warmup_fraction=0.05),
        # About 80 passes over the 1079 training images.
        steps=2500,
        batch_size=32,
        evaluate_every=500,
        checkpoint_every=500,
    )


def demo(optimizer: str = "sgd_sai") -> Run:
    """LoRA of rank 8 teaches the digits' UNet the class that it has not seen: a minute on a core.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``. Those of
            `LEARNING_RATES` have the rate found by a search, others the rate of their row.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> demo("adamw").model.pretraining.name
        'diffusion.pretrain'
    """
    return Run(
        name="diffusion.demo",
        model=LoRAUNetModel(pretraining=pretrain(), rank=8),
        data=NoisedImageData(classes=(NEW_CLASS,), draws=8),
        # Adapters are small and start from nothing: decay is left out.
        optimizer=choose_optimizer(
            optimizer, lr=LEARNING_RATES.get(optimizer), weight_decay=0.0, suited=SUITED
        ),
        schedule=schedule_for(optimizer, warmup_fraction=0.05),
        steps=600,
        batch_size=32,
        evaluate_every=100,
        checkpoint_every=300,
    )


def stable_diffusion_lora(optimizer: str = "sgd_sai") -> Run:
    """LoRA of rank 4 teaches a Stable Diffusion on disk a concept from pictures on disk.

    Both folders, and the words for the concept, are to be set: ``--set data.weights=FOLDER``,
    ``data.pictures=FOLDER``, ``data.concept="a sks dog"``.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``, at the paper's learning
            rate of 0.1; ``adamw`` at the usual 1e-4; others have the rate of their row.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> stable_diffusion_lora().optimizer.lr
        0.1
    """
    rates = {"sgd_sai": 0.1, "adamw": 1e-4}
    return Run(
        name="diffusion.stable_diffusion_lora",
        model=StableDiffusionLoRAModel(rank=4),
        data=ConceptData(weights="stable-diffusion", pictures="pictures", concept="a sks"),
        optimizer=choose_optimizer(optimizer, lr=rates.get(optimizer), weight_decay=0.0),
        schedule=schedule_for(optimizer, warmup_fraction=0.05),
        # As much as a concept of 5 to 20 pictures takes.
        steps=800,
        batch_size=2,
        precision="bf16_autocast",
        evaluate_every=100,
        checkpoint_every=200,
    )
