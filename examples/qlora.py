"""QLoRA: layers in 4 bits, LoRA on them; the vocabulary matrices, the largest tensors left, keep the used rows alone.

python examples/qlora.py MODEL DATA.csv OUTPUT        (column text)
"""

import sys

import torch
import transformers as hf
from datasets import load_dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_dataset("csv", data_files=data, split="train")
    rows = rows.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=64), remove_columns=rows.column_names
    )
    bits = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = hf.AutoModelForCausalLM.from_pretrained(name, quantization_config=bits, dtype=torch.bfloat16)

    lv.shrink_(model, lv.PartialVocabulary.from_counts(lv.count_tokens(rows), tokenizer=tokenizer, model=model))
    table = lv.status(model).tables[0]
    model = prepare_model_for_kbit_training(model)  # after shrink_: it casts the kept rows alone to fp32
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))

    arguments = hf.TrainingArguments(output, num_train_epochs=1, save_strategy="no", report_to="none")
    collator = hf.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    hf.Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    model.save_pretrained(output)  # the adapter alone: it loads on the full base
    print(f"held {table.num_rows:,} of {table.full_size:,} rows, output={table.output!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
