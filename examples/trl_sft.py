"""SGDSaI under trl's SFTTrainer: the completions of a small byte-level Llama.

Run it as `python examples/trl_sft.py`; it goes on by `--resume trl_sft/checkpoint-10`.
"""

import argparse
import inspect
import statistics

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import nomadam


def tokenizer_of():
    """A byte a token, without a file."""
    symbols = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>")


def dataset_of():
    """The functions of a module of the standard library, and what their docstrings begin with."""
    functions = inspect.getmembers(statistics, inspect.isfunction)
    named = [(name, inspect.getdoc(function)) for name, function in functions]
    pairs = [(name, text.split("\n")[0]) for name, text in named if text]
    return Dataset.from_list([{"prompt": f"{n}: ", "completion": text} for n, text in pairs])


def main(folder="trl_sft", steps=20, resume=None):
    """Trains up to a step, from a checkpoint of the folder if one is named; returns the trainer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tokenizer = tokenizer_of()
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **heads, **ends))
    settings = SFTConfig(
        folder,
        max_steps=steps,
        max_length=64,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        weight_decay=2e-2,
        warmup_steps=2,
        logging_steps=1,
        save_steps=10,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=dataset_of(),
        processing_class=tokenizer,
        # Its learning rate comes from here; the groups with and without decay from the trainer.
        optimizer_cls_and_kwargs=(nomadam.SGDSaI, {"lr": 1e-2}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="trl_sft")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resume", help="such as trl_sft/checkpoint-10")
    trainer = main(**vars(parser.parse_args()))
    print(f"{trainer.state.global_step} steps, loss {trainer.state.log_history[-2]['loss']:.4f}")
