"""LoRA on GPT-2, trained here or read from a folder, and the pairs of texts to tune it on."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomadam.experiments.configuration import Run
from nomadam.experiments.fields import check_types, require
from nomadam.experiments.language_model import GPT2Model, TokenData

if TYPE_CHECKING:
    import torch

    from nomadam.experiments.data.text_pairs import PairBatch, PairDataset

TEXTS = "texts.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """What LoRA on any GPT-2 is described by, and how it is judged.

    The joint projection of each attention is split into q, k and v, so that each target has A and B
    of its own.

    Args:
        rank: of the adapters, at least 1; default 4.
        alpha: an adapter's output counts alpha / rank times, above 0; default 32.
        dropout: of what enters the adapters, 0 to below 1; default 0.
        targets: which of a GPT-2's layers have one, by the ends of their names; default q and v.
        label_smoothing: s of the loss, 0 to below 1; default 0.
        num_texts: that are written and judged after the last step, at least 1; default 200.
        text_tokens: most tokens of such a text, at least 1; default 48.

    Raises:
        ValueError: for a value outside its range.
    """

    rank: int = 4
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("c_attn.q", "c_attn.v")
    label_smoothing: float = 0.0
    num_texts: int = 200
    text_tokens: int = 48

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "model.")
        for field in ("rank", "num_texts", "text_tokens"):
            value = getattr(self, field)
            require(value >= 1, f"model.{field}", value, "at least 1")
        for field in ("dropout", "label_smoothing"):
            value = getattr(self, field)
            require(0 <= value < 1, f"model.{field}", value, "at least 0 and below 1")
        require(self.alpha > 0, "model.alpha", self.alpha, "above 0")
        require(bool(self.targets), "model.targets", self.targets, "at least one name")

    def loss(self, module: "torch.nn.Module", batch: "PairBatch") -> "torch.Tensor":
        """Cross entropy of the target tokens with the smoothed labels, in nats, in float32.

        The sum over the batch, divided by its rows and by the targets of a mean pair: over all
        pairs that is the mean over all target tokens, however they are split into batches.

        Args:
            module: what `build` gave, wrapped or not.
            batch: tokens and labels.
        """
        return _cross_entropy(self._logits(module, batch), batch, self.label_smoothing)

    def measures(self, module: "torch.nn.Module", batch: "PairBatch") -> dict[str, "torch.Tensor"]:
        """The loss, and it without smoothing."""
        logits = self._logits(module, batch)
        return {
            "loss": _cross_entropy(logits, batch, self.label_smoothing),
            "cross_entropy": _cross_entropy(logits, batch, 0.0),
        }

    def finish(
        self, module: "torch.nn.Module", dataset: "PairDataset", folder: Path
    ) -> dict[str, float]:
        """Write texts after held-out prompts, keep them in ``texts.jsonl``, and judge them.

        Args:
            module: the trained module, in evaluation mode.
            dataset: what it was tuned on; prompts are taken evenly from its `judged`.
            folder: the run folder.

        Returns:
            What `nomadam.experiments.generated_text.text_scores` says, and ``judged_texts``.
        """
        from nomadam.durable_files import write_atomically
        from nomadam.experiments.generated_text import greedy_texts, text_scores

        number = min(self.num_texts, len(dataset.judged))
        chosen = [dataset.judged[i * len(dataset.judged) // number] for i in range(number)]
        prompts = [prompt for prompt, _ in chosen]
        written = greedy_texts(
            module, prompts, end=dataset.end, context=dataset.context, most=self.text_tokens
        )
        texts = [dataset.decode(tokens) for tokens in written]
        lines = [
            {"prompt": dataset.decode(prompt), "references": references, "text": text}
            for (prompt, references), text in zip(chosen, texts, strict=True)
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(folder / TEXTS, content.encode())
        scores = text_scores(texts, [references for _, references in chosen])
        return {**scores, "judged_texts": number}

    def _adapted(self, base: Any) -> "torch.nn.Module":
        from nomadam.experiments.adapters import adapted, split_attention

        return adapted(
            split_attention(base),
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=self.targets,
        )

    @staticmethod
    def _logits(module: Any, batch: "PairBatch") -> "torch.Tensor":
        return module(input_ids=batch.tokens[:, :-1]).logits.float()


def _cross_entropy(logits: "torch.Tensor", batch: "PairBatch", smoothing: float) -> "torch.Tensor":
    from torch.nn.functional import cross_entropy

    labels = batch.labels[:, 1:].flatten()
    total = cross_entropy(logits.flatten(0, 1), labels, reduction="sum", label_smoothing=smoothing)
    return total / (len(batch) * batch.mean_targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAModel(Adapters):
    """LoRA on a GPT-2 that another Run trains first.

    Args:
        pretraining: that Run; its model is a ``GPT2Model`` and its data are ``TokenData``.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> module = LoRAModel(pretraining=demo("adamw")).build(vocab_size=300, context=64)
        >>> sum(each.numel() for each in module.parameters() if each.requires_grad)
        8192
    """

    pretraining: Run

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        model, data = self.pretraining.model, self.pretraining.data
        require(isinstance(model, GPT2Model), "model.pretraining.model", model, "a GPT2Model")
        require(isinstance(data, TokenData), "model.pretraining.data", data, "TokenData")

    def first_stage(self) -> Run:
        """The Run that trains what is adapted."""
        return self.pretraining

    def check_data(self, data: Any) -> None:
        """Refuse tokens that are not made as those of the pretraining are.

        How long their windows are makes no difference.

        Raises:
            ValueError: naming the first field that differs.
        """
        if isinstance(data, DocstringData):
            for field in dataclasses.fields(TokenData):
                own, theirs = (
                    getattr(each, field.name) for each in (data.tokens, self.pretraining.data)
                )
                same = field.name == "context" or own == theirs
                allowed = f"as model.pretraining.data.{field.name}, {theirs!r}"
                require(same, f"data.tokens.{field.name}", own, allowed)

    def build(
        self, *, vocab_size: int, context: int, pretrained: Path | None = None
    ) -> "torch.nn.Module":
        """Make the module, of which the adapters alone require a gradient.

        Args:
            vocab_size: number of tokens.
            context: longest pair without its last token; at most that of the pretraining.
            pretrained: the run folder of `first_stage`; default None, which leaves it fresh.

        Raises:
            ValueError: for targets that a GPT-2 does not have, and for too long a context.
            ImportError: a library is missing, naming the extra to install.
        """
        longest: Any = self.pretraining.data
        allowed = f"at most that of the pretraining, {longest.context}"
        require(context <= longest.context, "data.context", context, allowed)
        base = self.pretraining.model.build(vocab_size=vocab_size, context=longest.context)
        if pretrained is not None:
            from nomadam.experiments.first_stage import load_final_weights

            load_final_weights(base, pretrained)
        return self._adapted(base)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAOnWeights(Adapters):
    """LoRA on a GPT-2 whose weights lie on this machine.

    Args:
        weights: a folder as transformers saves it, with ``config.json`` and ``model.safetensors``.

    Raises:
        ValueError: for a value outside its range.
    """

    weights: str

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        require(bool(self.weights), "model.weights", self.weights, "a folder")

    def build(self, *, vocab_size: int, context: int) -> "torch.nn.Module":
        """Read the weights; the adapters, which alone require a gradient, are drawn at random.

        The dropouts of the model itself are off, as in the recipe of arXiv 2106.09685.

        Args:
            vocab_size: number of tokens, at most that of the weights.
            context: longest pair without its last token, at most that of the weights.

        Raises:
            ValueError: no weights of a GPT-2 there, or a vocabulary or context too large for them.
            ImportError: a library is missing, naming the extra to install.
        """
        from nomadam.experiments.data.saved_models import read_model

        try:
            from transformers import GPT2LMHeadModel
        except ImportError as error:
            raise ImportError('GPT-2 needs transformers: pip install "nomadam[lab]"') from error
        folder = Path(self.weights).expanduser()
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"model.weights = {self.weights!r}: must be a folder with config.json and "
                    f"model.safetensors of a GPT-2, but {name} is not there"
                )
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        base = read_model(GPT2LMHeadModel, folder, use_cache=False, **off)
        most, longest = base.config.vocab_size, base.config.n_positions
        require(vocab_size <= most, "the tokenizer's size", vocab_size, f"at most {most}")
        require(context <= longest, "data.context", context, f"at most {longest}")
        return self._adapted(base.float())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairData:
    """What is the same for all pairs of texts.

    Args:
        context: a pair has at most so many tokens and one, at least 2; what is longer is left out.

    Raises:
        ValueError: for a value outside its range.
    """

    context: int = 64

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "data.")
        require(self.context >= 2, "data.context", self.context, "at least 2")

    @property
    def tokens_per_row(self) -> int:
        """A pair counts 1."""
        return 1

    def shape(self, dataset: "PairDataset") -> dict[str, int]:
        """What a language model needs to know: the vocabulary's size and the context."""
        return {"vocab_size": dataset.vocab_size, "context": self.context}

    def train_batch(
        self, dataset: "PairDataset", *, seed: int, step: int, micro: int, batch_size: int
    ) -> "PairBatch":
        """Random pairs, a pure function of the arguments."""
        return dataset.train_batch(seed=seed, step=step, micro=micro, batch_size=batch_size)

    def validation_batches(
        self, dataset: "PairDataset", *, batch_size: int, max_batches: int | None
    ) -> Iterator[Any]:
        """The held-out pairs in their order."""
        return dataset.validation_batches(batch_size=batch_size, max_batches=max_batches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocstringData(PairData):
    """Signatures of Python functions, each with the first sentence of its docstring.

    Args:
        tokens: the data of the pretraining: its source, its tokenizer, and what it holds out.

    Raises:
        ValueError: for a value outside its range.
    """

    tokens: TokenData

    def load(self, cache_folder: Path | None = None) -> "PairDataset":
        """Read the pairs; the tokenizer is that of the tokens, which are made where missing.

        Raises:
            ValueError: where the source is missing, or has no pairs.
        """
        from nomadam.experiments.data.text_pairs import load_docstrings

        return load_docstrings(
            self.tokens.load(cache_folder),
            self.tokens.source,
            context=self.context,
            validation_fraction=self.tokens.validation_fraction,
            max_bytes=self.tokens.max_bytes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class E2EData(PairData):
    """The E2E NLG data from its CSV files (arXiv 1706.09254).

    Args:
        source: the folder of ``trainset.csv``, ``devset.csv`` and ``testset_w_refs.csv``.
        tokenizer: a ``tokenizer.json`` or a folder that has one.

    Raises:
        ValueError: for a value outside its range.
    """

    source: str
    tokenizer: str

    def load(self, cache_folder: Path | None = None) -> "PairDataset":
        """Read the pairs.

        Raises:
            ValueError: where a file is missing or is not of this form.
        """
        from nomadam.experiments.data.text_pairs import load_e2e

        return load_e2e(self.source, tokenizer=self.tokenizer, context=self.context)
