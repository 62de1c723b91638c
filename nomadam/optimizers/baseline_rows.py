"""The optimizers to compare with: one row each."""

from __future__ import annotations

from nomadam.optimizers import libraries, scaled_lora, state_bytes
from nomadam.optimizers.adam_mini import mini_groups
from nomadam.optimizers.apollo_mini import apollo_mini, apollo_mini_groups
from nomadam.optimizers.baseline import Baseline
from nomadam.optimizers.muon_pair import muon_groups
from nomadam.optimizers.muon_sgd_sai import muon_sgd_sai, muon_sgd_sai_groups
from nomadam.optimizers.scale import scale, scale_groups
from nomadam.optimizers.scion import scion, scion_groups
from nomadam.optimizers.sgd_sai import SGDSaI
from nomadam.optimizers.sgd_sai_controls import ShuffledSGDSaI, equal_sgd_sai
from nomadam.optimizers.sgd_sai_rows import row_groups, sgd_sai_rows
from nomadam.optimizers.sign_embedding import sign_embedding_groups, sign_embedding_sgd_sai

PLAIN = {"normalize": False, "refresh": None, "direction": "momentum"}

ROWS = (
    Baseline(
        name="sgd_sai",
        summary="SGD with a learning rate for each block, measured once at initialisation.",
        package="nomadam",
        default_lr=1e-2,
        default_weight_decay=1e-2,
        search_space={"lr": (3e-4, 3e-1), "weight_decay": (1e-4, 1e-1)},
        state_bytes_per_param=4,
        make=SGDSaI,
        count_state=state_bytes.sgd_sai_state,
    ),
    Baseline(
        name="sgdm",
        summary="SGD with EMA momentum (dampening = momentum: lr 10 here is 1 in torch's usual "
        "form) and coupled decay.",
        default_lr=1.0,
        default_weight_decay=1e-4,
        search_space={"lr": (3e-2, 3e1), "weight_decay": (1e-6, 1e-2)},
        state_bytes_per_param=4,
        make=libraries.sgdm,
        count_state=state_bytes.momentum_state,
    ),
    Baseline(
        name="sgdm_decoupled",
        summary="SGDSaI with a gain of 1: sgdm with decoupled decay. At these learning rates the "
        "decay has to be small: a step takes lr * weight_decay of each weight.",
        package="nomadam",
        default_lr=1.0,
        default_weight_decay=1e-4,
        search_space={"lr": (3e-2, 3e1), "weight_decay": (1e-6, 1e-2)},
        state_bytes_per_param=4,
        make=SGDSaI,
        fixed={"gain": 1.0, "eps": 0.0, **PLAIN},
        count_state=state_bytes.sgd_sai_state,
    ),
    Baseline(
        name="sgd_sai_sqrt_numel",
        summary="SGDSaI with the square root of the number of elements for a gain: not measured.",
        package="nomadam",
        default_lr=1e-2,
        default_weight_decay=1e-2,
        search_space={"lr": (3e-4, 3e-1), "weight_decay": (1e-4, 1e-1)},
        state_bytes_per_param=4,
        make=SGDSaI,
        fixed={"gain": "sqrt_numel", "eps": 0.0, **PLAIN},
        count_state=state_bytes.sgd_sai_state,
    ),
    Baseline(
        name="sgd_sai_normalized",
        summary="SGDSaI with all gains divided by the largest, as the paper's Algorithm 1 has it: "
        "the learning rate is larger by that, some hundred times.",
        package="nomadam",
        default_lr=5.0,
        default_weight_decay=2e-5,
        search_space={"lr": (1e-1, 1e2), "weight_decay": (2e-6, 2e-3)},
        state_bytes_per_param=4,
        make=SGDSaI,
        fixed={**PLAIN, "gain": "gsnr", "normalize": True},
        count_state=state_bytes.sgd_sai_state,
    ),
    Baseline(
        name="sgd_sai_refreshed",
        summary="SGDSaI with its gains measured again at every 25th step.",
        package="nomadam",
        default_lr=1e-2,
        default_weight_decay=1e-2,
        search_space={"lr": (3e-4, 3e-1), "weight_decay": (1e-4, 1e-1)},
        state_bytes_per_param=4,
        make=SGDSaI,
        fixed={**PLAIN, "gain": "gsnr", "refresh": 25},
        count_state=state_bytes.sgd_sai_state,
    ),
    Baseline(
        name="sgd_sai_rows",
        summary="SGDSaI whose gains follow training: by the square root of a block's gradients "
        "against its first one, and among the rows of embeddings and output layer. Our own.",
        package="nomadam",
        default_lr=1e-2,
        default_weight_decay=1e-2,
        search_space={"lr": (3e-4, 3e-1), "weight_decay": (1e-4, 1e-1)},
        state_bytes_per_param=4,
        make=sgd_sai_rows,
        groups=row_groups,
        count_state=state_bytes.row_state,
    ),
    Baseline(
        name="sgd_sai_shuffled",
        summary="SGDSaI with its measured gains exchanged among the blocks by a seed: a control.",
        package="nomadam",
        default_lr=1e-2,
        default_weight_decay=1e-2,
        search_space={"lr": (3e-5, 3e-1), "weight_decay": (1e-4, 1e-1)},
        state_bytes_per_param=4,
        make=ShuffledSGDSaI,
        count_state=state_bytes.plain_sgd_sai_state,
    ),
    Baseline(
        name="sgd_sai_equal",
        summary="SGDSaI with one gain for all, the geometric mean of the blocks' sqrt(numel): a "
        "control, which is sgdm_decoupled at a learning rate that compares with sgd_sai's.",
        package="nomadam",
        default_lr=1e-2,
        default_weight_decay=1e-2,
        search_space={"lr": (3e-4, 3e-1), "weight_decay": (1e-4, 1e-1)},
        state_bytes_per_param=4,
        make=equal_sgd_sai,
        count_state=state_bytes.plain_sgd_sai_state,
    ),
    Baseline(
        name="adam",
        summary="Adam with coupled decay (arXiv 1412.6980).",
        default_lr=1e-3,
        default_weight_decay=1e-4,
        search_space={"lr": (3e-5, 3e-2), "weight_decay": (1e-6, 1e-2)},
        state_bytes_per_param=8,
        make=libraries.adam,
        count_state=state_bytes.copies(2),
    ),
    Baseline(
        name="adamw",
        summary="Adam with decoupled decay (arXiv 1711.05101).",
        default_lr=1e-3,
        default_weight_decay=1e-1,
        search_space={"lr": (3e-5, 3e-2), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=8,
        make=libraries.adamw,
        count_state=state_bytes.copies(2),
    ),
    Baseline(
        name="adam_mini",
        summary="Adam-mini (arXiv 2406.16793), our own: adam_mini 1.1.1 and pytorch_optimizer "
        "4.1.0 find blocks by substrings of names, and give GPT-2's c_attn one block in all "
        "instead of one for each head.",
        package="nomadam",
        default_lr=1e-3,
        default_weight_decay=1e-1,
        search_space={"lr": (3e-5, 3e-2), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=4,
        make=libraries.adam_mini,
        groups=mini_groups,
        count_state=state_bytes.adam_mini_state,
    ),
    Baseline(
        name="prodigy",
        summary="Prodigy (arXiv 2306.06101): finds the step size itself; keep lr at 1 and search "
        "d_coef. One estimate for the whole model.",
        package="prodigyopt>=1.1.2",
        extra="baselines",
        default_lr=1.0,
        default_weight_decay=1e-1,
        search_space={"d_coef": (1e-1, 1e1), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=16,
        make=libraries.prodigy,
        count_state=state_bytes.prodigy_state,
    ),
    Baseline(
        name="lion",
        summary="Lion (arXiv 2302.06675): the sign of a momentum; its decay is about ten times "
        "AdamW's, its learning rate a tenth.",
        package="pytorch_optimizer>=4.0",
        extra="baselines",
        default_lr=1e-4,
        default_weight_decay=1.0,
        search_space={"lr": (3e-6, 3e-3), "weight_decay": (1e-2, 1e1)},
        state_bytes_per_param=4,
        make=libraries.lion,
        count_state=state_bytes.copies(1),
    ),
    Baseline(
        name="adafactor",
        summary="Adafactor (arXiv 1804.04235, no first moment), lr relative to the size of the "
        "weights. torch's default floor of 1.2e-7 under the mean squared gradient is above "
        "usual gradients of a language model: 1e-15 here.",
        default_lr=5e-2,
        default_weight_decay=2e-3,
        search_space={"lr": (1e-3, 1.0), "weight_decay": (1e-4, 1e-1)},
        state_bytes_per_param=0,
        make=libraries.adafactor,
        count_state=state_bytes.adafactor_state,
    ),
    Baseline(
        name="schedule_free_adamw",
        summary="Schedule-free AdamW (arXiv 2405.15682): train() before steps, eval() before "
        "evaluations. Its step overwrites the gradients.",
        package="schedulefree>=1.4",
        extra="baselines",
        default_lr=3e-3,
        default_weight_decay=3e-2,
        search_space={"lr": (1e-4, 1e-1), "weight_decay": (1e-3, 1.0)},
        schedule="constant",
        state_bytes_per_param=8,
        make=libraries.schedule_free_adamw,
        count_state=state_bytes.copies(2),
    ),
    Baseline(
        name="muon",
        summary="Muon on hidden matrices, adjusted to AdamW's update size (arXiv 2502.16982), and "
        "AdamW, at 8 bytes, on embeddings, output layer and vectors.",
        package="torch>=2.9",
        default_lr=1e-3,
        default_weight_decay=1e-1,
        search_space={"lr": (3e-5, 3e-2), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=4,
        make=libraries.muon,
        groups=muon_groups,
        count_state=state_bytes.muon_state,
    ),
    Baseline(
        name="muon_sgd_sai",
        summary="Muon as in muon, with SGDSaI in AdamW's place: one tensor of state for all, two "
        "learning rates, and the decay of a step by lr * weight_decay everywhere.",
        package="torch>=2.9",
        default_lr=1e-3,
        default_weight_decay=1e-1,
        search_space={
            "lr": (3e-5, 3e-2),
            "sgd_sai_lr": (3e-4, 3e-1),
            "weight_decay": (1e-3, 1.0),
        },
        state_bytes_per_param=4,
        make=muon_sgd_sai,
        groups=muon_sgd_sai_groups,
        count_state=state_bytes.copies(1),
    ),
    Baseline(
        name="sign_embedding_sgd_sai",
        summary="SGDSaI on hidden matrices and filters, the sign of the same momentum on "
        "embeddings, output layer and vectors: one tensor of state, two learning rates, and the "
        "decay of a step by lr * weight_decay everywhere.",
        package="nomadam",
        default_lr=1e-2,
        default_weight_decay=1e-2,
        search_space={
            "lr": (3e-4, 3e-1),
            "sign_lr": (3e-5, 3e-2),
            "weight_decay": (1e-4, 1e-1),
        },
        state_bytes_per_param=4,
        make=sign_embedding_sgd_sai,
        groups=sign_embedding_groups,
        count_state=state_bytes.plain_sgd_sai_state,
    ),
    Baseline(
        name="scion",
        summary="Scion (arXiv 2502.07529): orthogonalised momentum on hidden matrices, its sign on "
        "embeddings and output layer. Weight decay 1 is its constrained form, 0 the other.",
        package="pytorch_optimizer>=4.0",
        extra="baselines",
        default_lr=1e-4,
        default_weight_decay=1.0,
        search_space={"lr": (3e-6, 3e-3), "weight_decay": (1e-2, 1e1)},
        state_bytes_per_param=4,
        make=scion,
        groups=scion_groups,
        count_state=state_bytes.copies(1),
    ),
    Baseline(
        name="scale",
        summary="SCALE (arXiv 2506.16659), our own, as no library has it: normalised columns, "
        "momentum on the output layer alone, AdamW on vectors.",
        package="nomadam",
        default_lr=1e-3,
        default_weight_decay=1e-1,
        search_space={"lr": (3e-5, 3e-2), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=0,
        make=scale,
        groups=scale_groups,
        count_state=state_bytes.scale_state,
    ),
    Baseline(
        name="apollo_mini",
        summary="APOLLO-Mini (arXiv 2412.05270), our own: pytorch_optimizer 4.1.0 steps along the "
        "projected gradient, of rank 1. AdamW on embeddings, output layer and vectors.",
        package="nomadam",
        default_lr=1e-3,
        default_weight_decay=1e-1,
        search_space={"lr": (3e-5, 3e-2), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=0,
        make=apollo_mini,
        groups=apollo_mini_groups,
        count_state=state_bytes.apollo_mini_state,
    ),
    Baseline(
        name="scaled_sgd",
        summary="SGD behind the Riemannian preconditioner of LoRA pairs (arXiv 2402.02347), our "
        "own: for models with LoRA layers of peft alone.",
        package="peft",
        extra="lab",
        default_lr=1e-2,
        default_weight_decay=1e-2,
        search_space={"lr": (1e-4, 1.0), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=0,
        make=scaled_lora.scaled_sgd,
        groups=scaled_lora.lora_groups,
        count_state=state_bytes.momentum_state,
        needs_lora=True,
    ),
    Baseline(
        name="scaled_adamw",
        summary="AdamW behind the Riemannian preconditioner of LoRA pairs (arXiv 2402.02347), our "
        "own: for models with LoRA layers of peft alone.",
        package="peft",
        extra="lab",
        default_lr=1e-3,
        default_weight_decay=1e-1,
        search_space={"lr": (3e-5, 3e-2), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=8,
        make=scaled_lora.scaled_adamw,
        groups=scaled_lora.lora_groups,
        count_state=state_bytes.copies(2),
        needs_lora=True,
    ),
)
