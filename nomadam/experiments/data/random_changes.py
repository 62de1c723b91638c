"""Random changes of a picture: a crop resized, a mirror image, and RandAugment, by given numbers.

Every function is a pure function of the picture and of numbers from 0 to below 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

GREY = (128, 128, 128)
CROP_DRAWS = 4
DRAWS_A_CHANGE = 3
# The side of the pictures of the recipe, whose shifts and squares are counted in pixels.
RECIPE_SIDE = 224


def random_crop(
    picture: "Image.Image",
    draws: Sequence[float],
    *,
    size: int,
    smallest_area: float,
) -> "Image.Image":
    """Cut a random rectangle out of a picture and resize it to a square, bilinearly.

    Its area is a part of the picture's, uniform from `smallest_area` to 1; width to height is
    log-uniform from 3/4 to 4/3. One that would not fit is made smaller until it does.

    Args:
        picture: any size; not modified.
        draws: four numbers: area, ratio, and the place along each axis.
        size: side of the result in pixels.
        smallest_area: above 0 and at most 1.

    Source: arXiv 1409.4842, section 6, where another try is made instead of a smaller one.

    Example:
        >>> from PIL import Image
        >>> random_crop(Image.new("RGB", (40, 30)), [0.5] * 4, size=8, smallest_area=0.1).size
        (8, 8)
    """
    from PIL import Image

    area, ratio, right, down = draws
    target = (smallest_area + (1 - smallest_area) * area) * picture.width * picture.height
    root = math.exp((2 * ratio - 1) * math.log(4 / 3) / 2)
    width, height = math.sqrt(target) * root, math.sqrt(target) / root
    fit = min(1.0, picture.width / width, picture.height / height)
    width, height = fit * width, fit * height
    left, top = right * (picture.width - width), down * (picture.height - height)
    # Rounding must not carry the far corner outside.
    box = (left, top, min(left + width, picture.width), min(top + height, picture.height))
    return picture.resize((size, size), Image.Resampling.BILINEAR, box=box)


def central_crop(picture: "Image.Image", *, size: int) -> "Image.Image":
    """Resize the shorter side to 8/7 of a size and cut a square of that size out of the middle.

    Only the square is resized, bilinearly: of a long and thin picture the whole would be huge.

    Example:
        >>> from PIL import Image
        >>> central_crop(Image.new("RGB", (40, 30)), size=14).size
        (14, 14)
    """
    from PIL import Image

    cut = min(picture.size) * size / round(size * 8 / 7)
    left, top = (picture.width - cut) / 2, (picture.height - cut) / 2
    return picture.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + cut, top + cut)
    )


def mirrored(picture: "Image.Image", draw: float) -> "Image.Image":
    """The picture, or its mirror image where the draw is below one half."""
    from PIL import ImageOps

    return ImageOps.mirror(picture) if draw < 0.5 else picture


def random_changes(
    picture: "Image.Image", draws: Sequence[float], *, magnitude: float
) -> "Image.Image":
    """RandAugment: some of sixteen changes, each drawn anew and made always, all of one magnitude.

    At magnitude M of 10, with s = M / 10: rotate by ± 30 s degrees; shear by ± 0.3 s; translate by
    ± 100 s pixels; paint a square grey, 40 s pixels from its centre to each side, which is any
    pixel; colour, contrast, brightness and sharpness times 1.8 s + 0.1; posterize to 4 s bits, at
    least 1; solarize from 256 s on; add 110 s to values below 128; autocontrast, equalize and
    invert have no strength. Counts are rounded down. So at 10 a picture is never solarized, and
    colours are strengthened always. Pixels are those of pictures of 224, in proportion for others.
    What comes in at the border is grey, and the nearest pixel is taken.

    Args:
        picture: in red, green and blue; not modified.
        draws: three numbers a change: which one, and the two places of a square, the first of
            which is also the sign.
        magnitude: M, from 0 to 10.

    Source: arXiv 1909.13719, section 3. The changes and their strengths are those of the recipe of
    arXiv 2205.01580: `randaug(2,10)` in `configs/vit_s16_i1k.py` of google-research/big_vision,
    which is `distort_image_with_randaugment` of `pp/archive/autoaugment.py`.

    Example:
        >>> from PIL import Image
        >>> grey = Image.new("RGB", (4, 4), GREY)
        >>> third = 2.5 / 16  # invert
        >>> random_changes(grey, [third, 0.2, 0.7], magnitude=10).getpixel((0, 0))
        (127, 127, 127)
    """
    strength = magnitude / 10
    for which, right, down in zip(draws[::3], draws[1::3], draws[2::3], strict=True):
        change = CHANGES[int(which * len(CHANGES))]
        picture = change(picture, strength, (right, down))
    return picture


# Of a picture, a strength from 0 to 1, and two numbers from 0 to below 1.
Change = Callable[["Image.Image", float, tuple[float, float]], "Image.Image"]


def _operation(name: str) -> Change:
    """One of Pillow's ImageOps that has no strength."""

    def change(
        picture: "Image.Image", strength: float, draws: tuple[float, float]
    ) -> "Image.Image":
        from PIL import ImageOps

        return getattr(ImageOps, name)(picture)

    return change


