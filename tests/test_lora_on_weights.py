"""LoRA on a GPT-2 that lies on this machine, and E2E: whole, damaged, and of another model."""

import json

import pytest
import torch
from test_lora_finetuning import gpt2, transformers
from test_text_pairs import e2e_folder
from tiny_training import assert_same_training, go, raise_signal_at

from nomadam.experiments.configuration import override
from nomadam.experiments.lora_finetuning import gpt2_medium_e2e
from nomadam.runs import Interrupted


@pytest.fixture
def medium(tmp_path):
    """A GPT-2 as transformers saves it, E2E's files and a tokenizer, in one folder."""
    folder = e2e_folder(tmp_path)
    gpt2(vocab_size=300, n_positions=128, resid_pdrop=0.5).save_pretrained(folder)
    return folder


def e2e_run(folder, **changes):
    settings = {"model.weights": str(folder), "data.source": str(folder), "steps": "4"}
    settings |= {"data.tokenizer": str(folder), "data.context": "100", "batch_size": "2"}
    settings |= {"evaluate_every": "2", "checkpoint_every": "2", "model.text_tokens": "3"}
    return override(gpt2_medium_e2e("sgd_sai"), {**settings, "precision": "fp32", **changes})


def test_e2e_runs_from_local_files_and_goes_on_exactly(tmp_path, medium):
    run = e2e_run(medium)
    result = go(run, tmp_path / "whole")
    assert result["judged_texts"] == 2 and result["num_params"] == 2 * 2 * (4 * 8 + 8 * 4)
    assert result["validation_cross_entropy"] != result["validation_loss"]  # it has no smoothing
    with pytest.raises(Interrupted):
        go(run, tmp_path / "parts", progress=raise_signal_at(1, "SIGINT"))
    go(run, tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 4)
    module = run.model.build(vocab_size=300, context=100)
    dropouts = {each.p for each in module.modules() if isinstance(each, torch.nn.Dropout)}
    assert dropouts == {0.0, 0.1}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "config.json is not there"),
        ("model.safetensors", None, "model.safetensors is not there"),
        ("config.json", b"{", "can not be read as GPT2LMHeadModel"),
        ("model.safetensors", b"no weights", "can not be read as GPT2LMHeadModel"),
        ("trainset.csv", None, "trainset.csv can not be read"),
        ("tokenizer.json", None, "data.tokenizer = "),
    ],
)
def test_missing_or_damaged_files_are_named_before_training(tmp_path, medium, name, content, words):
    (medium / name).unlink()
    if content is not None:
        (medium / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        go(e2e_run(medium), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def bert(folder):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 300}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(**sizes, **layers)).save_pretrained(folder)


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def bert_under_the_name_of_gpt2(folder):
    bert(folder)
    configure(folder, model_type="gpt2", n_embd=8, n_layer=1, n_head=2)


@pytest.mark.parametrize(
    ("put", "words"),
    [
        (bert, "config.json has model_type = 'bert', not 'gpt2'"),
        (bert_under_the_name_of_gpt2, r"the weights lack .*\.attn\..*no embeddings\."),
        (lambda folder: configure(folder, n_layer=3), r"lack transformer.h.2.attn.c_.* and others"),
        (lambda folder: configure(folder, n_layer=1), r"has no transformer.h.1.attn.c_attn.weight"),
        (lambda folder: configure(folder, n_positions=99), "shape differs of transformer.wpe.weig"),
    ],
)
def test_weights_of_another_model_are_never_filled_up_at_random(tmp_path, medium, put, words):
    put(medium)
    with pytest.raises(ValueError, match=f"can not be read as GPT2LMHeadModel: .*{words}"):
        go(e2e_run(medium), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_weights_as_older_programs_saved_them_are_read(medium):
    from safetensors.torch import load_file, save_file

    file = medium / "model.safetensors"
    kept = {name.removeprefix("transformer."): each for name, each in load_file(file).items()}
    kept |= {f"h.0.attn.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
    module = e2e_run(medium).model.build(vocab_size=300, context=100)
    save_file(kept, file)
    old = e2e_run(medium).model.build(vocab_size=300, context=100)
    base, old = (dict(each.base_model.model.named_parameters()) for each in (module, old))
    assert all(torch.equal(old[n], base[n]) for n in base if "lora_" not in n)


def test_a_pickle_of_weights_is_not_read(tmp_path, medium):
    (medium / "model.safetensors").rename(medium / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model.safetensors is not there"):
        go(e2e_run(medium), tmp_path / "run")


def test_what_the_weights_are_too_small_for_is_named(tmp_path, medium):
    with pytest.raises(ValueError, match="data.context = 129: must be at most 128"):
        go(e2e_run(medium, **{"data.context": "129"}), tmp_path / "run")
    gpt2(vocab_size=200, n_positions=128).save_pretrained(medium)
    with pytest.raises(ValueError, match="the tokenizer's size = 300: must be at most 200"):
        go(e2e_run(medium), tmp_path / "run")
