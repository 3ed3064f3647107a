"""Runs with a configuration that is refused."""

from tests.integration.cases import Case, changed, yaml

SIZES = {
    "heads on tensor": changed(
        "model.num_heads (4)|multiple of parallel.tensor (3)|3 or 6", parallel__tensor=3
    ),
    "hidden on heads": changed(
        "model.hidden_size (64)|multiple of model.num_heads (5)|60 or 65", model__num_heads=5
    ),
    "ffn on tensor": changed(
        "model.ffn_hidden_size (250)|multiple of parallel.tensor (4)|248 or 252",
        model__ffn_hidden_size=250,
        parallel__tensor=4,
    ),
    "sequence on tensor": changed(
        "model.seq_length (30)|multiple of parallel.tensor (4)|28 or 32",
        model__seq_length=30,
        parallel__tensor=4,
        parallel__sequence=True,
    ),
    "hidden in fp8": changed(
        "model.hidden_size (72)|train.fp8's 16 x parallel.tensor (16)|64 or 80",
        model__hidden_size=72,
        train__dtype="bf16",
        train__fp8=True,
    ),
    "tokens in fp8": changed(
        "train.micro_batch_size x model.seq_length (24)|block of train.fp8 (16)|16 or 32",
        model__seq_length=12,
        train__dtype="bf16",
        train__fp8=True,
    ),
    "no layers": changed("model.num_layers must be greater than 0|got 0", model__num_layers=0),
    "rotary with odd heads": changed(
        "model.position_embedding rotary|even head size|got 1",
        model__position_embedding="rotary",
        model__num_heads=64,
    ),
    "batch on micro batch": changed(
        "train.global_batch_size (5)|train.micro_batch_size 2 x data parallel size 1|4 or 6",
        train__global_batch_size=5,
    ),
    "batch on ranks": changed(
        "train.global_batch_size (6)|train.micro_batch_size 2 x data parallel size 2|4 or 8",
        world_size=2,
        train__global_batch_size=6,
    ),
    "evaluation on micro batch": changed(
        "train.eval_samples (3)|train.micro_batch_size 2 x data", train__eval_samples=3
    ),
    "first batch beyond the run": changed(
        "train.samples (3)|below the first batch (4)", train__samples=3
    ),
    "ramp-up down": changed(
        "train.rampup.start (8)|not be above train.global_batch_size (4)",
        train__rampup__start=8,
        train__rampup__increment=2,
        train__rampup__samples=9,
    ),
    "ramp-up by uneven steps": changed(
        "train.global_batch_size - train.rampup.start (6)|multiple of train.rampup.increment (4)",
        train__global_batch_size=8,
        train__rampup__start=2,
        train__rampup__increment=4,
        train__rampup__samples=9,
    ),
    "ramp-up over odd batches": changed(
        "every batch of train.rampup (1)|multiple of train.micro_batch_size 2",
        train__rampup__start=1,
        train__rampup__increment=1,
        train__rampup__samples=9,
    ),
    "micro batch of nothing": changed(
        "train.micro_batch_size must be greater than 0|got 0", train__micro_batch_size=0
    ),
    "neither number nor auto": changed(
        "train.micro_batch_size must be a whole number or auto|got 'best'",
        train__micro_batch_size="best",
    ),
    "batch on ranks with auto": changed(
        "train.global_batch_size (5)|multiple of the data parallel size (2)|4 or 6",
        world_size=2,
        train__global_batch_size=5,
        train__micro_batch_size="auto",
    ),
    "ramp-up half given": changed(
        "train.rampup.start|train.rampup.samples|or all 0|got 2, 0 and 0", train__rampup__start=2
    ),
}

