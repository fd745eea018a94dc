"""The forward pass of a stage as autograd sees it: what each layer keeps of a micro batch for backward, in bytes.

It follows ``model/`` module by module. What a kernel keeps depends on the device: on CUDA norms and dropout are fused,
and attention keeps queries, keys, values, output and one fp32 number per query and head (FlashAttention, arXiv
2205.14135), and the loss writes its gradient over the logits; on a CPU RMSNorm and dropout are not fused, attention
with a cap keeps the s x s scores, and the logits' gradient lies beside them.
``tests/analysis/test_activations.py`` holds this against autograd, on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_stable.analysis.tape import Tape, Value
from megatron_stable.config.attention import limits
from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.schema import Config
from megatron_stable.model.backends import FASTEST, FASTEST_AMONG_DOCUMENTS, NEEDS_CUDA
from megatron_stable.model.cross_entropy import CHUNK
from megatron_stable.model.transformer import padded_vocabulary, recomputes

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32, INT64, BOOL = 4, 8, 1


def backend(config: Config, device: str) -> str:
    """The attention backend that a run takes on ``device`` ("cuda", "cpu"), which need not be there."""
    if config.model.attention != "auto":
        return config.model.attention
    fastest = FASTEST_AMONG_DOCUMENTS if config.data.document_mask else FASTEST
    here = [name for name in fastest if device == "cuda" or name not in NEEDS_CUDA]
    return next((name for name in here if not any(limits(name, config.model))), "math")


@dataclass(frozen=True)
class Layers:
    """Puts the layers of a run on tapes, for one micro batch on one rank.

    Args:
        device: "cuda" or "cpu".
    """

    config: Config
    device: str = "cuda"

    @property
    def width(self) -> int:
        """Bytes of a number of the model's dtype."""
        return WIDTH[self.config.precision.dtype]

    @property
    def tokens(self) -> int:
        """Of a micro batch."""
        return self.config.batch.micro_size * self.config.model.sequence_length

    @cached_property
    def documents(self) -> tuple[Value, ...]:
        """What layers share of a micro batch's documents: turns of rotary embeddings, and for math who sees whom."""
        model = self.config.model
        if not self.config.data.document_mask:
            return ()
        turns = 2 * self.tokens * model.head_dim * FP32 if model.positions == "rope" else 0
        math = backend(self.config, self.device) == "math"
        return Value(turns), Value(self.tokens * model.sequence_length * BOOL if math else 0)

    @property
    def positions(self) -> float:
        """Tokens of which this rank holds the residual stream."""
        return self.tokens / (self.config.parallel.tensor if self.config.parallel.sequence else 1)

    @property
    def stream(self) -> float:
        """Bytes of the residual stream."""
        return self.positions * self.config.model.hidden * self.width

    @property
    def whole(self) -> float:
        """Bytes of the residual stream of all positions."""
        return self.tokens * self.config.model.hidden * self.width

    @property
    def sequence(self) -> bool:
        """Whether the stream is sharded."""
        return self.config.parallel.sequence and self.config.parallel.tensor > 1

    def norm(self, tape: Tape, x: Value, rows: float, storage: Value | None = None) -> Value:
        """LayerNorm or RMSNorm over ``rows`` rows; ``storage``: what ``x`` is a view of."""
        kept, elements = storage or x, x.size / self.width
        if self.config.model.norm == "layernorm":
            wide = FP32 if self.device == "cuda" else self.width
            return tape.put(x.size, x, saves=(kept, Value(rows * wide), Value(rows * wide)))
        if self.device == "cuda":
            return tape.put(x.size, x, saves=(kept, Value(rows * FP32)))
        # in steps: x in fp32, 1 / rms, their product
        upcast = kept if self.width == FP32 else Value(elements * FP32)
        saves = (upcast, Value(rows * FP32), Value(elements * FP32))
        return tape.put(x.size, x, saves=saves, scratch=2 * elements * FP32)

    def projection_norm(self, tape: Tape, x: Value, heads: float, storage: Value) -> Value:
        """On queries, keys or values: per head, or over all heads of all TP ranks."""
        model, tp = self.config.model, self.config.parallel.tensor
        if model.qk_norm_scope == "head":
            return self.norm(tape, x, self.tokens * heads, storage)
        x = tape.put(x.size, x)  # heads of a group lie apart: side by side they are a copy
        if tp == 1:
            return self.norm(tape, x, self.tokens)
        # in steps, as ranks exchange the statistics: x in fp32 (centred under LayerNorm), 1 / rms, their product
        elements = x.size / self.width
        wide = x if self.width == FP32 and model.norm == "rmsnorm" else Value(elements * FP32)
        saves = (wide, Value(self.tokens * FP32), Value(elements * FP32))
        return tape.put(x.size, x, saves=saves, scratch=2 * elements * FP32)

    def dropout(self, tape: Tape, x: Value) -> Value:
        """Keeps its mask: bytes on CUDA, factors on a CPU."""
        if not self.config.model.dropout:
            return x
        elements = x.size / self.width
        return tape.put(x.size, x, saves=(Value(elements * (BOOL if self.device == "cuda" else self.width)),))

    def column(self, tape: Tape, x: Value, features: float) -> Value:
        """A column-parallel layer: hidden -> ``features``, of this rank."""
        model = self.config.model
        x = self._reparametrized(tape, x)
        # under SP its backward gathers x and holds the gradient of all positions
        copies = 2 if self.sequence else 0
        weight = model.hidden * features * self.width
        y = tape.put(self.tokens * features * self.width, x, saves=(x,), weight=weight, scratch=copies * self.whole)
        return tape.put(y.size, y, through=True) if model.bias else y

    def row(self, tape: Tape, x: Value, features: float) -> Value:
        """A row-parallel layer: ``features`` of this rank -> hidden."""
        x = self._reparametrized(tape, x)
        weight = features * self.config.model.hidden * self.width
        partial = tape.put(self.whole, x, saves=(x,), weight=weight)
        if self.sequence:
            return tape.put(self.stream, partial)
        return tape.put(self.whole, partial, through=True)

    def _reparametrized(self, tape: Tape, x: Value) -> Value:
        """sigmaReparam's factor: it keeps its output, which the linear layer keeps as well."""
        if not self.config.model.sigma_reparam:
            return x
        y = tape.put(x.size, x, scratch=3 * x.size / self.width * FP32)
        tape.operations[-1].saves = (y,)
        return y

    def attention(self, tape: Tape, x: Value) -> Value:
        """QKV, norms, rotary embedding, the backend, Proj."""
        model, tp = self.config.model, self.config.parallel.tensor
        heads, groups = model.heads / tp, model.groups / tp
        per_head = self.tokens * model.head_dim * self.width
        qkv = self.column(tape, x, (heads + 2 * groups) * model.head_dim)
        q, k, v = tape.split(qkv, heads * per_head, groups * per_head, groups * per_head)
        of_q = of_k = of_v = qkv
        if model.heads != model.groups:  # several queries of a group do not lie beside those of the next
            q = of_q = tape.put(q.size, q)
        if model.qk_norm:
            q = of_q = self.projection_norm(tape, q, heads, of_q)
            k = of_k = self.projection_norm(tape, k, groups, of_k)
        if model.v_norm:
            v = of_v = self.projection_norm(tape, v, groups, of_v)
        if model.positions == "rope":
            q = of_q = tape.put(q.size, q, scratch=3 * q.size / self.width * FP32)
            k = of_k = tape.put(k.size, k, scratch=3 * k.size / self.width * FP32)
        name = backend(self.config, self.device)
        on_cpu_with_dropout = self.device == "cpu" and name == "sdpa" and model.attention_dropout > 0
        if name == "math" or on_cpu_with_dropout:
            y = self._scores(tape, q, k, v, fused=on_cpu_with_dropout)
        else:
            y = Value(q.size)
            statistics = Value(self.tokens * heads * FP32)
            # SDPA makes a number of each element of a mask, anew in each layer
            mask = self.tokens * model.sequence_length * self.width if self.documents and name == "sdpa" else 0
            saves = (of_q, of_k, of_v, y, statistics, Value(mask), *self.documents)
            tape.put(0.0, q, k, v, saves=saves, scratch=q.size / self.width * FP32)
            tape.operations[-1].outputs = (y,)
        return self.row(tape, y, heads * model.head_dim)

    def _scores(self, tape: Tape, q: Value, k: Value, v: Value, fused: bool) -> Value:
        """Attention step by step, with all scores in memory in fp32.

        Args:
            fused: As PyTorch's fused operator does it on a CPU for dropout: values are fp32, too.
        """
        model, heads = self.config.model, self.config.model.heads / self.config.parallel.tensor
        count = q.size / self.width
        size = self.config.batch.micro_size * heads * model.sequence_length**2 * FP32
        if not fused:  # each group's keys and values for each of its queries
            k, v = tape.put(q.size, k), tape.put(q.size, v)
        wide_q, wide_k = tape.put(count * FP32, q), tape.put(count * FP32, k)
        scores = tape.put(size, wide_q, wide_k, saves=(wide_q, wide_k))
        if not fused:
            scores = tape.put(size, scores)
        if model.attention_cap is not None:
            scores = tape.put(size, tape.put(size, scores))
            tape.operations[-1].saves = (scores,)
            scores = tape.put(size, scores)
        if not fused:
            hidden = self.documents or (Value(model.sequence_length**2 * BOOL),)
            scores = tape.put(size, scores, saves=hidden)
        probabilities = tape.put(size, scores, scratch=size)
        tape.operations[-1].saves = (probabilities,)
        if model.attention_clip is not None:
            stretched = tape.put(size, tape.put(size, probabilities))
            probabilities = tape.put(size, stretched, saves=(stretched,))
        if model.attention_dropout:
            mask = Value(size / FP32 * (BOOL if self.device == "cuda" else FP32))
            probabilities = tape.put(size, probabilities, saves=(mask,))
        if fused:
            v = tape.put(count * FP32, v)
            return tape.put(q.size, tape.put(count * FP32, probabilities, v, saves=(probabilities, v)))
        if self.width != FP32:
            probabilities = tape.put(size / FP32 * self.width, probabilities)
        return tape.put(q.size, probabilities, v, saves=(probabilities, v))

    def mlp(self, tape: Tape, x: Value) -> Value:
        """FC1, the non-linearity, FC2."""
        model = self.config.model
        features = model.ffn / self.config.parallel.tensor
        size = self.tokens * features * self.width
        if model.gated:
            both = self.column(tape, x, 2 * features)
            gate, up = tape.split(both, size, size)
            gated = tape.put(size, gate, saves=(both,))
            y = tape.put(size, gated, up, saves=(gated, both))
        else:
            inner = self.column(tape, x, features)
            if model.activation in ("gelu", "gelu_erf"):
                y = tape.put(size, inner, saves=(inner,))
            else:
                positive = tape.put(size, inner)
                tape.operations[-1].saves = (positive,)
                y = tape.put(size, positive, saves=(positive,))
        return self.row(tape, y, features)

    def block(self, tape: Tape, x: Value, index: int) -> Value:
        """Block ``index``: all of it, or its input alone if it is recomputed."""
        if not recomputes(self.config.model, index):
            return self._block(tape, x)
        inner = Tape()
        self._block(inner, x)
        return tape.put(x.size, x, saves=(x,), recomputed=inner)

    def _block(self, tape: Tape, x: Value) -> Value:
        model = self.config.model
        rows, factor = self.positions, model_multipliers(self.config).residual

        def joined(x: Value, y: Value, output_norm: bool) -> Value:
            y = self.norm(tape, y, rows) if output_norm else y
            if model.layer_scale is not None:
                y = tape.put(y.size, y, saves=(y,), scratch=y.size)
            elif factor != 1.0:
                y = tape.put(y.size, y)
            y = self.dropout(tape, y)
            skip = tape.put(x.size, x) if model.deepnorm else x
            total = tape.put(x.size, skip, y, through=True)
            return self.norm(tape, total, rows) if model.deepnorm else total

        entering = self.norm(tape, x, rows) if model.attention_input_norm else x
        x = joined(x, self.attention(tape, entering), model.attention_output_norm)
        entering = self.norm(tape, x, rows) if model.mlp_input_norm else x
        return joined(x, self.mlp(tape, entering), model.mlp_output_norm)

    def embedding(self, tape: Tape) -> Value:
        """Token embedding, what is done to it, positions."""
        model, tp = self.config.model, self.config.parallel.tensor
        ids = self.tokens * INT64
        saves: tuple[Value, ...] = (Value(ids),)
        weight = self._rows() * model.hidden * self.width
        partial = tape.put(self.whole, saves=saves, weight=weight)
        x = partial
        if tp > 1:
            partial = tape.put(self.whole, partial, saves=(Value(self.tokens * BOOL),))
            x = tape.put(self.stream, partial, through=not self.sequence)
        if model.embedding_gradient != 1.0:
            x = tape.put(x.size, x)
        if model.embedding_scale:
            x = tape.put(x.size, x)
        if model.embedding_norm:
            x = self.norm(tape, x, self.positions)
        if model.positions == "learned":
            weight = model.sequence_length * model.hidden * self.width
            places = self.tokens * INT64 if self.config.data.document_mask else 0
            x = tape.put(x.size, x, weight=weight, saves=(Value(places),), through=True)
        return self.dropout(tape, x)

    def final_norm(self, tape: Tape, x: Value) -> Value:
        """The norm before the head, and the factor of the logits."""
        if not self.config.model.deepnorm:
            x = self.norm(tape, x, self.positions)
        return tape.put(x.size, x) if model_multipliers(self.config).logits != 1.0 else x

    def head(self, tape: Tape, x: Value) -> Value:
        """Logits ``[b, s, v/tp]``."""
        model, size = self.config.model, self.tokens * self._rows() * self.width
        copies = 2 if self.sequence else 0
        weight = self._rows() * model.hidden * self.width
        return tape.put(size, x, saves=(x,), weight=weight, scratch=copies * self.whole)

    def loss(self, tape: Tape, logits: Value) -> None:
        """Cross-entropy: keeps the logits. On CUDA their gradient takes their place; on a CPU backward works on a
        chunk of them in fp32 at a time."""
        per_token = Value(self.tokens * (FP32 + INT64))  # log Z, target
        if self.device == "cuda":
            tape.put(0.0, logits, saves=(logits, per_token), scratch=2 * self.tokens * FP32, through=True)
            return
        columns = self._rows()
        chunk = min(self.tokens, max(1, CHUNK // max(1, int(columns)))) * columns * FP32
        rows = 2 if self.width != FP32 else 1
        if self.config.model.final_logit_cap is not None:
            rows += 2
        tape.put(0.0, logits, saves=(logits, per_token), scratch=rows * chunk)

    def _rows(self) -> float:
        assert self.config.model.vocab_size is not None
        tp = self.config.parallel.tensor
        return padded_vocabulary(self.config.model.vocab_size, tp) / tp
