#!/bin/bash
# A GPT-2 of 24 layers on one GPU, without DeepSpeed: fp16, learned positions, iterations.
CHECKPOINTS=checkpoints/gpt2
DATA_PATH=data/openwebtext_text_document

ALL_ARGS="
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16
    --seq-length 1024 --max-position-embeddings 1024
    --micro-batch-size 4 --global-batch-size 8
    --train-iters 500000 --lr-decay-iters 320000 --lr-warmup-fraction .01
    --lr 0.00015 --min-lr 1.0e-5 --lr-decay-style cosine
    --weight-decay 1e-2 --clip-grad 1.0 --fp16 --checkpoint-activations
    --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt
    --data-path $DATA_PATH --data-impl mmap --split 949,50,1
    --save $CHECKPOINTS --load $CHECKPOINTS
    --log-interval 100 --save-interval 10000 --eval-interval 1000 --eval-iters 10"

CMD="torchrun --nproc_per_node 1 pretrain_gpt.py $ALL_ARGS"
echo "$CMD"
$CMD
