"""The recipe on one page: T5 1.1 trained, converted, uptrained and fine-tuned as in the GQA paper.

Every key can be set on the command line, e.g. `--config.uptrain.alpha=0.1`. Lengths are in tokens,
batch sizes in sequences. The numbers for pico, nano and mini, which fit two CPU cores and minutes
or hours, stand at the end; those for small .. xxl are T5's and the paper's (Ainslie et al., 2023,
section 3.1).
"""

from ml_collections import ConfigDict

from configs.sizes import COLUMNS, SIZES
from gqa.runtime.errors import UserError


def get_config(arg: str = "", kv_heads: int | None = None) -> ConfigDict:
    """The config of `arg`: a size, or `size=...,kv_heads=...`; `kv_heads` None means multi-head."""
    size, kv_heads = _parse(arg or "", kv_heads)
    row = dict(zip(COLUMNS, SIZES[size], strict=True))
    layers, heads = row.pop("layers"), row["num_heads"]
    kv_heads = heads if kv_heads is None else kv_heads
    cpu = size in ("pico", "nano", "mini")

    config = ConfigDict()
    config.name = f"{_variant(kv_heads, heads)}-{size}"
    config.size = size
    config.seed = 0
    config.experiment = "pipeline"  # what launch.py runs
    # The network of the multi-head parent; see gqa.model.Config.
    config.model = ConfigDict(row)
    config.model.update(
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        activation="gated_gelu",
        tied_logits=False,
        dtype="float32" if cpu else "bfloat16",
        remat="none" if cpu else "full" if size == "xxl" else "minimal",
    )
    config.init, config.text = _init(), _text()
    config.pretrain = _pretrain()
    config.convert = _convert(heads, kv_heads)
    config.uptrain = ConfigDict()
    config.uptrain.alpha = 0.05  # of pretrain.steps, with pretrain's recipe and data; 0 is allowed
    config.uptrain.beta = 0.0  # of KL(multi-head parent || network), added to the loss
    config.finetune = _finetune()
    config.files, config.documents = _files(), _documents()
    config.evaluate = _evaluate()
    config.benchmark = ConfigDict()
    config.benchmark.batch_size = 8
    config.benchmark.inputs_length = 2048
    config.benchmark.targets_length = 512
    config.benchmark.repetitions = 10
    config.checkpoint = ConfigDict()
    config.checkpoint.keep_last = 2  # beside the one with the best validation loss
    config.checkpoint.on_damage = "stop"  # or previous: set it aside, go on from the one before
    config.train = _train()
    config.wandb = ConfigDict()
    config.wandb.mode = "off"  # Weights & Biases: off, offline, online
    config.wandb.project = "gqa"
    config.mesh = _mesh(fsdp=size == "xxl")
    config.slurm, config.aot = _slurm(), _aot()
    config.report = ConfigDict()
    config.report.within = 1.0  # points of score below the multi-head parent that are acceptable
    if cpu:
        _fit_cpu(config)
    return config.lock()


def _init() -> ConfigDict:
    init = ConfigDict()
    # A folder with a multi-head T5 that takes the place of pretraining: it counts as trained for
    # pretrain.steps, sizes and vocabulary are its own.
    init.huggingface = ""  # config.json, safetensors, spiece.model
    init.t5x = ""  # a checkpoint folder; set text.vocabulary, too
    return init


def _text() -> ConfigDict:
    text = ConfigDict()
    # The default corpus is the documentation of the packages in gqa/data/corpus_packages.py.
    text.packages = ""  # comma-separated distributions; empty: the default corpus
    text.vocabulary = ""  # a SentencePiece file; empty: trained on the pretraining text
    # Where tensorflow-datasets has the paper's in array_record format; empty: where it puts them.
    text.data_dir = ""
    return text


