"""The recipe on one page: T5 1.1 trained, converted, uptrained and fine-tuned as in the GQA paper.

Every setting of a run stands here, with its meaning, unit and allowed values. Each can be set on
the command line, for example `--config.uptrain.alpha=0.1`. Lengths are in tokens, batch sizes in
sequences. The values for the sizes small to xxl are those of T5 and of the paper (Ainslie et al.,
2023, section 3.1). configs/cpu.py changes them for pico, nano and mini, which train in minutes or
hours on two CPU cores. The sizes are in configs/sizes.py; what a sweep varies is in
configs/sweeps/grid.py.
"""

from ml_collections import ConfigDict

from configs import cpu
from configs.sizes import COLUMNS, SIZES
from gqa.runtime.errors import UserError


def get_config(arg: str = "", kv_heads: int | None = None) -> ConfigDict:
    """Return the config of a size, locked: a key that does not exist is refused.

    Args:
        arg: a size (`mini`), or `size=...,kv_heads=...`; empty means nano.
        kv_heads: KV heads of the decoder's self- and cross-attention after conversion. None means
            as many as query heads, so that nothing is converted.
    """
    size, kv_heads = _parse(arg or "", kv_heads)
    columns = dict(zip(COLUMNS, SIZES[size], strict=True))
    heads = columns["num_heads"]
    kv_heads = heads if kv_heads is None else kv_heads

    config = ConfigDict()
    config.name = f"{_variant(kv_heads, heads)}-{size}"  # the name of the run in the results
    config.size = size
    config.seed = 0
    config.experiment = "pipeline"  # what launch.py runs: pipeline, speed or aot
    # Other ways of reaching the same KV heads, which are run and reported beside this config's own:
    # METHOD@ALPHA separated by commas, such as mean@0,svd@0. METHOD is a name as in a sweep's list
    # of methods; without @ALPHA it has uptrain.alpha. A sweep ignores this key.
    config.compare = ""

    config.model = _model(size, columns)
    config.init = _init()
    config.text = _text()
    config.pretrain = _pretrain()
    config.convert = _convert(heads, kv_heads)
    config.uptrain = _uptrain()
    config.finetune = _finetune()
    config.files, config.documents = _files(), _documents()
    config.evaluate = _evaluate()
    config.benchmark = _benchmark()
    config.checkpoint, config.train, config.wandb = _checkpoint(), _train(), _wandb()
    config.mesh = _mesh(fsdp=size == "xxl")
    config.slurm, config.aot = _slurm(), _aot()
    config.report = _report()

    if size in cpu.SIZES:
        cpu.fit(config)
    return config.lock()


def _model(size: str, columns: dict[str, int]) -> ConfigDict:
    """Set the network of the multi-head parent; `gqa.Config` explains the fields."""
    on_cpu, layers = size in cpu.SIZES, columns.pop("layers")
    model = ConfigDict(columns)
    # model.vocab_size=0 means as many rows of the embedding as text.vocabulary has ids or, if the
    # vocabulary is trained, as many as suit pretrain.task.
    model.num_encoder_layers = layers
    model.num_decoder_layers = layers
    # Of T5 1.1. T5 1.0 has "relu", UL2 "gated_silu"; gqa/model/activations.py has all.
    model.activation = "gated_gelu"
    # True, as in umT5: each layer has a table of relative positions instead of one for each stack.
    model.position_bias_per_layer = False
    model.tied_logits = False  # True: the embedding also gives the logits
    model.dtype = "float32" if on_cpu else "bfloat16"  # of activations
    # Activations that the backward pass computes again instead of storing: none, minimal or full.
    model.remat = "none" if on_cpu else "full" if size == "xxl" else "minimal"
    return model


def _init() -> ConfigDict:
    """Name a trained multi-head T5 that takes the place of pretraining.

    It counts as trained for `pretrain.steps` steps. Its sizes and vocabulary replace this config's.
    """
    init = ConfigDict()
    init.huggingface = ""  # a T5: its folder, or its name on the Hub, ORGANISATION/MODEL@REVISION
    init.t5x = ""  # a T5X checkpoint folder; set text.vocabulary as well
    return init


