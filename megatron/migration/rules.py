"""What flags mean only together: lengths in other units, schedules, engine, layout, places.

Each rule reads some flags and gives options their values. ``RULES`` is their order, since some need
what others have found. The unit of all lengths here is the sample:

    iterations     x the global batch; the original has no ramp-up with them
    tokens         / the sequence length
    fractions      x the length of the decay
"""

from collections.abc import Callable

from megatron.config.rules import require
from megatron.migration.data import data, tokenizer, vocabulary
from megatron.migration.run import DEFAULT, Migration
from megatron.migration.shell import shown
from megatron.migration.values import number, text_itself, whole

_REQUIRED = {
    "model.num_layers": "--num-layers",
    "model.hidden_size": "--hidden-size",
    "model.num_heads": "--num-attention-heads",
    "model.seq_length": "--seq-length",
    "train.micro_batch_size": "--micro-batch-size",
    "optimizer.lr": "--lr",
}
_PARTITIONS = {"type:transformer|embedding": "count", "uniform": "count", "parameters": "cost"}


def required(run: Migration) -> None:
    """What the original does not run without."""
    for option, flag in _REQUIRED.items():
        require(option in run.settings, f"{flag} is missing; it decides {option}")


def model(run: Migration) -> None:
    """Positions, heads and activation."""
    settings, flags = run.settings, run.flags
    seq_length = settings["model.seq_length"]
    positions = settings.get("model.position_embedding", "learned")
    if "max-position-embeddings" in flags:
        most = flags.one("max-position-embeddings", whole)
        if positions == "learned" and most != seq_length:
            run.lose("max-position-embeddings", f"learned positions are those of {seq_length}")
        else:
            run.skip("max-position-embeddings", "model.seq_length decides")
    if "kv-channels" in flags:
        head_size = settings["model.hidden_size"] // settings["model.num_heads"]
        if flags.one("kv-channels", whole) != head_size:
            run.lose("kv-channels", f"another model: heads are hidden size / heads = {head_size}")
        else:
            run.skip("kv-channels", "it is the hidden size / heads")
    _activation(run)
    if "use-bnb-optimizer" in flags:
        settings.give("model.embedding_layernorm", True, flags.written("use-bnb-optimizer"))
        run.lose("use-bnb-optimizer", "the optimizer's state has 32 bits, not 8")


def _activation(run: Migration) -> None:
    exact = "GELU is its tanh form, not the exact one with erf"
    if "model.activation" in run.settings or "openai-gelu" in run.flags:
        run.skip("no-bias-gelu-fusion", "fusion does not change the result")
        run.skip("onnx-safe", "only for ONNX")
    else:
        run.lose("no-bias-gelu-fusion", exact)
        run.lose("onnx-safe", exact)


def batch(run: Migration) -> None:
    """The global batch, which may be left out, and its ramp-up."""
    settings, flags = run.settings, run.flags
    micro, data_size = settings["train.micro_batch_size"], run.data_size
    if "train.global_batch_size" not in settings:
        require(
            data_size is not None,
            "--global-batch-size is missing, and stands for --micro-batch-size x data parallel "
            "size; give the number of ranks with --world_size",
        )
        settings.give("train.global_batch_size", micro * data_size, "--micro-batch-size x data")
    _check_accumulation(run)
    if "rampup-batch-size" in flags:
        values = flags.values("rampup-batch-size")
        require(
            len(values) == 3,
            "--rampup-batch-size must have three values, start, increment and samples, got "
            f"{len(values)}",
        )
        for name, value in zip(("start", "increment", "samples"), values, strict=True):
            size = flags.read("rampup-batch-size", value, whole)
            settings.give(f"train.rampup.{name}", size, flags.written("rampup-batch-size"))


def _check_accumulation(run: Migration) -> None:
    given, data_size = run.original.deepspeed, run.data_size
    if given is None or given.accumulation is None or data_size is None:
        return
    whole_batch = run.settings["train.micro_batch_size"] * data_size * given.accumulation
    found = run.settings["train.global_batch_size"]
    require(
        whole_batch == found,
        f"a global batch of {found} contradicts {given.source('gradient_accumulation_steps')}, "
        f"with which {data_size} data ranks have batches of {whole_batch}",
    )


