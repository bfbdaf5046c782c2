"""What covers are drawn with: shapes and text in pixels of the finished cover."""
from typing import cast

from PIL import Image, ImageDraw, ImageFont

from devtools.artwork import TEXT

PIXELS, SMOOTH = 512, 2  # of a side of a cover; drawn for each of them
THIN = 5  # lines of pictograms


class Pen:
    """Draws on a cover in pixels of the finished one."""

    def __init__(self, image: Image.Image):
        self.image = image
        self.draw = ImageDraw.Draw(image)

    def width(self, text: str, size: float) -> float:
        return self.draw.textlength(text, font(size)) / SMOOTH

    def text(self, left: float, middle: float, text: str, size: float, color=TEXT, bold=0.0):
        """Writes a line with its middle at that height."""
        self.draw.text((left * SMOOTH, middle * SMOOTH), text, color, font(size), "lm",
                       stroke_width=bold * SMOOTH)

    def label(self, x: float, middle: float, text: str, size: float, color=TEXT, bold=0.0):
        """Writes a line with its middle there."""
        self.text(x - self.width(text, size) / 2, middle, text, size, color, bold)

    def box(self, left, top, width, height, fill=None, outline=None, line=0, radius=0.0):
        corners = [value * SMOOTH for value in (left, top, left + width, top + height)]
        self.draw.rounded_rectangle(corners, radius * SMOOTH, fill, outline, line * SMOOTH)

    def text_box(self, left, middle, text: str, size: float, color, fill) -> float:
        """Writes a line in a box, framed where there is no color to fill it; returns its width."""
        width, height = self.width(text, size) + 0.9 * size, 1.6 * size
        outline, radius = (None, 14) if fill else (color, height / 2)
        self.box(left, middle - height / 2, width, height, fill, outline, 4, radius)
        self.text(left + 0.45 * size, middle, text, size, color, bold=0.5)
        return width

    def line(self, *points, color=TEXT, width: float = THIN):
        self.draw.line([(x * SMOOTH, y * SMOOTH) for x, y in points], color,
                       round(width * SMOOTH), joint="curve")

    def polygon(self, *points, fill=TEXT):
        self.draw.polygon([(x * SMOOTH, y * SMOOTH) for x, y in points], fill)

    def circle(self, x, y, radius, fill: str | None = TEXT, outline=None, line=0):
        self.draw.ellipse([value * SMOOTH for value in (x - radius, y - radius, x + radius,
                                                        y + radius)], fill, outline,
                          line * SMOOTH)

    def paste(self, image: Image.Image, left, top, width, height, radius=12.0):
        """Puts an image into a box with round corners."""
        size = round(width * SMOOTH), round(height * SMOOTH)
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1),
                                               radius * SMOOTH, 255)
        self.image.paste(image.convert("RGB").resize(size, Image.Resampling.LANCZOS),
                         (round(left * SMOOTH), round(top * SMOOTH)), mask)


def font(size: float) -> ImageFont.FreeTypeFont:
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size * SMOOTH))
