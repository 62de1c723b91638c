"""Texts that a language model writes, and how near they come to those that people wrote."""

from collections.abc import Sequence
from typing import Any

import torch

ROWS = 64


def greedy_texts(
    module: Any, prompts: Sequence[Sequence[int]], *, end: int, context: int, most: int
) -> list[list[int]]:
    """Continue each prompt by the likeliest token, again and again, until the end token.

    Args:
        module: gives `logits` for `input_ids`, each from what lies before it; in evaluation mode.
        prompts: token numbers of each, at least 1 and at most `context`.
        end: the token that ends a text; it is no part of what is returned.
        context: most tokens of prompt and continuation.
        most: most tokens of a continuation, at least 1.

    Returns:
        The tokens of each continuation.
    """
    written = []
    for start in range(0, len(prompts), ROWS):
        written += _continued(module, prompts[start : start + ROWS], end, context, most)
    return written


def _continued(
    module: Any, prompts: Sequence[Sequence[int]], end: int, context: int, most: int
) -> list[list[int]]:
    device = next(module.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    lasts = (lengths + most).clamp(max=context)
    tokens = torch.full((len(prompts), int(lasts.max())), end, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows = torch.arange(len(prompts), device=device)
    places, open_rows = lengths.clone(), lengths < lasts
    with torch.no_grad():
        while bool(open_rows.any()):
            # What is padded comes after a row's last token, which does not look ahead.
            going = rows[open_rows]
            shown = tokens[going, : int(places[going].max())]
            logits = module(input_ids=shown).logits
            own = torch.arange(len(going), device=device)
            chosen = logits[own, places[going] - 1].argmax(-1)
            tokens[going, places[going]] = chosen
            ended = chosen == end
            places[going] += (~ended).long()
            open_rows[going] = ~ended & (places[going] < lasts[going])
    bounds = zip(tokens.tolist(), lengths.tolist(), places.tolist(), strict=True)
    return [row[first:last] for row, first, last in bounds]


def text_scores(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU and ROUGE-L of texts, each with one or more that it should be.

    Args:
        written: at least one text.
        references: for each of them, at least one.

    Returns:
        ``bleu``: of the whole, by sacrebleu with its own defaults (13a, mixed case), 0 to 100;
        ``rouge_l``: the mean F-measure with the nearest reference, by rouge-score without
        stemming, 0 to 100.

    Raises:
        ImportError: a library is missing, naming the extra to install.

    Example:
        >>> text_scores(["Return the sum of two."], [["Return the sum of two.", "Add."]])["bleu"]
        100.0
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise ImportError(
            'scores of texts need sacrebleu and rouge-score: pip install "nomadam[lab]"'
        ) from error
    most = max(len(each) for each in references)
    streams: Any = [
        [each[i] if i < len(each) else None for each in references] for i in range(most)
    ]
    scorer = RougeScorer(["rougeL"])
    nearest = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in each)
        for text, each in zip(written, references, strict=True)
    ]
    return {
        "bleu": round(corpus_bleu(list(written), streams).score, 6),
        "rouge_l": 100 * sum(nearest) / len(nearest),
    }
