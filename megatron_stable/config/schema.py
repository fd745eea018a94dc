"""What a run is: the typed configuration, one class per section of the YAML.

The docstring under a field is its documentation: the reference page and the commented file that
``megatron-stable init`` writes are generated from it. Values are plain; whatever follows from them
(padded vocabulary, gradient accumulation, DeepSpeed's JSON) is derived where it is used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.sizes import SIZES

DecayRate = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(gt=0, le=1)]
Verbosity: TypeAlias = Literal["quiet", "normal", "debug"]
ProbeGroup: TypeAlias = Literal["outputs", "attention", "logits", "weights", "gradients", "updates", "moments", "noise"]
PROBE_GROUPS: tuple[ProbeGroup, ...] = get_args(ProbeGroup)
GATED = ("swiglu", "geglu")  # non-linearities of two halves, gate and up
Prefixes = Annotated[tuple[str, ...], Field(min_length=1)]
Blend = Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]


class Section(BaseModel):
    """A section of the configuration: immutable, and no key that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where the field is not a flag: to Python they are the numbers 1 and 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("true and false are not numbers")
        return value


class RunConfig(Section):
    directory: str = "runs/first"
    """The run's directory: everything the run writes is below it."""
    steps: int = Field(1000, ge=1)
    """Optimizer steps to train, in all."""
    seed: int = Field(1234, ge=0)
    """Seed of initialisation, data order and dropout."""
    join_timeout: int = Field(300, ge=1)
    """Seconds that ranks wait at the start for all others to begin; then the run ends, and says which did not."""
    patience: int = Field(300, ge=1)
    """With several ranks: seconds after which the run has ended everywhere, with the name of the rank, when one falls
    silent or gets nothing done. Half a minute of it is for telling all: it must be longer by that than the slowest
    step, batch of an evaluation, or compilation. Starting up and checkpoints may take longer by themselves."""
    on_hangup: Literal["stop", "continue"] = "stop"
    """What to do when the terminal is closed, the connection breaks or the launcher is killed: save and stop, or train
    on unseen. Started with nohup, a run goes on."""
    deterministic: bool = False
    """On a GPU: the same bits each time, from kernels that add in a fixed order; slower. A kernel that cannot ends the
    run. On a CPU it is so anyway."""
    apex: Literal["auto", "never", "require"] = "auto"
    """On a GPU: NVIDIA's apex for AdamW and RMSNorm; auto: where every rank has it, it gives PyTorch's numbers, and
    `deterministic` is not asked for; never: PyTorch's kernels; require: the run ends where apex cannot be used."""


