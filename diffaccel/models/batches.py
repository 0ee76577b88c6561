"""Parts of the arguments of a network call by samples, and back."""

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

# Arguments without a batch axis, whose length may look like one.
WITHOUT_BATCH = ("img_ids", "txt_ids", "image_rotary_emb", "rotary_embedding", "freqs_cis", "ip_adapter_masks")
# Arguments that may hold several entries per sample, in the order of the batch, such as one a frame.
SEVERAL_PER_SAMPLE = ("encoder_hidden_states", "encoder_attention_mask")
# Names of the network's first argument.
SAMPLE = ("sample", "hidden_states", "x")


def part(value, rows: int, index: int, parts: int = 2, name: str = ""):
    """One of equal parts of every tensor that has the batch as first axis, in nested dicts, lists and tuples.

    Args:
        value: arguments of a network call; lists of one tensor per sample are parted as such.
        rows: samples in the call, a multiple of ``parts``.
        index: 0 … parts − 1.
        name: of the argument.
    """
    if name in WITHOUT_BATCH:
        return value
    if isinstance(value, dict):
        return {key: part(item, rows, index, parts, key) for key, item in value.items()}
    if is_list_of_samples(value, rows):
        return value[index * (rows // parts) : (index + 1) * (rows // parts)]
    if isinstance(value, (list, tuple)):
        return type(value)(part(item, rows, index, parts, name) for item in value)
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    return value.chunk(parts)[index] if has_rows(value, rows, name) else value


def has_rows(value: torch.Tensor, rows: int, name: str) -> bool:
    """Whether the first axis of an argument is that of the batch."""
    several = name in SEVERAL_PER_SAMPLE and len(value) > 0 and len(value) % rows == 0
    return several or len(value) == rows


def is_list_of_samples(value, rows: int) -> bool:
    """Whether an argument is a list with a tensor for each sample, none of which is for the whole batch."""
    if not isinstance(value, list) or len(value) != rows:
        return False
    return all(isinstance(item, torch.Tensor) and item.ndim > 0 and len(item) != rows for item in value)


def joined(outputs: list):
    """What a network would have returned for all samples, from what it returned for parts of them.

    Raises:
        ValueError: what it returned holds something that is neither a tensor nor the same for all parts.
    """
    flat = [tree_flatten(output) for output in outputs]
    leaves = []
    for values in zip(*(values for values, _ in flat), strict=True):
        if isinstance(values[0], torch.Tensor):
            leaves.append(torch.cat(values))
        elif all(value is values[0] or value == values[0] for value in values):
            leaves.append(values[0])
        else:
            raise ValueError(f"Parts of a batch gave a {type(values[0]).__name__} that cannot be joined.")
    return tree_unflatten(leaves, flat[0][1])


def tensor_of(output) -> torch.Tensor:
    """The prediction (rows, …) in what a network returns: a tensor, a tuple or a diffusers output.

    Some networks return a list of one tensor per sample in it.
    """
    prediction = output if isinstance(output, torch.Tensor) else output[0]
    return torch.stack(prediction) if isinstance(prediction, list) else prediction


def doubled(output):
    """A network's output for one branch as that for two equal ones."""
    if isinstance(output, torch.Tensor):
        return torch.cat([output, output])
    if isinstance(output, dict):  # diffusers outputs are
        return type(output)(**{name: doubled(item) for name, item in output.items()})
    if isinstance(output, list):  # of samples
        return output + output
    return tuple(map(doubled, output)) if isinstance(output, tuple) else output


def find_samples(args: tuple, kwargs: dict):
    """The samples, a tensor (rows, …) or a list of tensors, in a call of a network; None where none is known to be that."""
    return next(iter([*args[:1], *(kwargs[name] for name in SAMPLE if name in kwargs)]), None)
