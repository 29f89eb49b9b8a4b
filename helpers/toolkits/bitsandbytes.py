"""bitsandbytes: NF4 and int8 through transformers' own loader. Runs as a process of its own, for its report's sake."""

from pathlib import Path

from helpers.toolkits.process import Job, main


def config(method: str, **settings):
    """The transformers config of a method: nf4 with double quantization and bf16 compute, or int8.

    transformers' own defaults for 4 bits are fp4, no double quantization and fp32 compute: always say nf4.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **settings)
    return BitsAndBytesConfig(**({
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16} | settings))


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
