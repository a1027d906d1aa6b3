"""Rows laid one after another into few sequences, in place of padding each.

What keeps them apart is ``position_ids``, which begin at 0 with every row: without an attention
mask and a cache, transformers lets no token see a row other than its own. Whether a model really
does is found by trying: :func:`require_apart`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e2lora.tasks.columns import Numbers

PROBE_TOKENS = 8  # of each row that is tried
TOLERANCE, NARROW_TOLERANCE = 0.01, 0.03  # relative, of logits: narrow types round more


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows into sequences of at most ``capacity`` tokens: the longest first, where one first fits.

    >>> first_fit([3, 6, 2, 4], capacity=6)
    [[1], [3, 2], [0]]
    """
    sequences: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((k for k, left in enumerate(room) if lengths[row] <= left), len(room))
        if place == len(room):
            sequences.append([])
            room.append(capacity)
        sequences[place].append(row)
        room[place] -= lengths[row]
    return sequences


def packed(
    input_ids: Sequence[Numbers],
    labels: Sequence[Numbers],
    pad: int,
    ignored: int,
    one_sequence: bool = False,
) -> dict[str, Tensor]:
    """``input_ids``, ``labels`` and ``position_ids``, each int64 [sequences, tokens].

    A row's first token has no label: it stands where the row before would predict it. Padding goes
    on where a sequence's last row ends, so only padding sees it.

    Args:
        one_sequence: all in one, however long; else each at most as long as the longest row.
    """
    lengths = [len(ids) for ids in input_ids]
    capacity = sum(lengths) if one_sequence else max(lengths)
    sequences = [list(range(len(lengths)))] if one_sequence else first_fit(lengths, capacity)
    shape = (len(sequences), capacity)
    ids, targets = np.full(shape, pad, np.int64), np.full(shape, ignored, np.int64)
    positions = np.empty(shape, np.int64)
    for k, rows in enumerate(sequences):
        end = 0
        for row in rows:
            begin, end = end, end + lengths[row]
            ids[k, begin:end] = input_ids[row]
            targets[k, begin:end] = labels[row]
            targets[k, begin] = ignored
            positions[k, begin:] = np.arange(capacity - begin)
    tensors = {"input_ids": ids, "labels": targets, "position_ids": positions}
    return {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}


def attends_flat(model: Any) -> bool:
    """Whether the model's attention tells rows apart in a single sequence only, as flash does."""
    return "flash" in (getattr(model.config, "_attn_implementation", None) or "")


Packer = Callable[[Sequence[Numbers]], dict[str, Tensor]]


def require_apart(model: Any, rows: Sequence[Numbers], pack: Packer) -> None:
    """Try whether a model keeps packed rows apart. Collective where weights are partitioned.

    Of rows one after another, every second one's logits must be those that it has alone, and its
    first token's must not change with the tokens of the row before it, from which every leak comes.
    Medians decide: a rounding can send a few tokens of a narrow type to other experts.

    Args:
        rows: token ids of an even number of rows.
        pack: makes a batch of rows of token ids, as training does.

    Raises:
        ValueError: it doesn't.
    """
    size = min(PROBE_TOKENS, *map(len, rows))
    probe = np.stack([np.asarray(row[:size], dtype=np.int64) for row in rows])
    changed = probe.copy()
    changed[::2] = (changed[::2] + 1) % (int(probe.max()) + 1)  # no token as it was
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            behind, behind_changed = (
                _logits(model, pack([probe.ravel(), *some]))[-1, -probe.size :]
                for some in (probe, changed)
            )
            alone = _logits(model, {"input_ids": torch.from_numpy(probe[1::2])})
    except TypeError as error:
        raise ValueError(_refusal(model, f"it takes no position ids ({error})")) from error
    finally:
        model.train(training)
    behind, behind_changed = (
        logits.view(*probe.shape, -1)[1::2] for logits in (behind, behind_changed)
    )
    wide = model.dtype in (torch.float32, torch.float64)
    tolerance = TOLERANCE if wide else NARROW_TOLERANCE
    if not (seen := _difference(behind_changed[:, 0], behind[:, 0])) <= tolerance:
        why = f"a row's logits change by {seen:.1%} with the tokens of the row before it"
        raise ValueError(_refusal(model, why))
    if not (moved := _difference(behind, alone)) <= tolerance:
        why = f"a row's logits differ by {moved:.1%} from those it has alone"
        raise ValueError(_refusal(model, why))


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """float32, [sequences, tokens, vocabulary]."""
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    return model(**inputs, use_cache=False).logits.float()


def _difference(one: Tensor, other: Tensor) -> float:
    """Of the median token, relative to how far its logits spread."""
    spread = other - other.mean(-1, keepdim=True)
    return float(((one - other).norm(dim=-1) / spread.norm(dim=-1)).median())


def _refusal(model: Any, why: str) -> str:
    attention = getattr(model.config, "_attn_implementation", None)
    return (
        "`packing` needs a model and an attention that keep the rows of a sequence apart; "
        f"{type(model).__name__} with attention {attention!r} does not: {why}. Set "
        "`packing=False`, or another `attn_implementation` of the model."
    )


def cannot_pack(kind: str) -> ValueError:
    return ValueError(
        "`packing` lays rows one after another for a causal model that predicts tokens; task "
        f"{kind!r} asks the model about each row as a whole. Set `packing=False`."
    )
