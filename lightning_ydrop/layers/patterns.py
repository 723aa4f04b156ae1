"""What a dropout pattern is: the shapes that AutoDropout chooses from, as plain frozen settings."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning_ydrop.checks import check_count, check_flag, check_fraction, is_real
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.stencils import COVERING, list_stencil

# A cell whose centre lies on the edge of a square belongs to one side of it, so half a turn may move such cells.
FULL_TURN = 360.0


@dataclass(frozen=True)
class ConvPattern:
    """Squares of a feature map that are dropped together (sec. "Methods", arXiv 2101.01761).

    A tiling of `repeat` x `repeat` squares is sheared, turned, and placed at random, for each sample and channel. Sizes
    are relative to the map, so a pattern means the same on maps of all sizes. On a map that is not square the squares
    are rectangles. `PatternDropout` applies a pattern. The paper lists no values and its code is not public: the ranges
    and defaults here are ours.

    Args:
        size: Side of a square over the side of the map, in [0, 1], rounded to whole pixels, at least one. 0: no
            pattern. 1: the whole map, which needs a `rate` below 1.
        stride: Gap between squares over the side of the map, in (0, 1], rounded to whole pixels, at least one.
        repeat: Squares in each direction, at least 1. On a map where they don't fit it uses fewer.
        rotate: Degrees, any finite number. 0 leaves the squares upright.
        shear_x: How far each row moves sideways for each row from the centre, any finite number.
        shear_y: How far each column moves down for each column from the centre, any finite number.
        share_c: One placement for all channels of a sample. Otherwise each channel has a placement of its own.
        residual: Apply the pattern to the shortcut of the residual block too. `apply_patterns` reads it.
        rate: Probability that a sample, or with `share_c=False` a channel of a sample, takes the pattern, in [0, 1].

    Raises:
        ConfigurationError: If a value is out of range, or everything would be dropped.

    Example:
        >>> ConvPattern(size=0.25, repeat=2, rotate=45).canonical()
        ConvPattern(size=0.25, stride=0.125, repeat=2, rotate=45.0, shear_x=0.0, shear_y=0.0, share_c=False, \
residual=False, rate=1.0)

    """

    size: float
    stride: float = 1 / 8
    repeat: int = 1
    rotate: float = 0.0
    shear_x: float = 0.0
    shear_y: float = 0.0
    share_c: bool = False
    residual: bool = False
    rate: float = 1.0

    def __post_init__(self) -> None:
        _settle(self, "size", float(check_fraction("ConvPattern", "size", self.size, example=0.25)))
        _settle(self, "stride", _checked_gap(self.stride))
        _settle(self, "repeat", check_count("ConvPattern", "repeat", self.repeat, minimum=1, example=2))
        for name, example in (("rotate", 45.0), ("shear_x", 0.3), ("shear_y", 0.3)):
            _settle(self, name, _checked_finite(name, getattr(self, name), example))
        for name in ("share_c", "residual"):
            _settle(self, name, check_flag("ConvPattern", name, getattr(self, name)))
        _settle(self, "rate", float(check_fraction("ConvPattern", "rate", self.rate, example=0.1)))
        upright = self.rotate % 180.0 == 0.0 and self.shear_x == 0.0 and self.shear_y == 0.0
        if self.size == 1.0 and self.rate == 1.0 and upright:
            raise ConfigurationError(
                "ConvPattern(size=1.0, rate=1.0) was given.",
                "A pattern of size 1 covers the map, and at rate 1 nothing would be left.",
                "Pass, for example, rate=0.1, or a smaller size.",
            )

    @property
    def is_empty(self) -> bool:
        """Whether the pattern drops nothing on any map."""
        return self.size == 0.0 or self.rate == 0.0

    def covers(self, height: int, width: int) -> bool:
        """Tell whether the pattern, rounded to whole pixels, covers every map of this size wherever it is placed.

        At rate 1 a `PatternDropout` refuses such maps.

        Args:
            height: Rows of the map, at least 1.
            width: Columns of the map, at least 1.

        """
        if self.is_empty:
            return False
        turned = (self.rotate, self.shear_x, self.shear_y)
        canvas, _ = list_stencil(height, width, self.size, self.stride, self.repeat, *turned)
        return (len(canvas), len(canvas[0])) == COVERING

    def canonical(self) -> "ConvPattern":
        """Write the pattern in one way: patterns that are equal on every map become the same settings.

        The stride of one square, squares that fit no map, and full turns make no difference.
        """
        if self.is_empty:
            return ConvPattern(0.0)
        # So many squares never fit: even rounded down, with gaps of one pixel, they are wider than the map.
        repeat = self.repeat
        while repeat > 1 and repeat * self.size >= 1.0:
            repeat -= 1
        return ConvPattern(
            size=self.size,
            stride=self.stride if repeat > 1 else 1 / 8,
            repeat=repeat,
            rotate=self.rotate % FULL_TURN,
            shear_x=self.shear_x + 0.0,  # -0.0 becomes 0.0
            shear_y=self.shear_y + 0.0,
            share_c=self.share_c,
            residual=self.residual,
            rate=self.rate,
        )

    @classmethod
    def dropblock(cls, size: float, rate: float) -> "ConvPattern":
        """One square in each channel, with probability `rate` (DropBlock, arXiv 1810.12890).

        DropBlock itself draws the number of squares. Given that a channel has one, the two are the same. The share of
        elements dropped is `rate` times the share of the map that a square covers.
        """
        return cls(size, rate=rate)

    @classmethod
    def spatial_dropout(cls, rate: float) -> "ConvPattern":
        """Whole channels, as `nn.Dropout2d` drops them (SpatialDropout, arXiv 1411.4280)."""
        return cls(1.0, rate=rate)

    @classmethod
    def stochastic_depth(cls, rate: float) -> "ConvPattern":
        """Whole samples, for the output of a residual branch (stochastic depth, arXiv 1603.09382)."""
        return cls(1.0, share_c=True, rate=rate)

    @classmethod
    def cutout(cls, size: float) -> "ConvPattern":
        """One square in each sample, the same in all channels, for the input of a network (cutout, arXiv 1708.04552).

        The square lies inside the image. Cutout itself may cut it off at the border.
        """
        return cls(size, share_c=True)


@dataclass(frozen=True)
class TokenPattern:
    """Runs of tokens in which values are dropped (sec. "Methods", arXiv 2101.01761).

    Runs of `size` tokens are affected, with `stride` tokens between them, from an offset drawn for each sample. In
    affected tokens each value is dropped with probability `rate`, tokens and channels alone or together. The paper does
    not say which noise it uses: Bernoulli noise is ours. `PatternDropout` applies a pattern.

    Args:
        size: Tokens in a run, or "all". 0: no pattern.
        stride: Tokens between two runs, at least 1. It has no meaning for "all".
        share_t: One draw for all tokens of a run. Otherwise each token has its own.
        share_c: One draw for all channels. Otherwise each has its own. In attention weights, channels are heads.
        rate: Probability that an affected value is dropped, in [0, 1]. With "all" it is below 1.

    Raises:
        ConfigurationError: If a value is out of range, or everything would be dropped.

    Example:
        >>> TokenPattern("all", share_c=True) == TokenPattern.word_dropout(0.1)
        True

    """

    size: int | Literal["all"]
    stride: int = 1
    share_t: bool = False
    share_c: bool = False
    rate: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.size, str) or self.size != "all":
            _settle(self, "size", _checked_run(self.size))
        _settle(self, "stride", check_count("TokenPattern", "stride", self.stride, minimum=1, example=2))
        for name in ("share_t", "share_c"):
            _settle(self, name, check_flag("TokenPattern", name, getattr(self, name)))
        _settle(self, "rate", float(check_fraction("TokenPattern", "rate", self.rate, example=0.1)))
        if self.size == "all" and self.rate == 1.0:
            raise ConfigurationError(
                "TokenPattern(size='all', rate=1.0) was given.",
                "With size 'all' every token is affected, and at rate 1 nothing would be left.",
                "Pass, for example, rate=0.1, or a number of tokens as size.",
            )

    @property
    def is_empty(self) -> bool:
        """Whether the pattern drops nothing."""
        return self.size == 0 or self.rate == 0.0

    def canonical(self) -> "TokenPattern":
        """Write the pattern in one way: patterns that drop alike become the same settings.

        The stride of "all", and a draw shared in runs of one token, make no difference.
        """
        if self.is_empty:
            return TokenPattern(0)
        return TokenPattern(
            size=self.size,
            stride=self.stride if self.size != "all" else 1,
            share_t=self.share_t and self.size != 1,
            share_c=self.share_c,
            rate=self.rate,
        )

    @classmethod
    def variational_dropout(cls, rate: float) -> "TokenPattern":
        """Channels, each for the whole sequence (variational dropout, arXiv 1512.05287)."""
        return cls("all", share_t=True, rate=rate)

    @classmethod
    def word_dropout(cls, rate: float) -> "TokenPattern":
        """Whole tokens (word dropout, arXiv 1512.05287)."""
        return cls("all", share_c=True, rate=rate)

    @classmethod
    def dropout(cls, rate: float) -> "TokenPattern":
        """Each value alone, as `nn.Dropout` does."""
        return cls("all", rate=rate)


Pattern: TypeAlias = ConvPattern | TokenPattern


def _settle(pattern: object, name: str, value: object) -> None:
    # Plain values, whatever they came as. A frozen dataclass can be set in no other way.
    object.__setattr__(pattern, name, value)


def _checked_gap(value: Any) -> float:
    if not (is_real(value) and 0.0 < value <= 1.0):
        raise ConfigurationError(
            f"ConvPattern(stride={describe(value)}) was given.",
            "`stride` is a number in (0, 1]: the gap between two squares over the side of the map.",
            "Pass, for example, stride=0.125.",
        )
    return float(value)


def _checked_finite(name: str, value: Any, example: float) -> float:
    if not is_real(value):
        raise ConfigurationError(
            f"ConvPattern({name}={describe(value)}) was given.",
            f"`{name}` is a finite number.",
            f"Pass, for example, {name}={example}.",
        )
    return float(value)


def _checked_run(value: Any) -> int:
    try:
        return check_count("TokenPattern", "size", value, minimum=0, example=2)
    except ConfigurationError as error:
        given, _, remedy = error.args
        raise ConfigurationError(given, "`size` is a whole number of at least 0, or 'all'.", remedy) from None
