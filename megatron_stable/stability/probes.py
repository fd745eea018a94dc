"""What is measured inside the model in a run: one table, from which code, tags, charts, documentation and tests follow.

Each number is a function of the whole model and the whole global batch: the same on every layout of ranks. Tags are
``name/point/layer_NN`` (a number per layer), ``name/point`` (of a matrix outside the blocks) or ``name`` (one number)::

    output_norm/qkv/layer_07     attention/max_logit/layer_07     weight_rms/head     logits/logsumexp

``model/probes.py`` measures activations, ``optim/probes.py`` parameters, ``engine/probes.py`` brings it together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_stable.config.schema import ProbeGroup

LINEARS = ("qkv", "proj", "fc1", "fc2")
OUTPUTS = ("qkv", "q", "k", "v", "proj", "fc1", "fc2", "residual")
# of parameters: the weights of the linear layers, all parameters of a block, and the matrices outside of the blocks
WEIGHTS, OUTSIDE = (*LINEARS, "block"), ("embedding", "head")

RYBAKOV = "Rybakov et al., arXiv 2410.16682, §3"
WORTSMAN = "Wortsman et al., arXiv 2309.14322"
ENTROPY = "Zhai et al., arXiv 2303.06296, §3"
STABLE_ADAMW = "Wortsman et al., arXiv 2304.13013, §3.4"
NOISE = "McCandlish et al., arXiv 1812.06162, App. A"


@dataclass(frozen=True)
class Probe:
    """A quantity that is measured.

    Attributes:
        name: The beginning of its tags.
        group: What it is measured with; groups are switched on and off together.
        unit: Of its values.
        meaning: What it is, in a sentence.
        across: How the parts of TP, PP, SP and DP ranks make the whole.
        source: Where it, or its use, was published.
        points: Where it is measured in each layer; empty: it has one number per layer, or one in all.
        outside: Matrices outside of the blocks at which it is measured, too.
        layered: Whether there is a number per layer.
        heads: Whether there is one per head, on request.
        log: Whether its charts have a logarithmic axis.
    """

    name: str
    group: ProbeGroup
    unit: str
    meaning: str
    across: str
    source: str
    points: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    layered: bool = True
    heads: bool = False
    log: bool = True


class Where(NamedTuple):
    """What a tag is of: ``layer`` and ``head`` count from 0, and are ``None`` where there are none."""

    probe: Probe
    point: str | None
    layer: int | None
    head: int | None = None

    @property
    def tag(self) -> str:
        """As metrics.jsonl and TensorBoard have it."""
        return tag(self.probe.name, self.point, self.layer, self.head)


_TOKENS = "sums over micro batches, DP, and TP (features, or positions under SP); each layer is on one stage"
_LARGEST = "the largest over micro batches, DP and TP; each layer is on one stage"
_SHARDS = "sums over the shards of ZeRO and TP; what TP or PP replicates counts once"
_HEADS = "{} over micro batches, DP and the heads of TP; each layer is on one stage"
_VOCABULARY = "{} over micro batches, DP and the columns of TP; the last stage has it"

PROBES: dict[str, Probe] = {
    probe.name: probe
    for probe in (
        Probe(
            "output_norm",
            "outputs",
            "1",
            "L2 norm of a token's vector, root mean square over tokens: outputs of QKV (whole, and queries, keys, "
            "values before their norms), Proj, FC1, FC2, and the residual stream behind the block",
            _TOKENS,
            RYBAKOV,
            OUTPUTS,
        ),
        Probe(
            "output_rms", "outputs", "1", "root mean square of the same vectors' elements", _TOKENS, WORTSMAN, OUTPUTS
        ),
        Probe(
            "output_max", "outputs", "1", "largest magnitude of the same vectors' elements", _LARGEST, RYBAKOV, OUTPUTS
        ),
        Probe(
            "attention/max_logit",
            "attention",
            "1",
            "largest attention logit, scale × q·k before a cap, over heads and sampled queries",
            _HEADS.format("the largest"),
            f"{WORTSMAN}, §3.1",
            heads=True,
        ),
        Probe(
            "attention/entropy",
            "attention",
            "nats",
            "entropy of the attention probabilities, mean over heads and sampled queries",
            _HEADS.format("sums"),
            ENTROPY,
            heads=True,
            log=False,
        ),
        Probe(
            "logits/mean",
            "logits",
            "1",
            "output logits behind a final cap, mean over the vocabulary and sampled positions",
            _VOCABULARY.format("sums"),
            f"{WORTSMAN}, §3.2",
            layered=False,
            log=False,
        ),
        Probe(
            "logits/max",
            "logits",
            "1",
            "largest output logit of sampled positions, behind a final cap",
            _VOCABULARY.format("the largest"),
            f"{WORTSMAN}, §3.2",
            layered=False,
            log=False,
        ),
        Probe(
            "logits/logsumexp",
            "logits",
            "nats",
            "log Z, the logarithm of the softmax's normaliser, mean over positions",
            _VOCABULARY.format("sums"),
            f"{WORTSMAN}, §3.2",
            layered=False,
            log=False,
        ),
        Probe(
            "logits/entropy",
            "logits",
            "nats",
            "entropy of the predicted distribution, mean over sampled positions",
            _VOCABULARY.format("sums"),
            ENTROPY,
            layered=False,
            log=False,
        ),
        Probe("weight_norm", "weights", "1", "L2 norm of a weight, fp32 masters", _SHARDS, RYBAKOV, WEIGHTS, OUTSIDE),
        Probe("weight_rms", "weights", "1", "root mean square of its elements", _SHARDS, WORTSMAN, WEIGHTS, OUTSIDE),
        Probe(
            "grad_norm",
            "gradients",
            "nats",
            "L2 norm of a weight's gradient before clipping",
            _SHARDS,
            "OLMo 2, arXiv 2501.00656, §3",
            WEIGHTS,
            OUTSIDE,
        ),
        Probe(
            "grad_rms",
            "gradients",
            "nats",
            "root mean square of its elements: near Adam's ε, updates vanish",
            _SHARDS,
            f"{WORTSMAN}, §3.4",
            WEIGHTS,
            OUTSIDE,
        ),
        Probe(
            "grad_under_eps",
            "gradients",
            "share",
            "share of its elements that are smaller than Adam's ε",
            _SHARDS,
            f"{WORTSMAN}, §3.4",
            LINEARS,
            OUTSIDE,
            log=False,
        ),
        Probe(
            "update_rms",
            "updates",
            "1",
            "root mean square of the change of a weight's elements in the step, of the fp32 "
            "masters, weight decay included",
            _SHARDS,
            STABLE_ADAMW,
            LINEARS,
            OUTSIDE,
        ),
        Probe(
            "update_ratio",
            "updates",
            "1",
            "the same, relative to the root mean square of the weight",
            _SHARDS,
            f"{WORTSMAN}, §3.4",
            LINEARS,
            OUTSIDE,
        ),
        Probe(
            "moment_rms",
            "moments",
            "nats",
            "root of the mean of Adam's second moment, corrected for its start",
            _SHARDS,
            f"{WORTSMAN}, §3.4",
            LINEARS,
            OUTSIDE,
        ),
        Probe(
            "moment_under_eps",
            "moments",
            "share",
            "share of elements whose second moment has a root smaller than ε",
            _SHARDS,
            f"{WORTSMAN}, §3.4",
            LINEARS,
            OUTSIDE,
            log=False,
        ),
        Probe(
            "moment_surprise",
            "moments",
            "1",
            "root of the mean of g² / max(v, ε²), the gradient against Adam's second "
            "moment: about 1 while it is as usual, more where the moment is out of date",
            _SHARDS,
            STABLE_ADAMW,
            LINEARS,
            OUTSIDE,
        ),
        Probe(
            "noise_scale",
            "noise",
            "sequences",
            "simple gradient noise scale tr(Σ)/|G|² of the weights that Adam trains, from its moments: the batch "
            "size at which noise and gradient are as large as each other",
            _SHARDS,
            NOISE,
            layered=False,
        ),
    )
}


def tag(name: str, point: str | None = None, layer: int | None = None, head: int | None = None) -> str:
    """``name/point/layer_NN/head_NN``, as far as there are such."""
    parts = [name, point, None if layer is None else f"layer_{layer:02}", None if head is None else f"head_{head:02}"]
    return "/".join(part for part in parts if part is not None)


def places(probe: Probe, layers: int, heads: int = 0) -> Iterator[Where]:
    """Everywhere that a probe measures in a model of so many layers, and of so many heads where these are wanted."""
    if not probe.layered:
        yield Where(probe, None, None)
        return
    for point in probe.points or (None,):
        for layer in range(layers):
            yield Where(probe, point, layer)
            for head in range(heads if probe.heads else 0):
                yield Where(probe, point, layer, head)
    for point in probe.outside:
        yield Where(probe, point, None)


def parse(text: str) -> Where | None:
    """What a tag is of; ``None``: it is no probe's."""
    for probe in PROBES.values():
        if text == probe.name and not probe.layered:
            return Where(probe, None, None)
        if text.startswith(f"{probe.name}/") and probe.layered:
            found = _parse_rest(probe, text[len(probe.name) + 1 :].split("/"))
            if found is not None and found.tag == text:
                return found
    return None


def _parse_rest(probe: Probe, parts: list[str]) -> Where | None:
    point = parts.pop(0) if probe.points else None
    if point in probe.outside and not parts:
        return Where(probe, point, None)
    numbers = []
    for part, prefix in zip(parts, ("layer_", "head_"), strict=False):
        digits = part.removeprefix(prefix)
        if digits == part or not digits.isdecimal():
            return None
        numbers.append(int(digits))
    if not numbers or len(parts) > 2 or (point is not None and point not in probe.points):
        return None
    return Where(probe, point, numbers[0], numbers[1] if len(numbers) > 1 else None)