def length(run: Migration) -> None:
    """How long the run is."""
    settings, flags = run.settings, run.flags
    require(
        not {"train-iters", "train-samples"} <= set(flags),
        "--train-iters contradicts --train-samples; give one of them",
    )
    require(
        "train-iters" not in flags or "rampup-batch-size" not in flags,
        "--train-iters contradicts --rampup-batch-size, which needs --train-samples",
    )
    run.take("train-samples", "train.samples", whole)
    run.take("train-iters", "train.samples", whole, settings["train.global_batch_size"])
    if "train.samples" in settings:
        run.skip("train-tokens", "the original reads it, and stops by samples or iterations")
    else:
        run.take("train-tokens", "train.samples", whole, 1 / settings["model.seq_length"])
    require("train.samples" in settings, "--train-samples or --train-iters is missing")


def schedule(run: Migration) -> None:
    """Warm-up and decay of the learning rate, and the optimizer."""
    settings, flags = run.settings, run.flags
    units = {
        "samples": 1.0,
        "iters": settings["train.global_batch_size"],
        "tokens": 1 / settings["model.seq_length"],
    }
    # Tokens win over samples in the original.
    if "lr-decay-tokens" in flags:
        run.skip("lr-decay-samples", "--lr-decay-tokens decides")
        run.skip("lr-decay-iters", "--lr-decay-tokens decides")
        units_of_decay = {"tokens": units["tokens"]}
    else:
        units_of_decay = units
    for unit, times in units_of_decay.items():
        run.take(f"lr-decay-{unit}", "optimizer.decay_samples", whole, times)
    for unit, times in units.items():
        run.take(f"lr-warmup-{unit}", "optimizer.warmup_samples", whole, times)
    decay = settings.get("optimizer.decay_samples", settings["train.samples"])
    run.take("lr-warmup-fraction", "optimizer.warmup_samples", number, decay)
    if "optimizer" in flags and flags.one("optimizer", text_itself) != "adam":
        run.lose("optimizer", "the optimizer is AdamW")
    else:
        run.skip("optimizer", "the optimizer is AdamW, as the original's adam is")


def evaluation(run: Migration) -> None:
    """Steps between evaluations, and their size: iterations of a global batch."""
    settings, flags = run.settings, run.flags
    iterations = flags.one("eval-iters", whole) if "eval-iters" in flags else 100
    interval = flags.one("eval-interval", whole) if "eval-interval" in flags else 1000
    if iterations == 0 or settings.get("data.split", [969, 30, 1])[1] == 0:
        run.skip("eval-interval", "there is nothing to evaluate on")
        run.skip("eval-iters", "there is nothing to evaluate on")
        return
    source = {
        flag: flags.written(flag) for flag in ("eval-interval", "eval-iters") if flag in flags
    }
    samples = iterations * settings["train.global_batch_size"]
    settings.give("train.eval_interval", interval, source.get("eval-interval", DEFAULT))
    text = f"{source.get('eval-iters', DEFAULT)}, of a global batch each"
    settings.give("train.eval_samples", samples, text)


def precision(run: Migration) -> None:
    """Number format and loss scale."""
    settings = run.settings
    if settings.get("train.dtype") == "fp16":
        why = "the scale follows overflows, see train.loss_scale"
        if run.uses_deepspeed:
            run.skip("loss-scale", "with --deepspeed, the original takes it from the JSON")
        else:
            run.lose("loss-scale", why)
            if "train.loss_scale.initial" not in settings:
                settings.give("train.loss_scale.initial", 2.0**32, DEFAULT)
    else:
        for name in ("initial", "minimum", "window", "hysteresis"):
            settings.drop(f"train.loss_scale.{name}")
        for flag in ("loss-scale", "initial-loss-scale", "min-loss-scale", "loss-scale-window"):
            run.skip(flag, "only --fp16 has a loss scale")
        run.skip("hysteresis", "only --fp16 has a loss scale")
    rounds = settings.get("train.dtype", "fp32") == "bf16"
    if rounds and settings.get("model.position_embedding") == "alibi":
        run.notes.add(
            "different",
            "model.alibi_precision",
            "exact; bloom_bf16 rounds the bias as the original does under --bf16",
        )


