"""Continue a prompt with an exported model and nothing but transformers.

python examples/continue_prompt.py FOLDER PROMPT
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


def main() -> None:
    folder, prompt = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    set_seed(1)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.7, top_k=40)
    print(type(model).__name__, "continues:")
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
