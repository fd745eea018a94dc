"""What a screening recommends, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_stable.study.screened import Bounds, Screened, Screening


def advice(record: Screening) -> Iterator[str]:
    """What to do, a line for each source that is not clear, and one for the rest."""
    for each in record.sources:
        if each.verdict == "suspect":
            yield f"Inspect {each.name}, or remove it: {'; '.join(_charges(each, record))}."
            if each.worst:
                told = (
                    f"{place.document} of {place.dataset} (step {place.step:.1f}, loss {place.loss:+.0f})"
                    for place in each.worst
                )
                yield f"  Begin with documents {', '.join(told)}."
    for each in record.sources:
        if each.verdict == "open":
            yield f"Nothing can be said of {each.name}: {'; '.join(_doubts(each, record))}."
    clear = [each.name for each in record.sources if each.verdict == "clear"]
    if clear:
        yield f"Nothing speaks against {', '.join(clear)}, nor is there room in the intervals for it."


def _charges(each: Screened, record: Screening) -> Iterator[str]:
    out, tail = each.odd, each.tail
    if out.low is not None and out.low > record.least_share:
        yield (
            f"{percent(out)} of its windows are odd: they would move the model {record.far:g} times as far as the "
            f"median window, or their loss is {record.apart:g} robust standard deviations off"
        )
    if tail.low is not None and tail.low > record.least_tail:
        done = "up-weighted" if record.factor else "in the blend"
        yield f"{done}, it multiplies the tail of gradient norms by {factor_of(tail)}"


def _doubts(each: Screened, record: Screening) -> Iterator[str]:
    out, tail = each.odd, each.tail
    if out.high is not None and out.high > record.least_share:
        yield (
            f"{percent(out)} of its windows are odd, which may be more than {record.least_share:.0%} or not; more "
            "--windows narrow it"
        )
    if record.no_tails is not None:
        yield record.no_tails
    elif tail.high is None or tail.high > record.least_tail:
        yield f"its runs leave room for a factor of {factor_of(tail)} on the tail; more --seeds narrow it"


def percent(found: Bounds) -> str:
    """A share, with its interval."""
    return f"{found.value:.0%} ({found.low or 0:.0%} to {1 if found.high is None else found.high:.0%})"


def factor_of(found: Bounds) -> str:
    """A factor, with its interval."""
    if not found.low or found.high is None:
        return f"{found.value:.2f} (unknown)"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