LAYOUTS = {
    "no stage": changed(
        "parallel.pipeline must be greater than 0|got 0", world_size=2, parallel__pipeline=0
    ),
    "fewer layers than stages": changed(
        "model.num_layers (2)|not be below the number of stages|"
        "parallel.pipeline (2) x parallel.chunks (2)",
        world_size=2,
        parallel__pipeline=2,
        parallel__schedule="interleaved_1f1b",
        parallel__chunks=2,
    ),
    "fewer microbatches than stages": changed(
        "parallel.pipeline (2)|not be above the number of microbatches of a data rank|(1)",
        world_size=2,
        parallel__pipeline=2,
        train__global_batch_size=2,
    ),
    "microbatches that leave a group of the pipeline open": changed(
        "microbatches of a data rank in one step (3)|"
        "multiple of parallel.pipeline with parallel.schedule interleaved_1f1b (2)",
        world_size=2,
        model__num_layers=4,
        parallel__pipeline=2,
        parallel__schedule="interleaved_1f1b",
        parallel__chunks=2,
        train__global_batch_size=6,
    ),
    "ramp-up below the pipeline": changed(
        "parallel.pipeline (2)|not be above the number of microbatches of a data rank|(1)",
        world_size=2,
        parallel__pipeline=2,
        train__rampup__start=2,
        train__rampup__increment=2,
        train__rampup__samples=9,
    ),
    "tensor and pipeline on ranks": changed(
        "parallel.tensor (2) x parallel.pipeline (2) must divide|WORLD_SIZE 2",
        world_size=2,
        parallel__tensor=2,
        parallel__pipeline=2,
    ),
    "grid of three axes on ranks": changed(
        "parallel.tensor (1) x parallel.pipeline (2) x parallel.data (2)|WORLD_SIZE 2",
        world_size=2,
        parallel__pipeline=2,
        parallel__data=2,
    ),
    "zero bubbles with sharded gradients": changed(
        "parallel.schedule zero_bubble needs parallel.zero 0 or 1, got 2",
        world_size=2,
        parallel__pipeline=2,
        parallel__schedule="zero_bubble",
        parallel__zero=2,
    ),
    "zero bubbles without pipeline": changed(
        "parallel.schedule zero_bubble needs parallel.pipeline of at least 2, got 1",
        parallel__schedule="zero_bubble",
    ),
    "interleaved without chunks": changed(
        "parallel.schedule interleaved_1f1b needs parallel.chunks of at least 2, got 1",
        world_size=2,
        parallel__pipeline=2,
        parallel__schedule="interleaved_1f1b",
    ),
    "chunks without interleaving": changed(
        "parallel.schedule 1f1b needs parallel.chunks 1, got 2",
        world_size=2,
        parallel__pipeline=2,
        parallel__chunks=2,
    ),
    "no such stage of ZeRO": changed(
        "parallel.zero must be one of 0, 1, 2, 3|got '4'", world_size=2, parallel__zero=4
    ),
    "no such schedule": changed(
        "parallel.schedule must be one of 1f1b, interleaved_1f1b, zero_bubble|got 'gpipe'",
        parallel__schedule="gpipe",
    ),
    "loss scale below its minimum": changed(
        "train.loss_scale.minimum (4.0)|not be above train.loss_scale.initial (2.0)",
        train__dtype="fp16",
        train__loss_scale__initial=2,
        train__loss_scale__minimum=4,
    ),
}