def _enhance(name: str) -> Change:
    """One of Pillow's ImageEnhance, which leave a picture as it is at 1."""

    def change(
        picture: "Image.Image", strength: float, draws: tuple[float, float]
    ) -> "Image.Image":
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(picture).enhance(1.8 * strength + 0.1)

    return change


def _values(changed: Callable[[int, float], int]) -> Change:
    """Each value alone, from 0 to 255, by itself and the strength."""

    def change(
        picture: "Image.Image", strength: float, draws: tuple[float, float]
    ) -> "Image.Image":
        return picture.point([changed(value, strength) for value in range(256)] * 3)

    return change


def _posterized(value: int, strength: float) -> int:
    lost = 8 - max(1, int(4 * strength))
    return value >> lost << lost


def _solarized(value: int, strength: float) -> int:
    return value if value < int(256 * strength) else 255 - value


def _added(value: int, strength: float) -> int:
    return min(255, value + int(110 * strength)) if value < 128 else value


def _rotate(picture: "Image.Image", strength: float, draws: tuple[float, float]) -> "Image.Image":
    return picture.rotate(_signed(30 * strength, draws), fillcolor=GREY)


def _affine(place: int, amount: float, *, pixels: bool = False) -> Change:
    """One number of the map from the new picture's places to the old one's."""

    def change(
        picture: "Image.Image", strength: float, draws: tuple[float, float]
    ) -> "Image.Image":
        from PIL import Image

        side = (picture.width if place == 2 else picture.height) / RECIPE_SIDE if pixels else 1
        numbers = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        numbers[place] += _signed(amount * strength * side, draws)
        return picture.transform(
            picture.size, Image.Transform.AFFINE, numbers, Image.Resampling.NEAREST, fillcolor=GREY
        )

    return change


def _cut_out(picture: "Image.Image", strength: float, draws: tuple[float, float]) -> "Image.Image":
    """Paint a square grey, of which a part may lie outside."""
    (left, right), (top, bottom) = (
        _square(side, strength, draw) for side, draw in zip(picture.size, draws, strict=True)
    )
    picture = picture.copy()
    picture.paste(GREY, (left, top, right, bottom))
    return picture


def _square(side: int, strength: float, draw: float) -> tuple[int, int]:
    half, centre = int(40 * strength * side / RECIPE_SIDE), int(draw * side)
    return max(0, centre - half), min(side, centre + half)


def _signed(amount: float, draws: tuple[float, float]) -> float:
    return amount if draws[0] < 0.5 else -amount


CHANGES: tuple[Change, ...] = (
    _operation("autocontrast"),
    _operation("equalize"),
    _operation("invert"),
    _rotate,
    _values(_posterized),
    _values(_solarized),
    _enhance("Color"),
    _enhance("Contrast"),
    _enhance("Brightness"),
    _enhance("Sharpness"),
    _affine(1, 0.3),
    _affine(3, 0.3),
    _affine(2, 100, pixels=True),
    _affine(5, 100, pixels=True),
    _cut_out,
    _values(_added),
)
