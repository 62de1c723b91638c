"""LoRA on GPT-2: what is adapted, what is trained and kept, and the two-stage study as a whole."""

import dataclasses
import json

import pytest
import torch
from tiny_training import assert_same_training, go, raise_signal_at, weights

from nomadam.experiments.adapters import SplitProjection, adapted, split_attention
from nomadam.experiments.catalog import catalog
from nomadam.experiments.configuration import OptimizerChoice, from_json, override, to_json
from nomadam.experiments.data.text_pairs import IGNORED, PairBatch
from nomadam.experiments.first_stage import final_weights
from nomadam.experiments.generated_text import greedy_texts, text_scores
from nomadam.experiments.lora import LoRAModel, LoRAOnWeights
from nomadam.experiments.lora_finetuning import demo, gpt2_medium_e2e
from nomadam.optimizers.scaled_lora import lora_pairs
from nomadam.runs import Interrupted, RunFolder

transformers = pytest.importorskip("transformers")
for package in ("peft", "sacrebleu", "rouge_score"):
    pytest.importorskip(package)


def gpt2(seed=0, **changes):
    torch.manual_seed(seed)
    config = {"vocab_size": 40, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config |= {"bos_token_id": None, "eos_token_id": None, "use_cache": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | changes)).eval()


def lora(model, **changes):
    options = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ("c_attn.q", "c_attn.v")}
    return adapted(split_attention(model), **options | changes)


# What is adapted


