"""Makes `bundled/`: a small trained Llama, its tokenizer, a test text, four checkpoints and their perplexities.

    python make_bundled.py            everything, about ten minutes on two cores
    python make_bundled.py oracle     only the perplexities of the checkpoints that are there

Every step is seeded. Another machine or other library versions may still train slightly different weights (sums of floats are
not the same everywhere), so the committed files are the reference, not a fresh run.
"""

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import grammar
import oracle_hf

HERE = Path(__file__).resolve().parent
OUT = HERE / "bundled"
THREADS = 2

TRAIN_SEED, TEST_SEED, MODEL_SEED = 20251, 20252, 20253
TRAIN_CHARACTERS, TEST_CHARACTERS = 6_000_000, 58_000
VOCABULARY = 480
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTEXT, BATCH, STEPS = 256, 16, 1500
LEARNING_RATE, WARM_UP = 3e-3, 100


# --- text and tokenizer ---------------------------------------------------------------------------------------------


def train_tokenizer(text):
    """A byte-level BPE in the manner of Llama 3: its split rule, BOS put in front by the post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text.split("\n\n"),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS}:1 $B:1",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=2 * CONTEXT,
        clean_up_tokenization_spaces=False,
    )


# --- training -------------------------------------------------------------------------------------------------------


def new_model(tokenizer):
    """About 420 thousand parameters. Every linear's K is a multiple of 128, so that groups of 128 exist; the vocabulary is not."""
    torch.manual_seed(MODEL_SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2 * CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.04,
        )
    )


def rate(step):
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP)))


def train(model, ids):
    """Next-token training on random windows of one long stream; half of them begin with BOS, as the evaluation's first does."""
    generator = torch.Generator().manual_seed(MODEL_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step in range(STEPS):
        starts = torch.randint(0, len(ids) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + CONTEXT] for start in starts])
        batch[: BATCH // 2, 0] = model.config.bos_token_id
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    return model.eval().to(torch.bfloat16)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def calibration_set(ids):
    """128 windows of the train text for the schemes that need to see activations."""
    from datasets import Dataset

    rows = [ids[start : start + CONTEXT].tolist() for start in range(0, 128 * CONTEXT, CONTEXT)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * CONTEXT for _ in rows]})