def _text() -> ConfigDict:
    text = ConfigDict()
    # Python packages whose documentation is the default corpus: names separated by commas. Empty:
    # those in gqa/data/corpus_packages.py.
    text.packages = ""
    # A SentencePiece model file, or a folder of Hugging Face with spiece.model or tokenizer.json.
    # Empty: a vocabulary is trained on the pretraining text.
    text.vocabulary = ""
    # The SentencePiece model to train: unigram, as T5's vocabularies are, or bpe, which keeps short
    # and frequent words such as phonemes whole. Empty: the kind that suits pretrain.task.
    text.vocabulary_model = ""
    # The folder in which tensorflow-datasets has the paper's data sets, in array_record format.
    # Empty: the folder that tensorflow-datasets uses by default.
    text.data_dir = ""
    return text


def _pretrain() -> ConfigDict:
    pretrain = ConfigDict()
    # A task of gqa/data/tasks. Documents are trained on with span corruption; pairs of texts as
    # input and target.
    pretrain.task = "docstrings"
    pretrain.steps = 1_000_000
    pretrain.batch_size = 2048
    # To save memory, a batch is computed in this many parts, one after the other.
    pretrain.num_microbatches = 1
    pretrain.inputs_length = 512
    # Used for pairs of texts alone: in span corruption the length follows from inputs_length.
    pretrain.targets_length = 114
    pretrain.pack = False  # pairs of texts: put several into one row, separated by segment ids
    # The learning rate is scale / sqrt(max(step, warmup)).
    pretrain.warmup = 10_000
    pretrain.scale = 1.0
    pretrain.dropout_rate = 0.0
    pretrain.z_loss = 1e-4  # weight of log(Z)^2 in the loss; Z is the denominator of the softmax
    pretrain.every = 5000  # steps between log lines, validations and checkpoints
    pretrain.validation_examples = 2048
    return pretrain


def _convert(heads: int, kv_heads: int) -> ConfigDict:
    """Set how the multi-head checkpoint becomes a grouped one, as docs/conversion.md explains."""
    convert = ConfigDict()
    # KV heads of each attention after conversion. Each number must divide model.num_heads. The
    # paper leaves the encoder multi-head.
    convert.num_kv_heads_encoder = heads
    convert.num_kv_heads_self_attention = kv_heads
    convert.num_kv_heads_cross_attention = kv_heads
    # The decoder's attentions that are converted: self_attention, cross_attention or both. An
    # attention that is not converted stays multi-head.
    convert.where = "both"

    # How the heads of a group become one head. mean, first, random, medoid, largest and prune
    # change keys and values alone; svd and procrustes change queries and output projections as
    # well. weighted and fuse begin as the mean, and uptraining learns the weights. none converts
    # nothing: a network with the KV heads above is trained from scratch, for as many steps in all.
    convert.method = "mean"
    # What svd and procrustes preserve as well as possible: weight, activation, logit or attention.
    convert.space = "logit"
    # Which heads form a group: contiguous, strided, random, weight_cos, act_cos or act_aligned.
    convert.grouping = "contiguous"
    # Scale a group's head to the mean norm of the heads it was made from.
    convert.renorm = False

    # Tokens of pretraining text on which activations are measured, for the methods and groupings
    # that need activations.
    convert.calibration_tokens = 65_536
    # Shrink the measured covariances toward the identity by this fraction, from 0 to 1.
    convert.shrinkage = 0.01
    # Measure the inputs of each layer in the network whose earlier layers are already converted.
    convert.sequential = False
    # Choose the number of KV heads layer by layer. The cache stays as large as with the numbers
    # above in every layer (at the benchmark's lengths), but layers from which svd would have to
    # discard more get more KV heads.
    convert.per_layer_budget = False

    # What becomes of Adafactor's moments: map converts them like the parameters; reset drops them.
    convert.optimizer = "map"
    return convert


