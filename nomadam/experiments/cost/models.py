"""The tensors of known models, computed from the numbers of their configurations.

No weights and no forward pass: each model is a tree of layers on the meta device with the names,
shapes and kinds of layers that transformers' model has, so that optimizers that need the role of a
tensor (Muon, Adam-mini) find it.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType, SimpleNamespace

import torch
from torch import nn

Parts = Iterator[tuple[str, nn.Module]]


class Conv1D(nn.Module):
    """A linear map that keeps its weight as [inputs, outputs], as transformers' GPT-2 does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Makes the weight and the bias."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))


class Vectors(nn.Module):
    """Parameters that belong to no layer, such as a table of positions."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        """Makes a parameter of each shape."""
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


class Tensors(nn.Module):
    """A tree of layers by their dotted names, which holds parameters and computes nothing.

    Args:
        parts: dotted names and layers.
        hidden_size: of the residual stream.
        heads: attention heads.
        not_hidden: names of weights beside embeddings that Muon leaves to AdamW: positions.
        output: name of the output layer's weight, or ``()`` where it is tied.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        hidden_size: int,
        heads: int,
        not_hidden: tuple[str, ...] = (),
        output: str | tuple[str, ...] = (),
    ) -> None:
        """Hangs the parts into the tree."""
        super().__init__()
        for name, part in parts:
            *path, last = name.split(".")
            place: nn.Module = self
            for step in path:
                if not hasattr(place, step):
                    place.add_module(step, nn.Module())
                place = place.get_submodule(step)
            # A part may lie beside a branch of the same name, which it has to keep.
            if hasattr(place, last):
                for key, param in part.named_parameters(recurse=False):
                    place.get_submodule(last).register_parameter(key, param)
            else:
                place.add_module(last, part)
        self.config = SimpleNamespace(hidden_size=hidden_size, num_attention_heads=heads)
        self.not_hidden = not_hidden
        self.output = output

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())


def gpt2(*, layers: int, width: int, heads: int, vocabulary: int = 50257, context: int = 1024):
    """The tensors of a GPT-2 with a tied output layer."""

    def parts() -> Parts:
        yield "transformer.wte", nn.Embedding(vocabulary, width)
        yield "transformer.wpe", nn.Embedding(context, width)
        for i in range(layers):
            block = f"transformer.h.{i}"
            yield f"{block}.ln_1", nn.LayerNorm(width)
            yield f"{block}.attn.c_attn", Conv1D(width, 3 * width)
            yield f"{block}.attn.c_proj", Conv1D(width, width)
            yield f"{block}.ln_2", nn.LayerNorm(width)
            yield f"{block}.mlp.c_fc", Conv1D(width, 4 * width)
            yield f"{block}.mlp.c_proj", Conv1D(4 * width, width)
        yield "transformer.ln_f", nn.LayerNorm(width)

    return Tensors(parts(), hidden_size=width, heads=heads)


