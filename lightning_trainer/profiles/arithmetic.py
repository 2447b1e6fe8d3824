"""Exact values of canonical arithmetic, `(op a b)` over whole and decimal numbers, safe on any text.

Sizes are bounded before anything is computed, nesting costs no recursion, and nothing is ever passed to `eval`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

_NUMBER = re.compile(r"([+-]?)([0-9]{1,200}|[0-9]{1,3}(?:,[0-9]{3}){1,60})(?:\.([0-9]{1,200})|/([0-9]{1,200}))?")
_TOKEN = re.compile(r"[()]|[^\s()]+")
_MAX_CHARACTERS = 10_000
# Numbers longer than about 1200 digits are refused: no task needs them and (pow 9 (pow 9 9)) must not hang a run.
_MAX_BITS = 4096
# A rounded result must show at least this many decimals to pass for the exact one.
_MIN_ROUNDED_DECIMALS = 2


class ArithmeticFault(ValueError):
    """A well-formed calculation that has no value here: division by zero, or a result too large."""


@dataclass(frozen=True)
class Value:
    """A number as written or computed.

    Attributes:
        exact: Its exact value.
        decimals: Digits written after the decimal point; 0 for whole numbers and computed values.
    """

    exact: Fraction
    decimals: int = 0

    def __str__(self) -> str:
        """The number, cut to what a reason can show."""
        text = str(self.exact)
        return text if len(text) <= 40 else f"{text[:37]}..."


def parse_value(text: str) -> Value | None:
    """The value of one number or one canonical expression; None where the text is neither.

    Raises:
        ArithmeticFault: It is a calculation without a value.
    """
    text = text.strip().rstrip(".")
    if len(text) > _MAX_CHARACTERS:
        return None
    return _expression(_TOKEN.findall(text)) if text.startswith("(") else _number(text)


def agree(left: Value, right: Value) -> bool:
    """Whether both are the same number, or one is the other rounded because no finite decimal could state it.

    1/3 agrees with 0.33 and 0.333, not with 0.3 or 0.334; 1/8 agrees with 0.125 alone.
    """
    return left.exact == right.exact or _rounds_to(left, right) or _rounds_to(right, left)


def _rounds_to(value: Value, rounded: Value) -> bool:
    if rounded.decimals < _MIN_ROUNDED_DECIMALS or _is_finite_decimal(value.exact):
        return False
    half_a_digit = Fraction(1, 2 * 10**rounded.decimals)
    return abs(value.exact - rounded.exact) <= half_a_digit


def _is_finite_decimal(number: Fraction) -> bool:
    """Whether the denominator has no prime factor but 2 and 5."""
    return pow(10, number.denominator.bit_length(), number.denominator) == 0


def _number(text: str) -> Value | None:
    match = _NUMBER.fullmatch(text)
    if match is None or (match[4] is not None and int(match[4]) == 0):
        return None
    sign = -1 if match[1] == "-" else 1
    whole, decimals = int(match[2].replace(",", "")), match[3] or ""
    if match[4] is not None:
        return Value(Fraction(sign * whole, int(match[4])))
    scale = 10 ** len(decimals)
    return Value(Fraction(sign * (whole * scale + int(decimals or 0)), scale), len(decimals))


def _expression(tokens: list[str]) -> Value | None:
    """Evaluates with a stack of open parentheses: a thousand of them must not end in RecursionError."""
    open_lists: list[list[str | Fraction]] = [[]]
    for token in tokens:
        if token == "(":
            open_lists.append([])
        elif token != ")":
            number = _number(token)
            open_lists[-1].append(token if number is None else number.exact)
        else:
            result = _applied(open_lists.pop()) if len(open_lists) > 1 else None
            if result is None:
                return None
            open_lists[-1].append(result)
    whole = open_lists[-1]
    if len(open_lists) != 1 or len(whole) != 1 or not isinstance(whole[0], Fraction):
        return None
    return Value(whole[0])


def _applied(items: list[str | Fraction]) -> Fraction | None:
    """The value of `[op, a, b]`; None where this is no known operation on that many numbers."""
    operator = items[0] if items else None
    numbers = [item for item in items[1:] if isinstance(item, Fraction)]
    if not isinstance(operator, str) or len(numbers) != len(items) - 1:
        return None
    if operator == "neg":
        return -numbers[0] if len(numbers) == 1 else None
    if operator not in _BINARY or len(numbers) != 2:
        return None
    result = _BINARY[operator](*numbers)
    if result is not None and _bits(result) > _MAX_BITS:
        raise ArithmeticFault(f"the result of ({operator} …) is too large to compare")
    return result


def _bits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length())


def _divided(left: Fraction, right: Fraction) -> Fraction:
    if right == 0:
        raise ArithmeticFault("the calculation divides by zero")
    return left / right


def _modulo(left: Fraction, right: Fraction) -> Fraction:
    """Takes the divisor's sign, as in Python: -7 mod 3 is 2."""
    if right == 0:
        raise ArithmeticFault("the calculation divides by zero")
    return left % right


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """None for a broken exponent: its value is no fraction in general."""
    if exponent.denominator != 1:
        return None
    if base == 0 and exponent < 0:
        raise ArithmeticFault("the calculation divides by zero")
    if base in (-1, 0, 1) and exponent != 0:
        return base if exponent % 2 else base * base  # however large, only the exponent's parity counts
    if _bits(base) * abs(exponent) > _MAX_BITS:
        raise ArithmeticFault("the result of (pow …) is too large to compare")
    return Fraction(base ** int(exponent))


_BINARY: dict[str, Callable[[Fraction, Fraction], Fraction | None]] = {
    "add": lambda left, right: left + right,
    "sub": lambda left, right: left - right,
    "mul": lambda left, right: left * right,
    "div": _divided,
    "mod": _modulo,
    "pow": _power,
    "max": max,
    "min": min,
}