def _uptrain() -> ConfigDict:
    """Set the training after conversion, which has the recipe and the data of pretraining."""
    uptrain = ConfigDict()
    uptrain.alpha = 0.05  # uptraining steps as a fraction of pretrain.steps; 0: no uptraining
    uptrain.beta = 0.0  # weight of KL(multi-head parent || network) in the loss
    return uptrain


def _finetune() -> ConfigDict:
    finetune = ConfigDict()
    # Tasks of gqa/data/tasks, separated by commas; a network is fine-tuned for each. Empty: nothing
    # is fine-tuned, scored or timed.
    finetune.tasks = "parameter_qa,docstring_summary"
    finetune.steps = 20_000
    finetune.batch_size = 128
    finetune.num_microbatches = 1  # as in pretrain
    # 0: the length that the task names, which for the paper's tasks is the paper's; else 512.
    finetune.inputs_length = 0
    finetune.targets_length = 0  # 0: likewise; else 256
    finetune.pack = False  # put several examples into one row, separated by segment ids
    finetune.learning_rate = 1e-3
    finetune.dropout_rate = 0.1
    finetune.z_loss = 1e-4  # as in pretrain
    finetune.every = 1000  # as in pretrain
    finetune.validation_examples = 1024
    return finetune


def _files() -> ConfigDict:
    """Describe the task `files`: pairs of texts from your own files."""
    files = ConfigDict()
    # Files, globs or folders, separated by commas: .jsonl, .json, .tsv or .csv, each also as .gz;
    # .parquet; or a folder that Hugging Face's datasets saved. name@weight,name@weight is a
    # mixture: weight says how often a name is drawn.
    files.train = ""
    files.validation = ""
    files.test = ""
    # The column with the input, or a template of columns: "{question} context: {context}".
    files.source = "source"
    # The column with the target, a text or a list of reference texts. answers.text is the field
    # "text" inside the column "answers".
    files.target = "target"
    files.prefix = ""  # put before every input
    files.metrics = "rouge1,rouge2,rougeL"
    return files


def _documents() -> ConfigDict:
    """Describe the task `documents`: pretraining text from your own files."""
    documents = ConfigDict()
    documents.train = ""  # like files.train; also plain text files (.txt, .txt.gz)
    documents.validation = ""
    documents.column = "text"  # the column with the text, in files that have columns
    return documents


def _evaluate() -> ConfigDict:
    evaluate = ConfigDict()
    evaluate.split = "test"  # or validation
    evaluate.examples = 0  # score this many examples, from the first on; 0: all
    evaluate.batch_size = 64
    evaluate.search = "greedy"  # greedy, beam or sample

    # With search=beam, hypotheses are compared by their log probability divided by T5's length
    # penalty, ((5 + tokens) / 6) ** length_penalty.
    evaluate.num_beams = 4
    evaluate.length_penalty = 0.6

    # With search=sample.
    evaluate.temperature = 1.0  # 0: always the likeliest token, as in greedy search
    evaluate.top_k = 0  # sample from the k likeliest tokens; 0: from all
    # Sample from the likeliest tokens whose probabilities add up to this share; 1: from all.
    evaluate.top_p = 1.0

    # Of the KV cache: float32 or bfloat16. Empty: float32 on CPUs, bfloat16 elsewhere.
    evaluate.cache_dtype = ""
    return evaluate


def _benchmark() -> ConfigDict:
    """Set the batch with which the time and the memory of generation are measured."""
    benchmark = ConfigDict()
    benchmark.batch_size = 8
    benchmark.inputs_length = 2048
    benchmark.targets_length = 512
    benchmark.repetitions = 10
    benchmark.profile = False  # True: one more repetition leaves a trace in WORKDIR/tensorboard
    return benchmark


def _checkpoint() -> ConfigDict:
    checkpoint = ConfigDict()
    # The number of newest checkpoints to keep. The one with the best validation loss is kept, too.
    checkpoint.keep_last = 2
    # When a checkpoint is damaged: stop; or previous, which sets it aside and goes on from the
    # checkpoint before it.
    checkpoint.on_damage = "stop"
    return checkpoint


