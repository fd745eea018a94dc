"""Conflicts between fields that are each valid: both fields, their values, and what to do about it."""

from itertools import pairwise

from megatron_stable.config.attention import limits
from megatron_stable.config.notation import inline
from megatron_stable.config.problems import Problem, fail
from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config, ModelConfig
from megatron_stable.config.surgery import refusals
from megatron_stable.persisted import LARGEST


def check(config: Config, world_size: int | None = None) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: the configuration.
        world_size: ranks of the run; without it, what depends on their number is not checked.

    Raises:
        ConfigError: one line for each conflict, all of them at once.
    """
    fail("configuration", conflicts(config, world_size))


def conflicts(config: Config, world_size: int | None = None) -> list[Problem]:
    """All conflicts in `config`, for a run of `world_size` ranks if that is known."""
    return [
        *_run(config),
        *_model(config),
        *_layout(config),
        *_batch(config, world_size),
        *_stages(config),
        *_data(config),
        *_optimization(config),
        *_guard(config),
    ]


def _run(config: Config) -> list[Problem]:
    if config.run.apex != "require" or not config.run.deterministic:
        return []
    why = "cannot go together, as nobody has promised that apex's kernels give the same bits each time"
    message = f"run.apex require and run.deterministic true {why}: set run.apex=auto, or run.deterministic=false"
    return [Problem(("run.apex", "run.deterministic"), message)]


def _odd_heads(model: ModelConfig) -> Problem:
    chosen = model.head_width is not None
    keys = ("model.head_width",) if chosen else ("model.hidden", "model.heads")
    width = "model.head_width" if chosen else f"model.hidden {model.hidden} / model.heads {model.heads}"
    return Problem(
        ("model.positions", *keys),
        f"model.positions rope rotates pairs and needs an even head width, but {width} is {model.head_dim}: "
        f"change {'it' if chosen else 'one of them'}, or set model.positions=learned",
    )


def _model(config: Config) -> list[Problem]:
    model, found = config.model, []
    if model.head_width is None and model.hidden % model.heads:
        found.append(_indivisible("model.hidden", model.hidden, "model.heads", model.heads))
    elif model.positions == "rope" and model.head_dim % 2:
        found.append(_odd_heads(model))
    if model.heads % model.groups:
        found.append(_indivisible("model.heads", model.heads, "model.kv_heads", model.groups))
    found += [*_backend(config), *_recipe(config)]
    every = model.activation_checkpointing
    if isinstance(every, int) and every > model.layers:
        found.append(
            Problem(
                ("model.activation_checkpointing", "model.layers"),
                f"model.activation_checkpointing {every} would recompute no block, as model.layers is {model.layers}: "
                f"set it to 1..{model.layers}, or to none",
            )
        )
    return found


def _backend(config: Config) -> list[Problem]:
    """What the chosen attention backend cannot compute."""
    name, remedy = config.model.attention, "set model.attention=auto, or"
    return [
        Problem(("model.attention", it.key), f"model.attention {name} cannot compute {it}: {remedy} {it.key}={it.off}")
        for it in limits(name, config.model, config.precision.dtype)
    ]


def _recipe(config: Config) -> list[Problem]:
    """Stability knobs that contradict each other, or the layout."""
    model, found = config.model, []

    def contradict(keys: tuple[str, ...], why: str, remedy: str) -> None:
        values = [config.model_dump(mode="json")[key.split(".")[0]][key.split(".")[1]] for key in keys]
        named = " and ".join(f"{key} {inline(value)}" for key, value in zip(keys, values, strict=True))
        found.append(Problem(keys, f"{named} {why}: {remedy}"))

    for key in ("model.attention_input_norm", "model.mlp_input_norm"):
        if model.deepnorm and getattr(model, key.split(".")[1]):
            why = "contradict each other, as DeepNorm normalises after the residual, not before it"
            contradict(("model.deepnorm", key), why, f"set {key}=false (as model.recipe=deepnorm does)")
    if model.qk_norm_scope == "full" and not (model.qk_norm or model.v_norm):
        why = "leave no norm that the scope is of"
        contradict(("model.qk_norm_scope", "model.qk_norm"), why, "set model.qk_norm=true, or model.qk_norm_scope=head")
    if model.embedding_scale and model.embedding_norm:
        why = "contradict each other, as a norm takes every factor out again"
        contradict(("model.embedding_scale", "model.embedding_norm"), why, "set one of them to false")
    for key in ("model.qk_norm", "model.sigma_reparam"):
        if config.optimizer.qk_clip is not None and getattr(model, key.split(".")[1]):
            why = "contradict each other, as a norm takes the scaling of its weights out again"
            contradict(("optimizer.qk_clip", key), why, f"set optimizer.qk_clip=null, or {key}=false")
    if model.sigma_reparam and config.parallel.zero_stage == 3:
        why = "cannot go together, as the spectral norm needs whole weights before a step"
        contradict(("model.sigma_reparam", "parallel.zero_stage"), why, "set parallel.zero_stage=2 or 1")
    if config.loss.mu_loss and config.parallel.zero_stage == 3:
        why = "cannot go together, as the loss needs the whole output embedding"
        remedy = "set parallel.zero_stage=2 or 1, or optimizer.mu_centering=true in place of loss.mu_loss"
        contradict(("loss.mu_loss", "parallel.zero_stage"), why, remedy)
    if config.loss.mu_loss and config.optimizer.mu_centering:
        why = "leave the loss nothing to do, as the mean is zero already"
        contradict(("loss.mu_loss", "optimizer.mu_centering"), why, "set one of them only")
    return found


def _layout(config: Config) -> list[Problem]:
    model, parallel, found = config.model, config.parallel, []
    for name, value in (("heads", model.heads), ("kv_heads", model.groups), ("ffn_hidden", model.ffn)):
        if value % parallel.tensor and not (name == "kv_heads" and model.kv_heads is None):
            found.append(_indivisible(f"model.{name}", value, "parallel.tensor", parallel.tensor))
    if parallel.sequence and model.sequence_length % parallel.tensor:
        problem = _indivisible("model.sequence_length", model.sequence_length, "parallel.tensor", parallel.tensor)
        found.append(
            Problem(
                (*problem.keys, "parallel.sequence"),
                f"{problem.message}, or set parallel.sequence=false (true shards the sequence)",
            )
        )
    if model.layers < parallel.pipeline:
        found.append(
            Problem(
                ("model.layers", "parallel.pipeline"),
                f"model.layers {model.layers} cannot fill parallel.pipeline {parallel.pipeline}, as every stage needs "
                f"a block: set parallel.pipeline to at most {model.layers}, or more model.layers",
            )
        )
    if parallel.zero_stage >= 2 and parallel.pipeline > 1:
        found.append(
            Problem(
                ("parallel.zero_stage", "parallel.pipeline"),
                f"parallel.zero_stage {parallel.zero_stage} shards gradients, which parallel.pipeline "
                f"{parallel.pipeline} accumulates whole: set parallel.zero_stage=1, or parallel.pipeline=1",
            )
        )
    return found


def _batch(config: Config, world_size: int | None) -> list[Problem]:
    batch, parallel = config.batch, config.parallel
    ranks = parallel.tensor * parallel.pipeline
    if world_size is None:
        if batch.global_size % batch.micro_size:
            return [_indivisible("batch.global_size", batch.global_size, "batch.micro_size", batch.micro_size)]
        return []
    if world_size % ranks:
        return [
            Problem(
                ("parallel.tensor", "parallel.pipeline"),
                f"{world_size} ranks cannot be split by parallel.tensor {parallel.tensor} x parallel.pipeline "
                f"{parallel.pipeline} = {ranks}: start a multiple of {ranks} ranks, or change one of the two",
            )
        ]
    data = world_size // ranks
    if batch.global_size % (batch.micro_size * data):
        return [
            Problem(
                ("batch.global_size", "batch.micro_size"),
                f"batch.global_size {batch.global_size} is not divisible by batch.micro_size {batch.micro_size} x "
                f"{data} data-parallel ranks = {batch.micro_size * data}: set batch.global_size to "
                f"{_multiples(batch.global_size, batch.micro_size * data)}, or change batch.micro_size",
            )
        ]
    return []


def _stages(config: Config) -> list[Problem]:
    train, samples, found = config.data.train, [sample for sample, _ in config.data.stages], []
    if samples and samples[0] != 0:
        message = f"data.stages begins at sample {samples[0]}: the first stage must say what holds from sample 0 on"
        found.append(Problem(("data.stages",), message))
    for before, then in pairwise(samples):
        if before >= then:
            message = f"data.stages has sample {then} behind sample {before}: put them in order, each sample once"
            found.append(Problem(("data.stages",), message))
    if samples and samples[-1] >= LARGEST:
        found.append(Problem(("data.stages",), f"data.stages has sample {samples[-1]}: give one below {LARGEST}"))
    if samples and train is not None and not (isinstance(train, str) and train.endswith((".yaml", ".yml"))):
        message = (
            "data.stages and data.train both say which blend holds: leave data.train unset, as stages name prefixes "
            "themselves, or let it name a .yaml of sources"
        )
        found.append(Problem(("data.stages", "data.train"), message))
    return found


def _data(config: Config) -> list[Problem]:
    data, vocab_size, length, found = config.data, config.model.vocab_size, config.model.sequence_length, []
    default, (shortest, longest) = type(data)(), data.repetition_periods

    def problem(keys: tuple[str, ...], message: str) -> None:
        found.append(Problem(tuple(f"data.{key}" for key in keys), message))

    if data.document_mask and data.end_of_document is None and data.tokenizer is None:
        message = (
            "data.document_mask true does not know where documents end, as data.tokenizer and data.end_of_document are "
            "unset: set one of them, or data.document_mask=false"
        )
        problem(("document_mask", "end_of_document"), message)
    if data.end_of_document is not None and vocab_size is not None and data.end_of_document >= vocab_size:
        message = (
            f"data.end_of_document {data.end_of_document} is not in the vocabulary, model.vocab_size {vocab_size}: "
            "name the token id between documents, or leave it unset to take the tokenizer's"
        )
        problem(("end_of_document",), message)
    if data.end_of_document is not None and not data.document_mask:
        message = (
            f"data.end_of_document {data.end_of_document} has no effect with data.document_mask false: "
            "set data.document_mask=true, or data.end_of_document=null"
        )
        problem(("end_of_document", "document_mask"), message)
    if data.repetition_filter is None and data.repetition_periods != default.repetition_periods:
        message = (
            f"data.repetition_periods {list(data.repetition_periods)} has no effect with data.repetition_filter null: "
            f"set data.repetition_filter=32, or data.repetition_periods={list(default.repetition_periods)}"
        )
        problem(("repetition_periods", "repetition_filter"), message)
    if shortest > longest:
        problem(
            ("repetition_periods",),
            f"data.repetition_periods [{shortest}, {longest}] ends before it begins: give [shortest, longest]",
        )
    elif data.repetition_filter is not None and data.repetition_filter * shortest > length + 1:
        message = (
            f"data.repetition_filter {data.repetition_filter} times data.repetition_periods {shortest} tokens are more "
            f"than a sample has, model.sequence_length {length} + 1: lower the first, or set it to null"
        )
        problem(("repetition_filter", "repetition_periods"), message)
    return found


def _optimization(config: Config) -> list[Problem]:
    precision = config.precision
    found = [*_schedule(config), *_decay(config), *_optimizer(config), *_parametrization(config)]
    if precision.reduce_dtype not in ("fp32", precision.dtype):
        found.append(
            Problem(
                ("precision.reduce_dtype", "precision.dtype"),
                f"precision.reduce_dtype {precision.reduce_dtype} with precision.dtype {precision.dtype}: gradients "
                "are summed in fp32 or in the dtype of the model",
            )
        )
    if precision.reduce_dtype == "fp16" and config.model.tied_embeddings and config.parallel.pipeline > 1:
        found.append(
            Problem(
                ("precision.reduce_dtype", "model.tied_embeddings"),
                "precision.reduce_dtype fp16 rounds the gradients of model.tied_embeddings differently on the two "
                "pipeline stages that hold them: set precision.reduce_dtype=fp32",
            )
        )
    if precision.dtype == "fp16" and 2**precision.initial_scale_power < precision.min_scale:
        found.append(
            Problem(
                ("precision.initial_scale_power", "precision.min_scale"),
                f"precision.initial_scale_power {precision.initial_scale_power} is a loss scale of "
                f"{2**precision.initial_scale_power}, below precision.min_scale {precision.min_scale:g}: "
                "raise the first or lower the second",
            )
        )
    return found


def _schedule(config: Config) -> list[Problem]:
    optimizer, schedule, steps, found = config.optimizer, config.schedule, config.run.steps, []
    warmup, what = config.warmup_steps, f"schedule.warmup_steps {schedule.warmup_steps}"
    key = "schedule.warmup_steps"
    if schedule.warmup_tokens is not None:
        key = "schedule.warmup_tokens"
        what = f"schedule.warmup_tokens {schedule.warmup_tokens} ({warmup} steps)"
        if schedule.warmup_steps != type(schedule)().warmup_steps:
            found.append(
                Problem(
                    ("schedule.warmup_tokens", "schedule.warmup_steps"),
                    f"schedule.warmup_tokens {schedule.warmup_tokens} and schedule.warmup_steps "
                    f"{schedule.warmup_steps} are both set: leave one of them out",
                )
            )
    if schedule.kind != "constant":
        if schedule.min_learning_rate > optimizer.learning_rate:
            found.append(
                Problem(
                    ("schedule.min_learning_rate", "optimizer.learning_rate"),
                    f"schedule.min_learning_rate {schedule.min_learning_rate:g} is above optimizer.learning_rate "
                    f"{optimizer.learning_rate:g}, so the rate would rise: lower the first, for example to "
                    f"{optimizer.learning_rate / 10:g}",
                )
            )
        if warmup >= steps:
            found.append(
                Problem(
                    (key, "run.steps"),
                    f"{what} leave nothing of run.steps {steps} for the "
                    f"{schedule.kind} decay: set {key} below {_warmup_limit(config, steps)}, or more run.steps",
                )
            )
        elif schedule.kind == "wsd" and warmup > (start := steps - round(steps * schedule.decay_fraction)):
            found.append(
                Problem(
                    (key, "schedule.decay_fraction", "run.steps"),
                    f"{what} end after step {start}, where "
                    f"schedule.decay_fraction {schedule.decay_fraction:g} of run.steps {steps} begins: lower one",
                )
            )
    return found


def _warmup_limit(config: Config, steps: int) -> int:
    return steps if config.schedule.warmup_tokens is None else steps * config.tokens_per_step


def _optimizer(config: Config) -> list[Problem]:
    optimizer, found = config.optimizer, []
    default = type(optimizer)()
    if optimizer.independent_weight_decay and optimizer.weight_decay and not optimizer.learning_rate:
        found.append(
            Problem(
                ("optimizer.independent_weight_decay", "optimizer.learning_rate"),
                "optimizer.independent_weight_decay true follows learning rate / optimizer.learning_rate, which is 0: "
                "set it above 0, or optimizer.independent_weight_decay=false",
            )
        )
    if config.model.tied_embeddings and ("head" in optimizer.no_decay) != ("embeddings" in optimizer.no_decay):
        found.append(
            Problem(
                ("optimizer.no_decay", "model.tied_embeddings"),
                f"optimizer.no_decay {list(optimizer.no_decay)} names one of head and embeddings, which "
                "model.tied_embeddings true makes one matrix: name both or neither, or set model.tied_embeddings=false",
            )
        )
    if optimizer.clipping == "global_norm":
        keys = ("clipping_threshold", "clipping_decay", "clipping_warmup")
        found += [
            _idle(config, key, "clipping", "zclip or adagc", "null")
            for key in keys
            if getattr(optimizer, key) is not None
        ]
    if optimizer.muon_momentum != default.muon_momentum and optimizer.name != "muon":
        found.append(_idle(config, "muon_momentum", "name", "muon", f"{default.muon_momentum:g}"))
    if optimizer.name == "muon":
        found += [
            _idle(config, key, "name", "adamw or stable_adamw", "null")
            for key in ("spike_threshold", "momentum_reset_every")
            if getattr(optimizer, key) is not None
        ]
    if optimizer.qk_clip is None and optimizer.qk_clip_alpha != default.qk_clip_alpha:
        found.append(_idle(config, "qk_clip_alpha", "qk_clip", "100", f"{default.qk_clip_alpha:g}"))
    every, warmup = optimizer.momentum_reset_every, optimizer.momentum_reset_warmup
    if every is None and warmup != default.momentum_reset_warmup:
        found.append(
            _idle(config, "momentum_reset_warmup", "momentum_reset_every", "500", f"{default.momentum_reset_warmup}")
        )
    if every is not None and warmup >= every:
        found.append(
            Problem(
                ("optimizer.momentum_reset_warmup", "optimizer.momentum_reset_every"),
                f"optimizer.momentum_reset_warmup {warmup} does not end before the next reset, "
                f"optimizer.momentum_reset_every {every} steps later: lower the first, or raise the second",
            )
        )
    return found


def _decay(config: Config) -> list[Problem]:
    schedule = config.schedule
    default = type(schedule)().decay_fraction
    if schedule.kind == "wsd" or schedule.decay_fraction == default:
        return []
    message = (
        f"schedule.decay_fraction {schedule.decay_fraction:g} has no effect with schedule.kind {schedule.kind}: "
        f"set schedule.kind=wsd, or schedule.decay_fraction={default:g}"
    )
    return [Problem(("schedule.decay_fraction", "schedule.kind"), message)]


def _parametrization(config: Config) -> list[Problem]:
    optimizer, model, found = config.optimizer, config.model, []
    default, name = type(optimizer)(), optimizer.parametrization
    if optimizer.name == "muon" and name != "standard":
        found.append(_idle(config, "parametrization", "name", "adamw or stable_adamw", "standard"))
    if optimizer.base_width != default.base_width and name == "standard":
        found.append(
            _idle(config, "base_width", "parametrization", "mu_simple, mu_full or complete_p", f"{default.base_width}")
        )
    if optimizer.base_depth != default.base_depth and name != "complete_p":
        found.append(_idle(config, "base_depth", "parametrization", "complete_p", f"{default.base_depth}"))
    init = {"mu_simple": "fan_in", "mu_full": "fan_in", "complete_p": "fixed"}.get(name, model.init)
    if model.init != init:
        found.append(
            Problem(
                ("optimizer.parametrization", "model.init"),
                f"optimizer.parametrization {name} is defined on the initial values of model.init {init}, "
                f"but model.init is {model.init}: set model.init={init}, or optimizer.parametrization=standard",
            )
        )
    return found


def _idle(config: Config, key: str, master: str, needs: str, default: str) -> Problem:
    """A field of the optimizer that another one leaves without effect."""
    value, has = getattr(config.optimizer, key), getattr(config.optimizer, master)
    return Problem(
        (f"optimizer.{key}", f"optimizer.{master}"),
        f"optimizer.{key} {value} has no effect with optimizer.{master} {'null' if has is None else has}: "
        f"set optimizer.{master} to {needs}, or optimizer.{key}={default}",
    )


def _guard(config: Config) -> list[Problem]:
    guard, found = config.guard, []
    if guard.drop_spikes and guard.mode in ("off", "watch"):
        found.append(
            Problem(
                ("guard.drop_spikes", "guard.mode"),
                f"guard.drop_spikes true has no effect with guard.mode {guard.mode}, which makes every update: "
                "set guard.mode to drop or recover, or guard.drop_spikes=false",
            )
        )
    if guard.collapse is not None and guard.mode == "off":
        message = f"guard.collapse {guard.collapse:g} has no effect with guard.mode off: set guard.mode=watch"
        found.append(Problem(("guard.collapse", "guard.mode"), message))
    found += _surgery(config)
    if guard.warmup > guard.window:
        found.append(
            Problem(
                ("guard.warmup", "guard.window"),
                f"guard.warmup {guard.warmup} is more than guard.window {guard.window} ever holds: lower the first",
            )
        )
    for first, last in config.data.skip:
        if first > last:
            message = f"data.skip [{first}, {last}] ends before it begins: give [first, last], inclusive"
            found.append(Problem(("data.skip",), message))
    return found


def _surgery(config: Config) -> list[Problem]:
    guard = config.guard
    if guard.surgery is None:
        return []
    if guard.mode != "recover":
        message = (
            f"guard.surgery {guard.surgery} has no effect with guard.mode {guard.mode}, which never goes back: set "
            "guard.mode=recover, or guard.surgery=null"
        )
        return [Problem(("guard.surgery", "guard.mode"), message)]
    after = config.model_copy(update={"model": config.model.model_copy(update=RECIPES[guard.surgery])})
    return [
        Problem(("guard.surgery", *problem.keys), f"guard.surgery {guard.surgery} cannot be: {problem.message}")
        for problem in [*refusals(config, after), *_model(after)]
    ]


def _indivisible(key: str, value: int, by: str, divisor: int) -> Problem:
    message = (
        f"{key} {value} is not divisible by {by} {divisor}: set {key} to {_multiples(value, divisor)}, or change {by}"
    )
    return Problem((key, by), message)


def _multiples(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"
