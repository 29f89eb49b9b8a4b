"""bitsandbytes: NF4 and int8 through transformers' own loader. Runs as a process of its own, for its report's sake."""

from pathlib import Path

from helpers.toolkits.process import Job, main


def config(method: str, **settings):
    """The transformers config of a method: nf4 with double quantization and bf16 compute, or int8.

    transformers' own defaults for 4 bits are fp4, no double quantization and fp32 compute: always say nf4.
    """
    import torch
    from transformers import BitsAndBytesConfig

    own = {"int8": {"load_in_8bit": True},
           "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                   "bnb_4bit_compute_dtype": torch.bfloat16}}
    return BitsAndBytesConfig(**(own[method] | settings))


def usable(model):
    """The same model, able to run. On CPUs with AVX512-BF16, bitsandbytes 0.50.2 repacks NF4 weights at the first forward pass,
    and fails if their blocks of 64 run on from row to row; such linears keep the packing they have."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and (module.in_features % 64 or module.out_features % 32):
            module.support_avx512bf16_for_cpu = False
    return model


def quantize(job: Job, out: Path) -> dict:
    """Load with quantization and save at once: a forward pass on some CPUs repacks the weights and degrades the file."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.source, quantization_config=config(job.method, **job.settings),
                                                 device_map="cuda" if torch.cuda.is_available() else "cpu")
    model.save_pretrained(out)
    return {"toolkit": "bitsandbytes"}


if __name__ == "__main__":
    main(quantize)
