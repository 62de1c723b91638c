"""LoRA on a model of any kind by peft, and GPT-2's attention with q, k and v apart."""

import warnings
from typing import Any

import torch
from torch import nn

from nomadam.experiments.fields import require


class SplitProjection(nn.Module):
    """q, k and v as three linear maps side by side, in the place of GPT-2's joint one.

    The same map as before; each part can now have an adapter of its own.

    Args:
        joint: transformers' `Conv1D`, whose weight is `[inputs, 3 * outputs]`.
    """

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear

    def __init__(self, joint: Any) -> None:
        """See the class."""
        super().__init__()
        biases = (None,) * 3
        if isinstance(joint.bias, nn.Parameter):
            biases = joint.bias.detach().chunk(3)
        for name, weight, bias in zip(
            "qkv", joint.weight.detach().chunk(3, dim=1), biases, strict=True
        ):
            part = nn.Linear(*weight.shape, bias=bias is not None, device="meta")
            part.weight = nn.Parameter(weight.T.contiguous())
            if bias is not None:
                part.bias = nn.Parameter(bias.clone())
            setattr(self, name, part)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., inputs]` to `[..., 3 * outputs]`: q, k and v one after another."""
        return torch.cat([self.q(hidden), self.k(hidden), self.v(hidden)], dim=-1)


def split_attention(module: nn.Module) -> nn.Module:
    """Put a `SplitProjection` in the place of every joint projection of a GPT-2, in place.

    Args:
        module: a GPT-2 of transformers.

    Raises:
        ValueError: it has no such projection.
    """
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    attentions = [part for part in module.modules() if isinstance(part, GPT2Attention)]
    if not attentions:
        raise ValueError(f"{type(module).__name__} has no attention of GPT-2's kind to split")
    for attention in attentions:
        attention.c_attn = SplitProjection(attention.c_attn)  # pyright: ignore
    return module


def adapted(
    module: Any, *, rank: int, alpha: float, dropout: float, targets: tuple[str, ...]
) -> nn.Module:
    """Freeze a module and give some of its layers LoRA adapters, whose output is 0 at first.

    An adapted layer adds (alpha / rank) · B A dropout(x), with A `[rank, inputs]` drawn at random
    and B `[outputs, rank]` zero (arXiv 2106.09685, section 4.1).

    Args:
        module: modified in place.
        rank: at least 1.
        alpha: above 0.
        dropout: of what enters A, 0 to below 1.
        targets: ends of the names of the layers, each of which at least one layer has.

    Raises:
        ValueError: no layer's name ends so.
        ImportError: without peft, naming the extra to install.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "nomadam[lab]"') from error
    names = [f".{name}" for name, _ in module.named_modules()]
    for target in targets:
        ends = any(name.endswith(f".{target}") for name in names)
        require(ends, "model.targets", target, "an end of a layer's name")
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    config = LoraConfig(**settings, target_modules=list(targets))
    with warnings.catch_warnings():
        # Of what peft asks transformers by a name that will go.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(module, config)
