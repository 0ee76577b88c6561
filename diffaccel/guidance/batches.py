"""One branch of the arguments of a network call, and back."""

import torch

from ..core.errors import GuidanceError

# Arguments without a batch axis, whose length may look like one.
_WITHOUT_BATCH = ("img_ids", "txt_ids", "image_rotary_emb", "freqs_cis", "ip_adapter_masks")
# Arguments that may hold several entries per sample, in the order of the batch, such as one a frame.
_SEVERAL_PER_SAMPLE = ("encoder_hidden_states", "encoder_attention_mask")
# Names of the network's first argument.
SAMPLE = ("sample", "hidden_states", "x")


def half(value, rows: int, index: int, name: str = ""):
    """One half of every tensor that has the batch as first axis, in nested dicts, lists and tuples.

    Args:
        value: arguments of a network call; lists of one tensor per sample are halved as such.
        rows: samples in the call, both halves together.
        index: 0 or 1.
        name: of the argument.
    """
    if name in _WITHOUT_BATCH:
        return value
    if isinstance(value, dict):
        return {key: half(item, rows, index, key) for key, item in value.items()}
    if isinstance(value, list) and len(value) == rows and not any(_shared(item, rows) for item in value):
        return value[rows // 2 :] if index else value[: rows // 2]
    if isinstance(value, (list, tuple)):
        return type(value)(half(item, rows, index, name) for item in value)
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    several = name in _SEVERAL_PER_SAMPLE and len(value) > 0 and len(value) % rows == 0
    return value.chunk(2)[index] if several or len(value) == rows else value


def _shared(item, rows: int) -> bool:
    """Whether an entry of a list is for the whole batch, not for one sample."""
    return not isinstance(item, torch.Tensor) or item.ndim == 0 or len(item) == rows


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


def samples_of(args: tuple, kwargs: dict):
    """The samples, a tensor (rows, …) or a list of tensors, in a call of a network.

    Raises:
        GuidanceError: none of its arguments is known to be that.
    """
    found = [*args[:1], *(kwargs[name] for name in SAMPLE if name in kwargs)]
    if not found:
        raise GuidanceError(
            f"This pipeline calls its network without an argument named {' or '.join(SAMPLE)} ({', '.join(kwargs)}); such "
            "networks cannot be guided."
        )
    return found[0]


def rows_of(args: tuple, kwargs: dict) -> int:
    """Samples in a call of a network; see `samples_of`."""
    return len(samples_of(args, kwargs))
