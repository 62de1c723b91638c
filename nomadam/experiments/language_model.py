"""GPT-2 from a configuration, and the token data that it is trained on."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomadam.experiments.fields import check_types, require

if TYPE_CHECKING:
    import torch

    from nomadam.experiments.data.tokens import TokenDataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Model:
    """GPT-2 of transformers, from a configuration, freshly initialised.

    Args:
        layers: number of blocks, at least 1.
        heads: attention heads, at least 1.
        width: of the residual stream, a multiple of heads.
        dropout: everywhere that GPT-2 has it, 0 to below 1; default 0.
        bias: whether linear maps and layer norms have biases; default False.
        tie_embeddings: whether the output layer is the token embedding; default True.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> model = GPT2Model(layers=1, heads=2, width=8).build(vocab_size=16, context=4)
        >>> sum(parameter.numel() for parameter in model.parameters())
        952
    """

    layers: int
    heads: int
    width: int
    dropout: float = 0.0
    bias: bool = False
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "model.")
        for field in ("layers", "heads", "width"):
            value = getattr(self, field)
            require(value >= 1, f"model.{field}", value, "at least 1")
        multiple = f"a multiple of model.heads = {self.heads}"
        require(self.width % self.heads == 0, "model.width", self.width, multiple)
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "at least 0 and below 1")

    def build(self, *, vocab_size: int, context: int) -> "torch.nn.Module":
        """Make the module; torch's global random generator decides the initial weights.

        Args:
            vocab_size: number of tokens.
            context: longest sequence.

        Raises:
            ImportError: without transformers, naming the extra to install.
        """
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError as error:
            raise ImportError('GPT-2 needs transformers: pip install "nomadam[lab]"') from error
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=context,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            use_cache=False,
            tie_word_embeddings=self.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
        module = GPT2LMHeadModel(config)
        if not self.bias:
            _remove_biases(module)
        return module

    def loss(self, module: "torch.nn.Module", batch: "torch.Tensor") -> "torch.Tensor":
        """Mean cross entropy in nats of each next token, in float32.

        Args:
            module: what `build` gave, wrapped or not.
            batch: token numbers, [rows, context + 1].
        """
        from torch.nn.functional import cross_entropy

        logits = module(input_ids=batch[:, :-1]).logits
        return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def _remove_biases(module: "torch.nn.Module") -> None:
    """Take the biases out of a GPT-2, which has no option for it."""
    import torch

    for part in module.modules():
        bias = getattr(part, "bias", None)
        if isinstance(bias, torch.nn.Parameter):
            del part.bias
            if isinstance(part, torch.nn.LayerNorm):
                part.register_parameter("bias", None)
            else:
                # Its linear map adds a bias always: a constant zero, neither trained nor saved.
                part.register_buffer("bias", torch.zeros_like(bias.data), persistent=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenData:
    """Text as tokens, in windows of context + 1.

    Args:
        source: ``stdlib`` (Python's own sources), ``stdlib_prose`` (its docstrings and help
            topics), a folder of text files, a folder with ``train.bin`` and ``val.bin`` (uint16),
            or a Hugging Face data set by name or path.
        vocab_size: of the byte-pair encoding that is trained on it, 257 to 2^20; default 4096.
            Tokens that are read ready-made have their own.
        context: tokens of a window, at least 1; default 64.
        validation_fraction: held out, above 0 and at most 0.5; default 0.05.
        max_bytes: of text to read, at least 1, or None for all; default None.
        text_field: the column of a Hugging Face data set; default ``text``.
        split: the split of a Hugging Face data set; default ``train``.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> TokenData(context=128).tokens_per_row
        128
    """

    source: str = "stdlib"
    vocab_size: int = 4096
    context: int = 64
    validation_fraction: float = 0.05
    max_bytes: int | None = None
    text_field: str = "text"
    split: str = "train"

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "data.")
        require(bool(self.source), "data.source", self.source, "a source of text")
        size = self.vocab_size
        require(257 <= size <= 2**20, "data.vocab_size", size, "from 257 to 1048576")
        require(self.context >= 1, "data.context", self.context, "at least 1")
        fraction = self.validation_fraction
        allowed = "above 0 and at most 0.5"
        require(0 < fraction <= 0.5, "data.validation_fraction", fraction, allowed)
        if self.max_bytes is not None:
            require(self.max_bytes >= 1, "data.max_bytes", self.max_bytes, "at least 1, or none")

    @property
    def tokens_per_row(self) -> int:
        """Tokens that are predicted in a row of a batch."""
        return self.context

    def load(self, cache_folder: Path | None = None) -> "TokenDataset":
        """Read or prepare the tokens; what is prepared is kept in the cache folder.

        Raises:
            ValueError: where the source is missing or can not be read as text or tokens.
        """
        from nomadam.experiments.data.tokens import load_tokens

        return load_tokens(
            self.source,
            vocab_size=self.vocab_size,
            context=self.context,
            validation_fraction=self.validation_fraction,
            max_bytes=self.max_bytes,
            cache_folder=cache_folder,
            text_field=self.text_field,
            split=self.split,
        )

    def shape(self, dataset: "TokenDataset") -> dict[str, int]:
        """What a language model needs to know: the vocabulary's size and the context."""
        return {"vocab_size": dataset.vocab_size, "context": self.context}

    def train_batch(
        self, dataset: "TokenDataset", *, seed: int, step: int, micro: int, batch_size: int
    ) -> "torch.Tensor":
        """Random windows, [batch_size, context + 1], a pure function of the arguments."""
        return dataset.train_batch(
            seed=seed, step=step, micro=micro, batch_size=batch_size, context=self.context
        )

    def validation_batches(
        self, dataset: "TokenDataset", *, batch_size: int, max_batches: int | None
    ) -> Iterator[Any]:
        """The held-out windows in order, none overlapping another."""
        return dataset.validation_batches(
            batch_size=batch_size, context=self.context, max_batches=max_batches
        )
