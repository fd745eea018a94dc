"""The classes of `transformers` that compute what a configuration of ours says: knob by knob, key by key.

A family fixes some knobs, for others has a key of ``config.json``. A model is of the first family whose fixed knobs it
has. The table is read in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_stable.convert.huggingface import names
from megatron_stable.convert.huggingface.function import PLAIN, called, usual_width
from megatron_stable.convert.huggingface.names import Knobs, Map
from megatron_stable.errors import DataError

REQUIRED: Any = object()  # a key that has to be there


class Key(NamedTuple):
    """A key of theirs that says what a knob of ours is.

    Attributes:
        default: What `transformers` takes where it is absent; a function of the knobs found so far.
        theirs: From our value to theirs.
        ours: From theirs to ours.
        only: The values of the knob that the class has; empty: all.
    """

    name: str
    knob: str
    default: Any = REQUIRED
    theirs: Callable[[Any], Any] = lambda value: value
    ours: Callable[[Any], Any] = lambda value: value
    only: tuple[Any, ...] = ()


class Fixed(NamedTuple):
    """A key of theirs that must have one of some values; the first is what is written.

    Attributes:
        default: What `transformers` takes where it is absent.
    """

    values: tuple[Any, ...]
    default: Any


@dataclass(frozen=True)
class Family:
    """A class of `transformers`.

    Attributes:
        name: Its ``model_type``.
        architecture: The class.
        knobs: Ours, at the values that the class computes; the others of :data:`PLAIN` are as they are there. A
            function: of all knobs.
        keys: Of config.json, for the knobs that are free.
        fixed: Keys of config.json that are not.
        names: Of tensors, by those of our modules.
        extra: Further keys that are written.
        window: How many tokens a config.json lets attention look back; ``None``: it does not say.
    """

    name: str
    architecture: str
    knobs: Knobs
    keys: tuple[Key, ...]
    fixed: dict[str, Fixed]
    names: Callable[[Knobs], dict[str, Map]]
    extra: Callable[[Knobs], dict[str, Any]] = lambda knobs: {}
    window: Callable[[dict[str, Any]], int | None] = lambda config: None

    def misfit(self, knobs: Knobs) -> str | None:
        """The knob that the class does not have at that value, as users call it; ``None``: it computes just this."""
        free = {key.knob for key in self.keys}
        for key in self.keys:
            if key.only and knobs[key.knob] not in key.only:
                return f"{called(key.knob)} {knobs[key.knob]} (there it is one of {', '.join(key.only)})"
        for knob, value in (PLAIN | self.knobs).items():
            wanted = value(knobs) if callable(value) else value
            if knob not in free and knobs[knob] != wanted:
                return f"{called(knob)} {knobs[knob]} (there it is {wanted})"
        return None

    def write(self, knobs: Knobs) -> dict[str, Any]:
        """config.json, as far as it says what is computed."""
        keys = {key.name: key.theirs(knobs[key.knob]) for key in self.keys}
        fixed = {name: each.values[0] for name, each in self.fixed.items()}
        body = {"model_type": self.name, "architectures": [self.architecture], **keys, **fixed}
        if "rope_theta" in keys and self is not OURS:  # for versions up to 4; from 5 on it is
            body["rope_parameters"] = {"rope_type": "default", "rope_theta": keys["rope_theta"]}
        return body | self.extra(knobs)

    def read(self, config: dict[str, Any]) -> Knobs:
        """What a config.json says, as knobs of ours.

        Raises:
            DataError: It is more than they can say; the message names the key.
        """
        config = _flat_rope(config)
        knobs: Knobs = {}
        for key in self.keys:
            value = config.get(key.name)
            if value is None:
                value = key.default(knobs) if callable(key.default) else key.default
            if value is REQUIRED:
                raise DataError(f"config.json has no {key.name}")
            try:
                value = value if value is None else key.ours(value)
            except (LookupError, TypeError, ValueError, ArithmeticError):
                raise DataError(
                    f"config.json: {key.name} is {config.get(key.name)!r}; no knob of ours says that"
                ) from None
            if knobs.setdefault(key.knob, value) != value:
                raise DataError(f"config.json: {key.name} is {value!r}; {called(key.knob)} cannot say that alone")
        for name, value in (self.knobs | PLAIN | self.knobs).items():  # a family's first: PLAIN's may follow from them
            knobs.setdefault(name, value(knobs) if callable(value) else value)
        for name, allowed in self.fixed.items():
            if config.get(name, allowed.default) not in allowed.values:
                raise _no_knob(name, config.get(name, allowed.default), allowed.values[0])
        if config.get("partial_rotary_factor") not in (None, 1):
            raise _no_knob("partial_rotary_factor", config["partial_rotary_factor"], 1.0)
        self._refuse_unknown(config, knobs)
        if (window := self.window(config)) is not None:  # of no more tokens than that, attention sees all
            knobs["sequence_length"] = min(knobs["sequence_length"], window)
        return knobs

    def _refuse_unknown(self, config: dict[str, Any], knobs: Knobs) -> None:
        """A key that nobody has heard of may change what the model computes, unless it is off."""
        known = {key.name for key in self.keys} | self.fixed.keys() | self.extra(knobs).keys() | NEUTRAL
        for name, value in config.items():
            if name not in known and not name.startswith("_") and value not in (None, False, 0, [], {}):
                raise DataError(f"config.json: {name} is {value!r}, which no knob of ours says")


def _no_knob(name: str, value: Any, wanted: Any) -> DataError:
    return DataError(f"config.json: {name} is {value!r}; no knob of ours says that: it must be {wanted!r}")


def _flat_rope(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what versions from 5 on say of rotary embeddings where those up to 4 did."""
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        rope = rope["full_attention"]
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", rope.get("rope_type", "default")))
    if kind != "default":
        raise _no_knob("rope_type", kind, "default")
    said = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return config | said