DEEPSPEED = {
    "engine that is none": changed(
        "engine.name must be one of torch, deepspeed|got 'deepspede'", engine__name="deepspede"
    ),
    "gradients shared out in a pipeline": changed(
        "engine.name deepspeed needs parallel.zero 0 or 1 with parallel.pipeline 2, got 2",
        world_size=2,
        engine__name="deepspeed",
        train__dtype="fp32",
        parallel__pipeline=2,
        parallel__zero=2,
    ),
    "another order of the pipeline": changed(
        "engine.name deepspeed needs parallel.schedule 1f1b, got zero_bubble",
        world_size=2,
        engine__name="deepspeed",
        train__dtype="fp32",
        parallel__pipeline=2,
        parallel__schedule="zero_bubble",
    ),
    "float64 on DeepSpeed": changed(
        "engine.name deepspeed needs train.dtype fp32, bf16 or fp16, got fp64",
        engine__name="deepspeed",
    ),
    "bf16 without ZeRO on DeepSpeed": changed(
        "engine.name deepspeed needs parallel.zero of at least 1 with train.dtype bf16, got 0",
        engine__name="deepspeed",
        train__dtype="bf16",
    ),
    "another stage in DeepSpeed's options": changed(
        "engine.deepspeed.zero_optimization.stage (3) must not differ from parallel.zero (1)",
        engine__name="deepspeed",
        engine__deepspeed={"zero_optimization": {"stage": 3}},
        train__dtype="fp32",
        parallel__zero=1,
    ),
    "another clipping in DeepSpeed's options": changed(
        "engine.deepspeed.gradient_clipping (0.5) must not differ from optimizer.max_grad_norm",
        engine__name="deepspeed",
        engine__deepspeed={"gradient_clipping": 0.5},
        train__dtype="fp32",
    ),
    "an optimizer in DeepSpeed's options": changed(
        'engine.deepspeed.optimizer.type ("Adam") must not be given: optimizer decides it here',
        engine__name="deepspeed",
        engine__deepspeed={"optimizer": {"type": "Adam"}},
        train__dtype="fp32",
    ),
    "DeepSpeed's options for another engine": changed(
        "engine.deepspeed needs engine.name deepspeed, got torch",
        engine__deepspeed={"zero_optimization": {"overlap_comm": True}},
    ),
    "no compiler for DeepSpeed": Case(
        "engine.deepspeed.zero_optimization.offload_optimizer.device nvme|no compiler c++",
        options={
            "engine__name": "deepspeed",
            "engine__deepspeed": {
                "zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "disk"}}
            },
            "train__dtype": "fp32",
            "parallel__zero": 3,
        },
        env={"PATH": ""},
    ),
}

