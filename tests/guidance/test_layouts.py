"""Recognising branches in numbers alone."""

import pytest
import torch

from diffaccel.core.errors import GuidanceError
from diffaccel.guidance.batches import half, rows_of
from diffaccel.guidance.layouts import KNOWN, LAYOUTS, cond_only, recognise, shaped
from diffaccel.models.batches import doubled, tensor_of

C, U = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
SCALES = [1.05, 1.5, 7.5, 100.0]


def evaluated(layout: str, c=C, u=U) -> list[torch.Tensor]:
    branches = {"cond": c, "uncond": u}
    if ", " in layout:
        return [branches[name] for name in layout.split(", ")]
    return [torch.cat([branches[name] for name in layout.split("-")])]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised(layout, scale, sign):
    result = sign * (U + scale * (C - U))
    found = recognise(evaluated(layout), result)
    assert (found.layout, found.sign, found.copies) == (layout, sign, 1)
    assert torch.equal(found.cond, sign * C) and torch.equal(found.uncond, sign * U)  # as the scheduler takes them
    torch.testing.assert_close(found.restore(sign * (U + scale * (C - U)), result), result, rtol=0, atol=0)
    for wrong in set(LAYOUTS) - {layout}:
        for trusted in (False, True):
            with pytest.raises(GuidanceError, match=r"has the layout|runs its branches"):
                recognise(evaluated(layout), result, wrong, trusted)


@pytest.mark.parametrize("scale", SCALES)
def test_half_precision_and_alike_branches(scale):
    for distance in (1.0, 0.1):
        u = C + distance * (U - C)
        c16, u16 = C.bfloat16(), u.bfloat16()
        result = u16 + scale * (c16 - u16)
        try:
            assert recognise(evaluated("cond-uncond", c16, u16), result).layout == "cond-uncond"
        except GuidanceError as refusal:  # rounding of that size hides on which side the result is
            assert "pass layout=" in str(refusal) and scale < 1.1


def test_a_result_between_the_branches_does_not_tell():
    for scale in (0.0, 0.3, 0.5, 1.0):
        result = U + scale * (C - U)
        with pytest.raises(GuidanceError, match="does not tell which is which"):
            recognise(evaluated("uncond-cond"), result)
        for layout in ("uncond-cond", "cond-uncond"):
            assert recognise(evaluated("uncond-cond"), result, layout).layout == layout


def test_branches_that_agree():
    for expected in (None, "cond-uncond"):
        found = recognise(evaluated("uncond-cond", C, C), C, expected)
        assert found.layout == expected and torch.equal(found.cond, C) and torch.equal(found.uncond, C)


def test_a_result_for_every_branch():
    """DiT's."""
    result = (U + 4 * (C - U)).repeat(2, 1, 1, 1)
    found = recognise(evaluated("cond-uncond"), result)
    assert (found.layout, found.copies) == ("cond-uncond", 2)
    assert torch.equal(found.cond, C) and found.restore(C, result).shape == result.shape


def test_one_branch():
    for output, result, sign in ((C, C, 1), (C, -C, -1)):
        found = recognise([output], result)
        assert found.uncond is None and found.layout is None and found.sign == sign and found.copies == 1
    found = cond_only(C, torch.cat([C, C]))
    assert found.copies == 2
    with pytest.raises(GuidanceError, match="does not step with the conditional prediction"):
        recognise([C], 1.01 * C)
    assert torch.equal(recognise([C], 1.01 * C, "cond, uncond", trusted=True).cond, C)
    with pytest.raises(GuidanceError, match="predicted 2 samples for a step of 3"):
        cond_only(C, torch.cat([C, C[:1]]))


@pytest.mark.parametrize(
    ("rows", "told"),
    [([6], "6 samples"), ([2, 4], "2 and 4"), ([4, 4], "4 and 4"), ([1, 1], "1 and 1"), ([2, 1], "2 and 1")],
)
def test_other_numbers_of_samples(rows, told):
    outputs = [torch.randn(count, *C.shape[1:]) for count in rows]
    with pytest.raises(GuidanceError, match=f"{told}.* for a step of 2; only one or two branches can be guided"):
        recognise(outputs, C)


