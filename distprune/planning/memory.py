"""The memory of a rank in its fullest moment: arithmetic from shapes, after what DeepSpeed 0.19 allocates.

A step has three moments that may be the fullest: the end of the forward pass, with all activations; the reduction of
the gradients, at the end of the backward pass; and the update. Evaluations, in larger batches, and the pass that makes
a teacher's cache come beside them. On a CPU, what torch frees in pieces smaller than a huge
page stays with the process: the C library keeps it, and uses it again only where it fits. So such activations, and such
weights as they were loaded where DeepSpeed moves them into flat tensors, count in every moment.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

from distprune.allocator import LARGE
from distprune.planning.activations import Activations
from distprune.planning.held import MASTER, mask_bytes, reduced, state_bytes, stepped, weight_bytes
from distprune.planning.shapes import Layout, Shapes

GAPS = 1.5
"""What freed pieces take with the gaps between them, over their own bytes: measured (docs/performance.md)."""
LIBRARIES = 100 << 20
"""Bytes that libraries take beside tensors on a CPU once a step has run: measured on one machine, 90 to 110 MiB."""
_STAGE_0_BUCKET = 500_000_000
_FP32 = 4


@dataclass(frozen=True)
class Need:
    """Everything that a rank's memory depends on.

    Attributes:
        student: sizes of its parameters.
        layout: of the student.
        teacher: sizes and layout of one that is run beside it.
        activations: of the student, for one example.
        micro_batch: examples in a forward pass on one rank.
        on_gpu: whether ranks have GPUs.
        score_bytes: what the score holds of each prunable weight.
        evaluation: the most that tensors take in the forward pass of an evaluation's batch.
        teaching: the same of the teacher, before the first step.
        cached: sizes and layout of a teacher whose outputs are cached.
    """

    student: Shapes
    layout: Layout
    teacher: tuple[Shapes, Layout] | None
    activations: Activations
    micro_batch: int
    on_gpu: bool
    score_bytes: int = 0
    evaluation: int = 0
    teaching: int = 0
    cached: tuple[Shapes, Layout] | None = None


class Bytes(NamedTuple):
    """Bytes by what they are for: on the rank's device, and beside a GPU in the host's memory."""

    device: Counter[str]
    host: Counter[str]


def moments(need: Need) -> dict[str, Bytes]:
    """Return what is held in each moment of a run that may be the fullest, by its name."""
    found = {"forward pass": _forward(need), "reduction": _reduction(need), "update": _update(need)}
    if need.evaluation:
        passes = [_without_gradients(need, need.student, need.layout, need.evaluation) + _freed_activations(need)]
        if need.teacher is not None:
            passes.append(_without_gradients(need, *need.teacher, need.teaching))
        found["evaluation"] = Bytes(max(passes, key=Counter.total), Counter())
    lasting = _lasting(need)
    every = {name: Bytes(lasting.device + each.device, lasting.host + each.host) for name, each in found.items()}
    if need.cached is not None:  # the student comes behind it
        every["caching"] = _caching(need, *need.cached, need.teaching)
    return every


def peak(need: Need) -> Bytes:
    """Return what is held in a run's fullest moment, by the device."""
    return max(moments(need).values(), key=lambda moment: moment.device.total())


def _lasting(need: Need) -> Bytes:
    """Return what is held from step to step."""
    student, layout = need.student, need.layout
    masks = mask_bytes(student, layout)
    states = state_bytes(student, layout) | {"masks": masks}
    if need.score_bytes:
        states["score"] = masks * need.score_bytes
    weights = Counter({"weights": weight_bytes(student, layout)})
    device, host = Counter[str](), Counter[str]()
    (host if layout.offload_optimizer else device).update(states)
    (host if layout.offload_weights else device).update(weights)
    if need.teacher is not None:
        (host if need.teacher[1].offload_weights else device)["teacher"] = weight_bytes(*need.teacher)
    if layout.stage == 3:
        kept = sum(stepped(student, layout)) * layout.gradient_width
        (host if layout.offload_optimizer else device)["gradients"] += kept
        device["buckets"] = _bucket(need)
    if layout.offload_optimizer:
        host["gradients"] += sum(stepped(student, layout)) * _FP32
        _add_offload_buffers(need, device, host)
    return _placed(need, device, host)


def _add_offload_buffers(need: Need, device: Counter[str], host: Counter[str]) -> None:
    if need.layout.stage < 3:
        largest = max(need.student.trained) * need.layout.width
        device["buckets"] += largest
        host["buckets"] += largest + sum(stepped(need.student, need.layout)) * need.layout.width


def _placed(need: Need, device: Counter[str], host: Counter[str]) -> Bytes:
    """Return both; on a CPU all is in one memory, with what the C library keeps and libraries take."""
    if need.on_gpu:
        return Bytes(device, host)
    loaded = need.student.trained if need.layout.stage in (1, 2) else []
    if need.layout.stage == 3:
        loaded = [need.layout.piece(size) for size in need.student.trained]
    small = sum(size for each in loaded if (size := each * need.layout.width) < LARGE)
    return Bytes(device + host + Counter({"kept when freed": int(GAPS * small), "libraries": LIBRARIES}), Counter())