VALUES = {
    "negative rate": changed("optimizer.lr must be greater than 0|got -0.1", optimizer__lr=-0.1),
    "lowest above highest rate": changed(
        "optimizer.min_lr (0.2)|not be above optimizer.lr (0.1)",
        optimizer__lr=0.1,
        optimizer__min_lr=0.2,
    ),
    "decay before warm-up": changed(
        "optimizer.decay_samples (8)|not be below optimizer.warmup_samples (16)",
        optimizer__decay_samples=8,
        optimizer__warmup_samples=16,
    ),
    "momentum": changed("optimizer.beta1|below 1|got 1.0", optimizer__beta1=1.0),
    "dropout": changed("model.hidden_dropout|below 1|got 1.5", model__hidden_dropout=1.5),
    "sdpa with dropout": changed(
        "model.attention_backend sdpa|model.attention_dropout 0, got 0.1",
        model__attention_backend="sdpa",
        model__attention_dropout=0.1,
    ),
    "flash with a rounded bias": changed(
        "model.attention_backend flash|model.alibi_precision exact, got bloom_bf16",
        model__attention_backend="flash",
        model__alibi_precision="bloom_bf16",
    ),
    "flash with documents": changed(
        "model.attention_backend flash|data.reset_attention_mask false, got true",
        model__attention_backend="flash",
        data__reset_attention_mask=True,
        data__tokenizer="FOLDER/tokenizer.json",
    ),
    "flash in fp32": changed(
        "model.attention_backend flash|train.dtype bf16, got fp32",
        model__attention_backend="flash",
        train__dtype="fp32",
    ),
    "flex in fp64": changed(
        "model.attention_backend flex|train.dtype bf16 or fp32, got fp64",
        model__attention_backend="flex",
        train__dtype="fp64",
    ),
    "flex on a CPU": changed(
        "model.attention_backend flex needs a GPU|the device is cpu",
        model__attention_backend="flex",
        train__dtype="fp32",
        launch__device="cpu",
    ),
    "fp8 in fp32": changed(
        "train.fp8 needs train.dtype bf16, got fp32", train__fp8=True, train__dtype="fp32"
    ),
    "fp8 in symmetric memory": changed(
        "train.fp8 needs parallel.symmetric_memory false, got true",
        train__fp8=True,
        train__dtype="bf16",
        parallel__tensor=2,
        parallel__sequence=True,
        parallel__symmetric_memory=True,
    ),
    "symmetric memory of whole sequences": changed(
        "parallel.symmetric_memory needs parallel.sequence true|got false and 2",
        parallel__tensor=2,
        parallel__symmetric_memory=True,
    ),
    "symmetric memory on a CPU": changed(
        "parallel.symmetric_memory needs GPUs|the device is cpu",
        world_size=2,
        parallel__tensor=2,
        parallel__sequence=True,
        parallel__symmetric_memory=True,
    ),
    "seed": changed("train.seed|below 2**32|got -1", train__seed=-1),
    "evaluation of nothing": changed(
        "train.eval_samples|above 0|train.eval_interval 5, got 0", train__eval_interval=5
    ),
    "negative weight of data": changed(
        "data.paths some/text|weight must be above 0|got -1.0", data__paths={"some/text": -1.0}
    ),
    "no training split": changed("data.split|first above 0|got [0.0, 1.0", data__split=[0, 1, 1]),
    "resets without tokenizer": changed(
        "data.tokenizer is needed by|data.eod_mask_loss|null", data__eod_mask_loss=True
    ),
    "interval": changed("log.interval must be greater than 0|got 0", log__interval=0),
    "not a number": changed("optimizer.lr must be a number|got 'fast'", optimizer__lr="fast"),
    "not whole": changed(
        "model.num_layers must be a whole number|got '2.5'", model__num_layers=2.5
    ),
    "not a truth value": changed(
        "parallel.sequence must be true or false|got 'perhaps'", parallel__sequence="perhaps"
    ),
    "neither number nor null": changed(
        "train.stop_at_step must be a whole number or null|got 'end'", train__stop_at_step="end"
    ),
    "two shares": changed("data.split must be a list of 3 numbers|[1, 2]", data__split=[1, 2]),
    "no mapping": changed("data.paths must be a mapping|got 'text'", data__paths="text"),
    "no choice": changed(
        "train.dtype must be one of fp32, bf16, fp16, fp64|got 'fp12'", train__dtype="fp12"
    ),
    "unknown option": changed(
        "optimizer.lrr is not an option|did you mean optimizer.lr?", optimizer__lrr=1
    ),
    "unknown section": changed(
        "modle.num_layers is not an option|did you mean model.num_layers?", modle__num_layers=1
    ),
    "option without section": changed(
        "tokenizer is not an option|did you mean data.tokenizer?", tokenizer="x"
    ),
    "section for option": changed("train is a section|train.samples", train="x"),
    "option without value": Case("--log.interval|expected one argument", argv=("--log.interval",)),
    "word too many": Case("unrecognized arguments: again", argv=("again",)),
}

FILES = {
    "no file": Case("--config FOLDER/run.yaml|No such file", argv=("--config", "FOLDER/run.yaml")),
    "no yaml": yaml("run.yaml: is not YAML|line 2", "model: [1\n"),
    "no text": yaml("run.yaml: is not YAML|special characters", "model: \0\n"),
    "list": yaml("run.yaml: must be a mapping|got ['model']", "- model\n"),
    "empty": yaml("run.yaml: must be a mapping|got None", ""),
    "unknown option in file": yaml(
        "run.yaml: model.num_layer is not|did you mean model.num_layers?", "model: {num_layer: 1}"
    ),
    "unknown section in file": yaml(
        "run.yaml: optimiser is not|did you mean optimizer?", "optimiser: {lr: 1}"
    ),
    "no section in file": yaml("run.yaml: train must be a section|got 5", "train: 5"),
    "wrong value in file": yaml("log.interval must be a whole number|[1]", "log: {interval: [1]}"),
    "hostile tag": yaml(
        "run.yaml: is not YAML|constructor", 'folder: !!python/object/apply:os.mkdir ["owned"]'
    ),
}