def test_what_is_not_guidance():
    guided = U + 5 * (C - U)
    for factor in (0.05, 0.7):
        ratio = C.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        result = factor * ratio * guided + (1 - factor) * guided
        with pytest.raises(GuidanceError, match="not classifier-free guidance"):
            recognise(evaluated("uncond-cond"), result)
        assert torch.equal(recognise(evaluated("uncond-cond"), result, "uncond-cond", trusted=True).cond, C)
    token_norm = guided * (C.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True))
    with pytest.raises(GuidanceError, match="not classifier-free guidance"):
        recognise(evaluated("cond, uncond"), token_norm)


def test_a_scale_per_frame_but_not_per_channel_of_images():
    c, u = torch.randn(2, 1, 5, 3, 4, 4, generator=torch.Generator().manual_seed(1)).unbind()
    scale = torch.linspace(1, 3, 5).view(1, 5, 1, 1, 1)
    given = evaluated("uncond-cond", c, u), u + scale * (c - u)
    assert recognise(*given, per_frame=True).layout == "uncond-cond"
    with pytest.raises(GuidanceError, match="not classifier-free guidance"):
        recognise(*given)
    with pytest.raises(GuidanceError, match="not classifier-free guidance"):
        recognise(evaluated("uncond-cond", c[0], u[0]), (u + scale * (c - u))[0])


def test_shapes():
    variance = torch.cat([C, 9 * C], 1)
    assert torch.equal(shaped(variance, C), C)
    assert shaped(C, C[:, :, None]).shape == (2, 3, 1, 4, 4)
    assert shaped(torch.ones(2, 7, 5), torch.ones(2, 4, 5)).shape == (2, 4, 5)  # tokens of a reference follow
    for other in (torch.ones(2, 16, 3), torch.ones(2, 3, 16), torch.ones(2, 3, 4, 5), torch.ones(2, 4, 4, 4)):
        with pytest.raises(GuidanceError, match="what this pipeline does in between is not known"):
            shaped(C, other)


def test_known_pipelines_exist():
    import diffusers

    import diffaccel

    for name, layout in KNOWN.items():
        assert layout in LAYOUTS and (hasattr(diffusers, name) or hasattr(diffaccel, name)), name


def test_halves_of_arguments():
    batch, table = torch.arange(4.0), torch.ones(5, 3)
    arguments = {
        "sample": batch,
        "time": torch.tensor(7),
        "per_frame": torch.arange(8.0),
        "encoder_hidden_states": torch.arange(8.0),
        "img_ids": torch.ones(4, 3),
        "image_rotary_emb": (torch.ones(4, 2), torch.ones(4, 2)),
        "ip_adapter_masks": [torch.ones(1, 4, 8, 8)],
        "nested": {"pooled": batch, "names": ["a", "b", "c", "d"], "table": table, "none": None},
        "residuals": [batch[:, None] * k for k in range(4)],
        "pair": (batch, table),
        "prompts": [torch.ones(5, 2) * k for k in range(4)],
        "lengths": [3, 4],
    }
    first, second = half(arguments, 4, 0), half(arguments, 4, 1)
    assert first["sample"].tolist() == [0, 1] and second["sample"].tolist() == [2, 3]
    assert second["encoder_hidden_states"].tolist() == [4, 5, 6, 7]
    assert [r.shape for r in first["residuals"]] == [(2, 1)] * 4 and second["residuals"][2].tolist() == [[4], [6]]
    assert first["nested"]["pooled"].tolist() == [0, 1] and first["pair"][0].tolist() == [0, 1]
    assert [float(prompt[0, 0]) for prompt in second["prompts"]] == [2, 3]
    for name in ("time", "per_frame", "img_ids"):
        assert second[name] is arguments[name]
    assert second["nested"]["table"] is table and second["nested"]["names"] == ["a", "b", "c", "d"]
    assert second["image_rotary_emb"] is arguments["image_rotary_emb"] and second["lengths"] == [3, 4]
    assert second["ip_adapter_masks"] is arguments["ip_adapter_masks"]


def test_outputs_of_networks():
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    for output in (C, (C,), (C, None), Transformer2DModelOutput(sample=C), (list(C),)):
        assert torch.equal(tensor_of(output), C)
        twice = doubled(output)
        assert type(twice) is type(output) and torch.equal(tensor_of(twice), torch.cat([C, C]))
    assert rows_of((C,), {}) == rows_of((), {"hidden_states": C, "other": C[:1]}) == rows_of((list(C),), {}) == 2
    with pytest.raises(GuidanceError, match=r"without an argument named .*\(latents\)"):
        rows_of((), {"latents": C})