def layout(run: Migration) -> None:
    """The rank grid, the pipeline's schedule, and how it is cut into stages."""
    settings, flags = run.settings, run.flags
    pipeline = settings.get("parallel.pipeline", 1)
    if run.data_size is not None:
        settings.give("parallel.data", run.data_size, f"of {run.original.world_size} ranks")
    else:
        run.notes.add(
            "different", "parallel.data", "all ranks that are left; their number is not known"
        )
    _chunks(run, pipeline)
    if "pp-partition-method" in flags and pipeline > 1:
        partition = _PARTITIONS.get(flags.one("pp-partition-method", text_itself))
        if partition is not None:
            settings.give("parallel.partition", partition, flags.written("pp-partition-method"))
        else:
            run.lose("pp-partition-method", "parallel.partition cost shares out the operations")
    else:
        run.skip("pp-partition-method", "there is no pipeline")


def _chunks(run: Migration, pipeline: int) -> None:
    flag = "num-layers-per-virtual-pipeline-stage"
    if flag not in run.flags:
        return
    if run.uses_deepspeed or pipeline == 1:
        run.skip(flag, "the original does not read it with --deepspeed, or without a pipeline")
        return
    chunks = run.settings["model.num_layers"] // pipeline // run.flags.one(flag, whole)
    if chunks > 1:
        source = run.flags.written(flag)
        run.settings.give("parallel.chunks", chunks, source)
        run.settings.give("parallel.schedule", "interleaved_1f1b", source)


def zero(run: Migration) -> None:
    """What data ranks share."""
    settings, flags = run.settings, run.flags
    if not run.uses_deepspeed:
        if "zero-stage" in flags:
            settings.drop("parallel.zero")
        run.skip("zero-stage", "the original reads it with --deepspeed only")
        return
    low = settings.get("train.dtype", "fp32") != "fp32"
    if low and settings.get("parallel.zero", 0) == 0:
        source = flags.written("zero-stage") if "zero-stage" in flags else "ZeRO 0"
        settings.replace("parallel.zero", 1, f"{source} in the original")
        run.notes.add(
            "different",
            "parallel.zero",
            "1 instead of 0: data ranks share out the optimizer's state, as BLOOM's bf16 optimizer "
            "did by itself; the result is the same",
        )


def deepspeed(run: Migration) -> None:
    """What is to be said of DeepSpeed's JSON as a whole."""
    given = run.original.deepspeed
    if given is None:
        if run.uses_deepspeed and not run.is_open("deepspeed_config"):
            file = run.flags.written("deepspeed_config")
            run.notes.add("to do", file, "that file is not here; give it with --deepspeed")
        return
    run.skip("deepspeed_config", "what it says is in this config")
    clips = "optimizer.max_grad_norm" in run.settings
    if clips and "gradient_clipping" not in given.values:
        run.notes.add(
            "different",
            "optimizer.max_grad_norm",
            "is that of --clip-grad; DeepSpeed clips by gradient_clipping of its JSON, which is "
            "not there",
        )


def places(run: Migration) -> None:
    """Where the run writes, when it stops, and what it starts from."""
    settings, flags = run.settings, run.flags
    if "save" in flags and not run.is_open("save"):
        settings.give("folder", flags.one("save", text_itself), flags.written("save"))
    else:
        settings.give("folder", f"runs/{run.original.name}", "a stand-in")
    if flags.values("load") not in ([], flags.values("save")):
        run.lose("load", "saves of the original are not read; a run goes on from its own folder")
    else:
        run.skip("load", "a run goes on from its own folder; saves of the original are not read")
    if "exit-interval" in flags:
        run.take("exit-interval", "train.stop_at_step", whole)
        text = "the first of its multiples; give the next one when the run goes on"
        run.notes.add("different", "train.stop_at_step", text)
    if "tensorboard-dir" in flags:
        directory = shown(" ".join(flags.values("tensorboard-dir")))
        settings.give("log.tensorboard", True, flags.written("tensorboard-dir"))
        run.skip("tensorboard-dir", f"events go into the run's folder, not {directory}")


RULES: tuple[Callable[[Migration], None], ...] = (
    required,
    model,
    batch,
    length,
    schedule,
    data,
    evaluation,
    tokenizer,
    vocabulary,
    precision,
    layout,
    zero,
    deepspeed,
    places,
)
