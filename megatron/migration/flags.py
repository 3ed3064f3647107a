"""Every flag of Megatron-DeepSpeed that pretrains a GPT, and what it is here.

One table, by the names of the flags. Those of BigScience's repository are all there, and the more
usual ones of its relatives (deepspeedai/Megatron-DeepSpeed, Megatron-LM). What is in neither this
table nor ``rules`` has no meaning that we know, and is reported so.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

from megatron.migration.values import Reader, number, one_of, text_itself, whole


@dataclass(frozen=True)
class Same:
    """Its value is that of an option."""

    option: str
    read: Reader = whole


@dataclass(frozen=True)
class Switch:
    """It has no value, and gives an option one."""

    option: str
    value: Any


@dataclass(frozen=True)
class Joint:
    """What it means depends on other flags: see ``rules``."""


@dataclass(frozen=True)
class Lost:
    """It has no equal here, and why."""

    why: str


@dataclass(frozen=True)
class NotNeeded:
    """What it does is so here anyway, or does not show in the result."""

    why: str


Meaning: TypeAlias = Same | Switch | Joint | Lost | NotNeeded

_POSITIONS = {
    "absolute": "learned",
    "learned_absolute": "learned",
    "rotary": "rotary",
    "rope": "rotary",
    "alibi": "alibi",
    "none": "none",
}
_DECAYS = {
    "constant": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "inverse-square-root": "inverse_sqrt",
}
_GATES = {name: name for name in ("geglu", "liglu", "reglu", "swiglu")}
_RECOMPUTE = {"full": "full", "selective": "selective"}

_MODEL: dict[str, Meaning] = {
    "num-layers": Same("model.num_layers"),
    "hidden-size": Same("model.hidden_size"),
    "ffn-hidden-size": Same("model.ffn_hidden_size"),
    "num-attention-heads": Same("model.num_heads"),
    "seq-length": Same("model.seq_length"),
    "encoder-seq-length": Same("model.seq_length"),
    "make-vocab-size-divisible-by": Same("model.vocab_padding_multiple"),
    "layernorm-epsilon": Same("model.layernorm_epsilon", number),
    "norm-epsilon": Same("model.layernorm_epsilon", number),
    "embed-layernorm": Switch("model.embedding_layernorm", True),
    "position-embedding-type": Same("model.position_embedding", one_of(_POSITIONS)),
    "use-rotary-position-embeddings": Switch("model.position_embedding", "rotary"),
    "glu-activation": Same("model.activation", one_of(_GATES)),
    "swiglu": Switch("model.activation", "swiglu"),
    "untie-embeddings-and-output-weights": Switch("model.tie_embeddings", False),
    "attention-dropout": Same("model.attention_dropout", number),
    "hidden-dropout": Same("model.hidden_dropout", number),
    "init-method-std": Same("model.init_std", number),
    "max-position-embeddings": Joint(),
    "kv-channels": Joint(),
    "pad-vocab-size-to": Joint(),
    "vocab-size": Joint(),
    "onnx-safe": Joint(),
    "no-bias-gelu-fusion": Joint(),
    "use-bnb-optimizer": Joint(),
    "openai-gelu": NotNeeded("GELU is its tanh form"),
    "sync-tp-duplicated-parameters": NotNeeded(
        "what tensor ranks hold alike is compared bit by bit, see train.replica_check_interval"
    ),
    "no-masked-softmax-fusion": NotNeeded("model.attention_backend chooses the kernel"),
    "no-bias-dropout-fusion": NotNeeded("fusion does not change the result"),
    "abort-on-unmet-fused-kernel-constraints": NotNeeded(
        "a backend that cannot do the work is an error"
    ),
    "no-query-key-layer-scaling": NotNeeded("the scaling cancels; only fp16 needed it"),
    "attention-softmax-in-fp32": NotNeeded("the softmax is always computed in fp32"),
    "use-flash-attn": NotNeeded("model.attention_backend auto takes the fastest"),
    "use-flash-attn-v2": NotNeeded("model.attention_backend auto takes the fastest"),
    "apply-residual-connection-post-layernorm": Lost(
        "another model: residuals start before the layer norms"
    ),
    "fp32-residual-connection": Lost("hidden states have train.dtype"),
    "num-key-value-heads": Lost("another model: every head has keys and values of its own"),
    "normalization": Lost("the norms are layer norms"),
    "disable-bias-linear": Lost("another model: linear layers have biases"),
    "apply-layernorm-1p": Lost("another model: layer norms multiply by their weight itself"),
}
_TRAIN: dict[str, Meaning] = {
    "micro-batch-size": Same("train.micro_batch_size"),
    "global-batch-size": Same("train.global_batch_size"),
    "seed": Same("train.seed"),
    "bf16": Switch("train.dtype", "bf16"),
    "fp16": Switch("train.dtype", "fp16"),
    "initial-loss-scale": Same("train.loss_scale.initial", number),
    "min-loss-scale": Same("train.loss_scale.minimum", number),
    "loss-scale-window": Same("train.loss_scale.window", lambda text: int(number(text))),
    "hysteresis": Same("train.loss_scale.hysteresis"),
    "checkpoint-activations": Switch("train.recompute", "full"),
    "recompute-granularity": Same("train.recompute", one_of(_RECOMPUTE)),
    "recompute-activations": Switch("train.recompute", "selective"),
    "rampup-batch-size": Joint(),
    "train-samples": Joint(),
    "train-iters": Joint(),
    "train-tokens": Joint(),
    "loss-scale": Joint(),
    "eval-interval": Joint(),
    "eval-iters": Joint(),
    "exit-interval": Joint(),
    "accumulate-allreduce-grads-in-fp32": NotNeeded("gradients are added up in fp32"),
    "fp16-lm-cross-entropy": Lost("the loss is computed in fp32"),
    "checkpoint-num-layers": NotNeeded("layers are recomputed one by one"),
    "recompute-method": NotNeeded("train.recompute full recomputes every layer"),
    "recompute-num-layers": NotNeeded("train.recompute full recomputes every layer"),
    "deepspeed-activation-checkpointing": NotNeeded("train.recompute does it"),
    "distribute-checkpointed-activations": Lost(
        "saves memory: parallel.sequence true keeps a part of the activations on each tensor rank"
    ),
    "partition-activations": Lost(
        "saves memory: parallel.sequence true keeps a part of the activations on each tensor rank"
    ),
    "split-transformers": Lost("saves memory: whole layers are recomputed"),
    "checkpoint-in-cpu": Lost("saves memory: activations stay on the GPU"),
    "contigious-checkpointing": NotNeeded("memory layout does not change the result"),
    "synchronize-each-layer": NotNeeded("for debugging"),
    "profile-backward": NotNeeded("for debugging"),
    "exit-duration-in-mins": Lost(
        "a run saves and leaves at SIGTERM or SIGUSR1; let the job send one before its time is up "
        "(sbatch --signal)"
    ),
    "kill-switch-path": Lost("a run saves and leaves at SIGTERM, SIGINT or SIGUSR1"),
    "skip-train-iteration-range": Lost("all samples are taken in order"),
    "eval-only": Lost("a run trains"),
    "inference": Lost("a run trains"),
    "adlr-autoresume": Lost("a run saves and leaves at SIGTERM, and goes on when started again"),
    "adlr-autoresume-interval": Lost("see --adlr-autoresume"),
    "no-pipeline-parallel": NotNeeded("parallel.pipeline 1 is no pipeline"),
}
_OPTIMIZER: dict[str, Meaning] = {
    "lr": Same("optimizer.lr", number),
    "min-lr": Same("optimizer.min_lr", number),
    "lr-decay-style": Same("optimizer.decay", one_of(_DECAYS)),
    "weight-decay": Same("optimizer.weight_decay", number),
    "clip-grad": Same("optimizer.max_grad_norm", number),
    "adam-beta1": Same("optimizer.beta1", number),
    "adam-beta2": Same("optimizer.beta2", number),
    "adam-eps": Same("optimizer.eps", number),
    "optimizer": Joint(),
    "lr-decay-samples": Joint(),
    "lr-decay-iters": Joint(),
    "lr-decay-tokens": Joint(),
    "lr-warmup-samples": Joint(),
    "lr-warmup-iters": Joint(),
    "lr-warmup-tokens": Joint(),
    "lr-warmup-fraction": Joint(),
    "sgd-momentum": Lost("the optimizer is AdamW"),
    "cpu-optimizer": Lost("see zero_optimization.offload_optimizer of DeepSpeed's JSON"),
    "override-lr-scheduler": NotNeeded("the config decides, also in a run that goes on"),
    "use-checkpoint-lr-scheduler": Lost("the config decides, also in a run that goes on"),
}
_PARALLEL: dict[str, Meaning] = {
    "tensor-model-parallel-size": Same("parallel.tensor"),
    "pipeline-model-parallel-size": Same("parallel.pipeline"),
    "zero-stage": Same("parallel.zero"),
    "sequence-parallel": Switch("parallel.sequence", True),
    "num-layers-per-virtual-pipeline-stage": Joint(),
    "pp-partition-method": Joint(),
    "deepspeed": Joint(),
    "deepspeed_config": Joint(),
    "ds-sequence-parallel-size": Lost("attention is not cut over the sequence"),
    "context-parallel-size": Lost("attention is not cut over the sequence"),
    "use-distributed-optimizer": Switch("parallel.zero", 1),
    "distributed-backend": NotNeeded("nccl between GPUs, gloo between CPUs"),
    "distributed-timeout-minutes": Lost("see launch.timeout, in seconds"),
    "DDP-impl": NotNeeded("there is one"),
    "use-contiguous-buffers-in-ddp": NotNeeded("gradients lie in one buffer"),
    "no-scatter-gather-tensors-in-pipeline": NotNeeded("does not change the result"),
    "local_rank": NotNeeded("the launcher's environment tells it"),
    "lazy-mpu-init": NotNeeded("nothing else starts the processes' groups"),
    "use-cpu-initialization": NotNeeded("initial weights do not depend on the layout"),
    "remote-device": Lost("see zero_optimization.offload_param of DeepSpeed's JSON"),
}
_SAVES: dict[str, Meaning] = {
    "save-interval": Same("checkpoint.save_interval"),
    "save": Joint(),
    "load": Joint(),
    "universal-checkpoint": NotNeeded("any save opens at any layout"),
    "no-load-rng": NotNeeded("there is no state of a random generator"),
    "no-save-rng": NotNeeded("there is no state of a random generator"),
    "no-save-optim": Lost("a save holds the optimizer's state"),
    "no-load-optim": Lost("a run that goes on takes the optimizer's state from its save"),
    "finetune": Lost("a run starts from its own saves or from initial weights"),
    "reset-progress": Lost("a run starts from its own saves or from initial weights"),
}
_DATA: dict[str, Meaning] = {
    "data-path": Joint(),
    "split": Joint(),
    "vocab-file": Joint(),
    "merge-file": Joint(),
    "vocab-extra-ids": Joint(),
    "tokenizer-type": Joint(),
    "tokenizer-name-or-path": Joint(),
    "tokenizer-model": Joint(),
    "data-impl": Joint(),
    "dataloader-type": Joint(),
    "train-weighted-split-paths": Joint(),
    "train-weighted-split-paths-path": Joint(),
    "valid-weighted-split-paths": Joint(),
    "valid-weighted-split-paths-path": Joint(),
    "test-weighted-split-paths": Lost("nothing is evaluated after the training"),
    "test-weighted-split-paths-path": Lost("nothing is evaluated after the training"),
    "reset-position-ids": Switch("data.reset_position_ids", True),
    "reset-attention-mask": Switch("data.reset_attention_mask", True),
    "eod-mask-loss": Switch("data.eod_mask_loss", True),
    "data-cache-path": Same("data.cache_folder", text_itself),
    "loss-on-targets-only": Lost("the loss counts every token of the text"),
    "norm-target-loss": Lost("the loss counts every token of the text"),
    "reweight-loss-based-on-position-frequency": Lost("the loss counts all positions alike"),
    "noise-density": Lost("no span corruption"),
    "mean-noise-span-length": Lost("no span corruption"),
    "mmap-warmup": NotNeeded("files are mapped into memory, and read when needed"),
    "num-workers": NotNeeded("samples are read by the rank itself"),
    "valid-num-workers": NotNeeded("samples are read by the rank itself"),
}
_LOG: dict[str, Meaning] = {
    "log-interval": Same("log.interval"),
    "tensorboard-dir": Joint(),
    "log-params-norm": Lost("the norm of the weights is not measured"),
    "log-num-zeros-in-grad": Lost("zeros in gradients are not counted"),
    "log-path": NotNeeded("the config stands in the run's folder and in every save"),
    **dict.fromkeys(("log-level", "log-level-replica"), NotNeeded("rank 0 logs, and errors")),
    **dict.fromkeys(
        (
            "tensorboard-log-interval",
            "tensorboard-queue-size",
            "log-timers-to-tensorboard",
            "log-batch-size-to-tensorboard",
            "log-validation-ppl-to-tensorboard",
            "no-log-learnig-rate-to-tensorboard",
            "no-log-loss-scale-to-tensorboard",
        ),
        NotNeeded("log.tensorboard writes all that is measured, at every step"),
    ),
}

_BERT = (
    "bert-no-binary-head decoder-seq-length retriever-seq-length mask-prob short-seq-prob "
    "sample-rate ict-head-size biencoder-projection-dim biencoder-shared-query-context-model "
    "ict-load bert-load titles-data-path query-in-block-prob use-one-sent-docs evidence-data-path "
    "retriever-report-topk-accuracies retriever-score-scaling block-data-path embedding-path "
    "indexer-batch-size indexer-log-interval num-classes img-dim num-channels patch-dim"
)
_UNUSED = (
    "init-method-xavier-uniform cpu_torch_adam zero-reduce-scatter zero-contigious- "
    "gradients zero-reduce-bucket-size zero-allgather-bucket-size use-pin-memory scattered- "
    "embeddings memory-centric-tiled-linear tile-factor codecarbon-dir"
)
_OTHERS: dict[str, Meaning] = {
    **dict.fromkeys(_BERT.split(), NotNeeded("not read to train a GPT")),
    **dict.fromkeys(_UNUSED.split(), NotNeeded("the original reads it and does nothing with it")),
}

FLAGS: dict[str, Meaning] = (
    _MODEL | _TRAIN | _OPTIMIZER | _PARALLEL | _SAVES | _DATA | _LOG | _OTHERS
)

DEFAULTS: dict[str, Any] = {
    "model.embedding_layernorm": False,
    "model.position_embedding": "learned",
    "model.hidden_dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.init_std": 0.02,
    "optimizer.decay": "linear",
    "optimizer.weight_decay": 0.01,
    "optimizer.beta2": 0.999,
    "checkpoint.keep_last": 0,
    "log.interval": 100,
}
"""What the original takes where a flag is missing, as far as that is not the default here."""


NO_GPT = (
    "pretrain_bert.py",
    "pretrain_ict.py",
    "pretrain_prefix_lm.py",
    "pretrain_t5.py",
    "pretrain_vit.py",
    "finetune_t0.py",
    "finetune_t0_non_causal_decoder.py",
)
"""Programs of the original that train something else."""