def _train() -> ConfigDict:
    """Set how training stages react to a loss that diverges, and which steps they profile."""
    train = ConfigDict()
    # When the loss is not finite or spikes: stop; or rollback, which restores the last checkpoint
    # and skips the batches since.
    train.on_divergence = "stop"
    train.max_rollbacks = 3  # of one stage
    # A loss this far above its running mean is a spike, in nats per token. 0: nothing is a spike.
    train.spike = 3.0
    # FIRST:LAST, such as 100:110: every training stage that runs these steps leaves a trace of them
    # in WORKDIR/tensorboard, for TensorBoard's profiler. LAST is the first step outside.
    train.profile = ""
    return train


def _wandb() -> ConfigDict:
    """Set whether metrics are logged to Weights & Biases."""
    wandb = ConfigDict()
    wandb.mode = "off"  # off, offline or online
    wandb.project = "gqa"
    return wandb


def _mesh(fsdp: bool) -> ConfigDict:
    """Set how a network is spread over devices; docs/scaling.md explains it."""
    mesh = ConfigDict()
    # Devices that together hold one network: heads, d_ff and the vocabulary are split over them.
    # All remaining devices split the batch.
    mesh.model = 1
    # Split parameters and optimizer state over the devices that split the batch, too.
    mesh.fsdp = fsdp
    # TPU slices. The network between slices is slower, so they split nothing but the batch.
    mesh.slices = 1
    # For generation with fewer KV heads than mesh.model: replicate the KV heads over devices, or
    # split the cache by batch. Values: replicate, batch, or auto to choose between the two.
    mesh.kv_heads = "auto"
    return mesh


def _slurm() -> ConfigDict:
    """Set the resources of a job of --executor=slurm; empty or 0: the cluster's default."""
    slurm = ConfigDict()
    slurm.partition = ""
    slurm.account = ""
    # Nodes of a stage that trains or generates: one process a node, and the GPUs of all nodes share
    # each batch.
    slurm.nodes = 1
    slurm.gpus_per_node = 0
    slurm.cpus_per_task = 0
    slurm.mem_gb = 0
    slurm.timeout_min = 0  # a training stage that takes longer is queued again and continues
    return slurm


def _aot() -> ConfigDict:
    """Set the programs that --stage=aot compiles for hardware that this machine does not have.

    Generation uses the benchmark's lengths and is split over all chips along the axis "model".
    """
    aot = ConfigDict()
    # h100-1 to h100-8, or Google Cloud's name of a TPU slice. For v4 and v5p Cloud counts the two
    # cores of each chip: v4-8 is 4 chips.
    aot.target = "v4-8"
    # Numbers of KV heads in decoder self- and cross-attention. (): the one number of convert.
    aot.kv_heads = ()
    aot.largest_batch_size = 32  # the most sequences a chip that are tried
    aot.prefill_batch_size = 32  # sequences that are encoded at once
    # The share of each ceiling in gqa/aot/chips.py that a program is assumed to reach.
    aot.efficiency = 0.7
    # Slices to compile pretraining for, in this order, until one has enough memory.
    aot.training_targets = ()
    # Devices along "model" in those slices. Parameters are split over the other devices.
    aot.training_model = 1
    return aot


def _report() -> ConfigDict:
    report = ConfigDict()
    # How many points of the average score below the multi-head parent are acceptable. The report
    # names the fewest KV heads that lose no more.
    report.within = 1.0
    return report


def _variant(kv_heads: int, num_heads: int) -> str:
    return {num_heads: "mha", 1: "mqa"}.get(kv_heads, f"gqa{kv_heads}")


def _parse(arg: str, kv_heads: int | None) -> tuple[str, int | None]:
    """Return the size and the number of KV heads that a config argument asks for."""
    size = "nano"
    for part in filter(None, arg.split(",")):
        key, value = part.split("=", 1) if "=" in part else ("size", part)
        if key == "size":
            size = value
        elif key == "kv_heads" and value.isdecimal() and len(value) < 10:
            kv_heads = int(value)
        else:
            raise UserError(f"config argument {part!r}; use size=... and kv_heads=<a number>")
    if size not in SIZES:
        raise UserError(f"size={size!r}; use one of {', '.join(SIZES)}")
    return size, kv_heads
