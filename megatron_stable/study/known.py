"""What is known of each field without a sweep of one's own: its value or rule, what was found, and by whom; as data.

To know more, add a `Finding`. A study of this project is a source like a paper: `Source(its page, "measured")`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_stable.study.evidence import At, Entry, Finding, Source
from megatron_stable.study.published import (
    PUBLIC,
    batch_size,
    deepseek_batch_tokens,
    deepseek_learning_rate,
    gpt3_batch_tokens,
    gpt3_learning_rate,
    short,
    two_digits,
)

WARMUP, WARMUP_SHARE = 2000, 0.05
LARGE = 4.8e9  # parameters: where ε of 1e-8 was seen to be too large
ORDINARY_EPS, SMALL_EPS = 1e-8, 1e-15

YOURS = Source("the command line", "yours")
WORTSMAN = Source("arXiv 2309.14322", "read")
RYBAKOV = Source("arXiv 2410.16682", "second-hand")
OLMO2, OLMO2_CODE = Source("arXiv 2501.00656", "read"), Source("arXiv 2501.00656", "code")
PALM, OPT = Source("arXiv 2204.02311", "read"), Source("arXiv 2205.01068", "read")
GLM = Source("arXiv 2210.02414", "code")
BLOOM = Source("arXiv 2211.05100", "code")
GEMMA3 = Source("Gemma 3", "code")
OUTPUT_EMBEDDINGS = Source("arXiv 2601.02031", "code")
GPT3, DEEPSEEK, CHINCHILLA, WELM = (
    Source(f"arXiv {paper}", "second-hand") for paper in ("2005.14165", "2401.02954", "2203.15556", "2209.10372")
)
OURS, METHODS, SIZES = (
    Source(f"docs/{page}.md", "measured") for page in ("methods/qk_norm", "studies/rybakov", "studies/wortsman")
)


def _nearest(at: At) -> str:
    model = min(PUBLIC, key=lambda model: abs(math.log(model.parameters / at.parameters)))
    return (
        f"of public models, {model.name} is the nearest, {short(model.parameters)} parameters at "
        f"{model.learning_rate:.2g} ({model.source})"
    )


_QK_NORM = (
    Finding(
        "without a norm on queries and keys, the learning rate at which runs diverge falls as models grow; with it, "
        "1.2B parameters train at 0.3",
        WORTSMAN,
        "§3.1",
    ),
    Finding("Gemma 3 has it in place of Gemma 2's caps", GEMMA3),
    Finding(
        "830M trains at 40e-3 with it and no more than 6e-3 without; perplexity at 3e-4 is 10.84 against 11.19, one "
        "seed",
        RYBAKOV,
    ),
    Finding("4 blocks of width 128 at 0.05: the largest logit is below 28 with it, 1.5e4 without, one seed", OURS),
    Finding(
        "3 blocks of width 64 train at up to 0.51 with it, 0.068 without, and at no more with qkv_norm or qk_norm_cap; "
        "three seeds",
        METHODS,
    ),
    Finding(
        "from 25k to 788k parameters the largest stable learning rate falls from 0.3 to 0.1 without it, and stays at "
        "0.3 with it; three seeds",
        SIZES,
    ),
    Finding(
        "against it alone: only together with norms on the outputs, as in recipe olmo2, did it slow the growth of the "
        "gradient norm",
        OLMO2,
        "§3",
        supports=False,
    ),
)
_QK_NORM_CHANGES = (
    "qk_norm_cap or qkv_norm, to bear half as high a learning rate again (arXiv 2410.16682, abstract); olmo2, if the "
    "gradient norm grows over the run"
)

EVIDENCE: tuple[Entry, ...] = (
    Entry(
        "precision.dtype",
        lambda at: "bf16",
        (
            Finding("BLOOM trained 176B parameters in it", BLOOM),
            Finding("models of up to 4.8B parameters, too", WORTSMAN),
            Finding("under fp16, the divergences of OPT-175B came with a loss scale that fell to 0", OPT, "§2.5"),
        ),
        "a machine without bf16: fp16, and watch the loss scale",
    ),
    Entry(
        "model.recipe",
        lambda at: "qk_norm",
        _QK_NORM,
        _QK_NORM_CHANGES,
        lambda at: not at.bounded and at.plain and at.config.model.recipe == "baseline",
    ),
    Entry("model.qk_norm", lambda at: True, _QK_NORM, _QK_NORM_CHANGES, lambda at: not at.bounded),
    Entry(
        "model.recipe",
        lambda at: at.config.model.recipe,
        (Finding("it bounds attention logits already", Source("your configuration", "yours")),),
        _QK_NORM_CHANGES,
    ),
    Entry(
        "batch.global_size",
        lambda at: _batch(at, at.batch_tokens or 0.0),
        (
            Finding(
                lambda at: f"{short(at.batch_tokens or 0)} tokens a step, to within an eighth", YOURS, "--batch-tokens"
            ),
        ),
        "how many GPUs there are to fill",
        lambda at: at.batch_tokens is not None,
    ),
    Entry(
        "batch.global_size",
        lambda at: _batch(at, 2 ** round(math.log2(gpt3_batch_tokens(at.parameters)))),
        (
            Finding(
                lambda at: (
                    f"{short(gpt3_batch_tokens(at.parameters))} tokens by the line through GPT-3's eight sizes; "
                    "taken is the nearest power of two"
                ),
                GPT3,
                "Table 2.1",
            ),
            Finding(
                lambda at: f"for the lowest loss at these FLOPs, {short(deepseek_batch_tokens(at.flops))} tokens",
                DEEPSEEK,
                supports=False,
            ),
            Finding("stability hardly hangs on it: 256 to 1024 sequences came out alike", WORTSMAN, "E.9", False),
        ),
        "how many GPUs there are to fill: --batch-tokens",
    ),
    Entry(
        "run.steps",
        lambda at: math.ceil(at.tokens / (at.chosen["batch.global_size"] * at.config.model.sequence_length)),
        (
            Finding(lambda at: f"{short(at.tokens)} tokens", YOURS, "--tokens"),
            Finding(
                lambda at: f"{at.tokens / at.parameters:,.0f} for each parameter; compute is spent best at about 20",
                CHINCHILLA,
                supports=False,
            ),
        ),
        "more tokens, or a smaller model for the same compute",
    ),
    Entry(
        "optimizer.learning_rate",
        lambda at: two_digits(gpt3_learning_rate(at.parameters)),
        (
            Finding(
                lambda at: (
                    f"{_nearest(at)}; by the line through GPT-3's eight sizes, which meets each to within 22 %, "
                    f"{gpt3_learning_rate(at.parameters):.2g}"
                ),
                GPT3,
                "Table 2.1",
            ),
            Finding(
                lambda at: (
                    f"for the lowest loss at these FLOPs, {deepseek_learning_rate(at.flops):.2g}, by a law that was "
                    "fitted from 1e17 to 2e19 FLOPs"
                ),
                DEEPSEEK,
                supports=False,
            ),
        ),
        "a sweep of your own data, which alone can tell: public rates for one size differ by more than twice",
        lambda at: at.config.optimizer.parametrization == "standard",
    ),
    Entry(
        "optimizer.learning_rate",
        lambda at: at.config.optimizer.learning_rate,
        (),
        "a sweep; yours is left as it is, for under this parametrization it is the base model's rate, of which no "
        "source here says anything",
    ),
    Entry(
        "schedule.warmup_steps",
        lambda at: max(1, min(WARMUP, round(WARMUP_SHARE * at.chosen["run.steps"]))),
        (
            Finding("OPT-175B had 2000 steps", OPT, "§2.2"),
            Finding("OLMo 2 7B and 32B as many", OLMO2_CODE),
            Finding(
                "5 % of 1e5 steps, the bound for shorter runs here; longer ones lowered loss and LR sensitivity",
                WORTSMAN,
            ),
        ),
        lambda at: (
            "a learning rate near what the model bears: up to 5 % of the run, "
            f"{max(1, round(WARMUP_SHARE * at.chosen['run.steps'])):,} steps"
        ),
    ),
    Entry(
        "schedule.min_learning_rate",
        lambda at: two_digits(at.chosen["optimizer.learning_rate"] / 10),
        (
            Finding("a tenth of the peak for OPT-175B", OPT, "§2.2"),
            Finding("from 3e-4 to 3e-5 for OLMo 2 7B", OLMO2_CODE),
            Finding("from 6e-5 to 6e-6 for BLOOM 176B", BLOOM),
        ),
        "a run that is to be continued: schedule.kind=wsd",
    ),
    Entry(
        "optimizer.betas",
        lambda at: [0.9, 0.95],
        (
            Finding("OPT-175B was trained with these", OPT, "§2.2"),
            Finding("models of up to 4.8B parameters", WORTSMAN),
            Finding("OLMo 2", OLMO2_CODE),
        ),
        "fast spikes: a lower second one (arXiv 2506.04805, second-hand)",
    ),
    Entry(
        "optimizer.eps",
        lambda at: SMALL_EPS,
        (
            Finding(
                "the gradient RMS falls with size; at 4.8B parameters and a learning rate of 0.3, 1e-15 gave a lower "
                "loss than 1e-8, and 1e-6 diverged",
                WORTSMAN,
                "§3.4",
            ),
            Finding("OLMo 2 7B and 32B were trained with 1e-8", OLMO2_CODE, supports=False),
        ),
        "a gradient RMS (probe grad_rms) that stays far above 1e-7: 1e-8 does as well",
        lambda at: at.parameters >= LARGE,
    ),
    Entry(
        "optimizer.eps",
        lambda at: ORDINARY_EPS,
        (
            Finding(
                "it was small enough up to 4.8B parameters, but there not at a learning rate of 0.3", WORTSMAN, "§3.4"
            ),
            Finding("OLMo 2 went from 1e-5 to it, for smaller gradient norms", OLMO2, "§3"),
        ),
        "a gradient RMS (probe grad_rms) below 1e-7: 1e-15",
    ),
    Entry(
        "optimizer.weight_decay",
        lambda at: 1e-4,
        (Finding("1e-4, where it is independent of the learning rate", WORTSMAN),),
        "0.1 with optimizer.independent_weight_decay=false",
        lambda at: at.config.optimizer.independent_weight_decay,
    ),
    Entry(
        "optimizer.weight_decay",
        lambda at: 0.1,
        (
            Finding("OPT-175B was trained with it", OPT, "§2.2"),
            Finding("BLOOM 176B", BLOOM),
            Finding("OLMo 2 7B", OLMO2_CODE),
        ),
        "a best learning rate that is narrow: optimizer.independent_weight_decay=true with 1e-4 lowers LR sensitivity "
        "(arXiv 2309.14322)",
    ),
    Entry(
        "optimizer.clip_grad",
        lambda at: 1.0,
        (
            Finding("OPT-175B began with it, and went down to 0.3 on the way", OPT, "§2.2"),
            Finding("PaLM 540B had it, and some 20 spikes in spite of it", PALM, "§5.1"),
            Finding("models of up to 4.8B parameters had it", WORTSMAN),
        ),
        "spikes of the gradient norm: optimizer.clipping=zclip or adagc",
    ),
    Entry(
        "loss.z_loss",
        lambda at: 1e-4,
        (
            Finding("PaLM 540B was trained with it", PALM, "§5"),
            Finding("it mends the drift of output logits", WORTSMAN, "§3.2"),
            Finding(
                "LR sensitivity of 16M parameters without weight decay is 0.05 with it, 0.26 without, one seed",
                OUTPUT_EMBEDDINGS,
            ),
            Finding("OLMo 2's configurations have 1e-5", OLMO2_CODE, supports=False),
            Finding(
                "no difference in best loss or LR sensitivity within 200 steps, at 25k to 788k parameters",
                SIZES,
                "",
                False,
            ),
        ),
        "optimizer.mu_centering=true does the same without a coefficient (arXiv 2601.02031)",
        lambda at: not (at.config.loss.mu_loss or at.config.optimizer.mu_centering),
    ),
    Entry(
        "guard.mode",
        lambda at: "recover",
        (
            Finding(
                "PaLM 540B went back and skipped the data at some 20 spikes, and they did not return", PALM, "§5.1"
            ),
            Finding("GLM-130B went back and skipped data, too", GLM, "log"),
            Finding("OPT-175B went back with a lower learning rate", OPT, "§2.5"),
        ),
        "a run that is to show where it fails: watch",
    ),
    Entry(
        "guard.rollback_steps",
        lambda at: 100,
        (Finding("PaLM 540B went back about 100 steps", PALM, "§5.1"), Finding("WeLM 10B as well", WELM)),
        "checkpoints farther apart: it goes back to one that is as old at least",
    ),
    Entry(
        "guard.skip_steps",
        lambda at: 200,
        (Finding("PaLM 540B skipped 200 to 500 batches", PALM, "§5.1"), Finding("WeLM 10B 200", WELM)),
        "a spike that returns: the guard takes up to four times as many by itself",
    ),
)


def _batch(at: At, tokens: float) -> int:
    return batch_size(tokens, at.config.model.sequence_length, at.config.batch.micro_size)


def entries(at: At) -> Iterator[Entry]:
    """One for each field, in the order of the table, in which later ones may go by earlier ones."""
    seen: set[str] = set()
    for entry in EVIDENCE:
        subject = "recipe" if entry.key in ("model.recipe", "model.qk_norm") else entry.key
        if subject not in seen and entry.applies(at):
            seen.add(subject)
            yield entry
