"""One branch of the arguments of a network call, and back."""

import torch

# Arguments without a batch axis, whose length may look like one.
_WITHOUT_BATCH = ("img_ids", "txt_ids", "image_rotary_emb", "freqs_cis")
# Arguments that may hold several entries per sample, in the order of the batch, such as one a frame.
_SEVERAL_PER_SAMPLE = ("encoder_hidden_states", "encoder_attention_mask")


def half(value, rows: int, index: int, name: str = ""):
    """One half of every tensor that has the batch as first axis, in nested dicts, lists and tuples.

    Args:
        value: arguments of a network call.
        rows: samples in the call, both halves together.
        index: 0 or 1.
        name: of the argument.
    """
    if isinstance(value, dict):
        return {key: half(item, rows, index, key) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and name not in _WITHOUT_BATCH:
        return type(value)(half(item, rows, index, name) for item in value)
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or name in _WITHOUT_BATCH:
        return value
    several = name in _SEVERAL_PER_SAMPLE and len(value) > 0 and len(value) % rows == 0
    return value.chunk(2)[index] if several or len(value) == rows else value


def tensor_of(output) -> torch.Tensor:
    """The prediction in what a network returns: a tensor, a tuple or a diffusers output."""
    return output if isinstance(output, torch.Tensor) else output[0]


def doubled(output):
    """A network's output for one branch as that for two equal ones."""
    if isinstance(output, torch.Tensor):
        return torch.cat([output, output])
    if isinstance(output, dict):  # diffusers outputs are
        return type(output)(**{name: doubled(item) for name, item in output.items()})
    return type(output)(map(doubled, output)) if isinstance(output, (list, tuple)) else output


def rows_of(args: tuple, kwargs: dict) -> int:
    """Samples in a call of a network."""
    return len(args[0] if args else next(kwargs[name] for name in ("sample", "hidden_states", "x") if name in kwargs))