def _pretrain() -> ConfigDict:
    pretrain = ConfigDict()
    pretrain.task = "docstrings"  # documents give span corruption, examples seq2seq
    pretrain.steps = 1_000_000
    pretrain.batch_size = 2048
    pretrain.num_microbatches = 1
    pretrain.inputs_length = 512
    pretrain.targets_length = 114  # of examples; in span corruption inputs_length decides it
    pretrain.warmup = 10_000  # learning rate = scale / sqrt(max(step, warmup))
    pretrain.scale = 1.0
    pretrain.dropout_rate = 0.0
    pretrain.z_loss = 1e-4
    pretrain.every = 5000  # steps between log lines, validations and checkpoints
    pretrain.validation_examples = 2048
    return pretrain


def _convert(heads: int, kv_heads: int) -> ConfigDict:
    convert = ConfigDict()
    # mean, first, random, medoid, largest; svd and procrustes change queries and outputs, too;
    # weighted and fuse are the mean to begin with, and learned while uptraining.
    convert.method = "mean"
    convert.space = "logit"  # what svd keeps best: weight, activation, logit
    convert.grouping = "contiguous"  # strided, random, weight_cos, act_cos, act_aligned
    convert.renorm = False  # scale a group's head to the mean norm of its members
    # Of the pretraining text, for the methods and groupings that look at activations.
    convert.calibration_tokens = 65_536
    convert.shrinkage = 0.01  # of what they measure, towards white inputs
    convert.sequential = False  # measure each layer in the network as converted so far
    # KV heads by layer: a cache as large as with the numbers below everywhere (at the benchmark's
    # lengths), more of it for the layers in which svd would have to discard more.
    convert.per_layer_budget = False
    convert.where = (
        "both"  # the decoder's attentions that are converted: self_attention, cross_attention, both
    )
    convert.num_kv_heads_encoder = heads  # the paper leaves the encoder multi-head
    convert.num_kv_heads_self_attention = kv_heads
    convert.num_kv_heads_cross_attention = kv_heads
    convert.optimizer = "map"  # or reset: what becomes of Adafactor's moments
    return convert


def _finetune() -> ConfigDict:
    finetune = ConfigDict()
    finetune.tasks = "parameter_qa,docstring_summary"  # empty: neither scores nor timings
    finetune.steps = 20_000
    finetune.batch_size = 128
    finetune.num_microbatches = 1
    finetune.inputs_length = 0  # 0: the task's own, the paper's for its tasks, else 512
    finetune.targets_length = 0  # likewise, else 256
    finetune.pack = False  # several examples a row, with segment ids
    finetune.learning_rate = 1e-3
    finetune.dropout_rate = 0.1
    finetune.z_loss = 1e-4
    finetune.every = 1000
    finetune.validation_examples = 1024
    return finetune


def _train() -> ConfigDict:
    train = ConfigDict()
    # At a loss that is not finite or a spike: stop, or rollback to the last checkpoint and skip the
    # batches since.
    train.on_divergence = "stop"
    train.max_rollbacks = 3  # of one stage
    train.spike = 3.0  # nats per token above the running mean of the loss; 0: never
    return train


def _files() -> ConfigDict:
    files = ConfigDict()
    # The task `files`: your own pairs of texts. Files, globs or folders, comma-separated:
    # .jsonl .json .tsv .csv, also .gz; .parquet, or what Hugging Face's datasets saved.
    files.train = ""  # name@weight,name@weight is a mixture
    files.validation = ""
    files.test = ""
    files.source = "source"  # a column, or several: "{question} context: {context}"
    files.target = "target"  # a column, of texts or lists of references; answers.text goes inside
    files.prefix = ""  # put before every source
    files.metrics = "rouge1,rouge2,rougeL"
    return files


def _documents() -> ConfigDict:
    documents = ConfigDict()
    # The task `documents`: your own pretraining text. The same, and plain text files (.txt, .gz).
    documents.train = ""
    documents.validation = ""
    documents.column = "text"  # of other files than plain text
    return documents


