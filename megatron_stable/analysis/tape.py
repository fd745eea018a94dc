"""What a forward pass keeps for its backward pass, and what the backward pass needs beside it, by arithmetic.

A tape holds the operations of a forward pass as autograd would see them: what each takes, gives and saves. Values have a
size and an identity, so that what two operations save is counted once. Played backwards, it frees what autograd frees.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


class Value:
    """A tensor of which only the size is known, in bytes."""

    __slots__ = ("size",)

    def __init__(self, size: float) -> None:
        self.size = size


@dataclass(eq=False)
class Operation:
    """A step of the forward pass.

    Attributes:
        inputs: Those that get a gradient.
        saves: What is kept for backward.
        weight: Bytes of its weights' gradients, in the dtype of the model.
        scratch: Bytes that its backward needs for itself.
        through: Its output's gradient is that of all inputs, without a copy.
        recomputed: What it runs again in backward, instead of keeping it.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    saves: tuple[Value, ...] = ()
    weight: float = 0.0
    scratch: float = 0.0
    through: bool = False
    recomputed: Tape | None = None


@dataclass
class Tape:
    """The operations of a forward pass, in order."""

    operations: list[Operation] = field(default_factory=list)

    def put(
        self,
        size: float,
        *inputs: Value,
        saves: tuple[Value, ...] = (),
        weight: float = 0.0,
        scratch: float = 0.0,
        through: bool = False,
        recomputed: Tape | None = None,
    ) -> Value:
        """Append an operation with one output of ``size`` bytes; returns it."""
        out = Value(size)
        self.operations.append(Operation(inputs, (out,), saves, weight, scratch, through, recomputed))
        return out

    def split(self, x: Value, *sizes: float) -> tuple[Value, ...]:
        """Views of parts of ``x``: what saves one of them keeps all of ``x`` and must name that."""
        outputs = tuple(Value(size) for size in sizes)
        self.operations.append(Operation((x,), outputs))
        return outputs

    def kept(self, *beside: Value) -> float:
        """Bytes saved for backward, each value once, without those in ``beside``, which somebody else holds."""
        return sum(value.size for value in {value for op in self.operations for value in op.saves} - set(beside))

    def most(self, copies: float = 0.0, grows: bool = False, beside: tuple[Value, ...] = ()) -> float:
        """Bytes that live at the fullest moment of the backward pass.

        Args:
            copies: Bytes, per byte of a weight's gradient, of the copy of it that is made when it is added to its sum.
            grows: Whether gradients of weights stay; else each is gone when the next one comes.
            beside: Values that somebody else holds and counts.
        """
        uses = Counter(value for op in self.operations for value in op.saves)
        for value in beside:
            uses[value] += 1
        live = most = self.kept(*beside)
        owners: Counter[Value] = Counter()  # of each gradient, the values that it is the gradient of
        gradient: dict[Value, Value] = {}
        for op in reversed(self.operations):
            given = [gradient.pop(out) for out in op.outputs if out in gradient]
            if op.through:
                found = [(x, given[0]) for x in op.inputs] if given else []
            else:
                found = [(x, Value(x.size)) for x in op.inputs]
                live += sum(each.size for _, each in found)
            for _, each in found:
                owners[each] += 1
            again = 0.0
            if op.recomputed is not None:
                again = op.recomputed.most(copies, False, op.saves)
            most = max(most, live + op.scratch + op.weight + again)
            for value in op.saves:
                uses[value] -= 1
                live -= 0 if uses[value] else value.size
            for each in given:
                owners[each] -= 1
                live -= 0 if owners[each] > 0 else each.size
            most = max(most, live + op.weight * (1 + copies))
            live += op.weight if grows else 0
            for x, each in found:
                if x not in gradient:
                    gradient[x] = each
                    continue
                owners[each] -= 1  # added to what is there
                live -= 0 if owners[each] > 0 else each.size
        return most
