"""SGDSaI under trl's GRPOTrainer: a small Llama learns to say one word of Python's keywords.

Run it as `python examples/trl_grpo.py`; it goes on by `--resume trl_grpo/checkpoint-10`.
"""

import argparse
import keyword

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

import nomadam


def tokenizer_of():
    """A keyword a token, without a file."""
    words = ["<end>", *keyword.kwlist]
    wordwise = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<end>"))
    wordwise.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=wordwise, eos_token="<end>", pad_token="<end>")


def model_of(tokenizer):
    """The same at every call."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **heads, **ends))


def share_of_true(completions, **_):
    """Rewards each completion with the share of its words that are `True`."""
    split = [completion.split() for completion in completions]
    return [words.count("True") / max(len(words), 1) for words in split]


def main(folder="trl_grpo", steps=20, reward=share_of_true, resume=None):
    """Trains up to a step, from a checkpoint of the folder if one is named; returns the trainer."""
    tokenizer = tokenizer_of()
    model = model_of(tokenizer)
    settings = GRPOConfig(
        folder,
        max_steps=steps,
        num_generations=8,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_completion_length=8,
        max_grad_norm=1.0,
        weight_decay=0.0,
        warmup_steps=2,
        logging_steps=1,
        save_steps=10,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    # This trainer has no argument for a class; a group whose samples have one reward among them
    # has no gradient, and gains wait until rewards differ.
    groups = nomadam.decay_groups(model, settings.weight_decay)
    trainer = GRPOTrainer(
        model,
        reward,
        settings,
        train_dataset=Dataset.from_list([{"prompt": word} for word in keyword.kwlist * 3]),
        processing_class=tokenizer,
        optimizers=(nomadam.SGDSaI(groups, lr=2e-2), None),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="trl_grpo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resume", help="such as trl_grpo/checkpoint-10")
    trainer = main(**vars(parser.parse_args()))
    print(
        f"{trainer.state.global_step} steps, reward {trainer.state.log_history[-2]['reward']:.4f}"
    )
