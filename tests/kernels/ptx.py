"""The few PTX instructions that our inline assembly uses, run in Python."""

import re

_MASK = 0xFFFFFFFF


def run_ptx(text: str, inputs: dict[str, int]) -> dict[str, int]:
    """Execute straight-line PTX on 32-bit registers; `inputs` are those it may read at first."""
    registers = dict(inputs)

    def value(name: str) -> int:
        if re.fullmatch(r"0x[0-9a-f]+|\d+", name):
            return int(name, 0)
        return registers[name]

    for line in text.splitlines():
        line = line.strip().rstrip(";")
        if line in "{}" or line.startswith(".reg"):
            continue
        name, rest = line.split(" ", 1)
        target, *operands = (part.strip() for part in rest.split(","))
        registers[target] = _OPERATIONS[name](*map(value, operands)) & _MASK
    return registers


def _prmt(a: int, b: int, selector: int) -> int:
    pool = (b << 32 | a).to_bytes(8, "little")
    result = 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = pool[nibble & 7]
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * place
    return result


def _lop3(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for bit in range(32):
        index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | c >> bit & 1
        result |= (table >> index & 1) << bit
    return result


_OPERATIONS = {
    "shr.b32": lambda a, b: a >> b if b < 32 else 0,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "add.u32": lambda a, b: a + b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
}