class ModelConfig(Section):
    size: Literal[tuple(SIZES)] | None = "tiny"  # type: ignore[valid-type]
    """A named shape; a field given beside it overrides it."""
    recipe: Literal[tuple(RECIPES)] = "baseline"  # type: ignore[valid-type]
    """A named set of stability knobs; a field given beside it overrides it."""

    layers: int = Field(4, ge=1)
    """Transformer blocks."""
    hidden: int = Field(256, ge=1)
    """Width of the residual stream."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    kv_heads: int | None = Field(None, ge=1)
    """Key/value heads (grouped-query attention, arXiv 2305.13245); null: as many as `heads`."""
    head_width: int | None = Field(None, ge=1)
    """Width of an attention head; null: hidden / heads."""
    ffn_hidden: int | None = Field(None, ge=1)
    """Width of the MLP; null: 4 x hidden, for swiglu and geglu 8/3 x hidden rounded up to a multiple of 64."""
    sequence_length: int = Field(256, ge=1)
    """Tokens per sample."""
    vocab_size: int | None = Field(None, ge=2)
    """Vocabulary size; null: that of the tokenizer."""

    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of every norm."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance in every norm."""
    positions: Literal["rope", "learned", "none"] = "rope"
    """Position information: rotary (arXiv 2104.09864), a learned table, or none."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    activation: Literal["gelu", "gelu_erf", "squared_relu", "swiglu", "geglu"] = "gelu"
    """Non-linearity of the MLP; gelu: in its tanh form, gelu_erf: as it is defined (GPT-NeoX, nanoGPT; arXiv
    1606.08415; on a CPU the faster), squared_relu: arXiv 2109.08668, swiglu and geglu (Gemma): arXiv 2002.05202."""
    bias: bool = False
    """Biases in linear layers and LayerNorm."""
    tied_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout after the embedding, Proj and FC2."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the attention probabilities."""

    init: Literal["fan_in", "fixed"] = "fan_in"
    """fan_in: truncated normal, std 1/sqrt(fan-in), embedding std 1/sqrt(hidden) (arXiv 2309.14322);
    fixed: normal with `init_std`."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of init=fixed."""
    init_scaled_output: bool = False
    """Scale the initial Proj and FC2 by 1/sqrt(2 x layers) (GPT-2)."""

    attention_input_norm: bool = True
    """Norm on the input of attention (pre-norm); false for qkv_norm (arXiv 2410.16682) and olmo2 (arXiv 2501.00656)."""
    mlp_input_norm: bool = True
    """Norm on the input of the MLP."""
    attention_output_norm: bool = False
    """Norm on the output of Proj, before it joins the residual stream (arXiv 2105.13290, 2502.02732)."""
    mlp_output_norm: bool = False
    """Norm on the output of FC2, before it joins the residual stream."""
    deepnorm: bool = False
    """Post-norm x = norm(alpha x + f(x)), alpha = (2 x layers)^(1/4), with the values' part of QKV, Proj, FC1 and FC2
    initially divided by (8 x layers)^(1/4) and no other norm at the end (arXiv 2203.00555)."""
    layer_scale: float | None = Field(None, gt=0)
    """LayerScale: a learned factor per feature on what attention and MLP add to the residual stream, and its initial
    value (arXiv 2103.17239: 1e-4 to 1e-6, smaller for deeper models); null: none."""
    qk_norm: bool = False
    """Norm on queries and keys (arXiv 2302.05442)."""
    v_norm: bool = False
    """Norm on values (arXiv 2410.16682)."""
    qk_norm_scope: Literal["head", "full"] = "head"
    """What the norms on queries, keys and values take together: each head, with one weight for all heads, or all heads
    (arXiv 2501.00656), for which TP exchanges the statistics."""
    attention_temperature: float = Field(1.0, gt=0)
    """Factor of attention logits, beside 1/sqrt(head width); soft_temp is 0.5 (arXiv 2410.16682)."""
    attention_cap: float | None = Field(None, gt=0)
    """Cap attention logits softly: c x tanh(logit / c) (Gemma 2); null: no cap."""
    attention_clip: tuple[Annotated[float, Field(le=0)], Annotated[float, Field(ge=1)]] | None = None
    """[gamma, zeta]: attention probabilities are clip((zeta - gamma) x softmax + gamma, 0, 1), so that they can be
    exactly 0 and 1 (arXiv 2306.12929); null: the softmax itself."""
    sigma_reparam: bool = False
    """sigmaReparam: the matrices of the blocks are gamma / sigma(W) x W, sigma the spectral norm, gamma learned
    (arXiv 2303.06296)."""
    embedding_scale: bool = False
    """Multiply token embeddings by sqrt(hidden) (arXiv 2312.16903)."""
    embedding_norm: bool = False
    """Norm on token embeddings (arXiv 2312.16903, BLOOM)."""
    embedding_gradient: float = Field(1.0, gt=0, le=1)
    """Factor of the token embedding's gradient, as in GLM-130B (arXiv 2210.02414: 0.1)."""
    final_logit_cap: float | None = Field(None, gt=0)
    """Cap output logits softly: c x tanh(logit / c) (Gemma 2: 30); null: no cap."""

    attention: Literal["auto", "math", "sdpa", "flex", "flash"] = "auto"
    """Attention backend; auto: the fastest that computes the recipe exactly on the device; math: every step in plain
    sight; sdpa: PyTorch's fused kernels; flex: FlexAttention (GPU); flash: FlashAttention-3 or -2, as installed (GPU,
    bf16 and fp16), which auto takes for caps if it works on all ranks (docs/gpu.md)."""
    activation_checkpointing: Literal["none", "full"] | Annotated[int, Field(ge=1)] = "none"
    """Recompute activations in backward: none, full (every block), or k: every k-th block."""
    compile: bool | Literal["auto"] = "auto"
    """Compile each block with torch.compile; auto: on a GPU, where a small block has come out right on every rank, but
    not under ZeRO-3 or `run.deterministic`."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, given: Any) -> Any:
        """Fill in what `size` and `recipe` name, below what the user gave."""
        if not isinstance(given, dict):
            return given
        size, recipe = given.get("size", "tiny"), given.get("recipe", "baseline")
        shape = SIZES.get(size, {}) if isinstance(size, str) else {}
        knobs = RECIPES.get(recipe, {}) if isinstance(recipe, str) else {}
        return {**shape, **knobs, **given}

    @property
    def head_dim(self) -> int:
        """Width of one attention head, resolved."""
        return self.head_width or self.hidden // self.heads

    @property
    def groups(self) -> int:
        """Key/value heads, resolved."""
        return self.kv_heads or self.heads

    @property
    def ffn(self) -> int:
        """Width of the MLP, resolved."""
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        return -(-8 * self.hidden // (3 * 64)) * 64 if self.gated else 4 * self.hidden

    @property
    def gated(self) -> bool:
        """Whether FC1 holds a gate and an up projection."""
        return self.activation in GATED


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks (TP)."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages (PP)."""
    sequence: bool = False
    """Sequence parallelism: shard norm and dropout regions along the sequence over the TP ranks (arXiv 2205.05198)."""
    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage; 2 and 3 need pipeline 1. With one data-parallel rank, stage 1 does what stage 0 would."""


class PrecisionConfig(Section):
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of weights and activations in forward and backward.
    Masters, moments and gradient accumulation are fp32."""
    reduce_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In what gradients are summed over replicas. ``dtype`` instead of fp32 halves what is sent and rounds sums."""
    initial_scale_power: int = Field(16, ge=0, le=32)
    """fp16: the first loss scale is 2 to this power."""
    scale_window: int = Field(1000, ge=1)
    """fp16: steps without overflow before the loss scale doubles."""
    hysteresis: int = Field(2, ge=1)
    """fp16: overflows before the loss scale halves."""
    min_scale: float = Field(1.0, gt=0)
    """fp16: floor of the loss scale."""


class BatchConfig(Section):
    global_size: int = Field(16, ge=1)
    """Sequences per optimizer step, over all ranks."""
    micro_size: int = Field(4, ge=1)
    """Sequences per forward pass of one rank."""


class DataConfig(Section):
    tokenizer: str | None = None
    """A SentencePiece model, a tokenizer.json, or a directory that holds one of them."""
    train: str | Prefixes | Blend | None = None
    """Training data: prefix of a .bin/.idx or of shards, a glob, a list of these, a blend {prefix: weight, ...}, or a
    .yaml of sources with names and weights."""
    stages: tuple[tuple[Annotated[int, Field(ge=0)], Blend], ...] = ()
    """Blends that change in mid-run: [sample, {source: weight, ...}], each from a sample of the data order on, the
    first from 0. With a .yaml under `train`, sources are its names, and weights in it do not hold; without `train`,
    they are prefixes or globs. Each source goes on where it was left. What changes in it on a resume holds from there
    on."""
    validation: str | Prefixes | Blend | None = None
    """Validation data, given like `train`; null: no evaluation."""
    document_mask: bool = False
    """Keep attention and positions within documents, of which a sample holds several or parts: each begins at position
    0 and sees nothing of the one before it, in training and in evaluation."""
    end_of_document: int | None = Field(None, ge=0)
    """For `document_mask`: the token id that stands between documents; null: the tokenizer's."""
    repetition_filter: int | None = Field(None, ge=2)
    """Leave samples out of the loss in which a few tokens come so often in a row, or more (OLMo 2, arXiv 2501.00656:
    32); null: train on all. Validation is not filtered."""
    repetition_periods: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 13)
    """For `repetition_filter`: how few and how many tokens may be what is repeated, [shortest, longest]."""
    skip: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], ...] = ()
    """Windows of data steps that are not trained on, [first, last], inclusive and counted from 1 as the run counts
    them when it first sees the window, which then stands for the same samples whatever becomes of the batch size; the
    guard and `megatron-stable skip` add others, which are kept in the run's interventions.json."""