# ---- the table ----

# keys that change nothing of what a model computes
NEUTRAL = {
    "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "classifier_dropout", "dtype", "embd_pdrop", "eos_token_id",
    "hidden_dropout", "id2label", "initializer_range", "is_llama_config", "keys_to_ignore_at_inference", "label2id",
    "layer_types", "max_window_layers", "model_type", "n_ctx", "output_past", "pad_token_id", "partial_rotary_factor",
    "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "rope_interleaved", "rope_local_base_freq",
    "rope_parameters", "rope_theta", "rotary_emb_base", "sliding_window", "sliding_window_pattern",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "torch_dtype", "transformers_version", "unk_token_id", "use_cache", "written_by",
}  # fmt: skip
# names of non-linearities, ours by theirs; the first for each is the one that is written
NON_LINEAR = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "relu2": "squared_relu",
}
GATES = {"gelu_pytorch_tanh": "geglu", "silu": "swiglu", "swish": "swiglu"}


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError
    return value


def _extents(*keys: tuple[str, str]) -> tuple[Key, ...]:
    return tuple(Key(name, knob, ours=_whole) for name, knob in keys)


def _shape(eps: str, tied: bool = False) -> tuple[Key, ...]:
    return (
        *_extents(
            ("vocab_size", "vocab_size"),
            ("hidden_size", "hidden"),
            ("num_hidden_layers", "layers"),
            ("num_attention_heads", "heads"),
            ("intermediate_size", "ffn_hidden"),
            ("max_position_embeddings", "sequence_length"),
        ),
        Key(eps, "norm_eps", ours=float),
        Key("tie_word_embeddings", "tied_embeddings", tied),
    )


def _non_linear(name: str, default: str, named: dict[str, str] = NON_LINEAR) -> Key:
    first = {ours: theirs for theirs, ours in reversed(named.items())}
    return Key(name, "activation", default, first.__getitem__, named.__getitem__, tuple(first))


def _rope(theta: float = 10000.0) -> Key:
    return Key("rope_theta", "rope_theta", theta, ours=float)


def _square(scale: float) -> float:
    """The number whose inverse root is ``scale``; whole where rounding alone keeps it from being so."""
    found = scale**-2
    return round(found) if abs(found - round(found)) < 1e-9 * found else found


def _full(knobs: Knobs) -> dict[str, Any]:
    return {"layer_types": ["full_attention"] * knobs["layers"]}


def _slides(config: dict[str, Any]) -> bool:
    return "sliding_attention" in (config.get("layer_types") or ["sliding_attention"])


def _refuse_sliding(config: dict[str, Any]) -> None:
    """In Gemma 3, layers that slide have a rotary base of their own."""
    if _slides(config):
        raise _no_knob("layer_types", "sliding_attention", "full_attention")


def _neox_rotary(config: dict[str, Any]) -> None:
    part = config.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    if part != 1:
        raise _no_knob("rotary_pct", part, 1.0)


def _llama_like(*args: Any, **kwargs: Map) -> Callable[[Knobs], dict[str, Map]]:
    return lambda knobs: names.llama_names(**kwargs)


RMS, LAYER = "rms_norm_eps", "layer_norm_eps"
GROUPS = Key("num_key_value_heads", "kv_heads", lambda knobs: knobs["heads"], ours=_whole)


def _heads(width: Any = usual_width) -> tuple[Key, ...]:
    return GROUPS, Key("head_dim", "head_width", width, ours=_whole)


