"""What the studies set for each optimizer: a decay of the strength that its row has."""

import pytest

from nomadam.experiments.catalog import make_runs
from nomadam.optimizers.baselines import BASELINES

STUDIES = (
    "gpt2_pretraining.demo",
    "gpt2_pretraining.small_openwebtext",
    "gpt2_pretraining.medium",
    "gpt2_pretraining.xl",
    "vit_classification.demo",
    "vit_classification.vit_s16_imagenet",
    "resnet18_grid.demo",
    "resnet18_grid.cifar10",
    "lora_finetuning.demo",
    "lora_finetuning.gpt2_medium_e2e",
)
# Published as they are: AdamW on E2E has a rate of 2e-4 and a decay of 0.01.
PUBLISHED = {("lora_finetuning.gpt2_medium_e2e", "adamw")}


@pytest.mark.parametrize("study", STUDIES)
def test_no_step_shrinks_the_weights_far_more_than_the_row_does(study):
    for name, row in BASELINES.items():
        choice = make_runs(study, optimizer=name)[0].optimizer
        share = choice.lr * choice.weight_decay / (row.default_lr * row.default_weight_decay)
        assert share < 11, (name, choice.lr, choice.weight_decay)
        assert share > 0.09 or (study, name) in PUBLISHED, (name, choice.lr, choice.weight_decay)
