#!/bin/bash
# A model of 12 layers under ZeRO 3, with weights and optimizer state in the memory of the CPU.
NAME=small-zero3
options=" \
    --tensor-model-parallel-size 1 \
    --num-layers 12 --hidden-size 768 --num-attention-heads 12 --ffn-hidden-size 2048 \
    --seq-length 1024 --max-position-embeddings 1024 --position-embedding-type absolute \
    --glu-activation swiglu --no-bias-gelu-fusion --untie-embeddings-and-output-weights \
    --micro-batch-size 4 --global-batch-size 64 --train-tokens 3_000_000_000 \
    --lr 6e-4 --min-lr 6e-5 --lr-decay-tokens 3_000_000_000 --lr-warmup-tokens 30_000_000 \
    --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --hidden-dropout 0 --attention-dropout 0 \
    --bf16 --data-path 0.2 data/books 0.8 data/web --split 98,2,0 \
    --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt \
    --save checkpoints/${NAME} --save-interval 1000 --eval-iters 10"
deepspeed_options=" \
    --deepspeed --deepspeed_config zero3.json --zero-stage 3 --remote-device cpu"
run_cmd="deepspeed --num_gpus 4 pretrain_gpt.py ${options} ${deepspeed_options} &>> ${NAME}.log"
eval ${run_cmd}
