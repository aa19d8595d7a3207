"""The speed benchmark, beside other libraries and the ceilings of the machine."""