def _evaluate() -> ConfigDict:
    evaluate = ConfigDict()
    evaluate.split = "test"
    evaluate.examples = 0  # the first so many; 0: all
    evaluate.batch_size = 64
    evaluate.search = "greedy"  # greedy, beam, sample
    evaluate.num_beams = 4  # beam: with T5's length penalty ((5 + tokens) / 6) ** length_penalty
    evaluate.length_penalty = 0.6
    evaluate.temperature = 1.0  # sample: 0 is greedy
    evaluate.top_k = 0  # of so many most likely tokens; 0: all
    evaluate.top_p = 1.0  # of the most likely tokens that have this probability together
    evaluate.cache_dtype = ""  # of keys and values; empty: float32 on CPUs, bfloat16 elsewhere
    return evaluate


def _mesh(fsdp: bool) -> ConfigDict:
    mesh = ConfigDict()
    # How networks are spread over devices. What is left of them splits the batch.
    mesh.model = 1  # devices that split heads, d_ff and the vocabulary
    mesh.fsdp = fsdp  # parameters and moments are split as the batch is, too
    mesh.slices = 1  # of a TPU, joined by a slower network; they split the batch alone
    # Fewer KV heads than mesh.model: replicate them, or split the cache by batch; or auto.
    mesh.kv_heads = "auto"
    return mesh


def _slurm() -> ConfigDict:
    slurm = ConfigDict()
    # What a job of --executor=slurm asks for; empty or 0: the cluster's default.
    slurm.partition = ""
    slurm.account = ""
    slurm.nodes = 1  # of a stage that trains or generates: a process a node, its GPUs in one batch
    slurm.gpus_per_node = 0
    slurm.cpus_per_task = 0
    slurm.mem_gb = 0
    slurm.timeout_min = 0  # a training stage that takes longer is requeued and goes on
    return slurm


def _aot() -> ConfigDict:
    aot = ConfigDict()
    # What --stage=aot compiles for: h100-1 to h100-8, or Cloud's name of a TPU slice, which counts
    # cores of v4 and v5p: v4-8 is 4 chips. Generation is split over all chips along "model"; its
    # lengths are the benchmark's.
    aot.target = "v4-8"
    aot.kv_heads = ()  # in decoder self- and cross-attention; (): convert's
    aot.largest_batch_size = 32  # a chip
    aot.prefill_batch_size = 32  # rows that are encoded at once
    aot.efficiency = 0.7  # of each ceiling of gqa/aot/chips.py that a program is taken to reach
    aot.training_targets = ()  # slices to compile pretraining for, until one holds it
    aot.training_model = 1  # devices along "model" of those; parameters are split over the others
    return aot


def _fit_cpu(config: ConfigDict) -> None:
    """Budgets for two CPU cores: pico and nano a few minutes in all, mini a few hours."""
    nano = config.size != "mini"
    pretrain, finetune = config.pretrain, config.finetune
    pretrain.steps = 1600 if nano else 20_000
    pretrain.inputs_length, pretrain.targets_length = 128, 29
    # Fewer steps than T5's by a factor of 1000: a higher rate that also decays earlier.
    pretrain.scale = 0.5
    pretrain.warmup = 400 if nano else 2000
    finetune.steps = 500 if nano else 2000
    finetune.inputs_length, finetune.targets_length = 128, 48
    finetune.pack = True
    finetune.learning_rate = 1e-2 if nano else 3e-3
    finetune.dropout_rate = 0.0 if nano else 0.1  # nano sees no row twice
    for training in (pretrain, finetune):
        training.batch_size = 8  # many small steps; also what fits a CPU's cache
        training.every = training.steps // 5
        training.validation_examples = 256
    config.evaluate.examples = 256 if nano else 1024
    config.benchmark.inputs_length = 512
    config.benchmark.targets_length = 64


def _variant(kv_heads: int, num_heads: int) -> str:
    return {num_heads: "mha", 1: "mqa"}.get(kv_heads, f"gqa{kv_heads}")


def _parse(arg: str, kv_heads: int | None) -> tuple[str, int | None]:
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