class OptimizerConfig(Section):
    name: Literal["adamw", "stable_adamw", "muon"] = "adamw"
    """adamw; stable_adamw: AdamW with a bound on each parameter's step, in place of clipping (arXiv 2304.13013); muon:
    orthogonalised momentum for the matrices of the blocks (arXiv 2502.16982), AdamW for all else."""
    learning_rate: float = Field(3.0e-4, ge=0)
    """Peak learning rate."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    eps: float = Field(1.0e-8, gt=0)
    """Added to the root of the second moment; 1e-15 works, and large models need less than 1e-8 (arXiv 2309.14322)."""
    muon_momentum: DecayRate = 0.95
    """muon: decay rate of the momentum."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay, multiplied by the learning rate unless `independent_weight_decay`."""
    independent_weight_decay: bool = False
    """Multiply weight decay by the schedule's factor (learning rate / peak) alone, so that it does not depend on the
    peak's value (arXiv 2309.14322, which uses 1e-4)."""
    no_decay: tuple[Literal["norms", "biases", "embeddings", "head"], ...] = ("norms", "biases")
    """Kinds of parameters without weight decay; norms stands for all vectors that are not biases."""
    clip_grad: float = Field(1.0, ge=0)
    """Clip the global gradient norm to this; 0: do not clip."""
    clipping: Literal["global_norm", "zclip", "adagc"] = "global_norm"
    """Clipping rule; zclip: at `clip_grad`, and below it where the norm is an outlier (arXiv 2504.02507); adagc: each
    parameter at a multiple of its usual norm (arXiv 2502.11034), with `clip_grad` for the warm-up only."""
    clipping_threshold: float | None = Field(None, gt=0)
    """zclip: z-score of an outlier, null: 2.5; adagc: multiple of the usual norm, null: 1.05 (sources differ)."""
    clipping_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay rate of the rule's moving statistics; null: 0.97 for zclip, 0.98 for adagc."""
    clipping_warmup: int | None = Field(None, ge=2)
    """Steps before the rule has statistics; null: 25 for zclip, 100 for adagc."""
    spike_threshold: float | None = Field(None, gt=0)
    """Clip a gradient's elements to the root of this times their second moment (SPAM, arXiv 2501.06842: 5000);
    null: do not."""
    momentum_reset_every: int | None = Field(None, ge=1)
    """Zero the moments every so many steps; null: never (SPAM: 500)."""
    momentum_reset_warmup: int = Field(150, ge=0)
    """Steps in which the learning rate rises again after a reset of the moments."""
    qk_clip: float | None = Field(None, gt=0)
    """QK-Clip: after each update, scale down queries and keys of heads whose largest attention logit was above this
    (arXiv 2507.20534, with muon: 100); null: do not."""
    qk_clip_alpha: float = Field(0.5, ge=0, le=1)
    """QK-Clip: the share of the scaling that queries take, as an exponent; keys take the rest."""
    parametrization: Literal["standard", "mu_simple", "mu_full", "complete_p"] = "standard"
    """How learning rate, eps, decay, initialisation and multipliers follow from a base model's (see
    `megatron_stable/config/parametrization.py`); mu_simple and mu_full: arXiv 2309.14322, complete_p: 2505.01618."""
    base_width: int = Field(256, ge=1)
    """Parametrization: `model.hidden` of the base model."""
    base_depth: int = Field(2, ge=1)
    """complete_p: `model.layers` of the base model."""
    mu_centering: bool = False
    """Take the mean over the vocabulary out of the output embedding after each step (arXiv 2601.02031); tied embeddings
    are centred as the one matrix that they are."""


