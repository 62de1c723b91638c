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
DRAWS_A_CHANGE = 2


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

    Example:
        >>> from PIL import Image
        >>> central_crop(Image.new("RGB", (40, 30)), size=14).size
        (14, 14)
    """
    from PIL import Image

    scale = round(size * 8 / 7) / min(picture.size)
    width, height = (max(size, round(scale * side)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def mirrored(picture: "Image.Image", draw: float) -> "Image.Image":
    """The picture, or its mirror image where the draw is below one half."""
    from PIL import ImageOps

    return ImageOps.mirror(picture) if draw < 0.5 else picture


def random_changes(
    picture: "Image.Image", draws: Sequence[float], *, magnitude: float
) -> "Image.Image":
    """RandAugment: some of fourteen changes, each drawn anew, all of one magnitude.

    At magnitude M of 10, with s = M / 10 and either sign where there is one: rotate by 30 s
    degrees; shear by 0.3 s; translate by 0.45 s of the side; colour, contrast, brightness and
    sharpness times 1 ± 0.9 s; solarize above 256 (1 − s); posterize to 8 − 4 s bits; autocontrast,
    equalize and identity have no strength. What comes in at the border is grey.

    Args:
        picture: in red, green and blue; not modified.
        draws: two numbers a change: which one, and its sign.
        magnitude: M, from 0 to 10.

    Source: arXiv 1909.13719, section 3, with the strengths of arXiv 1805.09501, table 6.

    Example:
        >>> from PIL import Image
        >>> grey = Image.new("RGB", (4, 4), GREY)
        >>> random_changes(grey, [0.99, 0.2], magnitude=10) == grey
        False
    """
    strength = magnitude / 10
    for which, sign in zip(draws[::2], draws[1::2], strict=True):
        change = CHANGES[int(which * len(CHANGES))]
        picture = change(picture, strength if sign < 0.5 else -strength)
    return picture


Change = Callable[["Image.Image", float], "Image.Image"]


def _identity(picture: "Image.Image", strength: float) -> "Image.Image":
    return picture


def _operation(name: str, argument: Callable[[float], int] | None = None) -> Change:
    """One of Pillow's ImageOps, with an argument that follows the strength."""

    def change(picture: "Image.Image", strength: float) -> "Image.Image":
        from PIL import ImageOps

        arguments = () if argument is None else (argument(abs(strength)),)
        return getattr(ImageOps, name)(picture, *arguments)

    return change


def _enhance(name: str) -> Change:
    """One of Pillow's ImageEnhance, which leave a picture as it is at 1."""

    def change(picture: "Image.Image", strength: float) -> "Image.Image":
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(picture).enhance(1 + 0.9 * strength)

    return change


def _rotate(picture: "Image.Image", strength: float) -> "Image.Image":
    from PIL import Image

    return picture.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=GREY)


def _affine(place: int, amount: float, *, of_side: bool = False) -> Change:
    """One number of the map from the new picture's places to the old one's."""

    def change(picture: "Image.Image", strength: float) -> "Image.Image":
        from PIL import Image

        side = (picture.width if place == 2 else picture.height) if of_side else 1
        numbers = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        numbers[place] += amount * strength * side
        return picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            numbers,
            Image.Resampling.BILINEAR,
            fillcolor=GREY,
        )

    return change


CHANGES: tuple[Change, ...] = (
    _identity,
    _operation("autocontrast"),
    _operation("equalize"),
    _rotate,
    _operation("posterize", lambda strength: round(8 - 4 * strength)),
    _enhance("Color"),
    _enhance("Contrast"),
    _enhance("Brightness"),
    _enhance("Sharpness"),
    _affine(1, 0.3),
    _affine(3, 0.3),
    _affine(2, 0.45, of_side=True),
    _affine(5, 0.45, of_side=True),
    _operation("solarize", lambda strength: round(256 * (1 - strength))),
)