def gathered(shapes: Shapes, layout: Layout) -> int:
    """Return the weights that ZeRO-3 has gathered at once in a pass forward and backward.

    One rank has them all, and gathers only what ``offload_param`` keeps in the host's memory.

    One is kept whose next use is nearer than ``layout.reuse``: the last ones of the forward pass come first in the
    backward pass, so half of that distance stays. Every module that begins has ``layout.prefetch`` more weights
    fetched, which is more than most modules let go, so that up to ``layout.live`` are there.
    """
    if layout.stage < 3 or (layout.world == 1 and not layout.offload_weights):
        return 0
    ahead = layout.live if layout.prefetch else 0
    return min(sum(shapes.sizes), max(shapes.sizes) + max(ahead, layout.reuse // 2))


def _arriving(shapes: Shapes, layout: Layout, on_gpu: bool) -> int:
    """Return the weights that are there twice because a fetch has just come: in its flat tensor, and by themselves.

    On a CPU gloo has one more copy, of the fetch behind it.
    """
    fetch = max(*shapes.sizes, layout.prefetch)
    return min(gathered(shapes, layout), fetch if on_gpu else 2 * fetch)


def _gathered(need: Need) -> Counter[str]:
    """Return what ZeRO-3 has gathered of the student until the update, before which it lets all of it go."""
    return Counter({"gathered weights": gathered(need.student, need.layout) * need.layout.width})


def _forward(need: Need) -> Bytes:
    """Return what is held at the end of the forward pass, or of the teacher's behind it."""
    device = _gathered(need) + Counter({"activations": need.activations.total(need.micro_batch)})
    arriving = _arriving(need.student, need.layout, need.on_gpu) * need.layout.width
    if need.teacher is not None:
        shapes, layout = need.teacher[0], replace(need.teacher[1], reuse=0)  # a weight is used once in its pass
        device["teacher's gathered weights"] = gathered(shapes, layout) * layout.width
        arriving = max(arriving, _arriving(shapes, layout, need.on_gpu) * layout.width)
    return Bytes(device + Counter({"copies": arriving}), Counter())


def _without_gradients(need: Need, shapes: Shapes, layout: Layout, tensors: int) -> Counter[str]:
    """Return what a forward pass takes that no backward pass follows."""
    once = replace(layout, reuse=0)
    return Counter(
        {
            "gathered weights": gathered(shapes, once) * layout.width,
            "copies": _arriving(shapes, once, need.on_gpu) * layout.width,
            "outputs": tensors,
        }
    )


def _caching(need: Need, shapes: Shapes, layout: Layout, tensors: int) -> Bytes:
    """Return what a teacher takes while its outputs are computed."""
    device = _without_gradients(need, shapes, layout, tensors)
    weights = Counter({"teacher": weight_bytes(shapes, layout)})
    if need.on_gpu and layout.offload_weights:
        return Bytes(device, weights)
    return Bytes(device + weights + Counter({"libraries": 0 if need.on_gpu else LIBRARIES}), Counter())


def _freed_activations(need: Need) -> Counter[str]:
    """Return what of the activations a process still holds after the backward pass."""
    kept = 0 if need.on_gpu else int(GAPS * need.activations.total(need.micro_batch, LARGE))
    return Counter({"kept when freed": kept})


def _bucket(need: Need) -> int:
    """Return the bytes of the buckets: on a CPU of what is written of them."""
    size = need.layout.bucket * need.layout.buckets
    return (size if need.on_gpu else min(size, sum(need.student.trained))) * need.layout.width


def _reduction(need: Need) -> Bytes:
    """Return what is held while a bucket of gradients is reduced."""
    student, layout = need.student, need.layout
    trained = sum(student.trained)
    in_bucket = min(layout.bucket, trained) * layout.width
    device = _freed_activations(need)
    flat = in_bucket if layout.flattens and layout.world > 1 else 0
    if layout.stage == 0:
        device.update({"gradients": trained * layout.width})
        device["copies"] = min(trained, _STAGE_0_BUCKET) * layout.width
        return Bytes(device, Counter())
    if layout.stage == 3:
        device["copies"] = in_bucket * (1 if need.on_gpu else 2)  # gloo makes its own
        return Bytes(device + _gathered(need), Counter())
    own = 0 if layout.offload_optimizer else reduced(student, layout) * layout.gradient_width
    device["buckets"] = _bucket(need)
    if layout.stage == 1 and (need.on_gpu or layout.bucket < trained):
        device["gradients"] = trained * layout.width  # they wait for the last backward pass of a step
    elif layout.bucket < trained:
        device["activations"] = need.activations.total(need.micro_batch)  # the first reduction comes early
    if layout.bucket < trained:
        device["gradients"] += own
        device["copies"] = flat
    else:
        device["copies"] = max(own, flat)
    return Bytes(device, Counter())


def _update(need: Need) -> Bytes:
    """Return what is held while the optimizer steps, or after it while weights are gathered."""
    student, layout = need.student, need.layout
    device = _freed_activations(need)
    is_low = layout.width < _FP32
    if layout.stage == 0:
        device["gradients"] = sum(student.trained) * (layout.width + MASTER * is_low)
        return Bytes(device, Counter())
    if layout.offload_optimizer:
        return Bytes(device, Counter())
    largest = max(stepped(student, layout))
    copies = largest * (_FP32 + layout.width * is_low)
    own = reduced(student, layout) * layout.gradient_width if layout.stage < 3 else 0
    if layout.stage < 3 and layout.world > 1 and not need.on_gpu:
        whole = max(sum(group.values()) for group in student.groups) * layout.width  # gloo gathers into a copy
        if whole > own + copies:
            return Bytes(device + Counter({"copies": whole}), Counter())
    return Bytes(device + Counter({"gradients": own, "copies": copies}), Counter())