def quantize(source, target, scheme, calibration):
    """One `oneshot` of llm-compressor, saved as it saves."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    modifier = GPTQModifier if scheme == "W4A16" else QuantizationModifier
    torch.manual_seed(MODEL_SEED)
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    oneshot(
        model=model,
        dataset=calibration,
        recipe=modifier(targets=["Linear"], scheme=scheme, ignore=["lm_head"]),
        num_calibration_samples=len(calibration),
        max_seq_length=CONTEXT,
        pipeline="sequential",
        log_dir=None,
    )
    model.save_pretrained(target, save_compressed=True)


def tidy(folder, tokenizer):
    """The tokenizer beside the weights, and nothing but what a reader of the checkpoint needs."""
    tokenizer.save_pretrained(folder)
    for name in ["generation_config.json", "special_tokens_map.json"]:
        (folder / name).unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ["is_local", "local_files_only"]:
        settings.pop(key, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# --- perplexities ---------------------------------------------------------------------------------------------------


def protocols(length):
    """Window starts by protocol, for a stream of `length` ids; every window is a forward pass of its own.

    The first is ExLlamaV3's rule of 2025 on a small scale: range(0, N - ctx, stride), the end excluded, 20 rows, all of a
    window's positions but the first scored, overlaps scored again. The second puts windows side by side and keeps full ones.
    """
    return {
        "exl3-2025-small (ctx 256, stride 64, 20 rows)": list(range(0, length - CONTEXT, 64))[:20],
        "disjoint (ctx 256)": list(range(0, length - CONTEXT + 1, CONTEXT)),
    }


@torch.no_grad()
def window_nll(model, window, quantize_activations):
    """The sum of -ln p over positions 1.. of one window; log-softmax and sum in float64 of float32 logits."""
    logits = oracle_hf.logits(model, window[None], quantize_activations)[0].double()
    return torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").item()


def score(model, ids, quantize_activations):
    """The results of every protocol, windows scored once even when protocols share them."""
    seen, results = {}, {}
    for name, starts in protocols(len(ids)).items():
        for start in starts:
            if start not in seen:
                seen[start] = window_nll(model, ids[start : start + CONTEXT], quantize_activations)
        nll, count = [seen[start] for start in starts], len(starts) * (CONTEXT - 1)
        total = math.fsum(nll)
        results[name] = {
            "total_nll": total,
            "count": count,
            "ppl": math.exp(total / count),
            "windows": len(starts),
            "per_window_nll": nll,
        }
    return results


def write_oracle():
    """`bundled/oracle.json`: the perplexities of every checkpoint that is there."""
    text = (OUT / "text.txt").read_text()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(OUT / "bf16")
    ids = torch.tensor(tokenizer(text)["input_ids"])
    digest = hashlib.sha256(ids.to(torch.int32).numpy().astype("<i4").tobytes()).hexdigest()
    names = list(protocols(len(ids)))
    oracle = {
        "how": __doc__.split("\n")[0]
        + "\nPerplexities by Hugging Face: weights exactly as compressed-tensors decompresses them"
        " (bf16), upcast to float32; everything else float32. off = weights only; library = activations quantized as the"
        " library does, in float32. text.txt is one row, so the stream is tokenizer(text) with its defaults (BOS once).",
        "versions": oracle_hf.versions(),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens_sha256_int32le": {name: digest for name in names},
        "tokens": {name: len(ids) for name in names},
        "first_ids": ids[:16].tolist(),
        "unigram_ppl_of_the_text": unigram_perplexity(ids),
        "checkpoints": {},
    }
    for name in ["bf16", "W4A16", "NVFP4", "FP8"]:
        model = oracle_hf.load(OUT / name)
        window = ids[:CONTEXT][None]
        weight_only = oracle_hf.logits(model, window, False)
        results = {"off": score(model, ids, False)}
        if oracle_hf.quantizes_activations(model):
            results["library"] = score(model, ids, True)
        oracle["checkpoints"][name] = {
            "weight_dtypes": model.weight_dtypes,
            "hf_loader_check": oracle_hf.loader_check(OUT / name, window, weight_only),
            "results": results,
        }
        for acts, by_protocol in results.items():
            print(name, acts, {k: round(v["ppl"], 4) for k, v in by_protocol.items()}, flush=True)
    (OUT / "oracle.json").write_text(json.dumps(oracle, indent=1) + "\n")


def unigram_perplexity(ids):
    """What a model that knows only the frequencies of this very text would reach: the bar to clear."""
    p = torch.bincount(ids).double() / len(ids)
    p = p[p > 0]
    return math.exp(-(p * p.log()).sum().item())


# --- the whole ------------------------------------------------------------------------------------------------------


def main():
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    if sys.argv[1:] == ["oracle"]:
        return write_oracle()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    train_text, test_text = grammar.text(TRAIN_SEED, TRAIN_CHARACTERS), grammar.text(TEST_SEED, TEST_CHARACTERS)
    (OUT / "text.txt").write_text(test_text)
    tokenizer = train_tokenizer(train_text[:1_000_000])
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(train_text, add_special_tokens=False).ids)
    print(f"{len(ids)} train tokens, {len(tokenizer(test_text)['input_ids'])} test tokens", flush=True)
    model = train(new_model(tokenizer), ids)
    model.save_pretrained(OUT / "bf16")
    tidy(OUT / "bf16", tokenizer)
    calibration = calibration_set(ids)
    for scheme in ["W4A16", "NVFP4", "FP8"]:
        quantize(OUT / "bf16", OUT / scheme, scheme, calibration)
        tidy(OUT / scheme, tokenizer)
    write_oracle()


if __name__ == "__main__":
    main()