class ScheduleConfig(Section):
    kind: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    """Shape of the learning rate after warm-up; wsd: constant, then linear decay over the last `decay_fraction`."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up from 0."""
    warmup_tokens: int | None = Field(None, ge=0)
    """Tokens of linear warm-up, in place of `warmup_steps`; rounded up to whole steps."""
    min_learning_rate: float = Field(3.0e-5, ge=0)
    """Learning rate at the end of the decay."""
    decay_fraction: float = Field(0.1, gt=0, le=1)
    """wsd: the fraction of the run's steps that decay."""
    rewarm: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None = None
    """[step, steps]: behind that step the learning rate rises again, over so many steps, from 0 to where the schedule
    stands; surgery sets it (docs/surgery.md)."""


class LossConfig(Section):
    z_loss: float = Field(0.0, ge=0)
    """Coefficient of log(Z)^2, which keeps output logits from drifting (PaLM: 1e-4)."""
    mu_loss: float = Field(0.0, ge=0)
    """Coefficient of the squared norm of the output embedding's mean over the vocabulary, to the same end
    (arXiv 2601.02031: 1e-4)."""


class GuardConfig(Section):
    mode: Literal["off", "watch", "drop", "recover"] = "recover"
    """off: nothing watches; watch: spikes are found and recorded; drop: besides, updates with a loss that is not finite
    are not made, and too many of these end the run; recover: the run goes back to a healthy checkpoint instead, and
    skips the data. Updates with gradients that are not finite are never made."""
    threshold: float = Field(8.0, gt=0)
    """A spike rises so many median absolute deviations above the median of recent steps."""
    window: int = Field(256, ge=15)
    """Recent steps behind that median and those deviations."""
    warmup: int = Field(50, ge=1)
    """Steps before spikes are looked for."""
    patience: int = Field(16, ge=1)
    """A rise of the loss that has not fallen back after so many steps, and is not on its way back, is asked about: the
    model evaluates batches from before it and recent ones, and, if need be, so does the last healthy checkpoint. If
    the state is to blame, it is a divergence; if the data are, a shift. Asked again after as many steps, after twice
    as many, and so on."""
    drift: float = Field(0.1, gt=0)
    """A loss that has risen above its lowest level by this part of it, however slowly, is asked about as well."""
    collapse: float | None = Field(None, gt=0)
    """Once the run has lost this part of all that it had learnt, and not regained it for `collapse_steps`, it ends with
    exit code 3, or in mode recover goes back; 1: all; null: do not look. Sweeps set 0.5 (docs/sweep.md)."""
    collapse_steps: int = Field(50, ge=1)
    """Steps for which what was learnt must be lost."""
    drop_spikes: bool = False
    """Do not make updates at a spike of loss or gradient norm either (as OLMo-core's SkipStep does)."""
    max_consecutive_drops: int = Field(10, ge=1)
    """So many dropped updates in a row ask for recovery."""
    max_drops: int = Field(50, ge=1)
    """So many dropped updates within 1000 steps ask for recovery."""
    rollback_steps: int = Field(100, ge=0)
    """Recovery goes back to a healthy checkpoint at least so many steps before the onset (PaLM, WeLM: about 100)."""
    skip_steps: int = Field(200, ge=1)
    """Recovery skips so many data steps, half of them before the onset (PaLM: 200 to 500, WeLM: 200)."""
    near_steps: int = Field(300, ge=1)
    """Trouble that begins less than so many steps after the last is at the same place: the next attempt. A loss that
    has risen slowly for longer is asked about and recorded, but there is no recovery."""
    max_rollbacks: int = Field(3, ge=0)
    """Attempts at one place, after which the run ends with exit code 3."""
    widen: tuple[Annotated[float, Field(ge=1)], ...] = Field((1.0, 2.0, 4.0), min_length=1)
    """By attempt, the last one for all further: factor of `rollback_steps` and `skip_steps`."""
    learning_rate_factors: tuple[Factor, ...] = Field((1.0, 0.7, 0.7), min_length=1)
    """By attempt: what the learning rate is multiplied by from then on."""
    clip_factors: tuple[Factor, ...] = Field((1.0, 1.0, 0.5), min_length=1)
    """By attempt: what `optimizer.clip_grad` is multiplied by from then on."""
    surgery: Literal[tuple(RECIPES)] | None = None  # type: ignore[valid-type]
    """The last rung, once attempts are used up: the run goes back to a healthy checkpoint, takes this recipe's knobs on
    (`qk_norm`, `qk_norm_cap`, ...), warms up again and goes on; null: it ends with exit code 3 (docs/surgery.md)."""
    surgery_rewarm: int = Field(100, ge=1)
    """Steps of this warm-up."""


