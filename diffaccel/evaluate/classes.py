"""Class by class: are generated digits what they should be, as varied as real ones, and not copies?"""

import torch

from ..core.errors import DataError
from ..core.images import to_unit_range
from ..models.emoji_encoder import load_emoji_encoder
from .features import get_features
from .groups import assign_groups
from .metrics.frechet import frechet_estimate
from .moments import GroupedMoments

_CHUNK = 512


def class_accuracy(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of digits, uint8 (N, 1, S, S) with S 8 or 28, that the bundled classifier assigns to their labels (N,)."""
    return float(_recognised(images, labels).double().mean())


def caption_accuracy(images: torch.Tensor, prompts: list[str], among: list[str], most: int = 1) -> float:
    """Share of emoji, uint8 (N, 3, 64, 64), whose own prompt is one of the nearest of all prompts to them.

    Nearness is that of the bundled encoder of pictures and texts (`models.emoji_encoder`), which tiny-sd was not trained
    on but whose text half it reads prompts with.

    Args:
        prompts: N prompts that were asked for.
        among: the prompts to choose from; they include all of these.
        most: how many of the nearest count.
    """
    encoder = load_emoji_encoder()
    choices = list(dict.fromkeys([*among, *prompts]))
    place = {text: index for index, text in enumerate(choices)}
    with torch.no_grad():
        texts = torch.cat([encoder.embed_texts(choices[i : i + _CHUNK]) for i in range(0, len(choices), _CHUNK)])
        pictures = torch.cat([encoder.picture(to_unit_range(part)) for part in images.split(_CHUNK)])
    nearest = (pictures @ texts.T).topk(most).indices
    own = torch.tensor([place[prompt] for prompt in prompts])
    return float((nearest == own[:, None]).any(1).double().mean())


def _recognised(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    classifier = get_features("mnist64" if images.shape[-1] == 28 else "digits64").classifier
    with torch.no_grad():
        return torch.cat([classifier(to_unit_range(batch)).argmax(1) for batch in images.split(_CHUNK)]) == labels


def class_report(images: torch.Tensor, labels: torch.Tensor, reference: tuple[torch.Tensor, torch.Tensor]) -> dict:
    """Compare labelled 8×8 digits with real ones, per class.

    Args:
        images: uint8 (N, 1, 8, 8), generated.
        labels: (N,) integers 0 … 9, the classes that were asked for.
        reference: real images and labels, e.g. `models.data.load_digits()`.

    Returns:
        JSON-able dict with ``accuracy`` (share of images that the bundled classifier assigns to their label), ``note``
        and ``classes``, a list with per class ``label``, ``n``, ``n_real``, ``accuracy``, ``fd`` and ``fd_corrected``
        (FD-digits64 within the class, None where N < 2 or below the jackknife's minimum), ``diversity`` and
        ``diversity_real`` (mean distance of two different images of the class), ``nearest_real`` (mean distance to the
        nearest real image) and ``copies`` (images equal to a real one in every pixel). Distances are root mean square
        differences in grey levels.

    Raises:
        DataError: labels that do not fit the images.
    """
    real_images, real_labels = reference
    if len(images) != len(labels) or len(real_images) != len(real_labels) or len(images) == 0:
        raise DataError(f"Got {len(images)} images with {len(labels)} labels; every image needs one.")
    extractor, right = get_features("digits64"), _recognised(images, labels)
    rows = []
    for label in sorted(set(labels.tolist())):
        fake, real = images[labels == label], real_images[real_labels == label]
        nearest = _nearest(fake, real)
        fd = _class_distance(fake, real, extractor)
        rows.append(
            {
                "label": label,
                "n": len(fake),
                "n_real": len(real),
                "accuracy": float(right[labels == label].double().mean()),
                "fd": fd and fd.value,
                "fd_corrected": fd and fd.bias_corrected,
                "diversity": _mean_pair_distance(fake),
                "diversity_real": _mean_pair_distance(real),
                "nearest_real": float(nearest.mean()) if nearest is not None else None,
                "copies": int((nearest == 0).sum()) if nearest is not None else 0,
            }
        )
    smallest = min(min(row["n"], row["n_real"]) for row in rows)
    note = (
        f"Distances per class rest on as few as {smallest} images for 64 features: compare classes and runs of equal "
        "size with each other, not with the distance of the whole set."
    )
    return {"accuracy": float(right.double().mean()), "note": note, "classes": rows}


def _class_distance(fake: torch.Tensor, real: torch.Tensor, extractor):
    if min(len(fake), len(real)) < 2:
        return None
    moments = [
        GroupedMoments(extractor.num_features).update(extractor(side), assign_groups(None, len(side)))
        for side in (fake, real)
    ]
    return frechet_estimate(*moments)


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.flatten(1).float(), b.flatten(1).float()
    # Differences first, squares after: equal images must be at distance 0 exactly.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / a.shape[1] ** 0.5


def _mean_pair_distance(images: torch.Tensor) -> float | None:
    if len(images) < 2:
        return None
    total = sum(float(_distances(part, images).double().sum()) for part in images.split(_CHUNK))
    return total / (len(images) * (len(images) - 1))


def _nearest(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor | None:
    if len(real) == 0:
        return None
    return torch.cat([_distances(part, real).min(dim=1).values for part in fake.split(_CHUNK)])
