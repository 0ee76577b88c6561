"""What was read: the sentence that refuses a set of image files, and the description that identifies it.

Records are kept by position, so those of several processes can be joined; see `imagefiles.ImageReader.records`.
"""

from collections import Counter
from hashlib import sha256

from .errors import DataError

MAX_LISTED = 10
_MAX_SIZES = 12


def check_records(records: dict[int, dict], skip_bad: bool, total: int) -> None:
    """Refuse a set of image files that cannot be used, naming up to 10 offenders with their reasons.

    Args:
        records: by position, from one process or joined from several.
        skip_bad: unusable files are left out; then only a set without any usable one is refused.
        total: number of files in the container.

    Raises:
        DataError: (strict) an unusable file; (skip_bad) no usable file; no files at all.
    """
    if total == 0:
        raise DataError("There are no image files to read.")
    offenders = [records[position] for position in sorted(records) if "reason" in records[position]]
    if not offenders or (skip_bad and len(offenders) < len(records)):
        return
    listed = "; ".join(f"{record['name']}: {record['reason']}" for record in offenders[:MAX_LISTED])
    resize = " To bring all images to one size use --resize." if any("size" in record for record in offenders) else ""
    if skip_bad:
        raise DataError(f"None of the {total} image files can be used: {listed}.{resize}")
    more = " (reading stopped there)" if len(offenders) >= MAX_LISTED else ""
    raise DataError(
        f"{len(offenders)} image file(s) cannot be used{more}: {listed}. To leave them out use --skip-bad.{resize}"
    )


def summarise(records: dict[int, dict]) -> dict:
    """Describe a set of image files, JSON-able, independently of who read which part of it.

    Returns:
        count: usable files; digest: SHA-256 of the ordered list of their names and content hashes, the identity of the
        set; first and last of their names (None without any); histograms of formats, modes (Pillow's names) and sizes
        ("HxW", before resizing; of more than 12 different ones number, and min and max by pixels); rotated: files with
        an EXIF orientation; duplicates: files with the content of an earlier one; skipped: [{name, reason}].
    """
    ordered = [records[position] for position in sorted(records)]
    usable = [record for record in ordered if "reason" not in record]
    digest = sha256()
    for record in usable:
        digest.update(record["name"].encode() + b"\0" + bytes.fromhex(record["sha256"]))
    return {
        "count": len(usable),
        "digest": digest.hexdigest(),
        "first": usable[0]["name"] if usable else None,
        "last": usable[-1]["name"] if usable else None,
        "formats": _histogram(record["format"] for record in usable),
        "modes": _histogram(record["mode"] for record in usable),
        "sizes": _sizes(Counter(tuple(record["size"]) for record in usable)),
        "rotated": sum(record["rotated"] for record in usable),
        "duplicates": len(usable) - len({record["sha256"] for record in usable}),
        "skipped": [{"name": record["name"], "reason": record["reason"]} for record in ordered if "reason" in record],
    }


def _histogram(values) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _sizes(counts: Counter) -> dict:
    sizes = sorted(counts, key=lambda size: (size[0] * size[1], size))
    if len(sizes) > _MAX_SIZES:
        return {"number": len(sizes), "min": "{}x{}".format(*sizes[0]), "max": "{}x{}".format(*sizes[-1])}
    return {f"{height}x{width}": counts[height, width] for height, width in sizes}
