"""Whole numbers of variable length, as Thrift, protocol buffers and Riegeli write them."""


def read(data: bytes, place: int) -> tuple[int, int]:
    """Return the number that begins at `place`, and the place behind it.

    Raises:
        LookupError: if the data ends inside the number, or it has more than 64 bits.
    """
    number = 0

    # Seven bits a byte, the lowest first. The top bit of a byte says that another one follows.
    for shift in range(0, 70, 7):
        number |= (data[place] & 127) << shift
        place += 1
        if data[place - 1] < 128:
            return number, place
    raise LookupError("a number of more than 64 bits")
