#!/usr/bin/env bash
# From nothing to a trained BLOOM that transformers opens, in a few minutes and without a GPU.
#
#   bash examples/quickstart.sh [FOLDER]
#
# FOLDER (default runs/quickstart) receives everything but the environment, which is made in .venv.
# PYTHON names the Python that makes it (default python3). With INSTALLED=1 nothing is installed, and
# PYTHON (default python) is used as it is. SAMPLES shortens the training.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
folder=${1:-runs/quickstart}
samples=${SAMPLES:-2560}

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

if [ -e "$folder" ]; then
    refuse "$folder is there already; remove it, or name another folder"
fi
if [ "${INSTALLED:-0}" = 1 ]; then
    python=${PYTHON:-python}
    check_python "$python"
else
    say "Make an environment in .venv and install"
    ensure_environment .venv
    python=.venv/bin/python
    "$python" -m pip install --quiet -c constraints.txt -e .
fi
mkdir -p "$folder"
started=$SECONDS

say "Collect a corpus: the source and documentation of Python's standard library"
"$python" tools/collect_corpus.py --output "$folder/corpus.jsonl"

say "Train a tokenizer on it, and turn the text into tokens"
"$python" tools/train_tokenizer.py --input "$folder/corpus.jsonl" --vocab_size 4096 \
    --output "$folder/tokenizer.json"
"$python" tools/preprocess_data.py --input "$folder/corpus.jsonl" \
    --tokenizer "$folder/tokenizer.json" --output "$folder/text"

# One rank for each GPU, or two ranks on the CPU. A single GPU has room for one rank only.
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
tensor=$([ "$gpus" = 1 ] && echo 1 || echo 2)
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)))')

train() { # TENSOR_SIZE [option...]
    local ranks=$1
    shift
    OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1)) "$python" -m torch.distributed.run \
        --standalone --nproc_per_node "$ranks" pretrain_bloom.py \
        --config examples/configs/quickstart.yaml \
        --folder "$folder/run" \
        --data.paths "{\"$folder/text\": 1.0}" \
        --data.tokenizer "$folder/tokenizer.json" \
        --train.samples "$samples" \
        --parallel.tensor "$ranks" "$@"
}

half=$((samples / 8 / 2))
say "Pretrain at tensor size $tensor, and stop half-way"
train "$tensor" --train.stop_at_step "$half"

say "Go on from there at tensor size 1"
train 1 --checkpoint.resume required

say "Draw the report"
"$python" tools/report.py "$folder/run"

say "Continue a prompt, straight from the training checkpoint"
"$python" tools/generate.py --checkpoint "$folder/run" --prompt "def __init__(self, " \
    --max_new_tokens 40 --temperature 0.7 --top_k 40

say "Export to transformers, and let it continue a prompt"
checkpoint=$(ls -d "$folder"/run/checkpoints/step-* | tail -n 1)
"$python" tools/convert_checkpoint.py to-hf --checkpoint "$checkpoint" --output "$folder/hf"
HF_HUB_OFFLINE=1 "$python" examples/continue_prompt.py "$folder/hf" "import os"

say "Result, after $((SECONDS - started)) s"
"$python" examples/summarize.py "$folder/run"