@pytest.mark.parametrize("bias", [True, False])
def test_split_attention_is_the_same_function(bias):
    from nomadam.experiments.language_model import GPT2Model

    torch.manual_seed(1)
    model = GPT2Model(layers=2, heads=2, width=8, bias=bias).build(vocab_size=40, context=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    ids = torch.randint(40, (3, 16))
    before, size = model(ids).logits, sum(p.numel() for p in model.parameters())
    split_attention(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == size
    assert isinstance(model.transformer.h[1].attn.c_attn, SplitProjection)
    with pytest.raises(ValueError, match="Linear has no attention of GPT-2's kind"):
        split_attention(torch.nn.Linear(2, 2))


def test_q_and_v_have_an_adapter_each_and_nothing_else_trains():
    plain, model = gpt2(), lora(gpt2())
    ids = torch.arange(16)[None]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-6)
    trained = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    layers = [f"base_model.model.transformer.h.{i}.attn.c_attn.{c}" for i in (0, 1) for c in "qv"]
    assert trained == {
        f"{layer}.lora_{side}.default.weight": [2, 8] if side == "A" else [8, 2]
        for layer in layers
        for side in "AB"
    }
    assert len(lora_pairs(model)) == 4
    # The value's adapter changes the value alone.
    projection = model.base_model.model.transformer.h[0].attn.c_attn
    hidden = torch.randn(1, 3, 8)
    before = projection(hidden)
    with torch.no_grad():
        projection.v.lora_B["default"].weight.fill_(1.0)
    changed = (projection(hidden) != before).any(0).any(0)
    assert changed.tolist() == [False] * 16 + [True] * 8
    a = projection.v.lora_A["default"].weight
    update = 2.0 * (hidden @ a.T @ torch.ones(2, 8))
    torch.testing.assert_close((projection(hidden) - before)[..., 16:], update)


@pytest.mark.parametrize("target", ["c_attn.w", "attn.q", "q_proj"])
def test_an_unknown_target_is_named(target):
    with pytest.raises(ValueError, match=f"model.targets = '{target}'"):
        lora(gpt2(), targets=("c_attn.q", target))


# The loss and the texts


def batch_of(rows, mean):
    """Rows of (prompt, target) as a batch, padded with 0."""
    length = max(len(prompt) + len(target) for prompt, target in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    for i, (prompt, target) in enumerate(rows):
        both = torch.tensor(prompt + target)
        tokens[i, : len(both)] = both
        labels[i, len(prompt) : len(both)] = both[len(prompt) :]
    return PairBatch(tokens, labels, mean)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_target_tokens_however_they_are_batched(smoothing):
    rows = [([3, 4, 5], [6, 7, 0]), ([8], [9, 0]), ([1, 2], [3, 4, 5, 6, 0])]
    model, module = LoRAOnWeights(weights="x", label_smoothing=smoothing), gpt2()
    total = 0.0
    for prompt, target in rows:
        both = torch.tensor(prompt + target)
        logs = module(both[None, :-1]).logits[0].log_softmax(-1)[len(prompt) - 1 :]
        right = logs[torch.arange(len(target)), both[len(prompt) :]]
        total -= ((1 - smoothing) * right + smoothing * logs.mean(-1)).sum().item()
    mean = 10 / 3
    whole = model.loss(module, batch_of(rows, mean))
    assert whole.item() == pytest.approx(total / 10, rel=1e-5)
    parts = [model.loss(module, batch_of(part, mean)).item() for part in (rows[:1], rows[1:])]
    assert (parts[0] + 2 * parts[1]) / 3 == pytest.approx(total / 10, rel=1e-5)
    measured = model.measures(module, batch_of(rows, mean))
    assert measured["loss"] == whole
    plain = LoRAOnWeights(weights="x").loss(module, batch_of(rows, mean))
    assert measured["cross_entropy"] == plain


def test_greedy_texts_are_those_of_a_prompt_by_itself():
    module = gpt2(seed=3, initializer_range=0.5)
    prompts = [
        [1, 2, 3],
        [4],
        [5, 6, 7, 8, 9, 10],
        [11, 12],
        *([n, n + 1] for n in range(70, 2, -9)),
    ]
    prompts = [[token % 40 for token in prompt] for prompt in prompts]

    def alone(prompt, end, most):
        tokens = list(prompt)
        while len(tokens) < min(16, len(prompt) + most):
            token = module(torch.tensor([tokens])).logits[0, -1].argmax().item()
            if token == end:
                break
            tokens.append(token)
        return tokens[len(prompt) :]

    # An end that comes early for some of them, and none that comes.
    often = torch.tensor([t for p in prompts for t in alone(p, -1, 16)]).mode().values.item()
    for end, most in ((often, 16), (39, 5), (39, 1)):
        expected = [alone(prompt, end, most) for prompt in prompts]
        assert greedy_texts(module, prompts, end=end, context=16, most=most) == expected
    assert greedy_texts(module, [[1] * 16], end=0, context=16, most=4) == [[]]


def test_scores_of_texts():
    sentence = "Return the number of rows in it."
    assert text_scores([sentence], [[sentence]]) == {"bleu": 100.0, "rouge_l": 100.0}
    assert text_scores(["", "x"], [[sentence], [sentence, "Else."]])["rouge_l"] == 0.0
    scores = text_scores(
        ["Return the number of columns in it.", sentence], [["Count.", sentence], [sentence]]
    )
    assert 50 < scores["bleu"] < 100
    # Six of seven words in order, of both; and all of them.
    assert scores["rouge_l"] == pytest.approx(100 * (6 / 7 + 1) / 2)


# The study


SENTENCES = ["the number of {}s", "a list of the {}s", "what the {} holds", "whether a {} is open"]


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Modules of functions with docstrings, of which a few are held out."""
    folder = tmp_path_factory.mktemp("modules")
    for number, noun in enumerate("box row key set map bag jar tin urn pot".split()):
        functions = [
            f'def get_{noun}_{i}({noun}, n={i}):\n    """Return {sentence.format(noun)}."""\n'
            f"    return {noun}[{i}]\n\n"
            for i, sentence in enumerate(SENTENCES * 2)
        ]
        (folder / f"m{number}.py").write_text("".join(functions))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def small(optimizer, modules, lr=1e-2, **changes):
    tokens = {"source": str(modules), "vocab_size": "300", "validation_fraction": "0.3"}
    stage = {"model.layers": "1", "model.heads": "2", "model.width": "16", "steps": "4"}
    stage |= {"batch_size": "4", "evaluation_batches": "1"}
    settings = {f"model.pretraining.{field}": value for field, value in stage.items()}
    for field, value in tokens.items():
        settings |= {f"model.pretraining.data.{field}": value, f"data.tokens.{field}": value}
    settings |= {"steps": "6", "batch_size": "4", "evaluate_every": "3", "checkpoint_every": "3"}
    settings |= {"model.dropout": "0.1", "model.num_texts": "5", "model.text_tokens": "4"}
    run = override(demo("adamw"), settings | changes)
    choice = OptimizerChoice(name=optimizer, lr=lr, weight_decay=0.01)
    return dataclasses.replace(run, optimizer=choice)


OPTIMIZERS = ["sgd_sai", "adamw", "scaled_sgd", "scaled_adamw", "muon"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_both_stages_run_and_go_on_exactly(tmp_path, modules, cache, optimizer):
    run = small(optimizer, modules)
    result = go(run, tmp_path / "whole" / "run", cache=cache)
    parts = tmp_path / "parts" / "run"
    # The first stage is the same: it need not be trained again.
    (parts.parent).mkdir()
    for folder in (tmp_path / "whole").glob("gpt2_pretraining.demo-*"):
        (parts.parent / folder.name).symlink_to(folder)
    with pytest.raises(Interrupted):
        go(run, parts, cache=cache, progress=raise_signal_at(4, "SIGINT"))
    resumed = go(run, parts, cache=cache)
    assert_same_training(tmp_path / "whole" / "run", parts, 6)
    texts = [(tmp_path / part / "run" / "texts.jsonl").read_bytes() for part in ("whole", "parts")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 5
    for name in ("validation_loss", "bleu", "rouge_l", "first_stage_validation_loss"):
        assert result[name] == resumed[name] is not None
    assert result["judged_texts"] == 5 and 0 <= result["bleu"] <= 100
    assert result["validation_cross_entropy"] == result["validation_loss"]
    # A checkpoint holds what is trained, and the rest is as the first stage left it.
    saved = weights(parts, 6)
    assert len(saved) == 4 and all("lora_" in name for name in saved)
    assert result["num_params"] == sum(tensor.numel() for tensor in saved.values()) == 256
    moved = [bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name]
    assert all(moved)


def test_the_adapters_stand_on_the_weights_of_the_first_stage(tmp_path, modules, cache):
    run = small("adamw", modules, steps="1")
    go(run, tmp_path / "run", cache=cache)
    (stage,) = tmp_path.glob("gpt2_pretraining.demo-*")
    size = {"vocab_size": 300, "context": 64}
    module = run.model.build(**size, pretrained=stage)
    kept = final_weights(stage)
    base = dict(module.named_parameters())
    prefix = "base_model.model.transformer"
    assert torch.equal(base[f"{prefix}.wte.weight"], kept["transformer.wte.weight"])
    joint = kept["transformer.h.0.attn.c_attn.weight"].T
    for i, name in enumerate(("q.base_layer", "k", "v.base_layer")):
        assert torch.equal(base[f"{prefix}.h.0.attn.c_attn.{name}.weight"], joint[16 * i :][:16])
    with pytest.raises(ValueError, match="is of another model"):
        run.model.build(vocab_size=301, context=64, pretrained=stage)
    with pytest.raises(ValueError, match="data.context = 65: must be at most that of the pretrai"):
        run.model.build(vocab_size=300, context=65)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.context": "65"}, "data.context = 65: must be at most that of the pretraining, 64"),
        ({"model.targets": "c_attn.z"}, "model.targets = 'c_attn.z'"),
        ({"data.tokens.source": "/nonexistent/x"}, "data.tokens.source = '/nonexistent/x': must "),
        ({"data.tokens.max_bytes": "400000"}, "must be as model.pretraining.data.max_bytes, None"),
    ],
)
def test_no_first_stage_is_trained_in_vain(tmp_path, modules, cache, changes, words):
    with pytest.raises(ValueError, match=words):
        go(small("adamw", modules, **changes), tmp_path / "run", cache=cache)
    assert not list(tmp_path.glob("gpt2_pretraining.demo-*"))


def test_texts_are_kept_with_their_prompts(tmp_path, modules, cache):
    go(small("adamw", modules, steps="1"), tmp_path / "run", cache=cache)
    lines = [json.loads(line) for line in (tmp_path / "run" / "texts.jsonl").open()]
    for line in lines:
        assert sorted(line) == ["prompt", "references", "text"]
        assert line["prompt"].startswith("def get_") and line["prompt"].endswith('"""')
        assert line["references"][0].startswith("Return ")
    assert RunFolder(tmp_path / "run").read_header()["data"]["held_out"] == "whole documents"


def test_the_demonstration_is_a_whole_run():
    assert {"lora_finetuning.demo", "lora_finetuning.gpt2_medium_e2e"} <= {
        entry.name for entry in catalog()
    }
    for run in (demo("sgd_sai"), demo("scaled_adamw"), gpt2_medium_e2e("adamw")):
        assert from_json(json.loads(json.dumps(to_json(run)))) == run
    assert demo().model.first_stage().optimizer.name == "adamw"
    assert demo().data.tokens == demo().model.pretraining.data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.rank": "0"}, "model.rank = 0"),
        ({"model.alpha": "0"}, "model.alpha = 0.0"),
        ({"model.dropout": "1"}, "model.dropout = 1.0"),
        ({"model.targets": ""}, "model.targets"),
        ({"model.pretraining.steps": "0"}, "steps = 0"),
        ({"data.context": "1"}, "data.context = 1"),
        ({"model.ranks": "4"}, "unknown field 'model.ranks'; nearest: model.rank"),
    ],
)
def test_wrong_settings_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        override(demo("adamw"), changes)
    with pytest.raises(ValueError, match="model.pretraining.model = .*: must be a GPT2Model"):
        LoRAModel(pretraining=gpt2_medium_e2e())