GATED = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope"}
CLASSIC = {"head_width": usual_width, "norm": "layernorm", "bias": True, "kv_heads": lambda knobs: knobs["heads"]}
OUTPUT_NORMS = {"attention_output_norm": True, "mlp_output_norm": True}
SILU = {"hidden_act": Fixed(("silu", "swish"), "silu")}
NO_BIAS = {"attention_bias": Fixed((False,), False)}
GEMMA = {"norm": "rmsnorm", "positions": "rope"} | OUTPUT_NORMS | {"bias": False, "embedding_scale": True}
GEMMA_KEYS = (
    *_shape(RMS, tied=True),
    *_heads(256),
    Key("query_pre_attn_scalar", "attention_scale", theirs=_square, ours=lambda value: value**-0.5),
    Key("attn_logit_softcapping", "attention_cap", None),
    Key("final_logit_softcapping", "final_logit_cap", None),
    _non_linear("hidden_activation", "gelu_pytorch_tanh", GATES),
)


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    GATED,
    (*_shape(RMS), _rope(), *_heads(), Key("attention_bias", "bias", False), Key("mlp_bias", "bias", False)),
    SILU,
    _llama_like(),
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    GATED | {"bias": False},
    (*_shape(RMS), _rope(), *_heads()),
    SILU,
    _llama_like(),
    lambda knobs: {"sliding_window": None},
    lambda config: config.get("sliding_window"),
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    GATED | {"bias": False, "qk_norm": True},
    (*_shape(RMS), _rope(), *_heads(128)),
    SILU | NO_BIAS,
    _llama_like(),
    lambda knobs: {"use_sliding_window": False},
    lambda config: config.get("sliding_window") if config.get("use_sliding_window") else None,
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    GATED
    | OUTPUT_NORMS
    | {
        "bias": False,
        "qk_norm": True,
        "qk_norm_scope": "full",
        "attention_input_norm": False,
        "mlp_input_norm": False,
    },
    (*_shape(RMS), _rope(), *_heads()),
    SILU | NO_BIAS,
    _llama_like(**names.post_norms()),
)
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    GEMMA,
    (*GEMMA_KEYS, _rope()),
    NO_BIAS,
    lambda knobs: names.gemma_names(),
    _full,
    lambda config: config.get("sliding_window", 4096) if _slides(config) else None,
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    GEMMA | {"qk_norm": True},
    (*GEMMA_KEYS, _rope(1e6)),
    NO_BIAS,
    lambda knobs: names.gemma_names(),
    lambda knobs: (
        _full(knobs)
        | {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": knobs["rope_theta"]}}}
    ),
    _refuse_sliding,
)
GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    CLASSIC | {"positions": "rope"},
    (*_shape(LAYER), _rope(), _non_linear("hidden_act", "gelu")),
    {
        "use_parallel_residual": Fixed((False,), True),
        "attention_bias": Fixed((True,), True),
    },
    lambda knobs: names.neox_names(),
    lambda knobs: {
        "rotary_pct": 1.0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": knobs["rope_theta"],
            "partial_rotary_factor": 1.0,
        },
    },
    _neox_rotary,
)
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    CLASSIC | {"positions": "learned", "rope_theta": None},
    (
        *_extents(
            ("vocab_size", "vocab_size"),
            ("n_embd", "hidden"),
            ("n_layer", "layers"),
            ("n_head", "heads"),
            ("n_positions", "sequence_length"),
        ),
        Key("n_inner", "ffn_hidden", lambda knobs: 4 * knobs["hidden"], ours=_whole),
        Key("layer_norm_epsilon", "norm_eps", 1e-5, ours=float),
        Key("tie_word_embeddings", "tied_embeddings", True),
        _non_linear("activation_function", "gelu_new"),
    ),
    {
        "scale_attn_weights": Fixed((True,), True),
        "scale_attn_by_inverse_layer_idx": Fixed((False,), False),
        "add_cross_attention": Fixed((False,), False),
    },
    lambda knobs: names.gpt2_names(),
    lambda knobs: dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),  # the class takes 0.1 else
)

# ours, for all else
OWN = ("norm", "positions", "rope_theta", "activation", "bias", *PLAIN)
OURS = Family(
    "megatron_stable",
    "MegatronStableForCausalLM",
    {},
    (*_shape("norm_eps"), *_heads(), *(Key(knob, knob, None) for knob in OWN)),
    {},
    names.own_names,
    lambda knobs: {"parametrization": {}},
)
# the first that fits is taken; Mistral computes what Llama does
FAMILIES = {family.name: family for family in (LLAMA, QWEN3, OLMO2, GEMMA2, GEMMA3, GPT_NEOX, GPT2, MISTRAL, OURS)}


def family_of(knobs: Knobs) -> Family:
    """The first family that computes just this."""
    return next(family for family in FAMILIES.values() if family.misfit(knobs) is None)
