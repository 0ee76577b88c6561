"""Conventions of other tools, read from their sources: what to set so that a number can be held against theirs.

All of them take the unbiased covariance, divided by N − 1, and compute KID with the kernel (x·y / d + 1)³; what is said
here is only where they differ. A preset never changes how files are decoded; the remarks tell for which files that
matters, and in what else the tool departs.
"""

from dataclasses import dataclass

from ..core.errors import unknown


@dataclass(frozen=True)
class Preset:
    """Conventions of one tool; None where the tool has no such metric.

    Attributes:
        name: registered name.
        summary: one line.
        source: version or commit that was read.
        resize: filter of `features.resize.FILTERS`, which also decides the normalisation.
        remarks: what stays different from the tool, or is peculiar to it.
        features: registered extractor.
        kid_subsets: number of random subsets that KID is averaged over.
        kid_subset_size: images per subset.
        is_splits: parts of the Inception Score.
        prdc_k: neighbours of precision and recall.
    """

    name: str
    summary: str
    source: str
    resize: str
    remarks: tuple[str, ...]
    features: str = "inception"
    kid_subsets: int | None = None
    kid_subset_size: int | None = None
    is_splits: int | None = None
    prdc_k: int | None = None


_PILLOW_RGB = (
    "decodes with Pillow's convert('RGB'): transparency is dropped, not composited on white; EXIF rotation is ignored; "
    "16-bit grey saturates above level 255 of 65535"
)

PRESETS = {
    record.name: record
    for record in (
        Preset(
            "pytorch-fid",
            "torch bilinear without antialias, input 2x/255 - 1",
            "pytorch-fid 0.3.0",
            "bilinear",
            (
                _PILLOW_RGB,
                "takes files directly in the folder, hidden ones too; lower-case extensions only; no GIF",
                "images of different sizes cannot share a batch",
                "fails where the matrix square root has imaginary parts above 1e-3 on its diagonal",
            ),
        ),
        Preset(
            "clean-fid",
            "Pillow bicubic in float, never rounded to bytes (mode 'clean')",
            "clean-fid 0.1.35",
            "pil-bicubic",
            (
                _PILLOW_RGB,
                "takes sub-folders and zip files; extensions in lower case, and JPEG, JPG, PNG; no GIF; also .npy arrays",
                "its weights are NVIDIA's TorchScript translation of the same TensorFlow graph",
                "KID subsets come from NumPy's unseeded generator and shrink to the smaller set; no deviation is given",
            ),
            kid_subsets=100,
            kid_subset_size=1000,
        ),
        Preset(
            "edm",
            "fid.py of EDM: TensorFlow 1 bilinear inside NVIDIA's Inception file",
            "NVlabs/edm, commit 008a4e5; EDM2 has the same FID",
            "tf1-bilinear",
            (
                "uses pixels as they are stored, without conversion to RGB: grey is repeated, palette files are read as "
                "their indices, transparency is a fourth channel, EXIF rotation is ignored",
                "refuses images that are not 8-bit or not all of one shape",
                "takes sub-folders and zip files, every extension that Pillow knows in any case",
                "its paper reports the lowest FID of three sets of 50 000 images",
            ),
        ),
        Preset(
            "torchmetrics",
            "torch bilinear with antialias; antialias=False is preset torch-fidelity",
            "torchmetrics 1.9.0",
            "bilinear-antialias",
            (
                "reads tensors, not files; floats (normalize=True) are cut to bytes, not rounded",
                "KID and Inception Score draw from torch's global generator and have no seed",
                "KID needs as many images as a subset; its deviation is divided by the number of subsets",
                "the deviation of the Inception Score is divided by the number of parts minus 1",
            ),
            kid_subsets=100,
            kid_subset_size=1000,
            is_splits=10,
        ),
        Preset(
            "torch-fidelity",
            "TensorFlow 1 bilinear, as the first FID code",
            "torch-fidelity 0.4.0",
            "tf1-bilinear",
            (
                _PILLOW_RGB,
                "takes png, jpg, jpeg in any case, sub-folders only with samples_find_deep",
                "KID needs as many images as a subset; subsets and order are drawn with NumPy, seed 2020",
                "a point on the border of a neighbourhood counts as inside for precision and recall",
            ),
            kid_subsets=100,
            kid_subset_size=1000,
            is_splits=10,
            prdc_k=3,
        ),
    )
}


def get_preset(name: str) -> Preset:
    """Return the preset with a registered name.

    Raises:
        UsageError: the name is not registered.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
