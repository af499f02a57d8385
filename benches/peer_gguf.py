"""Runs llama.cpp's own converter on a checkpoint of synthetic_checkpoint.py.

    python peer_gguf.py LLAMA CHECKPOINT FILE.gguf

LLAMA is llama.cpp's source folder. The converter knows a tokenizer by a hash of what it does and refuses others: that
of golden/bundled splits text as Llama 3's does, which is what it is told. Needs torch and transformers.
"""

import runpy
import sys


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    source, checkpoint, target = sys.argv[1:]
    sys.path.insert(0, source)
    from conversion import base, llama

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
    llama.LlamaModel.set_vocab = base.TextModel._set_vocab_gpt2
    script = f"{source}/convert_hf_to_gguf.py"
    sys.argv = [script, checkpoint, "--outtype", "bf16", "--outfile", target]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
