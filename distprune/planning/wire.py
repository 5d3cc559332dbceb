"""Bytes that a rank sends in an optimizer step.

Collectives are counted as rings do them: (world - 1) / world of a tensor in a reduce-scatter or a gathering, twice that
in an all-reduce.
"""

from distprune.planning.shapes import Layout, Shapes

STATISTICS = 64 << 10
"""The most that a rank hands to collectives where all weights are pruned as one, in bytes; more with a scope of each
matrix, and little beside the gradients."""


def bytes_per_step(
    student: Shapes,
    layout: Layout,
    teacher: tuple[Shapes, Layout] | None,
    accumulation: int,
    prunings: float,
    score_gradients: float = 0.0,
) -> dict[str, int]:
    """Return the bytes that a rank sends in an optimizer step, by what for.

    Args:
        student: sizes of its parameters.
        layout: of the student.
        teacher: sizes and layout of one that is run beside it.
        accumulation: forward passes in a step.
        prunings: in a step, on the average.
        score_gradients: global batches for the score alone, in a step on the average.
    """
    gradients, weights = _gradients(student, layout, accumulation), _weights(student, layout, accumulation)
    sent = {
        "gradients": gradients,
        "student's weights": weights,
        "teacher's weights": 0,
        "pruning's statistics": round(STATISTICS * prunings) if layout.world > 1 else 0,
        "gradients for the score": round((gradients + (weights if layout.stage == 3 else 0)) * score_gradients),
    }
    if teacher is not None and teacher[1].stage == 3:
        shapes, its_layout = teacher
        sent["teacher's weights"] = _ring(sum(shapes.sizes) * its_layout.width, layout.world) * accumulation
    return sent


def _ring(size: int, world: int) -> int:
    return size * (world - 1) // world


def _gradients(student: Shapes, layout: Layout, accumulation: int) -> int:
    """Return the bytes of all-reduces, which ZeRO-1 and 2 use as well, and of ZeRO-3's reduce-scatters."""
    once = _ring(sum(student.trained) * layout.width, layout.world)
    if layout.stage == 3:
        return once * accumulation
    return 2 * once * (accumulation if layout.stage == 2 else 1)


def _weights(student: Shapes, layout: Layout, accumulation: int) -> int:
    """Return the bytes of the gathering after an update, or of ZeRO-3's in each pass."""
    if layout.stage == 0:
        return 0
    if layout.stage < 3:
        return _ring(sum(student.trained) * layout.width, layout.world)
    whole = sum(student.sizes)
    passes = 1 if whole <= layout.reuse // 2 else 2  # what is still there in the backward pass is not gathered again
    return _ring(whole * layout.width, layout.world) * passes * accumulation
