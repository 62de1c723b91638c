"""What the paper on SGD-SaI reports of the studies here: arXiv 2412.11768, version 2.

Its table of optimizer state and step time stands where these are measured, in
`nomadam.experiments.cost.published`, and beside ours in the tables of that study. Of diffusion it
shows pictures, and of NATS-Bench histograms, both without numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# A mean, or a mean with its standard deviation; None where the paper has no number.
Number = float | tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table of the paper, or what it says where it has none.

    Args:
        title: what is compared.
        setting: model, data and training of the paper.
        columns: head and decimals of each column of numbers.
        rows: our name of the optimizer to (the paper's name, a number for each column).
        ours: for each column of ours, what it shows; see `nomadam.reports.paper_tables`.
    """

    title: str
    setting: str
    columns: tuple[tuple[str, int], ...] = ()
    rows: Mapping[str, tuple[str, tuple[Number, ...]]] = field(default_factory=dict)
    ours: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PaperGrid:
    """Cells of a grid of the paper.

    Args:
        setting: model, data and training of the paper.
        source: where the cells come from.
        rates: learning rates, ascending.
        decays: ascending.
        cells: optimizer to rows, a row a decay and a column a rate; top-1 in %.
    """

    setting: str
    source: str
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    cells: Mapping[str, tuple[tuple[float, ...], ...]]


IMAGENET = "ViT-S/16 on ImageNet-1k, 90 passes, the recipe of arXiv 2205.01580."
CIFAR = "ResNet-18 on CIFAR-10, 200 passes, batch 128, the rate a tenth after 80 and 160 of them."

# By the beginning of the names of our studies; the longest that fits counts.
TABLES: Mapping[str, PaperTable] = MappingProxyType(
    {
        "gpt2_pretraining": PaperTable(
            title="GPT-2 pretraining",
            setting="GPT-2 small (124 M parameters, context 1024) on OpenWebText, 491,520 tokens a "
            "step. The training loss is that of the last micro-batch.",
            columns=(
                ("training loss", 2),
                ("validation loss", 2),
                ("optimizer step, ms", 2),
                ("state of AdamW's, %", 1),
            ),
            rows={
                "adamw": ("AdamW", (3.11, 3.12, 13.42, 100.0)),
                "adam_mini": ("Adam-mini", (3.11, 3.12, 27.21, 50.1)),
                "sgd_sai": ("SGD-SaI", (2.98, 3.09, 9.31, 50.0)),
            },
            ours=("train_loss", "validation_loss", "optimizer_ms", "state"),
        ),
        "vit_classification": PaperTable(
            title="ViT classification",
            setting=f"{IMAGENET} Grid: learning rates 1e-1 to 1e-4 × decays 1e-2 to 1e-4; the best "
            "cell over three seeds.",
            columns=(("best top-1, %", 2), ("mean over the grid, %", 2)),
            rows={
                "sgdm": ("SGDM", ((63.80, 0.35), (14.33, 19.38))),
                "adam": ("Adam", ((61.56, 0.93), (20.93, 22.05))),
                "adam_mini": ("Adam-mini", ((72.29, 0.43), (36.65, 35.39))),
                "adamw": ("AdamW", ((73.04, 0.31), (37.21, 35.43))),
                "prodigy": ("Prodigy", ((73.24, 0.21), None)),
                "sgd_sai": ("SGD-SaI", ((72.92, 0.07), (57.55, 18.46))),
            },
            ours=("validation_accuracy", "grid"),
        ),
        "resnet18_grid": PaperTable(
            title="ResNet-18",
            setting=f"{CIFAR} Grid: learning rates 1e-1 to 1e-4 × decays 0.5 to 5e-5; the best "
            "cell over three seeds.",
            columns=(("best top-1, %", 2),),
            rows={
                "adam": ("Adam", (94.23,)),
                "adamw": ("AdamW", (94.74,)),
                "sgdm": ("SGDM", (95.26,)),
                "sgd_sai": ("SGD-SaI", (95.36,)),
            },
            ours=("validation_accuracy", "grid"),
        ),
        "resnet18_grid.families": PaperTable(
            title="Families of networks",
            setting="CNNs of NATS-Bench: histograms of their accuracy, and no numbers.",
        ),
        "lora_finetuning": PaperTable(
            title="LoRA fine-tuning",
            setting="LoRA of rank 4 on q and v of GPT-2 medium, E2E NLG, in the setting of arXiv "
            "2402.02347; SGD-SaI at learning rate 1e-3 and decay 1e-2.",
            columns=(("BLEU", 1), ("NIST", 2), ("METEOR", 1), ("ROUGE-L", 1), ("CIDEr", 2)),
            rows={
                "sgd": ("SGD", (66.6, 8.54, 44.2, 68.2, 2.32)),
                "scaled_sgd": ("scaled SGD", (69.2, 8.71, 46.3, 70.9, 2.48)),
                "adamw": ("AdamW", (68.9, 8.69, 46.5, 71.3, 2.51)),
                "adam_mini": ("Adam-mini", (68.7, 8.66, 46.3, 71.1, 2.50)),
                "scaled_adamw": ("scaled AdamW", (69.6, 8.77, 46.6, 71.8, 2.52)),
                "sgd_sai": ("SGD-SaI", (69.9, 8.81, 46.7, 72.1, 2.53)),
            },
            ours=("validation_loss", "bleu", "rouge_l"),
        ),
        "diffusion": PaperTable(
            title="Diffusion",
            setting="LoRA on models of the Stable Diffusion 1.5 family and concepts of "
            "Mix-of-Show, SGD-SaI at learning rate 0.1: pictures, and no numbers.",
        ),
    }
)

GRIDS: Mapping[str, PaperGrid] = MappingProxyType(
    {
        "vit_classification": PaperGrid(
            setting=f"{IMAGENET} The column of 1e-4 is not in the figure.",
            source="Read from the vector figures in the repository of the paper.",
            rates=(1e-3, 1e-2, 1e-1),
            decays=(1e-4, 1e-3, 1e-2),
            cells={
                "AdamW": ((72.37, 5.64, 0.73), (72.64, 5.94, 0.96), (73.05, 6.21, 0.66)),
                "SGDM": ((5.92, 35.11, 63.79), (5.07, 13.17, 31.30), (1.77, 3.09, 7.49)),
                "SGD-SaI": ((62.67, 69.14, 68.54), (62.78, 69.70, 71.96), (63.31, 72.93, 67.34)),
            },
        ),
        "resnet18_grid": PaperGrid(
            setting=CIFAR,
            source="Read from the vector figures in the repository of the paper.",
            rates=(1e-4, 1e-3, 1e-2, 1e-1),
            decays=(5e-5, 5e-4, 5e-3, 5e-2, 5e-1),
            cells={
                "SGD-SaI": (
                    (92.74, 93.36, 90.62, 89.87),
                    (92.76, 93.41, 91.00, 92.26),
                    (92.77, 93.43, 92.85, 94.60),
                    (93.03, 94.50, 95.19, 88.51),
                    (94.16, 95.36, 88.05, 11.99),
                ),
            },
        ),
    }
)


def table_of(study: str) -> PaperTable | None:
    """Return what the paper says of a study, None where it says nothing.

    Args:
        study: the name of a Run.

    Example:
        >>> table_of("resnet18_grid.families_grid").title, table_of("low_precision.vit_demo")
        ('Families of networks', None)
    """
    fitting = [name for name in TABLES if study.startswith(name)]
    return TABLES[max(fitting, key=len)] if fitting else None