class CheckpointConfig(Section):
    every: int = Field(100, ge=1)
    """Steps between checkpoints; one is always written at the end."""
    keep: int = Field(3, ge=1)
    """So many of the newest checkpoints are kept, and always those not judged yet, the newest healthy one, and healthy
    ones for rollbacks."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints at multiples of this step are kept for ever; null: none."""
    healthy_after: int = Field(50, ge=1)
    """A checkpoint is healthy once so many further steps have passed without a spike of the loss, a dropped update or a
    loss that is not finite."""
    on_signal: bool = True
    """Save when SIGTERM or Ctrl-C ends the run; false: leave at once, and repeat the steps since the last one."""
    max_failed_saves: int = Field(3, ge=1)
    """So many saves in a row that fail end the run, with exit code 1; training waits for the last of them, and for one
    that is not complete when a further one has been due so many times. 1: training waits for each."""


class LoggingConfig(Section):
    every: int = Field(1, ge=1)
    """Steps between records in metrics.jsonl, TensorBoard and on the progress line."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = Field(None, min_length=1)
    """Project on Weights & Biases to log to, too (`pip install 'megatron-stable[wandb]'`; WANDB_MODE=offline works
    without an account); `null`: none."""
    verbosity: Verbosity = "normal"
    """What is on the terminal: `quiet`: events, warnings, errors and the end; `normal`: the progress line, too;
    `debug`: what DeepSpeed and torch say, too."""
    probes_every: int = Field(10, ge=0)
    """Steps between measurements inside the model (docs/probes.md), recorded in metrics.jsonl and TensorBoard; 0: none.
    While the guard sees trouble, each step is measured."""
    probes: tuple[ProbeGroup, ...] = PROBE_GROUPS
    """What is measured."""
    probe_positions: int = Field(64, ge=1)
    """Positions per sequence, evenly spaced, whose attention and output logits are looked at."""
    probe_heads: bool = False
    """Record attention of each head, too, not of each layer alone."""
    histograms_every: int = Field(0, ge=0)
    """Steps between histograms of the outputs of linear layers, for TensorBoard; 0: none."""
    flight_recorder: int = Field(50, ge=0)
    """Measured steps that stay on the device, and are written to flight/ when the guard sees trouble; 0: no files."""
    flight_every: int = Field(0, ge=0)
    """Steps between measurements for the flight recorder alone; 0: it has those that are recorded."""
    warnings: bool = True
    """Warn when what is measured inside the model foretells trouble (docs/warnings.md)."""


class EvaluationConfig(Section):
    every: int = Field(100, ge=1)
    """Steps between evaluations; one is always made at the end."""
    batches: int = Field(10, ge=1)
    """Global batches per evaluation; always the same ones."""


class Config(Section):
    """A whole run: one YAML file and `key=value` overrides; there are no other knobs."""

    run: RunConfig = RunConfig()
    """Where the run goes and how long it is."""
    model: ModelConfig = ModelConfig()
    """The Transformer: its shape, its parts and its stability knobs."""
    parallel: ParallelConfig = ParallelConfig()
    """How the ranks share the work; data parallel is what is left of the world: ranks / (tensor x pipeline)."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats, and the loss scale of fp16."""
    batch: BatchConfig = BatchConfig()
    """Batch sizes, in sequences; gradients accumulate over global_size / (micro_size x data-parallel ranks) passes."""
    data: DataConfig = DataConfig()
    """Where text comes from: what `megatron-stable tokenizer` and `megatron-stable preprocess` wrote."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer and its clipping."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the run."""
    loss: LossConfig = LossConfig()
    """Terms beside the cross-entropy."""
    guard: GuardConfig = GuardConfig()
    """What watches over the run: spikes, dropped updates, going back to a healthy checkpoint."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints, below `run.directory`/checkpoints."""
    logging: LoggingConfig = LoggingConfig()
    """What is recorded, and how often."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation loss while training."""

    def by_key(self) -> dict[str, Any]:
        """All fields as JSON has them, by dotted key: ``run.steps``."""
        sections = self.model_dump(mode="json")
        return {f"{section}.{field}": value for section, fields in sections.items() for field, value in fields.items()}

    @property
    def tokens_per_step(self) -> int:
        """Tokens that an optimizer step trains on."""
        return self.batch.global_size * self.model.sequence_length

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up, resolved."""
        if self.schedule.warmup_tokens is None:
            return self.schedule.warmup_steps
        return -(-self.schedule.warmup_tokens // self.tokens_per_step)