def vit(*, layers: int, width: int, heads: int, patch: int, image: int = 224, classes: int = 1000):
    """The tensors of a vision transformer; query, key and value are three maps."""
    positions = (image // patch) ** 2 + 1
    embeddings = "vit.embeddings"

    def parts() -> Parts:
        yield embeddings, Vectors(cls_token=(1, 1, width),
                                  position_embeddings=(1, positions, width))  # fmt: skip
        yield f"{embeddings}.patch_embeddings.projection", nn.Conv2d(3, width, patch, patch)
        for i in range(layers):
            block = f"vit.layers.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield f"{block}.attention.{name}", nn.Linear(width, width)
            yield f"{block}.layernorm_before", nn.LayerNorm(width)
            yield f"{block}.layernorm_after", nn.LayerNorm(width)
            yield f"{block}.mlp.fc1", nn.Linear(width, 4 * width)
            yield f"{block}.mlp.fc2", nn.Linear(4 * width, width)
        yield "vit.layernorm", nn.LayerNorm(width)
        yield "classifier", nn.Linear(width, classes)

    return Tensors(
        parts(),
        hidden_size=width,
        heads=heads,
        not_hidden=(f"{embeddings}.cls_token", f"{embeddings}.position_embeddings"),
        output="classifier.weight",
    )


def llama(
    *,
    layers: int,
    width: int,
    heads: int,
    inner: int,
    vocabulary: int = 32000,
    key_heads: int | None = None,
):
    """The tensors of a Llama; keys and values have as many heads as queries, or fewer."""
    keys = width // heads * (key_heads or heads)

    def parts() -> Parts:
        yield "model.embed_tokens", nn.Embedding(vocabulary, width)
        for i in range(layers):
            block = f"model.layers.{i}"
            for name, outputs in (("q_proj", width), ("k_proj", keys), ("v_proj", keys)):
                yield f"{block}.self_attn.{name}", nn.Linear(width, outputs, bias=False)
            yield f"{block}.self_attn.o_proj", nn.Linear(width, width, bias=False)
            yield f"{block}.mlp.gate_proj", nn.Linear(width, inner, bias=False)
            yield f"{block}.mlp.up_proj", nn.Linear(width, inner, bias=False)
            yield f"{block}.mlp.down_proj", nn.Linear(inner, width, bias=False)
            yield f"{block}.input_layernorm", nn.RMSNorm(width)
            yield f"{block}.post_attention_layernorm", nn.RMSNorm(width)
        yield "model.norm", nn.RMSNorm(width)
        yield "lm_head", nn.Linear(width, vocabulary, bias=False)

    return Tensors(parts(), hidden_size=width, heads=heads, output="lm_head.weight")


def equal(*, numel: int, count: int) -> Tensors:
    """That many matrices of equal shape, about ``numel`` parameters together."""
    columns = max(1, int((numel / count) ** 0.5))
    rows = max(1, round(numel / count / columns))
    parts = ((f"{i}", nn.Linear(columns, rows, bias=False)) for i in range(count))
    return Tensors(parts, hidden_size=columns, heads=1)


MODELS: Mapping[str, Callable[[], Tensors]] = MappingProxyType(
    {
        "tiny": partial(gpt2, layers=2, width=64, heads=2, vocabulary=512, context=64),
        "vit_s_16": partial(vit, layers=12, width=384, heads=6, patch=16),
        "gpt2_small": partial(gpt2, layers=12, width=768, heads=12),
        "vit_h_14": partial(vit, layers=32, width=1280, heads=16, patch=14),
        "gpt2_xl": partial(gpt2, layers=48, width=1600, heads=25),
        "llama2_7b": partial(llama, layers=32, width=4096, heads=32, inner=11008),
    }
)
LABELS = MappingProxyType(
    {
        "tiny": "tiny",
        "vit_s_16": "ViT-S/16",
        "gpt2_small": "GPT-2 small",
        "vit_h_14": "ViT-H/14",
        "gpt2_xl": "GPT-2 XL",
        "llama2_7b": "Llama-2-7B",
    }
)


def on_meta(make: Callable[[], Tensors], dtype: torch.dtype = torch.float32) -> Tensors:
    """The tensors of a model without memory.

    Example:
        >>> on_meta(MODELS["gpt2_small"]).numel
        124439808
    """
    with torch.device("meta"):
        return make().to(dtype)


def in_memory(
    make: Callable[[], Tensors], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensors:
    """The tensors of a model with normal random weights (0.02) and gradients (1e-3).

    The random numbers repeat after a million, which no optimizer notices.

    Args:
        make: one of `MODELS`.
        device: where they lie.
        dtype: of weights and gradients.
    """
    module = on_meta(make, dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    tile = torch.randn(2**20, device=device, generator=generator)
    with torch.no_grad():
        for p in module.parameters():
            p.grad = torch.empty_like(p)
            for start in range(0, p.numel(), len(tile)):
                part = slice(start, start + len(tile))
                size = len(p.view(-1)[part])
                p.view(-1)[part] = 0.02 * tile[:size]
                p.grad.view(-1)[part] = -1e-3 * tile[:size].flip(0)
    return module
